"""Which weights a factor and a shift of each channel can go into: those that make an array, or all that read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from .graph import Graph, Step, Value
from .moved import REARRANGE, back, chain, fit, leaf_of, on, rearranged, through

ADD, WEIGHTED = ("add", "add_any"), ("conv_general_dilated", "dot_general")


class Left(Exception):
    """Why a norm is left as it is."""


@dataclasses.dataclass
class Edits:
    """The leaves to change: `leaf * factor + shift`. `made` has new biases, by the leaf of the weights they belong to.

    `over` is what of the shift has found no place.
    """

    changes: list[tuple[int, np.ndarray | None, np.ndarray | None]] = dataclasses.field(default_factory=list)
    made: dict[int, tuple[np.ndarray | None, np.ndarray]] = dataclasses.field(default_factory=dict)
    over: np.ndarray | None = None


Leaves = Callable[[int], np.ndarray]
CanMake = Callable[[int], bool]


def before(norm: Step, factor: np.ndarray, shift: np.ndarray, can_make: CanMake) -> Edits:
    """Into the weights that make the norm's input, and their bias."""
    edits, value, over = Edits(), norm.ins[0], shift if shift.any() else None
    while True:
        step = value.made
        if step is None:
            raise Left("its input is that of the model")
        if value.only_reader is None:
            raise Left(f"its input, from {_named(step)}, has other readers")
        if step.name in ADD:
            bias, steps, value = _bias(step)
            of_bias = through(steps, fit(factor, bias.shape))
            moved = None if over is None else through(steps, fit(over, bias.shape))
            if of_bias is None or (moved is None and over is not None):
                raise Left("the bias before it is not one of its channels")
            edits.changes.append((leaf_of(bias, steps), of_bias, moved))
            over = None
        elif step.name in WEIGHTED:
            break
        elif step.name in REARRANGE or step.name == "slice":
            moved, value = [a if a is None else back(step, a) for a in (factor, over)], step.ins[0]
            if moved[0] is None or (moved[1] is None and over is not None):
                raise Left(f"its channels are mixed by {_named(step)}")
            factor, over = moved
        else:
            raise Left(f"its input comes from {_named(step)}")
    weight, steps = _weight_that_makes(step)
    of_weight = through(steps, _of_outputs(step, step.ins.index(weight), factor))
    if of_weight is None:
        raise Left(f"its channels are not those that {_named(step)} makes")
    leaf = leaf_of(weight, steps)
    edits.changes.append((leaf, of_weight, None))
    if len(edits.changes) == 1:  # no bias
        if can_make(leaf):
            edits.made[leaf] = (factor, np.zeros_like(factor) if over is None else over)
        else:
            edits.over = None if over is None else shift
    return edits


def after(graph: Graph, norm: Step, factor: np.ndarray, shift: np.ndarray, leaves: Leaves, can_make: CanMake) -> Edits:
    """Into the weights of all that read the norm's output, and their biases."""
    edits, carried = Edits(), {id(norm.outs[0]): (norm.outs[0], factor, shift)}
    for step in graph.steps:
        at = [n for n, value in enumerate(step.ins) if id(value) in carried]
        if not at:
            continue
        given = [carried[id(step.ins[n])] for n in at]
        if step.name in WEIGHTED and len(at) == 1:
            _into(step, at[0], *given[0][1:], edits, leaves, can_make)
            continue
        for out in step.outs:
            carried[id(out)] = (out, *_through_one(graph, step, at, given))
    if any(value.returned for value, *_ in carried.values()):
        raise Left("the model returns its output")
    if not edits.changes:
        raise Left("nothing reads its output")
    return edits


def _through_one(graph: Graph, step: Step, at, given) -> tuple[np.ndarray, np.ndarray]:
    """The factor and shift of what a step makes of arrays that have one."""
    _, factor, shift = given[0]
    if step.name == "concatenate" and len(at) == len(step.ins):
        axis = step.params["dimension"]
        alike = all(np.array_equal(f, factor) and np.array_equal(s, shift) for _, f, s in given)
        if alike and factor.shape[axis] == shift.shape[axis] == 1:
            return factor, shift
    elif at == [0] and (step.name in REARRANGE or step.name in ("slice", "dynamic_slice", "split", "pad")):
        if step.name == "pad" and shift.any():
            raise Left("its output is padded, where its shift would be missing")
        moved = on(step, factor), on(step, shift)
        if moved[0] is not None and moved[1] is not None:
            return moved[0], moved[1]
    elif at == [0] and step.name == "reduce_sum":
        axes = tuple(step.params["axes"])
        if all(factor.shape[a] == shift.shape[a] == 1 for a in axes):
            count = np.prod([step.ins[0].shape[a] for a in axes])
            return factor.squeeze(axes), shift.squeeze(axes) * count
    elif len(at) == 1 and step.name in ("mul", "div") and (at == [0] or step.name == "mul"):
        by = step.ins[1 - at[0]].constant
        if by is not None and np.ndim(by) == 0:
            return factor, shift * float(by) if step.name == "mul" else shift / float(by)
    who = "another norm" if graph.opaque in str(step.params.get("name", "")) else _named(step)
    raise Left(f"its output is read by {who}")


def _into(step: Step, at: int, factor, shift, edits: Edits, leaves: Leaves, can_make: CanMake) -> None:
    """Add the changes to the weights of one step that reads an array of this factor and shift."""
    if step.name == "conv_general_dilated" and at == 1:
        raise Left("its output is the kernel of a convolution")
    weight = step.ins[1 - at]
    steps = chain(weight)
    if steps is None:
        raise Left(f"the weights of {_named(step)} are not one array of the variables, used once")
    of_weight = through(steps, _of_inputs(step, at, factor))
    if of_weight is None:
        raise Left(f"{_named(step)} does not sum over its channels alone")
    leaf = leaf_of(weight, steps)
    edits.changes.append((leaf, of_weight, None))
    if not shift.any():
        return
    made = _made_of_shift(step, at, shift, rearranged(steps, leaves(leaf)))
    value, moved = step.outs[0], made
    while (reader := value.only_reader) is not None and moved is not None:
        if reader.name in ADD and (found := _bias(reader, value)) is not None:
            bias, steps, _ = found
            moved = through(steps, fit(moved, bias.shape))
            if moved is None:
                break
            edits.changes.append((leaf_of(bias, steps), None, moved))
            return
        if reader.name not in REARRANGE:
            break
        value, moved = reader.outs[0], on(reader, moved)
    if not can_make(leaf):
        raise Left(f"{_named(step)} has no bias to take its shift")
    edits.made[leaf] = (None, made)


def _bias(step: Step, of: Value | None = None):
    """The bias that an addition adds, the steps to its leaf, and what it is added to. None if it is not added to `of`."""
    for n in (1, 0):
        bias, value = step.ins[n], step.ins[1 - n]
        if of in (None, value) and value.shape == step.outs[0].shape and (steps := chain(bias)) is not None:
            return bias, steps, value
    if of is None:
        raise Left("its input is a sum that adds no bias")
    return None


def _weight_that_makes(step: Step) -> tuple[Value, list]:
    for weight in step.ins[:0:-1] if step.name == "conv_general_dilated" else step.ins[::-1]:
        steps = chain(weight)
        if steps is not None:
            return weight, steps
    raise Left(f"the weights of {_named(step)} are not one array of the variables, used once")


def _dot_axes(step: Step, weight: int):
    """Of the weights and of the other operand of a dot product: batch axes, contracted axes, free axes."""
    contract, batch = step.params["dimension_numbers"]
    of = lambda n: (tuple(batch[n]), tuple(contract[n]), tuple(
        a for a in range(len(step.ins[n].shape)) if a not in batch[n] and a not in contract[n]))  # fmt: skip
    return of(weight), of(1 - weight)


def _spec(step: Step):
    return step.params["dimension_numbers"]


def _of_outputs(step: Step, weight: int, factor: np.ndarray) -> np.ndarray | None:
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


def _of_inputs(step: Step, at: int, factor: np.ndarray) -> np.ndarray | None:
    """The factor of the weights, from one of what they are applied to."""
    other = step.ins[at].shape
    if step.name == "conv_general_dilated":
        if step.params["batch_group_count"] != 1:
            return None
        spec, channel = _spec(step), _spec(step).lhs_spec[1]
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
    """A factor of the input channels of a convolution, for each element of its kernel: groups read channels of theirs."""
    spec, kernel = _spec(step), step.ins[1].shape
    out_axis, in_axis = spec.rhs_spec[:2]
    groups = step.params["feature_group_count"]
    channels = np.broadcast_to(a.reshape(-1), step.ins[0].shape[spec.lhs_spec[1]]).reshape(groups, 1, kernel[in_axis])
    each = np.broadcast_to(channels, (groups, kernel[out_axis] // groups, kernel[in_axis]))
    each = each.reshape(kernel[out_axis], kernel[in_axis])
    return _placed(each, (0, 1), (out_axis, in_axis), len(kernel))


def _made_of_shift(step: Step, at: int, shift: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """What the weights make of a shift of their input: it is added to all that they make."""
    out = len(step.outs[0].shape)
    if step.name == "conv_general_dilated":
        padded = any(n > 0 for pair in step.params["padding"] for n in pair)
        if padded or any(n != 1 for n in step.params["lhs_dilation"]):
            raise Left("the convolution that reads it is padded with zeros, where its shift would be missing")
        spec = _spec(step)
        fitting = fit(shift, tuple(n if a == spec.lhs_spec[1] else 1 for a, n in enumerate(step.ins[0].shape)))
        assert fitting is not None
        sums = (weight * _by_output(step, fitting)).sum(tuple(a for a in range(weight.ndim) if a != spec.rhs_spec[0]))
        return sums.reshape([-1 if a == spec.out_spec[1] else 1 for a in range(out)])
    (batch, contract, free), (batch_of, contract_of, free_of) = _dot_axes(step, 1 - at)
    theirs = (*batch_of, *contract_of)
    fitting = fit(shift, tuple(n if a in theirs else 1 for a, n in enumerate(step.ins[at].shape)))
    if fitting is None:
        raise Left(f"{_named(step)} does not sum over its channels alone")
    sums = (weight * _placed(fitting, theirs, (*batch, *contract), weight.ndim)).sum(contract, keepdims=True)
    ones = (1,) * len(free_of)
    sums = sums.transpose(*batch, *free, *contract).reshape([weight.shape[a] for a in (*batch, *free)])
    left = [weight.shape[a] for a in batch]
    right = [weight.shape[a] for a in free]
    return sums.reshape(*left, *(ones if at == 0 else ()), *right, *(ones if at == 1 else ()))


def _named(step: Step) -> str:
    return {"conv_general_dilated": "a convolution", "dot_general": "a dense layer"}.get(step.name, f"`{step.name}`")
