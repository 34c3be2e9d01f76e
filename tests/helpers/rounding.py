"""The dtypes of half precision, and the spacing of their numbers."""

import ml_dtypes
import numpy as np

HALVES = [ml_dtypes.bfloat16, np.float16]


def ulp(y):
    """The spacing of y's dtype at y, in float64."""
    info = ml_dtypes.finfo(y.dtype)
    exponent = np.frexp(np.abs(y.astype(np.float64)))[1] - 1
    return np.exp2(np.maximum(exponent, info.minexp) - info.nmant)
