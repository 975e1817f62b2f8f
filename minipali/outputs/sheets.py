"""Numbers as pictures: which caption belongs to which image, and many images on one sheet."""
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from minipali.outputs.draw import shorten

INK, PALE, PAPER = "#1f2937", "#6b7280", "#ffffff"
# From low to high. Lightness falls all the way, so the order survives a gray printout and color-blind eyes.
_SCALE = np.array([[247, 251, 255], [198, 219, 239], [107, 174, 214], [33, 113, 181], [8, 48, 107]], np.float64)


def _color(share):
    """A share of 0..1 of the way along the scale as (r, g, b)."""
    stops = np.linspace(0, 1, len(_SCALE))
    return tuple(round(np.interp(share, stops, channel)) for channel in _SCALE.T)


def _wrap(text, font, width, lines):
    """The text broken at spaces into at most so many lines of at most `width` pixels; what is too much is cut."""
    words, wrapped = text.split(), []
    while words and len(wrapped) < lines:
        count = 1
        while count < len(words) and font.getlength(" ".join(words[:count + 1])) <= width:
            count += 1
        if len(wrapped) == lines - 1:
            count = len(words)  # the last line takes all that is left, and is shortened if that is too much
        wrapped.append(shorten(" ".join(words[:count]), font, width))
        words = words[count:]
    return wrapped


def _thumbnail(image, side):
    """The whole picture inside a square of paper, in its own proportions."""
    return ImageOps.pad(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC, color=PAPER)


def similarity_picture(matrix: np.ndarray, images: Sequence[Image.Image], texts: Sequence[str]) -> Image.Image:
    """A matrix of similarities (images, texts) as a table: a column for each image, a row for each text.

    The darker, the more alike; a frame marks the best text for each image.
    """
    matrix = np.asarray(matrix, np.float64)
    if matrix.shape != (len(images), len(texts)):
        raise ValueError(f"the matrix is {matrix.shape}, expected ({len(images)}, {len(texts)}): images, texts")
    cell, gap, margin, row = 96, 4, 24, 56
    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
    wrapped = [_wrap(text, font, 280, 2) for text in texts]
    names = round(max(font.getlength(line) for lines in wrapped for line in lines or [""])) + 16
    left, top = margin + names, margin + cell + 2 * gap
    width, bottom = left + len(images) * (cell + gap) + margin, top + len(texts) * (row + gap)
    canvas = Image.new("RGB", (width, bottom + 64), PAPER)
    pen = ImageDraw.Draw(canvas)

    low, high = matrix.min(), matrix.max()
    span = high - low or 1.0
    digits = 2 if max(abs(low), abs(high)) < 100 else 0
    for j, lines in enumerate(wrapped):
        middle = top + j * (row + gap) + row / 2
        pen.text((left - 16, middle), "\n".join(lines), fill=INK, font=font, anchor="rm", align="right")
    for i, image in enumerate(images):
        x = left + i * (cell + gap)
        canvas.paste(_thumbnail(image, cell), (x, margin))
        best = int(np.argmax(matrix[i]))
        for j, value in enumerate(matrix[i]):
            y, share = top + j * (row + gap), (value - low) / span
            pen.rectangle([x, y, x + cell - 1, y + row - 1], fill=_color(share),
                          outline="#ea580c" if j == best else None, width=3)
            pen.text((x + cell / 2, y + row / 2), f"{value:.{digits}f}", fill="white" if share > 0.55 else INK,
                     font=font, anchor="mm")

    bar = min(240, width - left - margin - gap)
    for x in range(bar):
        pen.line([left + x, bottom + 16, left + x, bottom + 27], fill=_color(x / (bar - 1)))
    pen.text((left, bottom + 34), f"{low:.{digits}f}", fill=PALE, font=small)
    pen.text((left + bar, bottom + 34), f"{high:.{digits}f}", fill=PALE, font=small, anchor="ra")
    pen.text((left - 16, bottom + 22), "similarity", fill=PALE, font=small, anchor="rm")
    return canvas


def contact_sheet(images: Sequence[Image.Image], captions: Sequence[str], columns: int,
                  lines: int = 6) -> Image.Image:
    """The images in rows of so many, each over its caption of at most so many lines."""
    side, gap, margin = 224, 24, 24
    font = ImageFont.load_default(16)
    spacing = 4
    text_height = lines * (sum(font.getmetrics()) + spacing)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (2 * margin + columns * (side + gap) - gap,
                               2 * margin + rows * (side + text_height + gap) - gap), PAPER)
    pen = ImageDraw.Draw(canvas)
    for n, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = margin + n % columns * (side + gap), margin + n // columns * (side + text_height + gap)
        canvas.paste(_thumbnail(image, side), (x, y))
        pen.text((x, y + side + 8), "\n".join(_wrap(caption, font, side, lines)), fill=INK, font=font, spacing=spacing)
    return canvas
