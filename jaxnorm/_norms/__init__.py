"""The list of norms: one line each. A norm is one file with its spec and its function; `base` says what a norm is.

`jaxnorm` exports these names; `jaxnorm.linen` and `jaxnorm.nnx` have a layer for each spec. A norm imports `_core` and
`_ops`, and no other norm.
"""

from .act_norm import ActNorm, act_norm
from .ada_group import AdaGroupNorm, ada_group_norm
from .ada_instance import AdaIN, ada_instance_norm
from .ada_layer import AdaLayerNorm, AdaLayerNormZero, ada_layer_norm, ada_layer_norm_zero
from .ada_layer_single import AdaLayerNormSingle, ada_layer_norm_single
from .ada_rms import AdaRMSNorm, ada_rms_norm
from .batch import BatchNorm, batch_norm
from .batch_instance import BatchInstanceNorm, batch_instance_norm
from .batch_renorm import BatchRenorm, batch_renorm
from .conditional import ConditionalNorm, conditional_norm
from .crms import CRMSNorm, crms_norm
from .cumulative_group import CumulativeGroupNorm, cumulative_group_norm
from .deep import DeepNorm, deep_norm, deep_norm_alpha, deep_norm_beta
from .diff_group import DiffGroupNorm, diff_group_norm
from .dish_ts import DishTS, dish_ts
from .domain_batch import DomainBatchNorm, domain_batch_norm
from .dynamic_erf import DynamicErf, dynamic_erf
from .dynamic_tanh import DynamicTanh, dynamic_tanh
from .evo_b import EvoNormB, evo_norm_b
from .evo_s import EvoNormS, evo_norm_s
from .film import FiLM, film
from .filter_response import FilterResponseNorm, filter_response_norm
from .gated import GatedRMSNorm, gated_rms_norm
from .gated_norm import GatedNorm, gated_norm
from .global_response import GlobalResponseNorm, global_response_norm
from .graph import GraphNorm, graph_norm
from .graph_size import GraphSizeNorm, graph_size_norm
from .group import GroupNorm, group_norm
from .group_rms import GroupRMSNorm, group_rms_norm
from .hypersphere import HypersphereUpdate, hypersphere_update
from .instance import InstanceNorm, instance_norm
from .instance_batch import InstanceBatchNorm, instance_batch_norm
from .iter_norm import IterNorm, iter_norm
from .l2 import L2Norm, l2_norm
from .layer import LayerNorm, layer_norm
from .layer_scale import LayerScale, layer_scale
from .local_response import LocalResponseNorm, local_response_norm
from .mean_subtraction import MeanSubtractionNorm, mean_subtraction_norm
from .message import MessageNorm, message_norm
from .norm_add import LayerNormAdd, RMSNormAdd, layer_norm_add, rms_norm_add
from .pair import PairNorm, pair_norm
from .partial_rms import PartialRMSNorm, partial_rms_norm
from .pixel import PixelNorm, pixel_norm
from .poly import PolyNorm, poly_norm
from .positional import PositionalNorm, positional_norm
from .query_key import QKNorm, qk_norm
from .rep_batch import RepBatchNorm, rep_batch_norm
from .residual import AddLayerNorm, AddRMSNorm, add_layer_norm, add_rms_norm
from .rev_in import RevIN, rev_in
from .rms import RMSNorm, rms_norm
from .running_rev_in import RunningRevIN, running_rev_in
from .scale import ScaleNorm, scale_norm
from .seed import SeeDNorm, seednorm
from .segment import SegmentNorm, segment_norm
from .spade import SPADE, spade
from .switchable import SwitchableNorm, switchable_norm

SPECS = {name: value for name, value in globals().items() if isinstance(value, type)}
__all__ = sorted(name for name in globals() if name[0] != "_" and hasattr(globals()[name], "__module__"))  # pyright: ignore
