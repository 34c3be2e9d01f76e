"""Norms that are an elementwise function of x, its statistics and parameters: y = f(x, statistics, params).

To add such a norm, write f, a frozen dataclass of its options with `__call__`, or a plain function: equal ones share a
trace. The derivatives follow from f and from those of the statistics. For the backward pass x, in its own dtype, is
all that is kept of x's size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._core.arithmetic import abs_squared, nan_if_infinite, nonzero_divisor
from .._core.arrays import align_boolean_mask, align_param, canonicalize_dtype
from .._core.checks import canonicalize_epsilon, canonicalize_groups, canonicalize_number, check_axis_name
from .._core.dtypes import accumulator
from .._core.masks import finite_padding, usable, valid_mask
from .._core.mesh import active_axis_names, explain_unbound_axis
from .._core.over import Axes, Prefix, Segments
from .._core.platforms import recompute
from .._core.types import Plan, Reduction, Statistics
from .._core.vma import broadcast_like, shard_like, tangent_like
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
        """1 / sqrt(share var + |beside|**2 + epsilon); share is of 0..1, epsilon >= 0, and beside is in units of x.

        0 for 1 / 0, and where nothing was counted, but for a `beside`: it may be of other elements. Computed with a
        constant s that brings the sum, times s**2, near 1. So all that is differentiated is in range.
        """
        m2, n = self.parts.m2, nonzero_divisor(self.count)
        epsilon = jnp.asarray(epsilon, m2.dtype)
        spread = jnp.sqrt(m2 / n) / self.reduction.prescale if self._is_plain else m2 / jnp.sqrt(n)
        larger = lax.stop_gradient(jnp.maximum(spread, jnp.sqrt(epsilon)))
        if beside is not None:
            larger = jnp.maximum(larger, jnp.abs(lax.stop_gradient(beside)))
        void = (larger == 0) if beside is not None else (self.count == 0) | (larger == 0)
        s = 1.0 / nan_if_infinite(jnp.where(void, 1.0, larger))
        v = self._scaled_m2(s) / n * share + (epsilon * s) * s
        v = v if beside is None else v + abs_squared(beside * s)
        return jnp.where(void, 0.0, s * lax.rsqrt(jnp.where(void, 1.0, v)))

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
        n = nonzero_divisor(self.count)
        m2 = self.parts.m2
        spread = jnp.sqrt(m2 / n) / self.reduction.prescale if self._is_plain else m2 / jnp.sqrt(n)
        larger = lax.stop_gradient(jnp.maximum(spread.max(axis, keepdims=True, initial=0.0), math.sqrt(epsilon)))
        void = (larger == 0) | (self.count == 0).all(axis, keepdims=True)
        s = 1.0 / nan_if_infinite(jnp.where(void, 1.0, larger))
        v = (self._scaled_m2(jnp.broadcast_to(s, m2.shape)) / n).sum(axis, keepdims=True) + (epsilon * s) * s
        return jnp.where(void, 0.0, s * lax.rsqrt(jnp.where(void, 1.0, v)))

    @property
    def _is_plain(self) -> bool:
        return self.reduction.large_prescale is None

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


@jax.custom_jvp
def _scaled_square(root: Array, s: Array) -> Array:
    """(root s)**2. The tangent that comes for `root` is that of its square; see `statistics_tangent`."""
    return lax.square(root * s)


@_scaled_square.defjvp
def _(primals, tangents):
    (root, s), (dsquare, _) = primals, tangents
    return _scaled_square(root, s), (dsquare * s) * s


F = Callable[[Array, OfElements, Any], Array]


def normalize_by_statistics(
    norm: str, f: Callable[..., Array], x: Array, own: dict[str, Any], scale, bias, axes: tuple[int, ...],
    feature_axes: tuple[int, ...], *, epsilon, scale_offset, activation, mask, axis_name, axis_index_groups, dtype,
    implementation, centered=True, segments: tuple[Segments, Array] | None = None,
) -> Array:  # fmt: skip
    """y = activation(f(x, statistics, affine, epsilon, *own)), rounded once; statistics over `axes`, or `segments`.

    `f` is elementwise and gets x in the accumulator's dtype. It calls `affine`: z -> z (scale + scale_offset) + bias.
    `own` are further parameters by name: numbers, or arrays of the feature shape or of one that broadcasts.
    """
    refuse_kernels(norm, implementation)
    given = [
        align_param(norm, name, p, x.shape, feature_axes) for name, p in {"scale": scale, "bias": bias, **own}.items()
    ]
    params = tuple(None if p is None else shard_like(x, p) for p in given)
    out = canonicalize_dtype(norm, dtype, x, *params)
    check_activation(norm, activation, x.shape, x.dtype)
    check_axis_name(norm, axis_name)
    names = active_axis_names(axis_name, whole=axis_index_groups is None) or None
    groups = canonicalize_groups(norm, axis_index_groups)
    over, ids = (Axes(axes), None) if segments is None else segments
    reduction = Reduction(over, centered, axis_name=names, groups=groups if names else None)
    scale_offset = canonicalize_number(norm, "scale_offset", scale_offset, "1.0")
    epsilon = canonicalize_epsilon(norm, epsilon)
    plan = make_plan(x, names or (), epsilon, scale_offset, out, reduction, implementation, activation=activation)
    x, mask = align_boolean_mask(norm, x, mask)
    mask = over.present(mask, ids)
    with explain_unbound_axis(norm, axis_name):
        return by_statistics(Whole(f, plan), plan.reduction, out, finite_padding(x, mask), mask, None, params, ids)


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


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def by_statistics(f: F, reduction: Reduction, dtype, x: Array, mask, weights, params, ids=None) -> Array:
    """y = f(x, statistics, params), elementwise, of x's shape, and rounded once, to `dtype`.

    f gets x in the accumulator's dtype; for padding (NaN, infinite, or beyond 1e30) it gets a constant that equals the
    mean. Params are any pytree of arrays that broadcast against x, each in its own dtype. Mask, weights and ids have
    x's rank; the mask leaves out what no segment has (`Over.present`).
    """
    return _output(f, reduction, dtype, x, mask, weights, statistics(reduction, x, mask, weights, ids), params, ids)


@functools.partial(by_statistics.defjvp, symbolic_zeros=True)
def _(f, reduction, dtype, primals, tangents):
    x, mask, weights, params, ids = primals
    dx, _, dweights, *dparams, _ = drop_symbolic_zeros((*tangents[:3], *jax.tree.leaves(tangents[3]), None))
    stats = statistics(reduction, x, mask, weights, ids)
    y = _output(f, reduction, dtype, x, mask, weights, stats, params, ids)
    tangent = recompute(functools.partial(_tangent, f, reduction, dtype), reduction.plain)
    dy = tangent(x, mask, weights, stats, params, ids, (dx, dweights, dparams))
    return y, tangent_like(y, dy)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _output(
    f: F, reduction: Reduction, dtype, x, mask, weights, stats: Statistics, params, ids, dm2=None, unit=None
) -> Array:
    spread = functools.partial(reduction.over.spread, ids=ids)
    dm2, unit = (None if a is None else spread(a) for a in (dm2, unit))
    keep, wide = valid_mask(mask, weights), x.astype(accumulator(x))
    at_x = OfElements(Statistics(*map(spread, stats)), reduction, keep, dm2, unit)
    if keep is not None:
        wide = jnp.where(usable(x, keep), wide, lax.stop_gradient(at_x.mean))
    return broadcast_like(x, f(wide, at_x, params)).astype(dtype)


def _tangent(f: F, reduction: Reduction, dtype, x, mask, weights, stats, params, ids, tangents) -> Array:
    """The chain rule through f and through the statistics. None is a tangent of zero."""
    dx, dweights, dparams = tangents
    leaves, tree = jax.tree.flatten(params)
    dm2 = unit = None
    if reduction.large_prescale is not None:  # m2 is a root
        root = lax.stop_gradient(stats.m2) / jnp.sqrt(nonzero_divisor(stats.count))
        dm2 = jnp.zeros_like(root)
        if isinstance(reduction.over, Prefix):  # an element is part of several statistics, which need one unit
            root = root.max(reduction.over.axis, keepdims=True)
        unit = 1.0 / nonzero_divisor(root)
    count = mean_lo = m2 = None
    if dx is not None or dweights is not None:
        count, _, mean_lo, m2 = statistics_tangent(reduction, x, mask, weights, stats, dx, dweights, ids, unit)

    def of_moving(x, count, mean_lo, m2, *leaves) -> Array:
        now = stats._replace(count=count, mean_lo=mean_lo, m2=m2 if unit is None else stats.m2)
        params = jax.tree.unflatten(tree, leaves)
        return _output(f, reduction, dtype, x, mask, weights, now, params, ids, None if unit is None else m2, unit)

    primals = (x, stats.count, stats.mean_lo, stats.m2 if dm2 is None else dm2, *leaves)
    dy = jvp_or_none(of_moving, primals, (dx, count, mean_lo, m2, *dparams))[1]
    return jnp.zeros(x.shape, dtype) if dy is None else dy
