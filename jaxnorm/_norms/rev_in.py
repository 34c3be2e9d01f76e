"""Reversible instance normalization: a window of a series by its own statistics, which the forecast gets back."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.typing import ArrayLike

from .._core.arrays import align_boolean_mask, align_param, as_float_array, canonicalize_axes
from .._core.checks import canonicalize_epsilon, canonicalize_flags, canonicalize_number
from .._core.explain import explained
from .._core.mesh import active_axis_names
from .._core.messages import shown
from .._core.over import Axes
from .._core.platforms import recompute
from .._core.types import Params, WindowStats
from .._ops.elementwise import normalize_by_statistics
from .._ops.pointwise import normalize_pointwise
from .._ops.windows import (
    MODES,
    TRANSFORMS,
    PutBack,
    Taken,
    TakenAs,
    as_window_stats,
    epsilon_inside,
    last_of,
    window_stats,
)
from .base import RowSpec
from .declare import S, function_of, spec

Array = jax.Array

CENTERS = ("mean", "last")


@spec
class RevIN(RowSpec):
    """The hyperparameters of `rev_in`. The statistics come back with y, and are an argument of the inverse.

    Args:
      center: "mean", or "last": the last valid value of the window is taken out, and the deviation stays that from the
        mean.
      transform: "arcsinh" of y, after scale and bias, which the inverse undoes (Chronos-2); None is none.
      inverse: the inverse map. `apply` may say it as well.
      stop_gradient: whether the statistics are constants of x, as in the paper.
      activation: None: the map is invertible.
      axis: the channel axis, at any position but 0. All others but 0 are time.
      epsilon: what `epsilon_mode` says; >= 0. "inside" it is in units of x squared, else of x.
      epsilon_mode: "inside", std = sqrt(var + epsilon); "if_zero", epsilon in place of a std of 0 (Chronos-Bolt); or
        "one_below", 1 in place of a std below epsilon (TimesFM, with 1e-6).

    >>> import jaxnorm as jn, numpy as np
    >>> norm, x = jn.RevIN(epsilon=0.), np.array([[[1.], [5.]]])
    >>> params, state = norm.init(1)
    >>> (y, stats), state = norm.apply(params, state, x)
    >>> (forecast, _), state = norm.apply(params, state, np.array([[[2.]]]), stats=stats, inverse=True)
    >>> y.tolist(), forecast.tolist()
    ([[[-1.0], [1.0]]], [[[7.0]]])
    """

    use_bias: bool = True
    center: str = "mean"
    transform: str | None = None
    inverse: bool = False
    stop_gradient: bool = True
    axis: int = -1
    epsilon: float = 1e-5
    epsilon_mode: str = "inside"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("RevIN", self.center, self.transform, self.epsilon_mode, self.activation)

    @explained("apply")
    def apply(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, params: Params, state: S, x: ArrayLike, *, train: Any = None, mask: Any = None,
        stats: WindowStats | None = None, inverse: bool | None = None,
    ) -> tuple[tuple[Array, WindowStats], S]:  # fmt: skip
        """y and the statistics, and the state `()` as it came. `inverse` in place of the spec's own."""
        norm = self if inverse is None or inverse is self.inverse else dataclasses.replace(self, inverse=inverse)
        return norm._applied(params, state, x, mask=mask, stats=stats), state


def _check(norm: str, center: Any, transform: Any, mode: Any, activation: Any) -> None:
    for name, value, known in (
        ("center", center, CENTERS),
        ("transform", transform, TRANSFORMS),
        ("epsilon_mode", mode, MODES),
    ):
        if not (value is None or isinstance(value, str)) or value not in known:
            write = f"{name}={known[0]!r}".replace("'", '"')
            raise ValueError(f"{norm}: {name} must be one of {known}, got {shown(value)}. Write {write}.")
    if activation is not None:
        raise ValueError(
            f"{norm}: activation={shown(activation)} would have to be inverted, too. Write activation=None."
        )


@function_of(RevIN)
def rev_in(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    center,
    transform,
    inverse,
    stop_gradient,
    axis,
    epsilon,
    epsilon_mode,
    activation,
    axis_name,
    axis_index_groups,
    scale_offset,
    implementation,
    mask: ArrayLike | None = None,
    stats: WindowStats | None = None,
    **options,
) -> tuple[Array, WindowStats]:
    """Reversible instance normalization (RevIN): each window and channel by its own statistics, which are put back.

        y = (x - mean) / std * (scale + scale_offset) + bias,   std = sqrt(var + epsilon),   over time
        inverse:  x = (y - bias) / (scale + scale_offset) * std + mean

    A forecaster normalizes the window that it sees, and puts its forecast back:

        y, stats = rev_in(window, scale, bias)
        forecast, _ = rev_in(model(y), scale, bias, stats=stats, inverse=True)

    With `stats` and without `inverse`, x is normalized by the statistics of another window, as the target is for a loss
    on the normalized scale. Missing values are left out by `mask=~jnp.isnan(x)`, and become the bias. A channel whose
    scale is 0 has no inverse: it gets its mean back. (The paper's code divides by scale + epsilon^2 for that, which is
    not exact.) It fits any layout: patches (N, patches, points, C) are one window.

    Args:
      x: array of shape (N, T, ..., C), the channels at `axis`. Integers are promoted to float32. With `inverse`: what
        the map made, of any number of times; for a window in a low precision ask for dtype=jnp.float32.
      scale: of shape (C,), or of a shape that broadcasts against x; None is 1.
      bias: the same; None is 0.
      stats: what the call before returned, (mean, std) of x's rank. For forecasts with an axis more, such as quantiles,
        give them that axis: `jax.tree.map(lambda a: a[:, None], stats)`.

    Returns:
      y, of x's shape, and `WindowStats`: mean and std, with size 1 along time, in float32 or wider.

    Raises:
      ValueError: an inverse without stats; stats of another rank; the batch axis as channel axis; a bad center,
        transform, axis, epsilon, epsilon_mode or backend; a parameter or mask that fits x nowhere; an activation.
      TypeError: stats that are not two arrays; a dtype that cannot hold the result.
      NameError: axis_name is not bound here.

    Used by PatchTST, iTransformer, Chronos-Bolt and most other forecasters, often without scale and bias.

    Source: Kim, Kim, Tae, Park, Choi, Choo, "Reversible Instance Normalization for Accurate Time-Series Forecasting
    against Distribution Shift" (ICLR 2022).

    >>> import jaxnorm as jn, numpy as np
    >>> y, stats = jn.rev_in(np.array([[[1.], [5.]]]), epsilon=0.)
    >>> y.tolist(), jn.rev_in(np.array([[[2.]]]), stats=stats, inverse=True)[0].tolist()
    ([[[-1.0], [1.0]]], [[[7.0]]])
    """
    norm = "rev_in"
    _check(norm, center, transform, epsilon_mode, activation)
    x = as_float_array(norm, x, rank=3, layout="(batch, time, ..., channels)")
    (channel,) = canonicalize_axes(norm, x.ndim, axis, most=1)
    if channel == 0:
        raise ValueError(
            f"{norm}: axis={axis} is the batch axis of x {x.shape}, whose windows are normalized apart. "
            "Write axis=-1 for channels last, or axis=1."
        )
    inverse, stop = canonicalize_flags(norm, inverse=inverse, stop_gradient=stop_gradient)
    if inverse and stats is None:
        raise ValueError(f"{norm}: an inverse needs stats. Write stats=stats, of y, stats = {norm}(x).")
    if stats is not None:
        stats = as_window_stats(norm, stats, x.ndim)
        offset = canonicalize_number(norm, "scale_offset", scale_offset, "1.0")
        given = [align_param(norm, name, p, x.shape, (channel,)) for name, p in (("scale", scale), ("bias", bias))]
        own = {**stats._asdict(), "own scale": given[0], "own bias": given[1]}
        f = (PutBack if inverse else TakenAs)(offset, transform)
        return normalize_pointwise(
            norm, f, x, own, None, None, (channel,), mask=mask, activation=None, scale_offset=0.0,
            implementation=implementation, **options,
        ), stats  # fmt: skip
    time = tuple(a for a in range(1, x.ndim) if a != channel)
    devices = dict(axis_name=axis_name, axis_index_groups=axis_index_groups)
    x, mask = align_boolean_mask(norm, x, mask)
    epsilon = canonicalize_epsilon(norm, epsilon)
    seen = window_stats(
        norm,
        x,
        mask,
        Axes(time),
        epsilon=epsilon,
        mode=epsilon_mode,
        implementation=implementation,
        stop=stop,
        **devices,
    )
    own = {}
    if center == "last":
        names = active_axis_names(axis_name, whole=axis_index_groups is None) or None
        if names and axis_index_groups is not None:
            raise ValueError(
                f'{norm}: center="last" is over all devices of axis_name, got axis_index_groups. Write center="mean".'
            )
        last_one = recompute(lambda x, mask: last_of(x, mask, time, names), implementation == "lax")
        last = last_one(jax.lax.stop_gradient(x) if stop else x, mask)
        own, seen = {"last": last}, seen._replace(mean=last.astype(seen.mean.dtype))
    y = normalize_by_statistics(
        norm, Taken(epsilon, epsilon_mode, transform, stop), x, own, scale, bias, time, (channel,), mask=mask,
        epsilon=epsilon_inside(epsilon, epsilon_mode), activation=None, scale_offset=scale_offset,
        implementation=implementation, **devices, **options,
    )  # fmt: skip
    return y, seen
