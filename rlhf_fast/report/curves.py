"""Curves of any length made drawable: thinned without losing a spike, smoothed without hiding a hole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from rlhf_fast.report.run import Point

MOST = 400  # points of one curve


def extremes(points: Sequence[Point]) -> list[Point]:
    """At most MOST points: the lowest and the highest of each stretch. Short curves stay whole."""
    if len(points) <= MOST:
        return list(points)
    kept: list[Point] = []
    for stretch in _stretches(points, MOST // 2):
        there = [(value, step) for step, value in stretch if value is not None]
        ends = sorted({min(there), max(there)}, key=lambda pair: pair[1]) if there else [(None, stretch[0][0])]
        kept += [(step, value) for value, step in ends]
    return kept


def sampled(points: Sequence[Point]) -> list[Point]:
    """At most MOST + 1 points, evenly apart, the last among them."""
    stride = -(-len(points) // MOST)
    return [*points[:-1:stride], points[-1]] if stride > 1 else list(points)


def band(points: Sequence[Point]) -> Iterator[list[tuple[int, float, float]]]:
    """(middle step, lowest, highest) of some hundred stretches, in pieces between holes."""
    piece: list[tuple[int, float, float]] = []
    for stretch in _stretches(points, 100):
        values = [value for _, value in stretch if value is not None]
        if values:
            piece.append((stretch[len(stretch) // 2][0], min(values), max(values)))
        elif piece:
            yield piece
            piece = []
    if piece:
        yield piece


def moving_average(points: Sequence[Point]) -> list[Point]:
    """The mean over a window of a twentieth of the points, at a hundred places; holes stay."""
    half = max(2, len(points) // 40)
    stride = max(1, len(points) // 100)
    out: list[Point] = []
    for middle in [*range(0, len(points) - 1, stride), len(points) - 1]:
        step, value = points[middle]
        window = [v for _, v in points[max(0, middle - half) : middle + half + 1] if v is not None]
        out.append((step, None if value is None else sum(window) / len(window)))
    return out


def is_noisy(points: Sequence[Point]) -> bool:
    """It goes up and down by many times its range; a rising memory or a learning rate does not."""
    values = [value for _, value in points if value is not None]
    return sum(abs(b - a) for a, b in pairwise(values)) > 4 * (max(values) - min(values))


def pieces(points: Sequence[Point]) -> Iterator[list[tuple[int, float]]]:
    """The parts of a curve between its holes."""
    piece: list[tuple[int, float]] = []
    for step, value in points:
        if value is not None:
            piece.append((step, value))
        elif piece:
            yield piece
            piece = []
    if piece:
        yield piece


def _stretches(points: Sequence[Point], count: int) -> Iterator[Sequence[Point]]:
    width = -(-len(points) // count)
    return (points[start : start + width] for start in range(0, len(points), width))
