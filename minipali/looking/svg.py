"""Drawings as SVG text: readable on a phone (480 wide, letters of at least 14), in a light and in a dark page.

Nothing here knows a font or a library's version, so the same drawing is the same text on every machine.
"""
import math
from html import escape

WIDTH = 480
STYLE = """
text{font-family:system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;fill:#1f2937}
.mono{font-family:ui-monospace,Menlo,Consolas,monospace}.soft{fill:#57606a}.on{fill:#fff}.paper{fill:#fff}
.line{stroke:#57606a;fill:none;stroke-width:1.5}.grid{stroke:#57606a;fill:none;stroke-width:.7}.head{fill:#57606a}
.box{fill:#eef2f6;stroke:#8c959f}.blue{fill:#0b62a8}.orange{fill:#b35900}.pale{fill:#d0d7de}
.blueline{stroke:#0b62a8;fill:none;stroke-width:3}
.orangeline{stroke:#b35900;fill:none;stroke-width:3;stroke-dasharray:7 4}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.soft{fill:#9ea7b3}.on{fill:#0d1117}.paper{fill:#0d1117}
.line,.grid{stroke:#9ea7b3}.head{fill:#9ea7b3}.box{fill:#1c232c;stroke:#6e7681}.blue{fill:#6cb6ff}.orange{fill:#f0a050}
.pale{fill:#3d444d}.blueline{stroke:#6cb6ff}.orangeline{stroke:#f0a050}}
""".replace("\n", "")


def number(value):
    """Two decimals at most, and no trailing zeros: what a screen can show."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


class Drawing:
    """A canvas of WIDTH × `height`; every method adds one thing and the last one drawn lies on top."""

    def __init__(self, title, height):
        self.title, self.height, self.parts = title, height, []

    def add(self, tag, cls="", content=None, **attributes):
        pairs = {"class": cls, **{key.replace("_", "-"): value for key, value in attributes.items()}}
        text = "".join(f' {key}="{number(value) if isinstance(value, (int, float)) else value}"'
                       for key, value in pairs.items() if value not in ("", None))
        self.parts.append(f"<{tag}{text}/>" if content is None else f"<{tag}{text}>{content}</{tag}>")

    def rect(self, x, y, width, height, cls="box", opacity=None, rx=None):
        self.add("rect", cls, x=x, y=y, width=width, height=height, fill_opacity=opacity, rx=rx)

    def text(self, x, y, words, cls="", size=16, anchor="middle", bold=False):
        self.add("text", cls, escape(words, quote=False), x=x, y=y, font_size=size, text_anchor=anchor,
                 font_weight="bold" if bold else None)

    def line(self, x0, y0, x1, y1, cls="line"):
        self.add("line", cls, x1=x0, y1=y0, x2=x1, y2=y1)

    def curve(self, xs, ys, cls="blueline"):
        self.add("polyline", cls, points=" ".join(f"{number(x)},{number(y)}" for x, y in zip(xs, ys)))

    def arrow(self, x0, y0, x1, y1, cls="line"):
        """A line with a head at (x1, y1)."""
        self.line(x0, y0, x1, y1, cls)
        angle, size = math.atan2(y1 - y0, x1 - x0), 9
        corners = [(x1, y1)] + [(x1 - size * math.cos(angle + turn), y1 - size * math.sin(angle + turn))
                                for turn in (0.45, -0.45)]
        head = {"line": "head", "blueline": "blue", "orangeline": "orange"}[cls]
        self.add("polygon", head, points=" ".join(f"{number(x)},{number(y)}" for x, y in corners))

    def box(self, x, y, width, height, words, cls="box", size=16):
        """A rounded box with its words, one or more lines, in the middle."""
        self.rect(x, y, width, height, cls, rx=6)
        lines = words.split("\n")
        for i, line in enumerate(lines):
            middle = y + height / 2 + (i - (len(lines) - 1) / 2) * (size + 4) + size * 0.35
            self.text(x + width / 2, middle, line, "on" if cls in ("blue", "orange") else "", size)

    def picture(self, x, y, pixels, scale):
        """An (height, width, 3) array of bytes, pixel by pixel: one path for each color."""
        runs = {}
        for row, line in enumerate(pixels):
            starts = [0, *(i for i in range(1, len(line)) if (line[i] != line[i - 1]).any())]
            for start, end in zip(starts, [*starts[1:], len(line)]):
                color = "#{:02x}{:02x}{:02x}".format(*line[start])
                runs.setdefault(color, []).append(f"M{start} {row}h{end - start}v1h{start - end}z")
        inside = "".join(f'<path fill="{color}" d="{"".join(d)}"/>' for color, d in runs.items())
        self.add("g", "", inside, transform=f"translate({number(x)} {number(y)}) scale({number(scale)})",
                 shape_rendering="crispEdges")

    def __str__(self):
        head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" '
                f'height="{self.height}" role="img"><title>{escape(self.title)}</title><style>{STYLE}</style>')
        paper = f'<rect class="paper" width="{WIDTH}" height="{self.height}" rx="8"/>'
        return "\n".join([head, paper, *self.parts, "</svg>"]) + "\n"
