"""Faults that show in several norms together: drift of the statistics, growth with depth, gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from .layer import Finding, Layer


def drift(layers: list[Layer]) -> Iterator[Finding]:
    """The first norm by running statistics whose data are others. Those after it follow from it."""
    judged = [layer for layer in layers if layer.evaluates and not layer.untouched]
    for place, layer in enumerate(judged):
        batch = max(layer.what.shape[0], 1)
        noise = 3 / math.sqrt(batch)  # of a batch whose examples are independent
        if layer.drift_mean <= 0.5 + noise and layer.drift_var <= 1 + 2 * noise:
            continue
        off = f"means are {layer.drift_mean:.2g} deviations off, variances by a factor of {2.0**layer.drift_var:.2g}"
        start = share_of_start(judged[0])  # whose data are the same all along, while weights of others change theirs
        if (start := share_of_start(layer) if start is None else start) is not None:
            yield Finding(
                layer.path, "statistics lag",
                f"{start:.0%} of the running statistics are still those of the start; {off}.",
                f"Write {layer.what.kind}(momentum=0.9) for short runs, or models.recompute_stats(apply, variables, "
                "batches).",
            )  # fmt: skip
        elif place == 0:
            yield Finding(
                layer.path, "other data",
                f"The batch is not scaled as the training data were, from the first norm on: {off}.",
                "Write x = (x - mean) / std with the mean and std of the training set, as in training.",
            )  # fmt: skip
        else:
            yield Finding(
                layer.path, "stale statistics",
                f"The weights are not those that the statistics are of, or the data drift: {off}.",
                "Write models.recompute_stats(apply, variables, batches), as after averaging weights.",
            )  # fmt: skip
        return


def share_of_start(layer: Layer) -> float | None:
    """The w of running = w * start + (1 - w) * batch, by the mean and variance of all channels; None if no w fits."""
    m = layer.m
    deviation = np.sqrt(m.batch_var + 1e-30)
    of_mean, of_var = np.abs(m.batch_mean) > 0.2 * deviation, np.abs(1 - m.batch_var) > 0.2
    if of_var.sum() < 2:
        return None
    w = (m.running_var[of_var] - m.batch_var[of_var]) / (1 - m.batch_var[of_var])
    start, low, high = np.percentile(w, [50, 25, 75])
    fits = 0.1 < start < 0.98 and high - low < 0.15
    if fits and of_mean.sum() >= 2:
        of_batch = np.median(m.running_mean[of_mean] / m.batch_mean[of_mean])
        fits = abs(of_batch - (1 - start)) < 0.5 * (1 - start)
    return float(start) if fits else None


def growth(layers: list[Layer]) -> Iterator[Finding]:
    """A mean square that grows as a power of depth, as it does in a stream that nothing normalizes: in its second half
    8 times, where sums of branches that do not grow themselves make it 2 to 4."""
    for series in alike(layers):
        square = np.array([layer.m.square for layer in series])
        half = square[len(series) // 2 :]
        rises = len(series) >= 4 and square.min() > 0 and bool((half[1:] > 0.9 * half[:-1]).all())
        if rises and square[-1] > 100 * square[0] and half[-1] > 8 * half[0]:
            yield Finding(
                series[-1].path, "variance grows with depth",
                f"The mean square of the input grows from {square[0]:.2g} to {square[-1]:.2g} in {len(series)} norms.",
                "Write h = jn.rms_norm_add(branch, h, scale), which normalizes what is added, or "
                "branch / sqrt(2 * layers), and a norm after the last block.",
            )  # fmt: skip


def gradients(layers: list[Layer]) -> Iterator[Finding]:
    """A gradient of scale that changes as a power of depth. One of 0 is that of a branch that starts at 0."""
    for layer in layers:
        if np.isinf(layer.m.gradient_rms):
            yield Finding(
                layer.path, "gradient explodes", "The gradient of its scale is not finite.",
                "Write optax.clip_by_global_norm(1.0) before the optimizer, or scale the loss.",
            )  # fmt: skip
            return
    for series in alike([layer for layer in layers if 0 < layer.m.gradient_rms < np.inf]):
        logs = np.log10([layer.m.gradient_rms for layer in series])
        if len(series) < 4 or np.ptp(logs) < 3 or abs(np.corrcoef(logs, np.arange(len(logs)))[0, 1]) < 0.9:
            continue
        times, many = f"{10.0 ** abs(logs[-1] - logs[0]):.1g}", len(series)
        if logs[0] > logs[-1]:
            yield Finding(
                series[0].path, "gradient explodes",
                f"On its way back through {many} norms the gradient of scale grows {times} times.",
                "Write optax.clip_by_global_norm(1.0) before the optimizer, and branch / sqrt(2 * layers) in the sums.",
            )  # fmt: skip
        else:
            yield Finding(
                series[0].path, "gradient vanishes",
                f"On its way back through {many} norms the gradient of scale shrinks {times} times.",
                "Write h = h + f(norm(h)), a norm before each branch and none on the stream, or lower the rate.",
            )  # fmt: skip


def alike(layers: list[Layer]) -> list[list[Layer]]:
    """The norms of one kind and width, in the order of the calls."""
    found: dict[tuple[str, int], list[Layer]] = {}
    for layer in layers:
        found.setdefault((layer.what.kind, layer.what.shape[-1]), []).append(layer)
    return list(found.values())
