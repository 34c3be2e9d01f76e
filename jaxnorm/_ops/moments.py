"""Moments: the algebra of count, mean and second moment under masks, weights, merging and devices.

Legend: x is any shape; "reduced" means x's shape without `axes`; w is a weight per element, 1 where none is given.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from .._backends.select import check_implementation
from .._core.arrays import align_boolean_mask, align_weights, as_float_array, canonicalize_axes
from .._core.checks import canonicalize_groups, check_axis_name
from .._core.collectives import combine, merge_over_devices
from .._core.explain import explained
from .._core.masks import finite_padding
from .._core.messages import shown
from .._core.over import Axes
from .._core.program import as_program
from .._core.types import AxisName, Groups, Moments, Reduction, Statistics
from .._core.vma import broadcast_like
from .statistics import statistics

_PLAIN = Reduction(Axes(()))  # how `Moments` are kept: with a prescale of 1


@explained("function")
@functools.partial(as_program, static=("axes",))
def moments(
    x: ArrayLike,
    axes: int | Sequence[int] | None = None,
    *,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    implementation: str | None = None,
) -> Moments:
    """Count, mean and second moment of `x` over `axes`.

        count = sum(w);   mean = sum(w x) / count;   m2 = sum(w |x - mean|**2)

    computed about a shift near the mean, never as E[x^2] - E[x]^2, so they are exact to rounding whatever the mean.

    Args:
      x: array of any shape and dtype; integers are promoted to float32.
      axes: the axes to reduce, an int or several; None is all of them.
      mask: True where an element counts. Broadcasts to x, or covers its leading axes.
      weights: a float weight >= 0 per element, shaped as a mask may be. Differentiable. Negative ones are refused,
        unless they are traced; then the result means nothing.
      implementation: "xla", or None for it, or "lax"; see `jaxnorm.backends`.

    Returns:
      `Moments` in float32 or wider, each of x's shape without `axes`.

    Raises:
      ValueError: an axis out of range, a mask that fits x nowhere, or another implementation.

    Source: Chan, Golub, LeVeque, "Algorithms for computing the sample variance" (1983).

    >>> import jaxnorm as jn, numpy as np
    >>> count, mean, m2 = jn.moments(np.array([1., 2., 3., 99.]), mask=np.array([True, True, True, False]))
    >>> float(count), float(mean), float(m2)
    (3.0, 2.0, 2.0)
    """
    x = as_float_array("moments", x)
    axes = canonicalize_axes("moments", x.ndim, tuple(range(x.ndim)) if axes is None else axes, what="axes")
    x, mask = align_boolean_mask("moments", x, mask)
    weights = align_weights("moments", x, weights)
    x = finite_padding(x, mask, weights)
    check_implementation("moments", implementation)
    if implementation not in (None, "xla", "lax"):
        raise ValueError(f'moments: implementation={implementation!r} has no moments. Write "xla", "lax", or None.')
    return _as_moments(statistics(Reduction(Axes(axes), plain=implementation == "lax"), x, mask, weights), axes)


@explained("function")
@as_program
def merge(a: Moments, b: Moments) -> Moments:
    """The moments of two sets together: associative, commutative, with `Moments(0., 0., 0.)` as identity.

        n = n_a + n_b;  d = mean_b - mean_a;  mean = mean_a + d n_b / n;  m2 = m2_a + m2_b + |d|**2 n_a n_b / n

    Args:
      a: moments of any shape that broadcasts against b's.
      b: the others.

    Source: Chan, Golub, LeVeque (1979), "Updating formulae and a pairwise algorithm for computing sample variances".

    >>> import jaxnorm as jn, numpy as np
    >>> a, b = jn.moments(np.array([1., 2.])), jn.moments(np.array([6.]))
    >>> [float(part) for part in jn.merge(a, b)]
    [3.0, 3.0, 14.0]
    """
    a, b = _checked_moments("merge", a), _checked_moments("merge", b)
    stacked = (jnp.stack(jnp.broadcast_arrays(jnp.asarray(p), jnp.asarray(q))) for p, q in zip(a, b, strict=True))
    return _as_moments(combine(_as_statistics(Moments(*stacked)), _PLAIN))


@explained("function")
@as_program
def merge_across(m: Moments, axis_name: AxisName, axis_index_groups: Groups | None = None) -> Moments:
    """`merge` over the devices of a named axis of pmap, shard_map or vmap: each gets the moments of all their data.

    One all-reduce while every device can have a slot of its own in it (1 MiB in all), two beyond that: first for a
    common shift, then for the sums about it. Never an average of averages: uneven and empty shards count as they are.

    Args:
      m: this device's moments.
      axis_name: a mapped axis, or several.
      axis_index_groups: lists of indices along the axis; each group merges on its own. Every index in one of them.

    Raises:
      NameError: no such axis name is bound here.
      ValueError: the groups do not cover every index once.

    >>> import jax, jaxnorm as jn, numpy as np
    >>> shards = np.array([[1., 2., 3.], [7., 7., 7.]])
    >>> both = jax.vmap(lambda x: jn.merge_across(jn.moments(x), "devices"), axis_name="devices")(shards)
    >>> both.mean.tolist(), both.count.tolist()
    ([4.5, 4.5], [6.0, 6.0])
    """
    m = _checked_moments("merge_across", m)
    check_axis_name("merge_across", axis_name)
    return _as_moments(
        merge_over_devices(_as_statistics(m), axis_name, canonicalize_groups("merge_across", axis_index_groups), _PLAIN)
    )


def _checked_moments(name: str, m: Moments) -> Moments:
    """Running statistics have three fields as well."""
    if isinstance(m, Mapping) or getattr(m, "_fields", Moments._fields) != Moments._fields:
        write = "jaxnorm.Moments(**m)" if isinstance(m, Mapping) else "jaxnorm.moments(x, axes)"
        raise TypeError(f"{name}: needs jaxnorm.Moments, got {shown(m)}. Write {write}.")
    return m


def _as_moments(s: Statistics, axes: tuple[int, ...] = ()) -> Moments:
    mean = s.mean_hi + s.mean_lo
    dropped = lambda a: lax.squeeze(broadcast_like(mean, a), axes)
    return Moments(dropped(s.count), dropped(mean), dropped(s.m2))


def _as_statistics(m: Moments) -> Statistics:
    count, mean, m2 = (jnp.asarray(a) for a in m)
    return Statistics(count, mean, jnp.zeros_like(mean), m2)
