"""Spatially adaptive normalization: a scale and a shift of every pixel, from a map."""

from __future__ import annotations

from typing import Any

import jax
from jax.typing import ArrayLike

from .._core.arrays import as_float_array
from .._core.explain import explained
from .._core.types import Affine
from .._ops.activation import Activation
from .._ops.modulate import modulated
from .declare import S, as_params, function_of, spec
from .modulated import ModulatedParams, ModulatedSpec, NestedSpec, inner_of

Array = jax.Array


@spec
class SPADE(ModulatedSpec, NestedSpec):
    """The hyperparameters of `spade`. The modulation, or the map that a dense layer makes it of, comes after x.

    Args:
      condition_features: K, the number of channels of the map: a dense layer of each pixel, which is a 1x1
        convolution, makes scale and shift of it, as in diffusers' `SpatialNorm`. None: `apply` takes these two.
      condition_activation: of the map, before the dense layer.

    >>> import jaxnorm as jn, numpy as np
    >>> norm = jn.SPADE(inner=jn.InstanceNorm(epsilon=0.), condition_features=3)
    >>> params, state = norm.init(1)                   # from zeros: at first it is the norm alone
    >>> norm.apply(params, state, np.array([[[1.], [3.]]]), np.ones((1, 2, 3)))[0].tolist()
    [[[-1.0], [1.0]]]
    """

    condition_activation: Activation | None = None

    @explained("apply")
    def apply(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, params: Any, state: S, x: ArrayLike, condition: ArrayLike, *, train: Any = None, mask: Any = None
    ) -> tuple[Array, S]:
        """The normalized and modulated x, and the state of `inner` after it."""
        given = as_params("SPADE", params, ModulatedParams)
        made, own = self.modulation_of(condition, given), Affine(given.scale, given.bias)
        return spade(x, made, own, state, train=train, mask=mask, **self.options())


@function_of(SPADE)
def spade(
    x: ArrayLike,
    modulation: Any,
    params: Any = None,
    state: Any = (),
    *,
    parts,
    modulation_offset,
    inner,
    scale_offset,
    activation,
    dtype,
    implementation,
    train: Any = None,
    mask: ArrayLike | None = None,
) -> tuple[Array, Any]:
    """Any norm with a scale and a shift that vary over space (SPADE, SpatialNorm).

        y = (norm(x) (scale + scale_offset) + bias) (m.scale + modulation_offset) + m.shift

    Scale and shift have x's shape, and then XLA normalizes, since kernels have parameters of channels. A scale and a
    shift for each example do as well: batch norm with those of a dense layer is BigGAN's.

    Args:
      x: array of shape (N, ..., C), as the norm takes it.
      modulation: m, a dict of "scale" and "shift" of x's shape, or of (N, C) for each example; or an array of the
        `parts`, one after the other on its last axis.
      params: `Affine(scale, bias)` of the norm's own, each (C,) or None; a dict of the same names; None for neither.
      state: of the norm: `RunningStats` for batch norm, () for norms without one.
      inner: the norm that is modulated: a spec. SPADE has batch norm over all devices, SpatialNorm group norm.
      modulation_offset: added to m.scale: 1.0 as in SPADE, 0.0 as in SpatialNorm.
      train: as the norm takes it.

    Returns:
      An array of x's shape, and the norm's new state.

    Raises:
      ValueError: a modulation that fits x nowhere, or that has a gate; and what the norm raises.

    Source: Park, Liu, Wang, Zhu, "Semantic Image Synthesis with Spatially-Adaptive Normalization" (2019),
    arXiv:1903.07291; SpatialNorm: Zheng et al., "MoVQ" (2022), arXiv:2209.09002. Used by GauGAN, and by the decoders of
    Kandinsky 2 and CogVideoX.

    >>> import jaxnorm as jn, numpy as np
    >>> x, m = np.array([[[1.], [3.]]]), {"scale": np.array([[[0.], [1.]]]), "shift": np.array([[[5.], [0.]]])}
    >>> y, state = jn.spade(x, m)
    >>> y.round(3).tolist()
    [[[4.0], [2.0]]]
    """
    given = as_params("spade", params)
    options = dict(activation=activation, dtype=dtype, implementation=implementation)
    plain = inner_of("spade", inner)
    x = as_float_array("spade", x, rank=1, layout="(batch, ..., channels)")
    channel = plain.feature_axes()[-1] % x.ndim
    affine, gate = modulated(
        "spade", modulation, parts, x.shape, channel, given.scale, given.bias, scale_offset, modulation_offset
    )
    if gate is not None:
        raise ValueError('spade: a gate has no place here. Write parts="scale shift".')
    own = Affine(affine["scale"], affine["bias"])
    norm = inner_of("spade", inner, scale_offset=affine["scale_offset"], **options)
    return norm.apply(own, state, x, train=train, mask=mask)
