"""The shape that row kernels know: rows one after the other in memory, a scale and a bias along them."""

from __future__ import annotations

from typing import NamedTuple


class Rows(NamedTuple):
    """What a row kernel has to know of a norm besides its arrays."""

    columns: int  # elements of a row
    epsilon: float
    unit: float  # squares are those of (unit * x), which keeps 1e20**2 in range
    centered: bool  # False: RMS norm
    round_first: bool = False  # xhat to the dtype of y before scale
