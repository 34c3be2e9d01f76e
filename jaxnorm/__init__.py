"""jaxnorm: normalization for JAX, exact on any device layout. Pure functions, specs, and Flax layers over them.

The list of norms is in `_norms/__init__.py`: one line for each.
"""

from ._backends.select import Backend as Backend
from ._backends.select import backends as backends
from ._core.formats import Fp8 as Fp8
from ._core.formats import Int8 as Int8
from ._core.formats import MxFp8 as MxFp8
from ._core.formats import NvFp4 as NvFp4
from ._core.quantized import Quantized as Quantized
from ._core.types import Affine as Affine
from ._core.types import Moments as Moments
from ._core.types import RunningStats as RunningStats
from ._core.types import WindowStats as WindowStats
from ._models.report import report as report
from ._models.tabulate import tabulate as tabulate
from ._norms import *
from ._norms.base import Norm as Norm
from ._norms.make import as_dict as as_dict
from ._norms.make import catalogue as catalogue
from ._norms.make import make as make
from ._norms.presets import presets as presets
from ._ops.modulate import modulation as modulation
from ._ops.moments import merge as merge
from ._ops.moments import merge_across as merge_across
from ._ops.moments import moments as moments
from ._ops.normalize import as_affine as as_affine
from ._ops.normalize import normalize as normalize
from ._ops.policy import EMA as EMA
from ._ops.policy import Cumulative as Cumulative
from ._ops.policy import Devices as Devices
from ._ops.policy import Ramp as Ramp
from ._ops.running import sync_state as sync_state
from ._ops.running import update_state as update_state

__version__ = "0.1.0"
__all__ = sorted(name for name, value in globals().items() if name[0] != "_" and hasattr(value, "__module__"))  # pyright: ignore
