"""Reparametrized weights: pure functions of parameters and a state, which never overwrite what is stored.

    params, state = spec.init(w, key)                            # from a weight
    w_eff, state = spec.apply(params, state, train=True)         # the effective weight, inside of the loss
    w = spec.bake(params, state)                                 # for inference

`Tree` does the same for whole trees of parameters, by path. `jaxnorm.linen` and `jaxnorm.nnx` have wrappers of layers.
"""

from ._weights.base import Reparametrization as Reparametrization
from ._weights.demodulate import Demodulate as Demodulate
from ._weights.demodulate import demodulate as demodulate
from ._weights.demodulate import demodulation_scales as demodulation_scales
from ._weights.dora import DoRA as DoRA
from ._weights.dora import DoRAParams as DoRAParams
from ._weights.forced_norm import ForcedNorm as ForcedNorm
from ._weights.forced_norm import forced_norm as forced_norm
from ._weights.forced_norm import mp_silu as mp_silu
from ._weights.forced_norm import mp_sum as mp_sum
from ._weights.gain import variance_gain as variance_gain
from ._weights.sigma_reparam import SigmaReparam as SigmaReparam
from ._weights.sigma_reparam import SigmaReparamParams as SigmaReparamParams
from ._weights.spectral_norm import SpectralNorm as SpectralNorm
from ._weights.spectral_norm import SpectralNormState as SpectralNormState
from ._weights.spectral_norm import spectral_norm as spectral_norm
from ._weights.standardize import ScaledStandardize as ScaledStandardize
from ._weights.standardize import ScaledStandardizeParams as ScaledStandardizeParams
from ._weights.standardize import Standardize as Standardize
from ._weights.standardize import scaled_standardize as scaled_standardize
from ._weights.standardize import standardize as standardize
from ._weights.tree import Tree as Tree
from ._weights.unit_norm import UnitNorm as UnitNorm
from ._weights.unit_norm import unit_norm as unit_norm
from ._weights.weight_norm import WeightNorm as WeightNorm
from ._weights.weight_norm import WeightNormParams as WeightNormParams
from ._weights.weight_norm import weight_norm as weight_norm
