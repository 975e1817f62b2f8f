"""Seeded bugs of minipali/outputs/."""
from seeded import FAST, Bug

BUGS = [
    Bug("outputs/sheets.py", "the best image for each text is framed",
        "int(np.argmax(matrix[i]))", "int(np.argmax(matrix[:, i]))"),
    Bug("outputs/boxes.py", "x before y", "y0, x0, y1, x1 = locations", "x0, y0, x1, y1 = locations", FAST),
    Bug("outputs/boxes.py", "1024 steps across the picture", "LAST = 1023", "LAST = 1024", FAST),
    Bug("outputs/boxes.py", "locations cut and not rounded",
        "round(value / length * LAST)", "int(value / length * LAST)"),
    Bug("outputs/boxes.py", "the longer side for both",
        "x0 / steps * width, y0 / steps * height", "x0 / steps * width, y0 / steps * width"),
    Bug("outputs/masks.py", "the mask cut before it is stretched",
        "Image.fromarray(np.asarray(mask, np.float32))", "Image.fromarray(np.sign(np.asarray(mask, np.float32)))"),
    Bug("outputs/masks.py", "runs that start inside",
        "np.diff(flat, prepend=False)", "np.diff(flat, prepend=True)", FAST),
    Bug("outputs/masks.py", "runs down the columns", "flat = mask.reshape(-1)", "flat = mask.T.reshape(-1)"),
    Bug("outputs/masks.py", "the mask over the whole picture",
        "paste(mask, detection.box, height, width)", "paste(mask, (0, 0, width, height), height, width)", FAST),
    Bug("outputs/masks.py", "the mask in another object's box",
        "[self._mask(detection, height, width) if", "[self._mask(detections[0], width, height) if"),
    Bug("outputs/masks.py", "codes that are not in the book end all", "except ValueError:", "except KeyError:"),
    Bug("outputs/masks.py", "another model's codec",
        "if self.path.exists():\n"
        "            return vae_oid.read(self.path)",
        "if self.path.exists() or True:\n"
        '            return vae_oid.read(Path("weights/vae-oid.npz"))'),
    Bug("outputs/masks.py", "the codec looked for inside the .npz",
        "folder_of(model.path) / ", "model.path / "),
    Bug("outputs/picture_file.py", "a format that Pillow only reads is noticed after the work",
        '    _encoded(Image.new("RGB", (1, 1)), path)\n', ""),
    Bug("outputs/picture_file.py", "endings in capitals are no format", ".suffix.lower()", ".suffix"),
    Bug("outputs/picture_file.py", "a place that cannot be written is noticed after the work",
        "    check_writable(path)\n", ""),
    Bug("outputs/draw.py", "small pictures stay small", "scale = max(1, round(640 / max(image.size)))", "scale = 1"),
]
