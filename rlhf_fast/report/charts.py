"""Plots as SVG text. Colours and fonts are in style.css, the read-out under the pointer in script.js."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rlhf_fast.report.curves import MOST, band, extremes, is_noisy, moving_average, pieces, sampled
from rlhf_fast.report.figures import Curve, Figure
from rlhf_fast.report.markup import esc, number
from rlhf_fast.report.run import Point, Run, finite
from rlhf_fast.report.scales import Scale, Ticks, linear_ticks, log_ticks, value_range

WIDTH, HEIGHT = 380, 236
_TOP, _RIGHT, _BOTTOM = 22, 10, 40
_CHARACTER = 6.2  # width of a digit in the ticks' type, pixels
_SMOOTH_FROM = 80  # points from which a noisy curve is faint, with its moving average over it
_MOST_BARS = 90


def chart(figure: Figure, run: Run) -> str:
    """One <figure> with caption, key, plot and the data behind it; "" when there is nothing to draw."""
    return _bars(figure, run) if figure.stacked else _lines(figure, run)


def _lines(figure: Figure, run: Run) -> str:
    drawn = []
    for curve in figure.curves:
        points = [(step, _drawable(value, figure.log)) for step, value in run.series(curve.key)]
        if any(value is not None for _, value in points):
            drawn.append((curve, points, {} if figure.log else _errors(run, curve)))
    if not drawn:
        return ""
    extent = []
    for _, points, errors in drawn:
        for step, value in points:
            if value is not None:
                error = errors.get(step, 0.0)
                extent += [value - error, value + error]
    steps = [step for _, points, _ in drawn for step, _ in points]
    low, high = value_range(extent, figure.log)
    ticks = log_ticks(low, high) if figure.log else linear_ticks(low, high)
    x, y = _scales(min(steps), max(steps), low, high, ticks, figure.log)
    body: list[str] = []
    data: list[dict[str, Any]] = []
    for index, (curve, points, errors) in enumerate(drawn):
        body += _curve(curve, points, errors, x, y, f"c{index % 6}")
        data.append(
            {
                "label": curve.label,
                "points": [
                    [step, _rounded(value), _rounded(errors[step])] if step in errors else [step, _rounded(value)]
                    for step, value in sampled(points)
                ],
            }
        )
    return _figure(figure, x, y, ticks, body, data, _looks(drawn))


def _bars(figure: Figure, run: Run) -> str:
    """Bars that add up. Of many steps, each bar is the mean of a few; a far too long one is cut and says so."""
    rows = [row for row in run.rows if any(finite(row.get(curve.key)) is not None for curve in figure.curves)]
    if not rows:
        return ""
    width = -(-len(rows) // _MOST_BARS)
    groups = [rows[i : i + width] for i in range(0, len(rows), width)]
    heights = [[_mean(finite(row.get(c.key)) or 0.0 for row in group) for c in figure.curves] for group in groups]
    totals = [max(0.0, sum(column)) for column in heights]
    usual = sorted(totals)[int(0.95 * (len(totals) - 1))]
    top = max(totals) if max(totals) <= 2.5 * usual else 1.25 * usual
    top = top * 1.04 or 1.0
    ticks = linear_ticks(0.0, top)
    x, y = _scales(rows[0]["step"], rows[-1]["step"], 0.0, top, ticks, False, air=0.5 * width)
    body: list[str] = []
    data: list[dict[str, Any]] = [{"label": curve.label, "points": []} for curve in figure.curves]
    rectangles: list[list[str]] = [[] for _ in figure.curves]
    for group, column, total in zip(groups, heights, totals, strict=True):
        left, right = x(group[0]["step"] - 0.5), x(group[-1]["step"] + 0.5)
        gap = min(1.0, 0.15 * (right - left))
        middle = group[len(group) // 2]["step"]
        base = 0.0
        for index, part in enumerate(column):
            bottom, base = y(base), base + part
            rectangles[index].append(f"M{left:.1f},{bottom:.1f}H{right - gap:.1f}V{y(base):.1f}H{left:.1f}Z")
            data[index]["points"].append([middle, _rounded(part)])
        if total > top:
            body.append(f'<text class="cut" x="{(left + right) / 2 + 4:.1f}" y="{_TOP + 9}">↑ {number(total)}</text>')
    paths = [f'<path class="bar c{i % 6}" d="{"".join(part)}"/>' for i, part in enumerate(rectangles)]
    note = f"{figure.note} Each bar is the mean of {width} steps." if width > 1 else figure.note
    shown = Figure(figure.title, figure.unit, note, figure.curves)
    return _figure(shown, x, y, ticks, paths + body, data, [f"box c{i % 6}" for i in range(len(data))])


def _figure(
    figure: Figure,
    x: Scale,
    y: Scale,
    ticks: Ticks,
    body: list[str],
    data: list[dict[str, Any]],
    looks: list[str],
) -> str:
    last = max((point[0] for series in data for point in series["points"] if point[1] is not None), default=0)
    keys = "".join(
        f'<span class="key"><i class="{look}"></i>{esc(series["label"])} <b>{_last(series["points"])}</b></span>'
        for series, look in zip(data, looks, strict=True)
    )
    unit = " ".join(part for part in (figure.unit, ticks.factor) if part)
    geometry = {"left": x.start, "right": x.end, "low": x.low, "high": x.high}
    vertical = {"top": y.end, "bottom": y.start, "low": y.low, "high": y.high, "log": y.log}
    about = {"x": geometry, "y": vertical, "series": data, "stacked": figure.stacked}
    # "<" escaped, so that no label can end the element.
    payload = json.dumps(about, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    note = f'<p class="note">{esc(figure.note)}</p>' if figure.note else ""
    return (
        f'<figure class="chart"><figcaption><h4 dir="auto">{esc(figure.title)}</h4>'
        f'<span class="at">step {last:,}</span><p class="keys">{keys}</p></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{esc(figure.title)} by step">'
        f'<text class="axis" x="0" y="10">{esc(unit)}</text>{_grid(x, y, ticks)}{"".join(body)}</svg>'
        f'{note}<script type="application/json">{payload}</script></figure>'
    )


def _grid(x: Scale, y: Scale, ticks: Ticks) -> str:
    out = []
    for value, label in zip(ticks.values, ticks.labels, strict=True):
        at = y(value)
        out.append(f'<path class="grid" d="M{x.start:.1f},{at:.1f}H{x.end:.1f}"/>')
        out.append(f'<text class="tick y" x="{x.start - 6:.1f}" y="{at + 3.7:.1f}">{label}</text>')
    steps = linear_ticks(x.low, x.high, whole=True)
    out.append(f'<path class="base" d="M{x.start:.1f},{y.start:.1f}H{x.end:.1f}"/>')
    for value, label in zip(steps.values, steps.labels, strict=True):
        at = x(value)
        out.append(f'<path class="base" d="M{at:.1f},{y.start:.1f}v4"/>')
        out.append(f'<text class="tick x" x="{at:.1f}" y="{y.start + 16:.1f}">{label}</text>')
    name = " ".join(part for part in ("step", steps.factor) if part)
    out.append(f'<text class="axis x" x="{(x.start + x.end) / 2:.1f}" y="{HEIGHT - 6}">{name}</text>')
    return "".join(out)


def _scales(
    first: int, last: int, low: float, high: float, ticks: Ticks, log: bool, air: float = 0.0
) -> tuple[Scale, Scale]:
    left = 10 + _CHARACTER * max((len(label) for label in ticks.labels), default=1)
    if first == last:
        air = max(air, 0.5)
    return (
        Scale(first - air, last + air, left, WIDTH - _RIGHT),
        Scale(low, high, HEIGHT - _BOTTOM, _TOP, log),
    )


def _curve(
    curve: Curve, points: Sequence[Point], errors: dict[int, float], x: Scale, y: Scale, color: str
) -> list[str]:
    if curve.look == "points":
        out = _line(extremes(points), x, y, f"line held {color}")
        if len(points) <= _SMOOTH_FROM:
            there = [(step, value) for step, value in points if value is not None]
            out += [
                f'<path class="error {color}" d="M{x(step):.1f},{y(value - errors[step]):.1f}'
                f'V{y(value + errors[step]):.1f}"/>'
                for step, value in there
                if step in errors
            ]
            out += [_dot(x(step), y(value), 2.6, color) for step, value in there]
        return out
    if len(points) <= _SMOOTH_FROM or not is_noisy(points):
        return _line(extremes(points), x, y, f"line {color}")
    smooth = _line(moving_average(points), x, y, f"line {color}")
    if len(points) <= MOST:
        return [*_line(points, x, y, f"line faint {color}"), *smooth]
    return [*(_area(piece, x, y, color) for piece in band(points)), *smooth]


def _line(points: Sequence[Point], x: Scale, y: Scale, look: str) -> list[str]:
    """A line through the points, broken at holes; a point alone between two holes is a dot."""
    lines, dots = [], []
    for piece in pieces(points):
        places = [f"{x(step):.1f},{y(value):.1f}" for step, value in piece]
        if len(places) > 1:
            lines.append(f"M{places[0]}L{' '.join(places[1:])}")
        else:
            dots.append(_dot(x(piece[0][0]), y(piece[0][1]), 2.2, look.split()[-1]))
    return [f'<path class="{look}" d="{"".join(lines)}"/>', *dots] if lines else dots


def _area(piece: Sequence[tuple[int, float, float]], x: Scale, y: Scale, color: str) -> str:
    top = [f"{x(step):.1f},{y(high):.1f}" for step, _, high in piece]
    bottom = [f"{x(step):.1f},{y(low):.1f}" for step, low, _ in reversed(piece)]
    return f'<path class="area {color}" d="M{" ".join(top + bottom)}Z"/>'


def _dot(x: float, y: float, radius: float, color: str) -> str:
    return f'<circle class="dot {color}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>'


def _errors(run: Run, curve: Curve) -> dict[int, float]:
    points = run.series(curve.error) if curve.error else []
    return {step: value for step, value in points if value is not None}


def _looks(drawn: Sequence[tuple[Curve, Any, Any]]) -> list[str]:
    return [f"{'held' if curve.look == 'points' else 'rule'} c{index % 6}" for index, (curve, _, _) in enumerate(drawn)]


def _drawable(value: float | None, log: bool) -> float | None:
    return None if value is None or (log and value < 1e-30) else value


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _mean(values: Any) -> float:
    there = list(values)
    return sum(there) / len(there)


def _last(points: list[list[Any]]) -> str:
    point = next((point for point in reversed(points) if point[1] is not None), [0, None])
    return " ± ".join(number(value) for value in point[1:])
