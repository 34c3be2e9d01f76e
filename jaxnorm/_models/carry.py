"""What a norm keeps when another one takes its place: parameters and running statistics that mean the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._core.dtypes import accumulator
from .._core.types import RunningStats
from .._norms.base import same_param

Array = jax.Array
Shape = tuple[int, ...]


class Carried(NamedTuple):
    """The parameters and the state of the new norm, by name, and where they come from."""

    params: dict[str, Any]
    state: dict[str, Any]
    kept: frozenset[str]  # the names whose arrays are those of the old norm, or follow from them
    why: str


def param_paths(spec: Any, names: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Where a layer keeps each parameter of a spec. `names` are its `param_names`."""
    return {name: tuple(names.get(name, spec.paths.get(name, name)).split("/")) for name in spec.Params._fields}


def features_of(spec: Any, params: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[Shape | None, Shape]:
    """The feature shape that the arrays of a norm have, and the axes before it, of norms that are stacked.

    The feature shape is None where no array says it.
    """
    rank = len(spec.feature_axes())
    own = {name: a for name, a in params.items() if name not in spec.whole and a is not None}
    kept = {} if spec.own_state_shape else {name: a for name, a in state.items() if a is not None}
    for value, axes in [*((a, 0) for a in own.values()), *((a, spec.state_axes) for a in kept.values())]:
        if jnp.ndim(value) >= rank + axes and rank:
            shape = jnp.shape(value)
            return shape[len(shape) - rank :], shape[: len(shape) - rank - axes]
    return None, ()


def carry(
    old: Any, new: Any, params: dict[str, Any], state: dict[str, Any], features: Shape, lead: Shape = ()
) -> Carried:
    """Parameters and state of `new`: those of `old` that mean the same and fit, and first values for all others.

    `params` and `state` are those of `old`, by name. The parameters have the shape `lead` before their own.
    """
    first, kept, fresh, made = first_of(new, features), [], [], {}
    given = {**params, **state}
    for name, like in first.items():
        if like is None:
            continue
        value = given.get(name)
        means = same_param(old, new, name, features) if name in new.Params._fields else _same(old, new, name)
        fitted = _fitted(value, like.shape, lead, features) if value is not None and means else None
        if fitted is None:
            one = new.init_params(features) if name in new.Params._fields else new.init_state(features)
            fitted = jnp.broadcast_to(getattr(one, name), lead + like.shape)
            fresh.append(name)
        else:
            if name in new.scales and old.scale_offset != new.scale_offset:
                wide = fitted.astype(accumulator(fitted))
                fitted = (wide + (old.scale_offset - new.scale_offset)).astype(fitted.dtype)
            kept.append(name)
        made[name] = fitted
    dropped = [name for name, value in given.items() if value is not None and name not in kept]
    said = {"kept": kept, "new": fresh, "dropped": [name for name in dropped if name not in fresh]}
    why = "; ".join(f"{word} {', '.join(names)}" for word, names in said.items() if names) or "no parameters"
    if "count" in fresh and "mean" in kept:
        why += ": counts from 0 on"
    of = lambda names: {name: made[name] for name in names if name in made}
    return Carried(of(new.Params._fields), of(getattr(new.State, "_fields", ())), frozenset(kept), why)


def _same(old: Any, new: Any, name: str) -> bool:
    """Whether a statistic of this name means the same in both specs."""
    if name == "count":
        return _counted(old) is not None and _counted(old) == _counted(new)
    if type(old) is not type(new) and not (old.State is RunningStats and new.State is RunningStats):
        return False
    spread = lambda spec: {"none": "std"}.get(of := getattr(_modulated(spec), "spread", "std"), of)
    return spread(old) == spread(new)


def _counted(spec: Any) -> str | None:
    """What a count is of: "elements" in cumulative statistics, else "updates"; None where a norm has none."""
    policy = getattr(_modulated(spec), "running", None) or _modulated(spec)
    if spec.State is not RunningStats or not hasattr(policy, "momentum"):
        return None
    return "elements" if policy.momentum is None else "updates"


def _modulated(spec: Any) -> Any:
    """The norm that a conditional norm or SPADE modulates, whose statistics are theirs; else the spec."""
    return getattr(spec, "inner", None) or spec


def first_of(spec: Any, features: Shape) -> dict[str, Any]:
    """The shapes of a norm's first parameters and statistics, by name."""
    params, state = jax.eval_shape(lambda: (spec.init_params(features), spec.init_state(features)))
    return {**params._asdict(), **(state._asdict() if state else {})}


def _fitted(value: Any, shape: Shape, lead: Shape, features: Shape) -> Any:
    """An array in the shape of the new one: as it is, or the same for each domain. None if it does not fit."""
    if value.shape == lead + shape:
        return value
    if value.shape == lead + features and shape[1:] == features:  # a table with a row for each domain
        return jnp.broadcast_to(jnp.expand_dims(value, len(lead)), lead + shape)
    return None
