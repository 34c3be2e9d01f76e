"""What every reparametrization has: its spec, the defaults of the libraries that it is like, axes, and lengths."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from .._core.arithmetic import pick_in_range
from .._core.arrays import as_float_array, canonicalize_axes, sizes_along, spread_along
from .._core.collectives import psum_grouped
from .._core.dtypes import accumulator
from .._core.mesh import active_axis_names, explain_unbound_axis
from .._core.messages import shown, to_python
from .._core.over import Axes
from .._core.platforms import recompute
from .._core.reduce import local_statistics
from .._core.types import AxisName, Reduction
from .._ops.plan import make_plan

Array = jax.Array


class _ByLike:
    """The value of an option that `like` decides."""

    def __repr__(self) -> str:
        return "by like"


BY_LIKE: Any = _ByLike()
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reparametrization:
    """The protocol of `jaxnorm.weights`: a weight that is a pure function of parameters and a state.

    `init` makes both from a weight. `apply` makes the effective weight and the next state. `bake` makes the effective
    weight of inference. No function overwrites what is stored. Specs are frozen and hashable: close over them.

    All but `Demodulate` take stacked weights by `jax.vmap(spec.init)` and `jax.vmap(spec.apply)`.
    """

    defaults: ClassVar[Mapping[str | None, Mapping[str, Any]]] = MappingProxyType({None: NOTHING})
    Params: ClassVar[Any] = None  # the NamedTuple of the parameters; None where the only one is the weight itself
    labels: ClassVar[Mapping[str, str]] = NOTHING  # of parameters, for optimizers: "decayed", "undecayed", "fixed"

    like: str | None = None

    def __post_init__(self) -> None:
        if self.like not in self.defaults:
            known = ", ".join(f'"{name}"' for name in self.defaults if name)
            raise ValueError(f"{self.name}: like must be None or one of {known}; got {shown(self.like)}.")
        chosen = {**self.defaults[None], **self.defaults[self.like]}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            value = chosen[field.name] if value is BY_LIKE else to_python(value)
            object.__setattr__(self, field.name, value)

    @property
    def name(self) -> str:
        return type(self).__name__

    def init(self, w: ArrayLike, key: Array | None = None) -> tuple[Any, Any]:
        """Return (params, state) from a weight. `key` draws what starts at random; None is `jax.random.key(0)`."""
        return self.as_weight(w), ()

    def apply(self, params: Any, state: Any = (), *, train: bool = False) -> tuple[Array, Any]:
        """Return (effective weight, next state). Without `train` the state is returned as it came."""
        raise NotImplementedError

    def bake(self, params: Any, state: Any = ()) -> Array:
        """Return the effective weight of inference, to be stored in the place of the parameters."""
        return self.apply(params, state, train=False)[0]

    def project(self, params: Any) -> Any:
        """Return the parameters brought back to where they must stay after a step of an optimizer."""
        return params

    def as_weight(self, w: ArrayLike) -> Array:
        w = as_float_array(self.name, w, rank=1, layout="its output axis among its own", what="w")
        if jnp.iscomplexobj(w):
            raise TypeError(f"{self.name}: a weight must be real, got {w.dtype}. Write w.real.")
        return w

    def read(self, params: Any) -> Any:
        """The parameters as their NamedTuple, from one, a mapping, or a tuple of that length."""
        fields = self.Params._fields
        if isinstance(params, Mapping):
            missing = [name for name in fields if name not in params]
            if missing:
                raise ValueError(
                    f"{self.name}: params lack {missing[0]!r}; got {shown(params)}. Write spec.init(w)[0]."
                )
            return self.Params(*(params[name] for name in fields))
        if not isinstance(params, tuple) or len(params) != len(fields):
            raise TypeError(
                f"{self.name}: params must have {', '.join(fields)}; got {shown(params)}. Write spec.init(w)."
            )
        return self.Params(*params)


def split_axes(name: str, w: Array, axis: int | Sequence[int] | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The kept axes, which are those of outputs, and all others. None keeps no axis."""
    kept = () if axis is None else canonicalize_axes(name, w.ndim, axis)
    return kept, tuple(a for a in range(w.ndim) if a not in kept)


def spread_over(name: str, what: str, g: ArrayLike | None, w: Array, kept: tuple[int, ...]) -> Array | None:
    """g of w's rank, from the sizes of w along `kept`, or from a shape that broadcasts there, such as torch's."""
    if g is None:
        return None
    g = jnp.asarray(g)
    full = spread_along(w.shape, kept)
    if g.shape in (sizes_along(w.shape, kept), full) or g.size == 1:
        return g.reshape(full if g.size != 1 else (1,) * w.ndim)
    raise ValueError(
        f"{name}: {what} of shape {g.shape} does not fit w of shape {w.shape} along its output axes {kept}. "
        f"Write {what} of shape {sizes_along(w.shape, kept)}."
    )


def options_of_rows(axis_name: AxisName | None, dtype: Any, implementation: str | None) -> dict[str, Any]:
    """The options of `_ops` for a weight: there are no masks and no activations."""
    return dict(
        scale_offset=0.0, mask=None, axis_name=axis_name, axis_index_groups=None, dtype=dtype,
        implementation=implementation, activation=None,
    )  # fmt: skip


def bound_names(axis_name: AxisName | None) -> tuple[str, ...]:
    """The names to merge over; none where jit partitions."""
    names = active_axis_names(axis_name)
    with explain_unbound_axis("jaxnorm.weights", axis_name):
        [lax.axis_size(name) for name in names]
    return names


def count_of(w: Array, axes: tuple[int, ...], axis_name: AxisName | None) -> int:
    """How many elements these axes have, on all devices."""
    return math.prod(sizes_along(w.shape, axes)) * math.prod([lax.axis_size(n) for n in bound_names(axis_name)])


def of_device(key: Array, axis_name: AxisName | None) -> Array:
    """A key for each device, which draws its own part."""
    for name in bound_names(axis_name):
        key = jax.random.fold_in(key, lax.axis_index(name))
    return key


def summed(a: Array, axis_name: AxisName | None) -> Array:
    """The sum over devices."""
    names = bound_names(axis_name)
    return psum_grouped([a], names, None)[0] if names else a


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def length(w: Array, axes: tuple[int, ...], axis_name: AxisName | None = None) -> Array:
    """The Euclidean length along axes, kept with size 1, in float32 or wider: one read of w, and one all-reduce.

    No square overflows or underflows.
    """
    names = bound_names(axis_name)
    plan = make_plan(w, names, 0.0, 0.0, w.dtype, Reduction(Axes(axes), centered=False), None)
    reduction = plan.reduction
    if not names:
        m2, prescale = local_statistics(w, None, None, reduction).m2, reduction.prescale
        return m2 if reduction.large_prescale is not None else jnp.sqrt(m2) / prescale
    wide = w.astype(accumulator(w))
    squares = [jnp.square(wide * prescale).sum(axes, keepdims=True) for prescale in reduction.prescales]
    m2, prescale = psum_grouped(squares, names, None), reduction.prescale
    m2, prescale = (m2[0], prescale) if reduction.large_prescale is None else pick_in_range(reduction, *m2)
    return jnp.sqrt(m2) / prescale


@length.defjvp
def _(axes, axis_name, primals, tangents):
    (w,), (dw,) = primals, tangents
    whole = length(w, axes, axis_name)
    unit = w.astype(whole.dtype) / jnp.where(whole == 0, 1.0, whole)
    return whole, summed((unit * dw.astype(whole.dtype)).sum(axes, keepdims=True), axis_name)


def divided(w: Array, by: Array, dtype: Any, factor: Array | None = None) -> Array:
    """factor w / by, rounded once; 0 where `by` is. For the backward pass w, in its own dtype, is kept."""
    return recompute(functools.partial(_divided, dtype), False)(w, by, factor)


def _divided(dtype: Any, w: Array, by: Array, factor: Array | None) -> Array:
    # As (w / c) / (by / c) for the constant c = by, of which no derivative squares a small number.
    c = lax.stop_gradient(jnp.where(by == 0, 1.0, by))
    times = 1.0 if factor is None else factor.astype(by.dtype)
    return (w.astype(accumulator(w)) / c * (times / jnp.where(by == 0, 1.0, by / c))).astype(dtype or w.dtype)
