"""What the specs of norms with running statistics share: options, state and `apply`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.explain import explained
from .._core.types import Moments, RunningStats
from .._ops.policy import EMA, Cumulative, Devices, Running, running_policy, sharing_policy
from .._ops.running import update_state
from .base import Spec
from .declare import as_params, refuse_params_as_state, spec

Array = jax.Array
S = TypeVar("S", bound=RunningStats | Moments | Mapping[str, Any])

_FLAT = ("momentum", "min_count", "skip_nonfinite", "zero_debias", "unbiased_running_var")


def taken_policy(norm: str, options: dict[str, Any]) -> Running:
    """How running statistics are updated, of a function's options, which are then without those that say so."""
    return running_policy(norm, options.pop("running"), **{name: options.pop(name) for name in _FLAT})


@spec
class SharingOptions(Spec):
    """Which devices share statistics, and which statistics of a batch count.

    Args:
      share: which devices share statistics, as one object: `Devices(axis_name, groups)`, in place of axis_name,
        axis_index_groups and sync.
      axis_name: the mapped axis, or axes, of pmap, shard_map or vmap whose devices share statistics. Not touched at
        inference. Under jit over sharded arrays leave it None: statistics are global there. (Or name the mesh axes
        that the batch is sharded over, under `jax.set_mesh(mesh)`: then `sync` has the same meaning there.)
      axis_index_groups: the same as a `sync` of lists, by Flax's name.
      sync: which devices along axis_name share statistics: "global" (all), "local" (none), an int n (groups of n
        neighbouring devices, where the last of several axes runs fastest: the chips of one host, for
        axis_name=("host", "chip")), or lists of indices. The running statistics always use all devices, and are the
        same on all. "local" costs that small all-reduce alone; nothing waits for it, and there is none backward.
      min_count: a channel with fewer elements than this leaves its state as it was.
      frozen: normalize by the running statistics and never update them, in training too.
      skip_nonfinite: a channel whose batch statistics are not finite keeps its old ones.
      zero_debias: correct the running statistics for their start, as Adam does: after t updates their weights sum to 1,
        with nothing of the initial values (needs `state.count`).
      train: use the batch's statistics and update the running ones. A bool, or a traced bool.
      weights: a float weight >= 0 for each element, shaped as a mask may be. Differentiable.
      update_stats: False leaves the state as it was.
    """

    State: ClassVar[Any] = RunningStats

    use_bias: bool = True
    share: Devices | None = None
    axis_name: str | tuple[str, ...] | None = None
    axis_index_groups: Sequence[Sequence[int]] | None = None
    sync: str | int | Sequence[Sequence[int]] = "global"
    min_count: float | None = None
    frozen: bool = False
    skip_nonfinite: bool = False
    zero_debias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        ghosts = getattr(self, "virtual_batch_size", None)
        sharing = (self.share, self.axis_name, self.axis_index_groups, self.sync, ghosts)
        sharing_policy(type(self).__name__, *sharing)


@spec
class RunningOptions(SharingOptions):
    """How running statistics are updated, and which devices share statistics.

    Args:
      momentum: the weight of the old statistics, as in Flax (1 - torch's): a number, or a scalar array such as a
        schedule computes, which may be traced. None: the exact cumulative statistics, those
        of all elements seen so far (needs `state.count`).
      epsilon: added to the variance, in units of x squared; >= 0.
      running: how the running statistics are updated, as one object: `EMA(...)` or `Cumulative()`, in place of
        momentum, min_count, skip_nonfinite, zero_debias and unbiased_running_var.
      unbiased_running_var: the running variance takes m2 / (n - 1), as torch does, in place of m2 / n.
    """

    momentum: float | Array | None = 0.99
    epsilon: float = 1e-5
    running: EMA | Cumulative | None = None
    unbiased_running_var: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._running()

    def _running(self) -> Running:
        flat = {name: getattr(self, name) for name in _FLAT}
        return running_policy(type(self).__name__, self.running, **flat)

    def init_state(self, shape: tuple[int, ...]) -> RunningStats:
        """Mean 0 and variance 1."""
        f32 = jnp.float32
        count = jnp.zeros(shape, f32) if self._running().needs_count else None
        return RunningStats(jnp.zeros(shape, f32), jnp.ones(shape, f32), count)


@spec
class RunningSpec(RunningOptions):
    """What the norms share that keep running statistics of the batch.

    Args:
      axis: the channel axis, or axes, at any position but 0.
      virtual_batch_size: ghost batch norm: normalize each block of `virtual_batch_size` consecutive examples by its own
        statistics, on its own device. The last block may be shorter. The running statistics use the whole batch.
    """

    axis: int | Sequence[int] = -1
    virtual_batch_size: int | None = None

    @explained("apply")
    def apply(
        self, params: Any, state: S, x: ArrayLike, *, train: Any = None, mask: Any = None, weights: Any = None,
        update_stats: bool = True,
    ) -> tuple[Array, S]:  # fmt: skip
        """The normalized x and the new running statistics. Arguments as for `batch_norm`; frozen, it needs no train."""
        norm = f"{type(self).__name__}.apply"
        refuse_params_as_state(norm, state, self.Params)
        params = as_params(norm, params, self.Params, self.paths)
        call = dict(train=train, mask=mask, weights=weights, update_stats=update_stats)
        return type(self).function(x, params, state, **call, **self.options())

    def update_state(self, state: S, moments: Any) -> S:
        """`jaxnorm.update_state` with this norm's hyperparameters."""
        return state if self.frozen else update_state(state, moments, running=self._running())
