"""Norms on 8 to 1024 chips: collectives counted in compiled programs, and a model of their time.

The counts are read from what XLA's TPU compiler makes; nothing is run. It takes some twelve minutes on two cores.
`tests/helpers/compiled/scaling.py` has the programs: a batch norm alone, for each width of a ResNet-50; a step of two
residual blocks with six batch norms and of a transformer block with two norms, less the same without norms; and norms
whose features are sharded over 8 chips. The times are those of the model in `tests/helpers/compiled/torus.py`.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator

from helpers.compiled import cases, missing, scaling, torus
from helpers.compiled.torus import GROUPS, IMAGES, chip_of, choices, chosen, waits

from benchmarks.harness import records
from benchmarks.harness.table import section, table

SIZES = ("v5ex8", "v5ex64", "v5ex256", "v5px8", "v5px64", "v5px256", "v5px1024")
FORMS = ("jit", "shard_map")
ROW_NORMS = ("LayerNorm", "RMSNorm")
WIDTHS = (64, 128, 256, 512, 1024, 2048)


def programs(targets) -> Iterator[tuple[dict, Callable[[], dict]]]:
    """What each program is, and how it is compiled and counted."""
    for target in targets:
        for form, sync in itertools.product(FORMS, scaling.SYNCS):
            for channels in WIDTHS if sync != "local" else WIDTHS[:1]:
                it = dict(of="norm", target=target, sync=sync, form=form, channels=channels)
                yield it, functools.partial(scaling.alone, target, sync, form, channels)
        for form, sync in itertools.product(FORMS, (*scaling.SYNCS, None)):
            it = dict(of="stage", target=target, sync=sync, form=form)
            yield it, functools.partial(scaling.stage, target, sync, form)
        for form, norm in itertools.product(FORMS, ROW_NORMS):
            it = dict(of="spread", target=target, norm=norm, form=form)
            yield it, functools.partial(scaling.spread, target, norm, form)
        for norm in (*ROW_NORMS, None):
            yield dict(of="block", target=target, norm=norm), functools.partial(scaling.block, target, norm)
    for _, same in itertools.groupby(targets, lambda target: target[:3]):
        first, *rest = same
        for target, sync in [(first, "global"), (first, "local"), (first, None), *((t, "global") for t in rest[-1:])]:
            run = functools.partial(scaling.stage, target, sync, "jit", *cases.STAGE[:2])
            yield dict(of="whole stage", target=target, sync=sync), run


def page(found: list[dict]) -> str:
    targets = len({it["target"] for it in records.results(found)})
    parts = ["# Norms on 8 to 1024 chips\n", records.origin(found), ""]
    for title, about, rows in (
        ("What one batch norm waits for", _ALONE, _alone(found)),
        ("What norms add to a step of training", _ADDED, _added(found)),
        ("Temporary memory of a chip", _MEMORY, _memory(found)),
        ("Features spread over 8 chips", _SPREAD, _spread(found)),
        ("The model: a ResNet-50", _MODEL, _modelled(found)),
        ("What to choose, by the model", _CHOICE, _choices(found)),
    ):
        parts.append(section(title, f"{about}\n\n{_merged(rows, targets)}"))
    return "\n".join(parts)


def _merged(rows: Iterator[tuple], targets: int) -> str:
    """A table; rows that differ only in their first cell become one."""
    head, *rest = rows
    same: dict[tuple, list[str]] = {}
    for first, *others in rest:
        same.setdefault(tuple(others), []).append(first)
    return table(head, [("all" if len(names) == targets else ", ".join(names), *o) for o, names in same.items()])


_ALONE = """Forward the statistics, backward two sums: one all-reduce each. So that the first is one, every chip has a
slot of its own in it: 3 values for each channel under jit, 4 under shard_map, where counts may differ. Where that would
be more than 1 MiB it is two smaller ones instead. Each chip alone ("local") waits for none, whatever the target."""


def _alone(found):
    rows: dict[tuple, dict] = {}
    for it in chosen(found, "norm"):
        key = it["target"], it["sync"], it["form"]
        rows.setdefault(key, {})[it["channels"]] = it["collectives"]
    widths = (64, 256, 1024, 2048)
    yield "target", "statistics of", "by", "chips in each", *(f"bytes, {c} channels" for c in widths)
    for (target, sync, form), by_width in rows.items():
        if sync == "local":
            assert not any(by_width.values()), (target, by_width)
            continue
        among = {c["chips"] for each in by_width.values() for c in each}
        sizes = (" + ".join(f"{c['bytes']:,}" for c in by_width[width]) for width in widths)
        yield target, sync, form, *among, *sizes


_ADDED = """The step with norms less the step without: of two residual blocks with six batch norms, of a transformer
block with two norms. Running statistics, and gradients of scale and bias, travel at the end of the step and keep no
layer waiting. The batch is spread over all chips."""


def _added(found):
    yield "target", "norm", "by", "collectives of the step", "without norms", "for each norm", "bytes for each norm"
    for of, number in (("stage", 6), ("block", 2)):
        steps = chosen(found, of)
        which = "sync" if of == "stage" else "norm"
        bare = {(it["target"], it.get("form")): it["collectives"] for it in steps if it[which] is None}
        for it in steps:
            if it[which] is None:
                continue
            mine, without = it["collectives"], bare[it["target"], it.get("form")]
            size = sum(c["bytes"] for c in mine) - sum(c["bytes"] for c in without)
            name = f"batch norm, {it['sync']}" if of == "stage" else it["norm"]
            each = f"{(len(mine) - len(without)) / number:.2f}"
            yield it["target"], name, it.get("form", "jit"), len(mine), len(without), each, f"{size / number:,.0f}"


_MEMORY = "Of the two residual blocks, 16 images of 56 x 56 x 256 on each chip, by jit."


def _memory(found):
    yield "target", "batch norm", "MiB"
    for it in chosen(found, "whole stage"):
        yield it["target"], it["sync"] or "none", f"{it['temp_bytes'] / 2**20:.1f}"


_SPREAD = """Tensor parallel: y and dx of 1024 rows of 4096 bfloat16 features, an eighth of them on each chip. Nothing
but statistics travels; gathering x would take 8,192 bytes for each row."""


def _spread(found):
    yield "target", "norm", "by", "collectives", "bytes for each row", "model, µs"
    for it in chosen(found, "spread"):
        kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(c["kind"] for c in it["collectives"]).items())
        size = sum(c["bytes"] for c in it["collectives"]) / 1024
        time = torus.total(chip_of(it["target"]), it["collectives"])
        yield it["target"], it["norm"], it["form"], kinds, f"{size:.0f}", f"{time * 1e6:.0f}"


_MODEL = """Milliseconds that a step waits for the all-reduces of its 53 batch norms, as counted for their widths, one
after the other, by the model of `tests/helpers/compiled/torus.py`: a microsecond for each hop, and the rate of links.
"local" waits 0. Beside it the least time of a step: the norms' 8 passes over memory, and all products at the peak."""


def _modelled(found):
    ways = [f"{sync}, {form}" for sync in ("global", GROUPS) for form in ("jit", "shard_map")]
    yield "target", *ways, *(f"a step, {n} images a chip" for n in (4, 16, 64))
    for target, by in waits(found).items():
        steps = (torus.step_seconds(chip_of(target), n) for n in (4, 16, 64))
        yield target, *(f"{1e3 * time:.2f}" for time in (*(by[w] for w in ways), *steps))


_CHOICE = f"""Under jit, by images on a chip. All chips while that adds at most {torus.LITTLE:.0%} to the least time of
a step (what a choice adds stands beside it); beyond that as few chips as have {torus.ENOUGH} images between them, here
one or 8."""


def _choices(found):
    yield "target", *(f"{n} images" for n in IMAGES)
    for target, row in choices(found).items():
        yield target, *(f"{choice}, {share:.0%}" if share else choice for choice, share in row.values())


def main() -> None:
    parser = records.parser(__doc__)
    parser.add_argument("--targets", **records.choice(SIZES))
    options = parser.parse_args()

    def measure() -> Iterator[list[dict]]:
        if (reason := missing("tpu")) is not None:
            raise SystemExit(f"Nothing can be compiled: {reason}")
        yield [records.setting("scale", versions={"libtpu": records.version("libtpu")})]
        yield [it | run() for it, run in programs(options.targets)]

    records.publish("scale", options, measure, page)


if __name__ == "__main__":
    main()
