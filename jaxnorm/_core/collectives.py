"""Statistics merged over devices. The only collectives of the library are here: `psum_grouped` and `_pmax_grouped`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .arithmetic import nonzero_divisor, pick_in_range, scaled_abs_squared
from .dtypes import are_static
from .formulas import weighted_mean
from .masks import lowest, max_or_zero, zero_for_lowest
from .messages import shown
from .over import Prefix
from .types import AxisName, Reduction, Statistics

Array = jax.Array


SLOT_BYTES = 1 << 20  # up to here every device gets its own slot in one all-reduce; beyond, two smaller ones


def combine(s: Statistics, reduction: Reduction) -> Statistics:
    """Merge along the leading axis: about the shift of the largest count, first the mean, then the spread about it.

    A mean that many were merged into loses no bits to that of a few.
    """
    n, shift, offset, m2 = s
    count = _counted(n, reduction, 1)
    most = (count > 0) & (count == count.max(0, keepdims=True, initial=0.0))  # of no parts, too
    shift = lax.stop_gradient(max_or_zero(s.mean_hi, jnp.broadcast_to(most, s.mean_hi.shape), (0,)))
    gap = jnp.where(n > 0, (s.mean_hi - shift) + offset, 0.0)
    total = n.sum(0, keepdims=True)
    offset = weighted_mean(gap, n, total, (0,))
    between = lambda prescale: n * scaled_abs_squared(gap - offset, prescale)
    if reduction.large_prescale is None:
        m2 = (jnp.where(n > 0, m2, 0.0) + between(reduction.prescale)).sum(0)
    else:
        squares = lambda prescale: jnp.where(n > 0, scaled_abs_squared(m2, prescale) + between(prescale), 0.0).sum(0)
        m2, prescale = pick_in_range(reduction, squares(reduction.prescale), squares(reduction.large_prescale))
        m2 = jnp.sqrt(m2) / prescale
    return Statistics(total[0], shift[0], offset[0], m2)


def merge_over_devices(
    s: Statistics, axis_name: AxisName, groups, reduction: Reduction, slot_bytes: int | None = None
) -> Statistics:
    """Merge over the devices of axis_name, in their groups. `slot_bytes` is in place of `SLOT_BYTES`."""
    most = SLOT_BYTES if slot_bytes is None else slot_bytes
    size = lax.axis_size(axis_name)
    index = lax.axis_index(axis_name)
    s = Statistics(*jnp.broadcast_arrays(s.count, s.mean_hi, s.mean_lo, s.m2))
    if are_static(*s.mean_hi.shape) and size * sum(a.nbytes for a in s) <= most:
        mine = lambda a: jnp.where(_slot(size, index, a.ndim), a[None], jnp.zeros((), a.dtype))
        slots = Statistics(*psum_grouped([mine(a) for a in s], axis_name, None))
        if groups is not None:
            group = jnp.asarray(_group_of(groups, size))
            here = jnp.reshape(group == group[index], (size,) + (1,) * s.count.ndim)
            slots = slots._replace(count=jnp.where(here, slots.count, 0.0))
        return combine(slots, reduction)
    keep = _counted(s.count, reduction, 0) > 0
    shift = lax.stop_gradient(_pmax_grouped(s.mean_hi, keep, axis_name, groups))
    gap = jnp.where(s.count > 0, (s.mean_hi - shift) + s.mean_lo, 0.0)
    parts = [s.count, s.count.astype(gap.dtype) * gap]
    if reduction.large_prescale is None:
        parts.append(s.m2 + s.count * scaled_abs_squared(gap, reduction.prescale))
    else:
        square = scaled_abs_squared
        parts += [square(s.m2, prescale) + s.count * square(gap, prescale) for prescale in reduction.prescales]
    n, first, *second = psum_grouped(parts, axis_name, groups)
    offset = first / nonzero_divisor(n).astype(first.dtype)
    corrections = lambda prescale: n * scaled_abs_squared(offset, prescale)
    if reduction.large_prescale is None:
        return Statistics(n, shift, offset, jnp.maximum(second[0] - corrections(reduction.prescale), 0.0))
    m2, prescale = pick_in_range(reduction, *second)
    return Statistics(n, shift, offset, jnp.sqrt(jnp.maximum(m2 - corrections(prescale), 0.0)) / prescale)


def slots_over_devices(parts: list, axis_name: AxisName) -> list | None:
    """`gather_over_devices`. None if that is more than `SLOT_BYTES`."""
    too_large = lax.axis_size(axis_name) * sum(a.nbytes for a in parts) > SLOT_BYTES
    return None if too_large else gather_over_devices(parts, axis_name)


def gather_over_devices(parts: list, axis_name: AxisName) -> list:
    """What each device has, along a new leading axis: one all-reduce, so that types say it is the same on all."""
    size = lax.axis_size(axis_name)
    index = lax.axis_index(axis_name)
    mine = lambda a: jnp.where(_slot(size, index, a.ndim), a[None], jnp.zeros((), a.dtype))
    return psum_grouped([mine(a) for a in parts], axis_name, None)


def _counted(n: Array, reduction: Reduction, leading: int) -> Array:
    """The count that decides whose shift is taken. The places of a prefix, after some leading axes, share theirs."""
    over = reduction.over
    return n.max(over.axis + leading, keepdims=True, initial=0.0) if isinstance(over, Prefix) else n


def psum_grouped(parts: list, axis_name: AxisName, groups) -> list:
    """The sums of arrays over devices: one all-reduce. With groups, each group has a slot in it and takes its own."""
    if groups is None:
        return list(lax.psum(tuple(parts), axis_name))
    return _in_groups(lambda slots: lax.psum(slots, axis_name), parts, 0.0, axis_name, groups)


def _pmax_grouped(a: Array, keep: Array, axis_name: AxisName, groups) -> Array:
    """The largest kept value over devices, 0 where there is none; of complex values the real and imaginary parts'."""
    parts = [a.real, a.imag] if jnp.iscomplexobj(a) else [a]
    least = lowest(parts[0].dtype)
    parts = [jnp.where(keep, lax.stop_gradient(p), least) for p in parts]
    if groups is None:
        tops = list(lax.pmax(tuple(parts), axis_name))
    else:
        tops = _in_groups(lambda slots: lax.pmax(slots, axis_name), parts, least, axis_name, groups)
    tops = [zero_for_lowest(t) for t in tops]
    return lax.complex(*tops) if jnp.iscomplexobj(a) else tops[0]


def max_over_devices(a: Array, axis_name: AxisName | None, groups) -> Array:
    """The largest values over devices, of an array without a derivative."""
    if axis_name is None:
        return a
    return lax.pmax(a, axis_name) if groups is None else _pmax_grouped(a, jnp.ones((), bool), axis_name, groups)


def _in_groups(collective, parts, empty, axis_name, groups):
    size = lax.axis_size(axis_name)
    mine = jnp.asarray(_group_of(groups, size))[lax.axis_index(axis_name)]
    parts = [jnp.asarray(p) for p in parts]
    slot = lambda p: _slot(len(groups), mine, p.ndim)
    slots = [jnp.where(slot(p), p[None], jnp.asarray(empty, p.dtype)) for p in parts]
    # Taken by a sum, not by an index: vmapped over an axis that is sharded, that stays elementwise.
    taken = zip(collective(tuple(slots)), parts, strict=True)
    return [jnp.where(slot(p), s, jnp.zeros((), p.dtype)).sum(0) for s, p in taken]


def _slot(size: int, index: Array, ndim: int) -> Array:
    return jnp.reshape(jnp.arange(size, dtype=index.dtype) == index, (size,) + (1,) * ndim)


def _group_of(groups, size: int) -> np.ndarray:
    flat = [i for g in groups for i in g]
    if sorted(flat) != list(range(size)):
        half = [list(range(size // 2)), list(range(size // 2, size))]
        raise ValueError(
            f"axis_index_groups must hold every index 0..{size - 1} of the axis once, got {shown(groups)}. "
            f"Write for example axis_index_groups={half}."
        )
    table = np.zeros(size, np.int32)
    for number, members in enumerate(groups):
        table[list(members)] = number
    return table
