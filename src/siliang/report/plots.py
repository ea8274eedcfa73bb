"""Plots as inline SVG. Their colours are CSS variables of the page, for light and dark themes and for print."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup, escape

WIDTH, HEIGHT = 460, 330
LEFT, RIGHT, TOP, BOTTOM = 58, 20, 16, 46  # margins for the axes
CHARACTER, LINE = 6.6, 13.0  # width and height of a label's characters, at font size 12
Side = Literal["start", "end", "middle"]


@dataclass(frozen=True)
class Point:
    """A method in a plot. `series` is its number; it selects colour and shape."""

    label: str
    series: int
    x: float
    y: float
    x_std: float | None = None
    y_std: float | None = None


@dataclass(frozen=True)
class Curve:
    """A line in a plot."""

    label: str
    series: int
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Axis:
    """One axis: its title, its range and its ticks."""

    title: str
    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False
    show: Callable[[float], str] = lambda value: f"{value:g}"

    @classmethod
    def over(
        cls, title: str, values: Sequence[float], *, log: bool = False, zero: bool = False, room: float = 0.08
    ) -> Axis:
        """An axis over the range of `values`, with a margin of `room`; with `zero`, it begins at 0."""
        if log:
            low, high = math.log10(max(min(values), 1e-12)), math.log10(max(*values, 1e-12))
            edge = max(high - low, 0.5) * room
            low, high = low - edge, high + edge
            ticks = tuple(10.0**e for e in range(math.ceil(low), math.floor(high) + 1))
            if len(ticks) < 2:
                ticks = tuple(
                    m * 10.0**e
                    for e in range(math.floor(low), math.ceil(high) + 1)
                    for m in (1, 2, 5)
                    if low <= math.log10(m * 10.0**e) <= high
                )
            return cls(title, 10**low, 10**high, ticks, True, short)
        low, high = (0.0 if zero else min(values)), max(values)
        edge = (high - low or abs(high) or 1.0) * room
        low, high = (0.0 if zero else low - edge), high + edge
        step = nice_step((high - low) / 5)
        first = math.ceil(low / step - 1e-9)
        ticks = tuple(round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1))
        return cls(title, low, high, ticks, False, short if high >= 10_000 else lambda value: f"{value:g}")

    def place(self, value: float) -> float:
        """The position of a value on the axis, from 0 to 1."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = (math.log10(max(v, 1e-12)) for v in (value, low, high))
        return (value - low) / (high - low)


def nice_step(about: float) -> float:
    """The smallest of 1, 2 or 5 times a power of ten that is at least `about`."""
    power = 10.0 ** math.floor(math.log10(about))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= about * (1 - 1e-9))


def short(value: float) -> str:
    """A count in short form, such as 10k or 2M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:g}{unit}"
    return f"{value:g}"


def scatter(
    points: Sequence[Point], x: Axis, y: Axis, *, front: Sequence[Point] = (), diagonal: bool = False
) -> Markup:
    """Points with error bars and names; the Pareto front is a dashed line.

    Args:
        diagonal: Draw the line x = y.
    """
    parts = [_frame(x, y)]
    if diagonal:
        a, b = max(x.low, y.low), min(x.high, y.high)
        parts.append(_path([(_x(x, a), _y(y, a)), (_x(x, b), _y(y, b))], "front"))
    if len(front) > 1:
        ordered = sorted(front, key=lambda p: p.x)
        parts.append(_path([(_x(x, p.x), _y(y, p.y)) for p in ordered], "front"))
    taken = [(_x(x, p.x) - 7, _y(y, p.y) - 7, _x(x, p.x) + 7, _y(y, p.y) + 7) for p in points]
    for p in points:
        cx, cy = _x(x, p.x), _y(y, p.y)
        parts.append(_bars(p, x, y))
        tip = f"{p.label}: {p.y:.4g}, {x.show(p.x)}"
        parts.append(Markup('<g class="s{}"><title>{}</title>{}</g>').format(p.series, tip, _shape(p.series, cx, cy)))
    parts.extend(_label(p, _x(x, p.x), _y(y, p.y), taken) for p in points)
    return _svg(parts, f"{y.title}; {x.title}")


def curves(found: Sequence[Curve], x: Axis, y: Axis) -> Markup:
    """Line plots; the legend of the page has their names."""
    parts = [_frame(x, y)]
    for curve in found:
        places = [(_x(x, a), _y(y, b)) for a, b in curve.points]
        parts.append(
            Markup('<g class="s{}"><title>{}</title>{}</g>').format(
                curve.series, curve.label, _path(places, f"curve d{curve.series % 4}")
            )
        )
    return _svg(parts, f"{y.title}; {x.title}")


def stacked(rows: Sequence[tuple[str, Sequence[tuple[str, float]]]], x: Axis) -> Markup:
    """One stacked bar per row; the legend of the page has the names of the parts."""
    height = (HEIGHT - TOP - BOTTOM) / max(len(rows), 1)
    parts = [_frame(x, Axis("", 0.0, 1.0, ()))]
    for i, (label, pieces) in enumerate(rows):
        top, sum_so_far = TOP + i * height, 0.0
        for series, (name, value) in enumerate(pieces):
            left, right = _x(x, sum_so_far), _x(x, sum_so_far + value)
            parts.append(
                Markup(
                    '<g class="s{}"><title>{}: {}, {}</title>'
                    '<rect class="mark" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/></g>'
                ).format(series, label, name, x.show(value), left, top + 0.42 * height, right - left, 0.42 * height)
            )
            sum_so_far += value
        parts.append(_text(LEFT + 3, top + 0.32 * height, label, "name", "start"))
    return _svg(parts, x.title)


def swatch(series: int) -> Markup:
    """The marker of a series, for a legend or a table."""
    return Markup('<svg class="swatch s{}" viewBox="0 0 16 16" aria-hidden="true">{}</svg>').format(
        series, _shape(series, 8, 8)
    )


def _svg(parts: Sequence[Markup], title: str) -> Markup:
    return Markup('<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, title, Markup("").join(parts)
    )


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.place(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.place(value) * (HEIGHT - TOP - BOTTOM)


def _frame(x: Axis, y: Axis) -> Markup:
    bottom, parts = HEIGHT - BOTTOM, []
    for tick in x.ticks:
        at = _x(x, tick)
        parts.append(_line(at, TOP, at, bottom, "grid"))
        parts.append(_text(at, bottom + 16, x.show(tick), "tick", "middle"))
    for tick in y.ticks:
        at = _y(y, tick)
        parts.append(_line(LEFT, at, WIDTH - RIGHT, at, "grid"))
        parts.append(_text(LEFT - 7, at + 4, y.show(tick), "tick", "end"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x.title, "title", "middle"))
    parts.append(
        Markup(
            '<text class="title" text-anchor="middle" transform="translate(14 {:.1f}) rotate(-90)">{}</text>'
        ).format((TOP + bottom) / 2, y.title)
    )
    return Markup("").join(parts)


def _bars(p: Point, x: Axis, y: Axis) -> Markup:
    parts = []
    if p.y_std:
        a, b = (min(max(_y(y, p.y + s * p.y_std), TOP), HEIGHT - BOTTOM) for s in (1, -1))
        parts.append(_line(_x(x, p.x), a, _x(x, p.x), b, "bar"))
    if p.x_std and not x.log:
        a, b = (min(max(_x(x, p.x + s * p.x_std), LEFT), WIDTH - RIGHT) for s in (1, -1))
        parts.append(_line(a, _y(y, p.y), b, _y(y, p.y), "bar"))
    return Markup('<g class="s{}">{}</g>').format(p.series, Markup("").join(parts))


def _shape(series: int, x: float, y: float) -> Markup:
    r = 5.5
    corners = {
        1: [(-r, -r), (r, -r), (r, r), (-r, r)],
        2: [(0, -1.2 * r), (1.1 * r, 0.9 * r), (-1.1 * r, 0.9 * r)],
        3: [(0, -1.3 * r), (1.3 * r, 0), (0, 1.3 * r), (-1.3 * r, 0)],
        4: [(0, 1.2 * r), (1.1 * r, -0.9 * r), (-1.1 * r, -0.9 * r)],
    }.get(series % 5)
    if corners is None:
        return Markup('<circle class="mark" cx="{:.1f}" cy="{:.1f}" r="{}"/>').format(x, y, r)
    return Markup('<path class="mark" d="{}Z"/>').format(_d([(x + dx, y + dy) for dx, dy in corners]))


def _label(p: Point, x: float, y: float, taken: list[tuple[float, float, float, float]]) -> Markup:
    """A point's name, at the first free place next to the point."""
    width = sum(2 * CHARACTER if c >= "\u2e80" else CHARACTER for c in p.label)
    places: list[tuple[float, float, Side]] = [
        (x + 10, y + 4, "start"),
        (x - 10, y + 4, "end"),
        (x, y - 11, "middle"),
        (x, y + 20, "middle"),
        *((x + dx, y + 4 + dy, "start") for dy in (-15, 15, -28, 28, -41, 41) for dx in (10, -width - 10)),
    ]
    for at, line, side in places:
        left = at - {"start": 0.0, "end": width, "middle": width / 2}[side]
        box = (left, line - LINE + 3, left + width, line + 3)
        inside = box[0] >= LEFT and box[2] <= WIDTH - 2 and box[1] >= 2 and box[3] <= HEIGHT - BOTTOM
        own = (x - 7, y - 7, x + 7, y + 7)
        if inside and not any(_overlap(box, other) for other in taken if other != own):
            taken.append(box)
            return _text(at, line, p.label, "name", side)
    return _text(*places[0][:2], p.label, "name", places[0][2])


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(kind, x1, y1, x2, y2)


def _text(x: float, y: float, text: str, kind: str, anchor: Side) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        kind, x, y, anchor, escape(text)
    )


def _path(places: Sequence[tuple[float, float]], kind: str) -> Markup:
    return Markup('<path class="{}" d="{}"/>').format(kind, _d(places))


def _d(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(places))
