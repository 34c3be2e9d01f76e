"""A model, not a measurement, of what all-reduces cost on a torus of chips, and of the batch norms of a ResNet-50.

An all-reduce of b bytes over a box of chips with sides d goes along each side in turn, there (summing) and back:

    t = 2 (steps(d_1) + steps(d_2) + ...) hop + 2 b / rate

A side that closes to a ring is walked both ways, in d // 2 steps and with both directions of a link; an open one in
d - 1 steps with one. (XLA may use several sides at once; then the second term is smaller.) Sides close where they are
as long as a whole pod's on v5e, 16, and on v5p where they are whole cubes, multiples of 4.

The figures are public ones, rounded: memory and links from Google's "TPU v5e" and "TPU v5p" pages
(docs.cloud.google.com/tpu/docs/v5e and v5p: 819 and 2765 GB/s of memory; 400 GB/s over 4 links and 1200 GB/s over
6, both directions together; 197 and 459 TFLOP/s in bfloat16); the rates that a link gives in practice, the rings and
the microsecond for a hop from Austin et al., "How to Scale Your Model" (jax-ml.github.io/scaling-book, chapters "TPUs"
and "Sharded Matrices").
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    flops: float  # a second
    memory: float  # bytes a second
    link: float  # bytes a second and direction
    hop: float  # seconds from a chip to its neighbour
    closes: int  # a side that is a multiple of this is a ring


CHIPS = {"v5e": Chip(197e12, 819e9, 45e9, 1e-6, 16), "v5p": Chip(459e12, 2765e9, 90e9, 1e-6, 4)}

Box = tuple[int, ...]


def seconds(chip: Chip, box: Box, payload: int, ways: int = 2) -> float:
    """The time of one all-reduce among the chips of a box; of one chip none. An all-gather goes one way."""
    sides = [d for d in box if d > 1]
    if not sides:
        return 0.0
    closed = [d % chip.closes == 0 for d in sides]
    steps = sum(d // 2 if ring else d - 1 for d, ring in zip(sides, closed, strict=True))
    return ways * (steps * chip.hop + payload / (chip.link * (2 if all(closed) else 1)))


def total(chip: Chip, collectives: Iterable[dict]) -> float:
    """The time of collectives as `benchmarks.scale` counts them, one after the other."""
    time = 0.0
    for it in collectives:
        if it["kind"] == "all-reduce":
            time += seconds(chip, it["box"], it["bytes"])
        elif it["kind"] == "all-gather":
            time += seconds(chip, it["box"], it["bytes"] * it["chips"], ways=1)
        else:
            raise ValueError(f"the model knows all-reduce and all-gather, got {it['kind']}")
    return time


def resnet50() -> list[tuple[int, int]]:
    """(channels, pixels of an image) of each of its 53 batch norms, for images of 224 x 224."""
    norms = [(64, 112 * 112)]
    for blocks, width, side in ((3, 64, 56), (4, 128, 28), (6, 256, 14), (3, 512, 7)):
        for block in range(blocks):
            first = side * 2 if block == 0 and width > 64 else side  # the stride is in the 3x3 convolution
            norms += [(width, first * first), (width, side * side), (4 * width, side * side)]
            norms += [(4 * width, side * side)] * (block == 0)  # of the shortcut
    return norms


PASSES = 8  # over x, 3 forward and 5 backward: the least that batch norm moves in training


def memory_seconds(chip: Chip, norms: list[tuple[int, int]], images: int) -> float:
    """The time that memory alone takes for norms, of so many images on a chip, in bfloat16."""
    return PASSES * 2 * images * sum(channels * pixels for channels, pixels in norms) / chip.memory


FLOPS = 6 * 4.1e9  # of an image, forward and backward: two for each of 4.1e9 multiplications, and twice that again


def step_seconds(chip: Chip, images: int) -> float:
    """Hardly less than this takes a step of a ResNet-50: its norms' memory time, and its products at the peak rate."""
    return memory_seconds(chip, resnet50(), images) + images * FLOPS / chip.flops


ENOUGH = 32  # images whose statistics train as well as those of more (Wu, He 2018, "Group Normalization", figure 1)
LITTLE = 0.1  # of a step: what waiting may add before it is worth avoiding


def choose(images: int, waits: dict[str, float], step: float, group: int) -> str:
    """Whose statistics to take, for so many images on a chip, where each way adds so long to such a step.

    All chips', which makes training the same on any number of them, while that costs little; else of as few as have
    `ENOUGH` images between them.
    """
    if waits["global"] <= LITTLE * step:
        return "global"
    if images >= ENOUGH:
        return "local"
    return "groups" if images * group >= ENOUGH and waits["groups"] < waits["global"] else "global"


# --- of what `benchmarks.scale` counted -------------------------------------------------------------------------------

GROUPS = "groups of 8"
IMAGES = (4, 8, 16, 32, 64, 128)  # on a chip


def chosen(found: list[dict], of: str) -> list[dict]:
    return [it for it in found if it.get("of") == of]


def chip_of(target: str) -> Chip:
    return CHIPS[target[:3]]


def waits(found: list[dict]) -> dict[str, dict[str, float]]:
    """For each target, by "statistics, form", the seconds that a step of a ResNet-50 waits for its batch norms."""
    times: dict[str, dict[str, dict]] = {}
    for it in chosen(found, "norm"):
        by_width = times.setdefault(it["target"], {}).setdefault(f"{it['sync']}, {it['form']}", {})
        by_width[it["channels"]] = total(chip_of(it["target"]), it["collectives"])
    norms = resnet50()
    local = lambda way: way.startswith("local")
    return {
        target: {w: 0.0 if local(w) else sum(by_width[c] for c, _ in norms) for w, by_width in ways.items()}
        for target, ways in times.items()
    }


def choices(found: list[dict]) -> dict[str, dict[int, tuple[str, float]]]:
    """For each target and number of images on a chip: what to choose, and the share of a step that it adds."""
    made: dict[str, dict] = {}
    for target, by in waits(found).items():
        ways = {"global": by["global, jit"], "groups": by[f"{GROUPS}, jit"], "local": 0.0}
        for images in IMAGES:
            step = step_seconds(chip_of(target), images)
            choice = choose(images, ways, step, 8)
            made.setdefault(target, {})[images] = choice, ways[choice] / step
    return made
