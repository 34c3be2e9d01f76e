"""The list of norms. One norm, one file with its function and its spec, and one line here; `base` says what a norm is.

`jaxnorm` exports these names, and `jaxnorm.linen` and `jaxnorm.nnx` have a layer for each spec. Norms import `_core` and
`_ops`, and no other norm.
"""

from .batch import BatchNorm, batch_norm
from .dynamic_tanh import DynamicTanh, dynamic_tanh
from .gated import GatedRMSNorm, gated_rms_norm
from .group import GroupNorm, group_norm
from .instance import InstanceNorm, instance_norm
from .layer import LayerNorm, layer_norm
from .residual import add_layer_norm, add_rms_norm
from .rms import RMSNorm, rms_norm

SPECS = {name: value for name, value in globals().items() if isinstance(value, type)}
__all__ = sorted(name for name, value in globals().items() if hasattr(value, "__module__"))
