"""What the norms over the batch have in common: checks, training, inference, and the running statistics after it.

A norm of this kind says how x is normalized in training (`by`, from what of its state: `own`), how by its state
(`given`), and what one update of that is (`step`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._core.arrays import align_boolean_mask, align_param, align_weights, canonicalize_dtype, sizes_along
from .._core.checks import canonicalize_epsilon, canonicalize_flags, canonicalize_number, warn_if_single
from .._core.masks import finite_padding, valid_mask
from .._core.mesh import active_axis_names, explain_unbound_axis
from .._core.messages import shown
from .._core.over import Axes
from .._core.types import Moments, Plan, Reduction, RunningStats, Statistics
from .._core.vma import shard_like
from .activation import check_activation
from .elementwise import Whole, with_statistics
from .normalize import normalize_given
from .plan import check_implementation, make_plan, refuse_kernels
from .policy import Devices, Running, sharing_policy
from .running import accumulate, update
from .sharing import standardize_shared
from .standardize import standardize
from .states import as_given, checked_state

Array = jax.Array


@dataclass(frozen=True)
class ByFormula:
    """A norm's own function in the place of `standardize`: it takes the same, and then the arrays that are its own.

    `f(x, statistics, affine, epsilon, *own)` is as `normalize_by_statistics` takes it.
    """

    f: Callable[..., Array]

    def __call__(self, norm: str, plan: Plan, x: Array, scale, bias, mask, weights, *own) -> tuple[Array, Statistics]:
        whole = Whole(self.f, plan)
        return with_statistics(whole, plan.reduction, plan.dtype, x, mask, weights, (scale, bias, *own))


def nothing_own(old: RunningStats) -> tuple[Array, ...]:
    return ()


def normalize_batch(
    norm: str, x: Array, scale, bias, state: Any, policy: Running, *, train, channels: tuple[int, ...], epsilon,
    scale_offset, activation, share: Devices | None, axis_name, axis_index_groups, sync, virtual_batch_size, frozen,
    dtype, implementation, mask, weights, update_stats, centered: bool = True,
    by: Callable[..., tuple[Array, Statistics]] = standardize,
    own: Callable[[RunningStats], tuple[Array, ...]] = nothing_own, own_params: tuple[Any, ...] = (),
    given: Callable[..., Array] = normalize_given,
    step: Callable[[Any, Moments, Running], RunningStats] = update, gathers: bool = True,
) -> tuple[Array, Any]:  # fmt: skip
    """(y, new state) of a norm by the statistics of the batch over all axes but `channels`.

    `by` takes `own_params` of the feature shape or of one that broadcasts, as arrays, and `own(state)` of the feature
    shape, after what `standardize` takes. `given` takes what `normalize_given` does, then `own_params`.
    `gathers`: the state may be `Moments`.
    """
    features = sizes_along(x.shape, channels)
    update_stats, frozen = canonicalize_flags(norm, update_stats=update_stats, frozen=frozen)
    old = checked_state(norm, state, channels, x, policy.needs_count)
    refuse = check_implementation if by is standardize else refuse_kernels
    refuse(norm, implementation)
    epsilon = canonicalize_epsilon(norm, epsilon)
    scale_offset = canonicalize_number(norm, "scale_offset", scale_offset, "1.0")
    train = False if frozen and train is None else checked_train(norm, train)
    check_activation(norm, activation, x.shape, x.dtype)
    seen, mask = align_boolean_mask(norm, x, mask)
    weights = align_weights(norm, x, weights)
    seen = finite_padding(seen, mask, weights)
    axis_name, sync = sharing_policy(norm, share, axis_name, axis_index_groups, sync, virtual_batch_size)
    if isinstance(old, Moments) and not gathers:
        raise TypeError(
            f"{norm}: state must be running statistics, which training reads; got Moments. Write a RunningStats."
        )
    if isinstance(old, Moments) and (frozen or train is not True):
        raise TypeError(
            f"{norm}: there are no running statistics in the Moments given as a state: they gather what training sees. "
            "Write train=True, and jaxnorm.update_state(state, moments) afterwards."
        )

    def by_running() -> Array:
        return given(
            seen, old.mean, old.var, scale, bias, valid_mask(mask, weights), *own_params, axis=channels,
            epsilon=epsilon, scale_offset=scale_offset, activation=activation, dtype=dtype,
            implementation=implementation,
        )  # fmt: skip

    if frozen or train is False:
        return by_running(), as_given(state, old)

    align = lambda name, p: align_param(norm, name, p, x.shape, channels)
    params = (align("scale", scale), align("bias", bias), *(align("a parameter", p) for p in own_params))
    scale_, bias_, *more = [None if p is None else shard_like(x, p) for p in params]
    of_state = [shard_like(x, align("state", jax.lax.stop_gradient(a))) for a in own(old)]
    args = (seen, scale_, bias_, mask, weights, *more, *of_state)
    out = canonicalize_dtype(norm, dtype, x, scale_, bias_)
    axes = tuple([a for a in range(x.ndim) if a not in channels])
    if axis_name is None:
        warn_if_single(norm, x, axes, "channel in training")
    reduction = Reduction(Axes(axes), centered, one_pass=centered)
    names = active_axis_names(axis_name)
    plan = make_plan(x, names, epsilon, scale_offset, out, reduction, implementation, activation=activation)
    with explain_unbound_axis(norm, axis_name):
        y, stats = standardize_shared(norm, plan, args, axis_name, sync, virtual_batch_size, whole=update_stats, by=by)
    new = old
    if update_stats:
        batch = _as_batch_moments(stats, features, plan.reduction)
        new = accumulate(old, batch, policy.skip_nonfinite) if isinstance(old, Moments) else step(old, batch, policy)
    if train is not True:
        y = jnp.where(train, y, by_running())
        new = jax.tree.map(lambda new, old: jnp.where(train, new, old), new, old)
    return y, as_given(state, new)


def _as_batch_moments(stats: Statistics, features, reduction: Reduction) -> Moments:
    """In x's own units and of the feature shape; the count takes part in the sharding of the others."""
    m2 = (
        stats.m2 / reduction.prescale / reduction.prescale if reduction.large_prescale is None else jnp.square(stats.m2)
    )
    count = stats.count + jnp.zeros_like(stats.m2)
    moments = Moments(count, stats.mean_hi + stats.mean_lo, m2)
    return Moments(*[a.reshape(features) for a in moments])


def checked_train(norm: str, train):
    if isinstance(train, (bool, np.bool_)):
        return bool(train)
    if isinstance(train, (jax.Array, np.ndarray)) and train.dtype == jnp.bool_ and train.ndim == 0:
        return train
    if train is None:
        raise TypeError(f"{norm}: train is missing. Write train=True in training and train=False at inference.")
    raise TypeError(f"{norm}: train must be a bool or a scalar bool array, got {shown(train)}. Write train=True.")
