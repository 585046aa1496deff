"""Axes: ranges, round tick values and their labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass
class Scale:
    """Data from `low` to `high` on pixels from `start` to `end`, straight or logarithmic (base 10)."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        return self.start + share * (self.end - self.start)


@dataclass
class Ticks:
    """Tick values with labels; `factor` is what all labels are to be multiplied by, such as "×10⁻⁶"."""

    values: list[float]
    labels: list[str]
    factor: str = ""


def value_range(values: Sequence[float], log: bool) -> tuple[float, float]:
    """A range that holds all values with a little air. Zero is included when it is near; `log` needs values > 0."""
    low, high = min(values), max(values)
    if log:
        low, high = 10 ** (math.log10(low) - 0.08), 10 ** (math.log10(high) + 0.08)
        if high / low < 10:  # less than a decade leaves no round tick: widen about the middle
            middle = math.sqrt(low * high)
            low, high = middle / math.sqrt(10), middle * math.sqrt(10)
        return low, high
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        spread = abs(low) * 0.5 or 1.0
        return low - spread, high + spread
    air = 0.06 * (high - low)
    bottom, top = low - air, high + air
    if 0 <= low < 0.4 * high:
        bottom = 0.0
    if 0.4 * low < high <= 0:
        top = 0.0
    return bottom, top


def linear_ticks(low: float, high: float, whole: bool = False) -> Ticks:
    """Three to six round values (1, 2 or 5 times a power of ten) within the range; `whole`: whole numbers only."""
    raw = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * size for factor in (1, 2, 5, 10) if factor * size >= raw * 0.999)
    if whole:
        step = max(1.0, step)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    values = [index * step for index in range(first, last + 1)]
    largest = max((abs(value) for value in values), default=0.0)
    exponent = 0
    if largest and not (1e-3 < largest < 1e5):
        exponent = math.floor(math.log10(largest) + 1e-9)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9) + exponent)
    labels = [_label(value / 10.0**exponent, decimals) for value in values]
    return Ticks(values, labels, f"×10{str(exponent).translate(_SUPERSCRIPT)}" if exponent else "")


def log_ticks(low: float, high: float) -> Ticks:
    """Powers of ten within the range, at most some six of them; with 2 and 5 times these on a short range."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if high / low < 150 else (1,)
    stride = max(1, (last - first) // 6)
    pairs = [(factor, exponent) for exponent in range(first, last + 1, stride) for factor in factors]
    pairs = [(factor, exponent) for factor, exponent in pairs if low <= factor * 10.0**exponent <= high]
    short = all(-3 <= exponent <= 3 for _, exponent in pairs)
    labels = [f"{factor * 10.0**exponent:g}" if short else _power(factor, exponent) for factor, exponent in pairs]
    return Ticks([factor * 10.0**exponent for factor, exponent in pairs], labels)


def _power(factor: int, exponent: int) -> str:
    power = f"10{str(exponent).translate(_SUPERSCRIPT)}"
    return power if factor == 1 else f"{factor}·{power}"


def _label(value: float, decimals: int) -> str:
    text = f"{value:,.{decimals}f}"
    return "0" if float(text.replace(",", "")) == 0 else text.replace("-", "−")
