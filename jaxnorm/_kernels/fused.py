"""A norm as three primitives that a room of kernels may run: forward, tangent, backward, and JAX's rules for them.

    forward(x, scale, bias) -> y, shift, offset, m2       statistics and output in one go
    tangent(x, statistics, scale, dx, dscale, dbias) -> dy    linear in the last three; all that is kept is x and the rest
    backward(x, statistics, scale, g) -> dx, dscale, dbias    its transpose

Their meaning is that of two formulas in plain `jax.numpy`, handed to `Fused`: derivatives, other platforms and small
arrays take the formulas; the kernels run where their room takes the shape, chosen when a program is lowered. Statistics
have x's rank, with size 1 along the reduced axes, and so do scale and bias, which broadcast against x.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax._src import dispatch  # custom_partitioning inside a lowering has no public way to ask for its devices
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from . import cpu
from .varying import varying_together
from .xla import Recipe, Statistics, accumulator

Array = jax.Array
Shape = tuple[int, ...] | None


class Across(NamedTuple):
    """How the parts of several devices come together; `names` are mesh axes."""

    merged: Callable  # (Statistics, names, unit) -> Statistics
    summed: Callable  # (arrays, names) -> arrays


class Fused:
    """The three primitives over a pair of formulas.

    Args:
      output: (recipe, x, scale, bias) -> (y, Statistics), one device's.
      tangent: (recipe, x, statistics, scale, (dx, dscale, dbias)) -> dy, linear in the last; None is a tangent of zero.
      across: what merges statistics and sums over mesh axes.
    """

    def __init__(self, output: Callable, tangent: Callable, across: Across):
        self._output, self._tangent, self._across = output, tangent, across
        self._forward_p = self._primitive("norm_forward", self._forward_formula, _forward_types, _forward_room)
        self._tangent_p = self._primitive("norm_tangent", self._tangent_formula, _tangent_types, None)
        self._backward_p = self._primitive("norm_backward", self._backward_formula, _backward_types, _backward_room)
        ad.primitive_jvps[self._tangent_p] = self._tangent_jvp
        ad.primitive_transposes[self._tangent_p] = self._tangent_transpose
        self._backward = jax.custom_jvp(self._bind_backward, nondiff_argnums=(0, 1))
        self._backward.defjvp(self._backward_jvp)

    # --- what is called -----------------------------------------------------------------------------------------------

    def forward(self, recipe: Recipe, x, scale, bias) -> tuple[Array, Statistics]:
        y, *stats = _bind(self._forward_p, recipe, (), x, scale, bias)
        return y, Statistics(_count(recipe, x), *stats)

    def tangent(self, recipe: Recipe, x, stats: Statistics, scale, tangents) -> Array:
        return _bind(self._tangent_p, recipe, (), x, *stats[1:], scale, *tangents)[0]

    # --- what they mean -----------------------------------------------------------------------------------------------

    def _forward_formula(self, recipe, shapes, x, scale, bias):
        y, stats = self._output(recipe, x, scale, bias)
        return y, *stats[1:]

    def _tangent_formula(self, recipe, shapes, x, shift, offset, m2, scale, dx, dscale, dbias):
        stats = Statistics(_count(recipe, x), shift, offset, m2)
        return (self._tangent(recipe, x, stats, scale, (dx, dscale, dbias)),)

    def _backward_formula(self, recipe, shapes, x, shift, offset, m2, scale, g):
        """The transpose of the tangent, by JAX."""
        along = lambda *tangents: self._tangent_formula(recipe, (), x, shift, offset, m2, scale, *tangents)[0]
        start = jnp.zeros_like(x), *(None if s is None else jnp.zeros(s, accumulator(x)) for s in shapes)
        start = jax.tree.map(lambda a: varying_together(a, x)[0], start)
        dx, *dparams = jax.vjp(along, *start)[1](g)
        return dx, *(d for d in dparams if d is not None)

    # --- rules --------------------------------------------------------------------------------------------------------

    def _primitive(self, name: str, formula: Callable, types: Callable, room: Callable | None) -> Primitive:
        """A primitive of optional operands: `given` says which of them are there."""
        primitive = Primitive(name)
        primitive.multiple_results = True

        def by_formula(*operands, recipe, given, shapes):
            return list(formula(recipe, shapes, *_unpacked(given, operands)))

        @functools.cache
        def compiled(**static):
            return jax.jit(functools.partial(primitive.bind, **static))

        @primitive.def_abstract_eval
        def _(*operands, recipe, given, shapes):
            return types(recipe, shapes, *_unpacked(given, operands))

        primitive.def_impl(lambda *operands, **static: compiled(**static)(*operands))
        batching.primitive_batchers[primitive] = functools.partial(_batched, primitive)
        mlir.register_lowering(primitive, _elsewhere(mlir.lower_fun(by_formula, multiple_results=True)))
        if room is not None:
            partitioned = _partitioned(room, self._across)

            def by_kernel(call, pays, *operands, recipe, given, shapes):
                x = operands[0]
                view = cpu.view_of(x.shape, recipe.how.axes, _varying(shapes, *_unpacked(given, operands)))
                if view is None or not pays(view, x.dtype):
                    return by_formula(*operands, recipe=recipe, given=given, shapes=shapes)
                return list(call(recipe, given, shapes, *operands))

            def on_cpu(context, *operands, recipe, **static):
                module = context.module_context
                call = partitioned.fun if getattr(module.axis_context, "num_devices", 0) == 1 else partitioned
                # A program for other processes, and one that is manual over some mesh axes only, are XLA's.
                if module.lowering_parameters.for_export or _partly_manual(module.axis_context):
                    pays = lambda view, dtype: False
                else:
                    pays = cpu.pays
                if recipe.room == "native":
                    pays = lambda view, dtype: True
                lower = mlir.lower_fun(functools.partial(by_kernel, call, pays), multiple_results=True)
                return lower(context, *operands, recipe=recipe, **static)

            if cpu.library().loaded:
                mlir.register_lowering(primitive, on_cpu, platform="cpu")
                dispatch.prim_requires_devices_during_lowering.add(primitive)  # as custom_partitioning's own
        return primitive

    def _tangent_jvp(self, primals, tangents, *, recipe, given, shapes):
        formula = functools.partial(self._tangent_formula, recipe, shapes)
        moving = [not isinstance(t, ad.Zero) for t in tangents]

        def of_moving(*values):
            values = iter(values)
            return formula(*_unpacked(given, [next(values) if m else p for p, m in zip(primals, moving, strict=True)]))

        at, along = ([a for a, m in zip(args, moving, strict=True) if m] for args in (primals, tangents))
        out = self._tangent_p.bind(*primals, recipe=recipe, given=given, shapes=shapes)
        return out, list(jax.jvp(of_moving, at, along)[1])

    def _tangent_transpose(self, cotangents, *operands, recipe, given, shapes):
        (g,) = cotangents
        if isinstance(g, ad.Zero):
            return [None] * len(operands)
        x, shift, offset, m2, scale, *tangents = _unpacked(given, operands)
        wanted = tuple(t.aval.shape if ad.is_undefined_primal(t) else None for t in tangents[1:])
        dx, *dparams = self._backward(recipe, wanted, x, shift, offset, m2, scale, g)
        found = iter(dparams)
        gradients = [dx, *(None if w is None else next(found) for w in wanted)]
        return [
            _like(gradient, t.aval) if ad.is_undefined_primal(t) else None
            for t, gradient in zip(_unpacked(given, operands), [None] * 5 + gradients, strict=True)
            if t is not None
        ]

    def _bind_backward(self, recipe, shapes, *operands):
        return tuple(_bind(self._backward_p, recipe, shapes, *operands))

    def _backward_jvp(self, recipe, shapes, primals, tangents):
        formula = functools.partial(self._backward_formula, recipe, shapes)
        return self._backward(recipe, shapes, *primals), jax.jvp(formula, primals, tangents)[1]


def _elsewhere(lower: Callable) -> Callable:
    """The lowering of a formula, where no room has one of its own. A room that is named runs or says that it cannot."""

    def rule(context, *operands, recipe, given, shapes):
        platforms = context.platforms or context.module_context.platforms
        if recipe.room == "native" and any(p != "cpu" for p in platforms):
            raise ValueError(
                f"implementation='native' runs on CPU, and this program is for {', '.join(platforms)}. "
                "Write implementation=None for the best room of each platform."
            )
        return lower(context, *operands, recipe=recipe, given=given, shapes=shapes)

    return rule


def _partly_manual(axis_context) -> bool:
    """Inside a shard_map over some of the axes of its mesh."""
    manual = getattr(axis_context, "manual_axes", frozenset())
    return bool(manual) and set(manual) != set(axis_context.mesh.axis_names)


def _bind(primitive: Primitive, recipe: Recipe, shapes, *operands) -> list[Array]:
    given = tuple(a is not None for a in operands)
    present = varying_together(*(a for a in operands if a is not None))
    return primitive.bind(*present, recipe=recipe, given=given, shapes=shapes)


def _unpacked(given: Sequence[bool], operands: Sequence) -> list[Any]:
    present = iter(operands)
    return [next(present) if is_given else None for is_given in given]


def _count(recipe: Recipe, x) -> Array:
    n = math.prod(x.shape[a] for a in recipe.how.axes)
    return jnp.full((1,) * x.ndim, n, jnp.finfo(accumulator(x)).dtype)


def _like(gradient: Array, aval) -> Array:
    """A gradient in the dtype and, on an Explicit mesh, with the sharding that its operand has."""
    gradient = gradient.astype(aval.dtype)
    if jax.typeof(gradient).sharding != aval.sharding and not aval.sharding.mesh.empty:
        gradient = jax.sharding.reshard(gradient, aval.sharding)
    return gradient


# --- types ------------------------------------------------------------------------------------------------------------


def _typed(x, shape: tuple[int, ...], dtype):
    """x's type in another shape of its rank: axes of size 1 are not sharded."""
    spec = P(*(None if n == 1 else s for n, s in zip(shape, x.sharding.spec, strict=True)))
    return x.update(shape=shape, dtype=dtype, weak_type=False, sharding=NamedSharding(x.sharding.mesh, spec))


def _forward_types(recipe: Recipe, shapes, x, scale, bias):
    reduced = tuple(1 if a in recipe.how.axes else n for a, n in enumerate(x.shape))
    return [_typed(x, x.shape, recipe.dtype), *[_typed(x, reduced, accumulator(x))] * 3]


def _tangent_types(recipe: Recipe, shapes, x, *rest):
    return [_typed(x, x.shape, recipe.dtype)]


def _backward_types(recipe: Recipe, shapes, x, *rest):
    return [_typed(x, x.shape, x.dtype), *(_typed(x, s, accumulator(x)) for s in shapes if s is not None)]


# --- batching ---------------------------------------------------------------------------------------------------------


def _batched(primitive: Primitive, operands, dims, *, recipe, given, shapes):
    """A new axis of x is more examples: it goes to the front, and the axes reduced move on."""
    size = next(a.shape[d] for a, d in zip(operands, dims, strict=True) if d is not None)
    rank = operands[0].ndim - (dims[0] is not None)
    full = _unpacked(given, range(len(operands)))
    parameters = _parameters(full)

    def leading(i: int, a: Array, d: int | None) -> Array:
        a = jnp.expand_dims(a, 0) if d is None else jnp.moveaxis(a, d, 0)
        spread = d is None and (i not in parameters or shapes)  # a gradient for each example of the batch
        return jnp.broadcast_to(a, (size, *a.shape[1:])) if spread else a

    operands = [leading(i, a, d) for i, (a, d) in enumerate(zip(operands, dims, strict=True))]
    assert operands[0].ndim == rank + 1
    how = replace(recipe.how, axes=tuple(a + 1 for a in recipe.how.axes))
    shapes = tuple(None if s is None else (size, *s) for s in shapes)
    out = _bind_given(primitive, operands, recipe=replace(recipe, how=how), given=given, shapes=shapes)
    return out, [0] * len(out)


def _bind_given(primitive, operands, **static):
    return primitive.bind(*varying_together(*operands), **static)


def _parameters(operands: Sequence) -> list:
    """Of the operands of any of the three, those shaped like a scale or a bias."""
    if len(operands) == 3:  # forward: x, scale, bias
        return operands[1:]
    return [operands[4], *operands[6:]] if len(operands) == 8 else [operands[4]]


def _varying(shapes, *operands) -> frozenset[int]:
    """The axes along which parameters, or the gradients wanted of them, have more than one value."""
    given = [a.shape for a in _parameters(operands) if a is not None]
    return frozenset(a for s in (*given, *shapes) if s is not None for a, n in enumerate(s) if n != 1)


# --- the CPU room -----------------------------------------------------------------------------------------------------


def _static(recipe: Recipe, view: cpu.View, count: float) -> cpu.Static:
    how = recipe.how
    return cpu.Static(view, count, recipe.epsilon, how.unit, how.centered, recipe.round_before_scale)


def _forward_room(recipe: Recipe, shapes, names, across: Across, x, scale, bias):
    """y and statistics of this device's part of x; `names` are the mesh axes that the reduced axes are spread over."""
    axes, view = recipe.how.axes, cpu.view_of(x.shape, recipe.how.axes, _varying((), x, scale, bias))
    assert view is not None
    static = _static(recipe, view, view.elements)
    if not names:
        return cpu.forward(static, axes, recipe.dtype, x, scale, bias)
    stats = Statistics(_count(recipe, x), *cpu.moments(static, axes, x))
    n, *stats = across.merged(stats, names, recipe.how.unit)
    static = static._replace(count=view.elements * lax.axis_size(names))
    return cpu.normalize(static, recipe.dtype, x, *stats, scale, bias), *stats


def _backward_room(recipe: Recipe, shapes, names, across: Across, x, shift, offset, m2, scale, g):
    axes, view = recipe.how.axes, cpu.view_of(x.shape, recipe.how.axes, _varying(shapes, x, shift, offset, m2, scale, g))
    assert view is not None
    static = _static(recipe, view, view.elements)
    if not names:
        dx, *dparams = cpu.backward(static, x, shift, offset, m2, scale, g)
    else:
        static = static._replace(count=view.elements * lax.axis_size(names))
        *sums, dscale, dbias = cpu.gradient_sums(static, axes, x, shift, offset, m2, scale, g)
        dx = cpu.gradient(static, x, shift, offset, m2, scale, g, *across.summed(sums, names))
        dparams = dscale, dbias
    summed = lambda d, shape: d.sum([a for a, n in enumerate(shape) if n == 1], keepdims=True)
    return dx, *(summed(d, s) for d, s in zip(dparams, shapes, strict=True) if s is not None)


# --- partitioning -----------------------------------------------------------------------------------------------------


def _partitioned(room: Callable, across: Across) -> Callable:
    """The room over arrays that jit shards: every device its own part, nothing gathered; sums over devices are merged."""

    def run(recipe, given, shapes, *operands):
        return tuple(room(recipe, shapes, (), across, *_unpacked(given, operands)))

    def partition(recipe, given, shapes, mesh, operands, results):
        spec = operands[0].sharding.spec
        names = lambda axes: tuple(n for a in axes for n in _names(spec[a] if a < len(spec) else None))
        reduced = names(recipe.how.axes)
        placed = lambda shape: NamedSharding(
            mesh, P(*(None if n == 1 else s for n, s in zip(shape, (*spec, *[None] * len(shape)), strict=False)))
        )
        wanted = [s for s in shapes if s is not None]

        def local(*parts):
            x = parts[0]
            inside = tuple(
                None if s is None else tuple(1 if n == 1 else m for n, m in zip(s, x.shape, strict=True)) for s in shapes
            )
            out = list(room(recipe, inside, reduced, across, *_unpacked(given, parts)))
            for i, shape in enumerate(wanted, len(out) - len(wanted)):
                over = names([a for a, n in enumerate(shape) if n == 1])
                out[i] = across.summed([out[i]], over)[0] if over else out[i]
            return tuple(out)

        where = lambda tree: jax.tree.map(lambda a: placed(a.shape), tree)
        return mesh, local, where(results), where(operands)

    def rule(recipe, given, shapes, mesh, operands, results):
        """Axes of size 1 are their own; all others go by x's."""
        fresh = iter(range(10_000))
        word = lambda t: " ".join(f"u{next(fresh)}" if n == 1 else f"x{a}" for a, n in enumerate(t.shape))
        return f"{', '.join(map(word, operands))} -> {', '.join(map(word, results))}"

    function = custom_partitioning(run, static_argnums=(0, 1, 2))
    function.def_partition(partition=partition, sharding_rule=rule)
    return function


def _names(entry) -> tuple:
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)
