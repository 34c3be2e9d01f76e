"""Inputs standardized by the statistics of a data set, which are gathered once, batch by batch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, TypeVar

from .._core.explain import explained
from .._norms.base import NoParams
from .._norms.declare import function_of, spec
from .base import GatherSpec, MapSpec, Standardized, refuse_params
from .fitting import fitted
from .trees import empty_like, gathered_in_program, normalized

T = TypeVar("T")


@spec
class StandardizeBy(MapSpec):
    """The options of `standardize_inputs`.

    Args:
      inverse: y to x.
    """

    epsilon: float = 1e-7
    epsilon_mode: str = "max"


@spec
class StandardizeInputs(StandardizeBy, GatherSpec):
    """The hyperparameters of `standardize_inputs`, and how its statistics are gathered. It has no parameters.

    The shape given to `init` says which elements share a statistic: those that differ in a place before that shape, or
    along an axis of size 1 in it. Of images (N, H, W, C) that is (C,) for each channel, (H, W, C) for each pixel and
    channel; of images (N, C, H, W) it is (C, 1, 1) for each channel.

    >>> from jaxnorm import inputs
    >>> import numpy as np
    >>> norm, batches = inputs.StandardizeInputs(), [np.array([[1.], [3.]]), np.array([[5.], [7.]])]
    >>> state = norm.fit(batches)
    >>> y, state = norm.apply((), state, np.array([[4.]]))
    >>> float(state.mean[0]), y.tolist()
    (4.0, [[0.0]])
    """

    @explained("init")
    def init(self, features: Any) -> tuple[NoParams, Any]:
        """No parameters, and statistics of nothing: mean 0 and deviation 1. Of a tree, a tree of shapes."""
        return NoParams(), empty_like(type(self).__name__, features, 0.0)

    def update(self, state: T, x: Any, *, mask: Any = None) -> T:
        """The statistics of what was seen before and of this batch. A pure function; jit and scan take it."""
        options: dict[str, Any] = dict(axis_name=self.axis_name, skip_nonfinite=self.skip_nonfinite)
        return gathered_in_program(state, x, mask, norm=f"{type(self).__name__}.update", **options)

    def fit(
        self, batches: Iterable[Any], state: Any = None, *, checkpoint: str | os.PathLike[str] | None = None,
        every: int = 100,
    ) -> Any:  # fmt: skip
        """The statistics of all batches together, and of what `state` has seen before.

        They are those of all data at once, to rounding, whatever the sizes of the batches. A batch is a tree of arrays,
        or `Masked(x, mask)`. Arrays may be sharded over devices and processes. No batch is kept.

        Args:
          batches: any iterable of batches, such as a generator that reads files.
          state: where to start. None: of arrays (N, ..., C) a statistic for each index of the last axis, as of init(C).
          checkpoint: a file that the statistics are written to every so many batches, and at the end. If it is there
            when fit begins, fit goes on from it and skips as many batches as it has seen: after a kill, make the
            same call, with batches in the same order. Of several processes the first writes, and all must see the file.
          every: how many batches lie between two writes.

        Raises:
          ValueError: no batches; a batch that does not fit; a checkpoint of other statistics.
        """
        return fitted(self, batches, state, checkpoint, every)

    @explained("apply")
    def apply(
        self, params: Any, state: T, x: Any, *, train: Any = None, mask: Any = None, inverse: bool = False
    ) -> tuple[Any, T]:
        """The standardized x, and the state as it came. `train` makes no difference: `update` and `fit` gather."""
        refuse_params(f"{type(self).__name__}.apply", params)
        options: dict[str, Any] = dict(
            epsilon=self.epsilon, epsilon_mode=self.epsilon_mode, limit=self.limit, dtype=self.dtype
        )
        return standardize_inputs(x, state, mask=mask, inverse=inverse, **options), state

    def inverse(self, state: Any, y: Any, *, mask: Any = None) -> Any:
        """The x that y was made of, where `limit` did not clip it."""
        return self.apply((), state, y, mask=mask, inverse=True)[0]


@function_of(StandardizeBy)
def standardize_inputs(
    x: Any, state: Any, *, epsilon, epsilon_mode, limit, dtype, mask: Any = None, inverse: bool = False
) -> Any:
    """Standardize inputs by given statistics, feature by feature.

        y = (x - mean) / max(std, epsilon)

    The statistics are constants. Those of a data set are gathered by `StandardizeInputs.fit` or `update`; known ones
    are `SeenStats.of(mean, std)`.

    Args:
      x: a tree of arrays of any shape (..., features). Integers are promoted to float32.
      state: `SeenStats` of the feature shape, or a tree of them like x. An axis of size 1 is shared.
      mask: True where an element counts: a tree like x, or one array, which of a tree covers the axes of the batch. A
        masked-out element that is not finite counts as 0; a finite one is mapped like the others.
      inverse: y to x.

    Returns:
      A tree like x, in x's dtype or `dtype`.

    Raises:
      ValueError: an x that does not end in the feature shape; a mask that fits x nowhere; a bad option.
      TypeError: a state that is no tree of statistics like x; a complex x.

    Used by tabular and image pipelines; Keras' `Normalization` is it with these defaults, and scikit-learn's
    `StandardScaler` but for its constant features, whose deviation there is 1.

    Source: Keras, `keras.layers.Normalization`.

    >>> from jaxnorm import inputs
    >>> import numpy as np
    >>> inputs.standardize_inputs(np.array([[3., 5.]]), inputs.SeenStats.of([1., 5.], [2., 0.])).tolist()
    [[1.0, 0.0]]
    """
    norm = "standardize_inputs"
    f = Standardized(float(epsilon), epsilon_mode, limit, inverse=bool(inverse))
    return normalized(norm, f, state, x, mask, dtype)
