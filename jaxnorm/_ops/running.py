"""The running statistics: one update, many updates in one, and bringing together what devices gathered apart."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._core.arithmetic import abs_squared, nonzero_divisor
from .._core.checks import check_axis_name
from .._core.dtypes import widest
from .._core.explain import explained
from .._core.mesh import explain_unbound_axis
from .._core.program import as_program
from .._core.types import Moments, RunningStats
from .._core.vma import with_sharding_of
from .moments import merge, merge_across
from .policy import EMA, Cumulative, Running, running_policy
from .states import map_stats, refuse_moments

Array = jax.Array


@explained("function")
@as_program
def update_state(
    state: Any,
    moments: Any,
    *,
    momentum: float | Array | None = 0.99,
    min_count: float | None = None,
    skip_nonfinite: bool = False,
    zero_debias: bool = False,
    unbiased_running_var: bool = False,
    running: EMA | Cumulative | None = None,
) -> Any:
    """Update running statistics once, from the moments of one batch or of many micro-batches.

        running = momentum * running + (1 - momentum) * batch

    With gradients accumulated over k micro-batches (`optax.MultiSteps`), gather moments over the k as well and update
    once: the state is then what one batch of them all would have made. In training `batch_norm` merges into `Moments`
    where it is given those in place of a state:

        seen = jn.Moments.empty(64)
        for x in micro_batches:
            y, seen = norm.apply(params, seen, x, train=True)
        state = norm.update_state(state, seen)

    In Flax, `BatchNorm(momentum=None)` gathers the same in its `batch_stats`, from a `count` of zero.

    Args:
      state: `RunningStats`, or any tree of them; of dicts with `mean` and `var` too, as Flax has them.
      moments: `Moments` (or a dict of the same), or cumulative running statistics (those have a `count`); a tree of
        them as `state` is.
      momentum: the weight of the old statistics, a number or a scalar array such as a schedule computes. None: the
        exact cumulative statistics (needs `state.count`).
      min_count: a channel with fewer elements than this keeps its old statistics.
      skip_nonfinite: so does a channel whose moments are not finite.
      zero_debias: correct for the start, as Adam does (needs `state.count`).
      unbiased_running_var: the running variance takes m2 / (n - 1).
      running: all of these as one object: `EMA(...)` or `Cumulative()`.

    Returns:
      The new state: its tree, shapes and dtypes are the old one's. What saw nothing stays as it was.

    Raises:
      ValueError: a bad momentum, a state without the count it needs, or moments without a count.
      TypeError: something in the tree is no running statistic.

    >>> import jaxnorm as jn, numpy as np
    >>> norm, micro_batches = jn.BatchNorm(momentum=0.5), np.array([[[1.], [3.]], [[5.], [7.]]], "f")
    >>> (params, state), seen = norm.init(1), jn.Moments.empty(1)
    >>> for x in micro_batches:
    ...     y, seen = norm.apply(params, seen, x, train=True)
    >>> state = norm.update_state(state, seen)
    >>> state.mean.tolist(), state.var.tolist()  # of 1, 3, 5, 7: mean 4, variance 5
    ([2.0], [3.0])
    """
    policy = running_policy(
        "update_state", running, momentum=momentum, min_count=min_count, skip_nonfinite=skip_nonfinite,
        zero_debias=zero_debias, unbiased_running_var=unbiased_running_var,
    )  # fmt: skip

    def one(old: RunningStats, seen) -> RunningStats:
        refuse_moments("update_state", old, "jaxnorm.update_state(state, moments)")
        if seen.count is None:
            raise ValueError(
                "update_state: moments have no count, so how much was seen is unknown. Gather them in "
                "jaxnorm.Moments.empty(features), or in the batch_stats of BatchNorm(momentum=None)."
            )
        if old.count is None and policy.needs_count:
            raise ValueError(
                "update_state: momentum=None and zero_debias need state.count, which is None. Write "
                "state._replace(count=jnp.zeros_like(state.var))."
            )
        m2 = seen.m2 if isinstance(seen, Moments) else seen.var * seen.count
        batch = Moments(*(jnp.asarray(a) for a in (seen.count, seen.mean, m2)))
        return update(old, batch, policy)

    return map_stats("update_state", one, state, moments)


@explained("function")
@as_program
def sync_state(state: Any, axis_name: str | tuple[str, ...]) -> Any:
    """Merge running statistics that devices accumulated independently, so that all devices hold the same values.

        mean = sum(n_d mean_d) / n;   var = sum(n_d (var_d + |mean_d - mean|**2)) / n;   count = n / devices

    where n_d is the device's `count`, or 1 where the state has none. An average of the variances alone lacks how far
    the devices' means are apart. Averaging the counts keeps every element counted once, however often this is called
    while `momentum=None` gathers on.

    Statistics that batch norm with `axis_name` gathered are the same on all devices already. This is for those gathered
    without: before evaluating, saving, or returning them from `shard_map` as replicated.

    Args:
      state: `RunningStats`, or any tree of them; of dicts with `mean` and `var` too, as Flax has them, and nnx states
        of `nnx.BatchStat`.
      axis_name: the mapped axis, or axes, of pmap, shard_map or vmap. (For states stacked along a leading axis:
        `jax.vmap(lambda s: jn.sync_state(s, "d"), axis_name="d", out_axes=None)(stacked)`.)

    Returns:
      The new state: its tree, shapes and dtypes are the old one's.

    Raises:
      NameError: axis_name is not bound here.
      TypeError: something in the tree is no running statistic.

    >>> import jax, jaxnorm as jn, numpy as np
    >>> apart = jn.RunningStats(mean=np.array([[1.], [3.]]), var=np.array([[4.], [6.]]))
    >>> state = jax.vmap(lambda s: jn.sync_state(s, "devices"), axis_name="devices", out_axes=None)(apart)
    >>> state.mean.tolist(), state.var.tolist()
    ([2.0], [6.0])
    """

    def one(old: RunningStats) -> RunningStats:
        refuse_moments("sync_state", old, "jaxnorm.merge_across(moments, axis_name)")
        acc = widest(jnp.asarray(old.var).dtype, jnp.float32)
        # Where no device has counted anything all have their initial values, and so has what is merged of them.
        n = jnp.ones_like(old.var, acc) if old.count is None else jnp.maximum(old.count.astype(acc), _NOTHING)
        mean = jnp.asarray(old.mean).astype(widest(acc, old.mean.dtype))
        merged = merge_across(Moments(n, mean, jnp.asarray(old.var).astype(acc) * n), axis_name)
        count = None
        if old.count is not None:
            share = merged.count / lax.axis_size(axis_name)
            count = jnp.where(share > 2 * _NOTHING, share, 0.0).astype(old.count.dtype)
        return RunningStats(merged.mean.astype(old.mean.dtype), merged.var.astype(old.var.dtype), count)

    check_axis_name("sync_state", axis_name)
    with explain_unbound_axis("sync_state", axis_name):
        return map_stats("sync_state", one, state)


_NOTHING = 1e-20  # negligible beside any count


def _sharded_as_the_state(f: Callable) -> Callable:
    """f(state, moments, ...) of arrays sharded as the state's mean; each result is sharded as what it replaces."""

    @functools.wraps(f)
    def run(state, moments, *options):
        alike = lambda tree: jax.tree.map(functools.partial(with_sharding_of, state.mean), tree)
        return jax.tree.map(with_sharding_of, state, f(alike(state), alike(moments), *options))

    return run


@_sharded_as_the_state
def update(state, batch: Moments, policy: Running, counts: bool = False) -> RunningStats:
    """The running statistics after this batch; a channel that saw nothing, or not enough, keeps its own.

    `counts`: `state.count` is the number of updates, whatever the policy.
    """
    momentum, min_count, unbiased = policy.momentum, policy.min_count, policy.unbiased
    acc = widest(state.var.dtype, batch.m2.dtype)
    old_mean, old_var = state.mean.astype(widest(acc, state.mean.dtype)), state.var.astype(acc)
    batch = Moments(batch.count.astype(acc), batch.mean.astype(old_mean.dtype), batch.m2.astype(acc))
    freedom = 1.0 if unbiased else 0.0  # what the variance's divisor lacks of n
    seen = batch.count > 0 if min_count is None else (batch.count > 0) & (batch.count >= min_count)
    if policy.skip_nonfinite:
        seen &= jnp.isfinite(batch.mean) & jnp.isfinite(batch.m2)
    has_var = batch.count > freedom
    count = None if state.count is None else state.count.astype(acc)
    if momentum is None:
        assert count is not None  # _checked_state
        total = count + batch.count
        part, has_var = batch.count / nonzero_divisor(total), total > freedom
        # Variances that divide by n, since those merge. By shares of the total, not by sums of squares: the count stops
        # growing where float32 cannot tell total from count, and the shares stay those of an average even then.
        free = lambda n: jnp.maximum(n - freedom, 0.0) / nonzero_divisor(n)
        between = part * (1.0 - part) * abs_squared(batch.mean - old_mean)
        var = _toward(old_var * free(count), batch.m2 / nonzero_divisor(batch.count), part) + between
        mean, var, count = _toward(old_mean, batch.mean, part), var / nonzero_divisor(free(total)), total
    else:
        momentum = jnp.asarray(momentum, acc) if isinstance(momentum, jax.Array) else float(momentum)
        part = 1.0 - momentum
        if (policy.debias or counts) and count is not None:
            count = count + 1.0
            part = _debiased(part, momentum, count) if policy.debias else part
        var = _toward(old_var, batch.m2 / nonzero_divisor(jnp.maximum(batch.count - freedom, 0.0)), part)
        mean = _toward(old_mean, batch.mean, part)
    keep = lambda new, old, where=seen: lax.stop_gradient(jnp.where(where, new.astype(old.dtype), old))
    return RunningStats(
        keep(mean, state.mean),
        keep(var, state.var, seen & has_var),
        None if state.count is None else keep(count, state.count),
    )


def update_and_count(state, batch: Moments, policy: Running) -> RunningStats:
    """`update`, with `state.count` as the number of updates, which schedules are functions of."""
    return update(state, batch, policy, True)


def _toward(old: Array, new: Array, part) -> Array:
    """old + part (new - old), which has no bias; (1 - part) old + part new has one, since float32 rounds 1 - part."""
    if isinstance(part, float):
        return new if part == 1.0 else old + part * (new - old)
    return jnp.where(part == 1.0, new, old + part.astype(old.dtype) * (new - old))


def _debiased(part, momentum, count: Array) -> Array:
    """(1 - momentum) / (1 - momentum**count), which is 1 / count for a momentum of 1."""
    if isinstance(momentum, float) and momentum in (0.0, 1.0):
        return jnp.ones_like(count) if momentum == 0.0 else 1.0 / count
    if isinstance(momentum, float):  # float32 rounds a momentum that is close to 1
        rate = math.log(momentum)
    else:
        rate = jnp.log(jnp.maximum(momentum, jnp.finfo(count.dtype).tiny))
    share = part / -jnp.expm1(jnp.minimum(count * rate, -jnp.finfo(count.dtype).tiny))
    return jnp.where((count == 1.0) | (momentum == 0.0), 1.0, jnp.where(momentum == 1.0, 1.0 / count, share))


@_sharded_as_the_state
def accumulate(seen: Moments, batch: Moments, skip_nonfinite: bool) -> Moments:
    """The moments of what was seen before and of this batch."""
    new, keep = merge(seen, batch), True
    if skip_nonfinite:
        keep = jnp.isfinite(batch.mean) & jnp.isfinite(batch.m2)
    return Moments(*(lax.stop_gradient(jnp.where(keep, a.astype(b.dtype), b)) for a, b in zip(new, seen, strict=True)))


# --- trees of running statistics --------------------------------------------------------------------------------------
