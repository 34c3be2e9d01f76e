"""Arrays as they may come in: x, its axes and dtype, and what has to fit it: parameters, masks, weights."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from .messages import shown, to_python
from .tracing import leave_for_values
from .vma import shard_like

Array = jax.Array


def as_array(x) -> Array:
    """`jnp.asarray`, without the copy that it makes of a traced array: `jax.debug_nans` stops there at NaN padding."""
    return x if isinstance(x, jax.Array) else jnp.asarray(x)


def as_float_array(norm: str, x, *, rank: int = 0, layout: str = "", what: str = "x") -> Array:
    """x as a floating or complex array; integers and booleans are promoted to JAX's default float, never truncated."""
    if hasattr(x, "_fields"):  # params or a state
        raise TypeError(f"{norm}: {what} must be an array, got {shown(x)}. Write {norm}(x, ...): x comes first.")
    try:
        x = as_array(x)
    except TypeError as error:
        got = type(x).__name__
        raise TypeError(f"{norm}: {what} must be an array, got {got}. Write jnp.asarray({what}).") from error
    if not jnp.issubdtype(x.dtype, jnp.number) and x.dtype != jnp.bool_:
        raise TypeError(f"{norm}: {what} must hold numbers, got dtype {x.dtype}. Write {what}.astype(jnp.float32).")
    if x.ndim < rank:
        raise ValueError(
            f"{norm}: x must have rank {rank} or more, {layout}; got shape {x.shape}. "
            f"Write x.reshape({(1,) * (rank - x.ndim) + x.shape})."
        )
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.result_type(float))


def as_dtype(norm: str, dtype, what: str = "dtype"):
    """One spelling for each dtype: that of `jnp.dtype`."""
    try:
        if isinstance(dtype, (np.ndarray, jax.Array)):
            raise TypeError
        return jnp.dtype(dtype)
    except TypeError:
        raise TypeError(f"{norm}: {what} must be a dtype, got {shown(dtype)}. Write {what}=jnp.float32.") from None


def canonicalize_dtype(norm: str, dtype, x: Array, *others: Array | None):
    """The dtype of the output: what was asked for, else x's own."""
    out = x.dtype if dtype is None else as_dtype(norm, dtype)
    if not jnp.issubdtype(out, jnp.inexact):
        raise TypeError(f"{norm}: dtype must be a floating dtype, got {out}. Write dtype=jnp.float32.")
    if not jnp.issubdtype(out, jnp.complexfloating) and any([jnp.iscomplexobj(a) for a in (x, *others)]):
        raise TypeError(f"{norm}: {out} cannot hold a complex result. Write dtype=jnp.complex64.")
    return out


def canonicalize_axes(
    norm: str, ndim: int, axes: int | Sequence[int], *, what: str = "axis", most: int | None = None
) -> tuple[int, ...]:
    """Axes as sorted non-negative ints; an int is one axis. With `most=1` there must be one."""
    try:
        several = axes if type(axes) is int else to_python(axes)
        given = several if isinstance(several, (tuple, set, frozenset)) else (several,)
        given = tuple([operator.index(a) for a in given])
    except TypeError:
        raise TypeError(
            f"{norm}: {what} must be an int or a tuple of ints, got {shown(axes)}. Write {what}=-1."
        ) from None
    for a in given:
        if not -ndim <= a < ndim:
            raise ValueError(
                f"{norm}: {what}={shown(several)} is out of range for x of rank {ndim}, whose axes are "
                f"{-ndim}..{ndim - 1}. "
                f"Write {what}=-1 for the last one."
            )
    positive = sorted([a % ndim for a in given])
    if len(set(positive)) != len(positive):
        write = tuple(sorted(set(positive)))
        raise ValueError(f"{norm}: {what}={shown(several)} names an axis twice. Write {what}={write}.")
    if most is not None and len(positive) != most:
        raise ValueError(f"{norm}: {what} must be one int, got {shown(several)}. Write {what}={(given or (-1,))[-1]}.")
    return tuple(positive)


@functools.lru_cache
def sizes_along(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes along some axes."""
    return tuple(shape[a] for a in axes)


@functools.lru_cache
def spread_along(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """A shape that broadcasts: size 1 but along these axes."""
    return tuple(n if a in axes else 1 for a, n in enumerate(shape))


def align_mask(norm: str, mask, shape: tuple[int, ...], *, what: str = "mask") -> Array:
    """One rule for every norm: a mask (or weights) broadcasts to x, or covers x's leading axes. Rank becomes x's."""
    mask = jnp.asarray(mask)
    rest = len(shape) - mask.ndim
    leading = trailing = None
    if rest >= 0:
        fits = lambda part: all(m in (1, s) for m, s in zip(mask.shape, part, strict=True))
        trailing = (1,) * rest + mask.shape if fits(shape[rest:]) else None
        leading = mask.shape + (1,) * rest if fits(shape[: mask.ndim]) else None
    if trailing is None and leading is None:
        raise ValueError(
            f"{norm}: {what} of shape {mask.shape} neither broadcasts to x of shape {shape} nor covers its leading "
            f"axes. Write for example {what}=jnp.ones({shape[:-1]})."
        )
    if trailing is not None and leading is not None and trailing != leading:
        raise ValueError(
            f"{norm}: {what} of shape {mask.shape} fits x of shape {shape} both as its leading and as its trailing "
            f"axes. Write {what}.reshape({leading}) or {what}.reshape({trailing})."
        )
    return mask.reshape(leading if trailing is None else trailing)


def align_boolean_mask(norm: str, x: Array, mask) -> tuple[Array, Array | None]:
    """Return x and the mask, as bools of x's rank.

    A float mask holds 1 where an element counts and 0 elsewhere. An additive mask (0 where an element counts, negative
    elsewhere) means the opposite, so it is refused. If its values are traced, x is set to NaN where it is negative: the
    output is then NaN, and not a plausible wrong number.
    """
    if mask is None:
        return x, None
    given, mask = mask, shard_like(x, align_mask(norm, mask, x.shape))
    if not jnp.issubdtype(mask.dtype, jnp.floating):
        return x, mask.astype(bool)
    values = concrete_value(given)
    if values is None:
        # The square root is NaN there alone. A constant NaN would stop `jax.debug_nans` also if no element is negative.
        x = jnp.where(mask < 0, lax.sqrt(lax.stop_gradient(mask)).astype(x.dtype), x)
    elif not np.isin(values, (0, 1)).all():
        additive = (values < 0).any()
        write = "mask=mask == 0, as this looks additive" if additive else "mask=mask != 0, or weights= in batch norm"
        raise ValueError(
            f"{norm}: mask must be True or 1 where an element counts and False or 0 elsewhere, got {mask.dtype} values "
            f"from {values.min():g} to {values.max():g}. Write {write}."
        )
    return x, mask.astype(bool)


def align_weights(norm: str, x: Array, weights) -> Array | None:
    """Return the weights with x's rank, sharded like x. Raise if one is negative, unless their values are traced."""
    if weights is None:
        return None
    given, weights = weights, shard_like(x, align_mask(norm, weights, x.shape, what="weights"))
    if (values := concrete_value(given)) is not None and (values < 0).any():
        raise ValueError(
            f"{norm}: weights must be >= 0, got {values.min():g}. Write weights=jnp.maximum(weights, 0), or leave "
            "elements out with mask=weights > 0."
        )
    return weights


def align_segment_ids(norm: str, x: Array, ids, num_segments) -> tuple[Array, int, int]:
    """Return the ids as int32 of x's rank, sharded like x, the number of axes that they cover, and `num_segments`."""
    ids = jnp.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"{norm}: segment_ids must be integers, got {shown(ids)}. Write segment_ids.astype(jnp.int32).")
    if not 0 < ids.ndim < x.ndim or ids.shape != x.shape[: ids.ndim]:
        raise ValueError(
            f"{norm}: segment_ids of shape {ids.shape} must have the sizes of x's leading axes, without its channels; "
            f"x is {x.shape}. Write segment_ids of shape {x.shape[: max(min(ids.ndim, x.ndim - 1), 1)]}."
        )
    given, num_segments = num_segments, to_python(num_segments)
    if not isinstance(num_segments, int) or isinstance(num_segments, bool) or num_segments < 1:
        values = concrete_value(ids)
        number = 8 if values is None else max(int(values.max(initial=0)) + 1, 1)
        raise ValueError(
            f"{norm}: num_segments must be an int >= 1, got {shown(given)}. It is static. Write num_segments={number}."
        )
    # In int32, what is absent stays so: int64 is clipped before it is cast, and shorter ints after.
    ids = jnp.minimum(ids, num_segments) if ids.dtype.itemsize > 2 else ids
    ids = jnp.maximum(ids, -1) if jnp.issubdtype(ids.dtype, jnp.signedinteger) else ids
    rows, ids = ids.ndim, ids.astype(jnp.int32)
    return shard_like(x, ids.reshape(ids.shape + (1,) * (x.ndim - rows))), rows, num_segments


def concrete_value(a) -> np.ndarray | None:
    """Return the values of an array, or None if they are traced or not all on this process."""
    if any(isinstance(part, Tracer) or not getattr(part, "is_fully_addressable", True) for part in jax.tree.leaves(a)):
        leave_for_values()
        return None
    return np.asarray(a)


def refuse_a_shape(norm: str, what: str, param, axes: tuple[int, ...] = (-1,)) -> None:
    """Raise if a scale or bias is not an array. torch takes a shape or a number of channels in that position."""
    if not isinstance(param, (tuple, list, Mapping, int, np.integer)):
        return
    if hasattr(param, "_fields") or isinstance(param, Mapping):
        raise TypeError(
            f"{norm}: {what} must be an array or None, got {shown(param)}. Write scale=params.scale, "
            'bias=params.bias, or params["scale"] and params["bias"].'
        )
    sizes = to_python(param)
    sizes = sizes if isinstance(sizes, tuple) else (sizes,)
    write = f"{what}=jnp.asarray({what})"
    if norm.islower() and all(isinstance(n, int) for n in sizes):  # a function, not a layer
        over = axes if norm in ("group_norm", "instance_norm", "batch_norm") else range(-len(sizes), 0)
        call = f"{norm}(x, axis={tuple(over) if len(over) != 1 else over[0]})"
        call = f"group_norm(x, num_groups={sizes[0]})" if norm == "group_norm" and len(sizes) == 1 else call
        call = f"jaxnorm.BatchNorm().init({shown(to_python(param))})" if norm == "batch_norm" else call
        write = f"{call}, or {write} for values"
    raise TypeError(
        f"{norm}: {what} must be an array or None, got {shown(param)}. There is no argument for a shape: sizes are "
        f"read off x, and axis= names the axes. Write {write}."
    )


def axis_that_fits(shape: tuple[int, ...], x_shape: tuple[int, ...], axes: tuple[int, ...]) -> int | None:
    """Return an axis of x, other than `axes` and 0, that a parameter of this shape fits; None if there is none."""
    fitting = (a for a in range(1, len(x_shape)) if a not in axes and shape == (x_shape[a],))
    return next(fitting, None)


def align_param(norm: str, what: str, param, x_shape: tuple[int, ...], feature_axes: tuple[int, ...]) -> Array | None:
    """A scale or bias with x's rank: of the feature shape, put at the feature axes, or of one that broadcasts to x."""
    if param is None:
        return None
    if what in ("scale", "bias"):
        refuse_a_shape(norm, what, param, tuple([a - len(x_shape) for a in feature_axes]))
    param = jnp.asarray(param)
    features = sizes_along(x_shape, feature_axes)
    if param.shape == features:
        return param.reshape(spread_along(x_shape, feature_axes))
    rest = len(x_shape) - param.ndim
    if rest < 0 or any([p not in (1, s) for p, s in zip(param.shape, x_shape[rest:], strict=True)]):
        axis = axis_that_fits(param.shape, x_shape, feature_axes)
        rank = (x_shape[0], *(1,) * (len(x_shape) - 2), x_shape[-1])
        write = f"{what}=jnp.ones({features}), or give it x's rank, such as {rank}"
        write = write if axis is None else f"axis={axis}, where x has {x_shape[axis]}"
        raise ValueError(
            f"{norm}: {what} of shape {param.shape} fits neither the feature shape {features} of x {x_shape} nor "
            f"broadcasts to x. Write {write}."
        )
    return param.reshape((1,) * rest + param.shape)


def align_gate(norm: str, gate, x: Array) -> Array:
    """What multiplies x or its norm, with x's rank."""
    gate = as_float_array(norm, gate, what="gate")
    rest = x.ndim - gate.ndim
    if rest < 0 or any(n not in (1, s) for n, s in zip(gate.shape, x.shape[rest:], strict=True)):
        raise ValueError(
            f"{norm}: gate of shape {gate.shape} does not broadcast to x of shape {x.shape}. "
            f"Write jnp.broadcast_to(gate, {x.shape}), or give it x's shape."
        )
    if jnp.iscomplexobj(gate) and not jnp.iscomplexobj(x):
        raise TypeError(f"{norm}: a complex gate needs a complex x, got {x.dtype}. Write x.astype({gate.dtype}).")
    return gate.reshape((1,) * rest + gate.shape)
