"""Value targets normalized by moving statistics, and the last layer rewritten so that its outputs stay."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from .._core.arrays import align_boolean_mask, as_float_array, concrete_value
from .._core.checks import canonicalize_number, check_momentum
from .._core.dtypes import accumulator
from .._core.explain import explained
from .._core.messages import shown, to_python
from .._core.over import Segments
from .._norms.base import NoParams
from .._norms.declare import function_of, spec
from .._ops.seen import Observed, SeenStats, join, see
from .base import GatherSpec, InputSpec, Standardized, if_training
from .trees import Leaf, as_seen, in_form_of, is_seen, mapped

Array = jax.Array
P = TypeVar("P")

NAMES = (("kernel", "bias"), ("w", "b"))  # Flax's, and haiku's and rlax's
ACCUMULATE = ("mean", "sum")


@spec
class RangeSpec(InputSpec):
    """The options of both functions.

    Args:
      min_std: the least deviation that targets are divided by.
      max_std: the largest one.
    """

    min_std: float = 1e-4
    max_std: float = 1e6

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range(type(self).__name__, self.min_std, self.max_std)


@spec
class PopArtMap(RangeSpec):
    """The options of `pop_art`.

    Args:
      dtype: of the output; None is x's. Arithmetic is in float32 or wider, with one rounding.
    """

    dtype: DTypeLike | None = None


@spec
class PopArtUpdate(RangeSpec, GatherSpec):
    """The options of `pop_art_update`.

    Args:
      momentum: the weight of the old statistics, 1 - step.
      accumulate: "mean": the targets of a task move its statistics by one step, however many they are. "sum": by a
        step for each of them, at most all the way, as in rlax.
    """

    momentum: float = 0.9997
    accumulate: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_update(type(self).__name__, self.momentum, self.accumulate)


@spec
class PopArt(PopArtMap, PopArtUpdate):
    """The hyperparameters of `pop_art_update` and `pop_art`. Its parameters are those of the last layer.

    >>> from jaxnorm import inputs
    >>> import numpy as np
    >>> norm, layer = inputs.PopArt(momentum=0.), {"kernel": np.ones((3, 1), "f"), "bias": np.zeros(1, "f")}
    >>> state = norm.init(1)[1]
    >>> (y, new), state = norm.apply(layer, state, np.array([10., 10., 14., 14.]), train=True)
    >>> h = np.array([[1., 2., 3.]], "f")
    >>> y.tolist(), norm.inverse(state, (h @ new["kernel"])[:, 0] + new["bias"]).tolist()   # the output was 6
    ([-1.0, -1.0, 1.0, 1.0], [6.0])
    """

    LIKE: ClassVar[Mapping[str, Mapping[str, Any]]] = {"rlax": dict(accumulate="sum")}

    @explained("init")
    def init(self, features: int = 1) -> tuple[NoParams, SeenStats]:
        """No parameters, which are the last layer's own, and the state of so many tasks: mean 0 and deviation 1."""
        number = to_python(features)
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ValueError(
                f"PopArt.init: needs the number of tasks, an int >= 1, got {shown(features)}. Write init(1)."
            )
        return NoParams(), SeenStats.empty(number)

    @explained("apply")
    def apply(
        self, params: P, state: Any, x: ArrayLike, indices: ArrayLike | None = None, *, train: Any = None,
        mask: ArrayLike | None = None,
    ) -> tuple[tuple[Array, P], Any]:  # fmt: skip
        """(normalized targets, last layer), and the state. `train=True` first updates the last two by the targets."""
        new = if_training(
            "PopArt.apply", train, (params, state), lambda: self.update(params, state, x, indices, mask=mask)
        )
        params, state = new
        by: dict[str, Any] = dict(min_std=self.min_std, max_std=self.max_std, dtype=self.dtype)
        return (pop_art(x, state, indices, mask=mask, **by), params), state

    def update(
        self, params: P, state: Any, targets: ArrayLike, indices: ArrayLike | None = None, *,
        mask: ArrayLike | None = None,
    ) -> tuple[P, Any]:  # fmt: skip
        """`pop_art_update` with these hyperparameters."""
        options = self.options()
        del options["dtype"]
        return pop_art_update(params, state, targets, indices, mask=mask, **options)

    def inverse(self, state: Any, y: ArrayLike, indices: ArrayLike | None = None) -> Array:
        """Outputs of the last layer in units of the targets."""
        return pop_art(y, state, indices, min_std=self.min_std, max_std=self.max_std, dtype=self.dtype, inverse=True)


@function_of(PopArtMap)
def pop_art(
    x: ArrayLike, state: Any, indices: ArrayLike | None = None, *, min_std, max_std, dtype,
    mask: ArrayLike | None = None, inverse: bool = False,
) -> Array:  # fmt: skip
    """Normalize value targets by the statistics of their task, or bring outputs back to the units of the targets.

        y = (x - mean_k) / d_k;   inverse:  x = d_k y + mean_k;   d = clip(std, min_std, max_std)

    Args:
      x: targets, or with `inverse` outputs of the last layer; of any shape.
      state: see `PopArt.init`; `pop_art_update` makes the next one.
      indices: the task of each element, ints of x's shape from 0; None where there is one task.
      mask: True where an element counts; the others may hold anything.
      inverse: y to x.

    Returns:
      An array of x's shape, in x's dtype or `dtype`. The statistics are constants for autodiff.

    Raises:
      ValueError: indices of another shape, or out of range; none where there are several tasks; a bad option.
      TypeError: indices that are no integers; a state that is none.

    Used by PopArt-IMPALA and MAPPO.

    Source: van Hasselt et al., "Learning values across many orders of magnitude" (2016), arXiv:1602.07714.

    >>> from jaxnorm import inputs
    >>> import numpy as np
    >>> state = inputs.SeenStats.of([10., 0.], [2., 1.])
    >>> inputs.pop_art(np.array([14., 14.]), state, np.array([0, 1])).tolist()
    [2.0, 14.0]
    """
    norm = "pop_art"
    _check_range(norm, min_std, max_std)
    x, seen, ids = _checked(norm, x, state, indices)
    by = _clipped(seen, min_std, max_std)
    if ids is not None and not ids.ndim:
        return pop_art(x[None], state, ids[None], min_std=min_std, max_std=max_std, dtype=dtype, inverse=inverse)[0]
    if ids is not None:
        number = seen.mean.shape[0]
        at = functools.partial(Segments(number, (), ids.ndim).spread, ids=ids)
        by = SeenStats(*(at(a.reshape((1,) * (ids.ndim - 1) + (number,))) for a in by))
    return mapped(Standardized(0.0, "max", inverse=bool(inverse)), Leaf(norm, x, by, mask), dtype)


@function_of(PopArtUpdate)
def pop_art_update(
    params: P, state: Any, targets: ArrayLike, indices: ArrayLike | None = None, *,
    momentum, accumulate, min_std, max_std, skip_nonfinite, axis_name,
    mask: ArrayLike | None = None,
) -> tuple[P, Any]:  # fmt: skip
    """Update the statistics of targets (art), and rewrite the last layer so that its outputs stay (pop).

        mean' = mean + b (m - mean);   var' = (1 - b) (var + b (m - mean)**2) + b v;   d = clip(std, min_std, max_std)
        kernel' = kernel d / d';   bias' = (d bias + mean - mean') / d'

    with m and v the mean and variance of a task's targets and b = 1 - momentum. Then d' (h kernel' + bias') + mean' is
    what it was before, to rounding. The variance is that of moving averages of target and target^2, without the
    cancellation of their difference. A task without a target keeps its statistics and its column.

    Args:
      params: the last layer: a dict with `kernel` (..., K) and `bias` (K,), or `w` and `b`; other entries stay.
      state: see `PopArt.init`.
      targets: of any shape.
      indices: the task of each target, ints of the targets' shape from 0; None where there is one task.
      mask: True where a target counts. Broadcasts to the targets, or covers their leading axes.

    Returns:
      The new params and the new state, in the form of the old. They are constants for autodiff: call this outside of
      the loss.

    Raises:
      ValueError: a kernel or bias that has not K columns; indices of another shape, or out of range; a bad option.
      TypeError: params without such a layer; indices that are no integers; a state that is none.
      NameError: axis_name is not bound here.

    Used by PopArt-IMPALA and MAPPO.

    Source: van Hasselt et al., "Learning values across many orders of magnitude" (2016), arXiv:1602.07714; Hessel et
    al., "Multi-task Deep Reinforcement Learning with PopArt" (2018), arXiv:1809.04474.

    >>> from jaxnorm import inputs
    >>> import numpy as np
    >>> layer, state = {"kernel": np.ones((3, 1), "f"), "bias": np.zeros(1, "f")}, inputs.PopArt().init(1)[1]
    >>> layer, state = inputs.pop_art_update(layer, state, np.array([10., 10., 14., 14.]), momentum=0.)
    >>> layer["kernel"][0].tolist(), layer["bias"].tolist(), state.mean.tolist(), state.std.tolist()
    ([0.5], [-6.0], [12.0], [2.0])
    """
    norm = "pop_art_update"
    _check_range(norm, min_std, max_std)
    _check_update(norm, momentum, accumulate)
    x, old, ids = _checked(norm, lax.stop_gradient(as_float_array(norm, targets, what="targets")), state, indices)
    number = old.mean.shape[0]
    names, kernel, bias = _layer(norm, params, number)
    x, mask = align_boolean_mask(norm, x.reshape(x.shape or (1,)), mask)
    ids = jnp.zeros(x.shape, jnp.int32) if ids is None else ids.reshape(x.shape)
    over = Segments(number, (), x.ndim)
    (batch,) = see(norm, [Observed(x, over.present(mask, ids), over, (number,), ids)], axis_name)
    step = 1.0 - momentum
    part = jnp.full_like(batch.count, step) if accumulate == "mean" else jnp.minimum(step * batch.count, 1.0)
    new = join(old, batch, part=part, skip_nonfinite=skip_nonfinite)
    before, after = (_clipped(s, min_std, max_std) for s in (old, new))
    ratio = before.std / after.std
    moved = (old.mean - new.mean) + (old.mean_low - new.mean_low)
    wide = lambda a: lax.stop_gradient(a).astype(accumulator(a))
    kernel_after = wide(kernel) * jnp.broadcast_to(ratio, kernel.shape)
    bias_after = ratio * wide(bias) + moved / after.std
    rewritten = {names[0]: kernel_after.astype(kernel.dtype), names[1]: bias_after.astype(bias.dtype)}
    made: Any = {**params, **rewritten}  # pyright: ignore
    return (made if type(params) is dict else type(params)(made)), in_form_of(state, new)  # pyright: ignore


def _clipped(seen: SeenStats, least: float, most: float) -> SeenStats:
    return seen._replace(std=jnp.clip(seen.std, least, most))


def _checked(norm: str, x: Any, state: Any, indices: Any) -> tuple[Array, SeenStats, Array | None]:
    x = as_float_array(norm, x)
    if not is_seen(state):
        raise TypeError(f"{norm}: state must be SeenStats, got {shown(state)}. Write state = PopArt().init(tasks)[1].")
    seen = as_seen(state)
    if seen.mean.ndim != 1:
        raise ValueError(
            f"{norm}: state must be of shape (tasks,), got {seen.mean.shape}. Write PopArt().init(tasks)[1]."
        )
    number = seen.mean.shape[0]
    if indices is None:
        if number != 1:
            raise ValueError(
                f"{norm}: the state has {number} tasks, so each target needs one. Write indices=jnp.zeros({x.shape}, "
                "int), with the task of each target."
            )
        return x, SeenStats(*(a.reshape(()) for a in seen)) if norm == "pop_art" else seen, None
    ids = jnp.asarray(indices)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"{norm}: indices must be integers, got {shown(ids)}. Write indices.astype(int).")
    if ids.shape != x.shape:
        raise ValueError(
            f"{norm}: indices of shape {ids.shape} must have the targets' shape {x.shape}. Write "
            f"jnp.broadcast_to(indices, {x.shape})."
        )
    values = concrete_value(ids)
    if values is not None and values.size and not (values.min() >= 0 and values.max() < number):
        raise ValueError(
            f"{norm}: indices must be from 0 to {number - 1}, got {values.min()} to {values.max()}. "
            f"Write PopArt().init({max(int(values.max()) + 1, 1)}), and indices from 0."
        )
    return x, seen, ids.astype(jnp.int32)


def _layer(norm: str, params: Any, number: int) -> tuple[tuple[str, str], Array, Array]:
    names = next((n for n in NAMES if isinstance(params, Mapping) and {*n} <= {*params}), None)
    if names is None:
        raise TypeError(
            f"{norm}: params must be the last layer, a dict with kernel and bias, or w and b; got {shown(params)}. "
            'Write params["Dense_0"], or another layer that has both.'
        )
    kernel, bias = (jnp.asarray(params[name]) for name in names)
    if kernel.ndim < 1 or kernel.shape[-1] != number or bias.shape != (number,):
        raise ValueError(
            f"{norm}: {names[0]} must be (..., {number}) and {names[1]} ({number},), a column for each task; got "
            f"{kernel.shape} and {bias.shape}. Write PopArt().init({bias.shape[-1] if bias.ndim else 1})."
        )
    return names, kernel, bias


def _check_range(norm: str, min_std: Any, max_std: Any) -> None:
    least = canonicalize_number(norm, "min_std", min_std, "1e-4", least=0.0)
    if least == 0.0 or canonicalize_number(norm, "max_std", max_std, "1e6", least=0.0) < least:
        raise ValueError(
            f"{norm}: needs 0 < min_std <= max_std, got {min_std} and {max_std}. Write min_std=1e-4, max_std=1e6."
        )


def _check_update(norm: str, momentum: Any, accumulate: Any) -> None:
    check_momentum(norm, momentum)
    if momentum is None:
        raise ValueError(f"{norm}: momentum must be a number from 0 to 1, got None. Write momentum=0.9997.")
    if not isinstance(accumulate, str) or accumulate not in ACCUMULATE:
        raise ValueError(f'{norm}: accumulate must be one of {ACCUMULATE}, got {shown(accumulate)}. Write "mean".')
