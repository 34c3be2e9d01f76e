"""What the types of shard_map and of Explicit meshes ask for: above all which manual axes a value varies over."""

from __future__ import annotations

import jax
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

Array = jax.Array


def varying_as(like: Array, a: Array) -> Array:
    """a, marked to vary over the manual mesh axes that `like` varies over, as shard_map wants of a tangent."""
    return _varying_over(varying(like), a)


def varying_together(*arrays: Array) -> tuple[Array, ...]:
    """Arrays marked to vary over all that any of them varies over."""
    over = frozenset().union(*map(varying, arrays))
    return tuple(_varying_over(over, a) for a in arrays)


def varying(a: Array) -> frozenset:
    """The manual axes that a varies over; the type says so under another name in newer versions of JAX."""
    kind = jax.typeof(a)
    return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else getattr(kind, "vma", frozenset())


def unvarying(kind):
    """A type without the manual axes that it varies over, for what is lowered where those play no part."""
    if hasattr(kind, "manual_axis_type"):
        return kind.update(manual_axis_type=type(kind.manual_axis_type)())
    return kind.update(vma=frozenset()) if hasattr(kind, "vma") else kind


def unsharded(kind):
    """A type of an Explicit mesh that says nothing of how jit spreads it: of others Pallas makes no references."""
    return kind.update(sharding=NamedSharding(kind.sharding.mesh, P(*[None] * kind.ndim)))


def unvarying_result(shape, dtype) -> jax.ShapeDtypeStruct:
    """What such a kernel gives: Pallas wants it said, where shard_map checks these types."""
    if hasattr(jax.sharding, "ManualAxisType"):
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.sharding.ManualAxisType())  # pyright: ignore
    return jax.ShapeDtypeStruct(shape, dtype, vma=frozenset())  # pyright: ignore[reportCallIssue]


def _varying_over(axes: frozenset, a: Array) -> Array:
    missing = tuple(axes - varying(a))
    if not missing:
        return a
    return lax.pcast(a, missing, to="varying") if hasattr(lax, "pcast") else lax.pvary(a, missing)  # pyright: ignore[reportAttributeAccessIssue]
