"""Attention map and logit lens without a page: a table and a map of characters in the terminal, a sheet as picture."""
import numpy as np
from PIL import Image

from minipali.looking.gather import decoder_attention, token_texts
from minipali.looking.logit_lens import logit_lens
from minipali.outputs.sheets import contact_sheet

_SHADES = " .:-=+*#%@"  # ASCII: any terminal has them
_MARK = np.array([234, 88, 12], np.float64)  # what is looked at is tinted with this


def printable(text):
    """A token as an entry of a table: a space is shown as an underscore, line breaks and control codes escaped."""
    return "".join("_" if c == " " else c if c.isprintable() else repr(c)[1:-1] for c in text)


def chosen_attention(seen, layer=None, head=None):
    """The decoder's attention for each step, averaged over the layers and heads that are not chosen."""
    # -> (steps,S)
    weights = decoder_attention(seen)
    weights = weights.mean(0) if layer is None else weights[layer]
    return weights.mean(0) if head is None else weights[head]


def shares(seen, attention):
    """For each step what goes to the pictures, to BOS, to the rest of the prompt, and to the answer."""
    # (steps,S) -> (steps,4)
    P, end = seen.patches, seen.patches + len(seen.prompt)
    bos = int(seen.prompt[0] == seen.model.cfg.bos_token_id)
    bounds = [(0, P), (P, P + bos), (P + bos, end), (end, attention.shape[1])]
    return np.stack([attention[:, a:b].sum(-1) for a, b in bounds], -1)


def grids(seen, attention):
    """The attention of each step on each picture as a grid."""  # (steps,S) -> (steps,images,rows,columns)
    side = round(seen.model.cfg.vision_config.num_patches ** 0.5)
    return attention[:, :seen.patches].reshape(len(attention), -1, side, side)


def attention_lines(seen, attention):
    """A line for each step: its token, where it looked, and the three patches that got most, as (row, column)."""
    yield f"{'token':14} picture   BOS  prompt  answer  most looked at"
    maps = grids(seen, attention) if seen.patches else [None] * len(attention)
    for text, share, grid in zip(token_texts(seen.model, seen.steps), shares(seen, attention), maps):
        columns = "".join(f"{100 * x:6.0f} %" for x in share)
        best = [] if grid is None else np.argsort(-grid, axis=None, kind="stable")[:3]
        places = [np.unravel_index(i, grid.shape) for i in best]
        spots = " ".join(f"({row},{column})" if len(grid) == 1 else f"{picture + 1}:({row},{column})"
                         for picture, row, column in places)
        yield f"{printable(text)[:14]:14}{columns}  {spots}"


def map_lines(grid):
    """One attention map in characters, two for each patch: the darkest is what was looked at most."""
    share = np.sqrt(grid / (grid.max() or 1))  # or small shares would all be blank
    for row in share:
        yield "  " + "".join(2 * _SHADES[min(int(x * len(_SHADES)), len(_SHADES) - 1)] for x in row)


def lens_lines(seen, width):
    """The logit lens as a table: a line for each step, a column after each layer, wrapped to the terminal's width."""
    lens = logit_lens(seen)
    rows = [0, *range(2, len(lens.top), 2)]  # the embedding, then what each layer's MLP leaves
    names = ["read", *(f"layer {i}" for i in range(len(rows) - 1))]
    steps = slice(seen.first, seen.first + len(seen.steps))
    cells = [token_texts(seen.model, lens.top[row, steps]) for row in rows]
    fits = max(1, (width - 5) // 13)
    for start in range(0, len(rows), fits):
        block = range(start, min(start + fits, len(rows)))
        yield "     " + "".join(f"{names[i]:13}" for i in block).rstrip()
        for step in range(len(seen.steps)):
            yield f"{step + 1:3}  " + "".join(f"{printable(cells[i][step])[:12]:13}" for i in block).rstrip()
        yield ""


def tinted(picture, grid, largest):
    """The picture as the model saw it, paler, each patch tinted by its share of the attention; squares, not clouds."""
    side = grid.shape[0] * max(1, 210 // grid.shape[0])
    image = picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    image = 0.3 * np.asarray(image, np.float64) + 0.7 * np.asarray(image.convert("L"), np.float64)[..., None]
    strength = (0.85 * np.sqrt(grid / largest)).repeat(side // len(grid), 0).repeat(side // len(grid), 1)[..., None]
    return Image.fromarray(np.rint(image * (1 - strength) + _MARK * strength).astype(np.uint8))


def sheet(seen, pictures, attention):
    """A sheet with the first picture once for each step, tinted where that step looked; one scale for all of them."""
    maps = grids(seen, attention)
    largest = maps.max() or 1.0
    titles = [f"{printable(text)}  {share[0]:.0%} on the picture" for text, share in
              zip(token_texts(seen.model, seen.steps), shares(seen, attention))]
    images = [tinted(picture, grid, largest) for step in maps for picture, grid in zip(pictures, step)]
    captions = [f"picture {picture + 1}" if picture else title for title in titles for picture in range(len(pictures))]
    return contact_sheet(images, captions, columns=6, lines=2)
