"""Norms of the nodes of graphs: each channel by statistics of the nodes of its graph, which carry the same id."""

from __future__ import annotations

from typing import Any

import jax
from jax.typing import ArrayLike

from .._core.arrays import align_segment_ids, as_float_array
from .._core.checks import canonicalize_flags
from .._core.over import Segments
from .._core.types import Reduction
from .by_segments import normalize_segments, takes_segments
from .elementwise import Whole, by_statistics, normalize_by_statistics

Array = jax.Array


def normalize_nodes(
    norm: str, f: Any, x: ArrayLike, segment_ids: ArrayLike, own: dict[str, Any], scale, bias, *, num_segments,
    indices_are_sorted, is_affine: bool = True, **options,
) -> Array:  # fmt: skip
    """y = f(x, statistics, affine, epsilon, *own) of x (nodes, ..., C), with statistics of each channel and graph.

    `is_affine`: y is affine in x, for given statistics and parameters, as kernels want it.
    """
    x = as_float_array(norm, x, rank=2, layout="(nodes, ..., channels)")
    ids, rows, number = align_segment_ids(norm, x, segment_ids, num_segments)
    beside = tuple(range(rows, x.ndim - 1))
    over = Segments(number, beside, rows, *canonicalize_flags(norm, indices_are_sorted=indices_are_sorted))
    by = _by_kernels if is_affine and options["mask"] is None else by_statistics
    options |= dict(segments=(over, ids), by=by)
    return normalize_by_statistics(norm, f, x, own, scale, bias, beside, (x.ndim - 1,), **options)


def _by_kernels(f: Whole, reduction: Reduction, dtype, x: Array, mask, weights, params, ids) -> Array:
    """By kernels where there are some. The mask is that of ids alone."""
    if takes_segments(f.plan, x, params):
        return normalize_segments(f, x, params, ids)
    return by_statistics(f, reduction, dtype, x, mask, weights, params, ids)
