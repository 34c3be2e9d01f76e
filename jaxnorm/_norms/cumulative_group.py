"""Cumulative group norm: every frame by the statistics of all frames so far, within a call and over many."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.arrays import align_boolean_mask, align_param, as_float_array, canonicalize_axes, canonicalize_dtype
from .._core.channels import canonicalize_group_count, spans_devices, split_channels
from .._core.checks import canonicalize_epsilon, canonicalize_number
from .._core.dtypes import accumulator
from .._core.explain import explained
from .._core.masks import finite_padding
from .._core.messages import shown
from .._core.over import Prefix
from .._core.platforms import recompute
from .._core.types import Moments, Params, Reduction
from .._core.vma import shard_like
from .._ops.activation import check_activation
from .._ops.elementwise import OfElements, Whole, by_statistics
from .._ops.plan import make_plan, refuse_kernels
from .._ops.so_far import deviation_so_far, moments_after, rsqrt_so_far
from .base import Spec
from .declare import S, function_of, spec

Array = jax.Array

VARIANCES = ("prefix", "running")


@spec
class CumulativeGroupNorm(Spec):
    """The hyperparameters of `cumulative_group_norm`. The carry is an argument of `apply`, and comes back with y.

    Args:
      num_groups: the number of groups of channels. One group is cumulative layer norm (cLN).
      group_size: the number of channels in a group, in place of num_groups.
      axis: the channel axis, at any position but 0.
      time_axis: the axis along which frames follow each other, at any position but 0.
      variance: "prefix", the variance of all frames so far (Conv-TasNet, asteroid); or "running", where the deviation
        of each frame is from the mean at that frame, and is never corrected (Gemma 3n, sequence-layers, praxis).
      epsilon: added to the variance, in units of x squared; >= 0. (sequence-layers has 1e-6, Gemma 3n 1e-3.)

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.CumulativeGroupNorm(epsilon=0.)
    >>> params, state = norm.init(2)
    >>> (y, carry), state = norm.apply(params, state, np.array([[[1., 3.], [4., 4.]]]))
    >>> y.round(3).tolist(), carry.count.tolist(), carry.mean.tolist()
    ([[[-1.0, 1.0], [0.8160000443458557, 0.8160000443458557]]], [[4.0]], [[3.0]])
    """

    use_bias: bool = True
    num_groups: int | None = None
    group_size: int | None = None
    axis: int = -1
    time_axis: int = 1
    variance: str = "prefix"
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_variance("CumulativeGroupNorm", self.variance)

    def _check_features(self, shape: tuple[int, ...]) -> None:
        super()._check_features(shape)
        _number("CumulativeGroupNorm.init", math.prod(shape), self.num_groups, self.group_size)

    @explained("apply")
    def apply(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, params: Params, state: S, x: ArrayLike, *, train: Any = None, mask: Any = None,
        carry: Moments | None = None,
    ) -> tuple[tuple[Array, Moments], S]:  # fmt: skip
        """y and the next carry, and the state `()` as it came."""
        return self._applied(params, state, x, mask=mask, carry=carry), state


def _check_variance(norm: str, variance: Any) -> None:
    if not isinstance(variance, str) or variance not in VARIANCES:
        raise ValueError(f'{norm}: variance must be one of {VARIANCES}, got {shown(variance)}. Write "prefix".')


def _number(norm: str, channels: int, num_groups, group_size) -> int:
    if num_groups is None and group_size is None:
        return 1
    return canonicalize_group_count(norm, channels, num_groups, group_size)


@function_of(CumulativeGroupNorm)
def cumulative_group_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    num_groups,
    group_size,
    axis,
    time_axis,
    variance,
    epsilon,
    scale_offset,
    activation,
    dtype,
    implementation,
    mask: ArrayLike | None = None,
    carry: Moments | None = None,
) -> tuple[Array, Moments]:
    """Group norm by all frames so far, which is causal: for streams. One group, the default, is cumulative layer norm.

        y_t = (x_t - mean_t) / sqrt(var_t + epsilon) * (scale + scale_offset) + bias

    with mean_t and var_t over the frames 0 to t, over every other axis but the batch axis 0, and over a group of
    channels. The carry holds the moments of all frames so far. A stream that comes in pieces, of any number of frames,
    gives what one call gives, to rounding:

        y, carry = cumulative_group_norm(x[:, :5], scale, bias)
        z, carry = cumulative_group_norm(x[:, 5:], scale, bias, carry=carry)

    It fits `jax.lax.scan`, and has gradients. Layers take and return it as well, as recurrent cells do, and hold no
    variable: its size is that of the batch, and each stream of a batch starts at a time of its own. Padded frames do
    not count. Group norm of the whole clip is `group_norm`, and of one frame `layer_norm` or `group_rms_norm`.

    Args:
      x: array of shape (N, T, ..., C), time at `time_axis` and the channels at `axis`. Integers are promoted to
        float32.
      scale: of shape (C,), or of a shape that broadcasts against x; None is 1.
      bias: the same; None is 0.
      carry: what the call before returned: `jaxnorm.Moments` of shape (N, groups). None is the start of a stream, and
        so are zeros, `jaxnorm.Moments.empty((N, groups))`. For "running" its m2 is the sum of the squares so far. Its
        mean is one float32, so that a mean of 1e4 deviations costs a thousandth of one.

    Returns:
      y, an array of x's shape, and the next carry.

    Raises:
      ValueError: the batch axis as another one; one axis for time and channels; groups that do not divide the
        channels; a carry of another shape; a bad variance, axis, epsilon or backend; a scale, bias or mask that fits x
        nowhere.
      TypeError: a carry that is not `Moments`; a dtype that cannot hold the result.

    Used by streaming speech models: Conv-TasNet, the audio encoder of Gemma 3n, sequence-layers and praxis.

    Source: Luo, Mesgarani, "Conv-TasNet: Surpassing Ideal Time-Frequency Magnitude Masking for Speech Separation"
    (2018), arXiv:1809.07454, as cLN.

    >>> import jaxnorm as jn, numpy as np
    >>> x = np.array([[[1., 3.], [4., 4.]]])
    >>> y, carry = jn.cumulative_group_norm(x[:, :1], epsilon=0.)
    >>> jn.cumulative_group_norm(x[:, 1:], epsilon=0., carry=carry)[0].round(3).tolist()
    [[[0.8160000443458557, 0.8160000443458557]]]
    """
    norm = "cumulative_group_norm"
    _check_variance(norm, variance)
    refuse_kernels(norm, implementation)
    x = as_float_array(norm, x, rank=3, layout="(batch, time, ..., channels)")
    (channel,) = canonicalize_axes(norm, x.ndim, axis, most=1)
    (time,) = canonicalize_axes(norm, x.ndim, time_axis, what="time_axis", most=1)
    if channel == time or 0 in (channel, time):
        raise ValueError(
            f"{norm}: x of shape {x.shape} has its batch at axis 0, and axis={axis} and time_axis={time_axis} must be "
            "two others. Write axis=-1, time_axis=1 for (batch, time, ..., channels)."
        )
    groups = _number(norm, x.shape[channel], num_groups, group_size)
    scale, bias = (align_param(norm, name, p, x.shape, (channel,)) for name, p in (("scale", scale), ("bias", bias)))
    scale, bias = (None if p is None else shard_like(x, p) for p in (scale, bias))
    out = canonicalize_dtype(norm, dtype, x, scale, bias)
    check_activation(norm, activation, x.shape, x.dtype)
    epsilon = canonicalize_epsilon(norm, epsilon)
    scale_offset = canonicalize_number(norm, "scale_offset", scale_offset, "1.0")
    carry = _checked_carry(norm, carry, (x.shape[0], groups))
    x, mask = align_boolean_mask(norm, x, mask)

    view = lambda a: split_channels(a, x.shape, channel, groups)
    time, group = time + (time > channel), channel  # of the view
    beside = tuple(a for a in range(1, x.ndim + 1) if a not in (time, group))
    over = Prefix(time, x.shape[time - (time > channel)], beside)
    viewed = jax.eval_shape(view, jax.ShapeDtypeStruct(x.shape, x.dtype))

    def plan(f, centered: bool) -> Whole:
        reduction = Reduction(over, centered)
        return Whole(
            f, make_plan(viewed, (), epsilon, scale_offset, out, reduction, implementation, activation=activation)
        )

    def run(x, mask, scale, bias, carry) -> tuple[Array, Moments]:
        x, (mask, scale, bias) = view(x), (None if a is None else view(a) for a in (mask, scale, bias))
        at_x = None if carry is None else Moments(*(_spread(a, x.ndim, group) for a in carry))
        after = moments_after(x, (*beside, time), mask, carry, implementation)
        if variance == "prefix":
            whole = plan(_of_prefix, True)
            return by_statistics(whole, whole.plan.reduction, out, x, mask, None, (scale, bias, at_x)), after
        first = plan(_of_prefix, True).plan.reduction
        d = by_statistics(_deviation, first, accumulator(x), x, mask, None, at_x)
        whole = plan(_by_running_squares, False)
        y = by_statistics(whole, whole.plan.reduction, out, d, mask, None, (scale, bias, at_x))
        squares = jnp.square(jnp.abs(d) if jnp.iscomplexobj(d) else d)
        m2 = jnp.sum(squares if mask is None else jnp.where(mask, squares, 0.0), (*beside, time))
        return y, after._replace(m2=m2 if carry is None else carry.m2 + m2)

    whole: Any = recompute(run, implementation == "lax")
    if spans_devices(x, channel, groups):
        whole = jax.sharding.auto_axes(whole, out_sharding=jax.sharding.PartitionSpec())
    y, after = whole(finite_padding(x, mask), mask, scale, bias, carry)
    return y.reshape(x.shape), after


def _checked_carry(norm: str, carry: Any, shape: tuple[int, int]) -> Moments | None:
    if carry is None:
        return None
    write = f"Write carry=jaxnorm.Moments.empty({shape}), or what the call before returned."
    if getattr(carry, "_fields", ()) != Moments._fields:
        raise TypeError(f"{norm}: carry must be jaxnorm.Moments, got {shown(carry)}. {write}")
    carry = Moments(*map(jnp.asarray, carry))
    if any(a.shape != shape for a in carry):
        shapes = [a.shape for a in carry]
        raise ValueError(f"{norm}: carry must be of shape (batch, groups) = {shape}, got {shapes}. {write}")
    return carry


def _spread(a: Array, ndim: int, group: int) -> Array:
    """From (N, G) to x's rank in groups."""
    return jnp.expand_dims(a, tuple(i for i in range(1, ndim) if i != group))


def _of_prefix(x: Array, of: OfElements, affine, epsilon: float, carry: Moments | None = None) -> Array:
    r = rsqrt_so_far(of, epsilon, carry)
    return affine(of.bounded(deviation_so_far(x, of, carry) * r.astype(x.dtype)))


def _deviation(x: Array, of: OfElements, carry: Moments | None) -> Array:
    return of.bounded(deviation_so_far(x, of, carry))


def _by_running_squares(d: Array, of: OfElements, affine, epsilon: float, carry: Moments | None = None) -> Array:
    return affine(of.bounded(d * rsqrt_so_far(of, epsilon, carry).astype(d.dtype)))
