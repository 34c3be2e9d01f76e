"""EvoNorm of the B series: normalization and activation in one, by statistics of the batch and of each example."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.arithmetic import ratio
from .._core.arrays import as_float_array, canonicalize_axes
from .._core.messages import shown
from .._core.types import Features, RunningStats
from .._ops.elementwise import OfElements
from .._ops.mixed import Mixed, normalize_mixed
from .declare import S, as_params, function_of, refuse_params_as_state, spec
from .running import RunningSpec, taken_policy

Array = jax.Array


class EvoBParams(NamedTuple):
    """The parameters of `evo_norm_b`."""

    scale: Array | None  # feature shape
    bias: Array | None  # the same
    u: Array | None  # the same, of variant B0


@spec
class EvoNormB(RunningSpec):
    """The hyperparameters of `evo_norm_b`.

    Args:
      variant: "B0", "B1" or "B2".
      epsilon: added to each variance and mean square, in units of x squared; >= 0.
      unbiased_running_var: the running variance takes m2 / (n - 1), as timm does, in place of m2 / n.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.EvoNormB(epsilon=0.)
    >>> params, state = norm.init(1)
    >>> norm.apply(params, state, np.array([[[-1.], [1.]]]), train=True)[0].round(3).tolist()
    [[[-1.0], [0.5]]]
    """

    Params: ClassVar[Any] = EvoBParams

    variant: str = "B0"
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        _formula("EvoNormB", self.variant)

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[EvoBParams, RunningStats]: ...

    def init_params(self, shape: tuple[int, ...]) -> EvoBParams:
        params = super().init_params(shape)
        return params if self.variant == "B0" else params._replace(u=None)

    def init_param(self, name: str, shape: tuple[int, ...]) -> Array:
        return jnp.ones(shape, self.param_dtype) if name == "u" else super().init_param(name, shape)


@function_of(EvoNormB)
def evo_norm_b(
    x: ArrayLike,
    params: Any,
    state: S,
    *,
    train: Any,
    axis,
    variant,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    update_stats: bool = True,
    **options,
) -> tuple[Array, S]:
    """EvoNorm of the B series, in the place of a batch norm and its activation.

        B0: y = x / max(sqrt(var + epsilon), u x + sqrt(var_i + epsilon)) * (scale + scale_offset) + bias
        B1: y = x / max(sqrt(var + epsilon), (x + 1) sqrt(ms_i + epsilon)) * (scale + scale_offset) + bias
        B2: y = x / max(sqrt(var + epsilon), sqrt(ms_i + epsilon) - x) * (scale + scale_offset) + bias

    with var of each channel over the batch, at inference the running one, and var_i and ms_i the variance and the mean
    square of each example and channel over space. The running mean is kept as well, so that variances merge; nothing
    else uses it.

    Args:
      x: array of shape (N, ..., C), the channels at `axis`. Integers are promoted to float32.
      params: `EvoBParams(scale, bias, u)`, each of shape (C,), or of one that broadcasts against x, or None; or a dict
        of the same names. u is of B0 alone; None is 1.
      state: `RunningStats(mean, var, count)`, float32 (C,), or a dict of them, as for `batch_norm`. In training also
        `Moments`, which those of the batch are merged into.
      mask: True where an element counts, as for `batch_norm`. It holds for both kinds of statistics.

    Returns:
      An array of x's shape, and the new state: its tree, shapes and dtypes are the old one's.

    Raises:
      ValueError: the batch axis as channel axis; a bad axis, momentum, epsilon, sync or virtual_batch_size; params,
        state or mask that fit x nowhere; a backend of kernels.
      TypeError: a dtype that cannot hold the result; `train` is not a bool.
      NameError: axis_name is not bound here.

    Used by timm's RegNetZ models, and detection and segmentation networks.

    Source: Liu, Brock, Simonyan, Le, "Evolving Normalization-Activation Layers" (2020), arXiv:2004.02967.

    >>> import jaxnorm as jn, numpy as np
    >>> params, state = jn.EvoNormB(variant="B2").init(1)
    >>> x = np.array([[[-1.], [1.]]])
    >>> jn.evo_norm_b(x, params, state, train=True, variant="B2", epsilon=0.)[0].round(3).tolist()
    [[[-0.5], [1.0]]]
    """
    norm = "evo_norm_b"
    x = as_float_array(norm, x, rank=2, layout="(batch, ..., channels)")
    if jnp.iscomplexobj(x):
        raise TypeError(f"{norm}: a maximum is for real values, got {x.dtype}. Write jaxnorm.batch_norm(x, ...).")
    channels = canonicalize_axes(norm, x.ndim, axis)
    refuse_params_as_state(norm, state, EvoBParams)
    scale, bias, u = as_params(norm, params, EvoBParams)
    f = _formula(norm, variant)
    if u is not None and variant != "B0":
        raise ValueError(f"{norm}: u is a parameter of variant B0, got variant={variant!r}. Write u=None.")
    policy = taken_policy(norm, options)
    return normalize_mixed(
        norm, Mixed(f, ("instance",), centered=variant == "B0"), x, scale, bias, {"u": u}, state, policy,
        channels=channels, train=train, mask=mask, weights=weights, update_stats=update_stats, **options,
    )  # fmt: skip


def _b0(x: Array, of_instance: Array, u: Array | None) -> Array:
    return (x if u is None else u.astype(x.dtype) * x) + of_instance


def _b1(x: Array, of_instance: Array, u: None) -> Array:
    return (x + 1.0) * of_instance


def _b2(x: Array, of_instance: Array, u: None) -> Array:
    return of_instance - x


def _over_the_larger(second, x: Array, batch: OfElements, instance: OfElements, affine, epsilon, u) -> Array:
    divisor = jnp.maximum(batch.std(epsilon), second(x, instance.std(epsilon), u))
    void = (batch.count == 0) | (divisor == 0)
    return affine(jnp.where(void, 0.0, ratio(x, jnp.where(void, 1.0, divisor))))


_FORMULAS = {name: partial(_over_the_larger, f) for name, f in (("B0", _b0), ("B1", _b1), ("B2", _b2))}


def _formula(norm: str, variant: str):
    if variant not in _FORMULAS:
        write = "Write jaxnorm.EvoNormS." if variant in ("S0", "S1", "S2") else 'Write variant="B0".'
        raise ValueError(f"{norm}: variant must be one of {sorted(_FORMULAS)}, got {shown(variant)}. {write}")
    return _FORMULAS[variant]
