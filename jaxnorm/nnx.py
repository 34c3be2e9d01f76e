"""Flax nnx layers: those of `flax.nnx`, by jaxnorm. Changing the import is enough, and checkpoints load either way.

Every layer takes the arguments of Flax's layer of the same name, in the same order, and has its variables: `nnx.Param`s
`scale` and `bias` (with `scale_metadata` and `bias_metadata`), and for batch norm `nnx.BatchStat`s `mean` and `var`, so
`nnx.update` works between the two. `num_features` may be a tuple where the feature axes are several.
`use_fast_variance` is accepted; statistics are accurate whatever it says. `promote_dtype` is asked for dtypes only: the
output's is what Flax's would be, while the statistics are always those of x as it came, in float32 or wider.

What jaxnorm adds is keyword only, and described in each layer's own docstring. A scale that keeps Flax's default
initializer starts at 1 - `scale_offset`, so that the effective scale starts at 1. `scale` and `bias` may be given at
the call, per sample too, as (N, 1, 1, C); such a layer has `use_scale=False`, `use_bias=False`. `param_names` gives
parameters other names, and `cast_params` casts them to the output's dtype before they are used.

Every spec has a layer of its name here; `Norm` makes a layer of any spec. All other names are Flax's, so one import
serves a whole model: `from jaxnorm import nnx`.
"""

from __future__ import annotations

from typing import Any

from ._core.install import missing_flax

try:
    from flax import nnx as flax_nnx
except ImportError as error:
    raise missing_flax("jaxnorm.nnx", error) from error

from ._layers.drop_in import BATCH_NORM, GROUP_NORM, INSTANCE_NORM, LAYER_NORM, RMS_NORM
from ._layers.nnx import Layer, Norm, layer_of
from ._layers.weights_nnx import Reparametrized, SpectralNorm, WeightNorm
from ._norms import SPECS

_INSTANCE_NORM: Any = getattr(flax_nnx, "InstanceNorm", flax_nnx.Module)  # Flax has it since 0.12


class LayerNorm(Layer, flax_nnx.LayerNorm, of=LAYER_NORM):
    """
    >>> import numpy as np
    >>> from flax import nnx
    >>> from jaxnorm import nnx as jnnx
    >>> jnnx.LayerNorm(2, rngs=nnx.Rngs(0))(np.array([[1., 3.], [5., 5.]], "f")).round(3).tolist()
    [[-1.0, 1.0], [0.0, 0.0]]
    """


class RMSNorm(Layer, flax_nnx.RMSNorm, of=RMS_NORM):
    """
    >>> import numpy as np
    >>> from flax import nnx
    >>> from jaxnorm import nnx as jnnx
    >>> y = jnnx.RMSNorm(4, epsilon=0., rngs=nnx.Rngs(0))(np.array([[3., 3., 0., 0.]], "f"))
    >>> (y**2).round(3).tolist()
    [[2.0, 2.0, 0.0, 0.0]]
    """


class GroupNorm(Layer, flax_nnx.GroupNorm, of=GROUP_NORM):
    """
    >>> import numpy as np
    >>> from flax import nnx
    >>> from jaxnorm import nnx as jnnx
    >>> jnnx.GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0))(np.array([[1., 3., 10., 30.]], "f")).round(3).tolist()
    [[-1.0, 1.0, -1.0, 1.0]]
    """


class InstanceNorm(Layer, _INSTANCE_NORM, of=INSTANCE_NORM):
    """
    >>> import numpy as np
    >>> from flax import nnx
    >>> from jaxnorm import nnx as jnnx
    >>> jnnx.InstanceNorm(2, rngs=nnx.Rngs(0))(np.array([[[1., 10.], [3., 30.]]], "f")).round(3).tolist()
    [[[-1.0, -1.0], [1.0, 1.0]]]
    """


class BatchNorm(Layer, flax_nnx.BatchNorm, of=BATCH_NORM):
    """
    >>> import numpy as np
    >>> from flax import nnx
    >>> from jaxnorm import nnx as jnnx
    >>> norm = jnnx.BatchNorm(1, momentum=0.9, rngs=nnx.Rngs(0))
    >>> norm(np.array([[1.], [3.]], "f")).round(3).tolist(), norm.mean[...].round(3).tolist()
    ([[-1.0], [1.0]], [0.20000000298023224])
    """


# Every other spec as a layer of its own name. `nnx.pyi`, which type checkers read, has them written out.
for _spec in SPECS.values():
    if _spec.__name__ not in globals():
        globals()[_spec.__name__] = layer_of(_spec, __name__)

_WRAPPERS = {layer.__name__: layer for layer in (Reparametrized, SpectralNorm, WeightNorm)}  # of other layers
__all__ = ["Norm", *SPECS]  # pyright: ignore


def __getattr__(name: str) -> Any:
    """Every name that jaxnorm does not have is Flax's: one import serves a whole model."""
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(flax_nnx, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(flax_nnx)})
