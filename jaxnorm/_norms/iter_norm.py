"""Whitening (IterNorm, and decorrelated batch norm): groups of channels by their covariance over the batch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from .._core.arithmetic import prescales
from .._core.arrays import (
    align_boolean_mask,
    align_param,
    align_weights,
    as_float_array,
    canonicalize_axes,
    canonicalize_dtype,
)
from .._core.channels import canonicalize_group_count, split_channels
from .._core.checks import (
    canonicalize_epsilon,
    canonicalize_flags,
    canonicalize_number,
    check_axis_name,
    check_momentum,
)
from .._core.dtypes import accumulator
from .._core.explain import explained
from .._core.masks import finite_padding
from .._core.mesh import active_axis_names, explain_unbound_axis
from .._core.messages import shown
from .._core.platforms import recompute
from .._core.types import Affine, Features, Params
from .._core.vma import shard_like
from .._ops.activation import activate_output, check_activation, widened_to
from .._ops.batch import checked_train
from .._ops.formula import affine
from .._ops.plan import refuse_kernels
from .._ops.whiten import Groups, by_eigh, by_newton, covariance, whitened
from .base import Spec
from .declare import S, as_params, function_of, refuse_params_as_state, spec

Array = jax.Array


class WhiteningState(NamedTuple):
    """The state of `iter_norm`: what it whitens by at inference, for G groups of d channels."""

    mean: Array  # (C,), float32
    matrix: Array  # (G, d, d), float32


@spec
class IterNorm(Spec):
    """The hyperparameters of `iter_norm`. All channels are one group unless told otherwise.

    Args:
      method: "newton" makes the matrix by `steps` of an iteration, "eigh" by eigenvalues, to the end.
      steps: of the iteration of "newton". 5 do not whiten to the end yet.
      num_groups: the number of groups of channels, each whitened by itself. Give it or group_size.
      group_size: the number of channels in a group. (The `num_groups` of the official DBN means this.)
      axis: the channel axis, at any position.
      momentum: the weight of the old mean and matrix: a number, or a scalar array, which may be traced.
      epsilon: added to the diagonal of the covariance, in units of x squared; >= 0.
      axis_name: the mapped axis, or axes, of pmap, shard_map or vmap whose devices share statistics.
      frozen: whiten by the running mean and matrix and never update them, in training too.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.IterNorm(method="eigh", epsilon=0.)
    >>> params, state = norm.init(2)
    >>> y, state = norm.apply(params, state, np.random.default_rng(0).normal(size=(9, 2)).cumsum(1), train=True)
    >>> bool(np.allclose(np.cov(y.T, bias=True), np.eye(2), atol=1e-4))
    True
    """

    State: ClassVar[Any] = WhiteningState
    own_state_shape: ClassVar[bool] = True

    use_bias: bool = True
    method: str = "newton"
    steps: int = 5
    num_groups: int | None = None
    group_size: int | None = None
    axis: int = -1
    momentum: float | Array = 0.9
    epsilon: float = 1e-5
    axis_name: str | tuple[str, ...] | None = None
    frozen: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_method("IterNorm", self.method, self.steps)
        _check_momentum("IterNorm", self.momentum)
        if self.num_groups is None and self.group_size is None:
            object.__setattr__(self, "num_groups", 1)

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[Affine, WhiteningState]: ...

    def init_state(self, shape: tuple[int, ...]) -> WhiteningState:
        """Mean 0, and the matrix that changes nothing."""
        channels = math.prod(shape)
        groups = canonicalize_group_count("IterNorm.init", channels, self.num_groups, self.group_size)
        eye = jnp.eye(channels // max(groups, 1), dtype=jnp.float32)
        return WhiteningState(jnp.zeros(shape, jnp.float32), jnp.tile(eye, (groups, 1, 1)))

    @explained("apply")
    def apply(
        self, params: Params, state: S, x: ArrayLike, *, train: Any = None, mask: Any = None, weights: Any = None,
        update_stats: bool = True,
    ) -> tuple[Array, S]:  # fmt: skip
        """The whitened x and the new state. Arguments as for `iter_norm`; frozen, it needs no train."""
        params = as_params("IterNorm.apply", params)
        call = dict(train=train, mask=mask, weights=weights, update_stats=update_stats)
        return iter_norm(x, params, state, **call, **self.options())


@function_of(IterNorm)
def iter_norm(
    x: ArrayLike,
    params: Params,
    state: S,
    *,
    train: Any,
    method, steps, num_groups, group_size, axis, momentum, epsilon, axis_name, frozen, scale_offset, activation,
    dtype: DTypeLike | None, implementation,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    update_stats: bool = True,
) -> tuple[Array, S]:  # fmt: skip
    """Whitening of groups of channels.

        y = W (x - mean) * (scale + scale_offset) + bias,   S = mean((x - mean) (x - mean)^T) + epsilon I

    with the mean and S (d x d) of the d channels of a group over all other axes. For method="eigh", W = S^(-1/2), which
    is ZCA whitening. For "newton", W = P_steps / sqrt(tr S) with P_0 = I and P_{k+1} = (3 P_k - P_k^3 S / tr S) / 2.
    The gradient is exact for both, also where eigenvalues are equal. At inference mean and W are the running ones.

    Accuracy is that of a root of a matrix in float32: 1e-4, and worse the more nearly singular S is.

    Args:
      x: array of shape (N, ..., C), the channels at `axis`. Integers are promoted to float32.
      params: `Affine(scale, bias)`, each of shape (C,), or of one that broadcasts against x, or None; or a dict of the
        same names.
      state: `WhiteningState(mean, matrix)`, of shapes (C,) and (G, d, d); `IterNorm(...).init(C)` makes one. No
        gradient flows in.
      train: use the batch's statistics and update the running ones. A bool, or a traced bool.
      mask: True where an element counts. A place counts for a group of channels where all of the group's channels do.
      weights: a float weight >= 0 for each place, which is one for all channels: of a shape with size 1 at `axis`, or
        of x's leading axes. Differentiable.
      update_stats: False leaves the state as it was.

    Returns:
      An array of x's shape, and the new state: its tree, shapes and dtypes are the old one's. What saw nothing stays.

    Raises:
      ValueError: groups that do not divide the channels; a bad method, axis, momentum or epsilon; params, state, mask
        or weights that do not fit x; a backend of kernels.
      TypeError: a complex x; a dtype that cannot hold the result; `train` is not a bool.
      NameError: axis_name is not bound here.

    Used by work on whitening, such as concept whitening. Tier C: it may change in any release.

    Source: Huang, Zhou, Zhu, Liu, Shao, "Iterative Normalization" (2019), arXiv:1904.03441; Huang, Yang, Lang, Deng,
    "Decorrelated Batch Normalization" (2018), arXiv:1804.08450.

    >>> import jaxnorm as jn, numpy as np
    >>> params, state = jn.IterNorm().init(1)
    >>> y, state = jn.iter_norm(np.array([[1.], [3.]]), params, state, train=True, num_groups=1)
    >>> print(np.asarray(y).round(3).ravel(), np.asarray(state.mean).round(3))
    [-1.  1.] [0.2]
    """
    norm = "iter_norm"
    refuse_kernels(norm, implementation)
    _check_method(norm, method, steps)
    _check_momentum(norm, momentum)
    x = as_float_array(norm, x, rank=2, layout="(batch, ..., channels)")
    if jnp.iscomplexobj(x):
        raise TypeError(f"{norm}: whitening is for real values, got {x.dtype}. Write jaxnorm.batch_norm(x, ...).")
    (channel,) = canonicalize_axes(norm, x.ndim, axis, most=1)
    number = canonicalize_group_count(norm, x.shape[channel], num_groups, group_size, x.shape)
    refuse_params_as_state(norm, state)
    scale, bias = (
        align_param(norm, name, p, x.shape, (channel,)) for name, p in as_params(norm, params)._asdict().items()
    )
    scale, bias = (None if p is None else shard_like(x, p) for p in (scale, bias))
    old = _checked_state(norm, state, x.shape[channel], number)
    epsilon = canonicalize_epsilon(norm, epsilon)
    scale_offset = canonicalize_number(norm, "scale_offset", scale_offset, "1.0")
    update_stats, frozen = canonicalize_flags(norm, update_stats=update_stats, frozen=frozen)
    train = False if frozen and train is None else checked_train(norm, train)
    check_activation(norm, activation, x.shape, x.dtype)
    check_axis_name(norm, axis_name)
    out = canonicalize_dtype(norm, dtype, x, scale, bias)
    seen, mask = align_boolean_mask(norm, x, mask)
    weights = align_weights(norm, x, weights)
    if weights is not None and weights.shape[channel] != 1:
        raise ValueError(
            f"{norm}: weights of shape {weights.shape} differ between the channels at axis {channel}, which share one "
            f"covariance. Write weights of shape {(*x.shape[:channel], 1, *x.shape[channel + 1 :])}."
        )
    split = lambda a: None if a is None else split_channels(a, x.shape, channel, number)
    seen, of_places = split(finite_padding(seen, mask, weights)), _weights(split(mask), split(weights), x, channel)
    keep = None if mask is None and weights is None else of_places != 0
    small, large = prescales(epsilon, math.prod(x.shape) // max(x.shape[channel], 1), accumulator(x))
    names = active_axis_names(axis_name) or None
    plain = implementation == "lax"
    groups = Groups(channel, x.ndim + 1, small if large is None else large, names, plain)

    def output(x, keep, shift, low, matrix, scale, bias) -> Array:
        z = whitened(groups, x, keep, shift, low, matrix).reshape(shape)
        z = affine(z, scale, bias, scale_offset, widened_to(z, scale, bias))
        return z if activation is None else activate_output(activation, z, None)

    shape, per_group = x.shape, (number, x.shape[channel] // max(number, 1))
    by = lambda shift, low, matrix: recompute(output, plain)(seen, keep, shift, low, matrix, scale, bias).astype(out)
    wide = lambda a: lax.stop_gradient(a.astype(accumulator(x)))

    def by_state() -> Array:
        mean = wide(old.mean).reshape(per_group)
        return by(mean, jnp.zeros_like(mean), wide(old.matrix))

    if frozen or train is False:
        return by_state(), state
    with explain_unbound_axis(norm, axis_name):
        batch = covariance(groups, seen, of_places)
    least = epsilon * groups.prescale**2
    root = by_newton(batch.second, least, steps) if method == "newton" else by_eigh(batch.second, least)
    matrix = root * groups.prescale
    y, new = by(batch.shift, batch.low, matrix), old
    if update_stats:
        some = batch.count > 0
        kept = (some[:, None], some[:, None, None])
        part = 1.0 - (momentum.astype(accumulator(x)) if isinstance(momentum, jax.Array) else float(momentum))

        def moved(old: Array, new: Array, some: Array) -> Array:
            return jnp.where(some, old + part * (new.astype(old.dtype) - old), old).astype(old.dtype)

        stats = zip((old.mean.reshape(per_group), old.matrix), (batch.mean, matrix), kept, strict=True)
        mean, running = (lax.stop_gradient(moved(*each)) for each in stats)
        new = WhiteningState(mean.reshape(-1), running)
    if train is not True:
        y = jnp.where(train, y, by_state())
        new = jax.tree.map(lambda new, old: jnp.where(train, new, old), new, old)
    given: Any = state
    same: Any = new if isinstance(given, WhiteningState) else {name: getattr(new, name) for name in given}
    return y, same


def _weights(mask, weights, x: Array, channel: int) -> Array:
    """The weight of each place for each group of channels: (N, ..., G, 1, ...)."""
    w = jnp.ones((1,) * (x.ndim + 1), jnp.finfo(accumulator(x)).dtype) if weights is None else weights
    return w if mask is None else jnp.where(mask.all(channel + 1, keepdims=True), w, 0)


def _checked_state(norm: str, state, channels: int, groups: int) -> WhiteningState:
    if not isinstance(state, WhiteningState) and not (isinstance(state, dict) and {*state} == {"mean", "matrix"}):
        raise TypeError(
            f"{norm}: state must be a WhiteningState, or a dict of mean and matrix; got {shown(state)}. "
            f"Write params, state = jaxnorm.IterNorm(...).init({channels})."
        )
    state = state if isinstance(state, WhiteningState) else WhiteningState(**state)
    state, size = jax.tree.map(jnp.asarray, state), channels // max(groups, 1)
    if state.mean.shape != (channels,) or state.matrix.shape != (groups, size, size):
        raise ValueError(
            f"{norm}: state of shapes {state.mean.shape} and {state.matrix.shape} does not fit {groups} groups of "
            f"{size} channels. Write params, state = jaxnorm.IterNorm(num_groups={groups}).init({channels})."
        )
    return state


def _check_method(norm: str, method, steps) -> None:
    if method not in ("newton", "eigh"):
        raise ValueError(f'{norm}: method must be "newton" or "eigh", got {shown(method)}. Write method="newton".')
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"{norm}: steps must be an int >= 0, got {shown(steps)}. Write steps=5.")


def _check_momentum(norm: str, momentum) -> None:
    if momentum is None:
        raise ValueError(f"{norm}: momentum must be a number from 0 to 1: matrices do not merge. Write momentum=0.9.")
    check_momentum(norm, momentum)
