"""The libraries of one process, held against the truth and timed; and processes that may end before their time."""

from __future__ import annotations

import itertools
import math
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np

from benchmarks import peers
from benchmarks.harness.case import Case, Outcome, turns
from benchmarks.harness.timing import Key, Timed, Worker, in_turn, quartiles

# The mode is how libraries are called. "cpu": a program works on one array, its forward pass gives y alone, and arrays
# alternate from call to call. "gpu": calls are queued, a program works on several arrays if they are small, and the
# forward pass in training and the backward pass are programs of their own. "trial" is "gpu" on a CPU.

#: A GPU program works on at least this many bytes of x, as at most MOST arrays, so that no cache holds them and
#: starting the program costs little beside it.
ENOUGH, MOST = {"gpu": 1 << 28, "trial": 1 << 15}, 16


class Contest(Timed):
    """A subclass knows a framework: `about`, `usable`, `wait` and `block` for a result, `as_numpy` and `arrays`,
    `copies` (adds copies of x to the calls), and `programs` (the calls of a peer by pass, and what they return)."""

    def __init__(self, mode: str, names: tuple[str, ...]):
        super().__init__()
        self.mode, self.peers, self.missing = mode, {}, {}
        self.seconds = 5e-3 if mode == "cpu" else 10e-3
        for name in names:
            try:
                self.peers[name] = peers.make(name)
            except Exception as raised:  # it is not there, or not for this machine
                self.missing[name] = f"{type(raised).__name__}: {raised}"

    def present(self) -> tuple[dict[str, str], dict[str, str]]:
        """The versions of the peers that are here, and why the others are not."""
        return {name: peer.version for name, peer in self.peers.items()}, self.missing

    def clear(self) -> None:
        self.batches: list[list] = []  # programs alternate between batches, and work on all data of a batch
        super().clear()

    def begin(self, case: Case) -> None:
        """Make the data of a case, and the copies."""
        self.clear()
        self.case, base = case, case.data()
        self.expected = case.truth(base)
        if self.mode == "cpu":
            self.batches = [[self.arrays(case, base)] for _ in range(turns(case.nbytes))]
        else:
            together = min(MOST, max(1, math.ceil(ENOUGH[self.mode] / case.nbytes)))
            self.batches = [[self.arrays(case, base) for _ in range(together)]]
        self.copies(case)

    def able(self, case: Case) -> list[str]:
        return [name for name, peer in self.peers.items() if peer.takes(case.norm)]

    def enter(self, name: str) -> list[float] | str:
        """Make the calls of a peer and hold them against the truth: its largest errors, or why it is left out."""
        peer = self.peers[name]
        try:
            calls, got = self.programs(peer, self.case)
            errors = [self.case.errors(outcome, self.expected, peer.strict) for outcome in got]
            for which, begin in calls.items():
                self.add((name, which), begin, len(self.batches[0]))
        except Exception as raised:
            return self.fails(raised)
        return np.max(errors, axis=0).tolist()

    def alternating(self, program: Callable, batches: list | None = None) -> Callable:
        """A call of the program on the next of the batches."""
        following = itertools.cycle(self.batches if batches is None else batches)
        if self.mode == "cpu":
            return lambda: self.block(program(next(following)))
        return lambda: program(next(following))

    def block(self, result):
        return result

    def sample(self, key: Key) -> tuple[float, float]:
        try:
            return super().sample(key)
        except Exception as raised:
            print(f"{key[0]}, {key[1]}: {self.fails(raised)}", file=sys.stderr)
            return math.nan, 0.0

    def fails(self, raised: Exception) -> str:
        """One line on it. After an illegal access the device is unusable: then this process ends, and is replaced."""
        if not self.usable():
            print(f"this process lost its device after {type(raised).__name__}: {raised}", file=sys.stderr)
            os._exit(1)
        return f"{type(raised).__name__}: {' '.join(str(raised).split())[:400]}"

    def outcomes(self, outs, gradients) -> list[Outcome]:
        """The first and the last tile of arrays of x's size, and other arrays as they are."""
        tile, whole = self.case.tile, self.case.shape
        first = lambda a: self.as_numpy(a[:tile] if tuple(a.shape) == whole else a)
        last = lambda a: self.as_numpy(a[-tile:] if tuple(a.shape) == whole else a)
        return [Outcome([part(a) for a in outs], [part(a) for a in gradients]) for part in (first, last)]


class Lost(Exception):
    """The process ended or took too long. Everything in it is gone."""


class Crew:
    """A process of contestants that is started again if it is lost."""

    def __init__(self, kind: type[Contest], mode: str, names: tuple[str, ...], *, allocator: str = "default",
                 patience: float = 600.0, until: float = math.inf, worker: type = Worker):  # fmt: skip
        self.make = lambda: worker(kind, allocator, mode, names)
        self.patience, self.until, self.worker = patience, until, None
        try:
            self.about = self.ask("about")
            self.versions, self.missing = self.ask("present")
        except Lost as lost:
            self.about, self.versions, self.missing = {"error": str(lost)}, {}, dict.fromkeys(names, str(lost))

    def ask(self, method: str, *args) -> Any:
        """What a method of the contest returns. A contestant whose process is lost has no times."""
        if method == "sample" and self.worker is None:
            return math.nan, 0.0
        within = max(1.0, min(self.patience, self.until - time.monotonic()))
        try:
            if self.worker is None:
                self.worker = self.make()
                self.worker.ask("about", within=within)
            return self.worker.ask(method, *args, within=within)
        except (EOFError, OSError, TimeoutError) as raised:
            self.worker.kill()
            self.worker = None
            if method == "sample":
                return math.nan, 0.0
            why = f"took more than {within:.0f} s" if isinstance(raised, TimeoutError) else "its process ended"
            raise Lost(why) from None

    def enter(self, case: Case, ready: list[str]) -> dict[str, list[float] | str]:
        """By contestant, its errors or why it is out. One that ends the process is out; the others start again."""
        outcome: dict = {}
        try:
            self.ask("begin", case)
            for name in [n for n in self.ask("able", case) if n in ready]:
                try:
                    outcome[name] = self.ask("enter", name)
                except Lost as lost:
                    again = self.enter(case, [n for n in ready if n != name])
                    return outcome | again | {name: str(lost)}
        except Lost as lost:
            return dict.fromkeys(ready, f"before it began: {lost}")
        return outcome

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()


def measured(case: Case, crews: list[Crew], rounds: int, seconds: float, at_once: int = 1) -> list[dict]:
    """A record for each contestant: errors and, by pass, seconds and copies (the time over that of a copy of x in the
    same round) as quartiles; or "failed", and why. Crews enter `at_once`, because most of that time is compilers'."""
    with ThreadPoolExecutor(at_once) as pool:
        each = pool.map if at_once > 1 else map
        entered = list(each(lambda crew: crew.enter(case, list(crew.versions)), crews))
    outcome = {name: found for of_crew in entered for name, found in of_crew.items()}
    failures = {name: why for name, why in outcome.items() if isinstance(why, str)}
    keys: dict = {}
    for crew in crews:
        with suppress(Lost):
            keys |= dict.fromkeys((key for key in crew.ask("keys") if key[0] not in failures), crew)
    samples = in_turn(keys, rounds, seconds)
    copies = {name: taken for (name, which), taken in samples.items() if which == "copy"}
    whole = {name: taken for name, taken in copies.items() if np.isfinite(taken).all()}
    best = min(whole, key=lambda name: np.median(whole[name][:, 0]), default=None)
    passes: dict[str, dict] = {}
    for (name, which), taken in samples.items():
        if which == "copy" or name in failures:
            continue
        if best is None or not np.isfinite(taken).all():
            failures[name] = f"{which}: no time could be taken"
            continue
        passes.setdefault(name, {})[which] = {
            "seconds": quartiles(taken[:, 0]),
            "copies": quartiles(taken[:, 0] / copies[best][:, 0]),
            "page_faults": float(f"{np.median(taken[:, 1]):.4g}"),
        }
    return [
        *({**case.record, "copy": name, "rounds": len(copies[name]), "best": True, "seconds": quartiles(taken[:, 0])}
          for name, taken in whole.items() if name == best),
        *({**case.record, "name": name, "errors": outcome[name], **of} for name, of in passes.items()
          if name not in failures),
        *({**case.record, "name": name, "failed": why} for name, why in failures.items()),
    ]  # fmt: skip
