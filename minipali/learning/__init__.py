"""How a model learns: weights and batches come in, better weights go out; for any PaliGemma.

Read in this order:

- `backward/`: the gradient of every function of the model, file by file beside it;
- `initialize`: random weights to start from;
- `optimizer`: AdamW, Muon, clipping, the learning rate;
- `stage`: what the loop asks of a training task;
- `gradients`, `processes`: a step's gradient, computed here or in several processes, to the same bits;
- `loop`, `state`: step after step, saved so that a run can stop at any moment and go on;
- `lora`: low-rank matrices that learn in place of a large one, and matrices that do not learn;
- `fine_tune`, `examples`: the user's own pictures, prompts and answers.
"""
