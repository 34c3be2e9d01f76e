"""From statistics to output: the affine arithmetic, its one rounding, and the derivatives of the whole.

Legend: x is any shape; scale and bias have x's rank and broadcast against it; r = 1 / sqrt(var + epsilon);
xhat = (x - mean) r. All arithmetic is in float32 or wider; the output is rounded once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import _activation
from ._activation import Activation, check_activation, jvp_or_none
from ._checks import (
    align_param,
    as_float_array,
    canonicalize_axes,
    canonicalize_dtype,
    canonicalize_epsilon,
    canonicalize_number,
)
from ._exported import exported
from ._habits import explained
from ._kernels import check_implementation, registry, xla
from ._kernels.fused import Fused
from ._kernels.partition import Collectives
from ._kernels.varying import broadcast_like, pvary_like, shard_like, tangent_like, varying
from ._kernels.xla import Plan, Statistics, nonzero_divisor, widest
from ._moments import (
    drop_symbolic_zeros,
    merge_over_devices,
    psum_grouped,
    statistics,
    statistics_tangent,
    tangent_sums,
)
from ._stream import add_rounded, add_rounded_tangent, round_to

Array = jax.Array


@exported
class Affine(NamedTuple):
    """A scale and a bias, each of the feature shape or None. The `params` of every norm, and what a norm folds into."""

    scale: Array | None  # feature shape, any floating dtype
    bias: Array | None  # the same


def rsqrt(m2: Array, n: Array, prescale: float, epsilon: float) -> Array:
    """r = 1 / sqrt(var + epsilon), from m2 in squared units; 0 where nothing was counted, and where var + epsilon is 0.

    A group of nothing, and a constant one without epsilon, so come out as the bias.
    """
    least = epsilon * prescale**2
    v = m2 / nonzero_divisor(n) + least
    void = n == 0
    if least < jnp.finfo(v.dtype).tiny:  # else v is never 0, and a select would cut XLA's kernels for rows on a GPU
        void |= v == 0
    return jnp.where(void, 0.0, prescale * _rsqrt(jnp.where(void, 1.0, v)))


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
    larger = xla.nan_if_infinite(larger)
    r = lax.rsqrt(1.0 + jnp.square(jnp.minimum(spread, least) / larger)) / larger
    return jnp.where(void, 0.0, r)


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


def affine(xhat, scale, bias, scale_offset: float, dtype, cast_before_scale: bool = False) -> Array:
    """y = xhat (scale + scale_offset) + bias, rounded once (or also before scale)."""
    y = round_to(xhat, dtype) if cast_before_scale else xhat
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
    return scale.astype(widest(dtype, scale.dtype)) + scale_offset


def standardize(
    norm: str, plan: Plan, x: Array, scale: Array | None, bias: Array | None, mask=None, weights=None, gate=None
) -> tuple[Array, Statistics]:
    """Normalize x by its own statistics. Returns the output, and the statistics as constants, without a derivative.

    For the backward pass only x (and a gate), in its own dtype, and the statistics are kept.
    """
    if plan.activation is not None:
        plain = _inner_plan(plan, x, scale, bias, gate)
        seen = jax.eval_shape(functools.partial(_activation.prologue, plan), x, gate, None)
        by_kernel = _backend_supports(norm, plain, seen, scale, bias, mask, weights)
        if by_kernel:
            plain, scale, bias = _prepare_for_kernel(plain, seen, scale, bias)
        return _with_epilogue(plan, plain, by_kernel, x, scale, bias, mask, weights, gate)
    if _backend_supports(norm, plan, x, scale, bias, mask, weights):
        plan, scale, bias = _prepare_for_kernel(plan, x, scale, bias)
        return _by_kernel(plan, x, scale, bias, None)[:2]
    return _by_xla(plan, x, scale, bias, mask, weights)


def add_and_standardize(norm: str, plan: Plan, x, residual, scale, bias) -> tuple[Array, Array]:
    """`standardize` of a residual stream with x added to it, and that stream, by a backend that does both in one go."""
    stream = jax.ShapeDtypeStruct(x.shape, residual.dtype)
    for seen in (x, stream):  # which is refused, or the backend takes it: it is named
        _backend_supports(norm, plan, seen, scale, bias, None, None)
    plan, scale, bias = _prepare_for_kernel(plan, stream, scale, bias)
    y, _, new = _by_kernel(plan, x, scale, bias, residual)
    assert new is not None
    return y, new


def can_fuse_add(plan: Plan, x, residual, scale, bias, mask) -> bool:
    """Whether `standardize_sum` is there for this norm."""
    if mask is not None or plan.activation is not None:
        return False
    of_parameters = frozenset().union(*(varying(p) for p in (scale, bias) if p is not None))
    # Else the stream, which comes out of one primitive with y, would vary over what only the parameters vary over.
    return registry.fuses_add(plan.backend) and of_parameters <= varying(x) | varying(residual)


def _backend_supports(norm: str, plan: Plan, x, scale, bias, mask, weights) -> bool:
    """Whether a kernel backend takes this norm. One that is named takes it or says why not."""
    if plan.backend in ("xla", "lax"):
        return False
    refusal = registry.unsupported_reason(
        plan.backend or registry.DEFAULT, x, plan.reduction, plan.dtype, scale, bias, mask, weights
    )
    if refusal is not None and plan.backend is not None:
        raise ValueError(
            f"{norm}: implementation={plan.backend!r} cannot run here: {refusal}. Write implementation=None."
        )
    return refusal is None


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _by_xla(plan: Plan, x, scale, bias, mask, weights) -> tuple[Array, Statistics]:
    stats = statistics(plan.reduction, x, mask, weights)
    return _output(plan, x, mask, weights, stats, scale, bias), stats


@functools.partial(_by_xla.defjvp, symbolic_zeros=True)
def _(plan, primals, tangents):
    x, scale, bias, mask, weights = primals
    dx, dscale, dbias, _, dweights = drop_symbolic_zeros(tangents)
    plan = replace(plan, for_backward=True)
    stats = statistics(plan.reduction, x, mask, weights)
    y = _output(plan, x, mask, weights, stats, scale, bias)
    # Under checkpoint the map, linear in its last argument, keeps its other inputs for the backward pass and no more.
    tangent = xla.recompute(functools.partial(_output_tangent, plan), plan.reduction.plain)
    dy = tangent(x, mask, weights, stats, scale, (dx, dscale, dbias, dweights))
    return (y, stats), (tangent_like(y, dy), jax.tree.map(jnp.zeros_like, stats))


# The same where a kernel backend may run it: one primitive forward, and one, linear, for the tangent.


def _prepare_for_kernel(plan: Plan, x, scale, bias) -> tuple[Plan, Array | None, Array | None]:
    """The kernels' arithmetic has one dtype, and its scale no offset."""
    acc = xla.accumulator(x)
    scale = None if scale is None else effective_scale(scale, plan.scale_offset, acc)
    return replace(plan, scale_offset=0.0), scale, None if bias is None else bias.astype(acc)


_fused = Fused(
    output=lambda plan, x, scale, bias: _by_xla(plan, x, scale, bias, None, None),
    tangent=lambda plan, x, stats, scale, tangents: _output_tangent(
        plan, x, None, None, stats, scale, (*tangents, None)
    ),
    add=functools.partial(add_rounded, False),
    collectives=Collectives(
        merged=lambda stats, names, reduction: merge_over_devices(stats, names, None, reduction),
        summed=lambda parts, names: psum_grouped(parts, names, None),
    ),
)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _by_kernel(plan: Plan, x, scale, bias, residual) -> tuple[Array, Statistics, Array | None]:
    """y, the statistics, and, where there is a residual, its sum with x, which is then what y and they are of."""
    return _fused.forward(plan, x, scale, bias, residual)


@functools.partial(_by_kernel.defjvp, symbolic_zeros=True)
def _(plan, primals, tangents):
    (y, stats, new), _, (dy, dnew) = _by_kernel_with_tangent(plan, primals, drop_symbolic_zeros(tangents))
    return (y, stats, new), (dy, jax.tree.map(jnp.zeros_like, stats), dnew)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _by_kernel_differentiable(plan: Plan, x, scale, bias, residual) -> tuple[Array, Statistics, Array | None]:
    """The same, the statistics with their derivatives: what derivatives of higher order are made of."""
    return _fused.forward(plan, x, scale, bias, residual)


@functools.partial(_by_kernel_differentiable.defjvp, symbolic_zeros=True)
def _(plan, primals, tangents):
    (y, stats, new), (x, dx), (dy, dnew) = _by_kernel_with_tangent(plan, primals, drop_symbolic_zeros(tangents))
    of_statistics = jax.checkpoint(functools.partial(statistics_tangent, plan.reduction), prevent_cse=False)
    still = jax.tree.map(jnp.zeros_like, stats)
    return (y, stats, new), (dy, still if dx is None else of_statistics(x, None, None, stats, dx, None), dnew)


def _by_kernel_with_tangent(plan: Plan, primals, tangents):
    """What the backend gives; what is normalized, and its tangent; the tangents of y and of the new stream."""
    (x, scale, _, residual), (dx, dscale, dbias, dresidual) = primals, tangents
    plan = replace(plan, for_backward=True)
    y, stats, new = _by_kernel_differentiable(plan, *primals)
    if new is None:
        dy = _fused.tangent(plan, x, stats, scale, (dx, dscale, dbias))
        return (y, stats, None), (x, dx), (tangent_like(y, dy), None)
    dx = add_rounded_tangent(residual.dtype, dx, dresidual)
    if dx is None:
        dy, dnew = _fused.tangent(plan, new, stats, scale, (None, dscale, dbias)), jnp.zeros_like(new)
    else:
        dy, dnew = _fused.tangent_of_sum(plan, new, stats, scale, (dx, dscale, dbias))
    return (y, stats, new), (new, dx), (tangent_like(y, dy), tangent_like(new, dnew))


# --- with an activation or a gate around it, by either ----------------------------------------------------------------


def _inner_plan(plan: Plan, x, scale, bias, gate) -> Plan:
    """The norm within. What it gives is rounded where the output is, or where it is asked to be by name."""
    plain = replace(plan, activation=None, gate=None)
    if plan.gate == "before" or plan.cast_before_scale:
        return plain
    return replace(plain, dtype=widest(xla.accumulator(x), *(p.dtype for p in (scale, bias) if p is not None)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _with_epilogue(plan: Plan, plain: Plan, by_kernel: bool, x, scale, bias, mask, weights, gate):
    y, stats = _with_epilogue_differentiable(plan, plain, by_kernel, x, scale, bias, mask, weights, gate)
    return y, jax.tree.map(jax.lax.stop_gradient, stats)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _with_epilogue_differentiable(plan: Plan, plain: Plan, by_kernel: bool, x, scale, bias, mask, weights, gate):
    keep = xla.valid_mask(mask, weights)
    u = _activation.prologue(plan, x, gate, keep)
    if by_kernel:
        z, stats, _ = _by_kernel_differentiable(plain, u, scale, bias, None)
    else:
        stats = statistics(plain.reduction, u, mask, weights)
        z = _output(plain, u, mask, weights, stats, scale, bias)
    return _activation.epilogue(plan, _activation.widened(plan, z), gate, keep), stats


@functools.partial(_with_epilogue.defjvp, symbolic_zeros=True)
def _(plan, plain, by_kernel, primals, tangents):
    plain = replace(plain, for_backward=True)
    y, stats = _with_epilogue_differentiable(plan, plain, by_kernel, *primals)
    # As in the norm within: of what the map keeps, x and the gate alone have x's size. It makes z anew.
    tangent = xla.recompute(functools.partial(_with_epilogue_tangent, plan, plain, by_kernel), plan.reduction.plain)
    dy = tangent(stats, *primals, drop_symbolic_zeros(tangents))
    return (y, stats), (tangent_like(y, dy), jax.tree.map(jnp.zeros_like, stats))


def _with_epilogue_tangent(plan, plain, by_kernel, stats, x, scale, bias, mask, weights, gate, tangents) -> Array:
    """The tangent of y, by the chain rule over what is before the norm, the norm, and what is after it."""
    dx, dscale, dbias, _, dweights, dgate = tangents
    keep = xla.valid_mask(mask, weights)
    u, du = jvp_or_none(lambda x, gate: _activation.prologue(plan, x, gate, keep), (x, gate), (dx, dgate))
    z = _activation.widened(plan, _output(plain, u, mask, weights, stats, scale, bias))
    plain = replace(plain, dtype=z.dtype)  # the tangent of z is not rounded
    if all(t is None for t in (du, dscale, dbias, dweights)):
        dz = None
    elif by_kernel:
        dz = _fused.tangent(plain, u, stats, scale, (du, dscale, dbias))
    else:
        dz = _output_tangent(plain, u, mask, weights, stats, scale, (du, dscale, dbias, dweights))
    _, dy = jvp_or_none(lambda z, gate: _activation.epilogue(plan, z, gate, keep), (z, gate), (dz, dgate))
    return jnp.zeros(x.shape, plan.dtype) if dy is None else dy


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _output(plan: Plan, x, mask, weights, stats: Statistics, scale, bias) -> Array:
    if not plan.for_backward:
        stats = xla.statistics_of_output(x, mask, weights, stats, plan.reduction)
    xhat, _ = _xhat_and_r(plan, x, mask, weights, stats)
    return affine(xhat, scale, bias, plan.scale_offset, plan.dtype, plan.cast_before_scale)


def _xhat_and_r(plan: Plan, x, mask, weights, stats: Statistics) -> tuple[Array, Array]:
    reduction, keep = plan.reduction, xla.valid_mask(mask, weights)
    d = xla.deviation(x, keep, stats.mean_hi, stats.mean_lo)
    if reduction.large_prescale is None:
        # A sum that overflowed makes NaN. But for rows of RMS norm, where XLA would cut its kernel for a GPU in three.
        bare = not reduction.centered and xla.are_last(x, reduction.axes)
        m2 = stats.m2 if bare else xla.nan_if_infinite(stats.m2)
        r = rsqrt(m2, stats.count, reduction.prescale, plan.epsilon).astype(d.dtype)
    else:
        r = rsqrt_of_root(stats.m2, stats.count, plan.epsilon).astype(d.dtype)
    xhat = d * r
    if reduction.large_prescale is not None and keep is not None and not jnp.iscomplexobj(xhat):
        xhat = jnp.clip(xhat, -1e30, 1e30)  # of what is absent: if infinite, a cotangent of 0 would give NaN
    return xhat, r


def _output_tangent(plan: Plan, x, mask, weights, stats: Statistics, scale, tangents) -> Array:
    """The tangent of y; None is a tangent of zero. With s = scale + scale_offset, and means over all devices,

        dy = s r dx + xhat (dscale - s mean(w xhat r dx)) + (dbias - s mean(w r dx))

    and further terms where weights have a tangent. Written so that, where s is constant along the reduced axes, the
    two brackets are as small as the statistics: their transposes are then sum(g xhat) and sum(g), the gradients of
    scale and bias, and dx = s r (g - sum(g)/N - xhat sum(g xhat)/N) costs one all-reduce for both.
    """
    dx, dscale, dbias, dweights = tangents
    reduction, n = plan.reduction, nonzero_divisor(stats.count)
    xhat, r = _xhat_and_r(plan, x, mask, weights, stats)
    s = effective_scale(scale, plan.scale_offset, xhat.dtype)
    wide = widest(s.dtype, *(t.dtype for t in (dscale, dbias) if t is not None))
    s, times, plus, direct = s.astype(wide), [], [], 0.0
    if dx is not None or dweights is not None:
        dx = None if dx is None else r * xla.zero_where_padding(x, xla.valid_mask(mask, weights), dx.astype(xhat.dtype))
        dn, d1, d2 = tangent_sums(reduction, xhat, mask, weights, dx, dweights)
        if dweights is not None:
            if reduction.large_prescale is None:
                in_unit = r.real / reduction.prescale
                share = ((stats.m2 / n) * in_unit) * in_unit  # var / (var + epsilon), with derivatives in range
            else:
                share = share_of_root(stats.m2, stats.count, plan.epsilon)
            d2 = d2 - dn * share
        times.append(-s * (d2 / (2.0 * n)).astype(wide))
        if reduction.centered:
            plus.append(-s * (d1 / n.astype(xhat.dtype)).astype(wide))
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
    if plain or (xla.are_static(ratio) and ratio < 16):
        return bracket
    bracket = lax.optimization_barrier(pvary_like(x, bracket))  # else the parts are summed over devices, one and all
    axes = tuple(a for a, n in enumerate(bracket.shape) if n == 1 != x.shape[a])
    if apart := xla.split_axes(x, axes):
        part = tuple(x.shape[a] if a in apart else n for a, n in enumerate(bracket.shape))
        bracket = lax.optimization_barrier(jnp.broadcast_to(bracket, part))
    return bracket


@explained("function")
def normalize(
    x,
    mean,
    var,
    scale=None,
    bias=None,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    scale_offset: float = 0.0,
    activation: Activation | None = None,
    dtype=None,
    implementation: str | None = None,
) -> Array:
    """Normalize by statistics that are given, as batch norm does at inference.

        y = (x - mean) / sqrt(var + epsilon) * (scale + scale_offset) + bias,   then the activation, if there is one

    Args:
      x: array of any shape.
      mean: of the feature shape, or of a shape that broadcasts against x.
      var: the same; real.
      scale: the same, or None for 1.
      bias: the same, or None for 0.
      epsilon: added to the variance, in units of x squared; >= 0.
      scale_offset: added to scale in float32; 1.0 makes a zero-centred gamma.
      activation: of the output, before it is rounded: a name such as "relu", or an elementwise function; see
        `layer_norm`.
      axis: the feature axis or axes, where parameters of the feature shape belong.
      implementation: a backend of `jaxnorm.backends()`. All but "lax" are the same here.
      dtype: of the output; None is x's. The arithmetic is in float32 or wider.

    Raises:
      ValueError: a parameter that fits x nowhere, a bad epsilon, or a bad activation.

    >>> import jaxnorm as jn, numpy as np
    >>> jn.normalize(np.array([[1., 2.]]), np.array([1., 0.]), np.array([1., 4.]), epsilon=0.).tolist()
    [[0.0, 1.0]]
    """
    return normalize_given(
        x, mean, var, scale, bias, None, axis=axis, epsilon=epsilon, scale_offset=scale_offset, activation=activation,
        dtype=dtype, implementation=implementation,
    )  # fmt: skip


def normalize_given(
    x, mean, var, scale, bias, keep: Array | None, *, axis, epsilon, scale_offset, activation, dtype, implementation
) -> Array:
    """`normalize`. Padding, where `keep` is False, reaches no gradient. `keep` has x's rank."""
    x = as_float_array("normalize", x)
    axes = canonicalize_axes("normalize", x.ndim, axis)
    names = ("mean", "var", "scale", "bias")
    mean, var, scale, bias = (
        align_param("normalize", w, p, x.shape, axes) for w, p in zip(names, (mean, var, scale, bias), strict=True)
    )
    mean, var, scale, bias = (None if p is None else shard_like(x, p) for p in (mean, var, scale, bias))
    out = canonicalize_dtype("normalize", dtype, x, mean, scale, bias)
    check_activation("normalize", activation, x.shape, x.dtype)
    scale_offset = canonicalize_number("normalize", "scale_offset", scale_offset, "1.0")
    check_implementation("normalize", implementation)
    static = (canonicalize_epsilon("normalize", epsilon), scale_offset, activation, out)
    return _normalize_given(implementation == "lax", static, x, mean, var, scale, bias, keep)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _normalize_given(plain: bool, static, *arrays):
    """For the backward pass x in its own dtype is all that is kept of x's size."""
    return xla.recompute(functools.partial(_given, *static), plain)(*arrays)


def _given(epsilon, scale_offset, activation, dtype, x, mean, var, scale, bias, keep):
    acc = widest(xla.accumulator(x), mean.dtype, var.dtype)
    x, mean, var = x.astype(acc), mean.astype(acc), var.astype(jnp.finfo(acc).dtype)
    r = rsqrt(xla.nan_if_infinite(var), jnp.ones((), var.dtype), 1.0, epsilon)
    xhat = xla.deviation(x, keep, mean) * r.astype(acc)
    if activation is None:
        return affine(xhat, scale, bias, scale_offset, dtype)
    wide = widest(acc, *(p.dtype for p in (scale, bias) if p is not None))
    return _activation.activate_output(activation, affine(xhat, scale, bias, scale_offset, wide), keep).astype(dtype)


@explained("function")
def as_affine(mean, var, scale=None, bias=None, *, epsilon: float = 1e-5, scale_offset: float = 0.0) -> Affine:
    """The affine map that `normalize` is: y == x * affine.scale + affine.bias, to fold into a neighbouring layer.

        affine.scale = (scale + scale_offset) / sqrt(var + epsilon);   affine.bias = bias - mean * affine.scale

    All arguments are of the feature shape, or None for an absent scale or bias; the result is float32 or wider.

    >>> import jaxnorm as jn, numpy as np
    >>> folded = jn.as_affine(np.array([3.]), np.array([4.]), bias=np.array([1.]), epsilon=0.)
    >>> folded.scale.tolist(), folded.bias.tolist()
    ([0.5], [-0.5])
    """
    mean, var = (as_float_array("as_affine", a) for a in (mean, var))
    scale, bias = (None if p is None else jnp.asarray(p) for p in (scale, bias))
    wide = widest(jnp.float32, *(a.dtype for a in (mean, var, scale, bias) if a is not None))
    mean, var = mean.astype(wide), var.astype(jnp.finfo(wide).dtype)
    r = rsqrt(xla.nan_if_infinite(var), jnp.ones_like(var), 1.0, canonicalize_epsilon("as_affine", epsilon))
    s = effective_scale(scale, canonicalize_number("as_affine", "scale_offset", scale_offset, "1.0"), wide) * r.astype(
        wide
    )
    return Affine(s, -mean * s if bias is None else bias.astype(wide) - mean * s)
