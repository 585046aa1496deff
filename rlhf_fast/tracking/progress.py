"""How far the run is, and the numbers that matter: a bar on a terminal, a plain line now and then anywhere else."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

from rlhf_fast.tracking.numbers import duration, short

_BAR = "{desc} {n_fmt}/{total_fmt} {bar} {remaining} left{postfix}"


class Progress:
    """Progress over `total` steps on standard error.

    Args:
        total: the last step's number.
        initial: steps done before (a resumed run).
        description: "ppo".
        disable: say nothing (every rank but the first).
        interval: seconds between two lines where there is no terminal; the last step always gets its line.
    """

    def __init__(
        self, total: int, initial: int = 0, description: str = "", *, disable: bool = False, interval: float = 5.0
    ) -> None:
        self._total, self._initial, self._description = total, initial, description
        self._interval = interval
        self._started = time.monotonic()
        self._printed_at = float("-inf")
        self._unprinted: str | None = None
        self._disable = disable
        self._bar: tqdm | None = None
        if not disable and sys.stderr.isatty():
            knows_width = os.get_terminal_size(sys.stderr.fileno()).columns > 0
            self._bar = tqdm(
                total=total,
                initial=initial,
                desc=description,
                dynamic_ncols=knows_width,
                ncols=None if knows_width else 100,
                bar_format=_BAR,
                file=sys.stderr,
            )

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Step `step` is done; `values` are shown beside it by their short names: {"score": 0.31, "KL": 2.0}."""
        if self._disable:
            return
        shown = "  ".join(f"{name} {short(value)}" for name, value in values.items())
        if self._bar is not None:
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        self._unprinted = f"{self._description} {step}/{self._total}  {shown}{self._left(step, now)}".lstrip()
        if now - self._printed_at >= self._interval or step >= self._total:
            self._print(now)

    def _left(self, step: int, now: float) -> str:
        done = step - self._initial
        if done < 1 or step >= self._total:
            return ""
        return f"  {duration((now - self._started) / done * (self._total - step))} left"

    def _print(self, now: float) -> None:
        if self._unprinted is not None:
            print(self._unprinted, file=sys.stderr, flush=True)
            self._printed_at, self._unprinted = now, None

    def close(self) -> None:
        """Show where the run ended, also when it ended early."""
        if self._bar is not None:
            self._bar.close()
        self._print(time.monotonic())
