"""What is wrong with a model, from what was measured of its norms: one function for each kind of fault."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from .layer import Finding, Layer
from .trends import drift, gradients, growth

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
    elif layer.evaluates and layer.untouched:
        yield Finding(
            layer.path, "never updated", "Its running statistics are those of the start: mean 0, variance 1.",
            "Write y, state = norm.apply(params, state, x, train=True) in training and keep the state "
            '(mutable=["batch_stats"] in linen).',
        )  # fmt: skip


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


def _percent(share: float) -> str:
    return f"{100 * float(share):.3g} %"
