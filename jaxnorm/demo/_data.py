"""The digits of scikit-learn: 1,797 real images, standardized pixel by pixel, in batches whose padding is masked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

import jaxnorm as jn

TRAIN, TEST = 1347, 450  # images


class Batch(NamedTuple):
    """Some images; every size is the same, and what fills up the last one is marked in the mask."""

    images: Any  # (B, 8, 8, 1) float32
    labels: Any  # (B,) int32
    mask: Any  # (B,) bool: False is padding


class Images(NamedTuple):
    images: np.ndarray  # (N, 8, 8, 1) float32
    labels: np.ndarray  # (N,) int32


def load() -> tuple[Images, Images]:
    """The training and the test set, as they come: grey levels 0 to 16. The split is the same in every run."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images, labels = digits.images[..., None].astype(np.float32), digits.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[:TRAIN], order[TRAIN:]
    return Images(images[train], labels[train]), Images(images[test], labels[test])


def pixel_moments(batches: Iterator[Batch]) -> jn.Moments:
    """Count, mean and second moment of every pixel, one batch in memory at a time."""
    total: Any = jn.Moments(0.0, 0.0, 0.0)  # pyright: ignore[reportArgumentType]
    for batch in batches:
        total = jn.merge(total, jn.moments(batch.images, 0, mask=batch.mask))
    return total


def standardized(data: Images, pixels: jn.Moments) -> Images:
    """The images with every pixel's mean taken off and its spread taken out.

    Epsilon is in units of the data squared: one grey level. A pixel that is the same in every training image (there are
    some, in the corners) has no spread to divide by, and so a test image that differs there stays of moderate size.
    """
    images = jn.normalize(data.images, pixels.mean, pixels.var, epsilon=1.0)
    return data._replace(images=np.asarray(images))


def in_order(data: Images, size: int, rows: int, order=None) -> Iterator[Batch]:
    """`size` images at a time, in an array of `rows`: a last partial batch has more padding than the others."""
    order = np.arange(len(data.labels)) if order is None else order
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        filled = lambda a: np.concatenate([a, np.zeros((rows - len(a), *a.shape[1:]), a.dtype)])
        yield Batch(filled(data.images[chosen]), filled(data.labels[chosen]), np.arange(rows) < len(chosen))


def shuffled(data: Images, size: int, rows: int, seed: int) -> Iterator[Batch]:
    """Epoch after epoch without end, each in another order. The same seed gives the same batches."""
    rng = np.random.default_rng(seed)
    while True:
        yield from in_order(data, size, rows, rng.permutation(len(data.labels)))
