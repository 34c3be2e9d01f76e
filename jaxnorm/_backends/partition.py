"""Kernels over arrays that jit shards: each device runs on its own part, nothing is gathered, sums are merged.

Such a call is one custom call, which XLA hands back to be partitioned once it knows the shardings. JAX's own
`custom_partitioning` would write the address of a Python object into the program: no other process would then find that
program in the persistent compilation cache, and no compiled program could be saved. Here the custom call carries
text that says what the call is, so equal calls make equal programs. Both partitioners, Shardy and GSPMD, take it.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.interpreters import mlir
from jax.sharding import AbstractMesh

from .call import Call

try:
    from jax.sharding import use_abstract_mesh
except ImportError:  # jax 0.7.0
    from jax._src.mesh import use_abstract_mesh

Shape = tuple[int, ...]

_TARGET = "jaxnorm_partitioned"


class Collectives(NamedTuple):
    """How the parts of several devices come together; `names` are mesh axes."""

    merged: Callable  # (Statistics, names, Reduction) -> Statistics
    summed: Callable  # (arrays, names) -> arrays


class _Sharded(NamedTuple):
    """What the text of a custom call stands for."""

    backend: Callable  # (call, names, collectives, *operands) -> results
    platform: str
    call: Call
    collectives: Collectives


_sharded: dict[bytes, _Sharded] = {}  # by that text. Partitioning follows lowering in one process


def partitioned(name: str, platform: str, backend: Callable, collectives: Collectives) -> Callable:
    """The lowering of `backend(call, names, collectives, *operands)` to a custom call that XLA partitions.

    Each operand and result is sharded like x, the first operand, along the axes where its size is not 1. `names` are
    the mesh axes that the reduced axes are spread over, for the backend to merge over. `name` tells backends apart.
    """

    def lower(context, *operands, call: Call):
        text = f"{_edition()} {name} {call}"
        _sharded[text.encode()] = _Sharded(backend, platform, call, collectives)
        results: Any = jax.ffi.ffi_lowering(_TARGET, api_version=2, backend_config=text)(context, *operands)
        rule = mlir.ir.Attribute.parse(_shardy_rule(call, context.avals_in, context.avals_out))
        results[0].owner.attributes["sdy.sharding_rule"] = rule
        return results

    return lower


@functools.cache
def can_partition() -> bool:
    """Register with XLA, once. False where this version of JAX lacks a part of what that takes.

    Then a program for several devices that jit is to partition is XLA's.
    """
    try:
        from jax._src import xla_bridge
        from jaxlib import xla_client

        probe = lambda x: jax.lax.axis_index("i")
        _module(without_mesh(probe), [jax.ShapeDtypeStruct((2,), np.float32)], AbstractMesh((2,), ("i",)), "cpu")
        xla_client.HloSharding.iota_tile((2,), (2,), (0,), [])
        callbacks = dict(
            prop_user_sharding=_propagated, partition=_partitioned, infer_sharding_from_operands=_inferred,
            can_side_effecting_have_replicated_sharding=True,
        )  # fmt: skip
        xla_client.register_custom_call_partitioner(_TARGET, **callbacks)
        xla_bridge.register_plugin_callbacks(
            functools.partial(xla_client.register_custom_call_partitioner, name=_TARGET, **callbacks)
        )
    except (ImportError, AttributeError, TypeError):  # none of this is promised by JAX
        return False
    return True


@functools.cache
def _edition() -> str:
    """The code that partitions, in a word: a cached program must not outlive it."""
    sources = sorted(Path(__file__).parent.parent.rglob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources))
    return f"{jax.__version__} {digest.hexdigest()[:16]}"


def _shardy_rule(call: Call, operands: Sequence, results: Sequence) -> str:
    """Axes of size 1 and those of parameters are their own; all others go by x's."""
    sizes: list[int] = []
    of_axis: dict[int, int] = {}

    def factor(a: int, n: int, own: bool) -> str:
        i = len(sizes) if n == 1 or own else of_axis.setdefault(a, len(sizes))
        sizes[i:] = [n, *sizes[i + 1 :]]
        return _symbol(i)

    of_x = operands[0].shape
    word = lambda a, own: f"[{', '.join(factor(i, n, own or n != of_x[i]) for i, n in enumerate(a.shape))}]"
    given = (word(a, call.is_parameter(i)) for i, a in enumerate(operands))
    rule = f"({', '.join(given)})->({', '.join(word(a, False) for a in results)})"
    return f"#sdy.op_sharding_rule<{rule} {{{', '.join(f'{_symbol(i)}={n}' for i, n in enumerate(sizes))}}}, custom>"


def _symbol(i: int) -> str:
    """Shardy's name of a factor: i to z, z_1, z_2, ..."""
    return chr(ord("i") + i) if i < 18 else f"z_{i - 17}"


# --- what XLA calls ---------------------------------------------------------------------------------------------------


def _partitioned(shapes, shardings, result_shape, result_sharding, text: bytes):
    """The program of one device, and the shardings that its operands and results have."""
    backend, platform, call, collectives = _sharded[bytes(text)]
    operands, results = _sizes(shapes), _sizes(_parts(result_shape))
    mesh, spec = _spread(operands[0], shardings[0], results)
    tiles = [math.prod(mesh.shape[name] for name in names) for names in spec]
    local = lambda shape: tuple(n if n == 1 else n // t for n, t in zip(shape, tiles, strict=True))
    names = lambda axes: tuple(name for a in axes for name in spec[a])
    first, second = (None if s is None else local(s) for s in call.grad_shapes)
    here, grad_shapes = replace(call, grad_shapes=(first, second)), [s for s in call.grad_shapes if s is not None]

    @without_mesh
    def run(*parts):
        out = list(backend(here, names(call.plan.reduction.axes), collectives, *parts))
        for i, shape in enumerate(
            grad_shapes, len(out) - len(grad_shapes)
        ):  # what replicated parameters need of all devices
            over = names(a for a, n in enumerate(shape) if n == 1)
            out[i] = collectives.summed([out[i]], over)[0] if over else out[i]
        return tuple(out)

    parts = [jax.ShapeDtypeStruct(local(n), s.numpy_dtype()) for n, s in zip(operands, shapes, strict=True)]
    module = _module(run, parts, mesh, platform)
    placed = lambda shapes: [_hlo_sharding(mesh, shape, spec) for shape in shapes]
    return mlir.module_to_bytecode(module), placed(operands), _packed(result_shape, placed(results))


def _inferred(shapes, shardings, result_shape, text: bytes):
    """GSPMD's question: the shardings of results, from those of operands."""
    operands, results = _sizes(shapes), _sizes(_parts(result_shape))
    known = [s for n, s in zip(operands, shardings, strict=True) if n == operands[0] and s is not None]
    mesh, spec = _spread(operands[0], known[0] if known else None, results)
    return _packed(result_shape, [_hlo_sharding(mesh, n, spec) for n in results])


def _propagated(sharding, shape, text: bytes):
    return sharding


def _parts(shape) -> list:
    return list(shape.tuple_shapes()) if shape.is_tuple() else [shape]


def _sizes(shapes: Iterable) -> list[Shape]:
    return [tuple(s.dimensions()) for s in shapes]


def _packed(shape, shardings: list):
    return type(shardings[0]).tuple_sharding(shape, shardings) if shape.is_tuple() else shardings[0]


def _module(run: Callable, parts: Sequence, mesh: AbstractMesh, platform: str):
    """The program of one device along a mesh."""
    from jax._src import core
    from jax._src.interpreters.mlir import build_mlir_module_helper
    from jax._src.sharding_impls import SPMDAxisContext

    closed = jax.make_jaxpr(run, axis_env=list(mesh.shape.items()))(*parts)
    where: Any = SPMDAxisContext(mesh, frozenset(mesh.axis_names))  # pyright: ignore[reportArgumentType]
    with core.extend_axis_env_nd(mesh.shape.items()):
        return build_mlir_module_helper(closed, name="norm", platforms=(platform,), backend=None, axis_context=where)


def without_mesh(f: Callable) -> Callable:
    """f without the mesh in use: an Explicit one would put its shardings into what one device does, sums included."""

    @functools.wraps(f)
    def run(*args):
        with use_abstract_mesh(AbstractMesh((), ())):
            return f(*args)

    return run


# --- shardings --------------------------------------------------------------------------------------------------------


def _spread(shape: Shape, sharding, results: Sequence[Shape]) -> tuple[AbstractMesh, list[tuple[str, ...]]]:
    """A mesh of all devices, and which of its axes each axis of x is spread over, the slowest first.

    The axes have prime sizes, since XLA may spread an axis of x over a part of the user's mesh axis: four devices along
    the channels of group norm in two groups are two devices for each group. An axis of x whose size the devices do not
    divide is spread over none, since padded parts have no true sums. The same holds of results, such as blocks.
    """
    whole = AbstractMesh((), ()), [()] * len(shape)
    if sharding is None:
        return whole
    if hasattr(sharding, "v3_to_v2_sharding"):
        sharding = sharding.v3_to_v2_sharding()
    if not sharding.is_tiled():
        return whole
    tiles = sharding.tile_assignment_dimensions()
    order = np.argsort(sharding.tile_assignment_devices())  # the place of each device among the tiles
    coordinates = np.stack(np.unravel_index(order, tiles)[: len(shape)], -1)
    for sizes in _factored(order.size):
        steps = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
        digits = np.stack(np.unravel_index(np.arange(order.size), sizes), -1)
        along = coordinates[steps]  # how far a step along each axis of the mesh goes among the tiles
        if np.array_equal(digits @ along, coordinates):
            named = lambda a: sorted(np.flatnonzero(along[:, a]), key=lambda i: -along[i, a])  # noqa: B023
            spec = [tuple(f"axis{i}" for i in named(a)) for a in range(len(shape))]
            parts = lambda a: shape[a] % tiles[a] == 0 and all(s[a] == 1 or s[a] % tiles[a] == 0 for s in results)
            even = [names if parts(a) else () for a, names in enumerate(spec)]
            return AbstractMesh(sizes, tuple(f"axis{i}" for i in range(len(sizes)))), even
    return whole


def _factored(n: int) -> Iterator[tuple[int, ...]]:
    """n as a product of primes, in every order."""
    if n == 1:
        yield ()
    for p in range(2, n + 1):
        if n % p == 0 and all(p % q for q in range(2, p)):
            yield from ((p, *rest) for rest in _factored(n // p))


def _hlo_sharding(mesh: AbstractMesh, shape: Shape, spec: Sequence[tuple[str, ...]]):
    """An array spread as x is, but along axes of size 1, in XLA's terms."""
    from jaxlib.xla_client import HloSharding, OpSharding

    spec = [() if n == 1 else names for n, names in zip(shape, spec, strict=True)]
    used = [name for names in spec for name in names]
    if not used:
        return HloSharding.replicate()
    rest = [name for name in mesh.axis_names if name not in used]
    tiles = [math.prod(mesh.shape[name] for name in names) for names in (*spec, *[rest] * bool(rest))]
    order = [mesh.axis_names.index(name) for name in (*used, *rest)]
    kinds = [OpSharding.Type.REPLICATED] * bool(rest)
    return HloSharding.iota_tile(tiles, list(mesh.axis_sizes), order, kinds)
