"""Tools over whole models: statistics of the training set, folding, surgery, optimizers, diagnostics.

They take linen models with their variables, nnx modules, and trees of specs, parameters and states, by path.
"""

from ._core.passing import passing as passing
from ._models.adapt import adapt_state as adapt_state
from ._models.adapt import fedbn_mask as fedbn_mask
from ._models.adapt import tent_mask as tent_mask
from ._models.collect import Seen as Seen
from ._models.collect import collect as collect
from ._models.fold import Folded as Folded
from ._models.fold import fold as fold
from ._models.layer import Finding as Finding
from ._models.optimizers import decay_mask as decay_mask
from ._models.optimizers import ema_init as ema_init
from ._models.optimizers import ema_update as ema_update
from ._models.optimizers import label_params as label_params
from ._models.optimizers import norm_mask as norm_mask
from ._models.outcome import Outcome as Outcome
from ._models.outcome import Row as Row
from ._models.recompute import recompute_stats as recompute_stats
from ._models.report import Report as Report
from ._models.report import report as report
from ._models.surgery import Swap as Swap
from ._models.surgery import Swapped as Swapped
from ._models.surgery import freeze as freeze
from ._models.surgery import swap as swap
from ._models.surgery import unfreeze as unfreeze
from ._models.tabulate import tabulate as tabulate
