"""The protocol that every norm keeps, and what the specs share: parameters, running statistics, and hyperparameters."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeVar, dataclass_transform, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from ._activation import checked_activation, checked_name
from ._checks import (
    aligned_param,
    as_dtype,
    checked_axis_name,
    checked_dtype,
    checked_epsilon,
    checked_flags,
    checked_index_groups,
    checked_number,
    counted,
    plain,
    quiet_padding,
    refuse_array,
    shown,
)
from ._exported import exported
from ._habits import explained
from ._kernels import checked_implementation
from ._kernels.varying import sharded_like
from ._kernels.xla import Recipe, Reduction, accumulator, recomputed, units, widest
from ._normalize import Affine, standardize, standardize_sum, sums_within
from ._stream import added, together

Array = jax.Array
Features = int | tuple[int, ...]
Params = Affine | Mapping[str, Any] | None  # what a norm takes as params: a dict as Flax has it, too
State = TypeVar("State")
T = TypeVar("T")


@exported
class RunningStats(NamedTuple):
    """The state of batch norm: statistics gathered over training, used at inference."""

    mean: Array  # feature shape, float32
    var: Array  # feature shape, float32
    count: Array | None = None  # feature shape, float32: elements or updates seen; None where the spec needs none


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


@dataclass_transform(frozen_default=True, kw_only_default=True)
def spec(cls: type[T]) -> type[T]:
    """Make a frozen, keyword-only dataclass whose constructor explains a wrong call."""
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    cls.__init__ = explained("spec")(cls.__init__)
    return cls


def given_params(norm: str, params: Params) -> tuple[Any, Any]:
    """Return the scale and the bias in params: an `Affine`, a dict, or None."""
    if params is None:
        return None, None
    if type(params) is Affine or (type(params) is tuple and len(params) == 2):
        return params
    if isinstance(params, Mapping) and {*params} <= {"scale", "bias"}:
        return params.get("scale"), params.get("bias")
    if isinstance(params, (RunningStats, Mapping)) and "mean" in (
        params if isinstance(params, Mapping) else params._fields
    ):
        raise TypeError(
            f"{norm}: params and state are swapped: got running statistics as params. Write {_order(norm)}."
        )
    raise TypeError(
        f"{norm}: params must be jaxnorm.Affine(scale, bias), a dict of the two, or None; got {shown(params)}. "
        f"Write {_order(norm)}."
    )


def refuse_params_as_state(norm: str, state) -> None:
    if type(state) is Affine or (isinstance(state, Mapping) and {*state} & {"scale", "bias"}):
        raise TypeError(f"{norm}: params and state are swapped: got parameters as state. Write {_order(norm)}.")


def _order(norm: str) -> str:
    if norm == "batch_norm":
        return "batch_norm(x, params, state, train=True)"
    return "norm.as_affine(params, state)" if norm.endswith("as_affine") else "norm.apply(params, state, x)"


@spec
class Spec:
    """The hyperparameters that all norms have. Fields not about parameters are the function's keyword arguments."""

    use_scale: bool = True
    use_bias: bool = True
    param_dtype: Any = jnp.float32
    scale_offset: float = 0.0
    activation: Any = None
    dtype: Any = None
    implementation: str | None = None

    _spare_axes: ClassVar[int] = 0  # that features may have beyond those of `axis`

    def __post_init__(self):
        # One spelling for each value (a dtype may be jnp.float32 or "float32"), so that equal specs are equal.
        name = type(self).__name__
        for field in dataclasses.fields(self):
            value = given = getattr(self, field.name)
            if field.name == "param_dtype" or (field.name == "dtype" and value is not None):
                value = as_dtype(name, value, field.name)
            elif isinstance(field.default, bool):
                (value,) = checked_flags(name, **{field.name: value})
            else:
                value = plain(value)
            refuse_array(name, field.name, value, field.default)
            if value is not given:
                object.__setattr__(self, field.name, value)
        checked_epsilon(name, self.options()["epsilon"])
        checked_number(name, "scale_offset", self.scale_offset, "1.0")
        checked_name(name, self.activation)
        checked_implementation(name, self.implementation)

    if not TYPE_CHECKING:  # for type checkers a spec is not callable

        def __call__(self, *args, **options):
            raise TypeError(
                f"{type(self).__name__}: a spec is not called, it holds no parameters. Write y, state = "
                "norm.apply(params, state, x), with params, state = norm.init(features)."
            )

    def options(self) -> dict[str, Any]:
        """The keyword arguments of the function of the same name."""
        about_params = ("use_scale", "use_bias", "param_dtype")
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in about_params}

    def _made(self, features: Features) -> tuple[Affine, tuple[int, ...]]:
        """Parameters for `features`, an int or a shape, and that shape: effective scale 1 and bias 0."""
        name, sizes = type(self).__name__, plain(features)
        shape = sizes if isinstance(sizes, tuple) else (sizes,)
        if not all(isinstance(n, int) and n >= 0 for n in shape):
            at = self._axes()[-1] if self._axes() else -1
            of_x = getattr(features, "shape", ())
            width = of_x[at] if -len(of_x) <= at < len(of_x) else 64
            raise ValueError(f"{name}.init: features must be ints >= 0, got {shown(features)}. Write init({width}).")
        self._check_features(shape)
        scale = jnp.full(shape, 1.0 - self.scale_offset, self.param_dtype) if self.use_scale else None
        return Affine(scale, jnp.zeros(shape, self.param_dtype) if self.use_bias else None), shape

    def _axes(self) -> tuple[int, ...]:
        axis = getattr(self, "axis", -1)
        return axis if isinstance(axis, tuple) else (axis,)

    def _check_features(self, shape: tuple[int, ...]) -> None:
        """Raise if features have more axes than `axis` names, as x.shape has. Some norms allow `_spare_axes` more."""
        axes = self._axes()
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
    """What the norms without state share: statistics of each example's own, the same in training and at inference."""

    axis_name: str | tuple[str, ...] | None = None
    axis_index_groups: Any = None

    @explained("init")
    def init(self, features: Features) -> tuple[Affine, tuple[()]]:
        """Parameters for `features`, an int or a shape: effective scale 1 and bias 0. The state is `()`.

        Raises:
          ValueError: features are not ints >= 0, or have more axes than `axis` names.
        """
        return self._made(features)[0], ()

    @explained("apply")
    def apply(
        self, params: Params, state: State, x: ArrayLike, *, train: Any = None, mask: Any = None
    ) -> tuple[Array, State]:
        """The normalized x, and the state `()` as it came. `train` makes no difference to this norm."""
        refuse_params_as_state(type(self).__name__, state)
        scale, bias = given_params(type(self).__name__, params)
        return self._function(x, scale, bias, mask=mask, **self.options()), state

    def _function(self, x, scale, bias, **options) -> Array:
        raise NotImplementedError


def recipe_for(x, names, epsilon, scale_offset, dtype, how: Reduction, implementation, **more) -> Recipe:
    """The static part of a call on x, with the unit of its squares; `names` are mapped axes to merge over."""
    n = math.prod(x.shape[a] for a in how.axes) * math.prod(lax.axis_size(name) for name in names if _is_bound(name))
    unit, large = units(epsilon, n, accumulator(x))
    how = dataclasses.replace(how, unit=unit, large=large, plain=implementation == "lax")
    return Recipe(how, epsilon, float(scale_offset), dtype, room=implementation, **more)


def bound_names(axis_name, whole: bool = True) -> tuple[str, ...]:
    """`axis_name` without those axes of the mesh in use that jit partitions: along them arrays are whole.

    With `whole` False there may be none such.
    """
    names = () if axis_name is None else tuple(axis_name) if isinstance(axis_name, (tuple, list)) else (axis_name,)
    mesh = jax.sharding.get_abstract_mesh()
    jits = () if mesh.empty or not whole else {n for n in mesh.axis_names if n not in mesh.manual_axes}
    return tuple(name for name in names if name not in jits or _is_bound(name))


def _is_bound(name) -> bool:
    """Whether a mapped axis has this name: also by vmap, whatever the mesh."""
    try:
        lax.axis_size(name)
    except NameError:
        return False
    return True


@contextlib.contextmanager
def bound_axes(norm: str, axis_name):
    """An unbound axis name, explained."""
    try:
        yield
    except NameError as error:
        raise NameError(
            f"{norm}: axis_name={axis_name!r} is not bound here: call it inside jax.shard_map over a mesh with that "
            f"axis, or inside jax.pmap or jax.vmap with axis_name={axis_name!r}. Under plain jit over sharded arrays "
            "write axis_name=None, or wrap the call in jax.set_mesh(mesh): statistics there are global already."
        ) from error


def _kept_rows(mask: Array, x: Array) -> Array:
    """x with rows that are out as a whole set to zero, which gives the bias as well."""
    return jnp.where(mask, x, jnp.zeros((), x.dtype))


def normalize_rows(norm: str, x: Array, scale, bias, axes, feature_axes, **options) -> Array:
    """A norm by each example's own statistics; the options are those of `normalize_stream`."""
    return normalize_stream(norm, x, None, scale, bias, axes, feature_axes, **options)[0]


def _as_it_is(a: Array) -> Array:
    return a


def normalize_stream(
    norm: str, x: Array, residual: Array | None, scale, bias, axes, feature_axes, *,
    epsilon, scale_offset, mask, axis_name, axis_index_groups, dtype, implementation, activation=None,
    centered=True, round_before_scale=False, gate=None, gate_where=None, view: Callable[[Array], Array] = _as_it_is,
    spans_devices=False,
) -> tuple[Array, Array]:  # fmt: skip
    """The same of a residual stream with x added to it, and that stream; of x where there is no residual.

    Arguments are checked and brought to x's rank for `standardize`. `view` maps x, and what broadcasts against it, to
    the shape whose `axes` are the ones reduced. A `gate`, which has x's rank, multiplies what it is asked to
    (`gate_where` is "before" or "after") by its activation. `spans_devices`: the view splits an axis where types of an
    Explicit mesh cannot follow, so that jit partitions the norm, as it does on an Auto mesh.
    """
    checked_implementation(norm, implementation)
    scale = aligned_param(norm, "scale", scale, x.shape, feature_axes)
    bias = aligned_param(norm, "bias", bias, x.shape, feature_axes)
    checked_axis_name(norm, axis_name)
    scale_offset = checked_number(norm, "scale_offset", scale_offset, "1.0")
    if residual is not None:
        x, residual = together(x, residual)
    scale, bias, gate = (None if a is None else sharded_like(x, a) for a in (scale, bias, gate))
    out = checked_dtype(norm, dtype, x, scale, bias)
    of = (x, residual, scale, bias) if gate is None else (gate,)
    checked_activation(norm, activation, of[0].shape, widest(*(a.dtype for a in of if a is not None)))
    names = bound_names(axis_name, whole=axis_index_groups is None) or None
    groups = axis_index_groups
    if groups is not None:
        groups = checked_index_groups(norm, "axis_index_groups", groups)
    how = Reduction(axes, centered, axis_name=names, groups=groups if names else None)
    epsilon = checked_epsilon(norm, epsilon)
    more = dict(round_before_scale=round_before_scale, activation=activation, gate=gate_where)
    viewed = x if view is _as_it_is else jax.eval_shape(view, jax.ShapeDtypeStruct(x.shape, x.dtype))
    recipe = recipe_for(viewed, names or (), epsilon, scale_offset, out, how, implementation, **more)
    lax_alone = recipe.how.plain
    if residual is not None:
        if sums_within(recipe, x, residual, scale, bias, mask):
            return standardize_sum(norm, recipe, x, residual, scale, bias)
        x = added(lax_alone, x, residual)
    stream = x
    x, mask = counted(norm, x, mask)
    x, gate = quiet_padding(x, mask), None if gate is None else quiet_padding(gate, mask)
    if mask is not None and names is None:
        untyped = jax.ShapeDtypeStruct(mask.shape, mask.dtype)  # its type's sharding may be one that the view splits
        seen: Any = jax.eval_shape(view, untyped) if spans_devices else view(mask)
        if all(seen.shape[a] == 1 for a in axes):
            kept_rows = recomputed(_kept_rows, lax_alone)  # keeps the mask as it came
            # A gate that rows share is out where all of them are. Spread over the rows first, it would have a gradient
            # that is summed in the gate's own dtype.
            of_gate = () if gate is None else tuple(a for a, n in enumerate(gate.shape) if n == 1)
            gate = None if gate is None else kept_rows(mask.any(of_gate, keepdims=True), gate)
            x, mask = kept_rows(mask, x), None

    def normalized(*args) -> Array:
        x, scale, bias, mask, gate = jax.tree.map(view, args)
        with bound_axes(norm, axis_name):
            y, _ = standardize(norm, recipe, x, scale, bias, mask, gate=gate)
        return y.reshape(stream.shape)

    run: Any = jax.sharding.auto_axes(normalized, out_sharding=jax.typeof(x).sharding) if spans_devices else normalized
    return run(x, scale, bias, mask, gate), stream
