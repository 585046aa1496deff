"""A flag that one thread sets and a step loop reads, in Python or in C++."""

from __future__ import annotations

import torch


class AbortFlag:
    """As threading.Event, without waiting; C++ reads it at `address`, an int32."""

    def __init__(self) -> None:
        self._flag = torch.zeros(1, dtype=torch.int32)

    @property
    def address(self) -> int:
        return self._flag.data_ptr()

    def set(self) -> None:
        self._flag[0] = 1

    def clear(self) -> None:
        self._flag[0] = 0

    def is_set(self) -> bool:
        return bool(self._flag[0])
