"""Differentiable group normalization: nodes in soft groups that are learned, and a batch norm of each group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.arrays import align_boolean_mask, align_weights, as_float_array, canonicalize_dtype
from .._core.checks import canonicalize_number
from .._core.dtypes import widest
from .._core.explain import explained
from .._core.masks import finite_padding, finite_where_masked, valid_mask
from .._core.messages import shown, to_python
from .._core.platforms import recompute
from .._core.types import Features, RunningStats
from .._ops.activation import activate_output, check_activation
from .._ops.batch import ByFormula, normalize_batch
from .._ops.elementwise import OfElements
from .._ops.plan import refuse_kernels
from .._ops.policy import running_policy
from .declare import S, as_params, function_of, refuse_params_as_state, spec
from .running import RunningOptions

Array = jax.Array


class DiffGroupParams(NamedTuple):
    """The parameters of `diff_group_norm`, for G groups."""

    weight: Array  # (C, G): of each channel, for the membership in each group
    scale: Array | None  # (G, C)
    bias: Array | None  # the same


@spec
class DiffGroupNorm(RunningOptions):
    """The hyperparameters of `diff_group_norm`. See `BatchNorm` for those of the running statistics.

    `weight` starts uniform within C**-0.5 of 0, as in PyTorch Geometric: from a key that is always the same, and in a
    Flax layer from the layer's.

    Args:
      init_groups: G, the number of groups.
      rate: what multiplies the sum of the normalized groups. The paper calls it lambda.
      min_count: a channel with fewer nodes than this leaves its state as it was.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.DiffGroupNorm(init_groups=1, rate=1.0, epsilon=0.)
    >>> params, state = norm.init(1)
    >>> norm.apply(params, state, np.array([[1.], [3.]]), train=True)[0].round(3).tolist()
    [[0.0], [4.0]]
    """

    Params: ClassVar[Any] = DiffGroupParams
    own_state_shape: ClassVar[bool] = True
    whole: ClassVar[tuple[str, ...]] = ("weight", "scale", "bias")
    drawn: ClassVar[tuple[str, ...]] = ("weight",)

    init_groups: int = 10
    rate: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        groups = to_python(self.init_groups)
        if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1:
            raise ValueError(
                f"DiffGroupNorm: init_groups must be an int >= 1, got {shown(groups)}. Write init_groups=10."
            )
        canonicalize_number("DiffGroupNorm", "rate", self.rate, "0.01")

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[DiffGroupParams, RunningStats]: ...

    def init_param(self, name: str, shape: tuple[int, ...]) -> Array:
        return super().init_param(name, shape if name == "weight" else (self.init_groups, *shape))

    def draw_param(self, name: str, shape: tuple[int, ...], key: Array) -> Array:
        channels = shape[-1] if shape else 1
        drawn = jax.random.uniform(key, (channels, self.init_groups), jnp.float32, -1.0, 1.0)
        return (drawn * max(channels, 1) ** -0.5).astype(self.param_dtype)

    def init_state(self, shape: tuple[int, ...]) -> RunningStats:
        """Mean 0 and variance 1, of each group."""
        return super().init_state((self.init_groups, *shape))

    @explained("apply")
    def apply(
        self, params: Any, state: S, x: ArrayLike, *, train: Any = None, mask: Any = None, weights: Any = None,
        update_stats: bool = True,
    ) -> tuple[Array, S]:  # fmt: skip
        """The normalized x and the new state. Arguments as for `diff_group_norm`; frozen, it needs no train."""
        refuse_params_as_state("DiffGroupNorm.apply", state, DiffGroupParams)
        params = as_params("DiffGroupNorm.apply", params, DiffGroupParams)
        call = dict(train=train, mask=mask, weights=weights, update_stats=update_stats)
        return diff_group_norm(x, params, state, **call, **self.options())


@function_of(DiffGroupNorm)
def diff_group_norm(
    x: ArrayLike,
    params: Any,
    state: S,
    *,
    train: Any,
    rate, momentum, running, min_count, skip_nonfinite, zero_debias, unbiased_running_var, activation, dtype,
    implementation,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    update_stats: bool = True,
    **options,
) -> tuple[Array, S]:  # fmt: skip
    """Differentiable group normalization of nodes: a batch norm of each of G soft groups, added to x.

        a = softmax(x weight);   y = x + rate sum_g batch_norm_g(a_g x)

    with the statistics of each group and channel over all nodes, weighted by their membership a_g. Groups that are the
    same stay the same: `weight` must differ between them. For the backward pass x alone is kept.

    Args:
      x: array of shape (M, ..., C), the channels last. Integers are promoted to float32.
      params: `DiffGroupParams(weight, scale, bias)`, or a dict of these. weight is of shape (C, G), scale and bias are
        of shape (G, C) or None.
      state: `RunningStats(mean, var, count)`, float32 (G, C); `DiffGroupNorm(...).init(C)` makes one. A dict does.
      mask: True where an element counts. What is masked out counts as 0 in x weight, and in no statistic.
      weights: a float weight >= 0 for each element, in the statistics of the batch. Differentiable.

    Returns:
      An array of x's shape, and the new state: its tree, shapes and dtypes are the old one's.

    Raises:
      ValueError: a weight of another shape; a bad rate, momentum, epsilon, backend or sync; params, state, mask or
        weights that fit x nowhere.
      TypeError: a complex x; a dtype that cannot hold the result; `train` is not a bool.
      NameError: axis_name is not bound here.

    Warns:
      UserWarning: one node in training.

    Used by PyTorch Geometric, against oversmoothing in deep graph networks. Tier C: it may change in any release.

    Source: Zhou, Huang, Li, Zha, Chen, Hu, "Towards Deeper Graph Neural Networks with Differentiable Group
    Normalization" (2020), arXiv:2006.06972.

    >>> import jaxnorm as jn, numpy as np
    >>> params, state = jn.DiffGroupNorm(init_groups=2).init(1)
    >>> y, state = jn.diff_group_norm(np.array([[1.], [3.]]), params, state, train=True)
    >>> print(np.asarray(y).round(2).ravel(), state.mean.shape)
    [0.98 3.02] (2, 1)
    """
    norm = "diff_group_norm"
    refuse_kernels(norm, implementation)
    x = as_float_array(norm, x, rank=2, layout="(nodes, ..., channels)")
    if jnp.iscomplexobj(x):
        raise TypeError(f"{norm}: x must be real, got {x.dtype}. Write {norm}(x.real, ...), and the same of x.imag.")
    given = as_params(norm, params, DiffGroupParams)
    refuse_params_as_state(norm, state, DiffGroupParams)
    weight = as_float_array(norm, given.weight, what="weight")
    if weight.ndim != 2 or weight.shape[0] != x.shape[-1]:
        raise ValueError(
            f"{norm}: weight must be of shape ({x.shape[-1]}, groups), got {weight.shape}. Write "
            f"params, state = jaxnorm.DiffGroupNorm(init_groups=10).init({x.shape[-1]})."
        )
    rate = canonicalize_number(norm, "rate", rate, "0.01")
    check_activation(norm, activation, x.shape, x.dtype)
    flat = dict(momentum=momentum, min_count=min_count, skip_nonfinite=skip_nonfinite, zero_debias=zero_debias)
    policy = running_policy(norm, running, **flat, unbiased_running_var=unbiased_running_var)
    out = canonicalize_dtype(norm, dtype, x, *given)
    x, mask = align_boolean_mask(norm, x, mask)
    weights = align_weights(norm, x, weights)
    of_groups: Any = lambda a: None if a is None else a[..., None, :]

    def whole(x: Array, keep, weights, weight, scale, bias, state: Any, train) -> tuple[Array, Any]:
        wide = finite_where_masked(x, keep)
        seen = wide if keep is None else jnp.where(keep, wide, 0.0)
        of = jax.nn.softmax(jnp.matmul(seen, weight.astype(seen.dtype), precision="highest"), axis=-1)[..., None]
        # The select keeps XLA for CPU from contracting the product with the subtraction of its mean, unrounded: equal
        # elements would differ from their mean.
        z = jnp.where(of >= 0.0, of * of_groups(wide), of)
        z, new = normalize_batch(
            norm, z, scale, bias, state, policy, train=train,
            channels=(x.ndim - 1, x.ndim), mask=of_groups(mask), weights=of_groups(weights), update_stats=update_stats,
            by=ByFormula(_standardized), virtual_batch_size=None, activation=None, dtype=widest(wide.dtype, out),
            implementation=implementation, gathers=False, **options,
        )  # fmt: skip
        y = wide + rate * z.sum(-2)
        return (y if activation is None else activate_output(activation, y, keep)).astype(out), new

    keep = valid_mask(mask, weights)
    run = recompute(whole, implementation == "lax")
    return run(finite_padding(x, mask, weights), keep, weights, weight, *given[1:], state, train)


def _standardized(x: Array, of: OfElements, affine, epsilon: float) -> Array:
    return affine(of.standardize(x, epsilon))
