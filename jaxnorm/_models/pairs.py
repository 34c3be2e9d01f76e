"""Which weights a factor and a shift of each channel can go into: those that make an array, or all that read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NoReturn

import numpy as np

from .graph import Graph, Step, Value
from .moved import REARRANGE, back, chain, collapsed, fit, leaf_of, on, rearranged, through
from .weighted import WEIGHTED, made_of_shift, of_inputs, of_outputs, pads_with_zeros

ADD = ("add", "add_any")


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
            bias, steps, value = _bias(step) or _left("its input is a sum that adds no bias")
            of_bias = through(steps, fit(factor, bias.shape))
            moved = None if over is None else through(steps, fit(over, bias.shape))
            if of_bias is None or (moved is None and over is not None):
                raise Left("the bias before it is not one of its channels")
            edits.changes.append((leaf_of(bias, steps), of_bias, moved))
            over = None
        elif step.name in WEIGHTED:
            break
        elif step.name in REARRANGE or step.name == "slice":
            moved, left, value = back(step, factor), None if over is None else back(step, over), step.ins[0]
            if moved is None or (left is None and over is not None):
                raise Left(f"its channels are mixed by {_named(step)}")
            factor, over = moved, left
        else:
            raise Left(f"its input comes from {_named(step)}")
    weight, steps = _weight_that_makes(step)
    of_weights = lambda a: of_outputs(step, step.ins.index(weight), a)
    of_weight = through(steps, of_weights(factor))
    if of_weight is None:
        raise Left(f"its channels are not those that {_named(step)} makes")
    leaf, biased = leaf_of(weight, steps), bool(edits.changes)
    edits.changes.append((leaf, of_weight, None))
    fits = not biased and can_make(leaf) and (over is None or of_weights(over) is not None)
    if not biased and can_make(leaf):
        edits.made[leaf] = (collapsed(factor), collapsed(over) if fits and over is not None else np.zeros(()))
    edits.over = None if over is None or fits else shift
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
        if by is not None and np.ndim(by) == 0 and np.isrealobj(by):
            by = np.asarray(by, float)
            return factor, shift * by if step.name == "mul" else shift / by
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
    of_weight = through(steps, of_inputs(step, at, factor))
    if of_weight is None:
        raise Left(f"{_named(step)} does not sum over its channels alone")
    leaf = leaf_of(weight, steps)
    edits.changes.append((leaf, of_weight, None))
    if not shift.any():
        return
    if step.name == "conv_general_dilated" and pads_with_zeros(step):
        raise Left("the convolution that reads it is padded with zeros, where its shift would be missing")
    made = made_of_shift(step, at, shift, rearranged(steps, leaves(leaf)))
    if made is None:
        raise Left(f"{_named(step)} does not sum over its channels alone")
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
    """The bias that an addition adds to `of`, the steps to its leaf, and what it is added to. None if there is none."""
    for n in (1, 0):
        bias, value = step.ins[n], step.ins[1 - n]
        if of in (None, value) and value.shape == step.outs[0].shape and (steps := chain(bias)) is not None:
            return bias, steps, value
    return None


def _left(why: str) -> NoReturn:
    raise Left(why)


def _weight_that_makes(step: Step) -> tuple[Value, list]:
    for weight in step.ins[:0:-1] if step.name == "conv_general_dilated" else step.ins[::-1]:
        steps = chain(weight)
        if steps is not None:
            return weight, steps
    raise Left(f"the weights of {_named(step)} are not one array of the variables, used once")


def _named(step: Step) -> str:
    return {"conv_general_dilated": "a convolution", "dot_general": "a dense layer"}.get(step.name, f"`{step.name}`")
