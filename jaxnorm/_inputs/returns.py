"""Rewards normalized by the deviation of the discounted return."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from .._core.arrays import align_boolean_mask, as_float_array
from .._core.checks import canonicalize_number
from .._core.explain import explained
from .._core.exported import exported
from .._core.masks import finite_padding, finite_where_masked
from .._core.messages import shown
from .._core.over import Axes
from .._core.types import Features
from .._norms.base import NoParams
from .._norms.declare import function_of, spec
from .._ops.seen import Observed, SeenStats, join, see
from .base import GatherSpec, MapSpec, Standardized, if_training, refuse_params
from .trees import Leaf, as_seen, mapped

Array = jax.Array

RESETS = ("after", "before", None)


@exported
class ReturnState(NamedTuple):
    """The state of `return_norm`."""

    returns: Array  # (environments,), float32: the discounted return of the episode so far
    stats: SeenStats  # of one number, of all returns


@spec
class ReturnNorm(MapSpec, GatherSpec):
    """The hyperparameters of `return_norm`. It has no parameters.

    `ReturnNorm.like("sb3")`, "gymnasium" and "rsl_rl" have the numbers of those libraries.

    Args:
      init_count: the statistics start as those of so many returns with mean 0 and deviation 1. Stable-baselines3 and
        Gymnasium have 1e-4.
      limit: the output is clipped from -limit to limit; None clips nothing.
      gamma: the discount, from 0 to 1.
      reset: "after": a return is counted, and then starts again at 0 where `done` (Stable-baselines3). "before": it
        starts again where `done`, and then the reward is added, which leaves the last reward of an episode alone in it
        (Gymnasium, with `done=terminated`). None: it never starts again (rsl_rl).

    >>> from jaxnorm import inputs
    >>> import numpy as np
    >>> norm = inputs.ReturnNorm()
    >>> params, state = norm.init(4)                            # four environments
    >>> y, state = norm.apply(params, state, np.array([1., 1., 3., 3.]), done=np.array([0., 0., 0., 1.]), train=True)
    >>> y.tolist(), state.returns.tolist()                      # their deviation is 1
    ([1.0, 1.0, 3.0, 3.0], [1.0, 1.0, 3.0, 0.0])
    """

    LIKE: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "sb3": dict(init_count=1e-4, epsilon=1e-8, epsilon_mode="inside", limit=10.0, reset="after"),
        "gymnasium": dict(init_count=1e-4, epsilon=1e-8, epsilon_mode="inside", limit=None, reset="before"),
        "rsl_rl": dict(init_count=0.0, epsilon=0.0, epsilon_mode="inside", limit=None, reset=None),
    }

    init_count: float = 0.0
    limit: float | None = 10.0
    gamma: float = 0.99
    reset: str | None = "after"

    def __post_init__(self) -> None:
        super().__post_init__()
        canonicalize_number("ReturnNorm", "init_count", self.init_count, "1e-4", least=0.0)
        _check("ReturnNorm", self.gamma, self.reset)

    @explained("init")
    def init(self, features: Features) -> tuple[NoParams, ReturnState]:
        """No parameters, and the state of so many environments, an int or a shape."""
        shape = features if isinstance(features, tuple) else (features,)
        if not all(isinstance(n, int) and n >= 0 for n in shape):
            raise ValueError(
                f"ReturnNorm.init: needs the number of environments, an int >= 0, got {shown(features)}. "
                "Write init(envs.num_envs)."
            )
        return NoParams(), ReturnState(jnp.zeros(shape, jnp.float32), SeenStats.empty((), self.init_count))

    @explained("apply")
    def apply(
        self, params: Any, state: ReturnState, x: ArrayLike, *, done: ArrayLike | None = None, train: Any = None,
        mask: ArrayLike | None = None,
    ) -> tuple[Array, ReturnState]:  # fmt: skip
        """The normalized rewards and the new state. `train=True` updates it first; `train=False` leaves it frozen."""
        refuse_params("ReturnNorm.apply", params)
        return return_norm(x, state, done, train=train, mask=mask, **self.options())

    def inverse(self, state: ReturnState, y: ArrayLike) -> Array:
        """The rewards that y was made of, where `limit` did not clip them."""
        f = Standardized(self.epsilon, self.epsilon_mode, centered=False, inverse=True)
        y = as_float_array("ReturnNorm.inverse", y)
        return mapped(f, Leaf("ReturnNorm.inverse", y, as_seen(_state("ReturnNorm", state).stats), None), self.dtype)


def _check(norm: str, gamma: Any, reset: Any) -> None:
    if canonicalize_number(norm, "gamma", gamma, "0.99", least=0.0) > 1.0:
        raise ValueError(f"{norm}: gamma must be from 0 to 1, got {shown(gamma)}. Write gamma=0.99.")
    if reset is not None and (not isinstance(reset, str) or reset not in RESETS):
        raise ValueError(f'{norm}: reset must be one of {RESETS}, got {shown(reset)}. Write reset="after".')


def _state(norm: str, state: Any) -> ReturnState:
    if isinstance(state, Mapping) and {*state} == {*ReturnState._fields}:
        state = ReturnState(**state)
    if not isinstance(state, ReturnState):
        raise TypeError(
            f"{norm}: state must be a ReturnState, got {shown(state)}. Write params, state = norm.init(envs.num_envs)."
        )
    return state


@function_of(ReturnNorm)
def return_norm(
    x: ArrayLike,
    state: ReturnState,
    done: ArrayLike | None = None,
    *,
    train: Any,
    gamma, reset, epsilon, epsilon_mode, limit, skip_nonfinite, axis_name, dtype,
    mask: ArrayLike | None = None,
) -> tuple[Array, ReturnState]:  # fmt: skip
    """Normalize rewards by the deviation of the discounted return. No mean is taken out, so that signs stay.

        R = gamma R + r, for each environment;   state = merge(state, moments(R))
        y = clip(r / sqrt(var + epsilon), -limit, limit)

    One call is one step of all environments. Scan over the steps of a rollout.

    Args:
      x: the rewards r, of the shape of the environments.
      state: see `ReturnNorm.init`.
      done: where the episode has ended with this reward; needed to update, unless reset=None.
      train: True updates the state with x and normalizes by the new one; False normalizes by the state as it is. It
        may be traced.
      mask: True for environments that count. The others keep their R; Gymnasium leaves out those that a step has only
        reset, mask=~done_before.

    Returns:
      Rewards in x's dtype or `dtype`, and the new state. The deviation is a constant for autodiff.

    Raises:
      ValueError: rewards, done or mask of another shape than the state; a bad option.
      TypeError: a state that is none; done is missing.
      NameError: axis_name is not bound here.

    Used by Stable-baselines3 (VecNormalize), Gymnasium and rsl_rl.

    Source: Engstrom et al., "Implementation Matters in Deep Policy Gradients" (2020), arXiv:2005.12729.

    >>> from jaxnorm import inputs
    >>> import numpy as np
    >>> state = inputs.ReturnNorm().init(4)[1]
    >>> y, state = inputs.return_norm(np.array([1., 1., 5., 5.]), state, np.zeros(4), train=True)
    >>> y.tolist(), float(state.stats.std)
    ([0.5, 0.5, 2.5, 2.5], 2.0)
    """
    norm = "return_norm"
    _check(norm, gamma, reset)
    x, state = as_float_array(norm, x), _state(norm, state)
    if x.shape != state.returns.shape:
        raise ValueError(
            f"{norm}: rewards must have the shape of the environments, {state.returns.shape}, got {x.shape}. Write "
            f"init({x.shape}), and scan over the steps of a rollout."
        )
    x, keep = align_boolean_mask(norm, x, mask)
    x = finite_padding(x, keep)

    def update() -> ReturnState:
        ended = _ended(norm, done, reset, x)
        old, rewards = state.returns, finite_where_masked(lax.stop_gradient(x), keep).astype(state.returns.dtype)
        old = jnp.where(ended, 0.0, old) if reset == "before" else old
        returns = gamma * old + rewards
        returns = returns if keep is None else jnp.where(keep, returns, state.returns)
        stats = as_seen(state.stats)
        (batch,) = see(norm, [Observed(returns, keep, Axes(tuple(range(x.ndim))), ())], axis_name)
        stats = join(stats, batch, skip_nonfinite=skip_nonfinite)
        if reset == "after":
            returns = jnp.where(ended if keep is None else ended & keep, 0.0, returns)
        return ReturnState(returns, stats)

    state = if_training(norm, train, state, update)
    f = Standardized(float(epsilon), epsilon_mode, limit, centered=False)
    return mapped(f, Leaf(norm, x, as_seen(state.stats), keep), dtype), state


def _ended(norm: str, done: Any, reset: str | None, x: Array) -> Array:
    if reset is None:
        return jnp.zeros(x.shape, bool)
    if done is None:
        raise TypeError(
            f"{norm}: done is missing, which says where returns start again. Write done=terminated | truncated, or "
            "reset=None."
        )
    done = jnp.asarray(done)
    if done.shape != x.shape:
        raise ValueError(
            f"{norm}: done must have the rewards' shape {x.shape}, got {done.shape}. Write jnp.broadcast_to(done, "
            f"{x.shape})."
        )
    return done.astype(bool)
