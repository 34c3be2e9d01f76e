"""Norms of segments that are affine in x, by kernels that know of segments but of no norm.

What a norm makes of an element is y = u a + b, u = (x - shift) r. shift is the mean of the segment, and r a power of
two near 1 / deviation; a and b follow from the statistics and the parameters, on tables of the segments. Kernels take
the statistics, and y; for the backward pass the sums of g u and of g, whose pullback through the tables gives dx.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._backends import registry
from .._backends.cpu import segments as cpu
from .._backends.segments import LinesView, OfSegments, SegmentCall, lines_of
from .._core.arithmetic import nonzero_divisor
from .._core.dtypes import accumulator, widest
from .._core.over import Segments
from .._core.types import Plan, Statistics
from .._core.vma import spec_of, tangent_like
from .elementwise import OfElements, Whole, output_of, tangent_of, unit_of
from .formula import effective_scale
from .statistics import drop_symbolic_zeros, statistics, statistics_tangent

Array = jax.Array


def takes_segments(plan: Plan, x, params) -> bool:
    """Whether some platform has kernels for this norm, whose f is affine in x. There is no mask but that of ids."""
    over, reduction = plan.reduction.over, plan.reduction
    if plan.backend is not None or plan.activation is not None or plan.cast_before_scale:
        return False
    if not isinstance(over, Segments) or reduction.axis_name is not None or jnp.iscomplexobj(x) or any(spec_of(x)):
        return False
    view, acc = lines_of(x.shape, over), accumulator(x)
    if view is None or not _Cpu.is_there(x, plan.dtype):
        return False
    of_rows = x.ndim - view.axes
    alike = [p.shape[:of_rows] == (1,) * of_rows and widest(p.dtype, acc) == acc for p in jax.tree.leaves(params)]
    return all(alike)


def standardized(x: Array, of: OfElements, affine, epsilon: float) -> Array:
    return affine(of.standardize(x, epsilon))


def normalize_segments(f: Whole, x: Array, params: Any, ids: Array) -> Array:
    """f(x, statistics, params), of an f that is affine in x."""
    leaves, tree = jax.tree.flatten(params)
    return _by_segments(SegmentCall(f.plan, f, tree), x, ids, tuple(leaves))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _by_segments(call: SegmentCall, x: Array, ids: Array, leaves: tuple[Array, ...]) -> Array:
    return primitives.forward(call, x, ids, leaves)[0]


@functools.partial(_by_segments.defjvp, symbolic_zeros=True)
def _(call, primals, tangents):
    (y, _), _, dy = _with_tangent(call, primals, tangents)
    return y, dy


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable(call: SegmentCall, x: Array, ids: Array, leaves: tuple[Array, ...]) -> tuple[Array, Statistics]:
    """The same and its statistics, with their derivatives: what derivatives of higher order are made of."""
    return primitives.forward(call, x, ids, leaves)


@functools.partial(_differentiable.defjvp, symbolic_zeros=True)
def _(call, primals, tangents):
    (y, stats), dx, dy = _with_tangent(call, primals, tangents)
    dstats = jax.tree.map(jnp.zeros_like, stats)
    if dx is not None:
        reduction = call.plan.reduction
        of_statistics = jax.checkpoint(functools.partial(statistics_tangent, reduction), prevent_cse=False)
        x, ids, _ = primals
        dstats = of_statistics(x, call.over.present(None, ids), None, stats, dx, None, ids)
    return (y, stats), (dy, dstats)


def _with_tangent(call: SegmentCall, primals, tangents):
    x, ids, leaves = primals
    dx, *dleaves = drop_symbolic_zeros((tangents[0], *tangents[2]))
    y, stats = _differentiable(call, x, ids, leaves)
    moving = any(t is not None for t in (dx, *dleaves))
    dy = primitives.tangent(call, x, ids, stats, leaves, (dx, *dleaves)) if moving else jnp.zeros_like(y)
    return (y, stats), dx, tangent_like(y, dy)


# --- the formulas -----------------------------------------------------------------------------------------------------


def _output(call: SegmentCall, x: Array, ids: Array, leaves) -> tuple[Array, Statistics]:
    mask, params = call.over.present(None, ids), jax.tree.unflatten(call.tree, leaves)
    stats = statistics(call.plan.reduction, x, mask, None, ids)
    y = output_of(call.f, (call.plan.reduction,), call.plan.dtype, x, mask, None, (stats,), params, ids)
    return y, Statistics(*(jnp.broadcast_to(a, call.over.shape(x.shape)) for a in stats))


def _tangent(call: SegmentCall, x, ids, stats: Statistics, leaves, dx, dleaves) -> Array:
    mask, params = call.over.present(None, ids), jax.tree.unflatten(call.tree, leaves)
    given = x, mask, None, (stats,), params, ids, (dx, None, dleaves)
    return tangent_of(call.f, (call.plan.reduction,), (False,), call.plan.dtype, *given)


# --- by kernels -------------------------------------------------------------------------------------------------------


def _tables(call: SegmentCall, x, view: LinesView, stats: Statistics, dm2, unit, leaves):
    """shift, r, a and b for each segment, in the last row for what is absent."""
    over, reduction = call.over, call.plan.reduction
    row = over.rows - 1
    one_more: Any = lambda s: None if s is None else jnp.pad(s, [(0, int(a == row)) for a in range(s.ndim)])
    of = OfElements(Statistics(*map(one_more, stats)), reduction, None, one_more(dm2), one_more(unit))
    spread = lax.stop_gradient(of.spread())
    usable = (spread > 1e-35) & (spread < 1e35)
    r = lax.reduce_precision(1.0 / jnp.where(usable, spread, 1.0), 8, 0)
    shape = list(x.shape)
    shape[: over.rows] = [*[1] * row, view.segments + 1]
    between = slice(over.rows, x.ndim - view.axes)
    shape[between] = [1] * len(shape[between])
    params = jax.tree.unflatten(call.tree, leaves)
    shift, step = (jnp.broadcast_to(s, shape) for s in (of.parts.mean_hi, 1.0 / r))
    b, a = jax.jvp(lambda x: jnp.broadcast_to(call.f(x, of, params), shape), (shift,), (step,))
    dtype = accumulator(x)
    return [s.astype(dtype).reshape(view.table) for s in (shift, jnp.broadcast_to(r, shape), a, b)]


def _ids_of_lines(x, view: LinesView, ids: Array, call: SegmentCall) -> Array:
    """An id for each line."""
    ids = ids.reshape(-1)
    return jnp.repeat(ids, view.lines // ids.size, total_repeat_length=view.lines).astype(jnp.int32)


def _forward_by(kernels, x, ids, *leaves, call: SegmentCall):
    view = lines_of(x.shape, call.over)
    assert view is not None
    lines, reduction = _ids_of_lines(x, view, ids, call), call.plan.reduction
    mean_hi, mean_lo, m2, count = kernels.moments(view, call.plan, x, lines)
    stats = Statistics(*(a.reshape(call.over.shape(x.shape)) for a in (count, mean_hi, mean_lo, m2)))
    unit = unit_of(reduction, stats)
    dm2 = None if unit is None else jnp.zeros_like(stats.m2)
    tables = _tables(call, x, view, stats, dm2, unit, leaves)
    return kernels.normalize(view, call.plan.dtype, x, lines, *tables), *stats


def _backward_by(kernels, x, ids, count, mean_hi, mean_lo, m2, *rest, call: SegmentCall):
    *leaves, g = rest
    view, reduction = lines_of(x.shape, call.over), call.plan.reduction
    assert view is not None
    stats, lines = Statistics(count, mean_hi, mean_lo, m2), _ids_of_lines(x, view, ids, call)
    unit = unit_of(reduction, stats)

    def tables(mean_lo, m2, leaves):
        now = stats._replace(mean_lo=mean_lo, m2=m2 if unit is None else stats.m2)
        return _tables(call, x, view, now, None if unit is None else m2, unit, leaves)

    (shift, r, a, _), pull = jax.vjp(tables, mean_lo, m2 if unit is None else jnp.zeros_like(m2), leaves)
    gu, of_g = kernels.gradient_sums(view, x, g, lines, shift, r)
    dlo, dm2, dleaves = pull([jnp.zeros_like(shift), jnp.zeros_like(r), gu, of_g])
    out = []
    if call.moving[0]:
        n = nonzero_divisor(count)
        dlo = dlo / n if reduction.centered else jnp.zeros_like(dlo)
        columns = lambda s: jnp.pad(jnp.repeat(s.reshape(view.segments, view.groups), view.each, 1), ((0, 1), (0, 0)))
        scaled = (reduction.prescale if unit is None else columns(unit)) / r
        p = -2.0 * (scaled * columns(dm2)) * scaled
        q = -(columns(dlo) / r + p * r * columns(mean_lo))
        out.append(kernels.gradient(view, x, g, lines, shift, r, a, p, q))
    return *out, *(d for d, moves in zip(dleaves, call.moving[1:], strict=True) if moves)


def _columns(call: SegmentCall, x, view: LinesView, leaves) -> tuple[Array, Array]:
    """The scale and the bias of each column."""
    scale, bias = jax.tree.unflatten(call.tree, leaves)
    wide, shape = accumulator(x), x.shape[x.ndim - view.axes :]
    flat = lambda p: jnp.broadcast_to(p.astype(wide).reshape(p.shape[p.ndim - view.axes :] or ()), shape).reshape(-1)
    scale = effective_scale(scale, call.plan.scale_offset, wide)
    return flat(scale), flat(jnp.zeros((), wide) if bias is None else bias)


def _forward_plain(x, ids, *leaves, call: SegmentCall):
    view = lines_of(x.shape, call.over)
    assert view is not None
    lines, given = _ids_of_lines(x, view, ids, call), _columns(call, x, view, leaves)
    y, mean_hi, mean_lo, m2, count = cpu.forward(view, call.plan, x, lines, *given)
    return y, *(a.reshape(call.over.shape(x.shape)) for a in (count, mean_hi, mean_lo, m2))


def _backward_plain(x, ids, count, mean_hi, mean_lo, m2, *rest, call: SegmentCall):
    *leaves, g = rest
    view = lines_of(x.shape, call.over)
    assert view is not None
    (scale, _), pull = jax.vjp(lambda leaves: _columns(call, x, view, leaves), leaves)
    of_groups = lambda a: a.reshape(view.segments, view.groups)
    lines = _ids_of_lines(x, view, ids, call)
    hi, lo, square, counts = map(of_groups, (mean_hi, mean_lo, m2, count))
    dx, *sums = cpu.backward(view, call.plan, x, g, lines, hi, lo, square, counts, scale)
    found = [dx, *pull(tuple(sums))[0]]
    return [d for d, moves in zip(found, call.moving, strict=True) if moves]


class _Cpu:
    """The C++ kernels, with one call each way for the plain norm."""

    @staticmethod
    def forward(*operands, call: SegmentCall):
        if call.f.f is standardized:
            return _forward_plain(*operands, call=call)
        return _forward_by(cpu, *operands, call=call)

    @staticmethod
    def backward(*operands, call: SegmentCall):
        if call.f.f is standardized:
            return _backward_plain(*operands, call=call)
        return _backward_by(cpu, *operands, call=call)

    @staticmethod
    def is_there(x, dtype) -> bool:
        return registry.is_active(registry.BACKENDS["native"]) and cpu.unsupported_reason(x, dtype) is None

    @staticmethod
    def takes(call: SegmentCall, x) -> bool:
        return _Cpu.is_there(x, call.plan.dtype) and lines_of(x.shape, call.over) is not None


primitives = OfSegments(_output, _tangent, {"cpu": _Cpu})
