"""Compile for GPUs and TPUs on a machine that has none, and count what the programs do.

`targets` compiles, `hlo` reads programs, `programs` counts the passes of a function; `cases` and `scaling` hold what is
compiled. `python -m benchmarks.compiled` and `.scale` print tables of it. Skip `hlo` unless a count looks wrong.
"""

from .hlo import Collective as Collective
from .hlo import Cost as Cost
from .hlo import collectives as collectives
from .hlo import cost as cost
from .programs import Report as Report
from .programs import passes as passes
from .programs import report as report
from .programs import residuals as residuals
from .targets import AXIS as AXIS
from .targets import TARGETS as TARGETS
from .targets import compiled as compiled
from .targets import mesh as mesh
from .targets import missing as missing
from .targets import placed as placed
