"""Sums for diagnostics: count, mean and variance in one pass over an array, and over devices.

Legend: C is the number of channels.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._core.dtypes import accumulator
from .._core.formulas import first_along
from .._core.intercept import Call
from .._core.types import Moments
from .._ops.moments import merge_across
from .._ops.policy import sharing_policy

Array = jax.Array
_LARGEST = 1e15  # of a deviation: the squares of 1e8 such still have a sum in float32


def totals(a: Array, keep: Array | None, axes: tuple[int, ...], flat: Any = None) -> tuple[Array, ...]:
    """Count, mean and variance of what is finite, how many are not, and the share that is `flat`: a pass over a.

    The sums are those of one reduction with several operands, because XLA for CPU makes a pass for each that stands by
    itself. They are taken about the first element, so that a constant has the variance 0.
    """
    wide = a.astype(accumulator(a))
    finite = jnp.isfinite(wide)
    valid = finite if keep is None else finite & keep
    pilot = first_along(jnp.where(valid, wide, 0.0), axes)
    d = jnp.where(valid, jnp.clip(wide - pilot, -_LARGEST, _LARGEST), 0.0)
    one = lambda where: jnp.broadcast_to(where, a.shape).astype(d.dtype)
    bad = one(~finite if keep is None else keep & ~finite)
    parts = [d, d * d, one(valid), bad, *([] if flat is None else [one(valid & flat(wide))])]
    zeros = [np.zeros((), d.dtype)] * len(parts)
    add = lambda p, q: tuple(i + j for i, j in zip(p, q, strict=True))
    reduce: Any = lax.reduce
    sums: Any = reduce(tuple(parts), tuple(zeros), add, axes) if axes else parts
    first, second, n, bad, *more = sums
    at_least_1 = jnp.maximum(n, 1.0)
    offset = first / at_least_1
    var = jnp.maximum(second / at_least_1 - offset * offset, 0.0)
    numbers = n, lax.squeeze(pilot, axes) + offset, var, bad, more[0] / at_least_1 if more else jnp.zeros_like(n)
    return tuple(b.astype(jnp.float32) for b in numbers)


def count_used(call: Call, count: Array, shape: tuple[int, ...], others: tuple[int, ...], axis_name) -> Array:
    """The number of elements that a norm of the batch has for each channel, however its devices share statistics."""
    own: Any = lambda name, default=None: getattr(call.spec, name, default)
    ghosts, sync = own("virtual_batch_size"), own("sync", "global")
    kind, groups = type(call.spec).__name__, own("axis_index_groups")
    names, sync = sharing_policy(kind, own("share"), own("axis_name"), groups, sync, ghosts)
    names = (names,) if isinstance(names, str) else tuple(names or ())
    if ghosts is not None:
        return count * min(1.0, ghosts / max(shape[others[0]], 1))
    together = count
    if bound := tuple(name for name in names if name in axis_name):
        together = merge_across(Moments(count, count, jnp.zeros_like(count)), bound).count
        devices = math.prod([lax.axis_size(name) for name in bound])
    else:  # those that jit partitions, where arrays are global
        mesh = jax.sharding.get_abstract_mesh()
        devices = math.prod([mesh.shape[name] for name in names if not mesh.empty and name in mesh.shape])
    if sync == "global":
        return together
    several = 1 if sync == "local" else sync if isinstance(sync, int) else min(len(group) for group in sync)
    return count * several if bound else together * several / max(devices, 1)


def merged(parts: dict[str, Moments], axis_name: tuple[str, ...]) -> dict[str, Moments]:
    """All of them over devices, by one all-reduce; each as one axis."""
    parts = {key: Moments(*(a.reshape(-1) for a in jnp.broadcast_arrays(*m))) for key, m in parts.items()}
    if not axis_name:
        return parts
    joined: Any = Moments(*map(jnp.concatenate, zip(*parts.values(), strict=True)))
    together, start, found = merge_across(joined, axis_name), 0, {}
    for key, part in parts.items():
        found[key] = Moments(*(a[start : start + part.count.size] for a in together))
        start += part.count.size
    return found
