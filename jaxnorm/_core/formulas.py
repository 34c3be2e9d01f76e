"""The formulas for mean and second moment: in one pass about a sample mean, in two passes, and Welford's."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .arithmetic import FULL, abs_squared, nonzero_divisor, pick_in_range, scaled_abs_squared, scaled_by, where
from .dtypes import accumulator, are_static
from .over import Axes, Over
from .platforms import by_platform, is_for_one_cpu
from .types import Reduction
from .vma import pvary_like

Array = jax.Array


_LONG_SUM = 1 << 13  # elements from which a sum is taken about a rough mean
_ENOUGH_SUMS = 1 << 14  # sums at once from which on XLA keeps their summands out of a GPU's memory; likewise


def one_pass(x, keep, weights, n, reduction: Reduction, total: Callable | None = None) -> tuple[Array, Array, Array]:
    """`shifted_moments` about the mean of a sample, where x has one that will do; else in two passes."""
    sample = _spaced_sample(x, reduction.axes)
    if sample is None:
        return two_pass(x, keep, weights, n, reduction)
    over = reduction.over
    size = None
    if reduction.large_prescale is not None and isinstance(over, Axes):
        size = jnp.max(jnp.abs(sample), reduction.axes, keepdims=True)
    shift = over.sum(sample, None) / over.size(sample.shape)
    return shifted_moments(x, keep, weights, n, shift, reduction, total, size)


def one_pass_by_parts(x, keep, weights, n, reduction: Reduction) -> tuple[Array, Array, Array]:
    """`one_pass` for a GPU, where sums over `split_axes` first keep x - shift out of memory."""

    def by_parts(a: Array) -> Array:
        if apart := split_axes(a, reduction.axes):
            a = lax.optimization_barrier(total_over(a, reduction.axes[len(apart) :]))
        return reduction.over.sum(a, None)

    return one_pass(x, keep, weights, n, reduction, by_parts)


def split_axes(x: Array, axes: tuple[int, ...]) -> tuple[int, ...]:
    """The first of these axes, over which to sum only after a sum over the others; none where one sum over all will do.

    XLA's GPU compiler writes the summands of such sums out, in float32, unless it finds enough threads' work in what
    they come to. Long sums it cuts by itself.
    """
    if len(axes) < 2 or not are_static(*x.shape) or sharded_axes(x):
        return ()
    if not 256 <= math.prod(x.shape[a] for a in axes) < 1 << 15:
        return ()
    enough = lambda k: x.size >= _ENOUGH_SUMS * math.prod(x.shape[a] for a in axes[k:])
    return axes[: next(filter(enough, range(1, len(axes))), 1)]


def total_over(a: Array, axes: tuple[int, ...]) -> Array:
    return a.sum(axes, keepdims=True)


def shifted_moments(
    x, keep, weights, n, shift, reduction: Reduction, total: Callable | None = None, size: Array | None = None, ids=None
) -> tuple[Array, Array, Array]:
    """In one pass about a `shift` near the mean: the mean as shift + offset, and the second moment.

    offset = sum(w (x - shift)) / n;   m2 = sum(w |x - shift|**2) - n |offset|**2

    Sums are those of `reduction.over` unless `total` is given. An m2 below the rounding noise of its own two terms is
    that of a constant x: then the mean is that constant, to the bit, and m2 is 0. With two prescales its root is
    returned; `size` is then that of some elements of x.
    """
    at_x = reduction.over.spread(shift, ids)
    d = difference(x, keep, at_x)
    total = total or functools.partial(reduction.over.sum, ids=ids)
    offset = mean_of(total(weighted(d, weights)), n)
    # The prescale taken first, which is exact: were d shared by the two sums, XLA might write it out for a GPU.
    about = lambda at_x, prescale: total(weighted(abs_squared(difference(x, keep, at_x, prescale)), weights))
    squares = functools.partial(about, at_x)
    if reduction.large_prescale is None:
        # Of rows a CPU would write out d if both sums were of it; of columns that is faster.
        apart = (lambda: about(lax.optimization_barrier(at_x), 1.0)) if are_last(x, reduction.axes) else None
        m2, prescale = in_unit(reduction, squares, x, apart), reduction.prescale
    else:
        m2, prescale = in_range(reduction, squares, size)
    correction = n * scaled_abs_squared(offset, prescale)
    m2 = m2 - correction
    constant = m2 <= 2.0**-18 * correction
    m2 = where(constant, 0.0, m2)
    return (
        where(constant, shift + offset, shift),
        where(constant, 0.0, offset),
        m2 if reduction.large_prescale is None else jnp.sqrt(m2) / prescale,
    )


def in_unit(reduction: Reduction, squares: Callable, x: Array, bare: Callable | None = None) -> Array:
    """`squares(reduction.prescale)`. Of many elements on one CPU device first without a prescale, which is faster.

    That is `bare()`, if given.
    """
    if reduction.plain or reduction.prescale == 1.0 or not is_for_one_cpu(x.shape):
        return squares(reduction.prescale)

    def on_cpu():
        plain = squares(1.0) if bare is None else bare()
        full = ~jnp.all(plain <= FULL)
        # A loop that runs once at the most: under vmap a conditional would always do both.
        again = lambda carry: (squares(reduction.prescale), pvary_like(full, jnp.zeros((), bool)))
        return lax.while_loop(lambda carry: carry[1], again, (plain * reduction.prescale**2, full))[0]

    return by_platform(reduction, cpu=on_cpu, default=lambda: squares(reduction.prescale))


def in_range(reduction: Reduction, squares: Callable, size: Array | None = None) -> tuple[Array, Array]:
    """`squares(prescale)` with the one of two prescales that keeps them in range, and that prescale.

    A TPU sums with both in one pass over x. On CPU each sum is a pass: the second one is skipped unless a sum of the
    first has overflowed. On a GPU a third sum costs a pass. Unless epsilon is close to 0, the prescale there is taken
    from the `size` of some elements. If they mislead, the sum overflows and y is NaN, which values below
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


def two_pass(
    x, keep, weights, n, reduction: Reduction, rough: Array | None = None, ids: Array | None = None, round_mean=False
) -> tuple[Array, Array, Array]:
    """The corrected two-pass algorithm: the mean, then everything about it, the rounding error of that mean included.

    Chan, Golub, LeVeque, "Algorithms for computing the sample variance" (1983), equation 1.7. The first sum is about a
    `rough` mean, if there is one.
    """
    about = None if rough is None else reduction.over.spread(rough, ids)
    shift = mean_of(reduction.over.sum(weighted(difference(x, keep, about), weights), ids), n)
    if keep is not None or weights is not None or round_mean:
        # XLA makes a product of the division by n, and contracts it with the subtraction in x - shift. That shift is
        # not rounded, so it is not the one returned. XLA keeps this rounding.
        shift = rounded(shift)
    shift = shift if rough is None else rough + shift
    size = None
    sharded = {*reduction.axes} & {*sharded_axes(x)}  # of those no first element can be taken
    if reduction.large_prescale is not None and isinstance(reduction.over, Axes) and not sharded:
        first = first_along(difference(x, keep, None), reduction.axes)
        size = jnp.maximum(jnp.abs(shift), jnp.abs(first))
    return shifted_moments(x, keep, weights, n, shift, reduction, size=size, ids=ids)


def long_two_pass_on_cpu(x, keep, weights, n, reduction: Reduction) -> tuple[Array, Array, Array]:
    """`two_pass` about a rough mean, for long sums: XLA for CPU may add them up in one chain.

    At a mean of many deviations that would drift by many of them.
    """
    return two_pass(x, keep, weights, n, reduction, _rough_mean(x, keep, reduction.over))


def is_long(x: Array, over: Over) -> bool:
    """Whether a sum over these elements is one for `long_two_pass_on_cpu`."""
    size = over.size(x.shape)
    return are_static(size) and size >= _LONG_SUM


def rounded(a: Array) -> Array:
    """a with three bits fewer."""
    kind = jnp.finfo(a.dtype)
    shorter = lambda a: lax.reduce_precision(a, kind.nexp, kind.nmant - 3)
    return lax.complex(shorter(a.real), shorter(a.imag)) if jnp.iscomplexobj(a) else shorter(a)


def weighted_mean(x: Array, w: Array, n: Array, axes: tuple[int, ...]) -> Array:
    """sum(w x) / n over axes, and 0 where n is 0."""
    return mean_of(total_over(w.astype(x.dtype) * x, axes), n)


def mean_of(total: Array, n: Array) -> Array:
    """total / n, and 0 where n is 0."""
    return total / nonzero_divisor(n).astype(total.dtype)


def welford(x, keep, weights, n, reduction: Reduction) -> tuple[Array, Array, Array]:
    """One read of x: a reduction over (count, mean, m2) by the pairwise update, about the first element of each row."""
    first = first_along(x, reduction.axes).astype(accumulator(x))
    z = difference(x, keep, first)
    w = jnp.broadcast_to(weight_of(weights, n), x.shape)
    zero = np.zeros((), n.dtype)

    def square(gap, prescale):
        """|prescale * gap|**2. Without the maximum XLA would square before it scales."""
        return abs_squared(gap * prescale if jnp.iscomplexobj(gap) else lax.max(lax.abs(gap * prescale), zero))

    def combine(a, b):
        (n_a, mean_a, *m2_a), (n_b, mean_b, *m2_b) = a, b
        total = n_a + n_b
        # No jnp.where in here: it is lowered to a call, and an unused reduction with calls crashes XLA's GPU compiler.
        part = n_b / lax.select(total == 0, jnp.ones_like(total), total)
        gap = mean_b - mean_a
        m2 = [a + b + square(gap, p) * (n_a * part) for p, a, b in zip(reduction.prescales, m2_a, m2_b, strict=True)]
        return total, mean_a + gap * part.astype(gap.dtype), *m2

    operands = w, z, *[jnp.zeros_like(w)] * len(reduction.prescales)
    start = zero, np.zeros((), z.dtype), *[zero] * len(reduction.prescales)
    _, *sums = lax.reduce(operands, start, combine, reduction.axes)
    offset, *m2 = (lax.expand_dims(a, reduction.axes) for a in sums)
    if reduction.large_prescale is None:
        return first, offset, m2[0]
    root, prescale = pick_in_range(reduction, *m2)
    return first, offset, jnp.sqrt(root) / prescale


def first_along(x: Array, axes: tuple[int, ...]) -> Array:
    """The first element along `axes`."""
    for a in axes:
        x = lax.slice_in_dim(x, 0, 1, axis=a)
    return x


def are_last(x: Array, axes: tuple[int, ...]) -> bool:
    return axes == tuple(range(x.ndim - len(axes), x.ndim))


def weighted(a: Array, weights: Array | None) -> Array:
    return a if weights is None else weights.astype(a.dtype) * a


def weight_of(weights: Array | None, n: Array) -> Array:
    return jnp.ones((1,) * n.ndim, n.dtype) if weights is None else weights.astype(n.dtype)


def difference(x: Array, keep: Array | None, shift: Array | None, prescale: float | Array = 1.0) -> Array:
    """prescale * (x - shift) in the accumulator's dtype, and 0 where an element is absent, whatever stood there."""
    scaled = lambda a: a if isinstance(prescale, float) and prescale == 1.0 else scaled_by(a, prescale)
    x = scaled(x.astype(accumulator(x)))
    d = x if shift is None else x - scaled(shift)
    return d if keep is None else jnp.where(keep, d, 0.0)


def _spaced_sample(x: Array, axes: tuple[int, ...]) -> Array | None:
    """Some 64 elements of each column, evenly spaced: the differences to their mean lose nothing when squared.

    Taken by splitting axes, not by slicing them, so that of a sharded axis every device samples its own part. None
    where sizes without divisors leave so few elements that a single outlier among them could spoil the sums, and where
    sizes are unknown.
    """
    if not are_static(*(x.shape[a] for a in axes)):
        return None
    sharded, taken, block = sharded_axes(x), 1, x
    for a in axes:
        size = x.shape[a]
        most = size if a in sharded else max(64 // taken, 1)
        part = max(k for k in range(1, min(size, most) + 1) if size % k == 0)
        split = block.reshape(*block.shape[:a], part, size // part, *block.shape[a + 1 :])
        block, taken = lax.index_in_dim(split, 0, a + 1, keepdims=False), taken * part
    if taken < min(16, math.prod(x.shape[a] for a in axes)):
        return None
    return block.astype(accumulator(x))


def _rough_mean(x: Array, keep: Array | None, over: Over) -> Array | None:
    """The mean of the sample's present elements, 0 where there are none; None where there is no sample."""
    sharded = sharded_axes(x) or (keep is not None and sharded_axes(keep))  # their samples might not agree
    sample = None if sharded else _spaced_sample(x, over.axes)
    if sample is None or keep is None:
        return None if sample is None else over.sum(sample, None) / over.size(sample.shape)
    kept = _spaced_sample(jnp.broadcast_to(keep, x.shape), over.axes)
    assert kept is not None
    return mean_of(over.sum(jnp.where(kept > 0, sample, 0.0), None), over.sum(kept, None))


def sharded_axes(x: Array) -> list[int]:
    """The axes that are sharded as far as types tell, which they do on Explicit meshes."""
    return [a for a, name in enumerate(jax.typeof(x).sharding.spec) if name is not None]
