"""Plots as SVG, written by hand. Each brings its own background and follows the reader's light or dark."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from xml.sax.saxutils import escape

STYLE = """
svg { font-family: system-ui, sans-serif; font-size: 13px; }
.back { fill: #ffffff; } text { fill: #1f2328; } .faint { fill: #59636e; } .grid { stroke: #d1d9e0; }
.c0 { --c: #0550ae; } .c1 { --c: #bc4c00; } .c2 { --c: #1a7f37; } .c3 { --c: #8250df; } .c4 { --c: #6e7781; }
.c5 { --c: #bf3989; } .c6 { --c: #9a6700; }
.mark { fill: var(--c); stroke: var(--c); } .line { stroke: var(--c); fill: none; stroke-width: 2; }
@media (prefers-color-scheme: dark) {
.back { fill: #0d1117; } text { fill: #f0f6fc; } .faint { fill: #9198a1; } .grid { stroke: #3d444d; }
.c0 { --c: #58a6ff; } .c1 { --c: #f0883e; } .c2 { --c: #3fb950; } .c3 { --c: #bc8cff; } .c4 { --c: #9198a1; }
.c5 { --c: #f778ba; } .c6 { --c: #d29922; }
}
"""
# Colours a renderer without custom properties falls back to: the light ones.
COLOURS = ("#0550ae", "#bc4c00", "#1a7f37", "#8250df", "#6e7781", "#bf3989", "#9a6700")

Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis from one place to another on the canvas."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        part = (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return self.start + part * (self.end - self.start)

    def decades(self) -> list[float]:
        ends = round(math.log10(self.low)), round(math.log10(self.high))
        return [10.0**power for power in range(ends[0], ends[1] + 1)]


def decades_around(values: list[float]) -> tuple[float, float]:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return 10.0**low, 10.0 ** max(high, low + 1)


def seconds(value: float) -> str:
    """A time, in the unit that suits it."""
    for limit, factor, unit in ((1e-6, 1e9, "ns"), (1e-3, 1e6, "µs"), (1, 1e3, "ms")):
        if value < limit * 0.9999:
            return f"{value * factor:.3g} {unit}"
    return f"{value:.3g} s"


def count(value: float) -> str:
    return f"{value:,.0f}"


def size(value: float) -> str:
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    power = min(int(math.log(max(value, 1), 1024) + 0.01), len(units) - 1)
    return f"{value / 1024**power:.3g} {units[power]}"


def _text(x: float, y: float, words: str, *, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(words)}</text>'


def _grid(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="grid" stroke="#d1d9e0" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _mark(x: float, y: float, series: int, title: str) -> str:
    """A filled circle for us (series 0), another shape for each peer: colour is not all there is."""
    colour = COLOURS[series % len(COLOURS)]
    shapes = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6"',
        f'<rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9"',
        f'<path d="M{x:.1f} {y - 6:.1f}l6 10.5h-12z"',
        f'<path d="M{x:.1f} {y - 6:.1f}l6 6-6 6-6-6z"',
        f'<path stroke-width="2.5" d="M{x - 4.5:.1f} {y - 4.5:.1f}l9 9m0-9l-9 9"',
        f'<path stroke-width="2.5" d="M{x:.1f} {y - 6:.1f}v12m-6-6h12"',
        f'<path d="M{x:.1f} {y + 6:.1f}l6-10.5h-12z"',
    )
    shape = shapes[series % len(shapes)]
    kind = f'class="mark c{series % len(COLOURS)}" fill="{colour}" stroke="{colour}"'
    return f"{shape} {kind}><title>{escape(title)}</title>{shape[1 : shape.index(' ')].join(('</', '>'))}"


def _svg(width: float, height: float, title: str, parts: list[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" '
        f'role="img">\n<title>{escape(title)}</title>\n<style>{STYLE}</style>\n'
        f'<rect class="back" fill="#fff" width="100%" height="100%"/>\n'
        f"{_text(16, 26, title)}\n{body}\n</svg>\n"
    )


def _legend(names: list[str], top: float, columns: int = 3, width: float = 300) -> list[str]:
    parts = []
    for i, name in enumerate(names):
        x, y = 24 + i % columns * width, top + i // columns * 22
        parts += [_mark(x, y, i, name), _text(x + 14, y + 4, name)]
    return parts


def dots(title: str, rows: list[tuple[str, dict[str, float]]], series: list[str]) -> str:
    """One row for each job, one mark for each that did it, on a logarithmic axis of time."""
    left, width, step, top = 330, 960, 26, 44 + 22 * math.ceil(len(series) / 3)
    bottom = top + step * len(rows) + 8
    low, high = decades_around([value for _, cells in rows for value in cells.values()])
    axis = Axis(low, high, left, width - 40)
    parts = _legend(series, 50)
    for tick in axis.decades():
        x = axis.at(tick)
        parts += [
            _grid(x, top, x, bottom),
            _text(x, bottom + 18, seconds(tick), anchor="middle", kind="faint"),
        ]
    for i, (label, cells) in enumerate(rows):
        y = top + step * (i + 0.5)
        parts += [_grid(left, y, width - 40, y), _text(left - 14, y + 4, label, anchor="end")]
        # We are drawn last, on top.
        for name in sorted(cells, key=series.index, reverse=True):
            title_of = f"{name}: {seconds(cells[name])}"
            parts.append(_mark(axis.at(cells[name]), y, series.index(name), title_of))
    return _svg(width, bottom + 32, title, parts)


def lines(title: str, lines: dict[str, list[Point]], x_name: str, show: Callable[[float], str]) -> str:
    """Cost against size, both logarithmic."""
    width, height, left = 960, 460, 90
    top = 44 + 22 * math.ceil(len(lines) / 2)
    xs = [x for line in lines.values() for x, _ in line]
    across = Axis(min(xs), max(xs), left, width - 50)
    up = Axis(*decades_around([y for line in lines.values() for _, y in line]), height - 60, top + 10)
    parts = _legend(list(lines), 50, columns=2, width=450)
    for tick in up.decades():
        y = up.at(tick)
        parts += [
            _grid(left, y, width - 50, y),
            _text(left - 10, y + 4, seconds(tick), anchor="end", kind="faint"),
        ]
    for x in sorted(set(xs)):
        parts += [
            _grid(across.at(x), top + 10, across.at(x), height - 60),
            _text(across.at(x), height - 40, show(x), anchor="middle", kind="faint"),
        ]
    parts.append(_text((left + width - 50) / 2, height - 16, x_name, anchor="middle"))
    for i, (name, line) in enumerate(lines.items()):
        places = [(across.at(x), up.at(y)) for x, y in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        colour = COLOURS[i % len(COLOURS)]
        parts.append(
            f'<polyline class="line c{i % len(COLOURS)}" fill="none" stroke="{colour}" points="{path}"/>'
        )
        parts += [_mark(x, y, i, f"{name}: {seconds(p[1])}") for (x, y), p in zip(places, line, strict=True)]
    return _svg(width, height, title, parts)
