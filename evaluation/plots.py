"""Line plots as self-contained SVG text: panels in a grid, one legend.

Colours of ground, text and grid are those of the page around them (custom properties of page.html), else of paper.
"""
import html
import math
from dataclasses import dataclass

WIDTH = 300                       # px of a panel
HEIGHT = 230
LEFT = 48                         # px of its margins
RIGHT = 10
TOP = 28
BOTTOM = 38
COLOURS = (  # of lines, each with a contrast of at least 3 to white and to the dark ground of a page
    "#7a7a7a", "#3b7cc4", "#c4551a", "#228833", "#a8479a", "#0e8a94", "#8f7400", "#d0405a", "#7d6bd0", "#5d8a1e")
KEY = 145                         # px of a legend entry


@dataclass
class Line:
    """One line of a panel: x and y of equal length, in data units."""

    label: str
    x: list
    y: list


def ticks(low, high, n=4):
    """About n round numbers that span low .. high."""
    span = max(high - low, 1e-9)
    step = 10 ** math.floor(math.log10(span / n))
    step *= next(k for k in (1, 2, 5, 10) if span / (k * step) <= n + 0.5)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _text(x, y, words, anchor="middle", size=11):
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" style="fill:var(--ink,black)">'
            f'{html.escape(words)}</text>')


def _limits(values):
    """Ends of an axis: the smallest and the largest value; the largest + 1 when they are equal."""
    low = min(values, default=0)
    high = max(values, default=1)
    return low, (high if high > low else low + 1)


def _grid(path, is_zero=False):
    return f'<path d="{path}" style="stroke:var({"--axis,#999" if is_zero else "--grid,#eee"})"/>'


def _panel(title, label, lines, colours, band=None):
    x0, x1 = _limits([x for one in lines for x in one.x])
    y0, y1 = _limits([*(y for one in lines for y in one.y), *(band or ())])

    def at_x(x):
        return LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def at_y(y):
        return TOP + (y1 - y) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    out = [_text(WIDTH / 2, 16, title, size=12), _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, label)]
    if band:
        low, high = map(at_y, band)
        out.append(f'<rect class="band" x="{LEFT}" y="{high:.1f}" width="{WIDTH - LEFT - RIGHT}" '
                   f'height="{low - high:.1f}" fill="#3b7cc4" fill-opacity="0.13"/>')
    for x in ticks(x0, x1):
        out += [_grid(f"M{at_x(x):.1f} {TOP}V{HEIGHT - BOTTOM}"),
                _text(at_x(x), HEIGHT - BOTTOM + 14, f"{x:g}")]
    for y in ticks(y0, y1):
        out += [_grid(f"M{LEFT} {at_y(y):.1f}H{WIDTH - RIGHT}", y == 0),
                _text(LEFT - 5, at_y(y) + 4, f"{y:g}", "end")]
    for one in lines:
        path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in zip(one.x, one.y, strict=True))
        out.append(f'<polyline points="{path}" fill="none" stroke="{colours[one.label]}" stroke-width="1.8"/>')
    return "".join(out)


def figure(panels, columns):
    """SVG of panels in rows of `columns`.

    panels  list of (title, label of the x axis, list of Line) and, to be shaded, the band in which the lines may move,
            (low, high). Lines of one label share a colour and a legend entry
    """
    labels = list(dict.fromkeys(one.label for panel in panels for one in panel[2]))
    colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}
    rows = -(-len(panels) // columns)
    width = columns * WIDTH
    per_row = max(1, width // KEY)
    height = rows * HEIGHT + 20 * -(-len(labels) // per_row) + 10
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
           'font-family="sans-serif">'
           f'<rect width="{width}" height="{height}" style="fill:var(--ground,white)"/>']
    for i, panel in enumerate(panels):
        out.append(f'<g transform="translate({i % columns * WIDTH} {i // columns * HEIGHT})">'
                   f'{_panel(*panel[:3], colours, *panel[3:])}</g>')
    for i, label in enumerate(labels):
        x = i % per_row * KEY + 12
        y = rows * HEIGHT + 20 * (i // per_row) + 14
        out.append(f'<path d="M{x} {y}h22" stroke="{colours[label]}" stroke-width="3"/>'
                   + _text(x + 28, y + 4, label, "start", 12))
    return "".join(out) + "</svg>\n"
