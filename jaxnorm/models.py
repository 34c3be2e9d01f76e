"""Tools over whole models: statistics of the training set, folding, surgery, optimizers, diagnostics.

They take linen models with their variables, nnx modules, and trees of specs, parameters and states, by path.
"""

from ._models.adapt import adapt_state as adapt_state
from ._models.adapt import fedbn_mask as fedbn_mask
from ._models.adapt import tent_mask as tent_mask
from ._models.outcome import Outcome as Outcome
from ._models.outcome import Row as Row
from ._models.recompute import recompute_stats as recompute_stats
