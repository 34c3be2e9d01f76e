"""What the specs of inputs share: options, the map by given statistics, and what `train` means."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from .._core.arithmetic import nonzero_divisor
from .._core.arrays import as_dtype
from .._core.checks import canonicalize_flags, canonicalize_number, check_axis_name, refuse_array
from .._core.messages import shown, to_python
from .._norms.declare import spec

Array = jax.Array
S = TypeVar("S", bound="InputSpec")

MODES = ("inside", "outside", "max")


@spec
class InputSpec:
    """What all specs of `jaxnorm.inputs` have: they are frozen, hashable and compared by value."""

    LIKE: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    function: ClassVar[Callable[..., Any]]

    def __post_init__(self) -> None:
        name = type(self).__name__
        for field in dataclasses.fields(self):
            value = given = getattr(self, field.name)
            if field.name == "dtype":
                value = None if value is None else as_dtype(name, value)
            elif isinstance(field.default, bool):
                (value,) = canonicalize_flags(name, **{field.name: value})
            else:
                value = to_python(value)
                refuse_array(name, field.name, value, field.default)
            if value is not given:
                object.__setattr__(self, field.name, value)
        check_axis_name(name, getattr(self, "axis_name", None))

    @classmethod
    def like(cls: type[S], library: str, **options: Any) -> S:
        """The spec with the defaults of another library. Options given here take the place of those."""
        if library not in cls.LIKE:
            known = ", ".join(f'"{name}"' for name in cls.LIKE)
            raise ValueError(f"{cls.__name__}.like: must be one of {known}; got {shown(library)}.")
        return cls(**{**cls.LIKE[library], **options})

    def options(self) -> dict[str, Any]:
        """The keyword arguments of the function of the same name."""
        names = [f.name for f in dataclasses.fields(self) if not f.name.startswith("init_")]
        return {name: getattr(self, name) for name in names}


@spec
class MapSpec(InputSpec):
    """What the specs share that map x by `SeenStats`.

    Args:
      epsilon: what `epsilon_mode` says; >= 0.
      epsilon_mode: "inside", sqrt(var + epsilon); "outside", std + epsilon; or "max", max(std, epsilon).
      limit: the output is clipped from -limit to limit; None clips nothing.
      dtype: of the output; None is x's. Statistics and arithmetic are in float32 or wider, with one rounding.
    """

    epsilon: float = 1e-8
    epsilon_mode: str = "inside"
    limit: float | None = None
    dtype: DTypeLike | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_map(type(self).__name__, self.epsilon, self.epsilon_mode, self.limit)


@spec
class GatherSpec(InputSpec):
    """What the specs share that gather `SeenStats`.

    Args:
      skip_nonfinite: features of which a batch has a NaN or an infinity keep their statistics in that update.
      axis_name: the mapped axis, or axes, of pmap or shard_map whose devices update the statistics together. Under jit
        over sharded arrays leave it None: statistics are global there.
    """

    skip_nonfinite: bool = False
    axis_name: str | tuple[str, ...] | None = None


def check_map(norm: str, epsilon: Any, mode: Any, limit: Any) -> None:
    canonicalize_number(norm, "epsilon", epsilon, "1e-8", least=0.0)
    if not isinstance(mode, str) or mode not in MODES:
        raise ValueError(f'{norm}: epsilon_mode must be one of {MODES}, got {shown(mode)}. Write epsilon_mode="max".')
    if limit is not None and canonicalize_number(norm, "limit", limit, "10.0", least=0.0) == 0.0:
        raise ValueError(f"{norm}: limit=0 would make every output 0. Write limit=None to clip nothing.")


def refuse_params(norm: str, params: Any) -> None:
    if not (params is None or (isinstance(params, tuple | Mapping) and len(params) == 0)):
        raise TypeError(f"{norm}: it has no parameters, got {shown(params)} as params. Write norm.apply((), state, x).")


def if_training(norm: str, train: Any, state: Any, update: Callable[[], Any]) -> Any:
    """`update()` in training, else the state as it came. `train` may be traced."""
    if isinstance(train, Tracer) and train.shape == ():
        return jax.tree.map(lambda new, old: jnp.where(train, new, old), update(), state)
    flag = to_python(train)
    if not isinstance(flag, int) or flag not in (0, 1):
        raise TypeError(
            f"{norm}: train must be a bool, got {shown(train)}. Write train=True to update the statistics, "
            "train=False to use them as they are."
        )
    return update() if flag else state


@dataclasses.dataclass(frozen=True)
class Standardized:
    """y of x by given statistics, or x of y."""

    epsilon: float
    mode: str
    limit: float | None = None
    centered: bool = True
    inverse: bool = False

    def __call__(self, x: Array, mean: Array, mean_low: Array, std: Array) -> Array:
        mean, low, by = (a.astype(x.dtype) for a in (mean, mean_low, self.divisor(std)))
        if self.inverse:
            return (x * by + low) + mean if self.centered else x * by
        y = ((x - mean) - low) / by if self.centered else x / by
        return y if self.limit is None else jnp.clip(y, -self.limit, self.limit)

    def divisor(self, std: Array) -> Array:
        """What x - mean is divided by; 1 where that would be 0."""
        least = lambda a: jnp.full_like(std, a)
        if self.mode == "inside":
            by = jnp.hypot(std, least(np.sqrt(self.epsilon)))  # var has not the range
        else:
            by = std + self.epsilon if self.mode == "outside" else jnp.maximum(std, least(self.epsilon))
        return nonzero_divisor(by)
