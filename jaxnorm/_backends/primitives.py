"""A norm as three primitives that a kernel backend may run: forward, tangent, backward, and JAX's rules for them.

    forward(x, scale, bias) -> y, mean_hi, mean_lo, m2          statistics and output in one go
    tangent(x, statistics, scale, dx, dscale, dbias) -> dy   linear in the last three
    backward(x, statistics, scale, g) -> dx, dscale, dbias   its transpose

A mask and weights are further operands of all three; forward then gives the counts as well, which the others get.
Of a plan with a format, forward is another primitive:

    quantize(x, scale, bias, given) -> data, found, mean_hi, mean_lo, m2    see `_ops.quantize.quantized_rows`

With a residual stream, which backends that know of none never see, they are those of the norm of a sum:

    forward(x, scale, bias, residual) -> y, mean_hi, mean_lo, m2, new               new = x + residual, rounded
    tangent(new, statistics, scale, dnew, dscale, dbias) -> dy, dnew             so that the transpose
    backward(new, statistics, scale, g, g_stream) -> dnew, dscale, dbias         gets the cotangents of both

Their meaning is that of two formulas in plain `jax.numpy`, handed to `Fused`: derivatives of them, other platforms and
small arrays take the formulas. Kernels run where a backend takes the shape, which is decided as a program is lowered.
What the backward pass keeps is what tangent gets before its last three: x in its own dtype, and row statistics.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from .._core.dtypes import accumulator
from .._core.types import Plan, Statistics
from .._core.vma import broadcast_like, is_explicit, pvary_all, pvary_like, shard_like, with_leading_axis
from .call import BACKWARD_OF_SUM, FORWARD_OF_SUM, QUANTIZE, TANGENT, Call, packed
from .partition import Collectives
from .registry import by_devices, check_platform, register
from .rules import compiled, jvp_by_formula

Array = jax.Array


class Fused:
    """The three primitives over a pair of formulas.

    Args:
      output: (recipe, x, scale, bias, mask, weights) -> (y, Statistics), one device's.
      tangent: (recipe, x, statistics, scale, mask, weights, (dx, dscale, dbias)) -> dy, linear in the last; None is a
        tangent of zero.
      add: (x, residual) -> the new stream.
      quantized: (plan, x, scale, bias, given) -> ((data, found), Statistics), one device's.
      collectives: what merges statistics and sums over mesh axes.
    """

    def __init__(
        self, output: Callable, tangent: Callable, add: Callable, quantized: Callable, collectives: Collectives
    ):
        self._output, self._tangent, self._add, self._collectives = output, tangent, add, collectives
        self._quantized = quantized
        self._forward_p = self._primitive("norm_forward", self._forward_formula, _forward_types, "forward")
        self._quantize_p = self._primitive("norm_quantize", self._quantize_formula, _quantize_types, "quantize")
        self._tangent_p = self._primitive("norm_tangent", self._tangent_formula, _tangent_types)
        self._backward_p = self._primitive("norm_backward", self._backward_formula, _backward_types, "backward")
        ad.primitive_jvps[self._tangent_p] = self._tangent_jvp
        ad.primitive_transposes[self._tangent_p] = self._tangent_transpose
        self._backward = jax.custom_jvp(self._bind_backward, nondiff_argnums=(0, 1))
        self._backward.defjvp(self._backward_jvp)

    # --- what is called -----------------------------------------------------------------------------------------------

    def forward(
        self, plan: Plan, x, scale, bias, mask=None, weights=None, residual=None, given=None
    ) -> tuple[Any, Statistics, Array | None]:
        """y, the statistics, and the new stream where there is a residual. With a format y is (data, found)."""
        if plan.quantize is not None:
            data, found, *stats = _bind(self._quantize_p, plan, QUANTIZE, x, scale, bias, given)
            return (data, found), Statistics(_count(plan, x), *stats), None
        operands = x, scale, bias, mask, weights, residual
        y, mean_hi, mean_lo, m2, *more = _bind(self._forward_p, plan, FORWARD_OF_SUM, *operands)
        new = None if residual is None else more.pop()
        count = more[0] if more else _count(plan, x if new is None else new)
        return y, Statistics(count, mean_hi, mean_lo, m2), new

    def tangent(self, plan: Plan, x, stats: Statistics, scale, mask, weights, tangents) -> Array:
        count = stats.count if mask is not None or weights is not None else None
        return _bind(self._tangent_p, plan, TANGENT, x, count, *stats[1:], scale, mask, weights, *tangents)[0]

    def tangent_of_sum(self, plan: Plan, new, stats: Statistics, scale, tangents) -> tuple[Array, Array]:
        """The tangent of y, and that of the new stream, as it comes."""
        operands = new, None, *stats[1:], scale, None, None
        dy, dnew = _bind(self._tangent_p, plan, TANGENT, *operands, *tangents, of_sum=True)
        return dy, dnew

    # --- what they mean -----------------------------------------------------------------------------------------------

    def _forward_formula(self, *operands, call: Call):
        x, scale, bias, mask, weights, residual = call.unpacked(operands, FORWARD_OF_SUM)
        x = x if residual is None else self._add(x, residual)
        y, (count, *parts) = self._output(call.plan, x, scale, bias, mask, weights)
        counts = [broadcast_like(parts[0], count)] * call.is_weighted
        return y, *parts, *counts, *[x] * (residual is not None)

    def _quantize_formula(self, *operands, call: Call):
        (data, found), stats = self._quantized(call.plan, *call.unpacked(operands, QUANTIZE))
        return data, found, *stats[1:]

    def _tangent_formula(self, *operands, call: Call):
        x, count, *stats, scale, mask, weights, dx, dscale, dbias = call.unpacked(operands, TANGENT)
        stats = Statistics(_count(call.plan, x) if count is None else count, *stats)
        dy = self._tangent(call.plan, x, stats, scale, mask, weights, (dx, dscale, dbias))
        return (dy, dx) if call.of_sum else (dy,)

    def _backward_formula(self, *operands, call: Call):
        """The transpose of the tangent, by JAX; with that of a stream added to it before it is rounded."""
        x, count, *stats, scale, g, mask, weights, g_stream = call.unpacked(operands, BACKWARD_OF_SUM)
        stats = Statistics(_count(call.plan, x) if count is None else count, *stats)
        zero = lambda shape: pvary_like(x, shard_like(x, jnp.zeros(shape, accumulator(x))))
        along = lambda *tangents: self._tangent(call.plan, x, stats, scale, mask, weights, tangents)
        still = jnp.zeros_like(x, None if g_stream is None else accumulator(x))
        dx, *gradients = jax.vjp(along, still, *(None if s is None else zero(s) for s in call.grad_shapes))[1](g)
        dx = dx if g_stream is None else (dx + g_stream.astype(dx.dtype)).astype(x.dtype)
        return dx, *(d for d in gradients if d is not None)

    # --- rules --------------------------------------------------------------------------------------------------------

    def _primitive(self, name: str, formula: Callable, types: Callable, kernel: str | None = None) -> Primitive:
        primitive = Primitive(name)
        primitive.multiple_results = True
        primitive.def_impl(compiled(primitive, formula))
        primitive.def_abstract_eval(types)
        batching.primitive_batchers[primitive] = functools.partial(_batched, primitive)
        mlir.register_lowering(primitive, _elsewhere(mlir.lower_fun(formula, multiple_results=True)))
        if kernel is not None:
            register(primitive, kernel, formula, self._add, self._collectives)
        return primitive

    def _tangent_jvp(self, primals, tangents, *, call: Call):
        return jvp_by_formula(self._tangent_p, self._tangent_formula, primals, tangents, call)

    def _tangent_transpose(self, cotangents, *operands, call: Call):
        g, g_stream = (None if isinstance(g, ad.Zero) else g for g in (*cotangents, *[None] * (not call.of_sum)))
        there = dict(zip(call.operand_names, operands, strict=True))
        if g is None:
            return [g_stream if name == "dx" and ad.is_undefined_primal(a) else None for name, a in there.items()]
        linear = {n: there[n].aval for n in ("dx", "dscale", "dbias") if ad.is_undefined_primal(there.get(n))}
        grad_shapes = [name for name in ("dscale", "dbias") if name in linear]
        shapes = tuple(linear[n].shape if n in linear else None for n in ("dscale", "dbias"))
        given = there | {"g": g, "g_stream": g_stream}
        known = [given.get(name) for name in BACKWARD_OF_SUM]
        found = dict(zip(["dx", *grad_shapes], self._backward(call.plan, shapes, *known), strict=True))
        return [_like(found[name], linear[name]) if name in linear else None for name in call.operand_names]

    def _bind_backward(self, plan: Plan, grad_shapes, *operands):
        return tuple(_bind(self._backward_p, plan, BACKWARD_OF_SUM, *operands, grad_shapes=grad_shapes))

    def _backward_jvp(self, plan: Plan, grad_shapes, primals, tangents):
        (names, at), (_, along) = (packed(BACKWARD_OF_SUM, args) for args in (primals, tangents))
        formula = functools.partial(self._backward_formula, call=Call(plan, names, grad_shapes))
        return self._backward(plan, grad_shapes, *primals), jax.jvp(formula, at, along)[1]


def _bind(primitive: Primitive, plan: Plan, order, *operands, **static) -> list[Array]:
    names, there = packed(order, operands)
    return primitive.bind(*pvary_all(*there), call=Call(plan, names, **static))


def _batched(primitive: Primitive, operands, dims, *, call: Call):
    """A new axis of x is more examples: it goes to the front, and the axes reduced move on."""
    size = next(a.shape[d] for a, d in zip(operands, dims, strict=True) if d is not None)
    each = any(s is not None for s in call.grad_shapes)  # then there is a gradient for each of the new axis
    entries = [jax.typeof(a).sharding.spec[d] for a, d in zip(operands, dims, strict=True) if d is not None]
    entry = next((e for e in entries if e is not None), None)  # how the new axis is sharded, on an Explicit mesh

    def in_front(i: int, a: Array, d: int | None) -> Array:
        if d is not None:
            return jnp.moveaxis(a, d, 0)
        one = call.broadcasts(i) and not (each and call.is_parameter(i))
        return with_leading_axis(a, 1 if one else size, None if one else entry)

    operands = [in_front(i, a, d) for i, (a, d) in enumerate(zip(operands, dims, strict=True))]
    out = primitive.bind(*pvary_all(*operands), call=call.batched(size))
    return out, [0] * len(out)


def _elsewhere(lower: Callable) -> Callable:
    """The lowering where no backend has one of its own."""

    def rule(context, *operands, call: Call):
        check_platform(context, call)
        return lower(context, *operands, call=by_devices(context, call))

    return rule


def _count(plan: Plan, x) -> Array:
    names = plan.reduction.axis_name
    n = math.prod([x.shape[a] for a in plan.reduction.axes]) * (1 if names is None else lax.axis_size(names))
    return jnp.full((1,) * x.ndim, n, jnp.finfo(accumulator(x)).dtype)


def _like(gradient: Array, aval) -> Array:
    """A gradient in the dtype and, on an Explicit mesh, with the sharding that its operand has.

    There it is resharded also from that very sharding, by which XLA knows it. XLA chooses the shardings of the kernel's
    results otherwise: by what becomes of the gradient of scale, it may compute dx in parts that it has to gather.
    """
    gradient = gradient.astype(aval.dtype)
    return jax.sharding.reshard(gradient, aval.sharding) if is_explicit(aval.sharding.mesh) else gradient


# --- types ------------------------------------------------------------------------------------------------------------


def _typed(x, shape: tuple[int, ...], dtype):
    """x's type in another shape of its rank: axes of size 1, or of another size than x's, are not sharded."""
    spec = P(*(s if n == m and n != 1 else None for n, m, s in zip(shape, x.shape, x.sharding.spec, strict=True)))
    return x.update(shape=shape, dtype=dtype, weak_type=False, sharding=NamedSharding(x.sharding.mesh, spec))


def _forward_types(*operands, call: Call):
    x, residual = call.of("x", operands), call.of("residual", operands)
    reduced = tuple(1 if a in call.plan.reduction.axes else n for a, n in enumerate(x.shape))
    new = x if residual is None else _typed(x, x.shape, residual.dtype)
    statistics = [_typed(x, reduced, accumulator(new))] * (4 if call.is_weighted else 3)
    return [_typed(x, x.shape, call.plan.dtype), *statistics, *[new] * (residual is not None)]


def _quantize_types(x, *rest, call: Call):
    fmt, axes = call.plan.quantize, call.plan.reduction.axes
    reduced = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
    blocks = (*x.shape[:-1], x.shape[-1] // fmt.block)
    found = _typed(x, blocks if fmt.per == "block" else reduced, fmt.found)
    return [_typed(x, x.shape, fmt.kind), found, *[_typed(x, reduced, accumulator(x))] * 3]


def _tangent_types(x, *rest, call: Call):
    return [_typed(x, x.shape, call.plan.dtype), *[_typed(x, x.shape, x.dtype)] * call.of_sum]


def _backward_types(x, *rest, call: Call):
    return [_typed(x, x.shape, x.dtype), *(_typed(x, s, accumulator(x)) for s in call.grad_shapes if s is not None)]
