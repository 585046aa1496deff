"""Who keeps the others waiting: a rank that is late is named, with its phase; one that is gone ends the run.

Ranks meet in collectives, where a rank that waits cannot tell whom it waits for. So each has a thread that puts what
its rank is doing into the store through which the ranks found each other, and reads what the others do.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from rlhf_fast.distributed import World

BEAT = 1.0  # seconds between two signs of life
SILENCE = 45.0  # seconds without one after which a rank counts as gone


@dataclass(frozen=True)
class Doing:
    """What a rank is at, for `seconds` now; `beat` counts its signs of life."""

    step: int
    place: int  # how many phases were entered in all
    phase: str
    seconds: float
    beat: int


class Watchdog:
    """Watches the ranks of a run; `enter` tells it the phase of this one. A world of one rank has none to watch.

    patience: seconds that the others may wait for a rank before it is named on stderr, once a phase. A rank without a
    sign of life for SILENCE seconds is gone, which ends this process; the launcher then ends the others.
    """

    def __init__(self, world: World, *, patience: float) -> None:
        self._world, self._patience = world, patience
        self._now = (0, 0, "start", time.monotonic())
        self._stop = threading.Event()
        self._seen: dict[int, tuple[int, float]] = {}  # rank -> (its last beat, when it was new)
        self._named: set[tuple[int, int]] = set()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if world.world_size > 1:
            # A connection of its own: the main thread may wait in the other.
            store: Any = dist.distributed_c10d._get_default_store()
            self._store = store.clone()
            self._give_sign(0)
            self._thread.start()

    def enter(self, phase: str, step: int) -> None:
        """This rank begins a phase of a step."""
        self._now = (step, self._now[1] + 1, phase, time.monotonic())

    def close(self) -> None:
        """The run is over: from now on nobody is late."""
        self._stop.set()
        if self._world.world_size > 1:
            self._thread.join(timeout=10)  # its last sign of life must not come after this
            with contextlib.suppress(RuntimeError, ConnectionError):  # rank 0 may have gone, and its store with it
                self._store.set(f"watchdog/{self._world.rank}", "over")

    def _watch(self) -> None:
        beat = 0
        while not self._stop.wait(BEAT):
            beat += 1
            try:
                self._give_sign(beat)
                self._look(self._read())
            except (RuntimeError, ConnectionError):  # the store lives in rank 0, or in the launcher beside it
                if not self._stop.is_set():
                    _end("rank 0 is gone: its store does not answer")
                return

    def _give_sign(self, beat: int) -> None:
        step, place, phase, since = self._now
        doing = Doing(step, place, phase, time.monotonic() - since, beat)
        self._store.set(f"watchdog/{self._world.rank}", json.dumps(vars(doing)))

    def _read(self) -> dict[int, Doing]:
        """What the ranks said last, those aside that have said nothing yet, or that it is over."""
        found = {}
        for rank in range(self._world.world_size):
            if self._store.check([f"watchdog/{rank}"]):
                text = self._store.get(f"watchdog/{rank}").decode()
                if text != "over":
                    found[rank] = Doing(**json.loads(text))
        return found

    def _look(self, ranks: dict[int, Doing]) -> None:
        """Name who is late; end the run if one is gone."""
        now = time.monotonic()
        for rank, doing in ranks.items():
            beat, since = self._seen.get(rank, (-1, now))
            if doing.beat != beat:
                self._seen[rank] = (doing.beat, now)
            elif now - since > SILENCE:
                _end(
                    f"rank {rank} is gone: no sign of life for {now - since:.0f} s, last in {doing.phase} of step "
                    f"{doing.step}"
                )
        if self._world.is_main and ranks:
            self._name_the_late(ranks)

    def _name_the_late(self, ranks: dict[int, Doing]) -> None:
        first = min(doing.place for doing in ranks.values())
        waiting = sorted(rank for rank, doing in ranks.items() if doing.place > first)
        late = {rank: doing for rank, doing in ranks.items() if doing.place == first}
        overdue = {rank: doing for rank, doing in late.items() if doing.seconds > self._patience}
        if not waiting:  # all are in one phase: one of them works there or all wait for each other
            overdue = overdue if len(overdue) == len(ranks) else {}
        for rank, doing in sorted(overdue.items()):
            if (rank, doing.place) in self._named:
                continue
            self._named.add((rank, doing.place))
            whom = f"ranks that wait for it: {', '.join(map(str, waiting))}" if waiting else "so have all others"
            _say(f"rank {rank} has been in {doing.phase} of step {doing.step} for {doing.seconds:.0f} s; {whom}")


def _end(why: str) -> None:
    """The main thread, which waits in a collective, cannot be interrupted; the launcher ends the other ranks."""
    _say(f"{why}. The run ends on all ranks; go on with --resume")
    os._exit(1)


def _say(message: str) -> None:
    print(f"watchdog: {message}", file=sys.stderr, flush=True)
