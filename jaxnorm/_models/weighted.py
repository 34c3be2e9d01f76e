"""Dense layers and convolutions: a factor or a shift of each channel of what they read or make, as one of the weights.

A factor is a NumPy array that broadcasts to its value, as in `moved`. None is returned where there is none that fits.
"""

from __future__ import annotations

import numpy as np

from .graph import Step
from .moved import fit

WEIGHTED = ("conv_general_dilated", "dot_general")


def pads_with_zeros(step: Step) -> bool:
    """Whether a convolution reads zeros that are not of its input."""
    padded = any(n > 0 for pair in step.params["padding"] for n in pair)
    return padded or any(n != 1 for n in step.params["lhs_dilation"])


def _dot_axes(step: Step, weight: int):
    """Of the weights and of the other operand of a dot product: batch axes, contracted axes, free axes."""
    contract, batch = step.params["dimension_numbers"]
    of = lambda n: (tuple(batch[n]), tuple(contract[n]), tuple(
        a for a in range(len(step.ins[n].shape)) if a not in batch[n] and a not in contract[n]))  # fmt: skip
    return of(weight), of(1 - weight)


def _spec(step: Step):
    return step.params["dimension_numbers"]


def of_outputs(step: Step, weight: int, factor: np.ndarray) -> np.ndarray | None:
    """The factor of the weights, from one of what they make."""
    shape = [1] * len(step.ins[weight].shape)
    if step.name == "conv_general_dilated":
        channel = _spec(step).out_spec[1]
        wanted = tuple(n if a == channel else 1 for a, n in enumerate(step.outs[0].shape))
        fitting = fit(factor, wanted)
        shape[_spec(step).rhs_spec[0]] = -1
        return None if fitting is None else fitting.reshape(shape)
    (batch, _, free), (_, _, others) = _dot_axes(step, weight)
    first = len(batch) + (len(others) if weight else 0)
    axes = (*range(len(batch)), *range(first, first + len(free)))
    fitting = fit(factor, tuple(n if a in axes else 1 for a, n in enumerate(step.outs[0].shape)))
    return None if fitting is None else _placed(fitting, axes, (*batch, *free), len(shape))


def of_inputs(step: Step, at: int, factor: np.ndarray) -> np.ndarray | None:
    """The factor of the weights, from one of what they are applied to."""
    other = step.ins[at].shape
    if step.name == "conv_general_dilated":
        if step.params["batch_group_count"] != 1:
            return None
        channel = _spec(step).lhs_spec[1]
        fitting = fit(factor, tuple(n if a == channel else 1 for a, n in enumerate(other)))
        return None if fitting is None else _by_output(step, fitting)
    (batch, contract, _), (batch_of, contract_of, _) = _dot_axes(step, 1 - at)
    theirs = (*batch_of, *contract_of)
    fitting = fit(factor, tuple(n if a in theirs else 1 for a, n in enumerate(other)))
    if fitting is None:
        return None
    return _placed(fitting, theirs, (*batch, *contract), len(step.ins[1 - at].shape))


def _placed(a: np.ndarray, axes: tuple[int, ...], to: tuple[int, ...], rank: int) -> np.ndarray:
    """Axes of an array, whose others have size 1, as axes of one of another rank."""
    rest = [n for n in range(a.ndim) if n not in axes]
    a = a.transpose(*axes, *rest).reshape([a.shape[n] for n in axes])
    order = sorted(range(len(to)), key=to.__getitem__)
    sizes = [1] * rank
    for n, axis in zip(a.shape, to, strict=True):
        sizes[axis] = n
    return a.transpose(order).reshape(sizes)


def _by_output(step: Step, a: np.ndarray) -> np.ndarray:
    """A factor of a convolution's input channels, as one of its kernel: each group reads channels of its own."""
    spec, kernel = _spec(step), step.ins[1].shape
    out_axis, in_axis = spec.rhs_spec[:2]
    groups = step.params["feature_group_count"]
    channels = np.broadcast_to(a.reshape(-1), step.ins[0].shape[spec.lhs_spec[1]]).reshape(groups, 1, kernel[in_axis])
    each = np.broadcast_to(channels, (groups, kernel[out_axis] // groups, kernel[in_axis]))
    each = each.reshape(kernel[out_axis], kernel[in_axis])
    return _placed(each, (0, 1), (out_axis, in_axis), len(kernel))


def made_of_shift(step: Step, at: int, shift: np.ndarray, weight: np.ndarray) -> np.ndarray | None:
    """What the weights make of a shift of their input: it is added to all that they make."""
    out = len(step.outs[0].shape)
    if step.name == "conv_general_dilated":
        spec = _spec(step)
        fitting = fit(shift, tuple(n if a == spec.lhs_spec[1] else 1 for a, n in enumerate(step.ins[0].shape)))
        if fitting is None:
            return None
        sums = (weight * _by_output(step, fitting)).sum(tuple(a for a in range(weight.ndim) if a != spec.rhs_spec[0]))
        return sums.reshape([-1 if a == spec.out_spec[1] else 1 for a in range(out)])
    (batch, contract, free), (batch_of, contract_of, free_of) = _dot_axes(step, 1 - at)
    theirs = (*batch_of, *contract_of)
    fitting = fit(shift, tuple(n if a in theirs else 1 for a, n in enumerate(step.ins[at].shape)))
    if fitting is None:
        return None
    sums = (weight * _placed(fitting, theirs, (*batch, *contract), weight.ndim)).sum(contract, keepdims=True)
    ones = (1,) * len(free_of)
    sums = sums.transpose(*batch, *free, *contract).reshape([weight.shape[a] for a in (*batch, *free)])
    left = [weight.shape[a] for a in batch]
    right = [weight.shape[a] for a in free]
    return sums.reshape((*left, *(ones if at == 0 else ()), *right, *(ones if at == 1 else ())))
