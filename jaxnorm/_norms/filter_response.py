"""Filter response normalization: every example and channel by its mean square over space, with a learned threshold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.arrays import as_float_array, canonicalize_axes
from .._core.checks import canonicalize_number
from .._core.types import Features
from .._ops.elementwise import OfElements, normalize_by_statistics
from .base import RowSpec
from .declare import function_of, spec

Array = jax.Array


class FilterResponseParams(NamedTuple):
    """The parameters of `filter_response_norm`."""

    scale: Array | None  # feature shape
    bias: Array | None  # the same
    threshold: Array | None  # the same
    learned_epsilon: Array | None  # (), one number


@spec
class FilterResponseNorm(RowSpec):
    """The hyperparameters of `filter_response_norm`.

    Args:
      use_threshold: whether `init` makes a threshold. Without it the activation is up to you.
      use_learned_epsilon: whether `init` makes a learned epsilon. The paper has one for 1x1 maps.
      init_learned_epsilon: the first value of the learned epsilon.
      axis: the channel axis, at any position but 0.
      epsilon: added to the mean square, in units of x squared; >= 0.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.FilterResponseNorm(epsilon=0.)
    >>> params, state = norm.init(1)
    >>> norm.apply(params, state, np.array([[[3.], [-3.]]]))[0].round(3).tolist()
    [[[1.0], [0.0]]]
    """

    Params: ClassVar[Any] = FilterResponseParams

    use_bias: bool = True
    use_threshold: bool = True
    use_learned_epsilon: bool = False
    init_learned_epsilon: float = 1e-4
    axis: int = -1
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        canonicalize_number("FilterResponseNorm", "init_learned_epsilon", self.init_learned_epsilon, "1e-4")

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[FilterResponseParams, tuple[()]]: ...

    def init_param(self, name: str, shape: tuple[int, ...]) -> Array:
        if name == "learned_epsilon":
            return jnp.full((), self.init_learned_epsilon, self.param_dtype)
        return super().init_param(name, shape)


@function_of(FilterResponseNorm)
def filter_response_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    threshold: ArrayLike | None = None,
    learned_epsilon: ArrayLike | None = None,
    *,
    axis,
    mask: ArrayLike | None = None,
    **options,
) -> Array:
    """Filter response normalization (FRN) with its thresholded linear unit (TLU).

        y = max(x / sqrt(mean(|x|^2) + epsilon + |learned_epsilon|) * (scale + scale_offset) + bias, threshold)

    with the mean over every axis but the batch axis 0 and the channel axis. No mean is taken out, and examples do not
    depend on each other.

    Args:
      x: array of shape (N, ..., C), the channels at `axis`. Integers are promoted to float32.
      scale: of shape (C,), or of a shape that broadcasts against x; None is 1.
      bias: the same; None is 0.
      threshold: the same; None is none, so that y is not cut off from below.
      learned_epsilon: one number, or of the shape of scale; None is 0.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: the batch axis as channel axis; a bad axis, epsilon or backend; a parameter or mask that fits x
        nowhere.
      TypeError: a complex x with a threshold; a dtype that cannot hold the result.
      NameError: axis_name is not bound here.

    Used by timm's models and Bayesian deep learning, as a batch norm without a batch.

    Source: Singh, Krishnan, "Filter Response Normalization Layer" (2019), arXiv:1911.09737.

    >>> import jaxnorm as jn, numpy as np
    >>> x = np.array([[[3.], [-3.]]])
    >>> jn.filter_response_norm(x, threshold=np.array([-0.5]), epsilon=0.).round(3).tolist()
    [[[1.0], [-0.5]]]
    """
    norm = "filter_response_norm"
    x = as_float_array(norm, x, rank=2, layout="(batch, ..., channels)")
    (channel,) = canonicalize_axes(norm, x.ndim, axis, most=1)
    if channel == 0:
        raise ValueError(
            f"{norm}: axis={axis} is the batch axis of x {x.shape}, whose examples are normalized apart. "
            "Write axis=-1 for channels last, or axis=1."
        )
    if threshold is not None and jnp.iscomplexobj(x):
        raise TypeError(f"{norm}: a threshold is for real values, got {x.dtype}. Write threshold=None.")
    space = tuple(a for a in range(1, x.ndim) if a != channel)
    own = {"threshold": threshold, "learned_epsilon": learned_epsilon}
    return normalize_by_statistics(
        norm, _response, x, own, scale, bias, space, (channel,), mask=mask, centered=False, **options
    )


def _response(x: Array, of: OfElements, affine, epsilon: float, threshold, learned_epsilon) -> Array:
    learned = 0.0 if learned_epsilon is None else jnp.abs(learned_epsilon.astype(of.var.dtype))
    z = affine(of.standardize(x, epsilon + learned))
    return z if threshold is None else jnp.maximum(z, threshold.astype(z.dtype))
