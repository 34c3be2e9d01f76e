"""Norms and models compiled for GPUs and TPUs that are not there, counted, and printed as tables in Markdown.

    python -m benchmarks.compiled [--targets NAME ...] [--norms NORM ...] [--parts PART ...] [--json PATH]

A cell of the norms is "traffic (kernels)": the bytes that a pass moves from and to main memory, over those of x, which
is bfloat16. The least is 2 forward and 3 backward for rows, 3 and 5 for batch norm beyond the caches, 4 and 4 for rows
of a residual stream that is added to first. "keeps" is what jax.vjp holds for the backward pass, over x. Whoever's
package or compiler is not installed is named and left out.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

import jaxnorm as jn

from . import AXIS, TARGETS, cases, missing, passes, placed, report, residuals

SINGLE, SHARDED = ("h200", "v5e", "v5p", "v6e"), ("h200x8", "v5ex8", "v5px8", "v6ex8", "v5ex256")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=[*SINGLE, *SHARDED])
    parser.add_argument("--norms", nargs="+", choices=cases.NORMS, default=list(cases.NORMS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", metavar="PATH", help="also write every number to this file")
    options = parser.parse_args()
    del sys.argv[1:]  # tokamax reads flags of its own there
    reasons = {p: missing(p) for p in ("cuda", "tpu")}
    targets = [t for t in options.targets if reasons[TARGETS[t].platform] is None]
    print(f"jax {jax.__version__}, compiled for {', '.join(targets) or 'nothing'}; nothing was run.")
    for reason in filter(None, reasons.values()):
        print(f"Left out, {reason}")
    results = {part: PARTS[part](targets, options.norms) for part in options.parts}
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"jax": jax.__version__, "missing": reasons, **results}, file, indent=1)


def attempt(run):
    """What run() gives, or its error in a word: a peer that fails does not end the table."""
    try:
        return run()
    except Exception as error:
        print(f"{type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
        return {"error": type(error).__name__}


def norms(targets, which) -> list[dict]:
    """Each norm, pass, target and library."""
    libraries, absent = cases.contestants()
    results = []
    for kind in which:
        for target in [t for t in targets if t in SINGLE]:
            platform = TARGETS[target].platform
            rows = []
            for name, contestant in libraries.items():
                if not cases.has(contestant, name, kind, platform):
                    continue
                f, (x, *params) = cases.norm(contestant, kind)
                found = attempt(lambda f=f, x=x, params=params, t=target: passes(f, t, x, *params))
                kept = attempt(lambda f=f, x=x, params=params: residuals(f, x, *params).bytes / (x.size * 2))
                result = {"norm": kind, "target": target, "library": name, "keeps": kept}
                results.append(result | ({k: v if k == "error" else v.asdict() for k, v in found.items()}))
                rows.append([name, *(_cell(found.get(p)) for p in PASSES), _number(kept)])
            shape = "x".join(map(str, cases.NORMS[kind]))
            _table(f"{kind} norm, {shape}, {target}", ["library", *PASSES, "keeps"], rows)
    if absent:
        print(f"\nNot installed, left out: {', '.join(absent)}.")
    return results


PASSES = ("inference", "forward", "backward", "forward+backward")


def stream(targets, _) -> list[dict]:
    """A residual stream, added to and normalized, by each room of jaxnorm."""
    results = []
    x = jax.ShapeDtypeStruct(cases.NORMS["rms"], jnp.bfloat16)
    for target in [t for t in targets if t in SINGLE]:
        rows = []
        for norm, params in ((jn.add_rms_norm, 1), (jn.add_layer_norm, 2)):
            for room in [r for r, platforms in cases.ROOMS.items() if TARGETS[target].platform in platforms]:
                f = functools.partial(norm, implementation=room)
                args = [x, *[jax.ShapeDtypeStruct(x.shape[-1:], jnp.float32)] * params]
                found = attempt(lambda f=f, args=args, t=target: passes(f, t, x, *args))
                result = {"norm": norm.__name__, "target": target, "room": room}
                results.append(result | ({k: v if k == "error" else v.asdict() for k, v in found.items()}))
                rows.append([norm.__name__, room, *(_cell(found.get(p)) for p in PASSES)])
        shape = "x".join(map(str, x.shape))
        _table(f"A residual stream, {shape}, {target}", ["function", "room", *PASSES], rows)
    return results


def scan(targets, _) -> list[dict]:
    """A scan of 12 blocks, forward and backward, the blocks the same but for their norms."""
    results, rows = [], []
    for target in [t for t in targets if t in SINGLE]:
        found = {}
        for name, module in cases.MODULES.items():
            f, args = cases.scan(module)
            unit = args[1].size * 2
            found[name] = attempt(lambda f=f, a=args, t=target, u=unit: report(f, t, *placed(t, a), unit=u))
            if not isinstance(found[name], dict):
                results.append({"target": target, "library": name, **found[name].asdict()})
        if not any(isinstance(r, dict) for r in found.values()):
            mine, theirs = (found[n].temp_bytes for n in ("jaxnorm", "flax.linen"))
            rows.append([target, f"{mine / 2**20:.0f} MiB", f"{theirs / 2**20:.0f} MiB", f"{1 - mine / theirs:.0%}"])
    heads = ["target", "temporary memory, jaxnorm", "flax.linen", "less"]
    _table("12 blocks in a scan, bfloat16, forward and backward", heads, rows)
    return results


def stage(targets, _) -> list[dict]:
    """A ResNet stage under jit over a batch that is spread over the devices: batch norm is synchronized."""
    results, rows = [], []
    for target in [t for t in targets if t in SHARDED]:
        for name, module in cases.MODULES.items():
            f, (variables, x) = cases.stage(module, TARGETS[target].devices)
            args = (placed(target, variables), placed(target, x, P(AXIS)))
            unit = x.size * 2 // TARGETS[target].devices
            found = attempt(lambda f=f, a=args, t=target, u=unit: report(f, t, *a, unit=u))
            if isinstance(found, dict):
                continue
            results.append({"target": target, "library": name, **found.asdict()})
            kinds = ", ".join(f"{n} {k} ({found.collective_bytes[k]} B)" for k, n in found.collectives.items())
            rows.append([target, name, kinds, f"{found.temp_bytes / 2**20:.0f} MiB"])
    heads = ["target", "norms", "collectives of a step", "temporary memory"]
    _table(f"A ResNet stage, {cases.BATCH_NORMS} batch norms, forward and backward", heads, rows)
    return results


PARTS = {"norms": norms, "stream": stream, "scan": scan, "stage": stage}


def _cell(found) -> str:
    return f"{found.traffic:.2f} ({found.kernels})" if hasattr(found, "traffic") else "failed"


def _number(value) -> str:
    return f"{value:.2f}" if isinstance(value, float) else "failed"


def _table(title: str, heads: list[str], rows: list[list[str]]) -> None:
    if rows:
        lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
        print(f"\n### {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines), flush=True)


if __name__ == "__main__":
    main()
