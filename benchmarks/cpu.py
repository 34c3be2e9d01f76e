"""What a norm costs on a CPU: jaxnorm and the field side by side, in units of a copy of the same bytes.

    python -m benchmarks.cpu [--norms NORM ...] [--shapes SHAPE ...] [--dtypes DTYPE ...] [--only NAME ...]
                             [--allocators NAME ...] [--rounds N] [--seconds S]
                             [--markdown] [--json PATH] [--chart PATH]

Contestants take turns: every round times each of them once, in another order, and a cell is the median over the rounds
of the time over that of a copy in the same round. That copy is the fastest, in each case, of NumPy's on one thread,
NumPy's on a thread for each core, and torch's. The JAX libraries share a process. torch has one whose idle threads
sleep, and one whose spin, which is the faster where nobody else wants the cores. One process works at a time.
"forward+backward" is one jitted call that returns y and, for a random cotangent, the gradients of x, scale and bias.
Parameters are float32, y has x's dtype, and each contestant is held against float64 before it is timed. Images are
NHWC: channels_last for torch, and NCHW for equinox, which knows no other layout. Arrays of more than 2 MiB, those of
the copies as well, change from call to call, so that they come from memory and not from the last cache.

The allocator counts: where fresh outputs mean fresh pages, page faults drown the kernels, everybody's alike. "warm"
runs the processes with a malloc that keeps its pages, "thresholds" with one that keeps those of the main thread, which
leaves the faults to who needs temporary arrays, and "default" with malloc as it is.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import os
import platform
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from benchmarks._timing import ALLOCATORS, THREADS, Timed, Worker, in_turn, numpy_copies, quartiles, turns
from benchmarks.field import (
    NNX,
    Case,
    Equinox,
    Haiku,
    Jaxnorm,
    JaxnormXLA,
    Keras,
    Linen,
    Standardize,
    Tokamax,
    Torch,
)

os.environ["JAX_PLATFORMS"] = "cpu"
_flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in f]
os.environ["XLA_FLAGS"] = " ".join(_flags)  # one device with all the cores, not the eight of the tests

ROWS = ((8192, 1024), (65536, 256), (2048, 4096), (16384, 768), (256, 1024), (64, 256))
IMAGES = ((32, 56, 56, 64), (64, 28, 28, 128), (16, 14, 14, 1024))
SHAPES = {"layer": ROWS, "rms": ROWS, "batch": IMAGES, "group": IMAGES, "instance": IMAGES}
DTYPES = ("float32", "bfloat16")
PASSES = ("forward", "forward+backward")
#: What a kernel that moves nothing twice would take: read x, write y, read x and g, write dx. A batch, unlike a row or
#: an image, fits no cache, and its statistics take all of it, so that batch norm reads x, and then x and g, once more.
LIMITS = {norm: dict(zip(PASSES, (1.5, 4.0) if norm == "batch" else (1.0, 2.5), strict=True)) for norm in SHAPES}
FIELD = ("flax.linen", "flax.nnx", "haiku", "equinox", "keras")
RATIOS = {
    "best of field / jaxnorm": FIELD,
    "torch / jaxnorm": ("torch", "torch-spin"),
    "jaxnorm-xla / jaxnorm": ("jaxnorm-xla",),
}
NOTES = """\
{cpu}, {threads} threads, jax {jax}, jaxlib {jaxlib}; {date}.
Cells: time over that of a copy of x's bytes, median of up to {rounds} rounds; "copy" is what one copy took, and "limit"
what a norm takes that moves each array once (a batch's statistics cost it a read more): a last cache may go below it.
"-": no such norm; "failed": an error, or not the norm. "best of field": the fastest of {field}.
"torch / jaxnorm" has the faster of torch's two in it."""


class TorchSpinning(Torch):
    """Its idle threads spin for some milliseconds, as is OpenMP's default: far slower where the cores are not free."""

    name = "torch-spin"


# --- what the processes do --------------------------------------------------------------------------------------------


class Contest(Timed):
    """The contestants of one process. A subclass says which, and how its library makes and runs their calls."""

    kinds: tuple[type[peers.Peer], ...]

    def __init__(self, names: tuple[str, ...]):
        super().__init__()
        self.peers = []
        for kind in self.kinds:
            with suppress(ImportError):
                self.peers += [kind()] if kind.name in names else []

    def versions(self) -> dict[str, str]:
        return {peer.name: peer.version for peer in self.peers}

    def prepare(self, case: Case) -> dict[str, list[float] | str]:
        """Make the calls of a case. By contestant, its errors, or why it is left out."""
        self.clear()
        data = case.data()
        truth = case.truth(*data)
        for name, copy in self.copies(data[1]).items():
            self.add((name, "copy"), copy)
        sets = functools.cache(lambda first: self.sets([_moved(a, -1, 1) if first else a for a in data]))
        able = [peer for peer in self.peers if case.norm in getattr(peer, "norms", SHAPES)]
        return {peer.name: self._entered(peer, case, sets, truth) for peer in able}

    def sets(self, data: list[np.ndarray]) -> list[tuple]:
        """The library's arrays, (g, x, *params), as often as calls must change them to find none in a cache."""
        g, x, *params = data
        params = [self.array(a) for a in params]
        return [(self.array(g), self.array(x), *params) for _ in range(turns(x.nbytes))]

    def _entered(self, peer, case: Case, sets: Callable, truth: list[np.ndarray]) -> list[float] | str:
        first = len(case.shape) == 4 and getattr(peer, "channels_first", False)
        try:
            calls = self.made(partial(peer.norm, case.norm), sets(first))
            for call in calls:
                got = self.as_numpy(call())
                errors = case.errors([_moved(a, 1, -1) if first else a for a in got], truth)
        except Exception as raised:
            return f"{type(raised).__name__}: {raised}"
        for which, call in zip(PASSES, calls, strict=True):
            self.add((peer.name, which), call)
        return errors


def _moved(a: np.ndarray, channels: int, to: int) -> np.ndarray:
    return np.moveaxis(a, channels, to) if a.ndim == 4 else a


class JaxContest(Contest):
    kinds = (Jaxnorm, JaxnormXLA, Linen, NNX, Haiku, Equinox, Keras, Standardize, Tokamax)

    def about(self) -> dict:
        import jaxlib

        import jaxnorm as jn

        rooms = {room: [backend.active, backend.reason] for room, backend in jn.backends().items()}
        found = {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "devices": jax.device_count()}
        return {**found, "rooms": rooms}

    def copies(self, x: np.ndarray) -> dict[str, Callable]:
        return numpy_copies(x)

    def array(self, a: np.ndarray):
        return jnp.array(np.ascontiguousarray(a))

    def made(self, norm: Callable, sets: list[tuple]) -> tuple[Callable, Callable]:
        def both(g, *args):
            y, backward = jax.vjp(norm, *args)
            return y, *backward(g)

        forward, both = jax.jit(lambda *args: (norm(*args),)), jax.jit(both)
        step, other, done = cycle(sets), cycle(sets), jax.block_until_ready
        return lambda: done(forward(*next(step)[1:])), lambda: done(both(*next(other)))

    def as_numpy(self, result) -> list[np.ndarray]:
        return [np.asarray(a) for a in result]


class TorchContest(Contest):
    kinds = (Torch,)
    environment: ClassVar = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}

    def __init__(self, names: tuple[str, ...]):
        super().__init__(names)
        if self.peers:
            import torch

            torch.set_num_threads(THREADS)

    def copies(self, x: np.ndarray) -> dict[str, Callable]:
        sources = [self.array(x) for _ in range(turns(x.nbytes))] if self.peers else []
        copies = cycle([partial(source.clone().copy_, source) for source in sources])
        return {peer.name: lambda: next(copies)() for peer in self.peers}

    def made(self, norm: Callable, sets: list[tuple]) -> tuple[Callable, Callable]:
        import torch

        step, other = cycle(sets), cycle([(g, *(a.requires_grad_() for a in args)) for g, *args in sets])

        def both():
            g, *args = next(other)
            y = norm(*args)
            return y, *torch.autograd.grad(y, args, g)

        return torch.no_grad()(lambda: (norm(*next(step)[1:]),)), both

    def as_numpy(self, result) -> list[np.ndarray]:
        return [a.detach().float().numpy().astype(str(a.dtype).removeprefix("torch.")) for a in result]

    def array(self, a: np.ndarray):
        import torch

        return torch.from_numpy(a.astype(np.float32)).to(getattr(torch, a.dtype.name))  # NumPy's strides are kept


class TorchSpinningContest(TorchContest):
    kinds = (TorchSpinning,)
    environment: ClassVar = {}
    rest = 0.02


CONTESTS = (JaxContest, TorchContest, TorchSpinningContest)
NAMES = tuple(kind.name for contest in CONTESTS for kind in contest.kinds)


# --- the measurement --------------------------------------------------------------------------------------------------


def measured(case: Case, workers: list[Worker], rounds: int, seconds: float) -> list[dict]:
    """Both passes of a case."""
    outcome = {name: value for worker in workers for name, value in worker.ask("prepare", case).items()}
    failures = {name: value for name, value in outcome.items() if isinstance(value, str)}
    for name, why in failures.items():
        print(f"{name}, {case}: {why}", file=sys.stderr)
    results = []
    for which in PASSES:
        keys = {key: worker for worker in workers for key in worker.ask("keys") if key[1] in (which, "copy")}
        taken = in_turn(keys, rounds, seconds)
        copies = {name: taken.pop((name, kind))[:, 0] for name, kind in keys if kind == "copy"}
        best = min(copies, key=lambda name: np.median(copies[name]))
        contestants = {
            name: {
                "copies": quartiles(samples[:, 0] / copies[best]),
                "seconds": quartiles(samples[:, 0]),
                "page_faults": float(np.median(samples[:, 1])),
                "errors": outcome[name],
            }
            for (name, _), samples in taken.items()
        }
        results.append({
            **asdict(case), "pass": which, "rounds": len(copies[best]), "copy": best,
            "copy_seconds": {name: quartiles(times) for name, times in copies.items()},
            "contestants": contestants, "failures": failures,
        })  # fmt: skip
    return results


def run(cases: list[Case], names: tuple[str, ...], allocators: list[str], rounds: int, seconds: float) -> dict:
    """All cases under each allocator, and what they were measured with."""
    contests = [c for c in CONTESTS if c is JaxContest or any(kind.name in names for kind in c.kinds)]
    results, about, versions = [], {}, {}
    for allocator in allocators:
        workers = [Worker(contest, allocator, names) for contest in contests]
        about = workers[0].ask("about")
        versions = {name: version for worker in workers for name, version in worker.ask("versions").items()}
        for i, case in enumerate(cases, 1):
            print(f"{allocator}, {i} of {len(cases)}: {case}", file=sys.stderr)
            results += [{"allocator": allocator, **result} for result in measured(case, workers, rounds, seconds)]
        for worker in workers:
            worker.close()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks.cpu", *sys.argv[1:]]),
        "cpu": cpu_model(),
        "threads": THREADS,
        "platform": platform.platform(),
        "python": platform.python_version(),
        **about,
        "versions": versions,
        "missing": [name for name in names if name not in versions],
        "rounds": rounds,
        "seconds": seconds,
        "allocators": {name: ALLOCATORS[name] for name in allocators},
        "results": results,
    }


def cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", path.read_text(encoding="utf-8") if path.exists() else "")
    return found[1] if found else platform.machine()


# --- tables and chart -------------------------------------------------------------------------------------------------


def shape_of(result: dict) -> str:
    return "x".join(map(str, result["shape"]))


def copies_of(result: dict, names: tuple[str, ...] | list[str]) -> float | None:
    """The fastest of these, as they were in this case."""
    return min((result["contestants"][n]["copies"][1] for n in names if n in result["contestants"]), default=None)


def grouped(results: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    groups: dict[tuple, list[dict]] = {}
    for result in results:
        groups.setdefault(tuple(result[key] for key in keys), []).append(result)
    return groups


def table(report: dict, results: list[dict]) -> list[list[str]]:
    """A line for each result, in copies."""
    present = [name for name in NAMES if any(name in result["contestants"] for result in results)]
    lines = [["", "copy", "limit", *(f"{name} {report['versions'][name]}" for name in present)]]
    for result in results:
        line = [f"{shape_of(result)} {result['dtype']} {result['pass']}"]
        line.append(f"{1e6 * result['copy_seconds'][result['copy']][1]:.4g} us")
        line.append(f"{LIMITS[result['norm']][result['pass']]:g}")
        for name in present:
            copies = copies_of(result, [name])
            line.append(f"{copies:.3g}" if copies else "failed" if name in result["failures"] else "-")
        lines.append(line)
    return lines


def summary(results: list[dict]) -> list[list[str]]:
    """How many times as long as jaxnorm others take: the geometric mean over the shapes, and the range.

    And how many times the limit the best of the field takes, which is the most that there is to win.
    """
    lines = [["", *RATIOS, "best of field / limit"]]
    for keys, of in grouped(results, "norm", "dtype", "pass").items():
        line = [" ".join(keys)]
        ours = [copies_of(result, ["jaxnorm"]) for result in of]
        limits = [LIMITS[result["norm"]][result["pass"]] for result in of]
        for names, others in [*((names, ours) for names in RATIOS.values()), (FIELD, limits)]:
            pairs = [(copies_of(result, names), other) for result, other in zip(of, others, strict=True)]
            ratios = [theirs / ours for theirs, ours in pairs if theirs and ours]
            mean = math.exp(np.mean(np.log(ratios))) if ratios else 0
            line.append(f"{mean:.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "-")
        lines.append(line)
    return lines


def page(report: dict, markdown: bool) -> str:
    """Everything that is printed."""
    form, heading = (peers.as_markdown, "### {}\n") if markdown else (peers.as_text, "{}\n")
    parts = []
    for allocator in report["allocators"]:
        results = [result for result in report["results"] if result["allocator"] == allocator]
        for (norm,), of in grouped(results, "norm").items():
            parts += [heading.format(f"{norm} norm, {allocator} allocator"), form(table(report, of)), ""]
        parts += [heading.format(f"times jaxnorm's time, {allocator} allocator"), form(summary(results)), ""]
    parts.append(NOTES.format(**report, field=", ".join(FIELD)))
    if report["missing"]:
        parts.append(f"Not installed, left out: {', '.join(report['missing'])}.")
    return "\n".join(parts)


def draw(report: dict, path: str) -> None:
    """Bars of forward+backward for the first shape and dtype of each norm, under the first allocator."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    chosen = [of[0] for keys, of in grouped(report["results"], "norm", "pass").items() if keys[1] == PASSES[1]]
    columns = min(2, len(chosen))
    lines = math.ceil(len(chosen) / columns)
    figure = Figure(figsize=(5.2 * columns, 0.4 + 3.1 * lines), dpi=160, facecolor="white", layout="constrained")
    for i, result in enumerate(chosen):
        axes = figure.add_subplot(lines, columns, i + 1)
        bars = sorted(((v["copies"], name) for name, v in result["contestants"].items()), key=lambda bar: -bar[0][1])
        low, middle, high = np.array([copies for copies, _ in bars]).T
        colours = ["#0072B2" if name == "jaxnorm" else "#b8bcc4" for _, name in bars]
        axes.barh([name for _, name in bars], middle, color=colours)
        axes.errorbar(middle, range(len(bars)), xerr=(middle - low, high - middle), fmt="none", ecolor="#6b7280")
        for y, copies in enumerate(middle):
            axes.text(high[y], y, f"  {copies:.3g}", va="center")
        limit = LIMITS[result["norm"]][PASSES[1]]
        axes.axvline(limit, color="#D55E00", linewidth=1.5)
        axes.text(limit, len(bars) - 0.35, f"limit {limit:g}", color="#D55E00", ha="center", va="bottom", fontsize=9)
        axes.set_xscale("log")
        axes.set_xlim(min(limit, middle.min()) / 1.5, max(limit, high.max()) * 1.8)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high.max() < 100 else (1,)))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        title = f"{result['norm']} norm, {shape_of(result)} {result['dtype']}"
        axes.set_title(title, pad=18, loc="left", weight="bold")
        axes.set_xlabel("forward+backward, in copies of x")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


# --- the command line -------------------------------------------------------------------------------------------------


def cases_of(norms: list[str], shapes: list[tuple[int, ...]] | None, dtypes: list[str]) -> list[Case]:
    """Those of the table, or these shapes for each norm that takes arrays of their rank."""
    fitting = {norm: [s for s in shapes or SHAPES[norm] if len(s) == len(SHAPES[norm][0])] for norm in norms}
    return [Case(norm, shape, dtype) for norm in norms for shape in fitting[norm] for dtype in dtypes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    shape = lambda text: tuple(int(n) for n in text.split("x"))
    add("--norms", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="NORM", help=f"of {', '.join(SHAPES)}")
    add("--shapes", nargs="+", type=shape, metavar="SHAPE", help="such as 8192x1024, or 32x56x56x64 of an image norm")
    add("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, metavar="DTYPE", help=f"of {', '.join(DTYPES)}")
    add("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=f"these alone, of {', '.join(NAMES)}")
    add("--allocators", nargs="+", choices=ALLOCATORS, default=["warm", "default"], metavar="NAME",
        help=f"of {', '.join(ALLOCATORS)}")  # fmt: skip
    add("--rounds", type=int, default=30, help="samples of each contestant in each case, at most")
    add("--seconds", type=float, default=10.0, help="after so many no round begins in a case that has three")
    add("--markdown", action="store_true", help="print tables for a README")
    add("--json", metavar="PATH", help="also write every number to this file")
    add("--chart", metavar="PATH", help="also draw a picture of some cases")
    options = parser.parse_args()
    cases = cases_of(options.norms, options.shapes, options.dtypes)
    if not cases:
        parser.error(f"no norm of {options.norms} takes arrays of the rank of these shapes")
    report = run(cases, tuple(options.only), options.allocators, options.rounds, options.seconds)
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(page(report, options.markdown))
    if options.chart:
        draw(report, options.chart)


if __name__ == "__main__":
    main()
