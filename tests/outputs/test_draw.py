"""Boxes and masks as they are drawn."""
import numpy as np
import pytest
from PIL import Image

from minipali.outputs.boxes import Detection
from minipali.outputs.draw import draw_detections


@pytest.mark.parametrize("size, drawn", [((40, 30), (640, 480)), ((98, 98), (686, 686)), ((640, 20), (640, 20)),
                                         ((1000, 500), (1000, 500)), ((1, 2), (320, 640))])
def test_small_pictures_are_enlarged(size, drawn):
    """By a whole factor, so that a label can be read; the original stays as it was."""
    image = Image.new("RGB", size, "white")
    result = draw_detections(image, [Detection("cat", (0.0, 0.0, float(size[0]), float(size[1])))])
    assert result.size == drawn and image.getcolors() == [(size[0] * size[1], (255, 255, 255))]


def test_box_and_mask_lie_where_they_should():
    """Within the box alone the picture changes, apart from its label; the mask tints what it covers."""
    mask = np.zeros((64, 64), bool)
    mask[32:48, 32:48] = True
    image = Image.new("RGB", (64, 64), "white")
    result = np.array(draw_detections(image, [Detection("", (16.0, 24.0, 56.0, 56.0))], [mask]))
    changed = np.argwhere((result != 255).any(2))
    scale = result.shape[0] // 64
    assert changed.min(0).tolist() == [24 * scale, 16 * scale]
    assert changed.max(0).tolist() == [56 * scale - 1, 56 * scale - 1]
    assert (result[40 * scale, 40 * scale] != 255).any() and (result[30 * scale, 22 * scale] == 255).all()
