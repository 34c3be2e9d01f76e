"""SeeDNorm: RMS norm whose scale depends on the row itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.arithmetic import tanh
from .._core.arrays import align_param, as_float_array, canonicalize_axes
from .._core.channels import canonicalize_group_count
from .._core.types import Features
from .._ops.rows import normalize_rows
from .._ops.written import normalize_written
from .base import Spec
from .declare import function_of, spec

Array = jax.Array


class SeeDNormParams(NamedTuple):
    """The parameters of `seednorm`."""

    scale: Array | None  # feature shape
    alpha: Array  # the same
    beta: Array  # the same


@spec
class SeeDNorm(Spec):
    """The hyperparameters of `seednorm`. It starts as RMS norm: scale and alpha are 1, and beta is 0.

    Args:
      axis: the channel axis, which is normalized over.
      num_heads: how many parts of the channels have a dot product each. The paper has 16 in vision, where 1 diverges.
      epsilon: added to the mean square, in units of x squared; >= 0.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.SeeDNorm(epsilon=0.)
    >>> params, state = norm.init(2)
    >>> norm.apply(params, state, np.array([[3., -3.]]))[0].round(3).tolist()
    [[1.0, -1.0]]
    """

    Params: ClassVar[Any] = SeeDNormParams
    decays: ClassVar[tuple[str, ...]] = ("alpha", "beta")

    axis: int = -1
    num_heads: int = 1
    epsilon: float = 1e-6

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[SeeDNormParams, tuple[()]]: ...

    def _check_features(self, shape: tuple[int, ...]) -> None:
        super()._check_features(shape)
        _heads("SeeDNorm.init", shape[-1] if shape else 1, self.num_heads)

    def init_param(self, name: str, shape: tuple[int, ...]) -> Array:
        first = {"alpha": 1.0, "beta": 0.0}
        return jnp.full(shape, first[name], self.param_dtype) if name in first else super().init_param(name, shape)


def _heads(norm: str, channels: int, num_heads) -> int:
    try:
        return canonicalize_group_count(norm, channels, num_heads, None)
    except ValueError as error:
        raise ValueError(str(error).replace("num_groups", "num_heads")) from None


@function_of(SeeDNorm)
def seednorm(
    x: ArrayLike,
    scale: ArrayLike | None,
    alpha: ArrayLike,
    beta: ArrayLike,
    *,
    axis,
    num_heads,
    epsilon,
    mask: ArrayLike | None = None,
    **options,
) -> Array:
    """SeeDNorm, self-rescaled dynamic normalization, in the place of an RMS norm.

        y = (tanh(x . beta) alpha + scale + scale_offset) * x / sqrt(mean(x^2) + epsilon),   over `axis`

    With `num_heads` each run of C / num_heads channels has the dot product of its own part of x and beta; the mean is
    over all. The paper applies weight decay to alpha and beta. It also divides alpha and beta by the number of
    channels, and drops out parts of tanh(x . beta) alpha, for images; neither is done here.

    Args:
      x: array of any shape of rank 1 or more, the channels at `axis`. Integers are promoted to float32.
      scale: of shape (C,), or of a shape that broadcasts against x; None is 1.
      alpha: the same, but not None.
      beta: the same.
      mask: True where an element counts. Broadcasts to x, or covers its leading axes. What is masked out counts as 0,
        and gives 0.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: heads that do not divide the channels; a bad axis, epsilon or backend; a parameter or mask that fits x
        nowhere.
      TypeError: a complex x; an alpha or beta that is None; a dtype that cannot hold the result.

    Used by ByteDance Seed's OLMoE, OLMo 2 and ViT models.

    Source: Cai, Zhu, Liu, Min, "SeeDNorm: Self-Rescaled Dynamic Normalization" (2025), arXiv:2510.22777.

    >>> import jaxnorm as jn, numpy as np
    >>> jn.seednorm(np.array([[3., 3.]]), None, np.ones(2), np.array([9., 9.]), epsilon=0.).round(3).tolist()
    [[2.0, 2.0]]
    """
    norm = "seednorm"
    x = as_float_array(norm, x, rank=1, layout="the channel axis among its own")
    (channel,) = canonicalize_axes(norm, x.ndim, axis, most=1)
    heads = _heads(norm, x.shape[channel], num_heads)
    for name, p in (("alpha", alpha), ("beta", beta)):
        if p is None:
            raise TypeError(f"{norm}: {name} must be an array, got None. Write {name}=jnp.zeros({x.shape[channel]}).")
    own = tuple(align_param(norm, name, p, x.shape, (channel,)) for name, p in (("alpha", alpha), ("beta", beta)))
    plain = options["implementation"]

    def f(x: Array, keep: Array | None, affine, alpha: Array, beta: Array) -> Array:
        xhat = normalize_rows(
            norm, x, None, None, (channel,), (channel,), epsilon=epsilon, scale_offset=0.0, mask=keep, axis_name=None,
            axis_index_groups=None, dtype=None, implementation=plain, centered=False,
        )  # fmt: skip
        parts = x * beta.astype(x.dtype)
        split = parts.reshape(*x.shape[:channel], heads, x.shape[channel] // heads, *x.shape[channel + 1 :])
        seed = jnp.broadcast_to(tanh(split.sum(channel + 1, keepdims=True)), split.shape).reshape(x.shape)
        return affine(xhat) + seed * alpha.astype(x.dtype) * xhat

    return normalize_written(norm, f, x, own, scale, None, (channel,), mask=mask, **options)
