"""ActNorm: an invertible affine map of each channel, whose start is set by the first batch, for flows.

Legend: a position is an element of x but for its channel.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.arrays import align_boolean_mask, align_param, as_float_array, canonicalize_axes
from .._core.checks import canonicalize_flags, canonicalize_number
from .._core.dtypes import accumulator
from .._core.explain import explained
from .._core.messages import shown
from .._core.types import Features
from .._ops.moments import merge_across, moments
from .._ops.pointwise import normalize_pointwise
from .base import Spec
from .declare import S, function_of, spec

Array = jax.Array


class ActNormParams(NamedTuple):
    """The parameters of `act_norm`."""

    log_scale: Array | None  # (C,)
    shift: Array | None  # the same


@spec
class ActNorm(Spec):
    """The hyperparameters of `act_norm`. `init` makes parameters that do nothing, `init_from` those of a first batch.

    Args:
      use_scale: without effect here: there always is a log_scale.
      scale_offset: without effect here.
      activation: None: the map is invertible.
      init_epsilon: added to the deviation by `init_from`, in units of x.
      shift_first: Glow's order, exp(log_scale) (x + shift); else that of nflows, exp(log_scale) x + shift.
      inverse: the inverse map. `apply` may say it as well.
      axis: the channel axis, at any position but 0.

    >>> import jaxnorm as jn, numpy as np
    >>> norm, x = jn.ActNorm(), np.array([[-4., 8.], [4., -8.]])
    >>> params = norm.init_from(x)
    >>> (y, log_det), state = norm.apply(params, (), x)
    >>> y.round(3).tolist(), norm.apply(params, (), y, inverse=True)[0][0].round(3).tolist()
    ([[-1.0, 1.0], [1.0, -1.0]], [[-4.0, 8.0], [4.0, -8.0]])
    """

    Params: ClassVar[Any] = ActNormParams
    scales: ClassVar[tuple[str, ...]] = ()

    init_epsilon: float = 1e-6
    shift_first: bool = False
    inverse: bool = False
    axis: int = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        canonicalize_number("ActNorm", "init_epsilon", self.init_epsilon, "1e-6", 0.0)
        _refuse_activation("ActNorm", self.activation)

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[ActNormParams, tuple[()]]: ...

    def init_from(self, x: ArrayLike, *, mask: ArrayLike | None = None, axis_name: Any = None) -> ActNormParams:
        """The parameters that give each channel of x mean 0 and deviation 1, over `axis_name`'s devices together.

            log_scale = -log(std + init_epsilon)

        Their gradients are stopped. A channel without a valid element gets zeros.
        """
        x = as_float_array("ActNorm.init_from", x, rank=1, layout="the channel axis among its own")
        (channel,) = canonicalize_axes("ActNorm.init_from", x.ndim, self.axis, most=1)
        seen = moments(jax.lax.stop_gradient(x), tuple(a for a in range(x.ndim) if a != channel), mask=mask)
        seen = seen if axis_name is None else merge_across(seen, axis_name)
        log_scale = jnp.where(seen.count == 0, 0.0, -jnp.log(jnp.sqrt(seen.var) + self.init_epsilon))
        shift = -seen.mean if self.shift_first else -seen.mean * jnp.exp(log_scale)
        return ActNormParams(log_scale.astype(self.param_dtype), shift.astype(self.param_dtype))

    @explained("apply")
    def apply(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, params: Any, state: S, x: ArrayLike, *, train: Any = None, mask: Any = None, inverse: bool | None = None
    ) -> tuple[tuple[Array, Array], S]:
        """y and log_det, and the state `()` as it came. `inverse` in place of the spec's own."""
        norm = self if inverse is None or inverse is self.inverse else dataclasses.replace(self, inverse=inverse)
        return norm._applied(params, state, x, mask=mask), state


def _refuse_activation(norm: str, activation: Any) -> None:
    if activation is not None:
        raise ValueError(
            f"{norm}: activation={shown(activation)} would have to be inverted, too. Write activation=None."
        )


@function_of(ActNorm)
def act_norm(
    x: ArrayLike,
    log_scale: ArrayLike | None = None,
    shift: ArrayLike | None = None,
    *,
    shift_first,
    inverse,
    axis,
    activation,
    mask: ArrayLike | None = None,
    **options,
) -> tuple[Array, Array]:
    """ActNorm: an affine map of each channel, and the logarithm of its determinant.

        y = exp(log_scale) x + shift,   or with shift_first  y = exp(log_scale) (x + shift)
        log_det = sum of log_scale over the elements of an example

    With `inverse`, x is what the map made, y what it was made of, and log_det has the other sign. Statistics are taken
    once, by `ActNorm.init_from`, which sets the start by the first batch.

    Args:
      x: array of shape (N, ..., C), the channels at `axis`. Integers are promoted to float32.
      log_scale: of shape (C,), or of a shape that broadcasts against x; None is 0. Glow stores a third of it.
      shift: the same; None is 0.
      mask: True where an element counts. Broadcasts to x, or covers its leading axes. A masked-out element does not
        count in log_det. If it is not finite it counts as 0 and affects no gradient; a finite one is mapped like the
        others.
      implementation: "xla", "lax" or None; there are no kernels, because XLA fuses elementwise functions.

    Returns:
      y, of x's shape, and log_det, of shape (N,), in float32 or wider.

    Raises:
      ValueError: the batch axis as channel axis; a bad axis or backend; a parameter or mask that fits x nowhere; an
        activation.
      TypeError: a dtype that cannot hold the result.

    Used by Glow, and by normalizing flows since.

    Source: Kingma, Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions" (2018), arXiv:1807.03039.

    >>> import jaxnorm as jn, numpy as np
    >>> y, log_det = jn.act_norm(np.ones((1, 3, 2)), np.log([2., 4.]), np.array([0., 1.]))
    >>> y[0, 0].round(3).tolist(), log_det.round(3).tolist()
    ([2.0, 5.0], [6.238000392913818])
    """
    norm = "act_norm"
    _refuse_activation(norm, activation)
    x = as_float_array(norm, x, rank=2, layout="(batch, ..., channels)")
    (channel,) = canonicalize_axes(norm, x.ndim, axis, most=1)
    if channel == 0:
        raise ValueError(
            f"{norm}: axis={axis} is the batch axis of x {x.shape}. Write axis=-1 for channels last, or axis=1."
        )
    shift_first, inverse = canonicalize_flags(norm, shift_first=shift_first, inverse=inverse)
    x, mask = align_boolean_mask(norm, x, mask)
    zero = jnp.zeros((), jnp.finfo(accumulator(x)).dtype)
    own: dict[str, Any] = {
        name: zero if p is None else align_param(norm, name, p, x.shape, (channel,))
        for name, p in (("log_scale", log_scale), ("shift", shift))
    }
    f = {(False, False): _forward, (True, False): _shift_first, (False, True): _inverse, (True, True): _shift_last}
    y = normalize_pointwise(
        norm, f[shift_first, inverse], x, own, None, None, (channel,), mask=mask, activation=None, **options
    )
    log_det = _log_det(x, own["log_scale"], mask)
    return y, -log_det if inverse else log_det


def _log_det(x: Array, log_scale: Array, mask: Array | None) -> Array:
    log_scale = log_scale.astype(jnp.finfo(accumulator(x)).dtype).reshape(log_scale.shape or (1,) * x.ndim)
    each = log_scale if mask is None else jnp.where(mask, log_scale, 0.0)
    repeats = math.prod(n for n, own in zip(x.shape[1:], each.shape[1:], strict=True) if own == 1)
    return jnp.broadcast_to(each.sum(tuple(range(1, x.ndim))) * repeats, x.shape[:1])


def _forward(x: Array, log_scale: Array, shift: Array) -> Array:
    return jnp.exp(log_scale.astype(x.dtype)) * x + shift.astype(x.dtype)


def _shift_first(x: Array, log_scale: Array, shift: Array) -> Array:
    return jnp.exp(log_scale.astype(x.dtype)) * (x + shift.astype(x.dtype))


def _inverse(x: Array, log_scale: Array, shift: Array) -> Array:
    return (x - shift.astype(x.dtype)) * jnp.exp(-log_scale.astype(x.dtype))


def _shift_last(x: Array, log_scale: Array, shift: Array) -> Array:
    return x * jnp.exp(-log_scale.astype(x.dtype)) - shift.astype(x.dtype)
