"""Tools over whole models: statistics of the training set, folding, surgery, optimizers, diagnostics.

They take linen models with their variables, nnx modules, and trees of specs, parameters and states, by path.
"""

from ._models.collect import Seen as Seen
from ._models.collect import collect as collect
from ._models.layer import Finding as Finding
from ._models.report import Report as Report
from ._models.report import report as report
from ._models.tabulate import tabulate as tabulate
