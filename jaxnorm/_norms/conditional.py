"""Conditional normalization: a scale and a bias for each class, speaker or style."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._core.arrays import as_float_array
from .._core.explain import explained
from .._core.messages import shown, to_python
from .._core.types import Affine, Features, Params
from .._ops.modulate import align_modulation, rows_of_table
from .declare import S, as_params, function_of, spec
from .modulated import NestedSpec, inner_of

Array = jax.Array


@spec
class ConditionalNorm(NestedSpec):
    """The hyperparameters of `conditional_norm`. The labels are an argument of `apply`, after x.

    Args:
      num_classes: K, the number of rows in the tables of scales and biases. `init` needs it.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.ConditionalNorm(num_classes=10)
    >>> params, state = norm.init(1)
    >>> y, state = norm.apply(params, state, np.array([[[1.], [3.]]]), np.array([7]))
    >>> params.scale.shape, y.round(3).tolist()
    ((10, 1), [[[-1.0], [1.0]]])
    """

    use_bias: bool = True
    num_classes: int | None = None

    whole: ClassVar[tuple[str, ...]] = ("scale", "bias")

    if TYPE_CHECKING:

        def init(self, features: Features) -> tuple[Affine, Any]: ...

    def init_param(self, name: str, shape: tuple[int, ...]) -> Array:
        number = to_python(self.num_classes)
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ValueError(
                f"ConditionalNorm.init: num_classes must be an int >= 1, got {shown(number)}. "
                "Write ConditionalNorm(num_classes=10)."
            )
        return super().init_param(name, (number, *shape))

    @explained("apply")
    def apply(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, params: Params, state: S, x: ArrayLike, labels: ArrayLike, *, train: Any = None, mask: Any = None
    ) -> tuple[Array, S]:
        """The normalized x, and the state of `inner` after it."""
        return conditional_norm(x, labels, params, state, train=train, mask=mask, **self.options())


@function_of(ConditionalNorm)
def conditional_norm(
    x: ArrayLike,
    labels: ArrayLike,
    params: Params,
    state: Any = (),
    *,
    inner,
    num_classes,
    scale_offset,
    activation,
    dtype,
    implementation,
    train: Any = None,
    mask: ArrayLike | None = None,
) -> tuple[Array, Any]:
    """Any norm with a scale and a bias for each class (conditional instance norm, conditional batch norm).

        y = norm(x) (scale[label] + scale_offset) + bias[label],   of each example its own label

    Args:
      x: array of shape (N, ..., C), as the norm takes it.
      labels: integers of shape (N,), below K; or weights of shape (N, K), which mix the rows of the tables. A label
        that no row has makes its example NaN, and is refused where its value is known.
      params: `Affine(scale, bias)`, or a dict of the same names, each of shape (K, C) or None.
      state: of the norm: `RunningStats` for batch norm, () for norms without one.
      inner: the norm that is modulated: a spec.
      num_classes: K. The function reads it off the tables.
      scale_offset: added to the scale in float32; 1.0 makes a zero-centred gamma.
      train: as the norm takes it.

    Returns:
      An array of x's shape, and the norm's new state.

    Raises:
      ValueError: labels that do not fit x or the tables; and what the norm raises.
      TypeError: params that are not those; labels that are neither integers nor weights.

    Used by style transfer and class-conditional GANs.

    Source: Dumoulin, Shlens, Kudlur, "A Learned Representation for Artistic Style" (2016), arXiv:1610.07629; with batch
    norm de Vries et al. (2017), arXiv:1707.00683, and Brock, Donahue, Simonyan, BigGAN (2018), arXiv:1809.11096.

    >>> import jaxnorm as jn, numpy as np
    >>> params = jn.Affine(np.array([[1.], [2.]]), np.array([[0.], [5.]]))
    >>> x, norm = np.array([[[1.], [3.]]]), jn.InstanceNorm(epsilon=0.)
    >>> y, state = jn.conditional_norm(x, np.array([1]), params, inner=norm)
    >>> y.tolist(), state
    ([[[3.0], [7.0]]], ())
    """
    name = "conditional_norm"
    given = as_params(name, params)
    norm = inner_of(
        name, inner, scale_offset=scale_offset, activation=activation, dtype=dtype, implementation=implementation
    )
    x = as_float_array(name, x, rank=1, layout="(batch, ..., channels)")
    labels = jnp.asarray(labels)
    channel = norm.feature_axes()[-1] % x.ndim
    picked = (
        None if table is None else rows_of_table(name, what, table, labels, x)
        for what, table in given._asdict().items()
    )
    aligned = (
        None if p is None else align_modulation(name, what, p, x.shape, channel)
        for what, p in zip(given._fields, picked, strict=True)
    )  # fmt: skip
    return norm.apply(Affine(*aligned), state, x, train=train, mask=mask)
