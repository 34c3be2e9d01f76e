"""jaxnorm: normalization for JAX, exact on any device layout. Pure functions, specs, and Flax layers over them."""

from ._batch import BatchNorm as BatchNorm
from ._batch import batch_norm as batch_norm
from ._gated import gated_rms_norm as gated_rms_norm
from ._group import GroupNorm as GroupNorm
from ._group import group_norm as group_norm
from ._instance import InstanceNorm as InstanceNorm
from ._instance import instance_norm as instance_norm
from ._kernels import Backend as Backend
from ._kernels import backends as backends
from ._layer import LayerNorm as LayerNorm
from ._layer import layer_norm as layer_norm
from ._moments import Moments as Moments
from ._moments import merge as merge
from ._moments import merge_across as merge_across
from ._moments import moments as moments
from ._normalize import Affine as Affine
from ._normalize import as_affine as as_affine
from ._normalize import normalize as normalize
from ._residual import add_layer_norm as add_layer_norm
from ._residual import add_rms_norm as add_rms_norm
from ._rms import RMSNorm as RMSNorm
from ._rms import rms_norm as rms_norm
from ._spec import Norm as Norm
from ._spec import RunningStats as RunningStats
from ._state import sync_state as sync_state
from ._state import update_state as update_state

__version__ = "0.1.0"

__all__ = [
    "Affine",
    "Backend",
    "BatchNorm",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "Moments",
    "Norm",
    "RMSNorm",
    "RunningStats",
    "add_layer_norm",
    "add_rms_norm",
    "as_affine",
    "backends",
    "batch_norm",
    "gated_rms_norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "merge",
    "merge_across",
    "moments",
    "normalize",
    "rms_norm",
    "sync_state",
    "update_state",
]
