"""What may come in: shapes, axes, dtypes, hyperparameters, and a message for each that may not.

Every message names the norm, says what it got and what it needs, and shows the line to write.
"""

from __future__ import annotations

import math
import operator
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

Array = jax.Array


# --- what messages say ------------------------------------------------------------------------------------------------


def shown(value) -> str:
    """A value as a message names it: short, and an array by its dtype and shape, never by its numbers."""
    if isinstance(value, np.generic):
        value = value.item()
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{'a traced' if isinstance(value, Tracer) else 'an array'} {value.dtype}{list(value.shape)}"
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        text = repr(value)
        return text if len(text) <= 80 else f"{text[:76]} ..."
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with keys {shown(list(value))}"
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        items = [shown(v) for v in value[:8]] + ["..."] * (len(value) > 8)
        inside = ", ".join(items) + "," * (isinstance(value, tuple) and len(value) == 1)
        return f"({inside})" if isinstance(value, tuple) else f"[{inside}]"
    return getattr(value, "__name__", type(value).__name__)


_PACKAGE = os.path.dirname(__file__) + os.sep


def warn(message: str) -> None:
    """A UserWarning at the line that called jaxnorm, however deep in it this is."""

    def ours(code) -> bool:  # or the constructor that a dataclass makes
        return code.co_filename.startswith(_PACKAGE) or (code.co_filename, code.co_name) == ("<string>", "__init__")

    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and ours(frame.f_code):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level + 1)


# --- static options ---------------------------------------------------------------------------------------------------


def plain(value) -> Any:
    """A static option in Python's own spelling: NumPy's numbers and arrays of ints as ints and tuples, lists as tuples.

    >>> plain(np.int64(2)), plain([np.arange(2), [2, 3]])
    (2, ((0, 1), (2, 3)))
    """
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (np.ndarray, jax.Array)):
        kinds = (jnp.number, jnp.bool_) if value.ndim == 0 else (jnp.integer,)
        known = not isinstance(value, Tracer) and any(jnp.issubdtype(value.dtype, kind) for kind in kinds)
        return plain(np.asarray(value).tolist()) if known else value
    if isinstance(value, (tuple, list, range)):
        return tuple(plain(v) for v in value)
    return value


def refuse_array(norm: str, what: str, value, default) -> None:
    """Options are static, but for momentum, which may follow a schedule."""
    if what != "momentum" and isinstance(value, (np.ndarray, jax.Array)) and plain(value) is value:
        write = f"{what}={getattr(default, '__name__', default)}"
        raise TypeError(f"{norm}: {what} is static and cannot be {shown(value)}. Write {write}.")


def checked_flag(norm: str, what: str, value) -> bool:
    flag = plain(value)
    if not isinstance(flag, int) or flag not in (0, 1):
        raise TypeError(f"{norm}: {what} must be a bool, known when tracing; got {shown(value)}. Write {what}=True.")
    return bool(flag)


def checked_number(norm: str, what: str, value, write: str, least: float = -math.inf) -> float:
    """A static real number, finite, and `least` or more."""
    if type(value) is float and least <= value < math.inf:
        return value
    number = plain(value)
    if not isinstance(number, (int, float)) or not least <= number < math.inf or number == -math.inf:
        needs = "a finite number" if least == -math.inf else f"a number >= {least:g}"
        raise ValueError(f"{norm}: {what} must be {needs}, got {shown(value)}. It is static. Write {what}={write}.")
    return float(number)


def checked_axis_name(norm: str, axis_name) -> None:
    names = axis_name if isinstance(axis_name, (tuple, list)) else (axis_name,)
    if any(hasattr(name, "shape") for name in names):
        raise TypeError(
            f'{norm}: axis_name must be the name of a mapped axis, got {shown(axis_name)}. Write axis_name="data".'
        )


def checked_index_groups(norm: str, what: str, groups) -> tuple[tuple[int, ...], ...]:
    """Groups of indices along an axis name, as tuples."""
    try:
        return tuple(tuple(operator.index(i) for i in group) for group in plain(groups))
    except TypeError:
        raise TypeError(
            f"{norm}: {what} must be lists of indices along axis_name, got {shown(groups)}. "
            f"Write for example {what}=[[0, 1], [2, 3]]."
        ) from None


# --- arrays -----------------------------------------------------------------------------------------------------------


def as_float_array(norm: str, x, *, rank: int = 0, layout: str = "", what: str = "x") -> Array:
    """x as a floating or complex array; integers and booleans are promoted to JAX's default float, never truncated."""
    if hasattr(x, "_fields"):  # params or a state
        raise TypeError(f"{norm}: {what} must be an array, got {shown(x)}. Write {norm}(x, ...): x comes first.")
    try:
        x = jnp.asarray(x)
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


def checked_dtype(norm: str, dtype, x: Array, *others: Array | None):
    """The dtype of the output: what was asked for, else x's own."""
    out = x.dtype if dtype is None else as_dtype(norm, dtype)
    if not jnp.issubdtype(out, jnp.inexact):
        raise TypeError(f"{norm}: dtype must be a floating dtype, got {out}. Write dtype=jnp.float32.")
    if not jnp.issubdtype(out, jnp.complexfloating) and any(jnp.iscomplexobj(a) for a in (x, *others)):
        raise TypeError(f"{norm}: {out} cannot hold a complex result. Write dtype=jnp.complex64.")
    return out


def checked_axes(
    norm: str, ndim: int, axes: int | Sequence[int], *, what: str = "axis", most: int | None = None
) -> tuple[int, ...]:
    """Axes as sorted non-negative ints; an int is one axis. With `most=1` there must be one."""
    try:
        several = plain(axes)
        given = several if isinstance(several, (tuple, set, frozenset)) else (several,)
        given = tuple(operator.index(a) for a in given)
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
    positive = sorted(a % ndim for a in given)
    if len(set(positive)) != len(positive):
        write = tuple(sorted(set(positive)))
        raise ValueError(f"{norm}: {what}={shown(several)} names an axis twice. Write {what}={write}.")
    if most is not None and len(positive) != most:
        raise ValueError(f"{norm}: {what} must be one int, got {shown(several)}. Write {what}={(given or (-1,))[-1]}.")
    return tuple(positive)


def aligned_mask(norm: str, mask, shape: tuple[int, ...], *, what: str = "mask") -> Array | None:
    """One rule for every norm: a mask (or weights) broadcasts to x, or covers x's leading axes. Rank becomes x's."""
    if mask is None:
        return None
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


def counted(norm: str, x: Array, mask) -> tuple[Array, Array | None]:
    """x, and the mask as bools of x's rank. A float mask is 1 where an element counts and 0 elsewhere.

    An additive mask (0 where an element counts, negative elsewhere) means the opposite. It is refused where its values
    are known. Where they are traced, x becomes NaN at negative values, so that the result cannot pass for a right one.
    """
    given, mask = mask, aligned_mask(norm, mask, x.shape)
    if mask is None or not jnp.issubdtype(mask.dtype, jnp.floating):
        return x, None if mask is None else mask.astype(bool)
    values = known(given)
    if values is None:
        x = jnp.where(mask < 0, jnp.full((), jnp.nan, x.dtype), x)
    elif not np.isin(values, (0, 1)).all():
        additive = (values < 0).any()
        write = "mask=mask == 0, as this looks additive" if additive else "mask=mask != 0, or weights= in batch norm"
        raise ValueError(
            f"{norm}: mask must be True or 1 where an element counts and False or 0 elsewhere, got {mask.dtype} values "
            f"from {values.min():g} to {values.max():g}. Write {write}."
        )
    return x, mask.astype(bool)


def aligned_weights(norm: str, weights, shape: tuple[int, ...]) -> Array | None:
    """Weights of x's rank; negative ones are refused where their values are known."""
    given, weights = weights, aligned_mask(norm, weights, shape, what="weights")
    if weights is not None and (values := known(given)) is not None and (values < 0).any():
        raise ValueError(
            f"{norm}: weights must be >= 0, got {values.min():g}. Write weights=jnp.maximum(weights, 0), or leave "
            "elements out with mask=weights > 0."
        )
    return weights


def known(a) -> np.ndarray | None:
    """The values of an array as given; None where they are traced, or not all on this process."""
    if any(isinstance(part, Tracer) or not getattr(part, "is_fully_addressable", True) for part in jax.tree.leaves(a)):
        return None
    return np.asarray(a)


def refuse_a_shape(norm: str, what: str, param, axes: tuple[int, ...] = (-1,)) -> None:
    """A scale or bias is an array. torch takes a shape (or a number of channels) in the same place."""
    if not isinstance(param, (tuple, list, Mapping, int, np.integer)):
        return
    if hasattr(param, "_fields") or isinstance(param, Mapping):
        raise TypeError(
            f"{norm}: {what} must be an array or None, got {shown(param)}. Write scale=params.scale, "
            'bias=params.bias, or params["scale"] and params["bias"].'
        )
    sizes = plain(param)
    sizes = sizes if isinstance(sizes, tuple) else (sizes,)
    write = f"{what}=jnp.asarray({what})"
    if norm.islower() and all(isinstance(n, int) for n in sizes):  # a function, not a layer
        over = axes if norm in ("group_norm", "instance_norm", "batch_norm") else range(-len(sizes), 0)
        call = f"{norm}(x, axis={tuple(over) if len(over) != 1 else over[0]})"
        call = f"group_norm(x, num_groups={sizes[0]})" if norm == "group_norm" and len(sizes) == 1 else call
        call = f"jaxnorm.BatchNorm().init({shown(plain(param))})" if norm == "batch_norm" else call
        write = f"{call}, or {write} for values"
    raise TypeError(
        f"{norm}: {what} must be an array or None, got {shown(param)}. There is no argument for a shape: sizes are "
        f"read off x, and axis= names the axes. Write {write}."
    )


def elsewhere(shape: tuple[int, ...], x_shape: tuple[int, ...], axes: tuple[int, ...]) -> int | None:
    """The axis of x, not among `axes` nor the batch's, that has as many channels as a parameter of this shape."""
    fitting = (a for a in range(1, len(x_shape)) if a not in axes and shape == (x_shape[a],))
    return next(fitting, None)


def aligned_param(norm: str, what: str, param, x_shape: tuple[int, ...], feature_axes: tuple[int, ...]) -> Array | None:
    """A scale or bias with x's rank: of the feature shape, put at the feature axes, or of one that broadcasts to x."""
    if param is None:
        return None
    if what in ("scale", "bias"):
        refuse_a_shape(norm, what, param, tuple(a - len(x_shape) for a in feature_axes))
    param = jnp.asarray(param)
    features = tuple(x_shape[a] for a in feature_axes)
    if param.shape == features:
        return param.reshape(tuple(s if a in feature_axes else 1 for a, s in enumerate(x_shape)))
    rest = len(x_shape) - param.ndim
    if rest < 0 or any(p not in (1, s) for p, s in zip(param.shape, x_shape[rest:], strict=True)):
        axis = elsewhere(param.shape, x_shape, feature_axes)
        rank = (x_shape[0], *(1,) * (len(x_shape) - 2), x_shape[-1])
        write = f"{what}=jnp.ones({features}), or give it x's rank, such as {rank}"
        write = write if axis is None else f"axis={axis}, where x has {x_shape[axis]}"
        raise ValueError(
            f"{norm}: {what} of shape {param.shape} fits neither the feature shape {features} of x {x_shape} nor "
            f"broadcasts to x. Write {write}."
        )
    return param.reshape((1,) * rest + param.shape)


def checked_epsilon(norm: str, epsilon: float) -> float:
    return checked_number(norm, "epsilon", epsilon, "1e-6", least=0.0)


def checked_min_count(norm: str, min_count) -> float | None:
    return None if min_count is None else checked_number(norm, "min_count", min_count, "2", least=0.0)


_TORCH_LIKE = 0.2  # a weight of the old statistics up to here is more likely torch's weight of the new ones
_warned_of: set[float] = set()


def checked_momentum(norm: str, momentum) -> None:
    """A number, or a scalar array, whose value is checked where it is known: a schedule computes it in the program."""
    if isinstance(momentum, jax.Array) and momentum.shape == () and jnp.issubdtype(momentum.dtype, jnp.floating):
        if known(momentum) is None:
            return
        momentum = float(momentum)
    if momentum is not None and (not isinstance(momentum, (int, float, np.number)) or not 0 <= momentum <= 1):
        raise ValueError(
            f"{norm}: momentum is the weight of the old statistics, from 0 to 1, or None for the cumulative average; "
            f"got {shown(momentum)}. Write momentum=0.9 where torch has momentum=0.1."
        )
    if isinstance(momentum, (float, np.floating)) and 0 < momentum <= _TORCH_LIKE and momentum not in _warned_of:
        warn(
            f"{norm}: momentum={momentum:g} keeps {100 * momentum:g} % of the old running statistics at each update: "
            f"it is their weight, as in Flax. Write momentum={1 - momentum:g} where torch has momentum={momentum:g}."
        )
        _warned_of.add(float(momentum))


def warn_if_single(norm: str, x: Array, axes: tuple[int, ...], per: str) -> None:
    """Say so when every statistic would come from one element: its variance is 0, and the output is the bias."""
    if x.size and math.prod(x.shape[a] for a in axes) == 1:
        warn(
            f"{norm}: x of shape {x.shape} has one element per {per}, so each is its own mean and the output is the "
            "bias alone. Give it more data, or normalize over features with layer_norm."
        )
