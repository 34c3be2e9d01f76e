"""The protocol that every norm keeps, and what the specs share: parameters, running statistics, and hyperparameters."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax

from ._activation import checked_activation, checked_name
from ._checks import aligned_mask, aligned_param, checked_dtype, checked_epsilon, quiet_padding
from ._kernels import checked_implementation
from ._kernels.varying import sharded_like
from ._kernels.xla import Recipe, Reduction, widest
from ._moments import checked_groups
from ._normalize import Affine, standardize, standardize_sum, sums_within
from ._stream import added, together

Array = jax.Array
Features = int | tuple[int, ...]


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
    """

    def init(self, features: Features) -> tuple[Affine, Any]:
        """Parameters (ones and zeros, None where absent) and state for a feature shape."""
        ...

    def apply(self, params: Affine, state: Any, x: Array, *, train: Any = ..., mask: Any = ...) -> tuple[Array, Any]:
        """The normalized x and the state after it."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """The hyperparameters that all norms have. Fields not about parameters are the function's keyword arguments."""

    use_scale: bool = True
    use_bias: bool = True
    param_dtype: Any = jnp.float32
    scale_offset: float = 0.0
    activation: Any = None
    dtype: Any = None
    implementation: str | None = None

    def __post_init__(self):
        # One spelling for each dtype (jnp.float32, "float32", np.dtype), so that equal specs are equal and hash so.
        object.__setattr__(self, "param_dtype", jnp.dtype(self.param_dtype))
        object.__setattr__(self, "dtype", None if self.dtype is None else jnp.dtype(self.dtype))
        for name, value in self.options().items():
            if isinstance(value, list):
                frozen = tuple(tuple(v) if isinstance(v, (list, tuple, range)) else v for v in value)
                object.__setattr__(self, name, frozen)
        checked_epsilon(type(self).__name__, self.options()["epsilon"])
        checked_name(type(self).__name__, self.activation)
        checked_implementation(type(self).__name__, self.implementation)

    def options(self) -> dict[str, Any]:
        """The keyword arguments of the function of the same name."""
        about_params = ("use_scale", "use_bias", "param_dtype")
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in about_params}

    def init(self, features: Features) -> tuple[Affine, Any]:
        """Parameters and state for `features`, an int or a shape: effective scale 1 and bias 0.

        Raises:
          ValueError: features are not positive ints.
        """
        shape = features if isinstance(features, tuple) else (features,)
        if not all(isinstance(n, int) and n >= 0 for n in shape):
            name = type(self).__name__
            raise ValueError(f"{name}.init: features must be ints >= 0, got {features!r}. Write init(64).")
        scale = jnp.full(shape, 1.0 - self.scale_offset, self.param_dtype) if self.use_scale else None
        return Affine(scale, jnp.zeros(shape, self.param_dtype) if self.use_bias else None), self._init_state(shape)

    def _init_state(self, shape: tuple[int, ...]) -> Any:
        return ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowSpec(Spec):
    """What the norms without state share: statistics of each example's own, the same in training and at inference."""

    axis_name: str | tuple[str, ...] | None = None
    axis_index_groups: Any = None

    def apply(self, params: Affine, state: Any, x, *, train: Any = None, mask=None) -> tuple[Array, Any]:
        """The normalized x, and the state `()` as it came. `train` makes no difference to this norm."""
        return self._function(x, params.scale, params.bias, mask=mask, **self.options()), state

    def _function(self, x, scale, bias, **options) -> Array:
        raise NotImplementedError


def recipe_for(epsilon, scale_offset, dtype, how: Reduction, implementation, **more) -> Recipe:
    """The static part of a call, with the unit of its squares chosen.

    The unit leaves values of 1e30 in range of float32; what underflows for it is far below epsilon's own rounding.
    """
    unit = 2.0**-40 if epsilon >= 1e-8 else 2.0**-16
    how = dataclasses.replace(how, unit=unit)
    return Recipe(how, epsilon, float(scale_offset), dtype, room=implementation, **more)


def bound_names(axis_name, whole: bool = True) -> tuple[str, ...]:
    """`axis_name` without those axes of the mesh in use that jit partitions: along them arrays are whole.

    With `whole` False there may be none such.
    """
    names = () if axis_name is None else tuple(axis_name) if isinstance(axis_name, (tuple, list)) else (axis_name,)
    mesh = jax.sharding.get_abstract_mesh()
    jits = () if mesh.empty or not whole else {n for n in mesh.axis_names if n not in mesh.manual_axes}

    def mapped(name) -> bool:  # by vmap, whatever the mesh
        try:
            lax.axis_size(name)
        except NameError:
            return False
        return True

    return tuple(name for name in names if name not in jits or mapped(name))


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


@functools.partial(jax.checkpoint, prevent_cse=False)
def _kept_rows(mask: Array, x: Array) -> Array:
    """x with rows that are out as a whole set to zero, which gives the bias as well. Keeps the mask as it came."""
    return jnp.where(mask, x, jnp.zeros((), x.dtype))


def normalize_rows(norm: str, x: Array, scale, bias, axes, feature_axes, **options) -> Array:
    """A norm by each example's own statistics; the options are those of `normalize_stream`."""
    return normalize_stream(norm, x, None, scale, bias, axes, feature_axes, **options)[0]


def normalize_stream(
    norm: str, x: Array, residual: Array | None, scale, bias, axes, feature_axes, *,
    epsilon, scale_offset, mask, axis_name, axis_index_groups, dtype, implementation, activation=None,
    centered=True, round_before_scale=False, gate=None, gate_where=None, view: Callable[[Array], Array] = lambda a: a,
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
    mask = aligned_mask(norm, mask, x.shape)
    mask = None if mask is None else mask.astype(bool)
    if residual is not None:
        x, residual = together(x, residual)
    scale, bias, mask, gate = (None if a is None else sharded_like(x, a) for a in (scale, bias, mask, gate))
    x, gate = quiet_padding(x, mask), None if gate is None else quiet_padding(gate, mask)
    out = checked_dtype(norm, dtype, x, scale, bias)
    of = (x, residual, scale, bias) if gate is None else (gate,)
    checked_activation(norm, activation, of[0].shape, widest(*(a.dtype for a in of if a is not None)))
    names = bound_names(axis_name, whole=axis_index_groups is None) or None
    how = Reduction(axes, centered, axis_name=names, groups=checked_groups(axis_index_groups) if names else None)
    epsilon = checked_epsilon(norm, epsilon)
    more = dict(round_before_scale=round_before_scale, activation=activation, gate=gate_where)
    recipe = recipe_for(epsilon, scale_offset, out, how, implementation, **more)
    if residual is not None:
        if sums_within(recipe, x, residual, scale, bias, mask):
            return standardize_sum(norm, recipe, x, residual, scale, bias)
        x = added(x, residual)
    stream = x
    if mask is not None and names is None:
        seen = jax.eval_shape(view, jax.ShapeDtypeStruct(mask.shape, mask.dtype)).shape
        if all(seen[a] == 1 for a in axes):
            x, gate, mask = _kept_rows(mask, x), None if gate is None else _kept_rows(mask, gate), None

    def normalized(*args) -> Array:
        x, scale, bias, mask, gate = jax.tree.map(view, args)
        with bound_axes(norm, axis_name):
            y, _ = standardize(norm, recipe, x, scale, bias, mask, gate=gate)
        return y.reshape(stream.shape)

    run: Any = jax.sharding.auto_axes(normalized, out_sharding=jax.typeof(x).sharding) if spans_devices else normalized
    return run(x, scale, bias, mask, gate), stream
