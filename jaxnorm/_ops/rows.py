"""Norms by the statistics of each example: checks, the residual sum, rows that are masked out, and the view reduced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from .._core.arrays import align_boolean_mask, align_param, canonicalize_dtype
from .._core.checks import canonicalize_epsilon, canonicalize_groups, canonicalize_number, check_axis_name
from .._core.dtypes import accumulator, widest
from .._core.formats import check_format
from .._core.masks import finite_padding, zeroed
from .._core.mesh import active_axis_names, explain_unbound_axis
from .._core.over import Axes, Segments
from .._core.platforms import recompute
from .._core.types import Reduction
from .._core.vma import shard_like
from .activation import check_activation
from .by_segments import normalize_segments, standardized, takes_segments
from .elementwise import Whole
from .formula import affine_times
from .plan import check_implementation, make_plan
from .quantize import check_quantize, scale_of_tensor
from .residual import add_rounded, match_types
from .standardize import add_and_standardize, can_fuse_add, standardize, standardize_quantized, takes_mask

Array = jax.Array


def normalize_rows(norm: str, x: Array, scale, bias, axes, feature_axes, **options) -> Any:
    """A norm by each example's own statistics; the options are those of `normalize_stream`."""
    return normalize_stream(norm, x, None, scale, bias, axes, feature_axes, **options)[0]


def normalize_scaled(
    norm: str, x: Array, scale, bias, axes: tuple[int, ...], *, output_scale, scale_offset, **options
) -> Any:
    """`normalize_rows`, and its output times a number. For 1 the program is the same."""
    output_scale = canonicalize_number(norm, "output_scale", output_scale, "1.0")
    if output_scale != 1.0:
        scale = align_param(norm, "scale", scale, x.shape, axes)
        bias = align_param(norm, "bias", bias, x.shape, axes)
        offset = canonicalize_number(norm, "scale_offset", scale_offset, "1.0")
        scale, bias = affine_times(output_scale, scale, bias, offset, accumulator(x))
        scale_offset = 0.0
    return normalize_rows(norm, x, scale, bias, axes, axes, scale_offset=scale_offset, **options)


def _identity(a: Array) -> Array:
    return a


def normalize_stream(
    norm: str, x: Array, residual: Array | None, scale, bias, axes, feature_axes, *,
    epsilon, scale_offset, mask, axis_name, axis_index_groups, dtype, implementation, activation=None,
    centered=True, cast_before_scale=False, gate=None, gate_where=None, view: Callable[[Array], Array] = _identity,
    spans_devices=False, segments: tuple[Segments, Array] | None = None, quantize: Any = None, quantize_scale=None,
) -> tuple[Any, Array]:  # fmt: skip
    """Add x to `residual` if there is one, normalize, and return (normalized, sum).

    Arguments are checked and brought to x's rank for `standardize`. `view` maps x, and what broadcasts against it, to
    the shape whose `axes` are the ones reduced. A `gate`, which has x's rank, multiplies what it is asked to
    (`gate_where` is "before" or "after") by its activation. `spans_devices`: the view splits an axis where types of an
    Explicit mesh cannot follow, so that jit partitions the norm, as it does on an Auto mesh. `segments`: these are
    reduced instead of `axes`, by ids of x's rank. `quantize` is the format of the output, which then is a `Quantized`.
    """
    check_implementation(norm, implementation)
    scale = align_param(norm, "scale", scale, x.shape, feature_axes)
    bias = align_param(norm, "bias", bias, x.shape, feature_axes)
    check_axis_name(norm, axis_name)
    check_format(norm, quantize, quantize_scale)
    scale_offset = canonicalize_number(norm, "scale_offset", scale_offset, "1.0")
    if residual is not None:
        x, residual = match_types(x, residual)
    scale, bias, gate = [None if a is None else shard_like(x, a) for a in (scale, bias, gate)]
    out = canonicalize_dtype(norm, dtype, x, scale, bias)
    of = (x, residual, scale, bias) if gate is None else (gate,)
    check_activation(norm, activation, of[0].shape, widest(*(a.dtype for a in of if a is not None)))
    names = active_axis_names(axis_name, whole=axis_index_groups is None) or None
    groups = canonicalize_groups(norm, axis_index_groups)
    over, ids = (Axes(axes), None) if segments is None else segments
    reduction = Reduction(over, centered, axis_name=names, groups=groups if names else None)
    epsilon = canonicalize_epsilon(norm, epsilon)
    more = dict(cast_before_scale=cast_before_scale, activation=activation, gate=gate_where)
    what = jax.ShapeDtypeStruct(x.shape, (x if residual is None else residual).dtype)  # is normalized
    viewed = what if view is _identity else jax.eval_shape(view, what)
    plan = make_plan(viewed, names or (), epsilon, scale_offset, out, reduction, implementation, **more)
    lax_alone = plan.reduction.plain
    if quantize is not None:
        check_quantize(norm, quantize, what, axes, out)
    if residual is not None:
        if quantize is None and can_fuse_add(norm, plan, x, residual, scale, bias, mask):
            return add_and_standardize(plan, x, residual, scale, bias)
        x = add_rounded(lax_alone, x, residual)
    stream, by_ids_alone = x, segments is not None and mask is None and gate is None and quantize is None
    x, mask = align_boolean_mask(norm, x, mask)
    mask = keep = over.present(mask, ids)
    x, gate = finite_padding(x, mask), None if gate is None else finite_padding(gate, mask)
    if mask is not None and names is None and segments is None:
        untyped = jax.ShapeDtypeStruct(mask.shape, mask.dtype)  # its type's sharding may be one that the view splits
        seen: Any = jax.eval_shape(view, untyped) if spans_devices else view(mask)
        type_of: Any = lambda a: None if a is None else jax.eval_shape(view, jax.ShapeDtypeStruct(a.shape, a.dtype))
        by_kernel = lambda: quantize is None and takes_mask(plan, viewed, type_of(scale), type_of(bias), seen)
        if all(seen.shape[a] == 1 for a in axes) and not by_kernel():
            kept_rows = recompute(zeroed, lax_alone)  # keeps the mask as it came
            # A gate that rows share is out where all of them are. Spread over the rows first, it would have a gradient
            # that is summed in the gate's own dtype.
            of_gate = () if gate is None else tuple(a for a, n in enumerate(gate.shape) if n == 1)
            gate = None if gate is None else kept_rows(mask.any(of_gate, keepdims=True), gate)
            x, mask = kept_rows(mask, x), None

    if quantize is not None:
        given = scale_of_tensor(norm, quantize, quantize_scale)
        with explain_unbound_axis(norm, axis_name):
            return standardize_quantized(norm, quantize, plan, x, scale, bias, mask, keep, given), stream

    def normalized(*args) -> Array:
        x, scale, bias, mask, gate, ids = jax.tree.map(view, args)
        if by_ids_alone and takes_segments(plan, x, (scale, bias)):
            return normalize_segments(Whole(standardized, plan), x, (scale, bias), ids).reshape(stream.shape)
        with explain_unbound_axis(norm, axis_name):
            y, _ = standardize(norm, plan, x, scale, bias, mask, gate=gate, ids=ids)
        return y.reshape(stream.shape)

    run: Any = jax.sharding.auto_axes(normalized, out_sharding=jax.typeof(x).sharding) if spans_devices else normalized
    return run(x, scale, bias, mask, gate, ids), stream
