"""Running reversible instance normalization: each patch of a series by the statistics of all patches up to it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.arrays import align_boolean_mask, as_float_array, canonicalize_axes, canonicalize_dtype
from .._core.checks import canonicalize_epsilon, canonicalize_flags
from .._core.explain import explained
from .._core.masks import finite_padding
from .._core.messages import shown
from .._core.over import Prefix
from .._core.platforms import recompute
from .._core.types import Features, Moments, Reduction, WindowStats
from .._ops.elementwise import Whole, by_statistics
from .._ops.plan import make_plan, refuse_kernels
from .._ops.pointwise import normalize_pointwise
from .._ops.so_far import moments_after
from .._ops.windows import (
    MODES,
    PutBack,
    Taken,
    TakenAs,
    as_window_stats,
    epsilon_inside,
    window_stats,
)
from .base import NoParams, Spec
from .declare import S, function_of, spec

Array = jax.Array


@spec
class RunningRevIN(Spec):
    """The hyperparameters of `running_rev_in`. It has no parameters. The carry is an argument of `apply`.

    Args:
      use_scale: without effect here.
      scale_offset: without effect here.
      inverse: the inverse map. `apply` may say it as well.
      stop_gradient: whether the statistics are constants of x.
      activation: None: the map is invertible.
      axis: the channel axis, at any position but 0 and 1.
      epsilon: what `epsilon_mode` says; >= 0. "inside" it is in units of x squared, else of x.
      epsilon_mode: "one_below", 1 in place of a std below epsilon (TimesFM); "if_zero", epsilon in place of a std of 0;
        or "inside", std = sqrt(var + epsilon).

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.RunningRevIN()
    >>> params, state = norm.init(1)
    >>> (y, stats, carry), state = norm.apply(params, state, np.array([[[[1.], [5.]], [[3.], [3.]]]]))
    >>> y[..., 0].tolist(), stats.std[..., 0, 0].round(3).tolist(), carry.count.tolist()
    ([[[-1.0, 1.0], [0.0, 0.0]]], [[2.0, 1.4140000343322754]], [[4.0]])
    """

    Params: ClassVar[Any] = NoParams

    inverse: bool = False
    stop_gradient: bool = True
    axis: int = -1
    epsilon: float = 1e-6
    epsilon_mode: str = "one_below"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("RunningRevIN", self.epsilon_mode, self.activation)

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[NoParams, tuple[()]]: ...

    @explained("apply")
    def apply(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, params: Any, state: S, x: ArrayLike, *, train: Any = None, mask: Any = None,
        carry: Moments | None = None, stats: WindowStats | None = None, inverse: bool | None = None,
    ) -> tuple[tuple[Array, WindowStats, Moments | None], S]:  # fmt: skip
        """y, the statistics and the next carry, and the state `()` as it came. `inverse` in place of the spec's own."""
        norm = self if inverse is None or inverse is self.inverse else dataclasses.replace(self, inverse=inverse)
        return norm._applied(params, state, x, mask=mask, carry=carry, stats=stats), state


def _check(norm: str, mode: Any, activation: Any) -> None:
    if not isinstance(mode, str) or mode not in MODES:
        raise ValueError(
            f'{norm}: epsilon_mode must be one of {MODES}, got {shown(mode)}. Write epsilon_mode="one_below".'
        )
    if activation is not None:
        raise ValueError(
            f"{norm}: activation={shown(activation)} would have to be inverted, too. Write activation=None."
        )


@function_of(RunningRevIN)
def running_rev_in(
    x: ArrayLike,
    *,
    inverse,
    stop_gradient,
    axis,
    epsilon,
    epsilon_mode,
    activation,
    scale_offset,
    dtype,
    implementation,
    mask: ArrayLike | None = None,
    carry: Moments | None = None,
    stats: WindowStats | None = None,
) -> tuple[Array, WindowStats, Moments | None]:
    """RevIN for causal decoding: each patch of a series by the statistics of all patches up to it, its own included.

        y_p = (x_p - mean_p) / std_p,   mean_p and std_p over the patches 0 to p, of each series and channel
        inverse:  x_p = y_p * std_p + mean_p

    The forecast that a decoder makes at patch p is put back by the statistics of p. The carry holds the moments of all
    patches so far, so that long series come in pieces, to rounding:

        y, stats, carry = running_rev_in(patches)
        forecast, _, _ = running_rev_in(model(y), stats=stats, inverse=True)
        y, stats, carry = running_rev_in(next_patches, carry=carry)

    Missing values are left out by `mask=~jnp.isnan(x)`.

    Args:
      x: array of shape (N, patches, points, ..., C), the channels at `axis`. Integers are promoted to float32. With
        `inverse`: forecasts, of any number of points.
      carry: what the call before returned: `jaxnorm.Moments` of shape (N, C). None is the start of a series, and so are
        zeros, `jaxnorm.Moments.empty((N, C))`.
      stats: what a call returned, (mean, std) of x's rank: x is normalized, or put back, by these.

    Returns:
      y, of x's shape; `WindowStats`, mean and std of shape (N, patches, 1, ..., C) in float32 or wider; and the next
      carry, which with `stats` is the one that was given.

    Raises:
      ValueError: an inverse without stats; stats of another rank; a carry of another shape; axis 0 or 1 as channel
        axis; a bad axis, epsilon, epsilon_mode or backend; a mask that fits x nowhere; an activation.
      TypeError: a carry that is not `Moments`; stats that are not two arrays; a dtype that cannot hold the result.

    Used by TimesFM 2.5.

    Source: the code of TimesFM 2.5; Das, Kong, Sen, Zhou, "A decoder-only foundation model for time-series forecasting"
    (2023), arXiv:2310.10688, for the model.

    >>> import jaxnorm as jn, numpy as np
    >>> x = np.array([[[[1.], [5.]], [[3.], [3.]]]])
    >>> y, stats, carry = jn.running_rev_in(x[:, :1])
    >>> y, stats, carry = jn.running_rev_in(x[:, 1:], carry=carry)
    >>> stats.mean.ravel().tolist(), stats.std.ravel().round(3).tolist()
    ([3.0], [1.4140000343322754])
    """
    norm = "running_rev_in"
    _check(norm, epsilon_mode, activation)
    refuse_kernels(norm, implementation)
    x = as_float_array(norm, x, rank=4, layout="(batch, patches, points, ..., channels)")
    (channel,) = canonicalize_axes(norm, x.ndim, axis, most=1)
    if channel < 2:
        raise ValueError(f"{norm}: axis={axis} of x {x.shape} is that of series or of patches. Write axis=-1.")
    inverse, stop = canonicalize_flags(norm, inverse=inverse, stop_gradient=stop_gradient)
    epsilon = canonicalize_epsilon(norm, epsilon)
    carry = _checked_carry(norm, carry, (x.shape[0], x.shape[channel]))
    if inverse and stats is None:
        raise ValueError(f"{norm}: an inverse needs stats. Write stats=stats, of y, stats, carry = {norm}(x).")
    if stats is not None:
        stats = as_window_stats(norm, stats, x.ndim)
        f: Any = (PutBack if inverse else TakenAs)(0.0, None)
        y = normalize_pointwise(
            norm, f, x, {**stats._asdict(), "no scale": None, "no bias": None}, None, None, (channel,), mask=mask,
            activation=None, scale_offset=0.0, dtype=dtype, implementation=implementation,
        )  # fmt: skip
        return y, stats, carry
    out = canonicalize_dtype(norm, dtype, x)
    x, mask = align_boolean_mask(norm, x, mask)
    points = tuple(a for a in range(2, x.ndim) if a != channel)
    over, inside = Prefix(1, x.shape[1], points), epsilon_inside(epsilon, epsilon_mode)
    f = Taken(epsilon, epsilon_mode, None, stop)
    plan = make_plan(x, (), inside, 0.0, out, Reduction(over), implementation)

    def run(x: Array, mask: Array | None, carry: Moments | None) -> tuple[Array, WindowStats, Moments]:
        at_x = None if carry is None else Moments(*(jnp.expand_dims(a, (1, *points)) for a in carry))
        seen = window_stats(
            norm, x, mask, over, epsilon=epsilon, mode=epsilon_mode, implementation=implementation, stop=stop,
            carry=at_x if not stop else jax.lax.stop_gradient(at_x),
        )  # fmt: skip
        y = by_statistics(Whole(f, plan), plan.reduction, out, x, mask, None, (None, None, at_x))
        return y, seen, moments_after(x, (1, *points), mask, carry, implementation)

    return recompute(run, implementation == "lax")(finite_padding(x, mask), mask, carry)


def _checked_carry(norm: str, carry: Any, shape: tuple[int, int]) -> Moments | None:
    if carry is None:
        return None
    write = f"Write carry=jaxnorm.Moments.empty({shape}), or what the call before returned."
    if getattr(carry, "_fields", ()) != Moments._fields:
        raise TypeError(f"{norm}: carry must be jaxnorm.Moments, got {shown(carry)}. {write}")
    carry = Moments(*map(jnp.asarray, carry))
    if any(a.shape != shape for a in carry):
        raise ValueError(f"{norm}: carry must be of shape {shape}, got {[a.shape for a in carry]}. {write}")
    return carry
