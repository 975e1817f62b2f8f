"""The bench as a picture: for each form of the weights, bars of what was measured against the machine's limit."""
from PIL import Image, ImageDraw, ImageFont

from minipali.checkpoint.read_matrices import form_of

WIDTH, BAR, GAP, LEFT = 860, 22, 8, 190
COLORS = {"float32": "#4c72b0", "bfloat16": "#55a868", "int8": "#c44e52", "transformers": "#8c8c8c"}


def decode_limit(form, needed, limits):
    """How many tokens a second the limits allow: each of them reads the layers once, in this form, and the head once,
    in its own form."""
    layers, head = needed["decode"] - needed["head"], needed["head"]
    return 1 / (layers / limits[form][1] + head / limits[form_of("lm_head.weight", form)][1])


def bench_picture(rows, needed, limits):
    """`rows`, `needed` and `limits` are those of the command; a line across a bar is the machine's limit."""
    operations = limits["plain"][0]
    panels = [("first token, seconds (less is better)", "first",
               {row["form"]: (needed["vision"] + needed["prefill"]) / operations for row in rows}),
              ("decoding, tokens a second (more is better)", "speed",
               {row["form"]: decode_limit(row["form"], needed, limits) for row in rows if row["form"] in limits}),
              ("peak memory, GB (less is better)", "peak", {})]
    height = GAP + len(panels) * (34 + len(rows) * (BAR + GAP) + GAP)
    picture = Image.new("RGB", (WIDTH, height), "white")
    draw, font, y = ImageDraw.Draw(picture), ImageFont.load_default(15), GAP
    for title, key, marks in panels:
        draw.text((GAP, y), title, "black", font)
        y += 28
        shown = [(row["form"], row[key] / (1e9 if key == "peak" else 1)) for row in rows if key in row]
        largest = max([value for _, value in shown] + list(marks.values()), default=1)
        for form, value in shown:
            right = LEFT + (WIDTH - LEFT - 90) * value / largest
            draw.text((GAP, y + 2), form, "black", font)
            draw.rectangle([LEFT, y, right, y + BAR], COLORS[form])
            if form in marks:
                at = LEFT + (WIDTH - LEFT - 90) * marks[form] / largest
                draw.line([at, y - 2, at, y + BAR + 2], "black", 3)
            draw.text((right + GAP, y + 2), f"{value:.2f}", "black", font)
            y += BAR + GAP
        y += GAP + 6
    return picture
