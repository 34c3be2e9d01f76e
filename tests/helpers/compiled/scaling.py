"""Programs of norms on 8 to 1024 TPU chips, compiled, with their collectives counted: the input of `benchmarks.scale`.

Images have 8 x 8 pixels with 2 images a chip, sequences have 64 tokens, so that each program compiles in seconds. What
is communicated depends on channels and chips alone (`tests/layouts/test_scale.py` checks that);
temporary memory does not.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
import jaxnorm.linen

from . import cases
from .hlo import collectives
from .targets import mesh

GROUP = 8
BOTH = ("host", "chip")  # the axes of the mesh; the last has GROUP neighbours
SYNCS = {"global": "global", f"groups of {GROUP}": GROUP, "local": "local"}
IMAGES, SIDE = 2, 8  # images on each chip, and the pixels of their sides
ROWS, FEATURES = 1024, 4096  # of a tensor-parallel norm: rows for each GROUP of chips, which share the features


@functools.cache
def chips(target: str) -> Mesh:
    devices = mesh(target).devices.reshape(-1, GROUP)
    return Mesh(devices, BOTH, axis_types=(AxisType.Auto,) * 2)


def box_of(coordinates: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """The sides of the smallest box around some chips."""
    return tuple(max(along) - min(along) + 1 for along in zip(*coordinates, strict=True))


def counted(target: str, f, *args) -> dict:
    """Compile f for a target and count its collectives: kind, bytes, chips in each group and the box around them.

    Each of args is a pair (shapes, spec).
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
        boxes = {box_of(coords[i] for i in group) for group in groups}
        found.append({"kind": it.kind, "bytes": it.bytes, "chips": len(groups[0]), "box": max(boxes, key=np.prod)})
    return {"collectives": found, "temp_bytes": program.memory_analysis().temp_size_in_bytes}


def _y_and_dx(apply: Callable) -> Callable:
    """(params, x, g) -> y, and the cotangent of x for the cotangent g of y."""

    def step(params, x, g):
        y, pull = jax.vjp(lambda x: apply(params, x), x)
        return y, pull(g)[0]

    return step


def alone(target: str, sync: str, form: str, channels: int) -> dict:
    """y and dx of one batch norm: the collectives that the layer waits for."""
    names = BOTH if sync != "global" or form == "shard_map" else None
    norm = jn.BatchNorm(axis_name=names, sync=SYNCS[sync])
    params, state = norm.init(channels)
    step = _y_and_dx(lambda params, x: norm.apply(params, state, x, train=True, update_stats=False)[0])
    if form == "shard_map":
        step = jax.shard_map(step, mesh=chips(target), in_specs=(P(), P(BOTH), P(BOTH)), out_specs=P(BOTH))
    x = jax.ShapeDtypeStruct((IMAGES * chips(target).size, SIDE, SIDE, channels), jnp.bfloat16)
    return counted(target, step, (params, P()), (x, P(BOTH)), (x, P(BOTH)))


class Identity(nn.Module):
    """Stands in for a norm."""

    @nn.compact
    def __call__(self, x):
        return x


NO_NORM = types.SimpleNamespace(BatchNorm=lambda **_: Identity(), LayerNorm=lambda **_: Identity())


def stage(target: str, sync: str | None, form: str = "jit", images: int = IMAGES, side: int = SIDE) -> dict:
    """A training step of two residual blocks: gradients of all parameters, and the new statistics."""
    norm = functools.partial(jaxnorm.linen.BatchNorm, axis_name=BOTH, sync=SYNCS.get(sync or "", "global"))
    x = jax.ShapeDtypeStruct((images * chips(target).size, side, side, cases.STAGE[-1]), jnp.bfloat16)
    return _step(target, cases.Stage(NO_NORM if sync is None else types.SimpleNamespace(BatchNorm=norm)), form, x)


def block(target: str, norm: str | None) -> dict:
    """A training step of a transformer block under jit, its batch sharded over all chips."""
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


def spread(target: str, norm: str, form: str) -> dict:
    """y and dx of a norm whose features are sharded over the chips of a host (tensor parallel)."""
    spec = getattr(jn, norm)(axis_name="chip" if form == "shard_map" else None)
    params, _ = spec.init(FEATURES)
    step = _y_and_dx(lambda params, x: spec.apply(params, (), x, train=True)[0])
    if form == "shard_map":
        step = jax.shard_map(step, mesh=chips(target), in_specs=(P("chip"), P(*BOTH), P(*BOTH)), out_specs=P(*BOTH))
    x = jax.ShapeDtypeStruct((ROWS * chips(target).shape["host"], FEATURES), jnp.bfloat16)
    return counted(target, step, (params, P("chip")), (x, P(*BOTH)), (x, P(*BOTH)))
