"""Sheets of pictures and numbers."""

import numpy as np
from PIL import Image

from minipali.outputs.sheets import similarity_picture


def test_matrix_has_a_dark_cell_where_picture_and_caption_agree():
    """A table that differs from its transpose: pictures are columns, captions are rows."""
    table = np.zeros((2, 2))
    table[0, 1] = 1.0  # picture 0, caption 1: left column, lower row
    sheet = similarity_picture(table, [Image.new("RGB", (9, 9))] * 2, ["x", "y"]).convert("L")
    dark = np.argwhere(np.asarray(sheet.crop((0, 130, sheet.width, 250))) < 60)
    light = np.argwhere(np.asarray(sheet.crop((sheet.width - 124, 130, sheet.width - 24, 250))) < 25)
    assert len(dark) > 2000
    assert dark[:, 0].mean() > 60
    assert not len(light) or light[:, 0].mean() < 70
