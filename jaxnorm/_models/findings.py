"""What is wrong with a model, from what was measured of its norms: one function for each kind of fault."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .measure import About, Measured


class Finding(NamedTuple):
    """One fault: where it is, its name, what was seen, and the line to write."""

    path: str
    fault: str
    says: str
    write: str

    def __str__(self) -> str:
        return f"{self.path}: {self.fault}. {self.says} {self.write}"


class Layer(NamedTuple):
    """One call of a norm, in NumPy."""

    path: str
    what: About
    m: Measured

    @property
    def evaluates(self) -> bool:
        """Whether it normalized by its running statistics."""
        return self.what.running and self.m.train == 0

    @property
    def trains(self) -> bool:
        return self.what.running and self.m.train == 1

    @property
    def drift_mean(self) -> float:
        """The root mean square over channels of (batch mean - running mean), in running standard deviations."""
        deviation = np.sqrt(self.m.running_var + (self.what.epsilon or 0.0) + 1e-30)
        with np.errstate(over="ignore"):
            return float(np.sqrt(np.mean(((self.m.batch_mean - self.m.running_mean) / deviation) ** 2)))

    @property
    def drift_var(self) -> float:
        """The median over channels of |log2(batch variance / running variance)|."""
        epsilon = (self.what.epsilon or 0.0) + 1e-30
        with np.errstate(invalid="ignore"):
            logs = np.log2((self.m.batch_var + epsilon) / (self.m.running_var + epsilon))
        return float(np.median(np.abs(logs)))

    @property
    def dead(self) -> np.ndarray:
        """Where a channel of the output is constant beside the others."""
        return self.m.out_var <= 1e-8 * self.m.out_var.max(initial=0.0)

    @property
    def finite(self) -> bool:
        return self.m.nonfinite == 0 and all(np.isfinite(a).all() for a in (self.m.running_mean, self.m.running_var))


FEWEST = 16  # elements of a channel from which the variance of a batch is within about 40 % of the true one
SHARE = 0.1  # of channels or rows, from which on one in ten is more than a stray one
APART = 1e-3  # standard deviations between the running means of devices: rounding is 1e-6
ROWS = ("LayerNorm", "RMSNorm", "AddLayerNorm", "AddRMSNorm", "LayerNormAdd", "RMSNormAdd", "GroupNorm", "InstanceNorm")


def findings(layers: list[Layer], train: bool | None) -> list[Finding]:
    """All faults, in the order of the layers. What follows from NaN in one layer is not said of others."""
    found = [*not_finite(layers)]
    sound = [layer for layer in layers if layer.finite]
    rules = (mode, momentum, apart, empty, small, saturated, dead, epsilon, axis)
    for layer in sound:
        for rule in rules:
            found += rule(layer, train)
    found += [*drift(sound), *growth(sound), *gradients(layers)]
    order = {layer.path: i for i, layer in enumerate(layers)}
    return sorted(found, key=lambda finding: order[finding.path])


def not_finite(layers: list[Layer]) -> Iterator[Finding]:
    for layer in layers:
        if layer.m.nonfinite > 0:
            loss = "Scale the loss, or cast the layer before to bfloat16. " if layer.what.dtype == "float16" else ""
            yield Finding(
                layer.path, "not finite",
                f"{_percent(layer.m.nonfinite)} of its input are NaN or infinite, in no norm before it.",
                f'{loss}Write jax.config.update("jax_debug_nans", True) to see where they come from'
                + (f", and {layer.what.kind}(skip_nonfinite=True) to keep them out of the state." if layer.what.running
                   else "."),
            )  # fmt: skip
            return
        if not layer.finite:
            yield Finding(
                layer.path, "not finite", "Its running statistics are NaN or infinite; its input is not.",
                f"Write {layer.what.kind}(skip_nonfinite=True), and models.recompute_stats for new statistics.",
            )  # fmt: skip
            return


def mode(layer: Layer, train: bool | None) -> Iterator[Finding]:
    if train is False and layer.trains:
        yield Finding(
            layer.path, "training mode at evaluation", "It normalizes by the batch that it is to judge.",
            "Write train=False, use_running_average=True, or model.eval().",
        )  # fmt: skip
    elif train is True and layer.evaluates and not layer.what.frozen:
        yield Finding(
            layer.path, "never updated", "It is in evaluation mode in training, so its statistics stay as they are.",
            "Write train=True, use_running_average=False, or model.train(); or frozen=True if that is meant.",
        )  # fmt: skip
    elif layer.what.momentum == 1.0 and not layer.what.frozen:
        yield Finding(
            layer.path, "never updated", "momentum=1.0 is the weight of the old statistics: no batch changes them.",
            f"Write {layer.what.kind}(momentum=0.9).",
        )  # fmt: skip
    elif layer.evaluates and untouched(layer):
        yield Finding(
            layer.path, "never updated", "Its running statistics are those of the start: mean 0, variance 1.",
            "Write y, state = norm.apply(params, state, x, train=True) in training and keep the state "
            '(mutable=["batch_stats"] in linen).',
        )  # fmt: skip


def untouched(layer: Layer) -> bool:
    return not layer.m.running_mean.any() and bool((layer.m.running_var == 1).all())


def momentum(layer: Layer, train: bool | None) -> Iterator[Finding]:
    value = layer.what.momentum
    if value is not None and value < 0.5 and not layer.what.frozen:
        yield Finding(
            layer.path, "momentum of torch",
            f"momentum={value:g} is here the weight of the old statistics: the last batch is {1 - value:.0%} of them.",
            f"Write {layer.what.kind}(momentum={1 - value:g}).",
        )  # fmt: skip


def apart(layer: Layer, train: bool | None) -> Iterator[Finding]:
    if layer.m.apart > APART:
        names = layer.what.axis_name
        name = repr(names[0] if len(names) == 1 else names)
        yield Finding(
            layer.path, "statistics differ over devices",
            f"Running means of devices are {layer.m.apart:.2g} standard deviations apart.",
            f"Write {layer.what.kind}(axis_name={name}), and state = jn.sync_state(state, {name}) for those there are.",
        )  # fmt: skip


def empty(layer: Layer, train: bool | None) -> Iterator[Finding]:
    if layer.trains and layer.m.empty > 0:
        yield Finding(
            layer.path, "channels without elements",
            f"The mask leaves {_percent(layer.m.empty)} of the channels no element: they return the bias.",
            "Write mask=mask[..., None], which covers the leading axes and no channels, or leave such batches out.",
        )  # fmt: skip


def small(layer: Layer, train: bool | None) -> Iterator[Finding]:
    if layer.trains and layer.m.empty == 0 and layer.m.count < FEWEST:
        names = layer.what.axis_name
        share = f"{layer.what.kind}(axis_name={names[0]!r}) for the statistics of all devices, " if names else ""
        other = "or GroupNorm(group_size=8) or BatchRenorm" if names else "GroupNorm(group_size=8), or BatchRenorm"
        yield Finding(
            layer.path, "small batch",
            f"A channel has {layer.m.count:g} elements, whose variance is off by "
            f"{math.sqrt(2 / max(layer.m.count, 1)):.0%}.",
            f"Write {share}{other}, or use larger batches.",
        )  # fmt: skip


def saturated(layer: Layer, train: bool | None) -> Iterator[Finding]:
    if layer.m.saturated.size and layer.m.saturated.mean() > 0.5:
        yield Finding(
            layer.path, "saturated activation",
            f"{_percent(layer.m.saturated.mean())} of the outputs are where {layer.what.activation} is flat and passes "
            "hardly any gradient.",
            "Write scale_init=nn.initializers.ones, bias_init=nn.initializers.zeros, or a lower rate for scale and bias"
            + (f": the mean |scale| is {np.abs(layer.m.scale).mean():.2g}." if layer.m.scale.size else "."),
        )  # fmt: skip


def dead(layer: Layer, train: bool | None) -> Iterator[Finding]:
    where = layer.dead
    if not where.size or where.mean() - layer.m.empty < SHARE:  # those without elements are another fault
        return
    off = np.abs(layer.m.scale) <= 1e-4 * max(np.abs(layer.m.scale).max(initial=0.0), 1e-30)
    if off.all() and off.size and layer.m.gradient != 0:
        return  # a branch that starts at 0, as ResNets and adaLN have it
    by_scale = off.size == where.size and off[where].mean() > 0.5
    constant = layer.what.running and (layer.m.batch_var[where] == 0).mean() > 0.5
    if by_scale:
        why, write = (
            "its scale is 0",
            "set these scales to 1, and leave scale out of the weight decay (models.decay_mask)",
        )
    elif constant or layer.m.constant > SHARE:
        why, write = "its input is constant there", "look at the layer before, such as ReLUs that are never active"
    else:
        why, write = f"{layer.what.activation} is constant there", "lower the rate, or start the bias at 0"
    yield Finding(
        layer.path, "dead channels", f"{_percent(where.mean())} of its channels are constant: {why}.",
        f"{write[0].upper()}{write[1:]}.",
    )  # fmt: skip


def epsilon(layer: Layer, train: bool | None) -> Iterator[Finding]:
    if layer.m.tiny > SHARE:
        typical = math.exp(min(max(float(layer.m.log_var), -80.0), 80.0))
        better = 10.0 ** math.floor(math.log10(1e-3 * typical))
        units = "channels" if layer.what.running else "rows"
        yield Finding(
            layer.path, "epsilon dominates",
            f"{_percent(layer.m.tiny)} of its {units} have a variance below epsilon={layer.what.epsilon:g}, typically "
            f"{typical:.1g}: they do not come out with variance 1.",
            f"Write {layer.what.kind}(epsilon={better:.0e}), or scale the input.",
        )  # fmt: skip


def axis(layer: Layer, train: bool | None) -> Iterator[Finding]:
    reduces, shape = layer.what.reduces or (), layer.what.shape
    if layer.what.kind in ROWS and 0 in reduces and len(reduces) < len(shape) and shape[0] > 1:
        yield Finding(
            layer.path, "wrong axis",
            f"It normalizes x of shape {shape} over {reduces}: examples of the batch change each other.",
            f"Write {layer.what.kind}(axis=-1), or BatchNorm if that is meant.",
        )  # fmt: skip


def drift(layers: list[Layer]) -> Iterator[Finding]:
    """The first norm by running statistics whose data are others. Those after it follow from it."""
    judged = [layer for layer in layers if layer.evaluates and not untouched(layer)]
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


def _percent(share: float) -> str:
    return f"{100 * float(share):.3g} %"
