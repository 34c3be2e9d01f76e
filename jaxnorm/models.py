"""Tools over whole models: statistics of the training set, folding, surgery, optimizers, diagnostics.

They take linen models with their variables, nnx modules, and trees of specs, parameters and states, by path.
"""

from ._core.passing import passing as passing
from ._models.outcome import Outcome as Outcome
from ._models.outcome import Row as Row
from ._models.surgery import Swap as Swap
from ._models.surgery import Swapped as Swapped
from ._models.surgery import freeze as freeze
from ._models.surgery import swap as swap
from ._models.surgery import unfreeze as unfreeze
