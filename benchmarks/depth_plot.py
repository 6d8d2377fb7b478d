"""A plot of planning time against depth, one line a tool, as an SVG of its own: drawn from the committed rows alone.

The page's plots are drawn by its templates and coloured by its style sheet; a file in the documentation has neither, so
that only their arithmetic of ticks and labels is shared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from pared.report.curves import apart
from pared.report.plots import short, ticks

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 62, 190, 34, 48  # names stand at the right
# Grey text, and colours that are told apart on white and on black, in print and by the colour-blind.
TEXT, GRID = "#767676", "#9a9a9a"
COLOURS = ("#2a78c8", "#d3700c", "#8a63c9", "#1c8f5f")
TITLE = "Planning time against depth"


def depth_plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """The SVG.

    Args:
        rows: Each with `model`, `depth` and `seconds`, by tool.
    """
    rows = sorted(rows, key=lambda row: row["depth"])
    tools = list(rows[0]["seconds"])
    x_most, y_ticks = 1.06 * rows[-1]["depth"], ticks(0, max(s for row in rows for s in row["seconds"].values()))

    def place(depth: float, seconds: float) -> tuple[float, float]:
        x = LEFT + depth / x_most * (WIDTH - RIGHT - LEFT)
        return round(x, 1), round(HEIGHT - BOTTOM - seconds / y_ticks[-1] * (HEIGHT - BOTTOM - TOP), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="13" fill="{TEXT}">',
        f"<title>{TITLE}</title>",
    ]
    for value in y_ticks:
        y = place(0, value)[1]
        parts += [line(LEFT, y, WIDTH - RIGHT, y), text(LEFT - 8, y + 4, short(value), "end")]
    for row in rows:
        x = place(row["depth"], 0)[0]
        parts += [line(x, TOP, x, HEIGHT - BOTTOM), text(x, HEIGHT - BOTTOM + 18, str(row["depth"]), "middle")]
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "depth of the ResNet (layers)", "middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">seconds</text>')
    found = {tool: [place(row["depth"], row["seconds"][tool]) for row in rows] for tool in tools}
    order = sorted(tools, key=lambda tool: found[tool][-1][1])
    heights = dict(zip(order, apart([found[tool][-1][1] for tool in order], TOP, HEIGHT - BOTTOM), strict=True))
    for tool, colour in zip(tools, COLOURS, strict=False):
        points = " ".join(f"{x},{y}" for x, y in found[tool])
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for row, (x, y) in zip(rows, found[tool], strict=True):
            told = f"{row['model']}, {escape(tool)}: {row['seconds'][tool]:.2f} s"
            parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"><title>{told}</title></circle>')
        parts.append(text(WIDTH - RIGHT + 8, round(heights[tool] + 4, 1), tool, "start", colour))
    return "\n".join([*parts, "</svg>", ""])


def line(x1: float, y1: float, x2: float, y2: float) -> str:
    """A line of the grid."""
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{GRID}" stroke-opacity="0.35"/>'


def text(x: float, y: float, what: str, anchor: str, colour: str = TEXT) -> str:
    """A label."""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{colour}">{escape(what)}</text>'
