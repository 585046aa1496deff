"""The results as a picture: a row of bars for each group, the floor marked."""

from __future__ import annotations

import math
from pathlib import Path

from bench.summary import Group, short

COLUMNS = 2
OURS, PEER, FLOOR = "#1f6feb", "#b8c0cc", "#d1242f"


def draw(groups: list[Group], file: Path) -> None:
    """Write a PNG. Times are in milliseconds, on an axis of its own for each group."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = [group for group in groups if group.ours]
    rows = math.ceil(len(groups) / COLUMNS)
    bars = max(len(group.ours) + len(group.peers) for group in groups)
    figure, axes = pyplot.subplots(rows, COLUMNS, figsize=(15, rows * (0.9 + 0.3 * bars)), squeeze=False)
    for axis, group in zip(axes.flat, groups, strict=False):
        names = sorted([*group.ours, *group.peers], key=lambda name: -group.seconds[name])
        times = [1e3 * group.seconds[name] for name in names]
        drawn = axis.barh(names, times, color=[OURS if name in group.ours else PEER for name in names])
        axis.bar_label(drawn, [f"{short(time)} ms" for time in times], padding=3, fontsize=8)
        if group.floor is not None:
            axis.axvline(1e3 * group.seconds[group.floor], color=FLOOR, linestyle="--", label=group.floor)
            axis.legend(fontsize=8, loc="upper right")
        axis.set_title(group.name, fontsize=10, loc="left")
        axis.set_xlabel("ms, lower is better", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.set_xlim(0, 1.15 * max(times))
        axis.set_ylim(
            len(names) - bars - 0.5, len(names) - 0.5
        )  # bars of one thickness; ours, short, beside the legend
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
