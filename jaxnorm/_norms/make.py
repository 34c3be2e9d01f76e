"""Norms by name, and specs as plain values: what a configuration file holds."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

import jax.numpy as jnp

from .._core.formats import FORMATS
from .._core.messages import shown
from .._ops.policy import EMA, Cumulative, Devices, Ramp
from . import SPECS
from .base import Norm, Spec

_POLICIES = {policy.__name__: policy for policy in (EMA, Cumulative, Devices, Ramp, *FORMATS)}


def catalogue() -> dict[str, Any]:
    """The spec of every norm by its short name, that of its function without "_norm".

    >>> import jaxnorm as jn
    >>> jn.catalogue()["rms"] is jn.RMSNorm
    True
    """
    return {_short(kind): kind for kind in SPECS.values()}


def _short(kind: type[Spec]) -> str:
    return kind.function.__name__.removesuffix("_norm")


def make(norm: str, **options: Any) -> Any:
    """The spec of a norm, by name: "rms", "rms_norm" and "RMSNorm" are the same.

    Args:
      norm: a name in `jaxnorm.catalogue()`, or that of the function or of the spec.
      options: those of the spec. Values may be as a YAML or JSON file has them: a dtype is its name, a tuple a list,
        a number may be a string ("1e-6", as YAML reads 1e-6), and a policy such as `EMA` or a format such as `Fp8` is a
        dict with its name under "policy".

    Returns:
      A spec, such as `RMSNorm(...)`.

    Raises:
      ValueError: a name that no norm has, or a bad value of an option.
      TypeError: an option that the norm does not take.

    >>> import jaxnorm as jn
    >>> jn.make("rms", epsilon=1e-6) == jn.RMSNorm(epsilon=1e-6)
    True
    >>> norm = jn.BatchNorm(running=jn.EMA(momentum=0.9), dtype="bfloat16")
    >>> jn.make(**jn.as_dict(norm)) == norm
    True
    """
    short = catalogue()
    kinds = short | SPECS | {kind.function.__name__: kind for kind in SPECS.values()}
    if not isinstance(norm, str) or norm not in kinds:
        by_lower = {name.lower(): name for name in kinds}
        close = difflib.get_close_matches(norm.lower(), by_lower, 3, 0.5) if isinstance(norm, str) else []
        near = list(dict.fromkeys(_short(kinds[by_lower[name]]) for name in close))
        write = " or ".join(f'make("{name}")' for name in near or ["rms"])
        raise ValueError(f"make: there is no norm {shown(norm)}. Write {write}. jaxnorm.catalogue() has all names.")
    kind = kinds[norm]
    numbers = {f.name for f in dataclasses.fields(kind) if str(f.type).startswith("float")}
    return kind(**{name: _made(_number(value) if name in numbers else value) for name, value in options.items()})


def _number(value: Any) -> Any:
    """A number that came as a string: YAML reads 1e-6 as one, and 1.0e-6 as a number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value  # the spec says what is wrong


def as_dict(norm: Norm) -> dict[str, Any]:
    """A spec as a plain dict that YAML and JSON can hold: its name, and the options that are not the default.

    `jaxnorm.make(**jaxnorm.as_dict(norm)) == norm`.

    Args:
      norm: a spec, such as `RMSNorm(...)`.

    Returns:
      A dict of strings, numbers, booleans, None, lists and dicts. "norm" is the name.

    Raises:
      TypeError: norm is no spec; an option is a function or a traced array.

    >>> import jaxnorm as jn
    >>> jn.as_dict(jn.LayerNorm(axis=(-2, -1), param_dtype="bfloat16"))
    {'norm': 'layer', 'param_dtype': 'bfloat16', 'axis': [-2, -1]}
    """
    if not isinstance(norm, Spec):
        raise TypeError(f"as_dict: norm must be a spec, got {shown(norm)}. Write as_dict(jaxnorm.RMSNorm()).")
    return {"norm": _short(type(norm)), **_changed(norm)}


def _changed(of: Any) -> dict[str, Any]:
    """The fields of a dataclass whose values are not the default, as plain values."""
    found = {}
    for field in dataclasses.fields(of):
        value = _plain(field.name, getattr(of, field.name))
        if field.default is dataclasses.MISSING or value != _plain(field.name, field.default):
            found[field.name] = value
    return found


def _plain(name: str, value: Any) -> Any:
    if name.endswith("dtype") and value is not None:
        return jnp.dtype(value).name
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, (tuple, list)):
        return [_plain(name, v) for v in value]
    if type(value) in _POLICIES.values():
        return {"policy": type(value).__name__, **_changed(value)}
    if isinstance(value, Spec):
        return as_dict(value)
    raise TypeError(
        f"as_dict: {name}={shown(value)} is no plain value. Leave it out by dataclasses.replace(norm, {name}=None), "
        f"and write it where the spec is made: make(**config, {name}=...)."
    )


def _made(value: Any) -> Any:
    """What `_plain` makes of it, made back. Specs themselves read dtypes by name, and lists as tuples."""
    if isinstance(value, dict) and value.get("policy") in _POLICIES:
        options = {name: _made(v) for name, v in value.items() if name != "policy"}
        return _POLICIES[value["policy"]](**options)
    if isinstance(value, dict) and "norm" in value:
        return make(**value)
    return value
