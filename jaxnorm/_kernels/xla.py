"""The XLA backend: statistics and the affine map in plain `jax.numpy`. What this file computes is what the others must.

Legend: x is any shape; statistics keep the reduced axes with size 1, so that everything broadcasts.
Accumulation is in `accumulator(x)`: float32, or wider where x is wider.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array

_LONGEST_ROW = 1 << 14  # elements of a row up to which XLA makes one kernel for a GPU; measured by its compiler
_LONG_SUM = 1 << 13  # elements from which a sum is taken about a rough mean
_ENOUGH_SUMS = 1 << 14  # sums at once from which on XLA keeps their summands out of a GPU's memory; likewise


@dataclass(frozen=True)
class Reduction:
    """What is reduced, and how: everything static about the statistics."""

    axes: tuple[int, ...]  # axes of x that the statistics run over, non-negative
    centered: bool = True  # False: the mean is taken as zero (RMS norm)
    one_pass: bool = False  # True: read x once, about a pilot: for columns, where passes are dear
    prescale: float = 1.0  # squares are those of unit * x; a power of two, so exact, that keeps their sum in range
    large_prescale: float | None = (
        None  # if one unit is not enough: the unit for values too large for `unit`; see `units`
    )
    axis_name: str | tuple[str, ...] | None = None  # devices to merge over
    groups: tuple[tuple[int, ...], ...] | None = None  # ... in these groups of indices along axis_name
    num_shards: int = 1  # of the leading axis, which jit may spread over so many devices: with statistics of their own
    plain: bool = False  # lax operations alone, the same on every platform, for programs that read jaxprs


@dataclass(frozen=True)
class Plan:
    """Everything static about normalizing: hashable, so that equal recipes share one trace."""

    reduction: Reduction
    epsilon: float
    scale_offset: float
    dtype: Any  # of the output
    cast_before_scale: bool = False
    backend: str | None = None  # of kernels: "xla", "native", or None for the best
    activation: Any = None  # f, a name or a function. A kernel backend never sees one: `standardize` puts it around
    for_backward: bool = (
        False  # the statistics are kept for a backward pass, and y may as well be made of the same ones
    )
    gate: str | None = None  # f(gate) multiplies "before" or "after" the norm; None: f is of the output


class Statistics(NamedTuple):
    """Count, mean and second moment, the mean held as an unevaluated sum so that x - mean keeps its low bits."""

    count: Array  # float32, broadcasts against shift: how many elements, or the sum of their weights
    mean_hi: Array  # mean == mean_hi + mean_lo, |mean_lo| small beside the spread of x
    mean_lo: Array
    m2: Array  # real: the sum of |unit * (x - mean)|**2; with two units the square root of the sum of |x - mean|**2


def prescales(epsilon: float, n: int, dtype) -> tuple[float, float | None]:
    """The unit for the sum of n squares in float32, or two, for small and for large values, if no single one will do.

    |x| may be up to 1e30, so that |x - shift| is up to 2**100.66, and epsilon anything. The sum stays finite if
    n (unit 2**100.66)**2 < 2**128. A square below 2**-126 is flushed to zero. That changes 1 / sqrt(var + epsilon) by
    less than 2e-6 of itself if epsilon unit**2 >= 2**-108. One unit meets both for the default epsilons up to some
    10**4 or 10**5 elements. Otherwise squares are summed in two units. Where the sum for small values overflows, the
    one for large values is used. What was flushed there is then below 2**-22 of it.
    """
    if jnp.finfo(dtype).bits == 64:
        return 2.0**-40, None
    half = math.log2(max(n, 16)) / 2 if isinstance(n, int) else 14.0  # a symbolic size counts as a large one
    down = math.ceil(36.66 + half)
    if epsilon * 4.0**-down >= 2.0**-108:
        return 2.0**-down, None
    beside_epsilon = math.ceil(-54 - math.log2(epsilon) / 2) if epsilon else 62
    return 2.0 ** min(62, math.floor(115.5 - half - down), beside_epsilon), 2.0**-down


FULL = 2.0**127  # a sum of squares up to here has not overflowed


def are_static(*sizes) -> bool:
    """Whether sizes are numbers. Under `jax.export` some may be symbols, which can be multiplied but not compared."""
    return all(isinstance(n, int) for n in sizes)


def widest(*dtypes):
    """The dtype that holds all of these, whatever the user's own setting for implicit promotion.

    Floats of 8 bits and fewer, which JAX promotes to nothing, count as float32.
    """
    for d in dtypes:
        if jnp.dtype(d).itemsize == 1:
            dtypes = [jnp.float32 if is_narrow(t) else t for t in dtypes]
            break
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def is_narrow(dtype) -> bool:
    """Whether this is a float of 8 bits or fewer."""
    return jnp.dtype(dtype).itemsize == 1 and jnp.issubdtype(dtype, jnp.floating)


def by_platform(reduction: Reduction, *args, default: Callable, **formulas: Callable):
    """`lax.platform_dependent`; of a plain reduction the CPU's formula."""
    if reduction.plain:
        return formulas.get("cpu", default)(*args)
    return lax.platform_dependent(*args, default=default, **formulas)


def recompute(f: Callable, plain: bool) -> Callable:
    """f, of which the backward pass keeps the arguments alone. `plain` leaves it to JAX what is kept."""
    return f if plain else jax.checkpoint(f, prevent_cse=False)


def accumulator(x: Array):
    """The dtype for statistics and for the affine arithmetic: x's own, but float32 at least."""
    return widest(x.dtype, jnp.float32)


def abs_squared(z: Array) -> Array:
    """|z|**2, real."""
    return lax.square(z.real) + lax.square(z.imag) if jnp.iscomplexobj(z) else lax.square(z)


def scaled_abs_squared(a: Array, prescale: float | Array) -> Array:
    """|unit * a|**2 of a few numbers. Without the maximum XLA would square a single one before it scales it."""
    if jnp.iscomplexobj(a) or (isinstance(prescale, float) and prescale == 1.0):
        return abs_squared(_times(a, prescale))
    return lax.square(jnp.maximum(jnp.abs(_times(a, prescale)), 0.0))


def valid_mask(mask: Array | None, weights: Array | None) -> Array | None:
    """Where elements count at all. An element of weight zero is as absent as a masked one."""
    if weights is None:
        return mask
    return weights != 0 if mask is None else mask & (weights != 0)


def finite_where_masked(x: Array, keep: Array | None) -> Array:
    """x in the accumulator's dtype, with 0 for padding: an absent element that is NaN, infinite or beyond 1e30."""
    x = x.astype(accumulator(x))
    return x if keep is None else jnp.where(_usable(x, keep), x, 0.0)


def deviation(x: Array, keep: Array | None, *weighted_mean: Array) -> Array:
    """x minus the parts of its mean in the accumulator's dtype, with such padding as a constant that equals the mean.

    Padding then gives the bias: nothing overflows in a loss that multiplies by the mask after it squares the output.
    """
    x = x.astype(accumulator(x))
    minus = lambda a, *split_axes: functools.reduce(lambda a, b: a - b, split_axes, a)
    if keep is None:
        return minus(x, *weighted_mean)
    values = [lax.stop_gradient(part) for part in weighted_mean]
    d = jnp.where(_usable(x, keep), minus(x, *values), 0.0)
    return minus(
        d, *(part - value for part, value in zip(weighted_mean, values, strict=True))
    )  # zeros, with the derivatives


def zero_where_padding(x: Array, keep: Array | None, dx: Array) -> Array:
    """dx, with 0 for such padding: what `centered` and `cleaned` make of it does not depend on it."""
    return dx if keep is None else jnp.where(_usable(x, keep), dx, 0.0)


def _usable(x: Array, keep: Array) -> Array:
    return keep | (jnp.abs(x.astype(accumulator(x))) <= 1e30)


def count_valid(x: Array, mask: Array | None, weights: Array | None, axes: tuple[int, ...]) -> Array:
    """The number of present elements, or the sum of their weights, as float32 of broadcastable shape."""
    dtype = jnp.finfo(accumulator(x)).dtype
    ones = jnp.ones((1,) * x.ndim, dtype) if weights is None else weights.astype(dtype)
    kept = ones if mask is None else jnp.where(mask, ones, 0.0)
    total, repeats = kept.sum(axes, keepdims=True), [x.shape[a] for a in axes if kept.shape[a] == 1]
    # Symbolic sizes are multiplied as floats: as the integers that they become in a program they could overflow.
    for n in [math.prod(repeats)] if are_static(*repeats) else repeats:
        total = total * n
    return total


def local_statistics(x: Array, mask: Array | None, weights: Array | None, reduction: Reduction) -> Statistics:
    """The statistics of what this device holds. The formula for rows is chosen for the platform, at lowering."""
    n = count_valid(x, mask, weights, reduction.axes)
    keep = valid_mask(mask, weights)
    args = (x, keep, weights, n)
    if not reduction.centered:
        zero = jnp.zeros(_reduced_shape(x, reduction.axes), accumulator(x))
        squares = lambda prescale: _total(
            _weight(weights, n) * abs_squared(_difference(x, keep, zero) * prescale), reduction.axes
        )
        if reduction.large_prescale is None:
            return Statistics(n, zero, zero, squares(reduction.prescale))
        m2, prescale = in_range(reduction, squares)
        return Statistics(n, zero, zero, jnp.sqrt(m2) / prescale)
    if 0 in x.shape:
        zero = jnp.zeros(_reduced_shape(x, reduction.axes), accumulator(x))
        return Statistics(n, zero, zero, zero.real)
    by = lambda formula: lambda *args: formula(*args, reduction)
    if reduction.one_pass and keep is None and _sharded_axes(x):
        return Statistics(n, *one_pass(*args, reduction))
    if reduction.one_pass and keep is None:
        on_gpu = by(one_pass_by_parts)
        return Statistics(n, *by_platform(reduction, *args, cuda=on_gpu, rocm=on_gpu, default=by(one_pass)))
    if reduction.one_pass or keep is not None or _sharded_axes(x):  # Welford's is for rows, and would lose the sharding
        if not _is_long(x, reduction.axes):
            return Statistics(n, *two_pass(*args, reduction))
        return Statistics(n, *by_platform(reduction, *args, cpu=by(two_pass_on_cpu), default=by(two_pass)))
    on_gpu = by(welford if are_last(x, reduction.axes) else one_pass_by_parts)
    return Statistics(
        n, *by_platform(reduction, *args, cpu=by(two_pass_on_cpu), cuda=on_gpu, rocm=on_gpu, default=by(welford))
    )


def one_pass(x, keep, weights, n, reduction: Reduction, total: Callable | None = None) -> tuple[Array, Array, Array]:
    """`about` the mean of a sample, where x has one that will do; else in two passes."""
    sample = _spaced_sample(x, reduction.axes)
    if sample is None:
        return two_pass(x, keep, weights, n, reduction)
    size = None if reduction.large_prescale is None else jnp.max(jnp.abs(sample), reduction.axes, keepdims=True)
    return shifted_moments(x, keep, weights, n, sample.mean(reduction.axes, keepdims=True), reduction, total, size)


def one_pass_by_parts(x, keep, weights, n, reduction: Reduction) -> tuple[Array, Array, Array]:
    """`in_one_pass` for a GPU, where sums by `parts` keep x - shift out of memory."""

    def by_parts(a: Array, axes: tuple[int, ...]) -> Array:
        apart = split_axes(a, axes)
        if not apart:
            return _total(a, axes)
        return _total(lax.optimization_barrier(_total(a, axes[len(apart) :])), apart)

    return one_pass(x, keep, weights, n, reduction, by_parts)


def split_axes(x: Array, axes: tuple[int, ...]) -> tuple[int, ...]:
    """The first of these axes, over which to sum only after a sum over the others; none where one sum over all will do.

    XLA's GPU compiler writes the summands of such sums out, in float32, unless it finds enough threads' work in what
    they come to. Long sums it cuts by itself.
    """
    if len(axes) < 2 or not are_static(*x.shape) or _sharded_axes(x):
        return ()
    if not 256 <= math.prod(x.shape[a] for a in axes) < 1 << 15:
        return ()
    enough = lambda k: x.size >= _ENOUGH_SUMS * math.prod(x.shape[a] for a in axes[k:])
    return axes[: next(filter(enough, range(1, len(axes))), 1)]


def _total(a: Array, axes: tuple[int, ...]) -> Array:
    return a.sum(axes, keepdims=True)


def shifted_moments(
    x, keep, weights, n, shift, reduction: Reduction, total: Callable | None = None, size: Array | None = None
) -> tuple[Array, Array, Array]:
    """In one pass about a `shift` near the mean: the mean as shift + offset, and the second moment.

    offset = sum(w (x - shift)) / n;   m2 = sum(w |x - shift|**2) - n |offset|**2

    An m2 below the rounding noise of its own two terms is that of a constant x: then the mean is that constant, to the
    bit, and m2 is 0. With two units its root is returned; `size` is then that of some elements of x.
    """
    d = _difference(x, keep, shift)
    w = _weight(weights, n)
    total = total or _total
    offset = weighted_mean(d, w, n, reduction.axes, total)
    corrections = lambda prescale: n * scaled_abs_squared(offset, prescale)
    # The unit taken first, which is exact: were d shared by the two sums, XLA might write it out for a GPU.
    squares = lambda prescale: total(w * abs_squared(_difference(x, keep, shift, prescale)), reduction.axes)
    m2, prescale = (
        (squares(reduction.prescale), reduction.prescale)
        if reduction.large_prescale is None
        else in_range(reduction, squares, size)
    )
    correction = corrections(prescale)
    m2 = m2 - correction
    constant = m2 <= 2.0**-18 * correction
    m2 = jnp.where(constant, 0.0, m2)
    return (
        jnp.where(constant, shift + offset, shift),
        jnp.where(constant, 0.0, offset),
        m2 if reduction.large_prescale is None else jnp.sqrt(m2) / prescale,
    )


def in_range(reduction: Reduction, squares: Callable, size: Array | None = None) -> tuple[Array, Array]:
    """`squares(unit)` in the one of two units that holds them, and that unit.

    A TPU sums in both units in one pass over x. On CPU each sum is a pass: the second one is skipped unless a sum in
    the first unit has overflowed. On a GPU a third sum costs a pass. Unless epsilon is close to 0, the unit there is
    taken from the `size` of some elements. If they mislead, the sum overflows and y is NaN, which values below
    1e28 / sqrt(n) never do.
    """

    def on_cpu(*size):
        small = squares(reduction.prescale)
        return pick_in_range(
            reduction, small, lax.cond(jnp.all(small <= FULL), lambda: small, lambda: squares(reduction.large_prescale))
        )

    def on_gpu(size):
        prescale = jnp.minimum(reduction.prescale, lax.reduce_precision(2.0**-20 / size, 8, 0))
        return squares(prescale), prescale

    both = lambda *size: pick_in_range(reduction, squares(reduction.prescale), squares(reduction.large_prescale))
    if size is None or reduction.prescale > 2.0**-30:
        return by_platform(reduction, cpu=on_cpu, default=both)
    return by_platform(reduction, size, cpu=on_cpu, cuda=on_gpu, rocm=on_gpu, default=both)


def pick_in_range(reduction: Reduction, small: Array, large: Array) -> tuple[Array, Array]:
    """The same of sums of squares in the small and in the large unit."""
    assert reduction.large_prescale is not None
    fits = small <= FULL  # False also for NaN
    return jnp.where(fits, small, large), jnp.where(fits, reduction.prescale, reduction.large_prescale)


def two_pass(x, keep, weights, n, reduction: Reduction, rough: Array | None = None) -> tuple[Array, Array, Array]:
    """The corrected two-pass algorithm: the mean, then everything about it, the rounding error of that mean included.

    Chan, Golub, LeVeque, "Algorithms for computing the sample variance" (1983), equation 1.7. The first sum is about a
    `rough` mean, if there is one.
    """
    shift = weighted_mean(_difference(x, keep, rough), _weight(weights, n), n, reduction.axes)
    if keep is not None or weights is not None:
        # XLA makes a product of the division by n, and contracts it with the subtraction in x - shift. That shift is
        # not rounded, so it is not the one returned. XLA keeps this rounding.
        shift = _rounded(shift)
    shift = shift if rough is None else rough + shift
    size = None
    if reduction.large_prescale is not None:
        first = _first(_difference(x, keep, None), reduction.axes)
        size = jnp.maximum(jnp.abs(shift), jnp.abs(first))
    return shifted_moments(x, keep, weights, n, shift, reduction, size=size)


def two_pass_on_cpu(x, keep, weights, n, reduction: Reduction) -> tuple[Array, Array, Array]:
    """`two_pass`, long sums about a rough mean: XLA for CPU may add them up in one chain.

    At a mean of many deviations that would drift by many of them.
    """
    return two_pass(
        x, keep, weights, n, reduction, _rough_mean(x, keep, reduction.axes) if _is_long(x, reduction.axes) else None
    )


def _is_long(x: Array, axes: tuple[int, ...]) -> bool:
    size = math.prod(x.shape[a] for a in axes)
    return isinstance(size, int) and size >= _LONG_SUM


def _rounded(a: Array) -> Array:
    """a with three bits fewer."""
    kind = jnp.finfo(a.dtype)
    shorter = lambda a: lax.reduce_precision(a, kind.nexp, kind.nmant - 3)
    return lax.complex(shorter(a.real), shorter(a.imag)) if jnp.iscomplexobj(a) else shorter(a)


def weighted_mean(x: Array, w: Array, n: Array, axes: tuple[int, ...], total: Callable | None = None) -> Array:
    """sum(w x) / n over axes, and 0 where n is 0."""
    return (total or _total)(w.astype(x.dtype) * x, axes) / nonzero_divisor(n).astype(x.dtype)


def nonzero_divisor(n: Array) -> Array:
    """n, but 1 where it is 0: a divisor for sums that are 0 there."""
    return jnp.where(n == 0, 1.0, n)


def welford(x, keep, weights, n, reduction: Reduction) -> tuple[Array, Array, Array]:
    """One read of x: a reduction over (count, mean, m2) by the pairwise update, about the first element of each row."""
    first = _first(x, reduction.axes).astype(accumulator(x))
    prescales = (
        [reduction.prescale] if reduction.large_prescale is None else [reduction.prescale, reduction.large_prescale]
    )
    z = [
        _difference(x, keep, first, prescale) for prescale in prescales
    ]  # not in `combine`: XLA would square before it scales
    w = jnp.broadcast_to(_weight(weights, n), x.shape)

    def combine(a, b):
        (n_a, *a), (n_b, *b) = a, b
        total = n_a + n_b
        # No jnp.where in here: it is lowered to a call, and an unused reduction with calls crashes XLA's GPU compiler.
        part = n_b / lax.select(total == 0, jnp.ones_like(total), total)
        out = [total]
        for mean_a, m2_a, mean_b, m2_b in zip(a[::2], a[1::2], b[::2], b[1::2], strict=True):  # in each unit
            gap = mean_b - mean_a
            out += [mean_a + gap * part.astype(gap.dtype), m2_a + m2_b + abs_squared(gap) * (n_a * part)]
        return tuple(out)

    zero = np.zeros((), n.dtype)
    operands, start = [w], [zero]
    for a in z:
        operands += [a, jnp.zeros_like(w)]
        start += [np.zeros((), a.dtype), zero]
    _, *sums = lax.reduce(tuple(operands), tuple(start), combine, reduction.axes)
    offset, m2, *of_large = (lax.expand_dims(a, reduction.axes) for a in sums)
    if reduction.large_prescale is None:
        return first, offset / reduction.prescale, m2
    offset = jnp.where(m2 <= FULL, offset, of_large[0])
    m2, prescale = pick_in_range(reduction, m2, of_large[1])
    return first, offset / prescale.astype(offset.dtype), jnp.sqrt(m2) / prescale


def _first(x: Array, axes: tuple[int, ...]) -> Array:
    """The first element along `axes`."""
    for a in axes:
        x = lax.slice_in_dim(x, 0, 1, axis=a)
    return x


def statistics_of_output(x: Array, mask: Array | None, weights: Array | None, stats: Statistics, reduction: Reduction):
    """The statistics that y is made of: those kept for the backward pass but for rows on a GPU.

    There `in_kernel` lets XLA make one kernel of them and y, which reads x once: 2 passes at inference, not 3. Where
    statistics are kept as well, those two sets would cost a pass more than one for both.
    """
    if (
        weights is not None
        or mask is not None
        or not _is_row(x, reduction)
        or not (reduction.centered or reduction.large_prescale)
    ):
        return stats
    alone = lambda x, n, *stats: fused_two_pass(x, n, reduction)
    kept = lambda x, n, *stats: stats
    return Statistics(stats.count, *by_platform(reduction, x, *stats, cuda=alone, rocm=alone, default=kept))


def _is_row(x: Array, reduction: Reduction) -> bool:
    """Whether XLA's GPU compiler may hold the reduced axes in one block of threads: they are the last, and not long."""
    size = math.prod(x.shape[a] for a in reduction.axes)
    mine = reduction.axis_name is None and not reduction.one_pass and not _sharded_axes(x)
    mine = mine and are_last(x, reduction.axes) and not jnp.iscomplexobj(x)
    return mine and are_static(size) and 0 < size <= _LONGEST_ROW and 0 not in x.shape


def are_last(x: Array, axes: tuple[int, ...]) -> bool:
    return axes == tuple(range(x.ndim - len(axes), x.ndim))


def fused_two_pass(x, n, reduction: Reduction) -> tuple[Array, Array, Array]:
    """`two_pass` for one kernel of XLA's on a GPU: of a constant row, whose m2 is rounding noise, m2 becomes huge.

    So 1 / sqrt(m2 / n) is 0 in effect. A select, such as `about` has, would have XLA cut the kernel in three.
    """
    x = x.astype(accumulator(x))
    over = lambda a: a.sum(reduction.axes, keepdims=True)
    shift = (
        over(x) / n if reduction.centered else over(x) * 0.0
    )  # if no sum comes before the two others, XLA makes 3 kernels
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
    # In both units, the small one's terms held below overflow. Then the larger root of the two is the right one, and x
    # is constant if neither unit finds otherwise: a unit in which the terms are out of range does not.
    small, large = ([jnp.minimum(a, FULL) for a in terms(reduction.prescale)], terms(reduction.large_prescale))
    root, constant = 0.0, 1.0
    for prescale, (squares, correction) in ((reduction.prescale, small), (reduction.large_prescale, large)):
        m2 = squares - correction
        constant *= jnp.minimum(jnp.maximum(2.0**-18 * correction - m2 + 2.0**-126, 0.0) * 2.0**126, 1.0)
        root = jnp.maximum(jnp.sqrt(jnp.maximum(m2, 0.0)) / prescale, root)
    return shift, offset, root + constant * 2.0**126


def nan_if_infinite(a: Array) -> Array:
    """a, with NaN for infinity: of a sum that overflowed, or a variance, so that y is not a plausible 0."""
    return a + 0.0 * a


def _weight(weights: Array | None, n: Array) -> Array:
    return jnp.ones((1,) * n.ndim, n.dtype) if weights is None else weights.astype(n.dtype)


def _difference(x: Array, keep: Array | None, shift: Array | None, prescale: float | Array = 1.0) -> Array:
    """unit * (x - shift) in the accumulator's dtype, and 0 where an element is absent, whatever stood there."""
    scaled = lambda a: a if isinstance(prescale, float) and prescale == 1.0 else _times(a, prescale)
    x = scaled(x.astype(accumulator(x)))
    d = x if shift is None else x - scaled(shift)
    return d if keep is None else jnp.where(keep, d, 0.0)


def _times(a: Array, prescale: float | Array) -> Array:
    return a * (prescale.astype(a.dtype) if isinstance(prescale, jax.Array) else prescale)


def _spaced_sample(x: Array, axes: tuple[int, ...]) -> Array | None:
    """Some 64 elements of each column, evenly spaced: the differences to their mean lose nothing when squared.

    Taken by splitting axes, not by slicing them, so that of a sharded axis every device samples its own part. None
    where sizes without divisors leave so few elements that a single outlier among them could spoil the sums, and where
    sizes are unknown.
    """
    if not are_static(*(x.shape[a] for a in axes)):
        return None
    sharded, taken, block = _sharded_axes(x), 1, x
    for a in axes:
        size = x.shape[a]
        most = size if a in sharded else max(64 // taken, 1)
        part = max(k for k in range(1, min(size, most) + 1) if size % k == 0)
        split = block.reshape(*block.shape[:a], part, size // part, *block.shape[a + 1 :])
        block, taken = lax.index_in_dim(split, 0, a + 1, keepdims=False), taken * part
    if taken < min(16, math.prod(x.shape[a] for a in axes)):
        return None
    return block.astype(accumulator(x))


def _rough_mean(x: Array, keep: Array | None, axes: tuple[int, ...]) -> Array | None:
    """The mean of the sample's present elements, 0 where there are none; None where there is no sample."""
    sharded = _sharded_axes(x) or (keep is not None and _sharded_axes(keep))  # their samples might not agree
    sample = None if sharded else _spaced_sample(x, axes)
    if sample is None or keep is None:
        return None if sample is None else sample.mean(axes, keepdims=True)
    kept = _spaced_sample(jnp.broadcast_to(keep, x.shape), axes)
    assert kept is not None
    return weighted_mean(jnp.where(kept > 0, sample, 0.0), kept, kept.sum(axes, keepdims=True), axes)


def _sharded_axes(x: Array) -> list[int]:
    """The axes that are sharded as far as types tell, which they do on Explicit meshes."""
    return [a for a, name in enumerate(jax.typeof(x).sharding.spec) if name is not None]


def max_or_zero(x: Array, keep: Array, axes: tuple[int, ...]) -> Array:
    """The largest present value over `axes`, kept as size 1; 0 where there is none. Of complex values, by part."""

    def real(a):
        none = lowest(a.dtype)
        return zero_for_lowest(jnp.where(keep, a, none).max(axes, keepdims=True, initial=none))

    return lax.complex(real(x.real), real(x.imag)) if jnp.iscomplexobj(x) else real(x)


def lowest(dtype) -> Any:
    """What stands for "no value" under a maximum. It is finite, since `jax.debug_infs` stops at any infinity."""
    return jnp.finfo(dtype).min


def zero_for_lowest(top: Array) -> Array:
    """A maximum, and 0 where it is of no value at all."""
    return jnp.where(top <= lowest(top.dtype), 0.0, top)


def _reduced_shape(x: Array, axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(1 if a in axes else size for a, size in enumerate(x.shape))
