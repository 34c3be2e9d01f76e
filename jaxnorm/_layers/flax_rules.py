"""What `jaxnorm.linen` and `jaxnorm.nnx` share: Flax's arguments, mapped onto jaxnorm's functions. No mathematics.

A `layer` is a linen or an nnx module: their hyperparameters have the same names. Its feature axes are those of its
parameters, which in Flax need not be the axes normalized over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from flax.linen.dtypes import canonicalize_dtype
from jax.core import Tracer

from .._core.arrays import as_dtype, axis_that_fits, refuse_a_shape, sizes_along, spread_along
from .._core.messages import shown, to_python
from .._core.vma import varying

Array = jax.Array
Axes = int | Sequence[int]
Initializer = Callable[..., Any]
Shape = tuple[int, ...]


def check_replicated(layer, old: Any, new: Any) -> None:
    """Statistics that were the same on all devices stay so, as far as shard_map's types tell (with check_vma on)."""
    for before, after in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        names = tuple(sorted(map(str, varying(after) - varying(before))))
        if names:
            name = repr(names[0] if len(names) == 1 else names)
            raise ValueError(
                f"{type(layer).__name__}: the running statistics would differ between the devices of mesh axis {name}, "
                f"each having seen its own part of x, and they came in the same on all. Write axis_name={name} to "
                f'normalize by all devices\' data, with sync="local" each by its own and update by all; or hand the '
                f"statistics in as one per device, and merge them by jaxnorm.sync_state(batch_stats, {name}) later."
            )


def state_for(layer, what: str, state: Any, x: Array, axes: tuple[int, ...]) -> Any:
    """The state in x's feature shape, and with a complex mean for a complex x."""
    spec = layer._form().spec
    if spec.own_state_shape:
        return state
    features, lead = sizes_along(x.shape, axes), spec.state_axes
    for a in jax.tree.leaves(state):
        check_width(layer, what, a.shape[lead:], x.shape, axes)
    state = jax.tree.map(lambda a: a.reshape(a.shape[:lead] + features), state)
    if jnp.iscomplexobj(x) and "mean" in state._fields:
        state = state._replace(mean=state.mean.astype(promoted(state.mean, x)))
    return state


def check_epsilon(layer, epsilon) -> None:
    """Flax's linen layers take no sizes: one given by position stands for epsilon."""
    if type(epsilon) is not float and isinstance(epsilon := to_python(epsilon), int) and epsilon > 1:
        name = type(layer).__name__
        raise ValueError(
            f"{name}: epsilon={epsilon} looks like a number of features, which linen's layers read off x. "
            f"Write {name}(), or epsilon={epsilon}.0 if that is meant."
        )


def training(use_running_average) -> Any:
    """Whether to train: a bool where that is known, else a traced one."""
    if isinstance(use_running_average, Tracer):
        return jnp.logical_not(use_running_average)
    use = to_python(use_running_average)
    if not isinstance(use, (bool, int)) or use not in (0, 1):
        raise TypeError(
            f"BatchNorm: use_running_average must be a bool, got {shown(use)}. Write "
            "use_running_average=not train; the number of features is read off x, or num_features in nnx."
        )
    return not use


# --- parameters -------------------------------------------------------------------------------------------------------


def cast(
    params: dict[str, Array | None], dtype, scale_offset: float, scales: tuple[str, ...] = ("scale",)
) -> dict[str, Array | None]:
    """Parameters in the compute dtype, the scales with their offset added there. EasyLM, t5x and MaxText do so."""
    offset = {name: jnp.asarray(scale_offset, dtype) for name in scales if scale_offset}
    given = {name: p if p is None else p.astype(dtype) for name, p in params.items()}
    return {name: p + offset[name] if name in offset and p is not None else p for name, p in given.items()}


def hashable(names: Mapping[str, str] | None) -> Mapping[str, str] | None:
    """A mapping that Flax's modules can hold: they are hashed and compared."""
    return None if names is None else FrozenDict(names)


def check_not_both(layer, **given: tuple[bool, Any]) -> None:
    """A parameter comes from the layer or from the caller, not from both. Each is `name=(owned, given)`."""
    for name, (owned, value) in given.items():
        if owned and value is not None:
            raise ValueError(
                f"{type(layer).__name__}: {name}= was given at call time, but the layer has a learned {name} of its "
                f"own. Write {type(layer).__name__}(..., {layer._form().spec.option_for(name)}=False)."
            )


def broadcast_param(layer, what: str, param, shape: Shape, axes: tuple[int, ...], learned: bool) -> Array | None:
    """A parameter with x's rank. A learned one fits the feature axes (or, as in Flax's nnx, is their flat form)."""
    if param is None:
        return None
    refuse_a_shape(type(layer).__name__, what, param)
    param = jnp.asarray(param)
    if param.ndim == 0 and axes:
        return param
    if learned:
        check_width(layer, what, param.shape, shape, axes)
    elif param.shape != sizes_along(shape, axes):
        return param
    return param.reshape(spread_along(shape, axes))


def check_width(layer, what: str, given: Shape, shape: Shape, axes: tuple[int, ...]) -> None:
    """A TypeError, as in Flax, whose reshape is the one to notice."""
    features = sizes_along(shape, axes)
    if given != features and math.prod(given) != math.prod(features):
        name, axis = type(layer).__name__, axis_that_fits(given, shape, axes)
        write = f"Make the layer for {features} features, or name x's feature axes."
        if axis is not None:
            where = f"axis={axis}" if hasattr(layer, "axis") else f"reduction_axes={axis}, feature_axes={axis}"
            write = f"Write {name}(..., {where}), where x has {shape[axis]}."
        raise TypeError(
            f"{name}: the layer's {what} of shape {given} does not fit the {features} features of x {shape}. {write}"
        )


# --- Flax's rules -----------------------------------------------------------------------------------------------------


def output_dtype(given, layer, *args):
    """Flax's rule, by Flax's function: what was asked for, else what the arguments promote to, whatever JAX's mode."""
    name = type(layer).__name__
    dtype = None if given is None else as_dtype(name, given)
    try:
        with jax.numpy_dtype_promotion("standard"):
            return canonicalize_dtype(*args, dtype=dtype)
    except ValueError as error:
        if dtype is not None:
            raise
        dtypes = " and ".join(sorted({str(a.dtype) for a in args if a is not None}))
        raise type(error)(
            f"{name}: {dtypes} have no common dtype for the output (8-bit floats promote to none). Write "
            f"{name}(..., dtype=jnp.bfloat16)."
        ) from None


def promoted(*args: Array):
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*args)


def canonical(layer, what: str, ndim: int, axes: Axes) -> tuple[int, ...]:
    """Axes as Flax takes them: sorted, repeats dropped. AxisError is an IndexError, as Flax's, and a ValueError."""
    if type(axes) is int and -ndim <= axes < ndim:
        return (axes % ndim,)
    name, several = type(layer).__name__, to_python(axes)
    given: tuple[Any, ...] = tuple(several) if isinstance(several, (tuple, set, frozenset)) else (several,)
    for a in given:
        if not isinstance(a, int):
            raise TypeError(f"{name}: {what} must be an int or a tuple of ints, got {shown(axes)}. Write {what}=-1.")
        if not -ndim <= a < ndim:
            raise np.exceptions.AxisError(
                f"{name}: {what}={shown(several)} is out of range for x of rank {ndim}, whose axes are "
                f"{-ndim}..{ndim - 1}. Write {what}=-1 for the last one."
            )
    return tuple(sorted({a % ndim for a in given}))


def align_mask_like_flax(mask, shape: Shape) -> Array | None:
    """A mask that broadcasts to x by NumPy's rule is taken so, also where it could cover x's leading axes instead."""
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    rest = len(shape) - mask.ndim
    fits = rest >= 0 and all(m in (1, s) for m, s in zip(mask.shape, shape[rest:], strict=True))
    return mask.reshape((1,) * rest + mask.shape) if fits else mask
