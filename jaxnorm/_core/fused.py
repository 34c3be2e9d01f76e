"""Rows by formulas of which XLA makes one kernel for a GPU, or one loop for a CPU, where no statistics are kept."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from .arithmetic import FULL, abs_squared, scaled_abs_squared
from .dtypes import accumulator, are_static
from .formulas import first_along, total_over
from .platforms import is_for_one_cpu
from .types import Reduction
from .vma import pvary_like

Array = jax.Array


def fused_two_pass(x, n, reduction: Reduction) -> tuple[Array, Array, Array]:
    """`two_pass` for one kernel of XLA's on a GPU: of a constant row, whose m2 is rounding noise, m2 becomes huge.

    So 1 / sqrt(m2 / n) is 0 in effect. A select, such as `shifted_moments` has, would have XLA cut the kernel in three.
    """
    x = x.astype(accumulator(x))
    over = lambda a: total_over(a, reduction.axes)
    # If no sum came before the two others, XLA would make 3 kernels.
    shift = over(x) / n if reduction.centered else over(x) * 0.0
    d = x - shift
    if not reduction.centered:
        assert reduction.large_prescale is not None  # `statistics_of_output`
        small, large = over(abs_squared(d * reduction.prescale)), over(abs_squared(d * reduction.large_prescale))
        root = jnp.maximum(
            jnp.sqrt(jnp.minimum(small, FULL)) / reduction.prescale, jnp.sqrt(large) / reduction.large_prescale
        )
        return shift, jnp.zeros_like(shift), root
    offset = over(d) / n
    terms = lambda prescale: (over(abs_squared(d * prescale)), n * scaled_abs_squared(offset, prescale))
    if reduction.large_prescale is None:
        squares, correction = terms(reduction.prescale)
        m2 = squares - correction
        constant = jnp.minimum(jnp.maximum(2.0**-18 * correction - m2, 0.0) * 2.0**126, 1.0)  # 0 or 1
        return shift, offset, jnp.maximum(m2, 0.0) + constant * 2.0**120
    # With both prescales, the small one's terms held below overflow. Then the larger root of the two is the right one,
    # and x is constant if neither finds otherwise: one whose terms are out of range does not.
    small, large = ([jnp.minimum(a, FULL) for a in terms(reduction.prescale)], terms(reduction.large_prescale))
    root, constant = 0.0, 1.0
    for prescale, (squares, correction) in ((reduction.prescale, small), (reduction.large_prescale, large)):
        m2 = squares - correction
        constant *= jnp.minimum(jnp.maximum(2.0**-18 * correction - m2 + 2.0**-126, 0.0) * 2.0**126, 1.0)
        root = jnp.maximum(jnp.sqrt(jnp.maximum(m2, 0.0)) / prescale, root)
    return shift, offset, root + constant * 2.0**126


_LONGEST_LOOP = 1 << 11  # elements of a row up to which XLA for CPU makes one loop of `fused_on_cpu`; measured


def is_fused_on_cpu(x: Array, reduction: Reduction, epsilon: float) -> bool:
    """Whether `fused_on_cpu` is for this row."""
    short = math.prod(x.shape[a] for a in reduction.axes) <= _LONGEST_LOOP
    positive = epsilon * reduction.prescale**2 >= float(jnp.finfo(accumulator(x)).tiny)
    return reduction.centered and reduction.large_prescale is None and short and positive


def fused_on_cpu(x: Array, n: Array, reduction: Reduction, epsilon: float) -> Array:
    """(x - mean) / sqrt(var + epsilon) for one loop of XLA's over each row: no select, and each sum is used once.

    The mean is taken about the first element, so that of a constant row each difference is 0, and the variance about
    that mean. Of 16 bits a sum of equal elements is exact: their mean needs nothing to be taken about. A row whose
    squares overflow has a NaN.
    """
    d = x.astype(accumulator(x))
    if x.dtype.itemsize > 2:
        d = d - first_along(d, reduction.axes)
    scaled = (d - total_over(d, reduction.axes) / n) * reduction.prescale
    v = total_over(lax.square(scaled), reduction.axes) / n + epsilon * reduction.prescale**2
    return (scaled + 0.0 * (n * lax.square(scaled))) * lax.rsqrt(v)


_LONGEST_PLAIN = {4: 1 << 11, 2: 1 << 12}  # elements of a row up to which `plain_on_cpu` is faster, by bytes; measured


def is_plain_on_cpu(x: Array, reduction: Reduction, dtype) -> bool:
    """Whether `plain_on_cpu` is for these rows: not where several devices would have to agree that none overflowed."""
    narrow = x.dtype.itemsize in _LONGEST_PLAIN and jnp.dtype(dtype).itemsize >= 2
    if not narrow or reduction.plain or reduction.large_prescale is not None or not are_static(*x.shape):
        return False
    short = not reduction.centered or math.prod(x.shape[a] for a in reduction.axes) <= _LONGEST_PLAIN[x.dtype.itemsize]
    return short and is_for_one_cpu(x.shape)


def plain_on_cpu(x: Array, n: Array, reduction: Reduction, epsilon: float) -> tuple[Array, Array]:
    """x - mean and r for one loop of XLA's over each row, by squares of x as it is: if they overflow, r is NaN.

    XLA has a faster sum of squares where nothing scales them. An epsilon that needs no second prescale is far above
    what is flushed to zero. So that each row's numbers have one use, which keeps the loop one, NaN comes of the root
    itself: 1 / (2**-64 v) is at least 2**-64, to which -2**-100 adds nothing, and 0 where v is infinite.
    """
    d = x.astype(accumulator(x))
    if reduction.centered:
        if x.dtype.itemsize > 2:
            d = d - first_along(d, reduction.axes)
        d = d - total_over(d, reduction.axes) / n
    v = total_over(lax.square(d), reduction.axes) / n + epsilon
    return d, 2.0**-32 * lax.sqrt(1.0 / (v * 2.0**-64) - 2.0**-100)


def unless_overflowed(y: Array, careful: Callable[[], Array], axes: tuple[int, ...]) -> Array:
    """y, but `careful()` if a row of y begins with NaN, as those do whose sum has overflowed.

    A loop, which runs once at the most, keeps y where it is. A conditional would copy it.
    """
    failed = jnp.isnan(first_along(y, axes)).any()
    again = lambda carry: (careful(), pvary_like(failed, jnp.zeros((), bool)))
    return lax.while_loop(lambda carry: carry[1], again, (y, failed))[0]
