"""Domain-specific batch normalization: statistics of its own for each domain that examples come from."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.arrays import as_float_array, canonicalize_axes, sizes_along
from .._core.explain import explained
from .._core.messages import shown, to_python
from .._core.over import Segments
from .._core.types import Affine, Features, Params, Plan, RunningStats
from .._ops.batch import normalize_batch
from .._ops.normalize import as_affine, normalize_given
from .._ops.policy import running_policy
from .._ops.standardize import standardize
from .._ops.states import as_given, as_stats, is_stats
from .declare import S, as_params, function_of, refuse_params_as_state, spec
from .running import RunningOptions

Array = jax.Array


@spec
class DomainBatchNorm(RunningOptions):
    """The hyperparameters of `domain_batch_norm`. See `BatchNorm` for those that it has too. The domain comes after x.

    Args:
      num_domains: K, the number of domains. Static.
      use_domain_params: whether `init` makes a scale and a bias for each domain, (K, C), or for all, (C,).
      axis: the channel axis, or axes. The batch axis is 0.
      min_count: a channel with fewer elements of a domain than this leaves that state as it was.
      zero_debias: correct the running statistics for their start, as Adam does: by the updates of each domain.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.DomainBatchNorm(num_domains=2, momentum=0.5, epsilon=0.)
    >>> params, state = norm.init(1)
    >>> y, state = norm.apply(params, state, np.array([[1.], [3.], [8.]]), np.array([0, 0, -1]), train=True)
    >>> y[:2].round(3).tolist(), state.mean.tolist()
    ([[-1.0], [1.0]], [[1.0], [0.0]])
    """

    state_axes: ClassVar[int] = 1
    whole: ClassVar[tuple[str, ...]] = ("scale", "bias")

    use_domain_params: bool = False
    num_domains: int | None = None
    axis: int | Sequence[int] = -1

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[Affine, RunningStats]: ...

    def init_param(self, name: str, shape: tuple[int, ...]) -> Array:
        lead = (_number("DomainBatchNorm.init", self.num_domains),) if self.use_domain_params else ()
        return super().init_param(name, lead + shape)

    def init_state(self, shape: tuple[int, ...]) -> RunningStats:
        """Mean 0 and variance 1, of each domain."""
        return super().init_state((_number("DomainBatchNorm.init", self.num_domains), *shape))

    @explained("apply")
    def apply(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, params: Params, state: S, x: ArrayLike, domain: ArrayLike | None, *, train: Any = None, mask: Any = None,
        weights: Any = None, update_stats: bool = True,
    ) -> tuple[Array, S]:  # fmt: skip
        """The normalized x and the new state. Arguments as for `domain_batch_norm`; frozen, it needs no train."""
        refuse_params_as_state("DomainBatchNorm.apply", state)
        params = as_params("DomainBatchNorm.apply", params)
        call = dict(train=train, mask=mask, weights=weights, update_stats=update_stats)
        return domain_batch_norm(x, domain, params, state, **call, **self.options())

    def as_affine(self, params: Params, state: RunningStats) -> Affine:
        """What the norm is at inference in each domain, but for an activation: a scale and a bias of (K, C).

        >>> import jaxnorm as jn
        >>> norm = jn.DomainBatchNorm(num_domains=2, epsilon=0.)
        >>> norm.as_affine(*norm.init(1)).scale.tolist()
        [[1.0], [1.0]]
        """
        scale, bias = as_params("DomainBatchNorm.as_affine", params)
        stats: Any = as_stats(state)
        table = lambda p: None if p is None else jnp.broadcast_to(p, stats.mean.shape)
        options = dict(epsilon=self.epsilon, scale_offset=self.scale_offset)
        return as_affine(stats.mean, stats.var, table(scale), table(bias), **options)  # pyright: ignore


@function_of(DomainBatchNorm)
def domain_batch_norm(
    x: ArrayLike,
    domain: ArrayLike | None,
    params: Params,
    state: S,
    *,
    train: Any,
    num_domains, axis, momentum, running, min_count, skip_nonfinite, zero_debias, unbiased_running_var,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    update_stats: bool = True,
    **options,
) -> tuple[Array, S]:  # fmt: skip
    """Batch normalization of the examples of each domain by statistics of their own.

        y = (x - mean[k]) / sqrt(var[k] + epsilon) * (scale[k] + scale_offset) + bias[k],   k the domain of the example

    In training mean and var are those of the batch's examples of domain k, at inference the running ones of k. A domain
    that the batch lacks keeps its state. Over devices all domains together are one all-reduce each way.

    Args:
      x: array of shape (N, ..., C), the channels at `axis`, the batch axis first.
      domain: an integer, for a batch of one domain, which is `batch_norm` with its kernels; or integers of shape (N,),
        below K, where an example with another id counts nowhere. None: the batch is K equal runs of examples, one of
        each domain in order; at inference all are of domain 0, as in timm.
      params: `Affine(scale, bias)`, or a dict. Each is None, or (C,) for all domains, or (K, C).
      state: `RunningStats(mean, var, count)`, float32 (K, C); `DomainBatchNorm(...).init(C)` makes one. A dict does.
      num_domains: K. None reads it off the state.
      mask: True where an element counts, as for `batch_norm`.

    Returns:
      An array of x's shape, and the new state: its tree, shapes and dtypes are the old one's.

    Raises:
      ValueError: a domain that fits x nowhere; a batch that K does not divide; a bad axis, momentum, epsilon, backend
        or sync; params, state or mask that fit x nowhere.
      TypeError: a domain that is no integer; a dtype that cannot hold the result; `train` is not a bool.
      NameError: axis_name is not bound here.

    Warns:
      UserWarning: one element per channel in training.

    Used by AdvProp's EfficientNets (timm's split batch norm), by detectron2, and in domain adaptation.

    Source: Chang, You, Seo, Kwak, Han, "Domain-Specific Batch Normalization" (2019), arXiv:1906.03950; Xie et al.,
    "Adversarial Examples Improve Image Recognition" (2019), arXiv:1911.09665.

    >>> import jaxnorm as jn, numpy as np
    >>> params, state = jn.DomainBatchNorm(num_domains=2).init(1)
    >>> x = np.array([[1.], [3.], [10.], [50.]], "f")
    >>> y, state = jn.domain_batch_norm(x, np.array([0, 0, 1, 1]), params, state, train=True)
    >>> y.round(3).tolist()
    [[-1.0], [1.0], [-1.0], [1.0]]
    """
    norm = "domain_batch_norm"
    x = as_float_array(norm, x, rank=2, layout="(batch, ..., channels)")
    channels = canonicalize_axes(norm, x.ndim, axis)
    if 0 in channels:
        raise ValueError(f"{norm}: axis={axis} holds axis 0 of x {x.shape}, which is the batch. Write axis=-1.")
    given = as_params(norm, params)
    refuse_params_as_state(norm, state)
    if not is_stats(state) or "var" not in (stats := as_stats(state))._fields:
        raise TypeError(
            f"{norm}: state must be a jaxnorm.RunningStats, got {shown(state)}. Write params, state = "
            f"jaxnorm.DomainBatchNorm(num_domains=2).init({sizes_along(x.shape, channels)})."
        )
    number = _number(norm, stats.mean.shape[0] if num_domains is None and stats.mean.ndim else num_domains)
    flat = dict(momentum=momentum, min_count=min_count, skip_nonfinite=skip_nonfinite, zero_debias=zero_debias)
    policy = running_policy(norm, running, **flat, unbiased_running_var=unbiased_running_var)
    options |= dict(train=train, channels=channels, update_stats=update_stats, virtual_batch_size=None, gathers=False)
    features = sizes_along(x.shape, channels)
    tables = [p is not None and jnp.shape(p) == (number, *features) for p in given]
    if domain is None:
        trains = not options["frozen"] and to_python(train) is not False
        if trains and x.shape[0] % number:
            raise ValueError(
                f"{norm}: the {x.shape[0]} examples of x {x.shape} are not {number} equal runs. Write their domains."
            )
        domain = jnp.arange(x.shape[0]) // (x.shape[0] // number) if trains else 0
        if trains and not isinstance(to_python(train), bool):
            domain = jnp.where(train, domain, 0)
    ids = _ids(norm, domain, x, number)
    if ids.ndim == 0:
        pick = lambda a, table=True: a if a is None or not table else jnp.asarray(a)[ids]
        scale, bias = (pick(p, table) for p, table in zip(given, tables, strict=True))
        one = jax.tree.map(pick, stats)
        y, new = normalize_batch(norm, x, scale, bias, one, policy, mask=mask, weights=weights, **options)
        return y, as_given(state, jax.tree.map(lambda all, new: all.at[ids].set(new), stats, new))
    of_example = functools.partial(_of_example, ids, channels, x.ndim)
    scale, bias = (of_example(p) if table else p for p, table in zip(given, tables, strict=True))
    by = _ByDomain(number)
    return normalize_batch(
        norm, x, scale, bias, state, policy, mask=mask, weights=weights, by=by, lead=(number,),
        own_params=(ids.reshape(-1, *(1,) * (x.ndim - 1)),), given=functools.partial(_by_running, channels), **options,
    )  # fmt: skip


@dataclass(frozen=True)
class _ByDomain:
    """In the place of `standardize`: the statistics are of the examples with the same id."""

    number: int

    def __call__(self, norm: str, plan: Plan, x: Array, scale, bias, mask, weights, ids):
        over = Segments(self.number, tuple(a for a in plan.reduction.axes if a != 0), 1)
        plan = replace(plan, reduction=replace(plan.reduction, over=over, one_pass=False))
        return standardize(norm, plan, x, scale, bias, over.present(mask, ids), weights, None, ids)


def _by_running(channels, x, mean, var, scale, bias, keep, ids, **options) -> Array:
    mean, var = (_of_example(ids.reshape(-1), channels, x.ndim, a) for a in (mean, var))
    return normalize_given(x, mean, var, scale, bias, keep, **options)


def _of_example(ids: Array, channels: tuple[int, ...], rank: int, table: Any) -> Array:
    """Of a table (K, C), the row of each example, with x's rank. An id that no row has takes the nearest."""
    rows = jnp.take(jnp.asarray(table), jnp.clip(ids, 0, len(table) - 1), 0)
    return jnp.expand_dims(rows, [a for a in range(1, rank) if a not in channels])


def _number(norm: str, num_domains: Any) -> int:
    number = to_python(num_domains)
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(f"{norm}: num_domains must be an int >= 1, got {shown(num_domains)}. Write num_domains=2.")
    return number


def _ids(norm: str, domain: Any, x: Array, number: int) -> Array:
    """The domain as int32, () or (N,). Ids that no domain has are -1."""
    ids = jnp.asarray(domain)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"{norm}: domain must be integers, got {shown(domain)}. Write domain.astype(jnp.int32).")
    if ids.shape not in ((), x.shape[:1]):
        raise ValueError(
            f"{norm}: domain of shape {ids.shape} must be one integer, or one for each of the {x.shape[0]} examples of "
            f"x {x.shape}. Write domain of shape {x.shape[:1]}."
        )
    if ids.ndim == 0 and isinstance(to_python(domain), int) and not 0 <= to_python(domain) < number:
        raise ValueError(f"{norm}: domain={shown(domain)} is none of the {number} domains. Write domain=0.")
    ids = jnp.where((ids >= 0) & (ids < number), ids, -1) if ids.ndim else ids
    return ids.astype(jnp.int32)
