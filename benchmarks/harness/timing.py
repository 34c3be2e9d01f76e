"""The timing loop: worker processes that sleep until asked, contestants in turn, quartiles. It does not import JAX."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import resource
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar

import numpy as np

THREADS = len(os.sched_getaffinity(0))
#: Settings of glibc's malloc, read when a process starts. "warm" never returns pages to the system.
ALLOCATORS = {
    "warm": {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "34359738368",
        "MALLOC_TRIM_THRESHOLD_": "34359738368",
        "MALLOC_TOP_PAD_": "268435456",
    },
    "default": {},
}
Key = tuple[str, str]  # contestant, pass


class Timed:
    """The calls to be timed in one process. A subclass fills `calls` and says what its library needs."""

    environment: ClassVar[dict[str, str]] = {}  # set before the process starts
    seconds = 5e-3  # a sample repeats its call for at least this long
    rest = 0.0  # seconds to sleep after a sample, until the library's threads stop spinning
    fresh = True  # a sample begins with a call that is not counted

    def __init__(self):
        self.calls: dict[Key, tuple[Callable[[], Callable], int, int]] = {}

    def clear(self) -> None:
        self.calls.clear()
        gc.collect()

    def add(self, key: Key, begin: Callable[[], Callable], size: int = 1) -> None:
        """Register a call that does `size` units of work. `begin()` prepares it, outside of the time taken."""
        call = begin()
        self.wait(call())
        once = min(self.timed(call, 2) for _ in range(2))
        self.calls[key] = begin, int(self.seconds / once) + 1, size

    def keys(self) -> list[Key]:
        return list(self.calls)

    def sample(self, key: Key) -> tuple[float, float]:
        """Seconds and page faults of one unit of work."""
        begin, times, size = self.calls[key]
        call = begin()
        if self.fresh:
            self.wait(call())
        faults = page_faults()
        seconds = self.timed(call, times) / size
        faults = (page_faults() - faults) / times / size
        time.sleep(self.rest)
        return seconds, faults

    def timed(self, call: Callable, times: int) -> float:
        """Seconds of one call. A device works through a queue of calls; `wait` blocks until it is done."""
        start = time.perf_counter()
        for _ in range(times):
            result = call()
        self.wait(result)
        return (time.perf_counter() - start) / times

    def wait(self, result: Any) -> None:
        """Block until a result is there. Calls that block by themselves need nothing."""


def cpu_devices(count: int = 1) -> None:
    """Have this process, if it has not used JAX yet, and those that it starts see so many CPU devices."""
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in f]
    flags += [f"--xla_force_host_platform_device_count={count}"] * (count > 1)
    os.environ.update(JAX_PLATFORMS="cpu", XLA_FLAGS=" ".join(flags))


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class Worker:
    """A process with one `Timed` in it, started under one of `ALLOCATORS`."""

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
        """Call a method. Raises EOFError or OSError if the process has ended, TimeoutError if it takes too long."""
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
    warnings.simplefilter("ignore")
    gc.disable()
    timed = kind(*args)
    with suppress(EOFError):
        while True:
            method, given = pipe.recv()
            pipe.send(getattr(timed, method)(*given))


def in_turn(keys: dict[Key, Any], rounds: int, seconds: float) -> dict[Key, np.ndarray]:
    """Samples of each key, (rounds, 2). A round takes one sample of every key, in random order, one at a time.

    `keys` maps each key to the worker that has it. The first round is not counted. At least three rounds are, and no
    further round begins after `seconds`.
    """
    samples: dict[Key, list] = {key: [] for key in keys}
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
    return [float(f"{v:.4g}") for v in np.percentile(values, (25, 50, 75))]
