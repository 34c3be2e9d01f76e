"""Norms that are an elementwise function of x, its statistics and parameters: y = f(x, statistics, params).

To add such a norm, write f, a frozen dataclass of its options with `__call__`, or a plain function: equal ones share a
trace. The derivatives follow from f and from those of the statistics. For the backward pass x, in its own dtype, is
all that is kept of x's size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._core.arithmetic import abs_squared, nan_if_infinite, nonzero_divisor
from .._core.arrays import align_boolean_mask, align_param, canonicalize_dtype
from .._core.channels import spans_devices, split_channels
from .._core.checks import canonicalize_epsilon, canonicalize_groups, canonicalize_number, check_axis_name
from .._core.dtypes import accumulator
from .._core.masks import finite_padding, usable, valid_mask
from .._core.mesh import active_axis_names, explain_unbound_axis
from .._core.over import Axes, Groups, Prefix, Segments
from .._core.platforms import recompute
from .._core.types import Plan, Reduction, Statistics
from .._core.vma import broadcast_like, shard_like, spec_of, tangent_like
from .activation import activate_output, check_activation, jvp_or_none, widened_to
from .formula import affine
from .plan import make_plan, refuse_kernels
from .statistics import drop_symbolic_zeros, statistics, statistics_tangent

Array = jax.Array


@dataclass(frozen=True)
class OfElements:
    """For each element of x, the statistics that it is part of. They broadcast against x, in float32 or wider."""

    parts: Statistics
    reduction: Reduction
    keep: Array | None  # where elements count; None is everywhere
    dm2: Array | None  # zeros whose tangent is that of m2 for unit * x, where `parts.m2` is held constant
    unit: Array | None

    @property
    def count(self) -> Array:
        return self.parts.count

    @property
    def mean(self) -> Array:
        return self.parts.mean_hi + self.parts.mean_lo

    @property
    def var(self) -> Array:
        """The variance, or the mean square where the mean is taken as zero; 0 where nothing was counted.

        It has the range of its dtype: write `rsqrt` for one that values up to 1e30 do not overflow.
        """
        return self._scaled_m2(jnp.ones((), self.parts.m2.dtype)) / nonzero_divisor(self.count)

    def deviation(self, x: Array) -> Array:
        """x - mean, with the low bits that `mean` has not."""
        return (x - self.parts.mean_hi) - self.parts.mean_lo

    def rsqrt(self, epsilon: float | Array, share: float | Array = 1.0, beside: Array | None = None) -> Array:
        """1 / sqrt(share var + |beside|**2 + epsilon): see `rsqrt_of_mixture`."""
        return rsqrt_of_mixture([(share, self)], epsilon, beside)

    def std(self, epsilon: float | Array) -> Array:
        """sqrt(var + epsilon); 0, with a derivative of 0, where that is 0."""
        v, s, void = in_unit_range([(1.0, self)], epsilon)
        return jnp.where(void, 0.0, jnp.sqrt(jnp.where(void, 1.0, v)) / s)

    def standardize(self, x: Array, epsilon: float | Array) -> Array:
        """(x - mean) / sqrt(var + epsilon)."""
        return self.bounded(self.deviation(x) * self.rsqrt(epsilon).astype(x.dtype))

    def bounded(self, xhat: Array) -> Array:
        """xhat, and no infinity for what is absent, of which a cotangent of 0 would make NaN."""
        if self.keep is None or jnp.iscomplexobj(xhat):
            return xhat
        return jnp.clip(xhat, -1e30, 1e30)

    def rsqrt_of_sum(self, axis: int, epsilon: float) -> Array:
        """1 / sqrt(sum of var along an axis + epsilon), with size 1 along it; 0 for 1 / 0, and where all are empty."""
        larger = self.spread().max(axis, keepdims=True, initial=0.0)
        larger = lax.stop_gradient(jnp.maximum(larger, math.sqrt(epsilon)))
        void = (larger == 0) | (self.count == 0).all(axis, keepdims=True)
        s = 1.0 / nan_if_infinite(jnp.where(void, 1.0, larger))
        v = self._scaled_m2(jnp.broadcast_to(s, self.parts.m2.shape)) / nonzero_divisor(self.count)
        v = v.sum(axis, keepdims=True) + (epsilon * s) * s
        return jnp.where(void, 0.0, s * lax.rsqrt(jnp.where(void, 1.0, v)))

    @property
    def _is_plain(self) -> bool:
        return self.reduction.large_prescale is None

    def spread(self) -> Array:
        """The root of the variance, with no care for its derivative."""
        m2, n = self.parts.m2, nonzero_divisor(self.count)
        return jnp.sqrt(m2 / n) / self.reduction.prescale if self._is_plain else m2 / jnp.sqrt(n)

    def _scaled_m2(self, s: Array) -> Array:
        """m2 s**2 for a constant s."""
        if not self._is_plain:
            square = _scaled_square(self.parts.m2, s)
            if self.dm2 is None or self.unit is None:
                return square
            s = s / nonzero_divisor(self.unit)  # it is 0 where no statistic is
            return square + (self.dm2 * s) * s
        s = s / self.reduction.prescale
        return (self.parts.m2 * s) * s


Mixture = Sequence[tuple[Any, OfElements]]  # statistics of the same elements, each with its weight >= 0


def rsqrt_of_mixture(mixture: Mixture, epsilon: float | Array, beside: Array | None = None) -> Array:
    """1 / sqrt(sum of weight var + |beside|**2 + epsilon); epsilon >= 0, a number or an array, beside in units of x.

    0 for 1 / 0, and where nothing was counted at all, but for a `beside`: it may be of other elements.
    """
    v, s, void = in_unit_range(mixture, epsilon, beside)
    if beside is None:
        void |= functools.reduce(jnp.logical_and, [of.count == 0 for _, of in mixture])
    return jnp.where(void, 0.0, s * lax.rsqrt(jnp.where(void, 1.0, v)))


def in_unit_range(mixture: Mixture, epsilon: float | Array, beside: Array | None = None) -> tuple[Array, Array, Array]:
    """(v s**2, s, whether v is 0) of v = sum of weight var + |beside|**2 + epsilon.

    The constant s brings the largest of the terms, but for its weight, to 1. So all that is differentiated is in range.
    """
    epsilon = jnp.asarray(epsilon, mixture[0][1].parts.m2.dtype)
    spreads = [of.spread() for _, of in mixture]
    larger = lax.stop_gradient(functools.reduce(jnp.maximum, spreads, jnp.sqrt(epsilon)))
    if beside is not None:
        larger = jnp.maximum(larger, jnp.abs(lax.stop_gradient(beside)))
    void = larger == 0
    s = 1.0 / nan_if_infinite(jnp.where(void, 1.0, larger))
    v = (epsilon * s) * s
    for weight, of in mixture:
        v = v + weight * (of._scaled_m2(s) / nonzero_divisor(of.count))
    return v if beside is None else v + abs_squared(beside * s), s, void


@jax.custom_jvp
def _scaled_square(root: Array, s: Array) -> Array:
    """(root s)**2. The tangent that comes for `root` is that of its square; see `statistics_tangent`."""
    return lax.square(root * s)


@_scaled_square.defjvp
def _(primals, tangents):
    (root, s), (dsquare, _) = primals, tangents
    return _scaled_square(root, s), (dsquare * s) * s


F = Callable[[Array, OfElements, Any], Array]
Several = tuple[Statistics, ...]


def normalize_by_statistics(
    norm: str, f: Callable[..., Array], x: Array, own: dict[str, Any], scale, bias, axes: tuple[int, ...],
    feature_axes: tuple[int, ...], *, epsilon, scale_offset, activation, mask, axis_name, axis_index_groups, dtype,
    implementation, centered=True, groups: int | None = None, segments: tuple[Segments, Array] | None = None,
    by: Callable[..., Array] | None = None,
) -> Array:  # fmt: skip
    """y = activation(f(x, statistics, affine, epsilon, *own)), rounded once; statistics over `axes`, or `segments`.

    `f` is elementwise and gets x in the accumulator's dtype. It calls `affine`: z -> z (scale + scale_offset) + bias.
    `own` are further parameters by name: numbers, or arrays of the feature shape or of one that broadcasts. `groups` is
    the number of groups of channels, at the one feature axis, that statistics are over as well. `segments` are what
    statistics are over in the place of `axes`, and the ids. `by` is in the place of `by_statistics`.
    """
    by = by_statistics if by is None else by
    refuse_kernels(norm, implementation)
    given = [
        align_param(norm, name, p, x.shape, feature_axes) for name, p in {"scale": scale, "bias": bias, **own}.items()
    ]
    params = tuple(None if p is None else shard_like(x, p) for p in given)
    out = canonicalize_dtype(norm, dtype, x, *params)
    check_activation(norm, activation, x.shape, x.dtype)
    check_axis_name(norm, axis_name)
    names = active_axis_names(axis_name, whole=axis_index_groups is None) or None
    shared = canonicalize_groups(norm, axis_index_groups) if names else None
    over, view, spans = _grouped(x, axes, feature_axes, groups)
    over, ids = (over, None) if segments is None else segments
    reduction = Reduction(over, centered, axis_name=names, groups=shared)
    scale_offset = canonicalize_number(norm, "scale_offset", scale_offset, "1.0")
    epsilon = canonicalize_epsilon(norm, epsilon)
    seen = jax.eval_shape(view, jax.ShapeDtypeStruct(x.shape, x.dtype))
    plan = make_plan(seen, names or (), epsilon, scale_offset, out, reduction, implementation, activation=activation)
    x, mask = align_boolean_mask(norm, x, mask)
    mask = over.present(mask, ids)

    def normalized(*args) -> Array:
        seen, mask, params = jax.tree.map(view, args)
        with explain_unbound_axis(norm, axis_name):
            return by(Whole(f, plan), plan.reduction, out, seen, mask, None, params, ids).reshape(x.shape)

    run: Any = jax.sharding.auto_axes(normalized, out_sharding=jax.typeof(x).sharding) if spans else normalized
    return run(finite_padding(x, mask), mask, params)


def _grouped(x: Array, axes: tuple[int, ...], feature_axes, groups: int | None):
    """What statistics are over, in which view of x, and whether that splits an axis that types say is sharded."""
    if groups is None:
        return Axes(axes), lambda a: a, False
    (channel,) = feature_axes
    if channel == x.ndim - 1 and not any(spec_of(x)):
        return Groups(axes, groups, x.shape[channel]), lambda a: a, False
    over = Axes((*(a if a < channel else a + 1 for a in axes), channel + 1))
    return over, lambda a: split_channels(a, x.shape, channel, groups), spans_devices(x, channel, groups)


@dataclass(frozen=True)
class Whole:
    """A norm's own function, with what all norms have around it."""

    f: Callable[..., Array]
    plan: Plan

    def __call__(self, x: Array, statistics: OfElements, params: tuple) -> Array:
        scale, bias, *own = params
        whole = lambda z: affine(z, scale, bias, self.plan.scale_offset, widened_to(z, scale, bias))
        z = self.f(x, statistics, whole, self.plan.epsilon, *own)
        return z if self.plan.activation is None else activate_output(self.plan.activation, z, statistics.keep)


def by_statistics(f: F, reduction: Reduction, dtype, x: Array, mask, weights, params, ids=None) -> Array:
    """y = f(x, statistics, params), elementwise, of x's shape, and rounded once, to `dtype`: `by_several` of one."""
    return with_statistics(f, reduction, dtype, x, mask, weights, params, ids)[0]


def with_statistics(
    f: F, reduction: Reduction, dtype, x: Array, mask, weights, params, ids=None
) -> tuple[Array, Statistics]:
    """`by_statistics`, and the statistics as constants, without a derivative: running ones are made of them."""
    y, (stats,) = by_several(f, (reduction,), dtype, x, mask, weights, params, (None,), ids)
    return y, stats


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def by_several(
    f: Callable[..., Array], reductions: tuple[Reduction, ...], dtype, x: Array, mask, weights, params, given, ids=None
) -> tuple[Array, Several]:
    """y = f(x, *statistics, params), of several statistics of one x; and the statistics as constants.

    f is elementwise and gets x in the accumulator's dtype; for padding (NaN, infinite, or beyond 1e30) it gets a
    constant that equals the first mean. Params are any pytree of arrays that broadcast against x, each in its own
    dtype. `given` has for each reduction its statistics, which are constants, or None. Mask, weights and ids have x's
    rank; the mask leaves out what no segment has (`Over.present`).
    """
    stats = _statistics(reductions, x, mask, weights, given, ids)
    return output_of(f, reductions, dtype, x, mask, weights, stats, params, ids), stats


@functools.partial(by_several.defjvp, symbolic_zeros=True)
def _(f, reductions, dtype, primals, tangents):
    x, mask, weights, params, given, ids = primals
    dx, _, dweights, *dparams = drop_symbolic_zeros((*tangents[:3], *jax.tree.leaves(tangents[3])))
    stats = _statistics(reductions, x, mask, weights, given, ids)
    y = output_of(f, reductions, dtype, x, mask, weights, stats, params, ids)
    still = tuple(s is not None for s in given)
    tangent = recompute(functools.partial(tangent_of, f, reductions, still, dtype), reductions[0].plain)
    dy = tangent(x, mask, weights, stats, params, ids, (dx, dweights, dparams))
    return (y, stats), (tangent_like(y, dy), jax.tree.map(jnp.zeros_like, stats))


def _statistics(reductions, x, mask, weights, given, ids) -> Several:
    own = lambda reduction: statistics(reduction, x, mask, weights, ids)
    return tuple(own(r) if s is None else s for r, s in zip(reductions, given, strict=True))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def output_of(
    f, reductions: tuple[Reduction, ...], dtype, x, mask, weights, stats: Several, params, ids, dm2s=None, units=None
) -> Array:
    keep, wide = valid_mask(mask, weights), x.astype(accumulator(x))
    nothing = (None,) * len(reductions)

    def at_x(reduction: Reduction, stats: Statistics, dm2, unit) -> OfElements:
        spread = functools.partial(reduction.over.spread, ids=ids)
        dm2, unit = (None if a is None else spread(a) for a in (dm2, unit))
        return OfElements(Statistics(*map(spread, stats)), reduction, keep, dm2, unit)

    each = [*map(at_x, reductions, stats, dm2s or nothing, units or nothing)]
    if keep is not None:
        wide = jnp.where(usable(x, keep), wide, lax.stop_gradient(each[0].mean))
    return broadcast_like(x, f(wide, *each, params)).astype(dtype)


def tangent_of(f, reductions, still, dtype, x, mask, weights, stats: Several, params, ids, tangents) -> Array:
    """The chain rule through f and through the statistics. None is a tangent of zero."""
    dx, dweights, dparams = tangents
    leaves, tree = jax.tree.flatten(params)
    moves = dx is not None or dweights is not None
    units = [unit_of(r, s) for r, s in zip(reductions, stats, strict=True)]
    primals, moving = [], []
    for reduction, of, unit, given in zip(reductions, stats, units, still, strict=True):
        count = mean_lo = m2 = None
        if moves and not given:
            count, _, mean_lo, m2 = statistics_tangent(reduction, x, mask, weights, of, dx, dweights, ids, unit)
        primals += [of.count, of.mean_lo, of.m2 if unit is None else jnp.zeros_like(of.m2)]
        moving += [count, mean_lo, m2]

    def of_moving(x, *values) -> Array:
        parts = [values[3 * i : 3 * i + 3] for i in range(len(reductions))]
        now = tuple(
            s._replace(count=count, mean_lo=mean_lo, m2=m2 if unit is None else s.m2)
            for s, unit, (count, mean_lo, m2) in zip(stats, units, parts, strict=True)
        )
        dm2s = tuple(None if unit is None else m2 for unit, (_, _, m2) in zip(units, parts, strict=True))
        params = jax.tree.unflatten(tree, values[3 * len(reductions) :])
        return output_of(f, reductions, dtype, x, mask, weights, now, params, ids, dm2s, tuple(units))

    dy = jvp_or_none(of_moving, (x, *primals, *leaves), (dx, *moving, *dparams))[1]
    return jnp.zeros(x.shape, dtype) if dy is None else dy


def unit_of(reduction: Reduction, stats: Statistics) -> Array | None:
    """What the tangent of m2 is that of the squares of, times x, where m2 is a root; else None."""
    if reduction.large_prescale is None:
        return None
    root = lax.stop_gradient(stats.m2) / jnp.sqrt(nonzero_divisor(stats.count))
    if isinstance(reduction.over, Prefix):  # an element is part of several statistics, which need one unit
        root = root.max(reduction.over.axis, keepdims=True)
    return 1.0 / nonzero_divisor(root)
