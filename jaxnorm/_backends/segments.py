"""A norm of segments as three primitives that kernels may run: forward, tangent and backward, and JAX's rules for them.

    forward(x, ids, params) -> y, count, mean_hi, mean_lo, m2
    tangent(x, ids, statistics, params, dx, dparams) -> dy     linear in the last two
    backward(x, ids, statistics, params, g) -> dx, dparams     its transpose

As in `primitives`, their meaning is that of formulas in plain `jax.numpy`; derivatives of them, `vmap`, other platforms
and programs that jit spreads over devices take the formulas.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from .._core.dtypes import accumulator, are_static
from .._core.over import Segments
from .._core.types import Plan, Statistics
from .._core.vma import pvary_all, pvary_like, without_vma
from .rules import compiled, jvp_by_formula

Array = jax.Array


class LinesView(NamedTuple):
    """x as lines of columns: each line is of one segment, and its columns are groups that share a statistic."""

    lines: int
    groups: int
    each: int  # the columns of a group
    segments: int
    axes: int  # the last of x, which are its columns: 2 of groups, or 1

    @property
    def table(self) -> tuple[int, int]:
        """The shape of what has a value for each segment, and for absent lines, and for each column."""
        return self.segments + 1, self.groups * self.each


def lines_of(shape: tuple[int, ...], over: Segments) -> LinesView | None:
    """The view of an x of this shape; None without one."""
    rest = tuple(range(over.rows, len(shape)))
    if not rest or not are_static(*shape):
        return None
    last = rest[-1]
    grouped = last in over.axes and last - 1 in rest and last - 1 not in over.axes
    columns = rest[-2:] if grouped else rest[-1:]
    if any(a not in over.axes for a in rest[: -len(columns)]):
        return None
    width, each = math.prod(shape[a] for a in columns), shape[last] if last in over.axes else 1
    lines = math.prod(shape) // max(width, 1)
    if 0 in shape or over.num_segments > lines:
        return None
    return LinesView(lines, width // each, each, over.num_segments, len(columns))


@dataclass(frozen=True)
class SegmentCall:
    """What is static about one use of a primitive."""

    plan: Plan  # its reduction is over `Segments`
    f: Any  # (x, statistics, params) -> y, elementwise and affine in x
    tree: Any  # of the parameters
    moving: tuple[bool, ...] = ()  # of tangent and backward: whether x has a tangent, and each parameter

    @property
    def over(self) -> Segments:
        over = self.plan.reduction.over
        assert isinstance(over, Segments)
        return over


class OfSegments:
    """The three primitives over a pair of formulas.

    Args:
      output: (call, x, ids, leaves of the parameters) -> (y, Statistics).
      tangent: (call, x, ids, Statistics, leaves, dx, their tangents) -> dy, linear in the last two; None is zero.
      kernels: for a platform, what runs there: whether it takes (call, x), and forward and backward.
    """

    def __init__(self, output: Callable, tangent: Callable, kernels: Mapping[str, Any]):
        self._output, self._of_tangents, self._kernels = output, tangent, kernels
        self._forward_p = self._primitive("segments_forward", self._forward_formula, _forward_types, "forward")
        self._tangent_p = self._primitive("segments_tangent", self._tangent_formula, _tangent_types)
        self._backward_p = self._primitive("segments_backward", self._backward_formula, _backward_types, "backward")
        ad.primitive_jvps[self._tangent_p] = self._tangent_jvp
        ad.primitive_transposes[self._tangent_p] = self._tangent_transpose
        self._backward = jax.custom_jvp(self._bind_backward, nondiff_argnums=(0,))
        self._backward.defjvp(self._backward_jvp)

    def forward(self, call: SegmentCall, x: Array, ids: Array, leaves: Sequence[Array]) -> tuple[Array, Statistics]:
        y, *stats = self._forward_p.bind(*pvary_all(x, ids, *leaves), call=call)
        return y, Statistics(*stats)

    def tangent(self, call: SegmentCall, x, ids, stats: Statistics, leaves, tangents: Sequence[Any]) -> Array:
        call = replace(call, moving=tuple(t is not None for t in tangents))
        operands = (x, ids, *stats, *leaves, *(t for t in tangents if t is not None))
        return self._tangent_p.bind(*pvary_all(*operands), call=call)[0]

    # --- what they mean -----------------------------------------------------------------------------------------------

    def _forward_formula(self, x, ids, *leaves, call: SegmentCall):
        y, stats = self._output(call, x, ids, leaves)
        return y, *stats

    def _tangent_formula(self, *operands, call: SegmentCall):
        x, ids, stats, leaves, tangents = _parts(operands, call)
        given = iter(tangents)
        dx, *dleaves = (next(given) if moves else None for moves in call.moving)
        return (self._of_tangents(call, x, ids, stats, leaves, dx, dleaves),)

    def _backward_formula(self, *operands, call: SegmentCall):
        x, ids, stats, leaves, (g,) = _parts(operands, call)
        moved = [a for a, moves in zip((x, *leaves), call.moving, strict=True) if moves]
        zeros = [pvary_like(a, jnp.zeros(a.shape, a.dtype)) for a in moved]
        along = lambda *tangents: self._tangent_formula(x, ids, *stats, *leaves, *tangents, call=call)[0]
        return jax.vjp(along, *zeros)[1](g)

    # --- rules --------------------------------------------------------------------------------------------------------

    def _primitive(self, name: str, formula: Callable, types: Callable, kernel: str | None = None) -> Primitive:
        primitive = Primitive(name)
        primitive.multiple_results = True
        primitive.def_impl(compiled(primitive, formula))
        primitive.def_abstract_eval(types)
        batching.primitive_batchers[primitive] = functools.partial(_batched, formula)
        mlir.register_lowering(primitive, mlir.lower_fun(formula, multiple_results=True))
        for platform, kernels in self._kernels.items() if kernel else ():
            rule = _lowering(kernels, getattr(kernels, kernel or ""), formula)
            mlir.register_lowering(primitive, rule, platform=platform)
        return primitive

    def _tangent_jvp(self, primals, tangents, *, call: SegmentCall):
        return jvp_by_formula(self._tangent_p, self._tangent_formula, primals, tangents, call)

    def _tangent_transpose(self, cotangents, *operands, call: SegmentCall):
        (g,), known = cotangents, len(operands) - sum(call.moving)
        linear = [ad.is_undefined_primal(a) for a in operands[known:]]
        if isinstance(g, ad.Zero):
            return [None] * len(operands)
        given = iter(linear)
        wanted = tuple(moves and next(given) for moves in call.moving)
        found = iter(self._backward(replace(call, moving=wanted), *operands[:known], g))
        return [None] * known + [next(found) if one else None for one in linear]

    def _bind_backward(self, call: SegmentCall, *operands):
        return tuple(self._backward_p.bind(*pvary_all(*operands), call=call))

    def _backward_jvp(self, call: SegmentCall, primals, tangents):
        formula = functools.partial(self._backward_formula, call=call)
        moving = [i for i, a in enumerate(primals) if jnp.issubdtype(a.dtype, jnp.inexact)]  # ids are not

        def of_moving(*values):
            at = dict(zip(moving, values, strict=True))
            return tuple(formula(*(at.get(i, p) for i, p in enumerate(primals))))

        pick = lambda values: [values[i] for i in moving]
        return self._backward(call, *primals), jax.jvp(of_moving, pick(primals), pick(tangents))[1]


def _parts(operands: Sequence, call: SegmentCall):
    x, ids, *rest = operands
    n = 4 + call.tree.num_leaves
    return x, ids, Statistics(*rest[:4]), rest[4:n], rest[n:]


def _batched(formula: Callable, operands, dims, *, call: SegmentCall):
    out = jax.vmap(functools.partial(formula, call=call), in_axes=tuple(dims))(*operands)
    return list(out), [0] * len(out)


def _lowering(kernels: Any, kernel: Callable, formula: Callable) -> Callable:
    def rule(context, *operands, call: SegmentCall):
        module = context.module_context
        where = module.axis_context
        manual = getattr(where, "manual_axes", frozenset())
        whole = set(manual) == set(where.mesh.axis_names) if manual else (getattr(where, "num_devices", None) or 1) == 1
        kinds = [without_vma(kind) for kind in context.avals_in]
        here = whole and not getattr(module.lowering_parameters, "for_export", False)
        run = kernel if here and kernels.takes(call, kinds[0]) else functools.partial(formula)
        lower = mlir.lower_fun(functools.partial(run, call=call), multiple_results=True)
        return lower(context.replace(avals_in=kinds), *operands)

    return rule


# --- types ------------------------------------------------------------------------------------------------------------


def _typed(like, shape: tuple[int, ...], dtype):
    return like.update(shape=shape, dtype=jnp.dtype(dtype), weak_type=False)


def _forward_types(x, ids, *leaves, call: SegmentCall):
    return [_typed(x, x.shape, call.plan.dtype), *[_typed(x, call.over.shape(x.shape), accumulator(x))] * 4]


def _tangent_types(x, *rest, call: SegmentCall):
    return [_typed(x, x.shape, call.plan.dtype)]


def _backward_types(*operands, call: SegmentCall):
    x, _, _, leaves, _ = _parts(operands, call)
    return [_typed(x, a.shape, a.dtype) for a, moves in zip((x, *leaves), call.moving, strict=True) if moves]
