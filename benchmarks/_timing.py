"""Timing in turn: worker processes that sleep until asked, copies as the unit, quartiles. No JAX in here."""

from __future__ import annotations

import gc
import itertools
import math
import multiprocessing
import os
import random
import resource
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import ClassVar

import numpy as np

THREADS = len(os.sched_getaffinity(0))
#: A sample loops its call for at least so many seconds, so that cores that have idled are awake for most of it.
SAMPLE = 5e-3
#: What malloc reads when a process starts. "warm" never gives pages back, from whichever thread. "thresholds" is what
#: one finds advised, and keeps only the main thread's: outside of one arena, large blocks, as are temporary arrays that
#: XLA's own threads allocate, are mapped anew each time.
ALLOCATORS = {
    "warm": {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "34359738368",
        "MALLOC_TRIM_THRESHOLD_": "34359738368",
        "MALLOC_TOP_PAD_": "268435456",
    },
    "thresholds": {"MALLOC_MMAP_THRESHOLD_": "34359738368", "MALLOC_TRIM_THRESHOLD_": "34359738368"},
    "default": {},
}


class Timed:
    """Calls to be timed in one process, by key. A subclass fills `calls` and says what its library needs."""

    #: variables of the environment that the process starts with
    environment: ClassVar[dict[str, str]] = {}
    #: seconds to sleep after a sample, until the library's threads no longer spin for more work
    rest = 0.0

    def __init__(self):
        warnings.simplefilter("ignore")
        gc.disable()
        self.calls: dict[tuple[str, str], tuple[Callable, int]] = {}

    def clear(self) -> None:
        self.calls.clear()
        gc.collect()

    def add(self, key: tuple[str, str], call: Callable) -> None:
        """A call that blocks until its result is there; it is looped often enough to fill a sample."""
        once = min(_seconds(call, 1) for _ in range(3))
        self.calls[key] = call, math.ceil(SAMPLE / once)

    def keys(self) -> list[tuple[str, str]]:
        return list(self.calls)

    def sample(self, key: tuple[str, str]) -> tuple[float, float]:
        """Seconds and page faults of one call, after one that is not counted."""
        call, times = self.calls[key]
        call()
        faults = _page_faults()
        seconds = _seconds(call, times) / times
        faults = (_page_faults() - faults) / times
        time.sleep(self.rest)
        return seconds, faults


def _seconds(call: Callable, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return time.perf_counter() - start


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class Worker:
    """A process with one `Timed` in it, started under an allocator of `ALLOCATORS`."""

    def __init__(self, kind: type[Timed], allocator: str, *args):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, kind, args), daemon=True)
        ours = dict(os.environ)
        for variable in ALLOCATORS["warm"]:
            os.environ.pop(variable, None)
        os.environ.update(ALLOCATORS[allocator] | kind.environment)
        self._process.start()
        os.environ.clear()
        os.environ.update(ours)
        theirs.close()

    def ask(self, method: str, *args, within: float | None = None):
        """What the `Timed`'s method returns. EOFError where the process is gone, TimeoutError where it takes longer."""
        self._pipe.send((method, args))
        if not self._pipe.poll(within):
            raise TimeoutError
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.close()
        self._process.join()

    def kill(self) -> None:
        self._process.kill()
        self.close()


def _serve(pipe, kind: type[Timed], args: tuple) -> None:
    sys.argv[1:] = []  # tokamax would read them
    timed = kind(*args)
    with suppress(EOFError):
        while True:
            method, given = pipe.recv()
            pipe.send(getattr(timed, method)(*given))


def in_turn(keys: dict[tuple[str, str], Worker], rounds: int, seconds: float) -> dict[tuple[str, str], np.ndarray]:
    """Samples by key, (rounds, 2): each round takes one of every key, in another order, while nothing else works.

    The first round does not count. Three do, and after them as many as begin in time.
    """
    samples: dict = {key: [] for key in keys}
    stop = time.monotonic() + seconds
    shuffle = random.Random(0).shuffle
    order = list(keys)
    for done in range(rounds + 1):
        if done > 3 and time.monotonic() > stop:
            break
        shuffle(order)
        for key in order:
            samples[key].append(keys[key].ask("sample", key))
    return {key: np.array(taken[1:]) for key, taken in samples.items()}


def quartiles(values: np.ndarray) -> list[float]:
    return [float(v) for v in np.percentile(values, (25, 50, 75))]


def turns(nbytes: int) -> int:
    """Between how many arrays of this size calls change so that none stays in the last cache; 1 if it is small."""
    cache = 1 << 25
    with suppress(ValueError, OSError):  # where the system does not say
        cache = max(cache, os.sysconf("SC_LEVEL3_CACHE_SIZE"))
    return 1 if nbytes <= 1 << 21 else max(2, math.ceil(2 * cache / nbytes))


def numpy_copies(x: np.ndarray) -> dict[str, Callable]:
    """Copies of x's bytes into buffers that are there already, by one thread and by one for each core."""
    sources = [x.reshape(-1).view(np.uint8).copy() for _ in range(turns(x.nbytes))]
    whole = [(np.ones_like(source), source) for source in sources]
    split = [list(zip(*(np.array_split(a, THREADS) for a in pair), strict=True)) for pair in whole]
    pairs, parts = itertools.cycle(whole), itertools.cycle(split)
    pool = ThreadPoolExecutor(max(1, THREADS - 1))

    def threaded() -> None:
        first, *others = next(parts)
        started = [pool.submit(np.copyto, *part) for part in others]
        np.copyto(*first)
        for copy in started:
            copy.result()

    copies = {"numpy, 1 thread": lambda: np.copyto(*next(pairs))}
    return copies | ({f"numpy, {THREADS} threads": threaded} if THREADS > 1 else {})
