"""Calls queued on a device by one process of `benchmarks/gpu.py`, each held against the truth first."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

import numpy as np

from benchmarks._timing import Timed
from benchmarks._work import Outcome, Work, takes

#: Seconds of work that a sample queues, at least, in so many calls, at least.
SAMPLE, CALLS = 10e-3, 4


class Queued(Timed):
    """Calls that a device works off while Python goes on: a sample queues as many as fill it, and waits once.

    A call is kept as `begin() -> call`: what a backward pass needs from its forward pass is made anew before each
    sample, outside of the time taken, so that contestants do not hold memory all the while.
    """

    kinds: tuple[Callable, ...] = ()

    def __init__(self, platform: str, names: tuple[str, ...]):
        super().__init__()
        self.platform, self.peers, self.missing = platform, {}, {}
        for kind in (kind for kind in self.kinds if kind.name in names):
            try:
                self.peers[kind.name] = kind()
            except Exception as raised:  # not there, or there and not for this machine
                self.missing[kind.name] = f"{type(raised).__name__}: {raised}"

    def present(self) -> tuple[dict[str, str], dict[str, str]]:
        """Versions of those that are here, and why the others are not."""
        return {name: peer.version for name, peer in self.peers.items()}, self.missing

    def queue(self, key: tuple[str, str], begin: Callable) -> None:
        call = begin()
        self.wait(call())
        once = min(self._timed(call, 2) for _ in range(2))
        self.calls[key] = begin, max(CALLS, int(SAMPLE / once) + 1), len(self.batch)

    def sample(self, key: tuple[str, str]) -> tuple[float, float]:
        """Seconds of one norm (and nothing, where CPUs have page faults); NaN where it fails."""
        begin, times, each = self.calls[key]
        try:
            call = begin()
            self.wait(call())
            return self._timed(call, times) / each, 0.0
        except Exception as raised:
            print(f"{key[0]}, {key[1]}: {self.fails(raised)}", file=sys.stderr)
            return float("nan"), 0.0

    def _timed(self, call: Callable, times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            result = call()
        self.wait(result)
        return (time.perf_counter() - start) / times

    def begin(self, work: Work) -> None:
        """The data of a case, and the copies of it."""
        self.clear()
        self.work, self.base = work, work.data()
        self.expected = work.truth(self.base)
        self.batch = [self.arrays(work) for _ in range(work.arrays(self.platform))]
        self.copy(work)

    def able(self, work: Work) -> list[str]:
        return [name for name, peer in self.peers.items() if takes(peer, work.norm)]

    def enter(self, name: str) -> list[float] | str:
        """Make a contestant's calls and hold them against the truth: its errors, or why it is left out."""
        work = self.work
        try:
            calls, got = self.made(self.peers[name], work)
            errors = [work.errors(outcome, self.expected, name.startswith("jaxnorm-") and "composed" not in name)
                      for outcome in got]  # fmt: skip
            for which, begin in calls.items():
                self.queue((name, which), begin)
        except Exception as raised:
            return self.fails(raised)
        return np.max(errors, axis=0).tolist()

    def fails(self, raised: Exception) -> str:
        """A line on it. A device that an illegal access left unusable ends the process: another is started."""
        if not self.usable():
            print(f"the device is lost to this process after {type(raised).__name__}: {raised}", file=sys.stderr)
            os._exit(1)
        text = " ".join(str(raised).split())
        return f"{type(raised).__name__}: {text[:400]}"

    def read(self, a, times: int) -> list[np.ndarray]:
        """The first and the last tile of an array of x's shape, or what has another shape, as it is."""
        tile = self.work.tile
        parts = [a[:tile], a[-tile:]] if tuple(a.shape) == self.work.shape else [a] * times
        return [self.as_numpy(part) for part in parts]

    def outcomes(self, outs, gradients) -> list[Outcome]:
        read = [[self.read(a, 2) for a in arrays] for arrays in (outs, gradients)]
        return [Outcome(*([two[i] for two in arrays] for arrays in read)) for i in (0, 1)]
