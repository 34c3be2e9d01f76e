"""The statistics behind every norm, over axes and devices, with their derivatives.

Legend: x is any shape; w is a weight per element, 1 where none is given.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._core.arithmetic import abs_squared, nonzero_divisor
from .._core.collectives import SLOT_BYTES, combine, merge_over_devices, psum_grouped
from .._core.masks import count_valid, deviation, valid_mask, zero_where_padding
from .._core.over import Axes, Groups, Prefix
from .._core.reduce import local_statistics
from .._core.types import Reduction, Statistics
from .._core.vma import broadcast_like, pvary_like

Array = jax.Array


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0, inline=True)  # one program also where the caller does not jit
def statistics(
    reduction: Reduction, x: Array, mask: Array | None, weights: Array | None, ids: Array | None = None
) -> Statistics:
    """The statistics of x over `reduction.over` and, where it names an axis, over its devices. `ids`: of segments."""
    if reduction.num_shards > 1 and mask is None and weights is None and not jnp.iscomplexobj(x):
        local = _merged_parts(reduction, x)
    else:
        local = local_statistics(x, mask, weights, reduction, ids)
    return (
        local
        if reduction.axis_name is None
        else merge_over_devices(local, reduction.axis_name, reduction.groups, reduction)
    )


@functools.partial(statistics.defjvp, symbolic_zeros=True)
def _(reduction, primals, tangents):
    x, mask, weights, ids = primals
    dx, _, dweights, _ = drop_symbolic_zeros(tangents)
    stats = statistics(reduction, x, mask, weights, ids)
    return stats, statistics_tangent(reduction, x, mask, weights, stats, dx, dweights, ids)


def statistics_tangent(
    reduction: Reduction, x, mask, weights, stats: Statistics, dx, dweights, ids=None, unit: Array | None = None
) -> Statistics:
    """The tangent of the statistics. d(mean) is given to the offset: the shift is a constant, whichever it is.

    Where `stats.m2` is a root, its tangent is still that of the sum of squares, which unlike the root's is finite where
    x is constant. `rsqrt_of_root` takes it as such. With a `unit`, one for each statistic, it is that of the sum of
    squares of unit * x, which is in range however small or large x is.
    """
    prescale: Any = reduction.prescale if reduction.large_prescale is None else 1.0 if unit is None else unit
    so_far = isinstance(reduction.over, Prefix)  # then there is no one mean for each element: z is about what all share
    mean = (reduction.over.spread(part, ids) for part in (stats.mean_hi, *[stats.mean_lo] * (not so_far)))
    keep = valid_mask(mask, weights)
    d = deviation(x, keep, *mean)
    at_x = reduction.over.spread(prescale, ids).astype(d.dtype) if isinstance(prescale, jax.Array) else prescale
    z = at_x * d
    if dx is not None and weights is not None:  # padding is a constant, also while its weight moves away from 0
        dx = zero_where_padding(x, keep, dx)
    dz = None if dx is None else at_x * dx.astype(z.dtype)
    dn, d1, d2 = tangent_sums(reduction, z, mask, weights, dz, dweights, ids)
    if so_far and reduction.centered:
        offset = stats.mean_lo * jnp.asarray(prescale).astype(stats.mean_lo.dtype)
        d2 = d2 - 2.0 * (jnp.conj(offset) * d1).real + dn * abs_squared(offset)
        d1 = d1 - offset * dn

    def like(d, out: Array) -> Array:  # zeros of no array would lack the mesh that out's type has in jax 0.7
        d = jnp.zeros_like(out) if isinstance(d, float) else broadcast_like(out, d.astype(out.dtype))
        return pvary_like(out, d)

    n = nonzero_divisor(count_of(reduction, x, mask, weights, stats))
    mean = d1 / (n * prescale).astype(stats.mean_lo.dtype) if reduction.centered else 0.0
    still = jnp.zeros_like(stats.mean_hi)
    return Statistics(like(dn, stats.count), still, like(mean, stats.mean_lo), like(d2, stats.m2))


def count_of(reduction: Reduction, x: Array, mask, weights, stats: Statistics) -> Array:
    """The count of the statistics of x: a constant, which NumPy holds, where it is one, so that no program asks."""
    if reduction.axis_name is not None or mask is not None or weights is not None:
        return stats.count
    known = count_valid(x, None, None, reduction.over) if isinstance(reduction.over, (Axes, Groups)) else None
    return known if isinstance(known, np.ndarray) else stats.count


def drop_symbolic_zeros(tangents) -> list:
    """The tangents of a rule with symbolic zeros, None for each that is zero."""
    return [None if isinstance(t, jax.custom_derivatives.SymbolicZero) else t for t in tangents]


def tangent_sums(reduction: Reduction, z, mask, weights, dz, dweights, ids=None):
    """The sums that every tangent of a statistic is made of, over all devices; z is x without its mean, in some unit,

        dn = sum(dw);   d1 = sum(w dz + dw z);   d2 = sum(2 w Re(conj(z) dz) + dw |z|**2).

    Linear in (dz, dweights), either of which may be None for zero.
    """
    total = lambda a: reduction.over.sum(a if mask is None else jnp.where(mask, a, 0.0), ids)
    sums: list = []
    if dz is not None:
        dz = dz if weights is None else dz * weights.astype(z.dtype)
        sums = [total(dz), 2.0 * total((jnp.conj(z) * dz).real if jnp.iscomplexobj(z) else z * dz)]
    if dweights is not None:
        dweights = dweights.astype(z.real.dtype)  # once, or the cotangents of its two uses would be added in its dtype
        z = z if mask is None else jnp.where(mask, z, 0.0)  # before it is squared, which may overflow
        of_weights = [total(dweights.astype(a.dtype) * a) for a in (z, abs_squared(z))]
        sums = [*map(jnp.add, sums, of_weights)] if sums else of_weights
        sums.append(count_valid(z, mask, dweights, reduction.over, ids))  # of the shape that the count has
    if reduction.axis_name is not None and sums:
        sums = psum_grouped(sums, reduction.axis_name, reduction.groups)
    d1, d2, dn = sums + [0.0] * (3 - len(sums))
    return dn, d1, d2


def _merged_parts(reduction: Reduction, x: Array) -> Statistics:
    """The statistics of parts of the leading axis, merged: one all-reduce where each part is on a device of its own.

    Summed at once there would be two: of the sample that sums are taken about, and of the sums. So every part gets a
    slot of its own in one array, and that is summed, which adds nothing but zeros.
    """
    view = x.reshape(reduction.num_shards, x.shape[0] // reduction.num_shards, *x.shape[1:])
    of_part = replace(reduction, num_shards=1, over=Axes(tuple(a + 1 for a in reduction.axes)))
    count, *stats = local_statistics(view, None, None, of_part)
    if sum(a.nbytes for a in stats) > SLOT_BYTES:
        return local_statistics(x, None, None, reduction)
    stats = jnp.stack(stats, 1)
    own = jnp.reshape(
        jnp.eye(reduction.num_shards, dtype=bool),
        (reduction.num_shards, reduction.num_shards) + (1,) * (stats.ndim - 1),
    )
    slots = jnp.where(own, stats[None], jnp.zeros((), stats.dtype)).sum(1)
    count = jnp.broadcast_to(count, slots[:, 0].shape)
    return combine(Statistics(count, *(slots[:, i] for i in range(3))), reduction)
