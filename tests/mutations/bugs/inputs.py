"""Seeded bugs of minipali/inputs/."""
from seeded import FAST, Bug

BUGS = [
    Bug("inputs/image.py", "bilinear resizing",
        "resample: int = int(Image.Resampling.BICUBIC)", "resample: int = int(Image.Resampling.BILINEAR)", FAST),
    Bug("inputs/image.py", "channels last", "pixels.transpose(2, 0, 1)", "pixels.transpose(2, 1, 0)"),
    Bug("inputs/image.py", "the EXIF note ignored", "return ImageOps.exif_transpose(image)", "return image", FAST),
    Bug("inputs/image.py", "a picture's header is enough", "        image.verify()", "        pass"),
    Bug("inputs/image.py", "16-bit pictures clipped to white",
        "image = _deep_grey_to_bytes(image)  # convert", 'image = image.convert("L")  # convert'),
    Bug("inputs/image.py", "resized as floats",
        "pixels = np.asarray(to_rgb(image).resize((size, size), resample))",
        "bands = to_rgb(image).split()\n"
        '    bands = [band.convert("F").resize((size, size), resample) for band in bands]\n'
        "    pixels = np.stack([np.asarray(band) for band in bands], axis=-1)"),
    Bug("inputs/folder.py", "all files of a folder are pictures", "if Path(name).suffix.lower() in endings]", "]"),
    Bug("inputs/folder.py", "endings in small letters only", "Path(name).suffix.lower()", "Path(name).suffix"),
    Bug("inputs/bpe.py", "merges in the wrong order",
        "heapq.heappush(heap, (rank, left))", "heapq.heappush(heap, (-rank, left))", FAST),
    Bug("inputs/tokenizer.py", "special tokens in the text", "token in self.tokenizer.special", "token in ()", FAST),
    Bug("inputs/tokenizer.py", "unknown characters not as bytes",
        "if self.byte_fallback and all(", "if False and all(", FAST),
    Bug("inputs/tokenizer.py", "a blank put in front of the text",
        "        ids = []\n"
        "        raw, normalized",
        '        ids, text = [], " " + text\n'
        "        raw, normalized"),
    Bug("inputs/tokenizer.py", "half a character gets out",
        "            return self.finish() + token\n"
        "        self.run.append",
        "            return self.finish() + token\n"
        "        self.run.append(int(byte[1], 16))\n"
        "        return self.finish()\n"
        "        self.run.append"),
    Bug("inputs/sentencepiece.py", "the lowest score first", "{text: -score for", "{text: score for"),
    Bug("inputs/protobuf.py", "numbers highest bits first",
        "value |= (byte & 127) << shift", "value = value << 7 | byte & 127"),
    Bug("inputs/captions.py", "the end after the padding forgotten", "[:T - 1], tokenizer.eos_id]", "[:T]]"),
    Bug("inputs/captions.py", "punctuation kept", "string.punctuation))", '""))'),
]
