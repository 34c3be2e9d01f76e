"""From statistics to output: the affine arithmetic with its one rounding, and the tangent of the whole.

Legend: x is any shape; scale and bias have x's rank and broadcast against it; r = 1 / sqrt(var + epsilon);
xhat = (x - mean) r. All arithmetic is in float32 or wider; the output is rounded once.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._core.arithmetic import nan_if_infinite, nonzero_divisor, where
from .._core.dtypes import are_static, round_to, widest
from .._core.formulas import are_last, split_axes
from .._core.fused import (
    fused_on_cpu,
    fused_two_pass,
    is_fused_on_cpu,
    is_plain_on_cpu,
    plain_on_cpu,
    unless_overflowed,
)
from .._core.masks import deviation, valid_mask, zero_where_padding
from .._core.over import Axes
from .._core.platforms import by_platform
from .._core.reduce import is_row
from .._core.types import Plan, Statistics
from .._core.vma import broadcast_like, pvary_like
from .statistics import count_of, statistics, tangent_sums

Array = jax.Array


def rsqrt(m2: Array, n: Array, prescale: float, epsilon: float) -> Array:
    """r = 1 / sqrt(var + epsilon), from m2 in squared units; 0 where nothing was counted, and where var + epsilon is 0.

    An empty group, or a constant group with epsilon 0, therefore yields the bias.
    """
    least = epsilon * prescale**2
    v = m2 / nonzero_divisor(n) + least
    void = n == 0
    if least < jnp.finfo(v.dtype).tiny:  # else v is never 0, and a select would cut XLA's kernels for rows on a GPU
        void |= v == 0
    if isinstance(void, np.ndarray) and not void.any():
        return prescale * _rsqrt(v)
    return where(void, 0.0, prescale * _rsqrt(where(void, 1.0, v)))


@jax.custom_jvp
def _rsqrt(v: Array) -> Array:
    """1 / sqrt(v), whose higher derivatives stay in range: s is a constant that brings v to 1."""
    return lax.rsqrt(v)


@_rsqrt.defjvp
def _(primals, tangents):
    (v,), (dv,) = primals, tangents
    s = lax.stop_gradient(lax.rsqrt(v))
    r = s * lax.rsqrt((v * s) * s)
    return _rsqrt(v), -0.5 * r * ((dv * s) * s) / ((v * s) * s)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def rsqrt_of_root(root: Array, n: Array, epsilon: float) -> Array:
    """The same from the root of m2, in x's own units. The tangent that comes for `root` is that of m2 itself."""
    spread, least, void = root / jnp.sqrt(nonzero_divisor(n)), math.sqrt(epsilon), n == 0
    larger = jnp.maximum(spread, least)
    if least < jnp.finfo(root.dtype).tiny:  # as above
        void |= larger == 0
        larger = nonzero_divisor(larger)
    larger = nan_if_infinite(larger)
    r = lax.rsqrt(1.0 + jnp.square(jnp.minimum(spread, least) / larger)) / larger
    return where(void, 0.0, r)


@rsqrt_of_root.defjvp
def _(epsilon, primals, tangents):
    (root, n), (dm2, dn) = primals, tangents
    r = rsqrt_of_root(root, n, epsilon)
    return r, -0.5 * (r / nonzero_divisor(n)) * (r * (r * dm2) - share_of_root(root, n, epsilon) * dn)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def share_of_root(root: Array, n: Array, epsilon: float) -> Array:
    """var / (var + epsilon), which is 1 - epsilon r**2, from the same."""
    return jnp.square(root / jnp.sqrt(nonzero_divisor(n)) * rsqrt_of_root(root, n, epsilon))


@share_of_root.defjvp
def _(epsilon, primals, tangents):
    r, dr = jax.jvp(functools.partial(rsqrt_of_root, epsilon=epsilon), primals, tangents)
    least = math.sqrt(epsilon)
    return share_of_root(*primals, epsilon), -2.0 * (least * r) * (least * dr)


def affine(xhat, scale, bias, scale_offset: float, dtype, cast_dtype: Any = None) -> Array:
    """y = xhat (scale + scale_offset) + bias, rounded once (or also before scale, to `cast_dtype`)."""
    y = xhat if cast_dtype is None else round_to(xhat, cast_dtype)
    if scale is not None or scale_offset:
        s = effective_scale(scale, scale_offset, y.dtype)
        y = y.astype(s.dtype) * s
    if bias is not None:
        y = y.astype(widest(y.dtype, bias.dtype))
        y = y + bias.astype(y.dtype)
    return y.astype(dtype)


def effective_scale(scale: Array | None, scale_offset: float, dtype) -> Array:
    """scale + scale_offset in float32 or wider; an absent scale is 1 whatever the offset."""
    if scale is None:
        return jnp.ones((), dtype)
    scale = scale.astype(widest(dtype, scale.dtype))
    return scale + scale_offset if scale_offset else scale


def affine_times(factor: float | Array, scale, bias, scale_offset: float, dtype) -> tuple[Array, Array | None]:
    """The scale, with its offset, and the bias that give `factor` times the output: of this dtype or wider."""
    factor = jnp.asarray(factor, dtype)
    s = effective_scale(None if scale is None else jnp.asarray(scale), scale_offset, dtype)
    bias = None if bias is None else jnp.asarray(bias)
    b = None if bias is None else bias.astype(widest(dtype, bias.dtype))
    return factor.astype(s.dtype) * s, None if b is None else factor.astype(b.dtype) * b


@functools.partial(jax.jit, static_argnums=0, inline=True)
def output(plan: Plan, x, mask, weights, stats: Statistics, scale, bias, ids=None) -> Array:
    kept = plan.for_backward or plan.statistics_first
    if kept or mask is not None or weights is not None or not _are_rows(plan, x):
        return _affine_of(plan, _xhat(plan, x, mask, weights, stats, ids), scale, bias)
    return _output_alone(plan, x, stats, scale, bias)


def _affine_of(plan: Plan, xhat, scale, bias) -> Array:
    cast = (plan.cast_dtype or plan.dtype) if plan.cast_before_scale else None
    return affine(xhat, scale, bias, plan.scale_offset, plan.dtype, cast)


def _xhat(plan: Plan, x, mask, weights, stats: Statistics, ids) -> Array:
    return xhat_and_r(plan, x, mask, weights, stats, ids)[0]


def _are_rows(plan: Plan, x) -> bool:
    return isinstance(plan.reduction.over, Axes) and is_row(x, plan.reduction)


def _output_alone(plan: Plan, x, stats: Statistics, scale, bias) -> Array:
    """y where no statistics are kept: of rows by formulas of which XLA makes one kernel, or one loop of a CPU.

    Where they are kept as well, two sets of statistics would cost a pass more than one.
    """
    reduction = plan.reduction
    n = count_of(reduction, x, None, None, stats)
    of = lambda x, *stats: _xhat(plan, x, None, None, Statistics(n, *stats), None)
    formulas: dict[str, Any] = {}
    if reduction.centered or reduction.large_prescale:
        formulas["cuda"] = formulas["rocm"] = lambda x, *_: of(x, *fused_two_pass(x, n, reduction))
    if is_fused_on_cpu(x, reduction, plan.epsilon):
        formulas["cpu"] = lambda x, *_: fused_on_cpu(x, n, reduction, plan.epsilon)
    if plan.within or not is_plain_on_cpu(x, reduction, plan.dtype):
        xhat = by_platform(reduction, x, *stats[1:], default=of, **formulas) if formulas else of(x, *stats[1:])
        return _affine_of(plan, xhat, scale, bias)

    def careful(x) -> Array:  # with statistics of its own: of those that are given the loop would need a pass
        of_x = formulas.get("cpu", lambda x: of(x, *statistics(reduction, x, None, None)[1:]))
        return of_x(x)

    def on_cpu(x, scale, bias, *_):
        d, r = plain_on_cpu(x, n, reduction, plan.epsilon)
        if reduction.centered or x.dtype.itemsize > 2 or scale is None or plan.cast_before_scale:
            y = _affine_of(plan, d * r, scale, bias)
        else:  # of 16 bits the loop is faster if r is in the scale
            y = affine(d, r * effective_scale(scale, plan.scale_offset, d.dtype), bias, 0.0, plan.dtype)
        return unless_overflowed(y, lambda: _affine_of(plan, careful(x), scale, bias), reduction.axes)

    whole = lambda f: lambda x, scale, bias, *stats: _affine_of(plan, f(x, *stats), scale, bias)
    on = {platform: whole(f) for platform, f in formulas.items()} | dict(cpu=on_cpu)
    return by_platform(reduction, x, scale, bias, *stats[1:], default=whole(of), **on)


def xhat_and_r(plan: Plan, x, mask, weights, stats: Statistics, ids=None) -> tuple[Array, Array]:
    """xhat, and r in the shape of the statistics."""
    reduction, keep = plan.reduction, valid_mask(mask, weights)
    over, n = reduction.over, count_of(reduction, x, mask, weights, stats)
    d = deviation(x, keep, over.spread(stats.mean_hi, ids), over.spread(stats.mean_lo, ids))
    if reduction.large_prescale is None:
        # A sum that overflowed makes NaN. But for rows of RMS norm, where XLA would cut its kernel for a GPU in three.
        bare = not reduction.centered and isinstance(over, Axes) and are_last(x, over.axes)
        m2 = stats.m2 if bare else nan_if_infinite(stats.m2)
        r = rsqrt(m2, n, reduction.prescale, plan.epsilon).astype(d.dtype)
    else:
        r = rsqrt_of_root(stats.m2, jnp.asarray(n), plan.epsilon).astype(d.dtype)
    xhat = d * over.spread(r, ids)
    if reduction.large_prescale is not None and keep is not None and not jnp.iscomplexobj(xhat):
        xhat = jnp.clip(xhat, -1e30, 1e30)  # of what is absent: if infinite, a cotangent of 0 would give NaN
    return xhat, r


def output_tangent(plan: Plan, x, mask, weights, stats: Statistics, scale, tangents, ids=None) -> Array:
    """The tangent of y; None is a tangent of zero. With s = scale + scale_offset, and means over all devices,

        dy = s r dx + xhat (dscale - s mean(w xhat r dx)) + (dbias - s mean(w r dx))

    and further terms where weights have a tangent. Written so that, where s is constant along the reduced axes, the
    two brackets are as small as the statistics: their transposes are then sum(g xhat) and sum(g), the gradients of
    scale and bias, and dx = s r (g - sum(g)/N - xhat sum(g xhat)/N) costs one all-reduce for both.
    """
    dx, dscale, dbias, dweights = tangents
    reduction = plan.reduction
    n = nonzero_divisor(count_of(reduction, x, mask, weights, stats))
    xhat, r = xhat_and_r(plan, x, mask, weights, stats, ids)
    at_x = functools.partial(reduction.over.spread, ids=ids)
    s = effective_scale(scale, plan.scale_offset, xhat.dtype)
    wide = widest(s.dtype, *(t.dtype for t in (dscale, dbias) if t is not None))
    s, times, plus, direct = s.astype(wide), [], [], 0.0
    columns = not reduction.plain and isinstance(reduction.over, Axes) and not are_last(x, reduction.axes)
    # Where s varies along them, as with channels in front, XLA for CPU would sum and multiply in one slow loop; not if
    # there is a select between. Where r is NaN, so is dy by its other terms.
    columns = columns and any(s.ndim and s.shape[a] != 1 for a in reduction.axes)
    apart = (lambda a: where(r == r, a, 0.0)) if columns else lambda a: a
    if dx is not None or dweights is not None:
        dx = None if dx is None else at_x(r) * zero_where_padding(x, valid_mask(mask, weights), dx.astype(xhat.dtype))
        dn, d1, d2 = tangent_sums(reduction, xhat, mask, weights, dx, dweights, ids)
        if dweights is not None:
            if reduction.large_prescale is None:
                in_unit = r.real / reduction.prescale
                share = ((stats.m2 / n) * in_unit) * in_unit  # var / (var + epsilon), with derivatives in range
            else:
                share = share_of_root(stats.m2, stats.count, plan.epsilon)
            d2 = d2 - dn * share
        times.append(-s * at_x(apart((d2 / (2.0 * n)).astype(wide))))
        if reduction.centered:
            plus.append(-s * at_x(apart((d1 / n.astype(xhat.dtype)).astype(wide))))
    if dx is not None:
        direct = s * dx.astype(wide)
    if dscale is not None:
        times.append(dscale.astype(wide))
    if dbias is not None:
        plus.append(dbias.astype(wide))
    times, plus = (_reduce_before_broadcast(terms, x, reduction.plain) if terms else None for terms in (times, plus))
    dy: Any = direct + (0.0 if times is None else xhat.astype(wide) * times) + (0.0 if plus is None else plus)
    return broadcast_like(x, dy).astype(plan.dtype)


def _reduce_before_broadcast(terms: list[Array], x: Array, plain: bool) -> Array:
    """The sum of a bracket's terms. Where it is far smaller than x, the sums in their transposes are of its cotangent.

    XLA would join two sums in a row into one over all of x, and so lose what the sums for dx and dscale share; barriers
    keep them apart. The sum over x is by `split_axes` where it has some.
    """
    bracket = functools.reduce(lambda a, b: a + b, terms)
    ratio = math.prod(n for n, m in zip(x.shape, bracket.shape, strict=True) if m == 1 != n)
    if plain or (are_static(ratio) and ratio < 16):
        return bracket
    bracket = lax.optimization_barrier(pvary_like(x, bracket))  # else the parts are summed over devices, one and all
    axes = tuple(a for a, n in enumerate(bracket.shape) if n == 1 != x.shape[a])
    if apart := split_axes(x, axes):
        part = tuple(x.shape[a] if a in apart else n for a, n in enumerate(bracket.shape))
        bracket = lax.optimization_barrier(jnp.broadcast_to(bracket, part))
    return bracket
