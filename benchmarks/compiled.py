"""Norms and models compiled for GPUs and TPUs that are not there, and counted: traffic, kernels, bytes kept.

Nothing is run. Libraries and compilers that are not installed are named and left out.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from helpers.compiled import AXIS, TARGETS, cases, missing, passes, placed, report, residuals
from jax.sharding import PartitionSpec as P

from benchmarks import peers
from benchmarks.harness import records
from benchmarks.harness.case import least
from benchmarks.harness.family import ROWS, FamilyCase
from benchmarks.harness.table import section, table

SINGLE, SHARDED = ("h200", "v5e", "v5p", "v6e"), ("h200x8", "v5ex8", "v5px8", "v6ex8", "v5ex256")
BACKENDS = {"jaxnorm-xla": ("cuda", "tpu"), "jaxnorm-mosaic_gpu": ("cuda",), "jaxnorm-mosaic_tpu": ("tpu",)}
OTHERS = ("flax.linen", "haiku", "equinox", "keras")
PASSES = ("inference", "forward", "backward", "forward+backward")
NOTES = """"traffic (kernels)" of each pass: bytes from and to main memory, over those of x in bfloat16. The least
is 2 forward and 3 backward for rows, 3 and 5 for batch norm beyond the caches, 4 and 4 for add and norm of rows.
"forward" is that of training, with its residuals; "keeps" is how much those are, over x. Arrays that fit a TPU's vector
memory cost one read."""


def attempt(run) -> dict:
    """What run() gives, or the name of its error: a library that fails does not end the table."""
    try:
        return run()
    except Exception as error:
        print(f"{type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
        return {"error": type(error).__name__}


def counted(f, target: str, *args) -> dict:
    found = attempt(lambda: {which: of.asdict() for which, of in passes(f, target, *args).items()})
    kept = attempt(lambda: {"keeps": residuals(f, *args).bytes / (args[0].size * 2)})
    return {"target": target, **kept, **found}


def shapes_of(norm: str, channels_first: bool) -> list[jax.ShapeDtypeStruct]:
    """x and parameters, in bfloat16 and float32."""
    b, *space, c = cases.NORMS[norm]
    x = jax.ShapeDtypeStruct((b, c, *space) if channels_first and space else (b, *space, c), jnp.bfloat16)
    return [x, *[jax.ShapeDtypeStruct((c,), jnp.float32)] * (1 if norm == "rms" else 2)]


def norms(targets: list[str], which: list[str], libraries: dict) -> Iterator[dict]:
    """Each norm by each library."""
    for norm in which:
        for target in [t for t in targets if t in SINGLE]:
            for name, peer in libraries.items():
                if peer.takes(norm) and TARGETS[target].platform in BACKENDS.get(name, ("cuda", "tpu")):
                    args = shapes_of(norm, peer.channels_first)
                    found = counted(functools.partial(peer.norm, norm), target, *args)
                    yield {"part": "norms", "norm": norm, "library": name, **found}


def stream(targets: list[str], which: list[str], libraries: dict) -> Iterator[dict]:
    """A residual stream, added to and normalized, by each backend of jaxnorm."""
    import jaxnorm as jn

    for target in [t for t in targets if t in SINGLE]:
        for norm in ("rms", "layer"):
            f, (x, *params) = getattr(jn, f"add_{norm}_norm"), shapes_of(norm, False)
            for name in [n for n in libraries if TARGETS[target].platform in BACKENDS.get(n, ())]:
                add = functools.partial(f, implementation=name.removeprefix("jaxnorm-"))
                yield {"part": "stream", "norm": f.__name__, "library": name, **counted(add, target, x, x, *params)}


def family(targets: list[str], which: list[str], libraries: dict) -> Iterator[dict]:
    """Each norm of the family at its first shape, by XLA: jaxnorm's beside the formula that people write."""
    written = peers.make("jnp")
    for norm, (shapes, _) in ROWS.items():
        data = FamilyCase(norm, shapes[0], "bfloat16").data()
        args = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (*data.args, *data.consts)]
        for target in [t for t in targets if t in ("h200", "v5e")]:
            for peer in (libraries["jaxnorm-xla"], written):
                found = counted(peer.call(norm), target, *args)
                yield {"part": "family", "norm": norm, "shape": shapes[0], "library": peer.name, **found}


def scan(targets: list[str], which: list[str], libraries: dict) -> Iterator[dict]:
    """A scan of 12 transformer blocks, forward and backward, with the norms of jaxnorm and of flax."""
    for target in [t for t in targets if t in SINGLE]:
        for name, module in cases.MODULES.items():
            f, args = cases.scan(module)
            run = functools.partial(report, f, target, *placed(target, args), unit=args[1].size * 2)
            yield {"part": "scan", "target": target, "library": name, **attempt(lambda run=run: run().asdict())}


def stage(targets: list[str], which: list[str], libraries: dict) -> Iterator[dict]:
    """A ResNet stage under jit over a batch that is sharded over the devices: batch norm is synchronized."""
    for target in [t for t in targets if t in SHARDED]:
        for name, module in cases.MODULES.items():
            f, (variables, x) = cases.stage(module, TARGETS[target].devices)
            args = (placed(target, variables), placed(target, x, P(AXIS)))
            run = functools.partial(report, f, target, *args, unit=x.size * 2 // TARGETS[target].devices)
            yield {"part": "stage", "target": target, "library": name, **attempt(lambda run=run: run().asdict())}


PARTS = {"norms": norms, "stream": stream, "family": family, "scan": scan, "stage": stage}


def page(found: list[dict]) -> str:
    parts = ["# Compiled programs\n", records.origin(found), f"\n{NOTES}\n"]
    cell = lambda of: f"{of['traffic']:.2f} ({of['kernels']})" if of else "failed"
    mib = lambda of: f"{of['temp_bytes'] / 2**20:.0f} MiB" if "temp_bytes" in of else "failed"
    by_part = {part: of for (part,), of in records.grouped(records.results(found), "part").items()}
    counts = [*by_part.get("norms", []), *by_part.get("stream", [])]
    for (norm, target), of in records.grouped(counts, "norm", "target").items():
        keeps = [f"{r['keeps']:.2f}" if "keeps" in r else "-" for r in of]
        rows = [[r["library"], *(cell(r.get(which)) for which in PASSES), k] for r, k in zip(of, keeps, strict=True)]
        shape = "x".join(map(str, cases.NORMS[norm if norm in cases.NORMS else "rms"]))
        title = f"{norm} norm, {shape}, {target}" if norm in cases.NORMS else f"`{norm}`, {shape}, {target}"
        parts.append(section(title, table(["library", *PASSES, "keeps"], rows)))
    for (target,), of in records.grouped(by_part.get("family", []), "target").items():
        limit = lambda r: " + ".join(f"{2 * least(r['norm'], which):g}" for which in ("forward", "backward"))
        rows = [[f"{r['norm']} {'x'.join(map(str, r['shape']))}", limit(r), r["library"],
                 *(cell(r.get(which)) for which in PASSES)] for r in of]  # fmt: skip
        parts.append(section(f"The family, {target}", table(["", "least", "library", *PASSES], rows)))
    if "scan" in by_part:
        by_target = records.grouped(by_part["scan"], "target").items()
        rows = [(target, *[*map(mib, of), "-"][:2]) for (target,), of in by_target]
        text = table(["target", *(f"temporary memory, {name}" for name in cases.MODULES)], rows)
        parts.append(section("12 transformer blocks in a scan, bfloat16, forward and backward", text))
    if "stage" in by_part:
        kinds = lambda r: ", ".join(f"{n} {k} ({r['collective_bytes'][k]} B)" for k, n in r["collectives"].items())
        sent = lambda r: kinds(r) if "collectives" in r else "failed"
        rows = [(r["target"], r["library"], sent(r), mib(r)) for r in by_part["stage"]]
        text = table(["target", "norms", "collectives of a step", "temporary memory"], rows)
        parts.append(section(f"A ResNet stage, {cases.BATCH_NORMS} batch norms, forward and backward", text))
    return "\n".join(parts)


def main() -> None:
    parser = records.parser(__doc__)
    parser.add_argument("--targets", **records.choice(TARGETS, [*SINGLE, *SHARDED]))
    parser.add_argument("--norms", **records.choice(cases.NORMS))
    parser.add_argument("--parts", **records.choice(PARTS))
    options = parser.parse_args()

    def measure() -> Iterator[list[dict]]:
        absent = {p: reason for p in ("cuda", "tpu") if (reason := missing(p))}
        targets, libraries = [t for t in options.targets if TARGETS[t].platform not in absent], {}
        for name in (*BACKENDS, *OTHERS):
            try:
                libraries[name] = peers.make(name)
            except ImportError as error:
                absent[name] = str(error)
        versions = {name: peer.version for name, peer in libraries.items()}
        versions |= {"libtpu": records.version("libtpu")}
        yield [records.setting("compiled", versions=versions, missing=absent)]
        for part in options.parts:
            for record in PARTS[part](targets, options.norms, libraries):
                yield [record]

    records.publish("compiled", options, measure, page)


if __name__ == "__main__":
    main()
