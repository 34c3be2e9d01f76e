"""Observations normalized by the statistics of all that was ever seen, which are gathered while they are used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from .._core.checks import canonicalize_number, check_momentum
from .._core.explain import explained
from .._norms.base import NoParams
from .._norms.declare import function_of, spec
from .base import GatherSpec, MapSpec, Standardized, if_training, refuse_params
from .trees import empty_like, gathered, gathered_in_program, normalized

T = TypeVar("T")


@spec
class RunningNorm(MapSpec, GatherSpec):
    """The hyperparameters of `running_norm`. It has no parameters.

    `RunningNorm.like("sb3")`, "gymnasium", "brax" and "rsl_rl" have the numbers of those libraries. Brax also keeps a
    deviation below 1e6.

    Args:
      init_count: the statistics start as those of so many observations with mean 0 and deviation 1. Stable-baselines3
        and Gymnasium have 1e-4. That shifts the variance by about 1e-4 mean^2 / count, which for a mean of 1e5 is more
        than 1 until a million observations are seen. 0 starts with the first batch.
      limit: the output is clipped from -limit to limit; None clips nothing.
      momentum: None: all that was seen counts alike. A number: a batch weighs 1 - momentum at least, so that the
        statistics follow a drift. They include how the mean has moved, and need no correction for their start.
      until: no updates after so many observations; None always updates.

    >>> from jaxnorm import inputs
    >>> import numpy as np
    >>> norm = inputs.RunningNorm()
    >>> params, state = norm.init(1)
    >>> y, state = norm.apply(params, state, np.array([[1.], [1.], [3.], [3.]]), train=True)
    >>> y, state = norm.apply(params, state, np.array([[5.], [5.], [7.], [7.]]), train=True)   # by all eight
    >>> float(state.mean[0]), norm.apply(params, state, np.full((4, 1), 99.), train=False)[0].max().item()
    (4.0, 10.0)
    """

    LIKE: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "sb3": dict(init_count=1e-4, epsilon=1e-8, epsilon_mode="inside", limit=10.0),
        "gymnasium": dict(init_count=1e-4, epsilon=1e-8, epsilon_mode="inside", limit=None),
        "brax": dict(init_count=0.0, epsilon=1e-6, epsilon_mode="max", limit=None),
        "rsl_rl": dict(init_count=0.0, epsilon=1e-2, epsilon_mode="outside", limit=None),
    }

    init_count: float = 0.0
    limit: float | None = 10.0
    momentum: float | None = None
    until: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        canonicalize_number("RunningNorm", "init_count", self.init_count, "1e-4", least=0.0)
        check_momentum("RunningNorm", self.momentum)
        if self.until is not None:
            canonicalize_number("RunningNorm", "until", self.until, "1e8", least=0.0)

    @explained("init")
    def init(self, features: Any) -> tuple[NoParams, Any]:
        """No parameters, and statistics with mean 0 and deviation 1. Of a tree of observations, a tree of shapes."""
        return NoParams(), empty_like("RunningNorm", features, self.init_count)

    @explained("apply")
    def apply(self, params: Any, state: T, x: Any, *, train: Any = None, mask: Any = None) -> tuple[Any, T]:
        """The normalized x and the new state. `train=True` updates it first; `train=False` leaves it frozen."""
        refuse_params("RunningNorm.apply", params)
        return running_norm(x, state, train=train, mask=mask, **self.options())

    def update(self, state: T, x: Any, *, mask: Any = None) -> T:
        """The state after this batch, without its output."""
        options: dict[str, Any] = dict(
            axis_name=self.axis_name, skip_nonfinite=self.skip_nonfinite, momentum=self.momentum, until=self.until
        )
        return gathered_in_program(state, x, mask, norm="RunningNorm.update", **options)

    def inverse(self, state: Any, y: Any, *, mask: Any = None) -> Any:
        """The x that y was made of, where `limit` did not clip it."""
        f = Standardized(self.epsilon, self.epsilon_mode, inverse=True)
        return normalized("RunningNorm.inverse", f, state, y, mask, self.dtype)


@function_of(RunningNorm)
def running_norm(
    x: Any,
    state: T,
    *,
    train: Any,
    epsilon, epsilon_mode, limit, momentum, until, skip_nonfinite, axis_name, dtype,
    mask: Any = None,
) -> tuple[Any, T]:  # fmt: skip
    """Normalize observations by the mean and deviation of all that was ever seen.

        state = merge(state, moments(x));   y = clip((x - mean) / sqrt(var + epsilon), -limit, limit)

    All axes before the feature shape are reduced: environments, time, devices. However observations are split into
    updates, the statistics are those of all of them at once, to rounding, also after more than 2**24. They are
    constants for autodiff.

    Args:
      x: a tree of arrays of any shape (..., features). Integers are promoted to float32.
      state: `SeenStats`, or a tree of them like x; see `RunningNorm.init`.
      train: True updates the state with x and normalizes by the new one; False normalizes by the state as it is. It
        may be traced.
      mask: True where an element counts: a tree like x, or one array, which of a tree covers the axes of the batch.
        Masked-out elements do not affect the state, even if they are NaN.

    Returns:
      A tree like x, and the new state. Where nothing was seen, the old one, to the bit.

    Raises:
      ValueError: an x that does not end in the feature shape; a mask that fits x nowhere; a bad option.
      TypeError: a state that is no tree of statistics like x; a complex x.
      NameError: axis_name is not bound here.

    Used by Stable-baselines3, Gymnasium, Brax, Isaac Lab (rsl_rl) and SimBa.

    Source: Chan, Golub, LeVeque (1979), "Updating formulae and a pairwise algorithm for computing sample variances";
    Lee et al., "SimBa" (2024), arXiv:2410.09754.

    >>> from jaxnorm import inputs
    >>> import numpy as np
    >>> x = np.array([[1.], [1.], [3.], [3.]])
    >>> y, state = inputs.running_norm(x, inputs.SeenStats.empty(1), train=True)
    >>> y.round().tolist(), state.mean.tolist(), state.std.tolist()
    ([[-1.0], [-1.0], [1.0], [1.0]], [2.0], [1.0])
    """
    norm = "running_norm"
    options: dict[str, Any] = dict(axis_name=axis_name, skip_nonfinite=skip_nonfinite, momentum=momentum, until=until)
    state = if_training(norm, train, state, lambda: gathered(state, x, mask, norm=norm, **options))
    return normalized(norm, Standardized(float(epsilon), epsilon_mode, limit), state, x, mask, dtype), state
