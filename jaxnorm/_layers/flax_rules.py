"""What `jaxnorm.linen` and `jaxnorm.nnx` share: Flax's arguments, mapped onto jaxnorm's functions. No mathematics.

A `layer` is a linen or an nnx module: their hyperparameters have the same names. Its feature axes are those of its
parameters, which in Flax need not be the axes normalized over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import canonicalize_dtype
from jax.core import Tracer
from jax.nn import initializers

from .._core.arrays import as_dtype, axis_that_fits, refuse_a_shape
from .._core.messages import shown, to_python
from .._core.types import Affine, RunningStats
from .._core.vma import varying
from .._norms.batch import batch_norm
from .._norms.gated import gated_rms_norm
from .._norms.group import group_norm
from .._norms.instance import instance_norm
from .._norms.layer import layer_norm
from .._norms.rms import rms_norm

Array = jax.Array
Axes = int | Sequence[int]
Initializer = Callable[..., Any]
Shape = tuple[int, ...]


class Layout(NamedTuple):
    """One call of a norm without state: the function, where its parameters belong, and its own keyword arguments."""

    function: Callable[..., Array]
    features: tuple[int, ...]
    options: dict[str, Any]


def layer_norm_layout(layer, ndim: int) -> Layout:
    axes = canonical(layer, "reduction_axes", ndim, layer.reduction_axes)
    features = canonical(layer, "feature_axes", ndim, layer.feature_axes)
    return Layout(layer_norm, features, dict(axis=axes))


def rms_norm_layout(layer, ndim: int) -> Layout:
    axes = canonical(layer, "reduction_axes", ndim, layer.reduction_axes)
    features = canonical(layer, "feature_axes", ndim, layer.feature_axes)
    return Layout(rms_norm, features, dict(axis=axes, cast=layer.cast))


def group_norm_layout(layer, ndim: int, num_groups: int | None, group_size: int | None) -> Layout:
    check_groups(num_groups, group_size)
    (channel,) = canonical(layer, "axis", ndim, layer.axis)
    reduced = layer.reduction_axes
    reduced = None if reduced is None else canonical(layer, "reduction_axes", ndim, reduced)
    given = dict(num_groups=num_groups, group_size=group_size, axis=channel, reduction_axes=reduced)
    return Layout(group_norm, (channel,), given)


def instance_norm_layout(layer, ndim: int) -> Layout:
    if layer.axis is not None and layer.feature_axes != -1:
        raise ValueError(
            f"InstanceNorm: axis is feature_axes by jaxnorm's name, got axis={shown(layer.axis)} and "
            f"feature_axes={shown(layer.feature_axes)}. Write axis={shown(layer.axis)} alone."
        )
    features = layer.feature_axes if layer.axis is None else layer.axis
    features = canonical(layer, "feature_axes", ndim, features)
    if 0 in features:
        raise ValueError(
            f"InstanceNorm: the feature axes {features} include the batch axis 0; every example is normalized on its "
            "own. Write feature_axes=-1."
        )
    return Layout(instance_norm, features, dict(axis=features))


def normalized(layer, layout: Layout, x: Array, scale, bias, *, mask, dtype, axis_name) -> Array:
    """x by a norm without state."""
    if layout.function is group_norm and x.ndim == 1:  # one example without a batch axis, as linen has it
        layout.options.update(axis=1, reduction_axes=None)
        return normalized(layer, layout._replace(features=(1,)), x[None], scale, bias,
                          mask=mask, dtype=dtype, axis_name=axis_name)[0]  # fmt: skip
    return layout.function(
        x,
        scale,
        bias,
        mask=align_mask_like_flax(mask, x.shape),
        dtype=dtype,
        **layout.options,
        **common(layer, axis_name),
    )


def apply_gated_rms_norm(layer, x: Array, gate, scale, *, mask, dtype, axis_name) -> Array:
    """x by RMS norm with a gate."""
    return gated_rms_norm(
        x, gate, scale, axis=layer.axis, group_size=layer.group_size, norm_before_gate=layer.norm_before_gate,
        cast=layer.cast, mask=align_mask_like_flax(mask, x.shape), dtype=dtype, **common(layer, axis_name),
    )  # fmt: skip


def apply_batch_norm(layer, x: Array, scale, bias, stats: RunningStats, *, train, mask, weights, update_stats, dtype,
               axis_name) -> tuple[Array, RunningStats]:  # fmt: skip
    """x by batch norm, and the new statistics in the shape of the old ones."""
    axes = batch_features(layer, x)
    check_width(layer, "running statistics", stats.mean.shape, x.shape, axes)
    state = reshaped(stats, tuple(x.shape[a] for a in axes))
    if jnp.iscomplexobj(x):
        state = state._replace(mean=state.mean.astype(promoted(state.mean, x)))
    initializing = axis_name is None and layer.axis_name is not None
    y, new = batch_norm(
        x, Affine(scale, bias), state, train=train, axis=axes, mask=align_mask_like_flax(mask, x.shape),
        weights=align_mask_like_flax(weights, x.shape), update_stats=update_stats, dtype=dtype, momentum=layer.momentum,
        frozen=layer.frozen, skip_nonfinite=layer.skip_nonfinite, zero_debias=layer.zero_debias,
        unbiased_running_var=layer.unbiased_running_var, virtual_batch_size=layer.virtual_batch_size,
        min_count=layer.min_count, sync="global" if initializing else layer.sync, **common(layer, axis_name),
    )  # fmt: skip
    if train is not False and update_stats:
        check_replicated(layer, state, new)
    return y, reshaped(new, stats.mean.shape)


def check_replicated(layer, old: RunningStats, new: RunningStats) -> None:
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


def reshaped(stats: RunningStats, shape: Shape) -> RunningStats:
    mean, var, count = stats
    return RunningStats(mean.reshape(shape), var.reshape(shape), None if count is None else count.reshape(shape))


def batch_features(layer, x: Array) -> tuple[int, ...]:
    return canonical(layer, "axis", x.ndim, layer.axis)


def common(layer, axis_name) -> dict[str, Any]:
    """The keyword arguments that every function has."""
    groups, epsilon = None if axis_name is None else layer.axis_index_groups, to_python(layer.epsilon)
    if isinstance(epsilon, int) and epsilon > 1:
        name = type(layer).__name__
        raise ValueError(
            f"{name}: epsilon={epsilon} looks like a number of features, which linen's layers read off x. "
            f"Write {name}(), or epsilon={epsilon}.0 if that is meant."
        )
    return dict(
        epsilon=epsilon, scale_offset=layer.scale_offset, activation=layer.activation, axis_name=axis_name,
        axis_index_groups=groups, implementation=layer.implementation,
    )  # fmt: skip


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


def needs_count(layer) -> bool:
    return layer.momentum is None or layer.zero_debias


# --- parameters -------------------------------------------------------------------------------------------------------


def unit_scale(scale_offset: float) -> Initializer:
    """An effective scale of 1, which is Flax's initial one where there is no offset."""
    return initializers.constant(1.0 - scale_offset) if scale_offset else initializers.ones


def check_not_both(layer, **given: tuple[bool, Any]) -> None:
    """A parameter comes from the layer or from the caller, not from both. Each is `name=(owned, given)`."""
    for name, (owned, value) in given.items():
        if owned and value is not None:
            raise ValueError(
                f"{type(layer).__name__}: {name}= was given at call time, but the layer has a learned {name} of its "
                f"own. Write {type(layer).__name__}(..., use_{name}=False)."
            )


def broadcast_param(layer, what: str, param, shape: Shape, axes: tuple[int, ...], learned: bool) -> Array | None:
    """A parameter with x's rank. A learned one fits the feature axes (or, as in Flax's nnx, is their flat form)."""
    if param is None:
        return None
    refuse_a_shape(type(layer).__name__, what, param)
    param = jnp.asarray(param)
    if learned:
        check_width(layer, what, param.shape, shape, axes)
    elif param.shape != tuple(shape[a] for a in axes):
        return param
    return param.reshape([s if a in axes else 1 for a, s in enumerate(shape)])


def check_width(layer, what: str, given: Shape, shape: Shape, axes: tuple[int, ...]) -> None:
    """A TypeError, as in Flax, whose reshape is the one to notice."""
    features = tuple(shape[a] for a in axes)
    if math.prod(given) != math.prod(features):
        name, axis = type(layer).__name__, axis_that_fits(given, shape, axes)
        write = f"Make the layer for {features} features, or name x's feature axes."
        if axis is not None:
            where = f"axis={axis}" if hasattr(layer, "axis") else f"reduction_axes={axis}, feature_axes={axis}"
            write = f"Write {name}(..., {where}), where x has {shape[axis]}."
        raise TypeError(
            f"{name}: the layer's {what} of shape {given} does not fit the {features} features of x {shape}. {write}"
        )


# --- Flax's rules -----------------------------------------------------------------------------------------------------


def output_dtype(layer, *args):
    """Flax's rule, by Flax's function: what was asked for, else what the arguments promote to, whatever JAX's mode."""
    name = type(layer).__name__
    dtype = None if layer.dtype is None else as_dtype(name, layer.dtype)
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


def check_groups(num_groups: int | None, group_size: int | None) -> None:
    """Flax's default of 32 groups stands in the way of a group size that is given alone."""
    if num_groups is not None and group_size is not None:
        raise ValueError(
            "GroupNorm: give one of num_groups, which is 32 by default, and group_size; got "
            f"num_groups={shown(num_groups)} and group_size={shown(group_size)}. "
            f"Write num_groups=None, group_size={shown(group_size)}, or num_groups={shown(num_groups)} alone."
        )
