"""The teaching core: PaliGemma as plain NumPy functions, to be read in the order ops, siglip, gemma, paligemma, losses.
Each function uses only those above it. README.md in this folder is the course that goes with them; vq_vae, the codec of
masks, stands beside the core.

The letters in every shape line, the same in all files:

    B  examples in the batch        N  query heads           D  width of a token
    P  image patches                K  key/value heads       F  width inside an MLP
    T  query positions (tokens)     G  query heads that      V  vocabulary
    S  key positions                   share one, N / K      L  layers
    C  channels of a picture        H  size of one head

A picture's sides are written out: height, width, and size where both are equal; rows and columns count its patches.

Parameters are nested dicts of arrays whose keys are the checkpoint's own names. Matrices keep the file's (out, in)
orientation and are multiplied as `x @ weight.T`. Float32 in gives float32 out, float64 gives float64; no function
changes its inputs. Every array is made from another one (`like=`), so the same lines run on a GPU when the arrays
that come in are CuPy's: NumPy hands each call to the library that owns the array.
"""
