"""Conversion: parameters and running statistics from and to torch, flax, haiku, equinox and keras.

    spec, params, state, report = convert.from_torch(layer)      # one norm, of each library
    variables, report = convert.transfer(state_dict, variables)  # a whole model, between any two libraries

What does not fit is a `ConversionError` with its path and the reason, and nothing is changed.
"""

from ._convert.api import from_equinox as from_equinox
from ._convert.api import from_flax as from_flax
from ._convert.api import from_haiku as from_haiku
from ._convert.api import from_keras as from_keras
from ._convert.api import from_torch as from_torch
from ._convert.api import to_equinox as to_equinox
from ._convert.api import to_flax as to_flax
from ._convert.api import to_haiku as to_haiku
from ._convert.api import to_keras as to_keras
from ._convert.api import to_torch as to_torch
from ._convert.files import read_file as read_file
from ._convert.files import write_file as write_file
from ._convert.report import ConversionError as ConversionError
from ._convert.report import Report as Report
from ._convert.report import Row as Row
from ._convert.transfer import transfer as transfer
