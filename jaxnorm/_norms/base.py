"""What a norm is: hyperparameters that make parameters and a state, and apply them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from .._core.arrays import as_dtype, canonicalize_axes
from .._core.checks import canonicalize_epsilon, canonicalize_flags, canonicalize_number, refuse_array
from .._core.explain import explained
from .._core.formats import Format, check_format
from .._core.messages import shown, to_python
from .._core.types import Affine, Features, Params
from .._ops.activation import Activation, check_activation_name
from .._ops.plan import check_implementation
from .declare import ABOUT_PARAMS, S, as_params, refuse_params_as_state, spec

Array = jax.Array


@runtime_checkable
class Norm(Protocol):
    """A normalization, as hyperparameters: frozen, hashable, compared by value, free of arrays.

    ```
    params, state = norm.init(features)
    y, state = norm.apply(params, state, x, train=True)
    ```

    `init` makes the parameters and the state from the feature shape alone; it touches no data and no axis name.
    `apply` is pure. It returns the output, of x's shape, and the new state, whose tree, shapes and dtypes are those of
    the old. A norm without state takes and returns `()`; it accepts `train` and does not need it. The means of
    distributing, masking and differentiating it are those of the function of the same name.

    Parameters and running statistics may also be dicts with the same names, as Flax has them and as a checkpoint that
    is restored without a template does: `{"scale", "bias"}`, where a missing one is None, and `{"mean", "var"}` with or
    without `"count"`. A state given as a dict is returned as one.
    """

    def init(self, features: Features) -> tuple[Affine, Any]:
        """Parameters (ones and zeros, None where absent) and state for a feature shape."""
        ...

    def apply(
        self, params: Params, state: Any, x: ArrayLike, *, train: Any = None, mask: Any = None
    ) -> tuple[Array, Any]:
        """The normalized x and the state after it."""
        ...


class NoParams(NamedTuple):
    """The parameters of a norm that has none."""


@spec
class Spec:
    """The hyperparameters that all norms have.

    Args:
      use_scale: whether `init` makes a scale.
      use_bias: whether `init` makes a bias.
      param_dtype: of the parameters.
      scale_offset: added to scale in float32; 1.0 makes a zero-centred gamma.
      activation: of the output, before it is rounded: "relu", "silu" (or "swish"), "gelu" (the exact one), "gelu_tanh",
        "sigmoid", "tanh", or an elementwise function. The backward pass recomputes it, so only x is stored. Pass a
        named function: a fresh lambda at every call triggers retracing.
      mask: True where an element counts. Broadcasts to x, or covers its leading axes. Masked-out elements do not affect
        the statistics or any gradient, even if they are NaN. What has no valid element returns the bias. A float mask
        holds 1 and 0. An additive one (0 where an element counts, negative elsewhere) is refused; if it is traced, so
        that its values are not known, it makes the output NaN.
      dtype: of the output; None is x's. Statistics and arithmetic are in float32 or wider, with one rounding.
      implementation: a backend listed by `jaxnorm.backends()`. None picks the fastest one that supports the call.
    """

    use_scale: bool = True
    param_dtype: DTypeLike = jnp.float32
    scale_offset: float = 0.0
    activation: Activation | None = None
    dtype: DTypeLike | None = None
    implementation: str | None = None

    Params: ClassVar[Any] = Affine  # NamedTuple: its fields name the parameters, in layers and checkpoints too
    function: ClassVar[Callable[..., Any]]  # whose options the fields are
    State: ClassVar[Any] = tuple  # NamedTuple of the statistics kept between calls; `tuple` is none, `()`
    state_axes: ClassVar[int] = 0  # how many axes its fields have before those of the features
    own_state_shape: ClassVar[bool] = False  # whether the state is not of the feature shape; the function checks it
    whole: ClassVar[tuple[str, ...]] = ()  # the parameters that have a shape of their own, not that of the features
    drawn: ClassVar[tuple[str, ...]] = ()  # the parameters that start at random: `draw_param` makes them
    scales: ClassVar[tuple[str, ...]] = ("scale",)  # the parameters that scale_offset is added to
    decays: ClassVar[tuple[str, ...]] = ()  # the parameters that weight decay is for; for most norms none
    paths: ClassVar[Mapping[str, str]] = {}  # where layers keep a parameter, such as "q_norm/scale"; else by its name
    _spare_axes: ClassVar[int] = 0  # that features may have beyond those of `axis`
    peers: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({})  # other libraries' defaults; ... is none
    instead: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({})  # options that say what others say

    @classmethod
    def like(cls, library: str, **options: Any) -> Self:
        """The spec with the defaults of another library's layer of the same kind: its numbers, statistics and axis.

        Args:
          library: "torch", "flax", "keras", "haiku" or "equinox". Torch's and equinox's channels are at axis 1, of
            equinox with the batch in front. What a library has no default for must be given, such as num_groups.
          options: fields of the spec that differ.

        Raises:
          ValueError: the library is unknown or has no such layer; an option without a default was not given.

        >>> import jaxnorm as jn
        >>> jn.BatchNorm.like("torch") == jn.BatchNorm(momentum=0.9, axis=1, unbiased_running_var=True)
        True
        """
        name = cls.__name__
        if library not in cls.peers:
            has = " or ".join(f'{name}.like("{peer}")' for peer in cls.peers)
            raise ValueError(
                f"{name}.like: {shown(library)} has no layer that is this norm. Write {has or f'{name}(...)'}."
            )
        said = {name for given in options for name in cls.instead.get(given, ())}
        chosen = {name: value for name, value in cls.peers[library].items() if name not in said} | options
        for option, value in chosen.items():
            if value is ...:
                write = {"num_groups": "num_groups=32", "momentum": "momentum=0.99"}[option]
                raise ValueError(
                    f'{name}.like: {option} has no default in {library}. Write {name}.like("{library}", {write}).'
                )
        return cls(**chosen)

    def __post_init__(self) -> None:
        # One spelling for each value (a dtype may be jnp.float32 or "float32"), so that equal specs are equal.
        name = type(self).__name__
        for field in dataclasses.fields(self):
            value = given = getattr(self, field.name)
            if field.name == "param_dtype" or (field.name == "dtype" and value is not None):
                value = as_dtype(name, value, field.name)
            elif isinstance(field.default, bool):
                (value,) = canonicalize_flags(name, **{field.name: value})
            else:
                value = to_python(value)
            refuse_array(name, field.name, value, field.default)
            if value is not given:
                object.__setattr__(self, field.name, value)
        if hasattr(self, "epsilon"):
            canonicalize_epsilon(name, self.epsilon)  # pyright: ignore[reportAttributeAccessIssue]
        canonicalize_number(name, "scale_offset", self.scale_offset, "1.0")
        check_activation_name(name, self.activation)
        check_implementation(name, self.implementation)

    if not TYPE_CHECKING:  # for type checkers a spec is not callable

        def __call__(self, *args, **options):
            raise TypeError(
                f"{type(self).__name__}: a spec is not called, it holds no parameters. Write y, state = "
                "norm.apply(params, state, x), with params, state = norm.init(features)."
            )

    def options(self) -> dict[str, Any]:
        """The keyword arguments of the function of the same name."""
        names = [f.name for f in dataclasses.fields(self) if not f.name.startswith(ABOUT_PARAMS)]
        return {name: getattr(self, name) for name in names}

    def features(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The feature shape of an x of this shape: the sizes along `axis`. It is what `init` takes.

        Raises:
          ValueError: an axis that is out of range for this shape, or a repeated one.
        """
        return tuple(shape[a] for a in canonicalize_axes(type(self).__name__, len(shape), self.feature_axes()))

    @explained("init")
    def init(self, features: Features) -> tuple[Any, Any]:
        """Parameters and state for `features`, an int or a shape: effective scale 1 and bias 0, and the first state.

        Raises:
          ValueError: features are not ints >= 0, or have more axes than `axis` names.
        """
        name, sizes = type(self).__name__, to_python(features)
        shape = sizes if isinstance(sizes, tuple) else (sizes,)
        if not all(isinstance(n, int) and n >= 0 for n in shape):
            at = self.feature_axes()[-1] if self.feature_axes() else -1
            of_x = getattr(features, "shape", ())
            width = of_x[at] if -len(of_x) <= at < len(of_x) else 64
            raise ValueError(f"{name}.init: features must be ints >= 0, got {shown(features)}. Write init({width}).")
        self._check_features(shape)
        return self.init_params(shape), self.init_state(shape)

    def init_params(self, shape: tuple[int, ...]) -> Any:
        """The first `Params`, None for each that this spec does not use."""
        used = lambda name: getattr(self, self.option_for(name), True)
        return self.Params(*(self.init_param(name, shape) if used(name) else None for name in self.Params._fields))

    @classmethod
    def option_for(cls, name: str) -> str:
        """The option that says whether `init` makes a parameter."""
        return f"use_{name}"

    def init_param(self, name: str, shape: tuple[int, ...]) -> Array:
        """The first value of one parameter: of the effective scale 1, of all others 0.

        Of those that are `drawn` it is always the same; a Flax layer draws with its own key.
        """
        if name in self.drawn:
            return self.draw_param(name, shape, jax.random.key(0))
        return jnp.full(shape, 1.0 - self.scale_offset if name in self.scales else 0.0, self.param_dtype)

    def draw_param(self, name: str, shape: tuple[int, ...], key: Array) -> Array:
        """The first value of one of the parameters that are `drawn`."""
        raise NotImplementedError

    def init_state(self, shape: tuple[int, ...]) -> Any:
        """The first `State`; `()` where a norm has none."""
        return ()

    @explained("apply")
    def apply(self, params: Params, state: S, x: ArrayLike, *, train: Any = None, mask: Any = None) -> tuple[Array, S]:
        """The normalized x, and the state `()` as it came. `train` makes no difference to this norm."""
        return self._applied(params, state, x, mask=mask), state

    def _applied(self, params: Any, state: Any, x: Any, *operands: Any, **masks: Any) -> Any:
        """What the function makes of x, the operands that follow it, and the parameters."""
        name = type(self).__name__
        refuse_params_as_state(name, state, self.Params)
        given = as_params(name, params, self.Params, self.paths)
        return type(self).function(x, *operands, *given, **masks, **self.options())

    def feature_axes(self) -> tuple[int, ...]:
        """The axes of x whose sizes the parameters have."""
        axis = getattr(self, "axis", -1)
        return axis if isinstance(axis, tuple) else (axis,)

    def _check_features(self, shape: tuple[int, ...]) -> None:
        """Raise if features have more axes than `axis` names, as x.shape has. Some norms allow `_spare_axes` more."""
        axes = self.feature_axes()
        if len(shape) > len(axes) + self._spare_axes:
            of_x = tuple(shape[a] for a in axes if -len(shape) <= a < len(shape))
            write = of_x[0] if len(of_x) == 1 else of_x
            axis = axes[0] if len(axes) == 1 else axes
            raise ValueError(
                f"{type(self).__name__}.init: features are the sizes of x along axis={axis} alone, got {shown(shape)}. "
                f"Write init({write})."
            )


@spec
class RowSpec(Spec):
    """What the norms without state share: statistics of each example's own, the same in training and at inference.

    Args:
      axis_name: a mapped axis, or several, over which the reduced axes are sharded.
      axis_index_groups: groups of indices along axis_name that share statistics.
    """

    axis_name: str | tuple[str, ...] | None = None
    axis_index_groups: Sequence[Sequence[int]] | None = None

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[Affine, tuple[()]]: ...


@spec
class QuantizableSpec(RowSpec):
    """What the norms have in common whose output can be quantized.

    Args:
      quantize: the format of y: `jaxnorm.Fp8`, `Int8`, `MxFp8` or `NvFp4`. y is then a `jaxnorm.Quantized`. None is a
        y in `dtype`.
      quantize_scale: the scale of the tensor, for a format that has one and does not say it: one number, from delayed
        scaling or calibration. None takes it from y.
    """

    quantize: Format | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_format(type(self).__name__, self.quantize, None)

    @explained("apply")
    def apply(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, params: Params, state: S, x: ArrayLike, *, train: Any = None, mask: Any = None,
        quantize_scale: ArrayLike | None = None,
    ) -> tuple[Array, S]:  # fmt: skip
        """The normalized x, and the state `()` as it came. `train` makes no difference to this norm."""
        return self._applied(params, state, x, mask=mask, quantize_scale=quantize_scale), state


def same_param(old: Any, new: Any, name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter of this name means the same in two specs, so that one may keep the other's.

    In specs of one kind it does. In others `scale` and `bias` do, where both start at the same value.
    """
    if type(old) is type(new):
        return name in old.Params._fields
    if name not in ("scale", "bias") or not {name} <= {*old.Params._fields} & {*new.Params._fields}:
        return False
    return _first_value(old, name, shape) == _first_value(new, name, shape)


def _first_value(spec: Any, name: str, shape: tuple[int, ...]) -> float:
    """What a parameter starts at, with its offset."""
    with jax.ensure_compile_time_eval():
        first = spec.init_param(name, shape).ravel()
        return float(first[0] + (spec.scale_offset if name in spec.scales else 0.0)) if first.size else 0.0
