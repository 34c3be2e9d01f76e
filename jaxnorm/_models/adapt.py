"""Batch norm in another domain than it was trained in: its statistics, and which parameters go with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.arrays import concrete_value
from .._core.messages import shown
from .._core.paths import path_of
from .._core.types import Moments, RunningStats
from .._ops.policy import Cumulative
from .._ops.running import update
from .._ops.states import is_stats, map_stats, refuse_moments

Array = jax.Array
_WRITE = "adapt_state(state, moments, prior=0.7)"


@dataclass(frozen=True)
class _Mixed:
    """A policy for `update`: an average whose weight may be another for each channel."""

    momentum: Any
    unbiased: bool
    min_count: float | None = None
    skip_nonfinite: bool = False
    debias: bool = False


def adapt_state(
    state: Any,
    moments: Any,
    *,
    prior: ArrayLike | None = None,
    prior_count: ArrayLike | None = None,
    merge: bool = False,
    unbiased_running_var: bool = False,
) -> Any:
    """Running statistics for another domain, from those of training and the moments of the new data.

    Replaced (AdaBN), if nothing else is given: those of the new data alone.

    Mixed, with `prior` or `prior_count`, for few new data:

        mean = p mean_s + (1 - p) mean_t;   var = p var_s + (1 - p) var_t;   p = N / (N + n)

    with s of training, t of the new data and n the number of their elements. The difference of the means is not in the
    variance. Merged, with `merge=True`, it is: those are the exact statistics of N elements and n more.

    The moments of one norm are `jaxnorm.moments(x, axes)`, or what training gathers in `jaxnorm.Moments.empty`. Those
    of a model are its variables by `recompute_stats(apply, variables, new_batches)`.

    Args:
      state: `RunningStats`, or any tree of them; of dicts with `mean` and `var` too, as Flax has them.
      moments: a tree of the same form, of `Moments`, or of running statistics of the new data, which need a `count` for
        `prior_count` and `merge`.
      prior: p, the weight of the old statistics, from 0 to 1.
      prior_count: N, as if the old ones were of so many elements. An element is a number of a channel: an image of
        32 x 32 positions has 1024.
      merge: the exact statistics of both. Without a prior_count N is `state.count`, as `BatchNorm(momentum=None)` has
        it.
      unbiased_running_var: the variance of `Moments` is m2 / (n - 1).

    Returns:
      The new state: its tree, shapes and dtypes are the old one's. What saw nothing stays as it was. `count` stays, but
      with `merge=True` it is N + n.

    Raises:
      ValueError: a prior outside of 0 to 1, or two that say different things; moments or a state without the count that
        they need.
      TypeError: something in the trees is no running statistic.

    Used by test-time adaptation: AdaBN, batch-norm adaptation to corruptions, and the first step of TENT.

    Source: Li, Wang, Shi, Liu, Hou, "Revisiting Batch Normalization For Practical Domain Adaptation" (2016),
    arXiv:1603.04779; Schneider, Rusak, Eck, Bringmann, Brendel, Bethge, "Improving robustness against common
    corruptions by covariate shift adaptation" (2020), arXiv:2006.16971.

    >>> import jaxnorm as jn, numpy as np
    >>> from jaxnorm import models
    >>> state, new = jn.RunningStats(np.zeros(1, "f"), np.ones(1, "f")), jn.moments(np.array([[4.], [8.]], "f"), 0)
    >>> for options in ({}, {"prior": 0.5}, {"prior_count": 2}, {"prior_count": 2, "merge": True}):
    ...     adapted = models.adapt_state(state, new, **options)
    ...     print(adapted.mean, adapted.var)
    [6.] [4.]
    [3.] [2.5]
    [3.] [2.5]
    [3.] [11.5]
    """
    if prior is not None and (prior_count is not None or merge):
        raise ValueError(f"adapt_state: prior is p, which needs no prior_count or merge. Write {_WRITE}.")
    _check("prior", prior, 1.0)
    _check("prior_count", prior_count, None)

    def one(old: Any, new: Any) -> RunningStats:
        refuse_moments("adapt_state", old, _WRITE)
        counted = isinstance(new, Moments)
        if new.count is None and (prior_count is not None or merge):
            raise ValueError(
                "adapt_state: prior_count and merge need the number of new elements, and the new statistics have no "
                "count. Write Moments, or prior=0.7."
            )
        count = jnp.ones_like(new.var) if new.count is None else new.count
        batch = Moments(count, new.mean, new.m2 if counted else new.var * count)
        unbiased = counted and unbiased_running_var
        if merge:
            if prior_count is None and old.count is None:
                raise ValueError(
                    "adapt_state: merge needs the number of old elements, and the state has no count. Write "
                    "prior_count=1000.0."
                )
            held = old.count if prior_count is None else jnp.broadcast_to(jnp.asarray(prior_count), old.var.shape)
            merged = update(old._replace(count=held.astype(jnp.float32)), batch, Cumulative(unbiased=unbiased))
            return merged if old.count is not None else merged._replace(count=None)
        weight = 0.0 if prior is None else prior
        if prior_count is not None:
            held = jnp.asarray(prior_count, batch.count.dtype)
            weight = held / jnp.maximum(held + batch.count, jnp.finfo(batch.count.dtype).tiny)
        weight = weight if isinstance(weight, float) else jnp.asarray(weight, batch.m2.dtype)
        policy: Any = _Mixed(weight, unbiased)
        return update(old, batch, policy)

    return map_stats("adapt_state", one, state, moments)


def _check(name: str, value: Any, most: float | None) -> None:
    known = None if value is None else concrete_value(jnp.asarray(value))
    if known is not None and not ((known >= 0).all() and (most is None or (known <= most).all())):
        raise ValueError(
            f"adapt_state: {name} must be {'>= 0' if most is None else 'from 0 to 1'}, got {shown(value)}. Write "
            f"{'prior_count=16.0' if most is None else 'prior=0.7'}."
        )


def tent_mask(params: Any, state: Any) -> Any:
    """True for the scales and biases of batch norms, and of nothing else: what TENT trains at test time.

    A norm counts as batch norm where `state` has its running statistics at the same path. TENT normalizes by the batch
    at all times: call the model with `train=True` and leave its running statistics.

    Args:
      params: the tree of parameters, such as `variables["params"]` or `nnx.state(model, nnx.Param)`.
      state: the tree of running statistics, such as `variables["batch_stats"]` or `nnx.state(model, nnx.BatchStat)`.

    Returns:
      A tree of bools as params is, for `optax.masked` and, inverted, `optax.set_to_zero`.

    Raises:
      ValueError: no path of params is one of state.

    Source: Wang, Shelhamer, Liu, Olshausen, Darrell, "Tent" (2021), arXiv:2006.10726.

    >>> from jaxnorm import models
    >>> params = {"dense": {"kernel": 0., "bias": 0.}, "bn": {"scale": 0., "bias": 0.}, "ln": {"scale": 0.}}
    >>> models.tent_mask(params, {"bn": {"mean": 0., "var": 1.}})
    {'bn': {'bias': True, 'scale': True}, 'dense': {'bias': False, 'kernel': False}, 'ln': {'scale': False}}
    """
    return _mask("tent_mask", params, state, lambda name: name in ("scale", "bias"))


def fedbn_mask(params: Any, state: Any) -> Any:
    """True for all parameters of batch norms: what each client of FedBN keeps at home, and the server does not average.

    The running statistics, which are the whole of `state`, stay at home as well. Arguments as for `tent_mask`.

    Source: Li, Jiang, Zhang, Kamp, Dou, "FedBN" (2021), arXiv:2102.07623.

    >>> from jaxnorm import models
    >>> models.fedbn_mask({"bn": {"scale": 0.}, "ln": {"scale": 0.}}, {"bn": {"mean": 0., "var": 1.}})
    {'bn': {'scale': True}, 'ln': {'scale': False}}
    """
    return _mask("fedbn_mask", params, state, lambda name: True)


def _mask(tool: str, params: Any, state: Any, wanted: Any) -> Any:
    nodes = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_stats)[0]
    places = {path_of(keys) for keys, node in nodes if is_stats(node)}
    at = lambda keys: path_of(keys).rpartition("/")
    mask = jax.tree_util.tree_map_with_path(lambda keys, _: at(keys)[0] in places and wanted(at(keys)[2]), params)
    if not any(at(keys)[0] in places for keys, _ in jax.tree_util.tree_flatten_with_path(params)[0]):
        given = shown(list(params)) if isinstance(params, Mapping) else shown(params)
        raise ValueError(
            f"{tool}: no parameter of {given} is at the path of a running statistic, which are {sorted(places)}. Write "
            f'{tool}(variables["params"], variables["batch_stats"]).'
        )
    return mask
