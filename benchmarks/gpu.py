"""What a norm costs on a GPU: jaxnorm's rooms and the field side by side, in percent of the bandwidth of a copy.

    python -m benchmarks.gpu [--minutes M] [--cases CASE ...] [--only NAME ...] [--out FOLDER] [--platform cpu]

Every room of jaxnorm is held against float64 first; then each case is timed, the important ones first, until the time
is up, and gpu.json, gpu.md and gpu.png in FOLDER grow with it. It needs jax, NumPy and an NVIDIA GPU, and no network.
Peers that are missing are named and left out. `--platform cpu` runs all of it on tiny arrays, to try the script.

"forward" is the forward pass in training: it writes y and what the backward pass needs, whose time is "backward". In
"forward+backward" one program does both. Percent: the bytes that a pass cannot but move (x read and y written: 2 of x;
backward 3; batch norm 3 and 5; see `_work.py`) over its time, over what a device-to-device copy of x moves in its own,
both medians of rounds in which everybody takes a turn, in another order each time. That copy is the faster of XLA's
and torch's. A sample queues many calls and waits once. Small arrays are up to 16 to a program (a CUDA graph in torch),
so that neither a cache serves them nor the start of a program is what is timed; below a megabyte it still is, in JAX.
A kernel room has a process to itself: what it breaks is its own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np

from benchmarks._gpu_page import GIB, draw, page, verdicts
from benchmarks._jax_device import Composed, JaxDevice, RoomDevice
from benchmarks._queued import Queued
from benchmarks._timing import Worker, in_turn, quartiles
from benchmarks._torch_device import TorchDevice
from benchmarks._work import Work, least

RESULTS = Path(__file__).parent / "results"
#: By platform, the rooms that may run there, as far as this build has them.
ROOMS = {"gpu": ("xla", "mosaic_gpu"), "cpu": ("xla", "native")}
PEERS = ("flax.linen", "tokamax", "torch", "torch.compile", "liger", "quack")
NAMES = ("jaxnorm-xla", "jaxnorm-mosaic_gpu", "jaxnorm-native", Composed.name, *PEERS)
#: Seconds: for one answer of a process; after the end, for the case under way; and in which a case is timed.
PATIENCE, GRACE, CASE_SECONDS = 100.0, 45.0, {"gpu": 4.0, "cpu": 0.0}
#: Rounds of samples in a case, at most.
ROUNDS = 21


def _rows(norm: str, columns: int, nbytes: int, dtype: str) -> Work:
    return Work(norm, (nbytes // columns // (4 if dtype == "float32" else 2), columns), dtype)


CASES = {
    "gpu": (
        *(_rows(norm, 4096, GIB, "bfloat16") for norm in ("rms", "layer")),
        *(_rows(norm, n, GIB, "bfloat16") for n in (8192, 1024) for norm in ("rms", "layer")),
        Work("batch", (32, 56, 56, 256), "bfloat16"),
        _rows("add_rms", 4096, GIB // 2, "bfloat16"),
        *(_rows(norm, 2048, GIB, "bfloat16") for norm in ("rms", "layer")),
        _rows("gated_rms", 4096, GIB // 2, "bfloat16"),
        *(_rows(norm, 4096, GIB, "float32") for norm in ("rms", "layer")),
        Work("group", (32, 56, 56, 256), "bfloat16"),
        Work("rms", (8192, 1024), "bfloat16"),
        Work("layer", (256, 1024), "bfloat16"),
        *(_rows(norm, n, GIB, "float32") for n in (8192, 1024, 2048) for norm in ("rms", "layer")),
        Work("batch", (32, 56, 56, 256), "float32"),
    ),
    "cpu": (
        Work("rms", (64, 128), "bfloat16"),
        Work("layer", (64, 128), "float32"),
        Work("batch", (4, 4, 4, 32), "bfloat16"),
        Work("group", (4, 4, 4, 64), "bfloat16"),
        Work("add_rms", (64, 128), "bfloat16"),
        Work("gated_rms", (64, 128), "bfloat16"),
    ),
}
#: What every room is held against the truth on.
CHECKS = tuple(
    Work(norm, shape, dtype)
    for dtype in ("bfloat16", "float32")
    for norm, shapes in {
        "layer": [(512, 1024), (7, 8192), (33, 1000)],
        "rms": [(512, 1024), (7, 8192), (33, 1000)],
        "batch": [(4, 7, 7, 96)],
        "group": [(4, 7, 7, 96)],
        "instance": [(4, 7, 7, 96)],
        "add_rms": [(256, 2048)],
        "gated_rms": [(256, 2048)],
    }.items()
    for shape in shapes
)


# --- processes that may end before their time -------------------------------------------------------------------------


class Lost(Exception):
    """The process ended, or took too long: it is gone, with all that was in it."""


class Crew:
    """A process of contestants that is started again when it was lost."""

    def __init__(self, kind: type[Queued], platform: str, names: tuple[str, ...], until: float):
        self.make = lambda: Worker(kind, "default", platform, names)
        self.until, self.worker = until, None
        try:
            self.about = self.ask("about")
            self.versions, self.missing = self.ask("present")
        except Lost as lost:
            self.about = {"error": str(lost)}
            self.versions, self.missing = {}, dict.fromkeys(names, str(lost))

    def ask(self, method: str, *args, within: float = PATIENCE):
        within = max(1.0, min(within, self.until - time.monotonic()))
        try:
            if self.worker is None:
                self.worker = self.make()
                self.worker.ask("about", within=within)
            return self.worker.ask(method, *args, within=within)
        except (EOFError, OSError, TimeoutError) as raised:
            self.worker.kill()
            self.worker = None
            why = f"took more than {within:.0f} s" if isinstance(raised, TimeoutError) else "its process ended"
            raise Lost(why) from None

    def enter(self, work: Work, ready: list[str]) -> dict[str, list[float] | str]:
        """Every contestant's errors in a case, or why it is out. Who ends the process is out; the others begin anew."""
        outcome: dict = {}
        with suppress(Lost):
            self.ask("begin", work)
            for name in [n for n in self.ask("able", work) if n in ready]:
                try:
                    outcome[name] = self.ask("enter", name)
                except Lost as lost:
                    again = self.enter(work, [n for n in ready if n != name])
                    return outcome | again | {name: str(lost)}
            return outcome
        return dict.fromkeys(ready, "the process ended before it began")

    def sampler(self) -> Sampler:
        return Sampler(self)

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()


class Sampler:
    """A crew as `in_turn` asks it: who is lost has no time."""

    def __init__(self, crew: Crew):
        self.crew = crew

    def ask(self, *args) -> tuple[float, float]:
        if self.crew.worker is None:
            return math.nan, 0.0
        try:
            return self.crew.ask(*args)
        except Lost:
            return math.nan, 0.0


# --- the measurement --------------------------------------------------------------------------------------------------


def crews_of(platform: str, names: tuple[str, ...], until: float) -> list[Crew]:
    """XLA's programs share a process; a room of kernels has its own, as has torch."""
    together = tuple(n for n in names if n in ("jaxnorm-xla", Composed.name, "flax.linen", "tokamax"))
    crews = [Crew(JaxDevice, platform, together, until)]
    if "error" in crews[0].about:
        raise SystemExit(
            f"There is no GPU that JAX can use: {crews[0].about['error']}\n"
            "Run this on a machine with an NVIDIA GPU and jax[cuda13]. To try the script without one: "
            "python -m benchmarks.gpu --platform cpu"
        )
    rooms = [n.removeprefix("jaxnorm-") for n in names if n.startswith("jaxnorm-") and n not in together]
    there = [room for room in rooms if room in ROOMS[platform] and room in crews[0].about["rooms"]]
    crews += [Crew(RoomDevice, platform, (f"jaxnorm-{room}",), until) for room in there]
    torch = tuple(n for n in names if n in ("torch", "torch.compile", "liger", "quack"))
    return crews + ([Crew(TorchDevice, platform, torch, until)] if torch else [])


def checked(crews: list[Crew], works: tuple[Work, ...]) -> dict[str, dict[str, list[float] | str]]:
    """By room and case, the errors, or why there are none."""
    found: dict = {}
    for crew in crews:
        for name in crew.versions:
            if name.startswith("jaxnorm-") and name != Composed.name:
                try:
                    results = crew.ask("check", name, list(works), within=PATIENCE)
                except Lost as lost:
                    results = [str(lost)] * len(works)
                found[name] = {str(work): result for work, result in zip(works, results, strict=True)}
    return found


def measured(work: Work, crews: list[Crew], platform_: str) -> dict:
    """One case: by contestant and pass, seconds and percent."""
    outcome = {name: found for crew in crews for name, found in crew.enter(work, list(crew.versions)).items()}
    failures = {name: why for name, why in outcome.items() if isinstance(why, str)}
    keys: dict = {}
    for crew in crews:
        with suppress(Lost):
            keys |= dict.fromkeys((key for key in crew.ask("keys") if key[0] not in failures), crew.sampler())
    samples = {key: taken[:, 0] for key, taken in in_turn(keys, ROUNDS, CASE_SECONDS[platform_]).items()}
    copies = {name: quartiles(taken) for (name, which), taken in samples.items() if which == "copy"}
    copies = {name: seconds for name, seconds in copies.items() if not math.isnan(seconds[1])}
    best = min((seconds[1] for seconds in copies.values()), default=math.nan)
    result = {
        **asdict(work),
        "bytes": work.nbytes,
        "arrays": work.arrays(platform_),
        "failures": failures,
        "copies": copies,
    }
    contestants: dict = {}
    for (name, which), taken in samples.items():
        if which == "copy":
            continue
        if not np.isfinite(best * taken).all():
            failures[name] = f"{which}: no time could be taken of it"
            continue
        part = 100 * least(work.norm, which) / 2 * best
        contestants.setdefault(name, {"errors": outcome[name], "passes": {}})["passes"][which] = {
            "seconds": quartiles(taken), "percent": quartiles(part / taken), "rounds": len(taken)
        }  # fmt: skip
    return {**result, "contestants": contestants}


def run(platform_: str, names: tuple[str, ...], cases: list[Work], minutes: float, save) -> dict:
    """All of it, saved after every case; cases that would not end in time are named."""
    started = time.monotonic()
    deadline = started + 60 * minutes
    crews = crews_of(platform_, names, deadline + GRACE)
    name, driver = gpu() if platform_ == "gpu" else (processor(), "none")
    versions = {name: version for crew in crews for name, version in crew.versions.items()}
    missing = {name: why for crew in crews for name, why in crew.missing.items()}
    rooms = {f"jaxnorm-{room}" for room in ROOMS[platform_]}.intersection(names)
    missing |= dict.fromkeys(sorted(rooms.difference(versions, missing)), "not a room of this build")
    report = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
        "platform": platform_,
        "device": name or crews[0].about["device"],
        "driver": driver,
        "system": platform.platform(),
        "python": platform.python_version(),
        **{key: crews[0].about[key] for key in ("jax", "jaxlib", "rooms")},
        "versions": versions,
        "missing": missing,
        "rounds": ROUNDS,
        "planned": len(cases),
        "checks": checked(crews, CHECKS if platform_ == "gpu" else CHECKS[::5]),
        "results": [],
    }
    crews = [crew for crew in crews if crew.versions]

    def saved(done: int) -> None:
        report["minutes"], report["done"] = (time.monotonic() - started) / 60, done
        report["left_out"], report["verdicts"] = [str(work) for work in cases[done:]], verdicts(report["results"])
        save(report)

    saved(0)
    longest = 0.0
    for i, work in enumerate(cases, 1):
        begun = time.monotonic()
        if begun + longest > deadline:
            break
        print(f"{i} of {len(cases)}: {work}", file=sys.stderr)
        report["results"].append(measured(work, crews, platform_))
        longest = max(longest, time.monotonic() - begun)
        saved(i)
    for crew in crews:
        crew.close()
    return report


def gpu() -> tuple[str, str]:
    """The GPU's name and its driver's version, of nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        found = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
        name, driver = found.split("\n")[0].split(", ")
        return name, driver
    return "", "unknown"


def processor() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", path.read_text(encoding="utf-8") if path.exists() else "")
    return found[1] if found else platform.machine()


# --- the command line -------------------------------------------------------------------------------------------------


def case_of(text: str) -> Work:
    norm, shape, dtype = text.split(":")
    return Work(norm, tuple(int(n) for n in shape.split("x")), dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--platform", choices=("gpu", "cpu"), default="gpu", help="cpu: tiny arrays, to try the script")
    add("--minutes", type=float, default=7.0, help="no case begins that would end later")
    add(
        "--cases", nargs="+", type=case_of, metavar="CASE", help="such as rms:131072x4096:bfloat16, instead of the list"
    )
    add("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=f"these alone, of {', '.join(NAMES)}")
    add(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="for gpu.json, gpu.md and gpu.png; benchmarks/results, or on cpu /tmp",
    )
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = {"gpu": "cuda", "cpu": "cpu"}[options.platform]  # no other is fallen back to
    default = RESULTS if options.platform == "gpu" else Path(tempfile.gettempdir())
    folder = options.out or default

    def save(report: dict) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        (folder / "gpu.md").write_text(page(report, True), encoding="utf-8")

    report = run(
        options.platform, tuple(options.only), options.cases or list(CASES[options.platform]), options.minutes, save
    )
    print(page(report, False))
    try:
        draw(report, folder / "gpu.png")
    except ImportError:
        print("matplotlib is not installed: no gpu.png.")
    print(f"Written to {folder}.")


if __name__ == "__main__":
    main()
