"""RepBN: batch norm with a skip, to which a layer norm is faded over, so that a model trained with it folds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.arrays import align_param, as_float_array, canonicalize_axes, canonicalize_dtype
from .._core.dtypes import accumulator, widest
from .._core.explain import explained
from .._core.masks import finite_where_masked
from .._core.over import Axes
from .._core.types import Affine, Features, Plan, Reduction, RunningStats
from .._ops.activation import activate_output
from .._ops.batch import ByFormula, normalize_batch
from .._ops.elementwise import OfElements
from .._ops.normalize import as_affine, normalize_given
from .._ops.plan import make_plan
from .._ops.policy import EMA, Ramp, check_schedule, counting_policy, scheduled
from .._ops.running import update_and_count
from .._ops.standardize import standardize
from .._ops.states import as_stats, is_stats
from .declare import S, as_params, function_of, refuse_params_as_state, spec
from .running import SharingOptions

Array = jax.Array
_RUNNING = ("momentum", "min_count", "skip_nonfinite", "zero_debias")


class RepBatchParams(NamedTuple):
    """The parameters of `rep_batch_norm`."""

    scale: Array | None  # feature shape, of the batch norm
    bias: Array | None  # the same
    eta: Array  # (), or feature shape: the weight of the skip
    ln_scale: Array | None  # feature shape, of the layer norm; None where that is not faded from
    ln_bias: Array | None  # the same


@spec
class RepBatchNorm(SharingOptions):
    """The hyperparameters of `rep_batch_norm`. See `BatchNorm` for those that it has too.

    Args:
      axis: the channel axis, or axes, at any position: the layer norm is over these.
      momentum: the weight of the old statistics: a number, or a scalar array such as a schedule computes.
      epsilon: of both norms, added to the variance, in units of x squared; >= 0.
      fade: the share of the layer norm in training: a number from 0 to 1, or a function of the count of updates, such
        as `Ramp` or a schedule of optax, which maps an array of counts to one of its shape. 0.0 is RepBN alone.
      running: how the running statistics are updated, as one object: `EMA(...)`.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.RepBatchNorm(fade=0.0, epsilon=0.)
    >>> params, state = norm.init(1)
    >>> norm.apply(params, state, np.array([[1.], [3.]]), train=True)[0].round(3).tolist()
    [[0.0], [4.0]]
    """

    Params: ClassVar[Any] = RepBatchParams
    scales: ClassVar[tuple[str, ...]] = ("scale", "ln_scale")

    axis: int | Sequence[int] = -1
    momentum: float | Array = 0.99
    epsilon: float = 1e-5
    fade: float | Callable[[Any], Any] = Ramp(1.0, 0.0, 0.0, 300_000.0)
    running: EMA | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_schedule("RepBatchNorm", "fade", self.fade, 0.0)
        counting_policy("RepBatchNorm", self.running, {name: getattr(self, name) for name in _RUNNING})

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[RepBatchParams, RunningStats]: ...

    @classmethod
    def option_for(cls, name: str) -> str:
        return f"use_{name.removeprefix('ln_')}"

    def init_params(self, shape: tuple[int, ...]) -> RepBatchParams:
        made = super().init_params(shape)
        made = made._replace(eta=jnp.ones((), self.param_dtype))
        return made if _fades(self.fade) else made._replace(ln_scale=None, ln_bias=None)

    def init_state(self, shape: tuple[int, ...]) -> RunningStats:
        """Mean 0, variance 1, and no updates."""
        return RunningStats(*(jnp.full(shape, first, jnp.float32) for first in (0.0, 1.0, 0.0)))

    @explained("apply")
    def apply(
        self, params: Any, state: S, x: ArrayLike, *, train: Any = None, mask: Any = None, weights: Any = None,
        update_stats: bool = True,
    ) -> tuple[Array, S]:  # fmt: skip
        """The normalized x and the new state. Arguments as for `rep_batch_norm`; frozen, it needs no train."""
        refuse_params_as_state("RepBatchNorm.apply", state, RepBatchParams)
        params = as_params("RepBatchNorm.apply", params, RepBatchParams)
        call = dict(train=train, mask=mask, weights=weights, update_stats=update_stats)
        return rep_batch_norm(x, params, state, **call, **self.options())

    def as_affine(self, params: Any, state: RunningStats) -> Affine:
        """What the norm is at inference, but for an activation: y == x * affine.scale + affine.bias.

        >>> import jaxnorm as jn
        >>> norm = jn.RepBatchNorm(epsilon=0.)
        >>> norm.as_affine(*norm.init(1)).scale.tolist()
        [2.0]
        """
        given, stats = as_params("RepBatchNorm.as_affine", params, RepBatchParams), as_stats(state)
        options = dict(epsilon=self.epsilon, scale_offset=self.scale_offset)
        folded: Any = as_affine(stats.mean, stats.var, given.scale, given.bias, **options)  # pyright: ignore
        eta = 0.0 if given.eta is None else jnp.asarray(given.eta).astype(folded.scale.dtype)
        return Affine(folded.scale + eta, folded.bias)


@function_of(RepBatchNorm)
def rep_batch_norm(
    x: ArrayLike,
    params: Any,
    state: S,
    *,
    train: Any,
    axis, momentum, epsilon, fade, running, min_count, skip_nonfinite, zero_debias,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    update_stats: bool = True,
    **options,
) -> tuple[Array, S]:  # fmt: skip
    """RepBN and progressive RepBN: a layer norm that becomes, over training, a batch norm with a skip.

        y = fade layer_norm(x) + (1 - fade) (batch_norm(x) + eta x)

    At inference it is batch_norm(x) + eta x by the running statistics, one affine map, whatever `fade` is. The running
    statistics are gathered from the first update on. With an activation and a `fade`, the backward pass keeps the sum
    besides x.

    Args:
      x: array of shape (N, ..., C), the channels at `axis`. Integers are promoted to float32.
      params: `RepBatchParams(scale, bias, eta, ln_scale, ln_bias)`, a dict of these, or None. eta is one number or of
        shape (C,), the others of shape (C,); None is a scale of 1, a bias of 0 and an eta of 0.
      state: `RunningStats(mean, var, count)`, float32 (C,); `count` is the number of updates. A dict does as well.
      mask: True where an element counts, as for `batch_norm`.
      weights: a float weight >= 0 for each element, in the statistics of the batch.

    Returns:
      An array of x's shape, and the new state: its tree, shapes and dtypes are the old one's.

    Raises:
      ValueError: a bad axis, momentum, epsilon, fade, backend or sync; a state without a count; params, state or mask
        that fit x nowhere.
      TypeError: a dtype that cannot hold the result; `train` is not a bool.
      NameError: axis_name is not bound here.

    Warns:
      UserWarning: one element per channel in training.

    Used by SLAB's vision and language transformers. Tier C: it may change in any release.

    Source: Guo, Chen, Tang, Wang, "SLAB" (2024), arXiv:2405.11582.

    >>> import jaxnorm as jn, numpy as np
    >>> params, state = jn.RepBatchNorm().init(2)
    >>> y, state = jn.rep_batch_norm(np.array([[1., 3.], [5., 5.]]), params, state, train=True)
    >>> y.round(3).tolist(), state.count.tolist()  # at first the layer norm
    ([[-1.0, 1.0], [0.0, 0.0]], [1.0, 1.0])
    """
    norm = "rep_batch_norm"
    x = as_float_array(norm, x, rank=1, layout="(batch, ..., channels)")
    channels = canonicalize_axes(norm, x.ndim, axis)
    check_schedule(norm, "fade", fade, 0.0)
    given = as_params(norm, params, RepBatchParams)
    refuse_params_as_state(norm, state, RepBatchParams)
    flat = dict(momentum=momentum, min_count=min_count, skip_nonfinite=skip_nonfinite, zero_debias=zero_debias)
    if is_stats(state) and getattr(stats := as_stats(state), "count", None) is None:
        raise ValueError(
            f"{norm}: fade is a function of state.count, which is None. Write "
            f"state._replace(count=jnp.zeros({stats.mean.shape}))."
        )
    eta = jnp.zeros((), jnp.float32) if given.eta is None else given.eta
    fades = _fades(fade)
    return normalize_batch(
        norm, x, given.scale, given.bias, state, counting_policy(norm, running, flat), train=train, channels=channels,
        epsilon=epsilon, mask=mask, weights=weights, update_stats=update_stats, virtual_batch_size=None,
        by=_Faded(channels) if fades else ByFormula(_with_skip), given=_by_running, step=update_and_count,
        own_params=(eta, given.ln_scale, given.ln_bias) if fades else (eta,),
        own=lambda old: (scheduled(fade, old.count),) if fades else (), gathers=False, **options,
    )  # fmt: skip


def _fades(fade: Any) -> bool:
    return callable(fade) or fade != 0


def _with_skip(x: Array, of: OfElements, affine, epsilon: float, eta) -> Array:
    return affine(of.standardize(x, epsilon)) + eta.astype(x.dtype) * x


@dataclass(frozen=True)
class _Faded:
    """In the place of `standardize`: the layer norm over `channels` and RepBN, mixed, and rounded once."""

    channels: tuple[int, ...]

    def __call__(self, norm: str, plan: Plan, x: Array, scale, bias, mask, weights, eta, ln_scale, ln_bias, fade):
        wide = widest(accumulator(x), plan.dtype)
        inner = replace(plan, dtype=wide, activation=None)
        rep, stats = ByFormula(_with_skip)(norm, inner, x, scale, bias, mask, weights, eta)
        rows = Reduction(Axes(self.channels))
        layer = make_plan(x, (), plan.epsilon, plan.scale_offset, wide, rows, plan.backend)
        y, _ = standardize(norm, layer, x, ln_scale, ln_bias, mask)
        fade = fade.astype(wide)
        z = fade * y + (1.0 - fade) * rep
        z = z if plan.activation is None else activate_output(plan.activation, z, mask)
        return z.astype(plan.dtype), stats


def _by_running(x, mean, var, scale, bias, keep, eta: Any, *layer, axis, activation, dtype, **options) -> Array:
    wide = widest(accumulator(x), mean.dtype)
    out = canonicalize_dtype("rep_batch_norm", dtype, x, *(p for p in (scale, bias) if p is not None))
    y = normalize_given(x, mean, var, scale, bias, keep, axis=axis, activation=None, dtype=wide, **options)
    skip: Any = align_param("rep_batch_norm", "eta", eta, x.shape, axis)
    z = y + skip.astype(wide) * finite_where_masked(x, keep).astype(wide)
    return (z if activation is None else activate_output(activation, z, keep)).astype(out)
