"""jaxnorm: normalization for JAX, exact on any device layout. Pure functions, specs, and Flax layers over them."""

from ._backends.select import Backend as Backend
from ._backends.select import backends as backends
from ._core.types import Affine as Affine
from ._core.types import Moments as Moments
from ._core.types import RunningStats as RunningStats
from ._norms.base import Norm as Norm
from ._norms.batch import BatchNorm as BatchNorm
from ._norms.batch import batch_norm as batch_norm
from ._norms.gated import GatedRMSNorm as GatedRMSNorm
from ._norms.gated import gated_rms_norm as gated_rms_norm
from ._norms.group import GroupNorm as GroupNorm
from ._norms.group import group_norm as group_norm
from ._norms.instance import InstanceNorm as InstanceNorm
from ._norms.instance import instance_norm as instance_norm
from ._norms.layer import LayerNorm as LayerNorm
from ._norms.layer import layer_norm as layer_norm
from ._norms.residual import add_layer_norm as add_layer_norm
from ._norms.residual import add_rms_norm as add_rms_norm
from ._norms.rms import RMSNorm as RMSNorm
from ._norms.rms import rms_norm as rms_norm
from ._ops.moments import merge as merge
from ._ops.moments import merge_across as merge_across
from ._ops.moments import moments as moments
from ._ops.normalize import as_affine as as_affine
from ._ops.normalize import normalize as normalize
from ._ops.running import sync_state as sync_state
from ._ops.running import update_state as update_state

__version__ = "0.1.0"

__all__ = [
    "Affine",
    "Backend",
    "BatchNorm",
    "GatedRMSNorm",
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
