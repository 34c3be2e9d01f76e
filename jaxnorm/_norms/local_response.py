"""Local response norm: every channel by the energy of its neighbours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from .._core.arrays import as_float_array, canonicalize_axes
from .._core.checks import canonicalize_flags, canonicalize_number
from .._core.messages import shown, to_python
from .._core.types import Features
from .._ops.written import normalize_written
from .base import NoParams, Spec
from .declare import function_of, spec

Array = jax.Array


@spec
class LocalResponseNorm(Spec):
    """The hyperparameters of `local_response_norm`. It has no parameters.

    Args:
      use_scale: without effect here.
      scale_offset: without effect here.
      size: n, how many channels a window has.
      alpha: what multiplies the energy of a window; >= 0.
      beta: the power.
      k: what is added to it; > 0.
      divide: whether the energy is divided by n, as in torch. TensorFlow and the paper do not: with a depth_radius r
        write size=2 * r + 1, divide=False.
      axis: the channel axis.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.LocalResponseNorm(size=3, alpha=1., beta=1., divide=False)
    >>> params, state = norm.init(3)
    >>> norm.apply(params, state, np.array([[1., 2., 0.]]))[0].round(3).tolist()
    [[0.16700001060962677, 0.3330000042915344, 0.0]]
    """

    Params: ClassVar[Any] = NoParams

    size: int = 5
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 1.0
    divide: bool = True
    axis: int = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("LocalResponseNorm", self.size, self.alpha, self.beta, self.k)

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[NoParams, tuple[()]]: ...


def _check(norm: str, size, alpha, beta, k) -> tuple[int, float, float, float]:
    number = to_python(size)
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(f"{norm}: size must be an int >= 1, got {shown(size)}. Write size=5.")
    alpha = canonicalize_number(norm, "alpha", alpha, "1e-4", 0.0)
    beta = canonicalize_number(norm, "beta", beta, "0.75")
    k = canonicalize_number(norm, "k", k, "1.0", 0.0)
    if k == 0.0:
        raise ValueError(
            f"{norm}: k must be > 0, got {shown(k)}: a window of zeros would be divided by 0. Write k=1.0."
        )
    return number, alpha, beta, k


@function_of(LocalResponseNorm)
def local_response_norm(
    x: ArrayLike,
    *,
    size,
    alpha,
    beta,
    k,
    divide,
    axis,
    mask: ArrayLike | None = None,
    **options,
) -> Array:
    """Local response normalization (LRN).

        y_c = x_c / (k + alpha / n * sum(x_j^2))^beta,   j from c - n // 2 to c + (n - 1) // 2

    of n = `size` channels. Windows are cut at the ends, and still divided by n.

    Args:
      x: array of any shape of rank 1 or more. Integers are promoted to float32.
      mask: True where an element counts. Broadcasts to x, or covers its leading axes. What is masked out counts as 0,
        and gives 0.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: a bad size, alpha, beta, k, axis or backend; a mask that fits x nowhere.
      TypeError: a complex x; a dtype that cannot hold the result.

    Used by the weights of AlexNet (size 5, k 2) and GoogLeNet.

    Source: Krizhevsky, Sutskever, Hinton, "ImageNet Classification with Deep Convolutional Neural Networks" (2012),
    section 3.3, which is not on arXiv.

    >>> import jaxnorm as jn, numpy as np
    >>> jn.local_response_norm(np.array([[1., 2., 0.]]), size=2, alpha=2., beta=1.).round(3).tolist()
    [[0.5, 0.3330000042915344, 0.0]]
    """
    norm = "local_response_norm"
    size, alpha, beta, k = _check(norm, size, alpha, beta, k)
    (divide,) = canonicalize_flags(norm, divide=divide)
    x = as_float_array(norm, x, rank=1, layout="the channel axis among its own")
    (channel,) = canonicalize_axes(norm, x.ndim, axis, most=1)
    times = alpha / size if divide else alpha

    def window(a: Array) -> Array:
        whole = [size if i == channel else 1 for i in range(a.ndim)]
        beside = [(size // 2, (size - 1) // 2) if i == channel else (0, 0) for i in range(a.ndim)]
        return lax.reduce_window(a, np.zeros((), a.dtype), lax.add, whole, [1] * a.ndim, beside)

    def f(x: Array, keep: Array | None, affine) -> Array:
        # A window with a value whose square could overflow is summed in a unit of its own.
        large, unit = jnp.abs(lax.stop_gradient(x)) > 2.0**60, 2.0**-60
        beyond = window(large.astype(x.dtype)) > 0
        near = k + times * window(jnp.square(jnp.where(large, 0.0, x)))
        far = k * unit**2 + times * window(jnp.square(x * unit))
        far = jnp.where(beyond & (far > 0), far, 1.0)
        return x * jnp.where(beyond, unit ** (2.0 * beta) * far**-beta, near**-beta)

    options = dict(options, scale_offset=0.0)
    return normalize_written(norm, f, x, (), None, None, (channel,), mask=mask, **options)
