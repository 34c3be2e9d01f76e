"""Flax linen layers: those of `flax.linen`, by jaxnorm. Changing the import is enough, and checkpoints load either way.

Every layer takes the arguments of Flax's layer of the same name, in the same order, and has its variables: parameters
`scale` and `bias`, and for batch norm the collection `batch_stats` with `mean` and `var`, of the same names, shapes
and dtypes. The output's dtype is Flax's: `dtype`, else what x and the parameters promote to. `use_fast_variance` and
`force_float32_reductions` are accepted; statistics are accurate and in float32 or wider whatever they say (the latter
still says what dtype `batch_stats` have). While initializing, no axis name is touched and no statistic updated.

What jaxnorm adds is keyword only, and described in each layer's own docstring. A scale that keeps Flax's default
initializer starts at 1 - `scale_offset`, so that the effective scale starts at 1. `scale` and `bias` may be given at
the call, per sample too, as (N, 1, 1, C); such a layer has `use_scale=False`, `use_bias=False`. `param_names` gives
parameters other names, and `cast_params` casts them to the output's dtype before they are used.

Every spec has a layer of its name here; `Norm` makes a layer of any spec. All other names are Flax's, so one import
serves a whole model: `from jaxnorm import linen as nn`.
"""

from __future__ import annotations

from typing import Any

from ._core.install import missing_flax

try:
    from flax import linen as flax_linen
except ImportError as error:
    raise missing_flax("jaxnorm.linen", error) from error

from ._layers.drop_in import BATCH_NORM, GROUP_NORM, INSTANCE_NORM, LAYER_NORM, RMS_NORM
from ._layers.linen import Layer, Norm, layer_of
from ._layers.weights_linen import Reparametrized, SpectralNorm, WeightNorm
from ._norms import SPECS


class LayerNorm(Layer, flax_linen.LayerNorm, of=LAYER_NORM):
    """
    >>> import jax, numpy as np
    >>> from jaxnorm import linen as jnn
    >>> x = np.array([[1., 3.], [5., 5.]], "f")
    >>> y, variables = jnn.LayerNorm().init_with_output(jax.random.key(0), x)
    >>> y.round(3).tolist(), sorted(variables["params"])
    ([[-1.0, 1.0], [0.0, 0.0]], ['bias', 'scale'])
    """


class RMSNorm(Layer, flax_linen.RMSNorm, of=RMS_NORM):
    """
    >>> import jax, numpy as np
    >>> from jaxnorm import linen as jnn
    >>> y, variables = jnn.RMSNorm(epsilon=0.).init_with_output(jax.random.key(0), np.array([[3., 3., 0., 0.]], "f"))
    >>> (y**2).round(3).tolist(), sorted(variables["params"])
    ([[2.0, 2.0, 0.0, 0.0]], ['scale'])
    """


class GroupNorm(Layer, flax_linen.GroupNorm, of=GROUP_NORM):
    """
    >>> import jax, numpy as np
    >>> from jaxnorm import linen as jnn
    >>> norm = jnn.GroupNorm(num_groups=2)
    >>> norm.init_with_output(jax.random.key(0), np.array([[1., 3., 10., 30.]], "f"))[0].round(3).tolist()
    [[-1.0, 1.0, -1.0, 1.0]]
    """


class InstanceNorm(Layer, flax_linen.InstanceNorm, of=INSTANCE_NORM):
    """
    >>> import jax, numpy as np
    >>> from jaxnorm import linen as jnn
    >>> x = np.array([[[1., 10.], [3., 30.]]], "f")
    >>> jnn.InstanceNorm().init_with_output(jax.random.key(0), x)[0].round(3).tolist()
    [[[-1.0, -1.0], [1.0, 1.0]]]
    """


class BatchNorm(Layer, flax_linen.BatchNorm, of=BATCH_NORM):
    """
    >>> import jax, numpy as np
    >>> from jaxnorm import linen as jnn
    >>> norm, x = jnn.BatchNorm(momentum=0.9), np.array([[1.], [3.]], "f")
    >>> variables = norm.init(jax.random.key(0), x, use_running_average=False)
    >>> y, new = norm.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    >>> y.round(3).tolist(), new["batch_stats"]["mean"].round(3).tolist()
    ([[-1.0], [1.0]], [0.20000000298023224])
    """


# Every other spec as a layer of its own name. `linen.pyi`, which type checkers read, has them written out.
for _spec in SPECS.values():
    if _spec.__name__ not in globals():
        globals()[_spec.__name__] = layer_of(_spec, __name__)

_WRAPPERS = {layer.__name__: layer for layer in (Reparametrized, SpectralNorm, WeightNorm)}  # of other layers
__all__ = ["Norm", *SPECS]  # pyright: ignore


def __getattr__(name: str) -> Any:
    """Every name that jaxnorm does not have is Flax's: one import serves a whole model."""
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(flax_linen, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(flax_linen)})
