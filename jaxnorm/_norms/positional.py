"""Positional norm: a layer norm over the channels of each pixel, which returns its statistics as well."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.arrays import as_float_array, canonicalize_axes
from .._core.checks import canonicalize_epsilon
from .._core.explain import explained
from .._core.mesh import active_axis_names
from .._core.types import Features
from .._ops.moments import merge_across, moments
from .._ops.rows import normalize_rows
from .base import NoParams, RowSpec
from .declare import S, function_of, spec

Array = jax.Array


@spec
class PositionalNorm(RowSpec):
    """The hyperparameters of `positional_norm`. It has no parameters.

    Args:
      use_scale: without effect here: the decoder's statistics are its scale and bias.
      scale_offset: without effect here.
      axis: the channel axis.
      epsilon: added to the variance, in units of x squared; >= 0.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.PositionalNorm(epsilon=0.)
    >>> params, state = norm.init(2)
    >>> (y, mean, std), state = norm.apply(params, state, np.array([[1., 5.]]))
    >>> y.tolist(), mean.tolist(), std.tolist()
    ([[-1.0, 1.0]], [[3.0]], [[2.0]])
    """

    Params: ClassVar[Any] = NoParams

    axis: int = -1
    epsilon: float = 1e-5

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[NoParams, tuple[()]]: ...

    @explained("apply")
    def apply(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, params: Any, state: S, x: ArrayLike, *, train: Any = None, mask: Any = None
    ) -> tuple[tuple[Array, Array, Array], S]:
        """y, mean and std, and the state `()` as it came."""
        return self._applied(params, state, x, mask=mask), state


@function_of(PositionalNorm)
def positional_norm(
    x: ArrayLike,
    *,
    axis,
    epsilon,
    axis_name,
    axis_index_groups,
    implementation,
    mask: ArrayLike | None = None,
    **options,
) -> tuple[Array, Array, Array]:
    """Positional norm (PONO): layer norm over the channels of each pixel, and the statistics that it took out.

        y = (x - mean) / std,   std = sqrt(var + epsilon),   mean and var over `axis`

    A decoder puts them back, z * std + mean, which the paper calls a moment shortcut. They have gradients.

    Args:
      x: array of any shape of rank 1 or more. Integers are promoted to float32.

    Returns:
      y, of x's shape; mean and std, with size 1 along `axis`, in float32 or wider.

    Raises:
      ValueError: a bad axis, epsilon, or backend; a mask that fits x nowhere.
      TypeError: a dtype that cannot hold the result.
      NameError: axis_name is not bound here.

    Used for image translation and generation. The variance is the biased one, as everywhere here; the paper's code has
    the unbiased one, which is C / (C - 1) times as large.

    Used by image-to-image translation.

    Source: Li, Wu, Weinberger, Belongie, "Positional Normalization" (2019), arXiv:1907.04312.

    >>> import jaxnorm as jn, numpy as np
    >>> y, mean, std = jn.positional_norm(np.array([[1., 5.]]), epsilon=0.)
    >>> (y * std + mean).tolist()
    [[1.0, 5.0]]
    """
    norm = "positional_norm"
    x = as_float_array(norm, x, rank=1, layout="the channel axis among its own")
    axes = canonicalize_axes(norm, x.ndim, axis, most=1)
    y = normalize_rows(
        norm, x, None, None, axes, axes, epsilon=epsilon, mask=mask, axis_name=axis_name,
        axis_index_groups=axis_index_groups, implementation=implementation, **options,
    )  # fmt: skip
    seen = moments(x, axes, mask=mask, implementation="lax" if implementation == "lax" else None)
    names = active_axis_names(axis_name, whole=axis_index_groups is None)
    seen = merge_across(seen, names, axis_index_groups) if names else seen
    std = jnp.sqrt(seen.var + canonicalize_epsilon(norm, epsilon))
    return y, jnp.expand_dims(seen.mean, axes), jnp.expand_dims(std, axes)
