"""Dish-TS: a learned level of the window that is seen, and one of the forecast."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.arithmetic import abs_squared, nonzero_divisor
from .._core.arrays import align_boolean_mask, align_param, as_float_array, canonicalize_dtype
from .._core.checks import canonicalize_epsilon, canonicalize_flags, canonicalize_number
from .._core.explain import explained
from .._core.masks import finite_padding, finite_where_masked
from .._core.messages import shown
from .._core.platforms import recompute
from .._core.types import Features, WindowStats
from .._ops.plan import refuse_kernels
from .._ops.pointwise import normalize_pointwise
from .._ops.windows import PutBack, TakenAs, as_window_stats
from .._ops.written import unit_of
from .base import Spec
from .declare import S, function_of, spec

Array = jax.Array


class DishTSParams(NamedTuple):
    """The parameters of `dish_ts`."""

    scale: Array | None  # (C,)
    bias: Array | None  # the same
    weight: Array  # (C, T, 2): of each time, for the level of the window and for that of the forecast


@spec
class DishTS(Spec):
    """The hyperparameters of `dish_ts`. The statistics come back with y, and are an argument of the inverse.

    Args:
      init_length: T, the times of a window, which `init` makes the weight for.
      inverse: the inverse map. `apply` may say it as well.
      activation: None: the map is invertible.
      epsilon: added to the mean square, in units of x squared; >= 0.

    >>> import jaxnorm as jn, numpy as np
    >>> norm, x = jn.DishTS(init_length=2, epsilon=0.), np.array([[[8.], [12.]]])
    >>> params, state = norm.init(1)
    >>> (y, stats), state = norm.apply(params, state, x)
    >>> y.round(3).tolist(), norm.apply(params, state, y, stats=stats, inverse=True)[0][0].round(1).tolist()
    ([[[-0.7070000171661377], [0.7070000171661377]]], [[[8.0], [12.0]]])
    """

    Params: ClassVar[Any] = DishTSParams
    whole: ClassVar[tuple[str, ...]] = ("weight",)
    decays: ClassVar[tuple[str, ...]] = ("weight",)

    use_bias: bool = True
    init_length: int | None = None
    inverse: bool = False
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_activation("DishTS", self.activation)

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[DishTSParams, tuple[()]]: ...

    def init_param(self, name: str, shape: tuple[int, ...]) -> Array:
        if name != "weight":
            return super().init_param(name, shape)
        length = self.init_length
        if not isinstance(length, int) or length < 1:
            raise ValueError(
                f"DishTS.init: init_length must be an int >= 1, got {shown(length)}. Write init_length=96, the times "
                "of a window."
            )
        return jnp.full((*shape, length, 2), 1.0 / length, self.param_dtype)

    @explained("apply")
    def apply(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, params: Any, state: S, x: ArrayLike, *, train: Any = None, mask: Any = None,
        stats: WindowStats | None = None, inverse: bool | None = None,
    ) -> tuple[tuple[Array, WindowStats], S]:  # fmt: skip
        """y and the statistics, and the state `()` as it came. `inverse` in place of the spec's own."""
        norm = self if inverse is None or inverse is self.inverse else dataclasses.replace(self, inverse=inverse)
        return norm._applied(params, state, x, mask=mask, stats=stats), state


def _refuse_activation(norm: str, activation: Any) -> None:
    if activation is not None:
        raise ValueError(
            f"{norm}: activation={shown(activation)} would have to be inverted, too. Write activation=None."
        )


@function_of(DishTS)
def dish_ts(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    *,
    inverse,
    epsilon,
    activation,
    scale_offset,
    dtype,
    implementation,
    mask: ArrayLike | None = None,
    stats: WindowStats | None = None,
) -> tuple[Array, WindowStats]:
    """Dish-TS: a window by a learned level, and the forecast back by another one. Both are made of the window.

        phi = gelu(sum over time of x weight),   xi = sum over time of (x - phi)^2 / (T - 1),   of each channel, twice
        y = (x - phi_window) / sqrt(xi_window + epsilon) * (scale + scale_offset) + bias
        inverse:  x = (y - bias) / (scale + scale_offset) * sqrt(xi_forecast + epsilon) + phi_forecast

    xi is about phi, not about the mean. The gelu is the exact one, so that a level is hardly ever negative: the method
    is for series that are not. A masked-out value counts as 0 in phi, and not in xi nor in T.

    Args:
      x: array of shape (N, T, C). Integers are promoted to float32. With `inverse`: forecasts, of any number of times.
      scale: of shape (C,), or of a shape that broadcasts against x; None is 1.
      bias: the same; None is 0.
      weight: of shape (C, T, 2). `init` makes 1 / T, as the paper's code has it for "avg"; for "standard" that draws
        uniform numbers / T. Not needed with `inverse`.
      stats: what the call before returned, for the inverse.

    Returns:
      y, of x's shape, and `WindowStats` of the forecast: phi and sqrt(xi + epsilon) of shape (N, 1, C), in float32 or
      wider.

    Raises:
      ValueError: an inverse without stats; stats without an inverse, because they are of the forecast; no weight, or
        one of another shape; a bad epsilon or backend; a parameter or mask that fits x nowhere; an activation.
      TypeError: a complex x; stats that are not two arrays; a dtype that cannot hold the result.

    Used by Dish-TS around any forecaster. Tier C: it may change in any release.

    Source: Fan, Wang, Wang, Wang, Wang, Fu, "Dish-TS: A General Paradigm for Alleviating Distribution Shift in Time
    Series Forecasting" (2023), arXiv:2302.14829.

    >>> import jaxnorm as jn, numpy as np
    >>> y, stats = jn.dish_ts(np.array([[[8.], [12.]]]), weight=np.full((1, 2, 2), 0.5), epsilon=0.)
    >>> jn.dish_ts(y, stats=stats, inverse=True)[0].round(1).tolist()
    [[[8.0], [12.0]]]
    """
    norm = "dish_ts"
    _refuse_activation(norm, activation)
    refuse_kernels(norm, implementation)
    x = as_float_array(norm, x, rank=3, layout="(batch, time, channels)")
    if x.ndim != 3:
        raise ValueError(f"{norm}: x must be (batch, time, channels), got {x.shape}. Write jax.vmap over more.")
    if jnp.iscomplexobj(x):
        raise TypeError(f"{norm}: x must be real, got {x.dtype}. Write {norm}(x.real, ...), and the same of x.imag.")
    (inverse,) = canonicalize_flags(norm, inverse=inverse)
    if inverse != (stats is not None):
        raise ValueError(
            f"{norm}: stats are for the inverse, and it needs them; got inverse={inverse} and stats={shown(stats)}. "
            "Write stats=stats, inverse=True."
        )
    offset = canonicalize_number(norm, "scale_offset", scale_offset, "1.0")
    epsilon = canonicalize_epsilon(norm, epsilon)
    given = [align_param(norm, name, p, x.shape, (2,)) for name, p in (("scale", scale), ("bias", bias))]
    out = canonicalize_dtype(norm, dtype, x)
    x, mask = align_boolean_mask(norm, x, mask)

    def mapped(f: Any, x: Array, mask, of: WindowStats, scale, bias) -> Array:
        own = {**of._asdict(), "own scale": scale, "own bias": bias}
        return normalize_pointwise(
            norm, f(offset, None), x, own, None, None, (2,), mask=mask, activation=None, scale_offset=0.0, dtype=out,
            implementation=implementation,
        )  # fmt: skip

    if stats is not None:
        stats = as_window_stats(norm, stats, 3)
        return mapped(PutBack, x, mask, stats, *given), stats
    shape = (x.shape[2], x.shape[1], 2)
    if weight is None or jnp.shape(weight) != shape:
        raise ValueError(
            f"{norm}: weight must be of shape (channels, time, 2) = {shape}, got {shown(weight)}. "
            f"Write weight=jnp.full({shape}, {1 / max(x.shape[1], 1):.3g})."
        )

    def run(x: Array, mask, weight, scale, bias) -> tuple[Array, WindowStats]:
        window, forecast = (_level(x, mask, weight[..., k], epsilon) for k in range(2))
        return mapped(TakenAs, x, mask, window, scale, bias), forecast

    return recompute(run, implementation == "lax")(finite_padding(x, mask), mask, jnp.asarray(weight), *given)


def _level(x: Array, mask: Array | None, weight: Array, epsilon: float) -> WindowStats:
    wide = finite_where_masked(x, mask)
    wide = wide if mask is None else jnp.where(mask, wide, 0.0)
    phi = jax.nn.gelu((wide * weight.T[None].astype(wide.dtype)).sum(1, keepdims=True), approximate=False)
    d = wide - phi
    d = d if mask is None else jnp.where(mask, d, 0.0)
    n = x.shape[1] if mask is None else jnp.broadcast_to(mask, x.shape).sum(1, keepdims=True, dtype=wide.dtype)
    unit = unit_of(d, (1,), least=epsilon**0.5)
    v = abs_squared(d / unit).sum(1, keepdims=True) / jnp.maximum(n - 1.0, 1.0) + epsilon / unit / unit
    return WindowStats(phi, unit * jnp.where(v == 0, 0.0, jnp.sqrt(nonzero_divisor(v))))
