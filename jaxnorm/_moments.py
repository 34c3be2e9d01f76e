"""Moments: the algebra of count, mean and second moment under masks, weights, merging, and devices.

Every statistic in the library comes from here, and `sum_across` and `_max_across` are its only collectives.
Legend: x is any shape; "reduced" means x's shape without `axes`; w is a weight per element, 1 where none is given.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._checks import (
    aligned_weights,
    as_float_array,
    checked_axes,
    checked_axis_name,
    checked_index_groups,
    counted,
    quiet_padding,
    shown,
)
from ._exported import exported
from ._habits import explained
from ._kernels import checked_implementation, xla
from ._kernels.varying import broadcast_like, sharded_like, varying_as
from ._kernels.xla import Reduction, Statistics, safe

Array = jax.Array
AxisName = str | tuple[str, ...]
Groups = Sequence[Sequence[int]]

_PLAIN = Reduction(())  # how `Moments` are kept: in one unit, which is 1

_SLOT_BYTES = 1 << 20  # up to here every device gets its own slot in one all-reduce; beyond, two smaller ones


@exported
class Moments(NamedTuple):
    """Count, mean and second moment of a set of numbers. `merge` joins two; `Moments(0., 0., 0.)` is the identity."""

    count: Array  # float32, reduced: the number of elements, or the sum of their weights
    mean: Array  # float32 or wider, reduced: sum(w x) / count, and 0 where count is 0
    m2: Array  # float32 or wider, real, reduced: sum(w |x - mean|**2)

    @property
    def var(self) -> Array:
        """The variance m2 / count (the biased one), and 0 where nothing was counted."""
        return self.m2 / jnp.where(self.count == 0, 1.0, self.count)

    @classmethod
    def empty(cls, features: int | tuple[int, ...] = (), dtype=jnp.float32) -> Moments:
        """The moments of nothing, of a feature shape: where gathering them starts. `dtype` is the mean's.

        >>> import jaxnorm as jn
        >>> jn.Moments.empty(2).count.tolist()
        [0.0, 0.0]
        """
        mean = jnp.zeros(features, dtype)
        return cls(mean.real, mean, mean.real)


@explained("function")
def moments(
    x, axes: int | Sequence[int] | None = None, *, mask=None, weights=None, implementation: str | None = None
) -> Moments:
    """Count, mean and second moment of `x` over `axes`.

        count = sum(w);   mean = sum(w x) / count;   m2 = sum(w |x - mean|**2)

    computed about a shift near the mean, never as E[x^2] - E[x]^2, so they are exact to rounding whatever the mean.

    Args:
      x: array of any shape and dtype; integers are promoted to float32.
      axes: the axes to reduce, an int or several; None is all of them.
      mask: True where an element counts. Broadcasts to x, or covers its leading axes.
      weights: a float weight >= 0 per element, shaped as a mask may be. Differentiable. Negative ones are refused,
        unless they are traced; then the result means nothing.
      implementation: "xla", or None for it, or "lax"; see `jaxnorm.backends`.

    Returns:
      `Moments` in float32 or wider, each of x's shape without `axes`.

    Raises:
      ValueError: an axis out of range, a mask that fits x nowhere, or another implementation.

    Source: Chan, Golub, LeVeque, "Algorithms for computing the sample variance" (1983).

    >>> import jaxnorm as jn, numpy as np
    >>> count, mean, m2 = jn.moments(np.array([1., 2., 3., 99.]), mask=np.array([True, True, True, False]))
    >>> float(count), float(mean), float(m2)
    (3.0, 2.0, 2.0)
    """
    x = as_float_array("moments", x)
    axes = checked_axes("moments", x.ndim, tuple(range(x.ndim)) if axes is None else axes, what="axes")
    x, mask = counted("moments", x, mask)
    weights = aligned_weights("moments", weights, x.shape)
    weights = None if weights is None else sharded_like(x, weights)
    x = quiet_padding(x, mask, weights)
    checked_implementation("moments", implementation)
    if implementation not in (None, "xla", "lax"):
        raise ValueError(f'moments: implementation={implementation!r} has no moments. Write "xla", "lax", or None.')
    return _as_moments(statistics(Reduction(axes, plain=implementation == "lax"), x, mask, weights), axes)


@explained("function")
def merge(a: Moments, b: Moments) -> Moments:
    """The moments of two sets together: associative, commutative, with `Moments(0., 0., 0.)` as identity.

        n = n_a + n_b;  d = mean_b - mean_a;  mean = mean_a + d n_b / n;  m2 = m2_a + m2_b + |d|**2 n_a n_b / n

    Args:
      a: moments of any shape that broadcasts against b's.
      b: the others.

    Source: Chan, Golub, LeVeque (1979), "Updating formulae and a pairwise algorithm for computing sample variances".

    >>> import jaxnorm as jn, numpy as np
    >>> a, b = jn.moments(np.array([1., 2.])), jn.moments(np.array([6.]))
    >>> [float(part) for part in jn.merge(a, b)]
    [3.0, 3.0, 14.0]
    """
    a, b = _checked_moments("merge", a), _checked_moments("merge", b)
    stacked = (jnp.stack(jnp.broadcast_arrays(jnp.asarray(p), jnp.asarray(q))) for p, q in zip(a, b, strict=True))
    return _as_moments(combine(_as_statistics(Moments(*stacked)), _PLAIN))


@explained("function")
def merge_across(m: Moments, axis_name: AxisName, axis_index_groups: Groups | None = None) -> Moments:
    """`merge` over the devices of a named axis of pmap, shard_map or vmap: each gets the moments of all their data.

    One all-reduce while every device can have a slot of its own in it (1 MiB in all), two beyond that: first for a
    common shift, then for the sums about it. Never an average of averages: uneven and empty shards count as they are.

    Args:
      m: this device's moments.
      axis_name: a mapped axis, or several.
      axis_index_groups: lists of indices along the axis; each group merges on its own. Every index in one of them.

    Raises:
      NameError: no such axis name is bound here.
      ValueError: the groups do not cover every index once.

    >>> import jax, jaxnorm as jn, numpy as np
    >>> shards = np.array([[1., 2., 3.], [7., 7., 7.]])
    >>> both = jax.vmap(lambda x: jn.merge_across(jn.moments(x), "devices"), axis_name="devices")(shards)
    >>> both.mean.tolist(), both.count.tolist()
    ([4.5, 4.5], [6.0, 6.0])
    """
    m = _checked_moments("merge_across", m)
    checked_axis_name("merge_across", axis_name)
    return _as_moments(across(_as_statistics(m), axis_name, checked_groups(axis_index_groups), _PLAIN))


def _checked_moments(name: str, m: Moments) -> Moments:
    """Running statistics have three fields as well."""
    if isinstance(m, Mapping) or getattr(m, "_fields", Moments._fields) != Moments._fields:
        write = "jaxnorm.Moments(**m)" if isinstance(m, Mapping) else "jaxnorm.moments(x, axes)"
        raise TypeError(f"{name}: needs jaxnorm.Moments, got {shown(m)}. Write {write}.")
    return m


# --- the statistics behind every norm ---------------------------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0, inline=True)  # one program also where the caller does not jit
def statistics(how: Reduction, x: Array, mask: Array | None, weights: Array | None) -> Statistics:
    """The statistics of x over `how.axes` and, where `how` names an axis, over its devices."""
    if how.parts > 1 and mask is None and weights is None and not jnp.iscomplexobj(x):
        local = _merged_parts(how, x)
    else:
        local = xla.statistics(x, mask, weights, how)
    return local if how.axis_name is None else across(local, how.axis_name, how.groups, how)


@functools.partial(statistics.defjvp, symbolic_zeros=True)
def _(how, primals, tangents):
    x, mask, weights = primals
    dx, _, dweights = none_for_zero(tangents)
    stats = statistics(how, x, mask, weights)
    return stats, statistics_tangent(how, x, mask, weights, stats, dx, dweights)


def statistics_tangent(how: Reduction, x, mask, weights, stats: Statistics, dx, dweights) -> Statistics:
    """The tangent of the statistics. d(mean) is given to the offset: the shift is a constant, whichever it is.

    Where `stats.m2` is a root, its tangent is still that of the sum of squares, which unlike the root's is finite where
    x is constant. `rsqrt_of_root` takes it as such.
    """
    unit = how.unit if how.large is None else 1.0
    z = unit * xla.centered(x, xla.present(mask, weights), stats.shift, stats.offset)
    dz = None if dx is None else unit * dx.astype(z.dtype)
    dn, d1, d2 = tangent_sums(how, z, mask, weights, dz, dweights)

    def like(d, out: Array) -> Array:  # zeros of no array would lack the mesh that out's type has in jax 0.7
        d = jnp.zeros_like(out) if isinstance(d, float) else broadcast_like(out, d.astype(out.dtype))
        return varying_as(out, d)

    mean = d1 / (safe(stats.count) * unit).astype(stats.offset.dtype) if how.centered else 0.0
    still = jnp.zeros_like(stats.shift)
    return Statistics(like(dn, stats.count), still, like(mean, stats.offset), like(d2, stats.m2))


def none_for_zero(tangents) -> list:
    """The tangents of a rule with symbolic zeros, None for each that is zero."""
    return [None if isinstance(t, jax.custom_derivatives.SymbolicZero) else t for t in tangents]


def tangent_sums(how, z, mask, weights, dz, dweights):
    """The sums that every tangent of a statistic is made of, over all devices; z is x without its mean, in some unit,

        dn = sum(dw);   d1 = sum(w dz + dw z);   d2 = sum(2 w Re(conj(z) dz) + dw |z|**2).

    Linear in (dz, dweights), either of which may be None for zero.
    """
    total = lambda a: (a if mask is None else jnp.where(mask, a, 0.0)).sum(how.axes, keepdims=True)
    sums: list = []
    if dz is not None:
        dz = dz if weights is None else dz * weights.astype(z.dtype)
        sums = [total(dz), 2.0 * total((jnp.conj(z) * dz).real if jnp.iscomplexobj(z) else z * dz)]
    if dweights is not None:
        dweights = dweights.astype(z.real.dtype)  # once, or the cotangents of its two uses would be added in its dtype
        z = z if mask is None else jnp.where(mask, z, 0.0)  # before it is squared, which may overflow
        of_weights = [total(dweights.astype(a.dtype) * a) for a in (z, xla.square(z))]
        sums = [*map(jnp.add, sums, of_weights)] if sums else of_weights
        sums.append(xla.count(z, mask, dweights, how.axes))  # of the shape that the count has
    if how.axis_name is not None and sums:
        sums = sum_across(sums, how.axis_name, how.groups)
    d1, d2, dn = sums + [0.0] * (3 - len(sums))
    return dn, d1, d2


# --- merging ----------------------------------------------------------------------------------------------------------


def _as_moments(s: Statistics, axes: tuple[int, ...] = ()) -> Moments:
    mean = s.shift + s.offset
    dropped = lambda a: lax.squeeze(broadcast_like(mean, a), axes)
    return Moments(dropped(s.count), dropped(mean), dropped(s.m2))


def _as_statistics(m: Moments) -> Statistics:
    count, mean, m2 = (jnp.asarray(a) for a in m)
    return Statistics(count, mean, jnp.zeros_like(mean), m2)


def combine(s: Statistics, how: Reduction) -> Statistics:
    """Merge along the leading axis: about the largest of the shifts, first the mean, then the spread about it."""
    n, shift, offset, m2 = s
    shift = lax.stop_gradient(xla.largest(s.shift, jnp.broadcast_to(n > 0, s.shift.shape), (0,)))
    gap = jnp.where(n > 0, (s.shift - shift) + offset, 0.0)
    total = n.sum(0, keepdims=True)
    offset = xla.mean(gap, n, total, (0,))
    between = lambda unit: n * xla.scaled_square(gap - offset, unit)
    if how.large is None:
        m2 = (jnp.where(n > 0, m2, 0.0) + between(how.unit)).sum(0)
    else:
        squares = lambda unit: jnp.where(n > 0, xla.scaled_square(m2, unit) + between(unit), 0.0).sum(0)
        m2, unit = xla.in_one_unit(how, squares(how.unit), squares(how.large))
        m2 = jnp.sqrt(m2) / unit
    return Statistics(total[0], shift[0], offset[0], m2)


def across(s: Statistics, axis_name: AxisName, groups, how: Reduction) -> Statistics:
    """Merge over the devices of axis_name, in their groups."""
    size = lax.axis_size(axis_name)
    index = lax.axis_index(axis_name)
    s = Statistics(*jnp.broadcast_arrays(s.count, s.shift, s.offset, s.m2))
    if xla.known(*s.shift.shape) and size * sum(a.nbytes for a in s) <= _SLOT_BYTES:
        mine = lambda a: jnp.where(_slot(size, index, a.ndim), a[None], jnp.zeros((), a.dtype))
        slots = Statistics(*sum_across([mine(a) for a in s], axis_name, None))
        if groups is not None:
            group = jnp.asarray(_group_of(groups, size))
            here = jnp.reshape(group == group[index], (size,) + (1,) * s.count.ndim)
            slots = slots._replace(count=jnp.where(here, slots.count, 0.0))
        return combine(slots, how)
    shift = lax.stop_gradient(_max_across(s.shift, s.count > 0, axis_name, groups))
    gap = jnp.where(s.count > 0, (s.shift - shift) + s.offset, 0.0)
    parts = [s.count, s.count.astype(gap.dtype) * gap]
    if how.large is None:
        parts.append(s.m2 + s.count * xla.scaled_square(gap, how.unit))
    else:
        square = xla.scaled_square
        parts += [square(s.m2, unit) + s.count * square(gap, unit) for unit in (how.unit, how.large)]
    n, first, *second = sum_across(parts, axis_name, groups)
    offset = first / safe(n).astype(first.dtype)
    corrections = lambda unit: n * xla.scaled_square(offset, unit)
    if how.large is None:
        return Statistics(n, shift, offset, jnp.maximum(second[0] - corrections(how.unit), 0.0))
    m2, unit = xla.in_one_unit(how, *second)
    return Statistics(n, shift, offset, jnp.sqrt(jnp.maximum(m2 - corrections(unit), 0.0)) / unit)


def _merged_parts(how: Reduction, x: Array) -> Statistics:
    """The statistics of parts of the leading axis, merged: one all-reduce where each part is on a device of its own.

    Summed at once there would be two: of the sample that sums are taken about, and of the sums. So every part gets a
    slot of its own in one array, and that is summed, which adds nothing but zeros.
    """
    view = x.reshape(how.parts, x.shape[0] // how.parts, *x.shape[1:])
    of_part = replace(how, parts=1, axes=tuple(a + 1 for a in how.axes))
    count, *stats = xla.statistics(view, None, None, of_part)
    if sum(a.nbytes for a in stats) > _SLOT_BYTES:
        return xla.statistics(x, None, None, how)
    stats = jnp.stack(stats, 1)
    own = jnp.reshape(jnp.eye(how.parts, dtype=bool), (how.parts, how.parts) + (1,) * (stats.ndim - 1))
    slots = jnp.where(own, stats[None], jnp.zeros((), stats.dtype)).sum(1)
    count = jnp.broadcast_to(count, slots[:, 0].shape)
    return combine(Statistics(count, *(slots[:, i] for i in range(3))), how)


def sum_across(parts: list, axis_name: AxisName, groups) -> list:
    """The sums of arrays over devices: one all-reduce. With groups, each group has a slot in it and takes its own."""
    if groups is None:
        return list(lax.psum(tuple(parts), axis_name))
    return _in_groups(lambda slots: lax.psum(slots, axis_name), parts, 0.0, axis_name, groups)


def _max_across(a: Array, keep: Array, axis_name: AxisName, groups) -> Array:
    """The largest kept value over devices, 0 where there is none; of complex values the real and imaginary parts'."""
    parts = [a.real, a.imag] if jnp.iscomplexobj(a) else [a]
    least = xla.lowest(parts[0].dtype)
    parts = [jnp.where(keep, lax.stop_gradient(p), least) for p in parts]
    if groups is None:
        tops = list(lax.pmax(tuple(parts), axis_name))
    else:
        tops = _in_groups(lambda slots: lax.pmax(slots, axis_name), parts, least, axis_name, groups)
    tops = [xla.zero_for_lowest(t) for t in tops]
    return lax.complex(*tops) if jnp.iscomplexobj(a) else tops[0]


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


def checked_groups(groups: Groups | None) -> tuple[tuple[int, ...], ...] | None:
    return None if groups is None else checked_index_groups("merge_across", "axis_index_groups", groups)


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
