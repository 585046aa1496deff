"""Numbers as people read them, in the progress line, the summary and the report."""

from __future__ import annotations

import math


def short(value: float | None) -> str:
    """Three significant digits or so: 0.0123, 1.23, 12,345, 2.5e-06; whole numbers whole; "–" if there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    if value == 0 or (float(value).is_integer() and size < 1e7):
        return f"{int(value):,}"
    if size >= 1e7 or size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    if size >= 1000:
        return f"{value:,.0f}"
    decimals = 2 - math.floor(math.log10(size))
    return f"{value:.{max(0, min(decimals, 4))}f}"


def duration(seconds: float) -> str:
    """ "45 s", "3 min 12 s", "2 h 5 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
