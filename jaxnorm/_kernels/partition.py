"""Kernels over arrays that jit shards: each device runs on its own part, nothing is gathered, sums are merged."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from .call import Call

try:
    from jax.sharding import use_abstract_mesh
except ImportError:  # jax 0.7.0
    from jax._src.mesh import use_abstract_mesh


class Across(NamedTuple):
    """How the parts of several devices come together; `names` are mesh axes."""

    merged: Callable  # (Statistics, names, unit) -> Statistics
    summed: Callable  # (arrays, names) -> arrays


def has_devices(primitive: Primitive) -> bool:
    """Have JAX hand the lowering of this primitive its devices, which custom_partitioning inside it wants.

    There is no public way. False where this version of JAX has none at all: then programs for several devices that jit
    is to partition are XLA's.
    """
    try:
        from jax._src import dispatch

        dispatch.prim_requires_devices_during_lowering.add(primitive)
    except (ImportError, AttributeError):
        return False
    return True


def partitioned(room: Callable, across: Across) -> custom_partitioning:
    """`room(call, names, across, *operands)` as a function of (call, *operands) that jit partitions.

    Everything goes where x is: the parts of the others along an axis of x are those of x, and `names` are the mesh axes
    that the reduced axes are spread over, for the room to merge over. The first operand is x.
    """

    def run(call: Call, *operands):
        return tuple(room(call, (), across, *operands))

    def partition(call: Call, mesh, operands, results):
        if mesh.empty:  # under jax.set_mesh with nothing sharded JAX hands over no mesh, and every device has the whole
            whole = operands[0].sharding
            whole = whole if whole.is_fully_replicated else type(whole).get_replicated(tuple(whole.device_set))
            return mesh, lambda *parts: run(call, *parts), (whole,) * len(results), (whole,) * len(operands)
        mesh = _fine(mesh)
        spec = _even(mesh, operands[0])
        names = lambda axes: tuple(name for a in axes for name in spec[a])
        placed = lambda shape: NamedSharding(mesh, P(*(None if n == 1 else spec[a] for a, n in enumerate(shape))))
        wanted = [s for s in call.wanted if s is not None]

        @alone
        def local(*parts):
            out = list(room(_local(call, parts[0].shape), names(call.recipe.how.axes), across, *parts))
            for i, shape in enumerate(wanted, len(out) - len(wanted)):  # what replicated parameters need of all devices
                over = names(a for a, n in enumerate(shape) if n == 1)
                out[i] = across.summed([out[i]], over)[0] if over else out[i]
            return tuple(out)

        return mesh, local, tuple(placed(a.shape) for a in results), tuple(placed(a.shape) for a in operands)

    def rule(call: Call, mesh, operands, results):
        """Axes of size 1 are their own; all others go by x's."""
        fresh = iter(range(1000))
        word = lambda a: " ".join(f"u{next(fresh)}" if n == 1 else f"x{i}" for i, n in enumerate(a.shape))
        return f"{', '.join(map(word, operands))} -> {', '.join(map(word, results))}"

    function = custom_partitioning(run, static_argnums=(0,))
    # Shardings come as they are: JAX's own decoding of them knows no part of a mesh axis.
    function.def_partition(partition=partition, sharding_rule=rule, decode_shardings=False)
    return function


def alone(f: Callable) -> Callable:
    """f without the mesh in use: an Explicit one would put its shardings into what one device does, sums included."""

    @functools.wraps(f)
    def run(*args):
        with use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            return f(*args)

    return run


def _fine(mesh) -> Mesh:
    """The same devices along axes of prime sizes, since a dimension of x may be spread over a part of a mesh axis.

    So it is with four devices along the channels of group norm in two groups: two devices for each group.
    """
    primes = {f"{name}.{i}": p for name, size in mesh.shape.items() for i, p in enumerate(_primes(size))}
    return Mesh(mesh.devices.reshape([*primes.values()]), tuple(primes))


def _primes(n: int) -> list[int]:
    p = next((p for p in range(2, n + 1) if n % p == 0), None)
    return [] if p is None else [p, *_primes(n // p)]


def _even(mesh: Mesh, x) -> list[tuple[str, ...]]:
    """The mesh axes of each axis of x; none where they do not divide it, since a padded part has no true sums.

    Read off where each device begins in an array that has as many elements along every axis as there are devices.
    """
    size = mesh.devices.size
    parts = x.sharding.devices_indices_map((size,) * len(x.shape))
    begins = np.array([[part.start or 0 for part in parts[d]] for d in mesh.devices.flat])
    step = dict(zip(mesh.axis_names, np.cumprod([1, *mesh.devices.shape[:0:-1]])[::-1], strict=True))
    along = lambda a: {name: begins[device, a] for name, device in step.items() if begins[device, a]}
    names = [sorted(found, key=found.__getitem__, reverse=True) for found in map(along, range(len(x.shape)))]
    divides = lambda n, e: n % math.prod(mesh.shape[name] for name in e) == 0
    return [tuple(e) if divides(n, e) else () for n, e in zip(x.shape, names, strict=True)]


def _local(call: Call, shape) -> Call:
    """The call as one device sees it, whose part of x has this shape."""
    part = lambda s: None if s is None else tuple(1 if n == 1 else m for n, m in zip(s, shape, strict=True))
    return replace(call, wanted=(part(call.wanted[0]), part(call.wanted[1])))
