"""What the specs of modulated norms share: the dense layer that makes scale, shift and gate from a condition."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.explain import explained
from .._core.messages import shown
from .._core.types import Affine, Features, RunningStats
from .._ops.activation import Activation, check_activation_name
from .._ops.modulate import PARTS, dense, split_names
from .base import Spec
from .declare import S, as_params, refuse_params_as_state, spec

Array = jax.Array


class ModulatedParams(NamedTuple):
    """The parameters of a modulated norm."""

    scale: Array | None  # feature shape: of the norm itself
    bias: Array | None  # the same
    condition_kernel: Array | None  # (K, P C): of the dense layer that makes the modulation
    condition_bias: Array | None  # (P C,)


@spec
class ModulatedSpec(Spec):
    """What modulated norms share.

    Args:
      parts: the names of the parts in the order in which the dense layer makes them; see `jaxnorm.modulation`.
      modulation_offset: added to the scale of the modulation, in float32 or wider. 0.0 where it starts from 1.
      condition_features: K, the number of features of the condition: `init` makes the dense layer, `apply` runs it.
        None: there is none, and `apply` takes the modulation itself, such as one part of a dense layer for a block.
      condition_activation: of the condition, before the dense layer; a name, a function or None.
      use_scale: whether `init` makes a scale of the norm's own, before the modulation.
      use_bias: whether `init` makes a bias of the norm's own, before the modulation.
      use_condition_bias: whether the dense layer has a bias.
      scale_offset: added to the norm's own scale, in float32 or wider.
    """

    parts: str = "scale shift"
    modulation_offset: float = 1.0
    condition_features: int | None = None
    condition_activation: Activation | None = "silu"
    use_scale: bool = False
    use_bias: bool = False
    use_condition_bias: bool = True

    Params: ClassVar[Any] = ModulatedParams
    whole: ClassVar[tuple[str, ...]] = ("condition_kernel", "condition_bias")
    decays: ClassVar[tuple[str, ...]] = ("condition_kernel",)

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        object.__setattr__(self, "parts", " ".join(split_names(name, self.parts, PARTS)))
        check_activation_name(name, self.condition_activation)
        features = self.condition_features
        if features is not None and (not isinstance(features, int) or isinstance(features, bool) or features < 1):
            raise ValueError(
                f"{name}: condition_features must be an int >= 1 or None, got {shown(features)}. "
                f"Write {name}(condition_features=256)."
            )

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[ModulatedParams, tuple[()]]: ...

    def init_params(self, shape: tuple[int, ...]) -> Any:
        made = super().init_params(shape)
        return made if self.condition_features else made._replace(condition_kernel=None, condition_bias=None)

    def init_param(self, name: str, shape: tuple[int, ...]) -> Array:
        if name not in self.whole:
            return super().init_param(name, shape)
        first = [1.0 - self.modulation_offset if part == "scale" else 0.0 for part in self.parts.split()]
        bias = jnp.repeat(jnp.asarray(first, self.param_dtype), math.prod(shape))
        if name == "condition_bias":
            return bias
        return jnp.zeros((self.condition_features or 0, bias.size), self.param_dtype)

    @explained("apply")
    def apply(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, params: Any, state: S, x: ArrayLike, condition: ArrayLike, *, train: Any = None, mask: Any = None
    ) -> tuple[Any, S]:
        """The normalized and modulated x, beside it the gate if it is one of `parts`; and the state `()` as it came."""
        name = type(self).__name__
        refuse_params_as_state(name, state, self.Params)
        given = as_params(name, params, self.Params)
        modulation = self.modulation_of(condition, given)
        own = (getattr(given, p) for p in given._fields if p not in ("condition_kernel", "condition_bias"))
        return type(self).function(x, modulation, *own, mask=mask, **self.options()), state

    def modulation_of(self, condition: Any, params: Any) -> Any:
        """What the dense layer makes of the condition; the condition itself where there is no such layer."""
        if params.condition_kernel is None:
            return condition
        name = type(self).__name__
        return dense(name, condition, params.condition_kernel, params.condition_bias, self.condition_activation)


@spec
class NestedSpec(Spec):
    """What norms share that modulate any other.

    Args:
      inner: the norm that is modulated, such as `jaxnorm.BatchNorm()`: a spec with a scale and a bias. None is
        `jaxnorm.InstanceNorm(epsilon=1e-5)`. Its axis, statistics and state are those of this norm.
    """

    inner: Any = None

    State: ClassVar[Any] = RunningStats

    def __post_init__(self) -> None:
        super().__post_init__()
        inner_of(type(self).__name__, self.inner)

    def features(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return inner_of(type(self).__name__, self.inner).features(shape)

    def init_state(self, shape: tuple[int, ...]) -> Any:
        return inner_of(type(self).__name__, self.inner).init_state(shape)

    def feature_axes(self) -> tuple[int, ...]:
        return inner_of(type(self).__name__, self.inner).feature_axes()


def inner_of(name: str, inner: Any, **options: Any) -> Any:
    """The norm that is modulated, with options of the norm around it where these are given."""
    from . import SPECS  # which this file is imported for

    norm = SPECS["InstanceNorm"](epsilon=1e-5) if inner is None else inner
    if not isinstance(norm, Spec) or norm.Params is not Affine or norm.whole or norm.scale_offset:
        raise TypeError(
            f"{name}: inner must be a spec with a scale and a bias alone, and no scale_offset of its own; got "
            f"{shown(norm)}. Write {name}(inner=jaxnorm.BatchNorm())."
        )
    return dataclasses.replace(norm, **{option: value for option, value in options.items() if value is not None})
