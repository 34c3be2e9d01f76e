"""What a norm costs on a GPU: jaxnorm's backends beside other libraries, in percent of the bandwidth of a copy.

First every backend of jaxnorm is compared with float64. Then cases are timed, the important ones first, until the time
is up; gpu.jsonl and gpu.md in FOLDER (benchmarks/results) are written after each. It needs jax, NumPy and an NVIDIA
GPU, and no network. `--platform cpu` runs all of it on tiny arrays, to try the script.

"forward" is the forward pass in training, which writes y and the residuals; "backward" is the rest; "forward+backward"
is one program with both. Percent: the bytes that a pass must move (x read and y written: 2 of x; backward 3; batch norm
3 and 5; see `harness/case.py`) over its time, relative to what a device-to-device copy of x moves in its own. Both are
medians of rounds in which everybody takes a turn, in random order. That copy is the faster of XLA's and torch's. A
sample queues many calls and waits once. Small arrays are up to 16 to a program (a CUDA graph in torch), so that neither
a cache serves them nor the start of a program is timed; below a megabyte it still is, in JAX. Each backend of kernels
has a process of its own: only that process can be harmed by what it breaks.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from benchmarks import peers
from benchmarks.harness import records, table
from benchmarks.harness.case import PASSES, Case, least
from benchmarks.harness.contest import Contest, Crew, Lost, measured
from benchmarks.harness.timing import Worker
from benchmarks.peers import TORCH

#: By platform, the backends that may run there, if this build has them.
BACKENDS = {"gpu": ("xla", "mosaic_gpu"), "cpu": ("xla", "native")}
OURS = ("jaxnorm-xla", "jaxnorm-mosaic_gpu", "jaxnorm-native")
OTHERS = ("flax.linen", "torch", "torch.compile", "liger")
NAMES = (*OURS, "jaxnorm-composed", *OTHERS)
#: Seconds: for one answer of a process; after the end, for the case under way; and in which a case is timed.
PATIENCE, GRACE, CASE_SECONDS = 100.0, 45.0, {"gpu": 4.0, "cpu": 0.0}
ROUNDS = 21  # samples of each contestant in a case, at most
NOTES = """Cells: percent of the bandwidth of a device-to-device copy, median of the rounds. "copy" is the time of one,
and "limit" the least time of the pass, in copies. "-": no such norm. "failed": see below."""


CASES = {
    "gpu": """rms:131072x4096:bfloat16 layer:131072x4096:bfloat16 add_rms:65536x4096:bfloat16
        rms:1048576x512:bfloat16 layer:1048576x512:bfloat16 batch:32x56x56x256:bfloat16 group:32x56x56x256:bfloat16
        rms:524288x1024:bfloat16 layer:524288x1024:bfloat16 rms:65536x8192:bfloat16 layer:65536x8192:bfloat16
        rms:2097152x128:bfloat16 layer:524288x768:bfloat16 rms:65536x4096:float32 layer:65536x4096:float32
        rms:8192x1024:bfloat16 layer:256x1024:bfloat16 gated_rms:65536x4096:bfloat16 rms:262144x2048:bfloat16
        layer:262144x2048:bfloat16 rms:32768x8192:float32 layer:32768x8192:float32 rms:262144x1024:float32
        layer:262144x1024:float32 rms:131072x2048:float32 layer:131072x2048:float32 batch:32x56x56x256:float32""",
    "cpu": """rms:64x128:bfloat16 layer:64x128:bfloat16 add_rms:64x128:bfloat16 gated_rms:64x128:bfloat16
        batch:4x4x4x64:float32 group:4x4x4x64:float32""",
}
#: What every backend is compared with the truth on.
CHECKED = {("layer", "rms"): [(512, 1024), (7, 8192), (33, 1000)], ("batch", "group", "instance"): [(4, 7, 7, 96)],
           ("add_rms", "gated_rms"): [(256, 2048)]}  # fmt: skip
CHECKS = tuple(
    Case(norm, shape, dtype)
    for dtype in ("bfloat16", "float32") for norms, shapes in CHECKED.items() for norm in norms for shape in shapes
)  # fmt: skip


def crews_of(platform: str, names: tuple[str, ...], until: float, worker: type) -> list[Crew]:
    """XLA's programs share a process. Each backend of kernels has its own, and so has torch."""
    from benchmarks.harness.jax_process import JaxContest, KernelContest
    from benchmarks.harness.torch_process import TorchContest

    def crew(kind: type[Contest], of: tuple[str, ...]) -> Crew:
        mode = "gpu" if platform == "gpu" else "trial"
        return Crew(kind, mode, of, patience=PATIENCE, until=until, worker=worker)

    together = tuple(n for n in names if n in ("jaxnorm-xla", "jaxnorm-composed", "flax.linen"))
    crews = [crew(JaxContest, together)]
    if why := crews[0].about.get("error"):
        more = "To try the script without one: python -m benchmarks.gpu --platform cpu"
        raise SystemExit(f"There is no GPU that JAX can use: {why}\n{more}")
    there = [f"jaxnorm-{b}" for b in BACKENDS[platform] if b in crews[0].about["backends"]]
    crews += [crew(KernelContest, (name,)) for name in there if name in names and name not in together]
    torch = tuple(n for n in names if n in TORCH)
    return crews + ([crew(TorchContest, torch)] if torch else [])


def checked(crew: Crew, every: tuple[Case, ...]) -> list[dict]:
    """A record for each backend and case: its errors, or "failed", and why."""
    found_by_name = []
    for name in [name for name in crew.versions if name in OURS]:
        cases = [case for peer in [peers.make(name)] for case in every if peer.takes(case.norm)]
        try:
            found = crew.ask("check", name, cases)
        except Lost as lost:
            found = [str(lost)] * len(cases)
        for case, result in zip(cases, found, strict=True):
            key = "failed" if isinstance(result, str) else "errors"
            found_by_name.append({"check": str(case), "name": name, key: result})
    return found_by_name


def measure(platform: str, names: tuple[str, ...], cases: list[Case], minutes: float,
            worker: type = Worker) -> Iterator[list[dict]]:  # fmt: skip
    """The setting, the checks, then one case after another. Cases that would not end in time are left out."""
    deadline = time.monotonic() + 60 * minutes
    crews = crews_of(platform, names, deadline + GRACE, worker)
    versions = {name: version for crew in crews for name, version in crew.versions.items()}
    missing = {name: why for crew in crews for name, why in crew.missing.items()}
    ours = {f"jaxnorm-{backend}" for backend in BACKENDS[platform]}.intersection(names)
    missing |= dict.fromkeys(sorted(ours.difference(versions, missing)), "not a backend of this build")
    planned = [str(case) for case in cases]
    more = {"platform": platform, **crews[0].about, "versions": versions, "missing": missing, "planned": planned}
    yield [records.setting("gpu", **more)]
    crews = [crew for crew in crews if crew.versions]
    with ThreadPoolExecutor(len(crews)) as pool:
        of = pool.map(lambda crew: checked(crew, CHECKS if platform == "gpu" else CHECKS[::5]), crews)
        yield [record for found in of for record in found]
    longest = 0.0
    for i, case in enumerate(cases, 1):
        begun = time.monotonic()
        if begun + longest > deadline:
            break
        print(f"{i} of {len(cases)}: {case}", file=sys.stderr)
        yield measured(case, crews, ROUNDS, CASE_SECONDS[platform], at_once=len(crews))
        longest = max(longest, time.monotonic() - begun)
    for crew in crews:
        crew.close()


def page(found: list[dict]) -> str:
    (setting,), of = records.settings(found), records.results(found)
    checks, cases = ([r for r in of if ("check" in r) == check] for check in (True, False))
    parts = ["# Norms on a GPU\n", records.origin(found), f"\n{NOTES}\n"]
    for which in PASSES if cases else ():
        text = table.contestants(cases, [which], lambda norm, which, c: f"{100 * least(norm, which) / c:.1f} %")
        parts.append(table.section(f"{which}, percent of the copy", text))
    for (name,), mine in records.grouped(checks, "name").items():
        good = sum("errors" in record for record in mine)
        parts.append(f"{name}: equals float64 in {good} of {len(mine)} small cases.\n")
    parts.append(table.failures(of))
    done = {str(Case.parse(":".join(keys))) for keys in records.grouped(cases, *table.CASE[-3:])}
    if left_out := [case for case in setting["planned"] if case not in done]:
        parts.append(f"\nNot reached in time: {'; '.join(left_out)}.")
    return "\n".join(parts).strip() + "\n"


def main() -> None:
    parser = records.parser(__doc__)
    add = parser.add_argument
    add("--platform", choices=("gpu", "cpu"), default="gpu", help="cpu: tiny arrays, to try the script")
    add("--minutes", type=float, default=7.0, help="no case begins that would end later")
    add("--cases", nargs="+", type=Case.parse, metavar="CASE", help="such as rms:131072x4096:bfloat16")
    add("--only", **records.choice(NAMES))
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = {"gpu": "cuda", "cpu": "cpu"}[options.platform]  # no fallback to another one
    cases = options.cases or list(map(Case.parse, CASES[options.platform].split()))
    default = records.RESULTS if options.platform == "gpu" else records.SCRATCH
    steps = lambda: measure(options.platform, tuple(options.only), cases, options.minutes)
    records.publish("gpu", options, steps, page, table.draw, default)


if __name__ == "__main__":
    main()
