"""Norms beyond this machine: collectives from compiled programs for 8 to 1024 chips, and a model of what they cost.

    python -m benchmarks.scale [--targets NAME ...] [--json PATH] [--plot PATH] [--again JSON]

Everything counted is read off what XLA's TPU compiler makes; nothing is run. The tables go to the standard output, in
Markdown. It takes some twelve minutes on two cores. Three kinds of program are compiled:

- A batch norm alone, y and dx of bfloat16 x, for each width of a ResNet-50: the all-reduces that the layer waits for,
  their bytes, and who takes part. Statistics of all chips, of groups of 8 neighbours, and of each chip alone; x sharded
  by jit, or by shard_map with an axis name (groups there are the last of two mesh axes).
- A step of two residual blocks with six batch norms, parameters' gradients and running statistics included, less the
  same step without norms: all that norms add, a sixth of it for each. Likewise a transformer block with two norms.
- A layer norm and an RMS norm whose features are spread over 8 chips (tensor parallel), 1024 rows on each.

The planes are 8 x 8 pixels with 2 images a chip, and the sequences 64 tokens, so that compiling takes seconds and not a
minute: what is communicated is a matter of channels and chips alone, to the byte (tests/test_scale.py). Temporary
memory is not. That of the residual blocks is for 16 images of 56 x 56 on a chip, on the fewest and the most chips.

The times are those of the model in `_scale_model.py`, over the collectives that were counted.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import itertools
import json
import sys
import types
from collections.abc import Callable, Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
import jaxnorm.linen
from benchmarks import _scale_model as model
from benchmarks import _scale_page as page
from benchmarks.compiled import cases, collectives, mesh, missing

SIZES = ("v5ex8", "v5ex64", "v5ex256", "v5px8", "v5px64", "v5px256", "v5px1024")
GROUP = 8
BOTH = ("host", "chip")  # the axes of the mesh, the last of GROUP neighbours
SYNCS = {"global": "global", f"groups of {GROUP}": GROUP, "local": "local"}
FORMS = ("jit", "shard_map")
ROW_NORMS = ("LayerNorm", "RMSNorm")
WIDTHS = (64, 128, 256, 512, 1024, 2048)
IMAGES, SIDE = 2, 8  # on each chip, and of each image


@functools.cache
def chips(target: str) -> Mesh:
    devices = mesh(target).devices.reshape(-1, GROUP)
    return Mesh(devices, BOTH, axis_types=(AxisType.Auto,) * 2)


def counted(target: str, f, *args) -> dict:
    """The collectives of f, compiled for a target: how many, with what bytes, in what boxes of chips; and its memory.

    args: (shapes, spec) each.
    """
    on = chips(target)
    put = lambda tree, spec: jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(on, spec)), tree
    )
    with jax.set_mesh(on):
        program = jax.jit(f).lower(*(put(*arg) for arg in args)).compile()
    coords = [tuple(d.coords) for d in on.devices.flat]
    found = []
    for it in collectives(program.as_text()):
        groups = it.groups or (tuple(range(on.size)),)
        boxes = {model.box_of(coords[i] for i in group) for group in groups}
        found.append({"kind": it.kind, "bytes": it.bytes, "chips": len(groups[0]), "box": max(boxes, key=np.prod)})
    return {"collectives": found, "temp_bytes": program.memory_analysis().temp_size_in_bytes}


def _y_and_dx(apply: Callable) -> Callable:
    """(params, x, g) -> y, and what a cotangent g of it comes to for x."""

    def step(params, x, g):
        y, pull = jax.vjp(lambda x: apply(params, x), x)
        return y, pull(g)[0]

    return step


def alone(target: str, sync: str, form: str, channels: int) -> dict:
    """y and dx of one batch norm: what the layer waits for."""
    names = BOTH if sync != "global" or form == "shard_map" else None
    norm = jn.BatchNorm(axis_name=names, sync=SYNCS[sync])
    params, state = norm.init(channels)
    step = _y_and_dx(lambda params, x: norm.apply(params, state, x, train=True, update_stats=False)[0])
    if form == "shard_map":
        step = jax.shard_map(step, mesh=chips(target), in_specs=(P(), P(BOTH), P(BOTH)), out_specs=P(BOTH))
    x = jax.ShapeDtypeStruct((IMAGES * chips(target).size, SIDE, SIDE, channels), jnp.bfloat16)
    return counted(target, step, (params, P()), (x, P(BOTH)), (x, P(BOTH)))


class _Nothing(nn.Module):
    """In the place of a norm."""

    @nn.compact
    def __call__(self, x):
        return x


NO_NORM = types.SimpleNamespace(BatchNorm=lambda **_: _Nothing(), LayerNorm=lambda **_: _Nothing())


def stage(target: str, sync: str | None, form: str = "jit", images: int = IMAGES, side: int = SIDE) -> dict:
    """A step of two residual blocks: gradients of all parameters, and the new statistics."""
    norm = functools.partial(jaxnorm.linen.BatchNorm, axis_name=BOTH, sync=SYNCS.get(sync or "", "global"))
    x = jax.ShapeDtypeStruct((images * chips(target).size, side, side, cases.STAGE[-1]), jnp.bfloat16)
    return _step(target, cases.Stage(NO_NORM if sync is None else types.SimpleNamespace(BatchNorm=norm)), form, x)


def block(target: str, norm: str | None) -> dict:
    """A step of a transformer block, under jit, its batch spread over all chips."""
    norms = NO_NORM if norm is None else types.SimpleNamespace(LayerNorm=getattr(jaxnorm.linen, norm))
    x = jax.ShapeDtypeStruct((chips(target).size, 64, cases.WIDTH), jnp.bfloat16)
    return _step(target, cases.Block(norms), "jit", x)


def _step(target: str, module: nn.Module, form: str, x) -> dict:
    more = (None,) * isinstance(module, cases.Block)
    variables = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, *more), x)
    params, stats = variables["params"], {k: v for k, v in variables.items() if k != "params"}

    def step(params, stats, x):
        def loss(params):
            y, new = module.apply({"params": params, **stats}, x, *more, mutable=[*stats])
            y = y[0] if more else y
            return jnp.sum(jnp.square(y.astype(jnp.float32))), new

        return jax.grad(loss, has_aux=True)(params)

    if form == "shard_map":
        step = jax.shard_map(step, mesh=chips(target), in_specs=(P(), P(), P(BOTH)), out_specs=P())
    return counted(target, step, (params, P()), (stats, P()), (x, P(BOTH)))


ROWS, FEATURES = 1024, 4096  # of a tensor-parallel norm: rows for each GROUP of chips, who share out the features


def spread(target: str, norm: str, form: str) -> dict:
    """y and dx of a norm over features that lie on the chips of a host."""
    spec = getattr(jn, norm)(axis_name="chip" if form == "shard_map" else None)
    params, _ = spec.init(FEATURES)
    step = _y_and_dx(lambda params, x: spec.apply(params, (), x, train=True)[0])
    if form == "shard_map":
        step = jax.shard_map(step, mesh=chips(target), in_specs=(P("chip"), P(*BOTH), P(*BOTH)), out_specs=P(*BOTH))
    x = jax.ShapeDtypeStruct((ROWS * chips(target).shape["host"], FEATURES), jnp.bfloat16)
    return counted(target, step, (params, P("chip")), (x, P(*BOTH)), (x, P(*BOTH)))


# --- what is compiled, and what is made of it -------------------------------------------------------------------------


def programs(targets) -> Iterator[tuple[dict, Callable[[], dict]]]:
    """What each program is, and how it is compiled and counted."""
    for target in targets:
        for form, sync in itertools.product(FORMS, SYNCS):
            for channels in WIDTHS if sync != "local" else WIDTHS[:1]:
                it = dict(of="norm", target=target, sync=sync, form=form, channels=channels)
                yield it, functools.partial(alone, target, sync, form, channels)
        for form, sync in itertools.product(FORMS, (*SYNCS, None)):
            yield dict(of="stage", target=target, sync=sync, form=form), functools.partial(stage, target, sync, form)
        for form, norm in itertools.product(FORMS, ROW_NORMS):
            yield dict(of="spread", target=target, norm=norm, form=form), functools.partial(spread, target, norm, form)
        for norm in (*ROW_NORMS, None):
            yield dict(of="block", target=target, norm=norm), functools.partial(block, target, norm)
    for _, same in itertools.groupby(targets, lambda target: target[:3]):
        first, *rest = same
        for target, sync in [(first, "global"), (first, "local"), (first, None), *((t, "global") for t in rest[-1:])]:
            run = functools.partial(stage, target, sync, "jit", *cases.STAGE[:2])
            yield dict(of="whole stage", target=target, sync=sync), run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--json", metavar="PATH", help="also write every count to this file")
    parser.add_argument("--plot", metavar="PATH", help="draw the model to this file")
    parser.add_argument("--again", metavar="PATH", help="compile nothing: take the counts from an earlier run's file")
    options = parser.parse_args()
    if options.again:
        with open(options.again, encoding="utf-8") as file:
            found = json.load(file)
    elif (reason := missing("tpu")) is not None:
        sys.exit(f"Nothing can be compiled, {reason}")
    else:
        found = {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu"), "programs": []}
        for it, run in programs(options.targets):
            found["programs"].append(it | run())
            print(*it.values(), file=sys.stderr, flush=True)
    print(page.text(found))
    if options.plot:
        page.draw(found, options.plot)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
