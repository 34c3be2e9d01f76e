"""What the types of shard_map and of Explicit meshes ask for: above all which manual axes a value varies over."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

Array = jax.Array


def pvary_like(like: Array, a: Array) -> Array:
    """a, marked to vary over the manual mesh axes that `like` varies over, as shard_map wants of a tangent."""
    return _varying_over(varying(like), a)


def tangent_like(out: Array, t: Array) -> Array:
    """A tangent with what the type of its primal says besides the shape and the dtype."""
    return pvary_like(out, with_sharding_of(out, t))


def pvary_all(*arrays: Array) -> tuple[Array, ...]:
    """Arrays marked to vary over all that any of them varies over."""
    over = frozenset().union(*map(varying, arrays))
    return tuple([_varying_over(over, a) for a in arrays])


def varying(a: Array) -> frozenset:
    """The manual axes that a varies over; the type says so under another name in newer versions of JAX."""
    kind = jax.typeof(a)
    return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else getattr(kind, "vma", frozenset())


def shard_like(x: Array, a: Array) -> Array:
    """a, whose axes have x's sizes or size 1, sharded as x is along the former; only types of Explicit meshes say how.

    Parameters, masks and gates come to x in this way. JAX resharding is linear: a gradient goes back to where a was.
    """
    sharding = jax.typeof(x).sharding
    if sharding.mesh.empty:
        return a
    spec = [None if n == 1 else entry for n, entry in zip(a.shape, sharding.spec, strict=True)]
    return reshard_to(a, sharding.mesh, spec)


def with_sharding_of(like: Array, a: Array) -> Array:
    """a with the sharding of an array of its rank."""
    sharding = jax.typeof(like).sharding
    return a if sharding.mesh.empty else reshard_to(a, sharding.mesh, sharding.spec)


def broadcast_like(x: Array, a: Array) -> Array:
    """a broadcast to x's shape and sharded as x is, in one operation: the gradient is summed where it is."""
    if a.shape == x.shape:
        return with_sharding_of(x, a)
    return _broadcast(a, x.shape, jax.typeof(x).sharding)


def with_leading_axis(a: Array, size: int, entry) -> Array:
    """a, repeated along a new axis in front, which is sharded over the mesh axes of this entry."""
    sharding = jax.typeof(a).sharding
    return _broadcast(a, (size, *a.shape), NamedSharding(sharding.mesh, P(entry, *sharding.spec)))


def _broadcast(a: Array, shape: tuple[int, ...], sharding: NamedSharding) -> Array:
    where: dict = {} if all(entry is None for entry in sharding.spec) else {"out_sharding": sharding}
    return jnp.broadcast_to(a, shape, **where)


def shard_alike(x: Array, y: Array) -> tuple[Array, Array]:
    """Two arrays of one shape with the sharding of their sum; as y, where JAX has no rule for the sum."""
    first, second = jax.typeof(x).sharding, jax.typeof(y).sharding
    if first == second:
        return x, y
    each = list(zip(first.spec, second.spec, strict=True))
    spec = [b if a is None else a for a, b in each]
    names = [name for entry in spec for name in mesh_axes_of(entry)]
    if any(a != b and None not in (a, b) for a, b in each) or len(names) != len(set(names)):
        spec = second.spec
    mesh = first.mesh if second.mesh.empty else second.mesh
    return reshard_to(x, mesh, spec), reshard_to(y, mesh, spec)


def reshard_to(a: Array, mesh, spec) -> Array:
    """a with this sharding in its type."""
    if mesh.empty or tuple(jax.typeof(a).sharding.spec) == tuple(spec):
        return a
    return jax.sharding.reshard(a, NamedSharding(mesh, P(*spec)))


def spec_of(a: Array) -> tuple:
    """How the axes of a are sharded as far as types tell, which they do on Explicit meshes."""
    return tuple(jax.typeof(a).sharding.spec)


def by_jit(f: Callable[..., Array], spec: tuple, *args: Array) -> Array:
    """f(*args), sharded so; inside, jit decides how arrays are sharded, as on an Auto mesh: types cannot express it."""
    mesh = next((jax.typeof(a).sharding.mesh for a in args if any(spec_of(a))), None)
    if mesh is None:
        return f(*args)
    partitioned: Callable = jax.sharding.auto_axes(f, out_sharding=NamedSharding(mesh, P(*spec)))
    return partitioned(*args)


def is_explicit(mesh) -> bool:
    """Whether the types of arrays on this mesh hold how they are sharded."""
    return any(kind == AxisType.Explicit for kind in mesh.axis_types)


def mesh_axes_of(entry) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def without_vma(kind):
    """A type without the manual axes that it varies over, for what is lowered where those play no part."""
    if hasattr(kind, "manual_axis_type"):
        return kind.update(manual_axis_type=type(kind.manual_axis_type)())
    return kind.update(vma=frozenset()) if hasattr(kind, "vma") else kind


def without_sharding(kind):
    """A type of an Explicit mesh that says nothing of how jit spreads it: of others Pallas makes no references."""
    return kind.update(sharding=NamedSharding(kind.sharding.mesh, P(*[None] * kind.ndim)))


def result_without_vma(shape, dtype) -> jax.ShapeDtypeStruct:
    """What such a kernel gives: Pallas wants it said, where shard_map checks these types."""
    if hasattr(jax.sharding, "ManualAxisType"):
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.sharding.ManualAxisType())  # pyright: ignore
    return jax.ShapeDtypeStruct(shape, dtype, vma=frozenset())  # pyright: ignore[reportCallIssue]


def _varying_over(axes: frozenset, a: Array) -> Array:
    missing = tuple(axes - varying(a))
    if not missing:
        return a
    return lax.pcast(a, missing, to="varying") if hasattr(lax, "pcast") else lax.pvary(a, missing)  # pyright: ignore[reportAttributeAccessIssue]
