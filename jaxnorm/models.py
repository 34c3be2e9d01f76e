"""Tools over whole models: statistics of the training set, folding, surgery, optimizers, diagnostics.

They take linen models with their variables, nnx modules, and trees of specs, parameters and states, by path.
"""

from ._models.fold import Folded as Folded
from ._models.fold import fold as fold
from ._models.outcome import Outcome as Outcome
from ._models.outcome import Row as Row
