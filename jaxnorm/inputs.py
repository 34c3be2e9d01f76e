"""Inputs, observations, rewards and targets, normalized by statistics of data. Pure functions of a state.

    state = inputs.StandardizeInputs().fit(batches)                       # once, over a data set
    y, state = inputs.RunningNorm().apply((), state, x, train=True)       # while it is used

All statistics are exact: masked, over any split into batches and devices, and after any number of elements.
"""

from ._inputs.fitting import Masked as Masked
from ._inputs.images import standardize_images as standardize_images
from ._inputs.percentile import PercentileNorm as PercentileNorm
from ._inputs.percentile import PercentileState as PercentileState
from ._inputs.percentile import percentile_norm as percentile_norm
from ._inputs.pop_art import PopArt as PopArt
from ._inputs.pop_art import pop_art as pop_art
from ._inputs.pop_art import pop_art_update as pop_art_update
from ._inputs.returns import ReturnNorm as ReturnNorm
from ._inputs.returns import ReturnState as ReturnState
from ._inputs.returns import return_norm as return_norm
from ._inputs.running import RunningNorm as RunningNorm
from ._inputs.running import running_norm as running_norm
from ._inputs.saving import load as load
from ._inputs.saving import save as save
from ._inputs.standardize import StandardizeInputs as StandardizeInputs
from ._inputs.standardize import standardize_inputs as standardize_inputs
from ._inputs.symlog import symexp as symexp
from ._inputs.symlog import symlog as symlog
from ._ops.seen import SeenStats as SeenStats
