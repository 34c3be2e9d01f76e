"""Which devices share statistics: all, groups of them, none, or ghost batches inside one device.

The running statistics always use all devices, so the state is the same on all of them. With "local" and with groups
that takes one small all-reduce more, which nothing in the layer waits for.

What to choose: the statistics of all devices make training the same on any number of them, and cost two all-reduces
that each layer waits for, longer the more devices there are. Those of 32 examples are as good to train with. So: all,
while that costs little; else of as few neighbours as have 32 examples together; of each device where it has them alone.
`benchmarks/results/scale.md` has the figures. In shard_map name two mesh axes for groups, the last of them the group's
devices, so that the all-reduces stay among those; under jit one will do, unless the mesh is Explicit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from .._core.checks import canonicalize_index_groups, check_axis_name
from .._core.collectives import combine, merge_over_devices
from .._core.mesh import active_axis_names
from .._core.messages import shown, to_python
from .._core.over import Axes
from .._core.types import Plan, Statistics
from .._core.vma import mesh_axes_of
from .standardize import standardize

Array = jax.Array
Sync = str | int | tuple[tuple[int, ...], ...]

_SHARDS = "jaxnorm.shards"  # the axis name of the parts of an array that jit partitions
_RUNS = "jaxnorm.runs"  # and that of the groups of neighbours among them


def canonicalize_sync(norm: str, sync, axis_name, axis_index_groups, virtual_batch_size) -> Sync:
    """Which devices share statistics, in one static form; "global" by default."""
    check_axis_name(norm, axis_name)
    sync = to_python(sync)
    if isinstance(sync, tuple):
        sync = canonicalize_index_groups(norm, "sync", sync)
    elif not isinstance(sync, (str, int)) or (
        sync not in ("global", "local") and (isinstance(sync, (str, bool)) or sync < 1)
    ):
        raise ValueError(
            f'{norm}: sync must be "global", "local", a number of neighbouring devices, or lists of indices along '
            f'axis_name, got {shown(sync)}. Write sync="local".'
        )
    if axis_index_groups is not None:
        groups = canonicalize_index_groups(norm, "axis_index_groups", axis_index_groups)
        if sync != "global":
            raise ValueError(
                f"{norm}: sync={shown(sync)} and axis_index_groups={shown(groups)} both say which devices share "
                f"statistics. Write sync={shown(groups)} alone."
            )
        sync = groups
    if sync == "global":
        return sync
    if axis_name is None and axis_index_groups is None:
        raise ValueError(
            f'{norm}: sync={shown(sync)} divides the devices of axis_name, which is None. Write axis_name="data"; '
            "under plain jit with jax.set_mesh(mesh) around it, that is the mesh axis along which the batch is sharded."
        )
    if virtual_batch_size is not None and sync != "local":
        raise ValueError(
            f"{norm}: virtual_batch_size={shown(virtual_batch_size)} already says what shares statistics, each ghost "
            f'batch on its own device; got sync={shown(sync)} besides. Write sync="global".'
        )
    return sync


def standardize_shared(
    norm: str, plan: Plan, args, axis_name, sync: Sync, virtual_batch_size: int | None, whole: bool = True,
    by: Callable[..., Any] = standardize,
) -> tuple[Array, Statistics]:  # fmt: skip
    """x normalized as `sync` says; the statistics are those of everything, on all devices (only if `whole`).

    `by` normalizes, as `standardize` does: another formula is `batch.ByFormula`. `args` are x, scale, bias, mask,
    weights, and what else it takes, of x's rank.
    """
    names = active_axis_names(axis_name)
    by_shards = axis_name is not None and len(names) < len(_tuple(axis_name))  # these axes jit partitions
    if virtual_batch_size is not None:
        y, stats = _by_ghost_batches(norm, plan, args, virtual_batch_size, by)
        return y, _merged(stats, names, plan) if names and whole else stats
    if by_shards and sync != "global":
        return _by_shards(norm, plan, args, _tuple(axis_name), names, sync, whole, by)
    if not names or sync == "global":
        reduction = replace(plan.reduction, axis_name=names or None)
        return by(norm, replace(plan, reduction=reduction), *args)
    inner, outer, groups = _divided(norm, sync, names)
    reduction = replace(plan.reduction, axis_name=inner or None, groups=groups)
    y, stats = by(norm, replace(plan, reduction=reduction), *args)
    if groups is not None:  # all members of a group know its statistics: the first brings them
        first = jnp.isin(lax.axis_index(names), jnp.asarray([members[0] for members in groups], jnp.int32))
        stats = stats._replace(count=jnp.where(first, stats.count, 0.0), m2=jnp.where(first, stats.m2, 0.0))
    return y, _merged(stats, outer, plan) if outer and whole else stats


def _divided(norm: str, sync, names: tuple[str, ...]):
    """(inner, outer, groups): normalize over `inner`, in `groups` where they are no axes; then merge over `outer`.

    Neighbours are so by the last of the axes: where a number of devices is that of the last few, those are `inner`.
    """
    sizes = [lax.axis_size(name) for name in names]
    total = math.prod(sizes)
    if isinstance(sync, tuple):
        return names, names, sync
    number = 1 if sync == "local" else sync
    if total % number:
        near = max(d for d in range(1, number) if total % d == 0)
        raise ValueError(
            f"{norm}: sync={number} does not divide the {total} devices of axis_name={names}. Write sync={near}."
        )
    for k in range(len(names) + 1):
        if math.prod(sizes[k:]) == number:
            return names[k:], names[:k], None
    runs = tuple(tuple(range(start, start + number)) for start in range(0, total, number))
    return names, names, runs


def _merged(stats: Statistics, names, plan: Plan) -> Statistics:
    """Over devices, for the running statistics: nothing flows back."""
    return merge_over_devices(Statistics(*map(lax.stop_gradient, stats)), names, None, plan.reduction)


def _by_shards(norm, plan, args, axis_name, bound, sync, whole, by) -> tuple[Array, Statistics]:
    """Over an array that jit partitions along its batch: each part as a device of its own has it."""
    if bound:
        raise ValueError(
            f"{norm}: of axis_name={axis_name} shard_map holds {bound} and jit partitions the rest; sync={shown(sync)} "
            f"needs shard_map or jit to handle all of axis_name. Write jax.shard_map(..., axis_names={set(axis_name)})."
        )
    x = args[0]
    batch = _batch_axis(norm, plan, x, "sync")
    shards = math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in axis_name)
    if x.shape[batch] % shards:
        raise ValueError(
            f"{norm}: the {x.shape[batch]} examples of x {x.shape} do not divide among the {shards} devices of "
            f'axis_name={axis_name}. Write sync="global", or pad the batch and give a mask.'
        )
    if any(jax.typeof(x).sharding.spec):
        by_jit = lambda *args: _by_shards(norm, plan, args, axis_name, bound, sync, whole, by)
        return _on_auto_axes(by_jit, plan, args, whole)
    split = [a is not None and a.shape[batch] == x.shape[batch] for a in args]
    # Groups of neighbours are an axis of their own, so that each all-reduce stays among them.
    number = sync if isinstance(sync, int) and shards % sync == 0 else shards
    parts = {_SHARDS: shards} if number == shards else {_RUNS: shards // number, _SHARDS: number}
    sizes = (*parts.values(), x.shape[batch] // shards)
    cut = [_split(a, batch, *sizes) if s else a for a, s in zip(args, split, strict=True)]
    each: Any = functools.partial(
        standardize_shared, norm, plan, axis_name=tuple(parts), sync=sync, virtual_batch_size=None, whole=whole, by=by
    )
    run = lambda *args: each(args)
    axes = tuple(batch if s else None for s in split)
    outs = (batch, None if whole or sync == "global" else 0)
    for name in reversed(parts):
        run = jax.vmap(run, in_axes=axes, out_axes=outs, axis_name=name)
    y, stats = run(*cut)
    return y.reshape(x.shape), stats


def _on_auto_axes(f: Callable, plan: Plan, args, whole: bool) -> tuple[Array, Statistics]:
    """f(*args) with jit deciding how arrays are sharded inside. The outputs are sharded as x is.

    The types of an Explicit mesh cannot shard two axes of an array over parts of one mesh axis, and JAX cannot lower a
    sum over a vmapped axis of theirs next to another sharded one.
    """
    given = jax.typeof(args[0]).sharding
    of_statistics = P(*(None if a in plan.reduction.axes else s for a, s in enumerate(given.spec))) if whole else P()
    partitioned: Any = jax.sharding.auto_axes(f, out_sharding=(given, NamedSharding(given.mesh, of_statistics)))
    return partitioned(*args)


def _by_ghost_batches(norm: str, plan: Plan, args, size: int, by) -> tuple[Array, Statistics]:
    """Each run of `size` examples by its own statistics; returns also the merged ones."""
    size = to_python(size)
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"{norm}: virtual_batch_size must be an int >= 1, got {shown(size)}. Write 32, or None.")
    (x, scale, bias, mask, weights, *own), reduction = args, plan.reduction
    batch = _batch_axis(norm, plan, x, "virtual_batch_size")
    ghosts = -(-x.shape[batch] // size)
    padding = ghosts * size - x.shape[batch]
    if padding != 0:
        real = jnp.ones(tuple(n if a == batch else 1 for a, n in enumerate(x.shape)), bool)
        mask = real if mask is None else mask & real

    def view(a) -> Any:
        if a is None:
            return None
        if a.shape[batch] == 1 != x.shape[batch]:
            return jnp.expand_dims(a, batch)
        return _split(jnp.pad(a, [(0, padding if i == batch else 0) for i in range(a.ndim)]), batch, ghosts, size)

    local = replace(reduction, over=Axes(tuple(a + 1 for a in reduction.axes)))

    def normalized(*args) -> tuple[Array, Statistics]:
        y, stats = by(norm, replace(plan, reduction=local), *map(view, args))
        y = y.reshape(*y.shape[:batch], ghosts * size, *y.shape[batch + 2 :])
        y = lax.slice_in_dim(y, 0, x.shape[batch], axis=batch)
        stats = Statistics(*(jnp.broadcast_to(a, stats.mean_hi.shape) for a in stats))
        return y, combine(Statistics(*(jnp.moveaxis(a, batch, 0) for a in stats)), reduction)

    args, sharding = (x, scale, bias, mask, weights, *own), jax.typeof(x).sharding
    devices = math.prod(sharding.mesh.shape[name] for name in mesh_axes_of(sharding.spec[batch]))
    if devices > 1 and (padding or ghosts % devices):  # a ghost batch is on several devices
        return _on_auto_axes(normalized, plan, args, whole=True)
    return normalized(*args)


def _split(a: Array, axis: int, *sizes: int) -> Array:
    """An axis as several: the parts, and what each has."""
    return a.reshape(*a.shape[:axis], *sizes, *a.shape[axis + 1 :])


def _batch_axis(norm: str, plan: Plan, x: Array, what: str) -> int:
    if not plan.reduction.axes:
        raise ValueError(f"{norm}: {what} needs a batch axis, got x of shape {x.shape}. Write None.")
    return plan.reduction.axes[0]


def _tuple(axis_name) -> tuple[str, ...]:
    return tuple(axis_name) if isinstance(axis_name, (tuple, list)) else (axis_name,)
