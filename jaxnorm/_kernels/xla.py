"""The XLA room: statistics and the affine map in plain `jax.numpy`. What this file computes is what the others must.

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
_ENOUGH_SUMS = 1 << 14  # sums at once from which on XLA keeps their summands out of a GPU's memory; likewise


@dataclass(frozen=True)
class Reduction:
    """What is reduced, and how: everything static about the statistics."""

    axes: tuple[int, ...]  # axes of x that the statistics run over, non-negative
    centered: bool = True  # False: the mean is taken as zero (RMS norm)
    one_pass: bool = False  # True: read x once, about a pilot: for columns, where passes are dear
    unit: float = 1.0  # squares are sums of (unit * x)**2; a power of two, so exact, that keeps 1e20**2 in range
    axis_name: str | tuple[str, ...] | None = None  # devices to merge over
    groups: tuple[tuple[int, ...], ...] | None = None  # ... in these groups of indices along axis_name
    parts: int = 1  # of the leading axis, which jit may spread over so many devices: with statistics of their own
    plain: bool = False  # lax operations alone, the same on every platform, for programs that read jaxprs


@dataclass(frozen=True)
class Recipe:
    """Everything static about normalizing: hashable, so that equal recipes share one trace."""

    how: Reduction
    epsilon: float
    scale_offset: float
    dtype: Any  # of the output
    round_before_scale: bool = False
    room: str | None = None  # of kernels: "xla", "native", or None for the best
    activation: Any = None  # f, a name or a function. A room of kernels never sees one: `standardize` puts it around
    kept: bool = False  # the statistics are kept for a backward pass, and y may as well be made of the same ones
    gate: str | None = None  # f(gate) multiplies "before" or "after" the norm; None: f is of the output


class Statistics(NamedTuple):
    """Count, mean and second moment, the mean held as an unevaluated sum so that x - mean keeps its low bits."""

    count: Array  # float32, broadcasts against shift: how many elements, or the sum of their weights
    shift: Array  # mean == shift + offset, |offset| small beside the spread of x
    offset: Array
    m2: Array  # real: the sum of |unit * (x - mean)|**2


def known(*sizes) -> bool:
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


def by_platform(how: Reduction, *args, default: Callable, **formulas: Callable):
    """`lax.platform_dependent`; of a plain reduction the CPU's formula."""
    if how.plain:
        return formulas.get("cpu", default)(*args)
    return lax.platform_dependent(*args, default=default, **formulas)


def recomputed(f: Callable, plain: bool) -> Callable:
    """f, of which the backward pass keeps the arguments alone. `plain` leaves it to JAX what is kept."""
    return f if plain else jax.checkpoint(f, prevent_cse=False)


def accumulator(x: Array):
    """The dtype for statistics and for the affine arithmetic: x's own, but float32 at least."""
    return widest(x.dtype, jnp.float32)


def square(z: Array) -> Array:
    """|z|**2, real."""
    return lax.square(z.real) + lax.square(z.imag) if jnp.iscomplexobj(z) else lax.square(z)


def present(mask: Array | None, weights: Array | None) -> Array | None:
    """Where elements count at all. An element of weight zero is as absent as a masked one."""
    if weights is None:
        return mask
    return weights != 0 if mask is None else mask & (weights != 0)


def cleaned(x: Array, keep: Array | None) -> Array:
    """x in the accumulator's dtype, with 0 for padding: an absent element that is NaN, infinite or beyond 1e30."""
    x = x.astype(accumulator(x))
    return x if keep is None else jnp.where(_usable(x, keep), x, 0.0)


def centered(x: Array, keep: Array | None, *mean: Array) -> Array:
    """x minus the parts of its mean in the accumulator's dtype, with such padding as a constant that equals the mean.

    Padding then gives the bias: nothing overflows in a loss that multiplies by the mask after it squares the output.
    """
    x = x.astype(accumulator(x))
    minus = lambda a, *parts: functools.reduce(lambda a, b: a - b, parts, a)
    if keep is None:
        return minus(x, *mean)
    values = [lax.stop_gradient(part) for part in mean]
    d = jnp.where(_usable(x, keep), minus(x, *values), 0.0)
    return minus(d, *(part - value for part, value in zip(mean, values, strict=True)))  # zeros, with the derivatives


def still(x: Array, keep: Array | None, dx: Array) -> Array:
    """dx, with 0 for such padding: what `centered` and `cleaned` make of it does not depend on it."""
    return dx if keep is None else jnp.where(_usable(x, keep), dx, 0.0)


def _usable(x: Array, keep: Array) -> Array:
    return keep | (jnp.abs(x.astype(accumulator(x))) <= 1e30)


def count(x: Array, mask: Array | None, weights: Array | None, axes: tuple[int, ...]) -> Array:
    """The number of present elements, or the sum of their weights, as float32 of broadcastable shape."""
    dtype = jnp.finfo(accumulator(x)).dtype
    ones = jnp.ones((1,) * x.ndim, dtype) if weights is None else weights.astype(dtype)
    kept = ones if mask is None else jnp.where(mask, ones, 0.0)
    total, repeats = kept.sum(axes, keepdims=True), [x.shape[a] for a in axes if kept.shape[a] == 1]
    # Symbolic sizes are multiplied as floats: as the integers that they become in a program they could overflow.
    for n in [math.prod(repeats)] if known(*repeats) else repeats:
        total = total * n
    return total


def statistics(x: Array, mask: Array | None, weights: Array | None, how: Reduction) -> Statistics:
    """The statistics of what this device holds. The formula for rows is chosen for the platform, at lowering."""
    n = count(x, mask, weights, how.axes)
    keep = present(mask, weights)
    args = (x, keep, weights, n)
    if not how.centered:
        zero = jnp.zeros(_reduced_shape(x, how.axes), accumulator(x))
        m2 = (_weight(weights, n) * square(_difference(x, keep, zero) * how.unit)).sum(how.axes, keepdims=True)
        return Statistics(n, zero, zero, m2)
    if 0 in x.shape:
        zero = jnp.zeros(_reduced_shape(x, how.axes), accumulator(x))
        return Statistics(n, zero, zero, zero.real)
    by = lambda formula: lambda *args: formula(*args, how)
    if how.one_pass and keep is None and _sharded_axes(x):
        return Statistics(n, *in_one_pass(*args, how))
    if how.one_pass and keep is None:
        on_gpu = by(in_one_pass_by_parts)
        return Statistics(n, *by_platform(how, *args, cuda=on_gpu, rocm=on_gpu, default=by(in_one_pass)))
    if how.one_pass or keep is not None or _sharded_axes(x):  # Welford's is for rows, and would lose the sharding
        return Statistics(n, *two_pass(*args, how))
    on_gpu = by(welford if _last(x, how.axes) else in_one_pass_by_parts)
    return Statistics(
        n, *by_platform(how, *args, cpu=by(two_pass), cuda=on_gpu, rocm=on_gpu, default=by(welford))
    )


def in_one_pass(x, keep, weights, n, how: Reduction, total: Callable | None = None) -> tuple[Array, Array, Array]:
    """`about` the mean of a sample, where x has one that will do; else in two passes."""
    pilot = _pilot(x, how.axes)
    if pilot is None:
        return two_pass(x, keep, weights, n, how)
    return about(x, keep, weights, n, pilot, how, total)


def in_one_pass_by_parts(x, keep, weights, n, how: Reduction) -> tuple[Array, Array, Array]:
    """`in_one_pass` for a GPU, where sums by `parts` keep x - shift out of memory."""

    def by_parts(a: Array, axes: tuple[int, ...]) -> Array:
        apart = parts(a, axes)
        if not apart:
            return _total(a, axes)
        return _total(lax.optimization_barrier(_total(a, axes[len(apart) :])), apart)

    return in_one_pass(x, keep, weights, n, how, by_parts)


def parts(x: Array, axes: tuple[int, ...]) -> tuple[int, ...]:
    """The first of these axes, over which to sum only after a sum over the others; none where one sum over all will do.

    XLA's GPU compiler writes the summands of such sums out, in float32, unless it finds enough threads' work in what
    they come to. Long sums it cuts by itself.
    """
    if len(axes) < 2 or not known(*x.shape) or _sharded_axes(x):
        return ()
    if not 256 <= math.prod(x.shape[a] for a in axes) < 1 << 15:
        return ()
    enough = lambda k: x.size >= _ENOUGH_SUMS * math.prod(x.shape[a] for a in axes[k:])
    return axes[: next(filter(enough, range(1, len(axes))), 1)]


def _total(a: Array, axes: tuple[int, ...]) -> Array:
    return a.sum(axes, keepdims=True)


def about(x, keep, weights, n, shift, how: Reduction, total: Callable | None = None) -> tuple[Array, Array, Array]:
    """In one pass about a `shift` near the mean: the mean as shift + offset, and the second moment.

    offset = sum(w (x - shift)) / n;   m2 = sum(w |x - shift|**2) - n |offset|**2

    An m2 below the rounding noise of its own two terms is that of a constant x: then the mean is that constant, to the
    bit, and m2 is 0.
    """
    d = _difference(x, keep, shift)
    w = _weight(weights, n)
    total = total or _total
    offset = mean(d, w, n, how.axes, total)
    correction = n * square(offset * how.unit)
    # The unit taken first, which is exact: were d shared by the two sums, XLA might write it out for a GPU.
    squares = square(_difference(x, keep, shift, how.unit))
    m2 = total(w * squares, how.axes) - correction
    constant = m2 <= 2.0**-18 * correction
    return (
        jnp.where(constant, shift + offset, shift),
        jnp.where(constant, 0.0, offset),
        jnp.where(constant, 0.0, m2),
    )


def two_pass(x, keep, weights, n, how: Reduction) -> tuple[Array, Array, Array]:
    """The corrected two-pass algorithm: the mean, then everything about it, the rounding error of that mean included.

    Chan, Golub, LeVeque, "Algorithms for computing the sample variance" (1983), equation 1.7.
    """
    shift = mean(_difference(x, keep, None), _weight(weights, n), n, how.axes)
    return about(x, keep, weights, n, shift, how)


def mean(x: Array, w: Array, n: Array, axes: tuple[int, ...], total: Callable | None = None) -> Array:
    """sum(w x) / n over axes, and 0 where n is 0."""
    return (total or _total)(w.astype(x.dtype) * x, axes) / safe(n).astype(x.dtype)


def safe(n: Array) -> Array:
    """n, but 1 where it is 0: a divisor for sums that are 0 there."""
    return jnp.where(n == 0, 1.0, n)


def welford(x, keep, weights, n, how: Reduction) -> tuple[Array, Array, Array]:
    """One read of x: a reduction over (count, mean, m2) by the pairwise update, about the first element of each row."""
    first = x
    for a in how.axes:
        first = lax.slice_in_dim(first, 0, 1, axis=a)
    first = first.astype(accumulator(x))
    z = _difference(x, keep, first, how.unit)  # not in `combine`, where XLA would square before it scales
    w = jnp.broadcast_to(_weight(weights, n), x.shape)

    def combine(a, b):
        (n_a, mean_a, m2_a), (n_b, mean_b, m2_b) = a, b
        total = n_a + n_b
        # No jnp.where in here: it is lowered to a call, and an unused reduction with calls crashes XLA's GPU compiler.
        part, gap = n_b / lax.select(total == 0, jnp.ones_like(total), total), mean_b - mean_a
        return total, mean_a + gap * part.astype(gap.dtype), m2_a + m2_b + square(gap) * (n_a * part)

    zero = np.zeros((), n.dtype)
    _, offset, m2 = lax.reduce((w, z, jnp.zeros_like(w)), (zero, np.zeros((), z.dtype), zero), combine, how.axes)
    kept = lambda a: lax.expand_dims(a, how.axes)
    return first, kept(offset) / how.unit, kept(m2)


def statistics_of_output(x: Array, mask: Array | None, weights: Array | None, stats: Statistics, how: Reduction):
    """The statistics that y is made of: those kept for the backward pass but for rows on a GPU.

    There `in_kernel` lets XLA make one kernel of them and y, which reads x once: 2 passes at inference, not 3. Where
    statistics are kept as well, those two sets would cost a pass more than one for both.
    """
    if weights is not None or mask is not None or not _is_row(x, how):
        return stats
    alone = lambda x, n, *stats: in_kernel(x, n, how)
    kept = lambda x, n, *stats: stats
    return Statistics(stats.count, *by_platform(how, x, *stats, cuda=alone, rocm=alone, default=kept))


def _is_row(x: Array, how: Reduction) -> bool:
    """Whether XLA's GPU compiler may hold the reduced axes in one block of threads: they are the last, and not long."""
    size = math.prod(x.shape[a] for a in how.axes)
    mine = how.centered and how.axis_name is None and not how.one_pass and not _sharded_axes(x)
    mine = mine and _last(x, how.axes) and not jnp.iscomplexobj(x)
    return mine and known(size) and 0 < size <= _LONGEST_ROW and 0 not in x.shape


def _last(x: Array, axes: tuple[int, ...]) -> bool:
    return axes == tuple(range(x.ndim - len(axes), x.ndim))


def in_kernel(x, n, how: Reduction) -> tuple[Array, Array, Array]:
    """`two_pass` for one kernel of XLA's on a GPU: of a constant row, whose m2 is rounding noise, m2 becomes huge.

    So 1 / sqrt(m2 / n) is 0 in effect. A select, such as `about` has, would have XLA cut the kernel in three.
    """
    x = x.astype(accumulator(x))
    over = lambda a: a.sum(how.axes, keepdims=True)
    shift = over(x) / n
    d = x - shift
    offset = over(d) / n
    correction = n * square(offset * how.unit)
    m2 = over(square(d * how.unit)) - correction
    constant = jnp.minimum(jnp.maximum(2.0**-18 * correction - m2, 0.0) * 2.0**126, 1.0)  # 0 or 1
    return shift, offset, jnp.maximum(m2, 0.0) + constant * 2.0**120


def _weight(weights: Array | None, n: Array) -> Array:
    return jnp.ones((1,) * n.ndim, n.dtype) if weights is None else weights.astype(n.dtype)


def _difference(x: Array, keep: Array | None, shift: Array | None, unit: float = 1.0) -> Array:
    """unit * (x - shift) in the accumulator's dtype, and 0 where an element is absent, whatever stood there."""
    scaled = lambda a: a if unit == 1.0 else a * unit
    x = scaled(x.astype(accumulator(x)))
    d = x if shift is None else x - scaled(shift)
    return d if keep is None else jnp.where(keep, d, 0.0)


def _pilot(x: Array, axes: tuple[int, ...]) -> Array | None:
    """The mean of some 64 elements of each column, evenly spaced: the differences to it lose nothing when squared.

    Taken by splitting axes, not by slicing them, so that of a sharded axis every device samples its own part. None
    where sizes without divisors leave so few elements that a single outlier among them could spoil the sums, and where
    sizes are unknown.
    """
    if not known(*(x.shape[a] for a in axes)):
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
    return block.astype(accumulator(x)).mean(axes, keepdims=True)


def _sharded_axes(x: Array) -> list[int]:
    """The axes that are sharded as far as types tell, which they do on Explicit meshes."""
    return [a for a, name in enumerate(jax.typeof(x).sharding.spec) if name is not None]


def largest(x: Array, keep: Array, axes: tuple[int, ...]) -> Array:
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
