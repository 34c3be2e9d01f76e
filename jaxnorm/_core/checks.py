"""Options as they may come in: brought to one spelling, or refused with the line to write."""

from __future__ import annotations

import math
import operator

import jax
import jax.numpy as jnp
import numpy as np

from .arrays import concrete_value
from .messages import shown, to_python, warn
from .types import Groups

Array = jax.Array


def refuse_array(norm: str, what: str, value, default) -> None:
    """Raise if an option is an array. Only momentum may be one, because it may follow a schedule."""
    if what != "momentum" and isinstance(value, (np.ndarray, jax.Array)) and to_python(value) is value:
        write = f"{what}={getattr(default, '__name__', default)}"
        raise TypeError(f"{norm}: {what} is static and cannot be {shown(value)}. Write {write}.")


def canonicalize_flags(norm: str, **flags) -> tuple[bool, ...]:
    """Return each flag as a bool. NumPy bools, 0 and 1 are accepted."""
    for what, given in flags.items():
        if given is True or given is False:
            continue
        flag = to_python(given)
        if not isinstance(flag, int) or flag not in (0, 1):
            raise TypeError(f"{norm}: {what} must be a bool and not traced, got {shown(given)}. Write {what}=True.")
        flags[what] = bool(flag)
    return tuple(flags.values())


def canonicalize_number(norm: str, what: str, value, write: str, least: float = -math.inf) -> float:
    """Return a static, finite, real number as a float. Raise if it is below `least`."""
    if type(value) is float and least <= value < math.inf:
        return value
    number = to_python(value)
    if not isinstance(number, (int, float)) or not least <= number < math.inf or number == -math.inf:
        needs = "a finite number" if least == -math.inf else f"a number >= {least:g}"
        raise ValueError(f"{norm}: {what} must be {needs}, got {shown(value)}. It is static. Write {what}={write}.")
    return float(number)


def check_axis_name(norm: str, axis_name) -> None:
    if axis_name is None or isinstance(axis_name, str):
        return
    names = axis_name if isinstance(axis_name, (tuple, list)) else (axis_name,)
    if any(hasattr(name, "shape") for name in names):
        raise TypeError(
            f'{norm}: axis_name must be the name of a mapped axis, got {shown(axis_name)}. Write axis_name="data".'
        )


def canonicalize_index_groups(norm: str, what: str, groups) -> tuple[tuple[int, ...], ...]:
    """Return groups of indices along an axis name as tuples of ints."""
    try:
        return tuple(tuple(operator.index(i) for i in group) for group in to_python(groups))
    except TypeError:
        raise TypeError(
            f"{norm}: {what} must be lists of indices along axis_name, got {shown(groups)}. "
            f"Write for example {what}=[[0, 1], [2, 3]]."
        ) from None


def canonicalize_epsilon(norm: str, epsilon: float) -> float:
    return canonicalize_number(norm, "epsilon", epsilon, "1e-6", least=0.0)


def canonicalize_min_count(norm: str, min_count) -> float | None:
    return None if min_count is None else canonicalize_number(norm, "min_count", min_count, "2", least=0.0)


_TORCH_LIKE = 0.2  # up to this value, momentum is more likely torch's: the weight of the new statistics


_warned_of: set[float] = set()


def check_momentum(norm: str, momentum) -> None:
    """A number, or a scalar array, whose value is checked where it is known: a schedule computes it in the program."""
    given = momentum
    if isinstance(given, (jax.Array, np.ndarray)) and given.shape == () and jnp.issubdtype(given.dtype, jnp.floating):
        if concrete_value(given) is None:
            return
        momentum = float(given)
    if momentum is not None and (not isinstance(momentum, (int, float, np.number)) or not 0 <= momentum <= 1):
        raise ValueError(
            f"{norm}: momentum is the weight of the old statistics, from 0 to 1, or None for the cumulative average; "
            f"got {shown(momentum)}. Write momentum=0.9 where torch has momentum=0.1."
        )
    # An array follows a schedule, which may pass through small values.
    if isinstance(given, (float, np.floating)) and 0 < given <= _TORCH_LIKE and given not in _warned_of:
        warn(
            f"{norm}: momentum={given:g} keeps {100 * given:g} % of the old running statistics at each update: it is "
            f"their weight, as in Flax. Write momentum={1 - given:g} where torch has momentum={given:g}."
        )
        _warned_of.add(float(given))


def warn_if_single(norm: str, x: Array | jax.ShapeDtypeStruct, axes: tuple[int, ...], per: str) -> None:
    """Say so when every statistic would come from one element: its variance is 0, and the output is the bias."""
    if x.size and math.prod([x.shape[a] for a in axes]) == 1:
        warn(
            f"{norm}: x of shape {x.shape} has one element per {per}, so each is its own mean and the output is the "
            "bias alone. Give it more data, or normalize over features with layer_norm."
        )


def check_cast(norm: str, cast: str) -> None:
    if not isinstance(cast, str) or cast not in ("after_scale", "before_scale"):
        raise ValueError(
            f'{norm}: cast must be "after_scale" or "before_scale", got {shown(cast)}. Write cast="after_scale".'
        )


def canonicalize_groups(norm: str, groups: Groups | None) -> tuple[tuple[int, ...], ...] | None:
    return None if groups is None else canonicalize_index_groups(norm, "axis_index_groups", groups)
