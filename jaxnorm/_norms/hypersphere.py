"""The hypersphere update: a step on the unit sphere in the place of a residual sum."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.arrays import align_boolean_mask, align_param, as_float_array, canonicalize_axes, canonicalize_dtype
from .._core.checks import canonicalize_flags, canonicalize_number
from .._core.dtypes import accumulator, widest
from .._core.explain import explained
from .._core.masks import finite_padding
from .._core.platforms import recompute
from .._core.types import Features
from .._core.vma import shard_like
from .._ops.activation import activate_output, check_activation
from .._ops.length import normalize_length
from .._ops.plan import refuse_kernels
from .._ops.residual import as_residual
from .base import RowSpec
from .declare import S, function_of, spec

Array = jax.Array


class HypersphereParams(NamedTuple):
    """The parameters of `hypersphere_update`."""

    alpha: Array  # feature shape


@spec
class HypersphereUpdate(RowSpec):
    """The hyperparameters of `hypersphere_update`. The residual is an argument of `apply`, after x.

    Args:
      use_scale: without effect here.
      scale_offset: without effect here.
      rate: the step that the first alpha makes. (nGPT: 0.05; SimBaV2: 1 / (blocks + 1).)
      stored_rate: the number that stands for it in alpha, which sets how fast it is learned. None is C**-0.5.
      absolute: whether the size of a step is |alpha| (nGPT), or alpha (SimBaV2).
      normalize_residual: whether the residual is brought to unit length first. False is for one that is (SimBaV2).
      axis: the channel axis.
      epsilon: the least length that a vector is divided by, in units of x; >= 0. (SimBaV2: 1e-8.)

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.HypersphereUpdate(rate=0.5)
    >>> params, state = norm.init(2)
    >>> norm.apply(params, state, np.array([[0., 2.]]), np.array([[3., 0.]]))[0].round(3).tolist()
    [[0.7070000171661377, 0.7070000171661377]]
    """

    Params: ClassVar[Any] = HypersphereParams

    rate: float = 0.05
    stored_rate: float | None = None
    absolute: bool = True
    normalize_residual: bool = True
    axis: int = -1
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        canonicalize_number("HypersphereUpdate", "rate", self.rate, "0.05")
        _stored("HypersphereUpdate", self.stored_rate, 1)

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[HypersphereParams, tuple[()]]: ...

    def init_param(self, name: str, shape: tuple[int, ...]) -> Array:
        return jnp.full(shape, _stored("HypersphereUpdate", self.stored_rate, math.prod(shape)), self.param_dtype)

    @explained("apply")
    def apply(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, params: Any, state: S, x: ArrayLike, residual: ArrayLike, *, train: Any = None, mask: Any = None
    ) -> tuple[Array, S]:
        """The next residual, and the state `()` as it came."""
        return self._applied(params, state, x, residual, mask=mask), state


def _stored(norm: str, stored_rate, channels: int) -> float:
    if stored_rate is None:
        return max(channels, 1) ** -0.5
    stored = canonicalize_number(norm, "stored_rate", stored_rate, "None", 0.0)
    if stored == 0.0:
        raise ValueError(f"{norm}: stored_rate must be > 0, got 0. Write stored_rate=None for C**-0.5.")
    return stored


@function_of(HypersphereUpdate)
def hypersphere_update(
    x: ArrayLike,
    residual: ArrayLike,
    alpha: ArrayLike,
    *,
    rate,
    stored_rate,
    absolute,
    normalize_residual,
    axis,
    epsilon,
    scale_offset,
    activation,
    dtype,
    axis_name,
    axis_index_groups,
    implementation,
    mask: ArrayLike | None = None,
) -> Array:
    """nGPT's update: from the residual, which is on the unit sphere, a step towards x.

        y = unit(h + a * (unit(x) - h)),   h = unit(residual),   a = |alpha| * rate / stored_rate

    with unit(u) = u / max(|u|, epsilon) along `axis`, and zeros for zeros. y is the next residual. alpha has a rate for
    each channel, so that a step leaves the arc between the two. Weights are brought to unit length apart from this,
    and queries and keys by `qk_norm(kind="l2")`. It is in float32 or wider and rounded once; the backward pass keeps x
    and the residual, each in its own dtype.

    Args:
      x: array of any shape of rank 1 or more, what a part of the network made. Integers are promoted to float32.
      residual: what went into that part, of x's shape.
      alpha: of shape (C,), or of a shape that broadcasts against x; or a number.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: a residual of another shape; a bad rate, axis, epsilon or backend; an alpha or mask that fits x
        nowhere.
      TypeError: an alpha that is None; a dtype that cannot hold the result.
      NameError: axis_name is not bound here.

    Used by nGPT, SimBaV2 and OLMo-core.

    Source: Loshchilov, Hsieh, Sun, Ginsburg, "nGPT: Normalized Transformer with Representation Learning on the
    Hypersphere" (2024), arXiv:2410.01131; without `absolute` Lee et al., "Hyperspherical Normalization for Scalable
    Deep Reinforcement Learning" (2025), arXiv:2502.15280.

    >>> import jaxnorm as jn, numpy as np
    >>> x, h = np.array([[0., 2.]]), np.array([[3., 0.]])
    >>> jn.hypersphere_update(x, h, 0.5, rate=1., stored_rate=1.).round(3).tolist()
    [[0.7070000171661377, 0.7070000171661377]]
    """
    norm = "hypersphere_update"
    refuse_kernels(norm, implementation)
    x = as_float_array(norm, x, rank=1, layout="the channel axis among its own")
    residual = as_residual(norm, x, residual)
    (channel,) = canonicalize_axes(norm, x.ndim, axis, most=1)
    if alpha is None:
        raise TypeError(f"{norm}: alpha must be an array or a number, got None. Write alpha=0.05, stored_rate=0.05.")
    absolute, normalize_residual = canonicalize_flags(norm, absolute=absolute, normalize_residual=normalize_residual)
    times = canonicalize_number(norm, "rate", rate, "0.05") / _stored(norm, stored_rate, x.shape[channel])
    of_x: Any = align_param(norm, "alpha", alpha, x.shape, (channel,))
    alpha = shard_like(x, of_x)
    out = canonicalize_dtype(norm, dtype, x, residual, alpha)
    check_activation(norm, activation, x.shape, x.dtype)
    masked = {}
    for name, a in (("x", x), ("residual", residual)):
        masked[name], keep = align_boolean_mask(norm, a, mask)
        masked[name] = finite_padding(masked[name], keep)
    x, residual = masked["x"], masked["residual"]

    def unit(u: Array, keep: Array | None) -> Array:
        wide = accumulator(u)
        return normalize_length(
            norm, u, None, (channel,), epsilon=epsilon, epsilon_mode="max", scale_offset=0.0, activation=None,
            mask=keep, axis_name=axis_name, axis_index_groups=axis_index_groups, dtype=wide,
            implementation=implementation,
        )  # fmt: skip

    def update(x: Array, residual: Array, alpha: Array, keep: Array | None) -> Array:
        to = unit(x, keep)
        h = unit(residual, keep) if normalize_residual else _without_padding(residual, keep)
        wide = widest(to.dtype, h.dtype, alpha.dtype)
        to, h, a = to.astype(wide), h.astype(wide), alpha.astype(wide) * times
        y = unit(h + (jnp.abs(a) if absolute else a) * (to - h), keep)
        return (y if activation is None else activate_output(activation, y, keep)).astype(out)

    return recompute(update, implementation == "lax")(x, residual, alpha, keep)


def _without_padding(h: Array, keep: Array | None) -> Array:
    h = h.astype(accumulator(h))
    return h if keep is None else jnp.where(keep, h, 0.0)
