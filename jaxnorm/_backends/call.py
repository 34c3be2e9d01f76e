"""One use of a fused primitive: everything static about it, and its optional operands packed and unpacked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from .._core.over import Axes
from .._core.types import Plan

Array = jax.Array
Shape = tuple[int, ...]

# The operands of the three primitives, in order; an absent one is None. All have x's rank. A mask and weights broadcast
# to x; the count of a statistic is an operand where there are such, and a constant elsewhere.
# Those of backends that add a residual first: backward then gets the stream as x, and that stream's own cotangent.
FORWARD = ("x", "scale", "bias", "mask", "weights")
TANGENT = ("x", "count", "mean_hi", "mean_lo", "m2", "scale", "mask", "weights", "dx", "dscale", "dbias")
BACKWARD = ("x", "count", "mean_hi", "mean_lo", "m2", "scale", "g", "mask", "weights")
FORWARD_OF_SUM, BACKWARD_OF_SUM = (*FORWARD, "residual"), (*BACKWARD, "g_stream")
QUANTIZE = ("x", "scale", "bias", "given")  # given: the scale of a tensor, where the format has one
_PARAMETERS = frozenset({"scale", "bias", "dscale", "dbias", "given"})  # these broadcast against x


@dataclass(frozen=True)
class Call:
    """What is static about one use of a primitive."""

    plan: Plan
    operand_names: tuple[str, ...]  # of those that are given
    # Of backward: the shapes of scale and bias where their gradients are wanted.
    grad_shapes: tuple[Shape | None, Shape | None] = (None, None)
    of_sum: bool = False  # of tangent: x is a residual stream, whose tangent comes out beside that of y

    def of(self, name: str, operands: Sequence) -> Any:
        """The operand of that name, or None."""
        return operands[self.operand_names.index(name)] if name in self.operand_names else None

    def unpacked(self, operands: Sequence, order: tuple[str, ...]) -> list[Any]:
        """All operands in order, None for those that are absent."""
        there = dict(zip(self.operand_names, operands, strict=True))
        return [there.get(name) for name in order]

    def normalized(self, operands: Sequence) -> Any:
        """What is normalized, or an array of its shape and dtype: the stream, if x is added to one."""
        residual = self.of("residual", operands)
        return operands[0] if residual is None else residual

    @property
    def is_weighted(self) -> bool:
        """Whether elements count differently, so that each statistic has a count of its own."""
        return "mask" in self.operand_names or "weights" in self.operand_names

    def masks_rows(self, operands: Sequence) -> bool:
        """Whether the elements of a statistic count alike: all of them, or none."""
        axes, x, mask = self.plan.reduction.axes, operands[0], self.of("mask", operands)
        return "weights" not in self.operand_names and (mask is None or is_of_rows(mask, x, axes))

    def is_parameter(self, i: int) -> bool:
        return self.operand_names[i] in _PARAMETERS

    def broadcasts(self, i: int) -> bool:
        """Whether an operand may have size 1 where x has not, beside the axes reduced."""
        return self.is_parameter(i) or self.operand_names[i] in ("mask", "weights")

    def varying(self, operands: Sequence) -> frozenset[int]:
        """The axes along which parameters, or the gradients wanted of them, have more than one value."""
        shapes = [a.shape for i, a in enumerate(operands) if self.is_parameter(i)]
        shapes += [s for s in self.grad_shapes if s is not None]
        return frozenset(a for shape in shapes for a, n in enumerate(shape) if n != 1)

    def over(self, names: tuple[str, ...]) -> Call:
        """The same with its statistics over the devices along these mesh axes as well."""
        return replace(self, plan=replace(self.plan, reduction=replace(self.plan.reduction, axis_name=names)))

    def without(self, operands: Sequence, *names: str) -> tuple[Call, list]:
        """The call without these operands."""
        there = [(n, a) for n, a in zip(self.operand_names, operands, strict=True) if n not in names]
        return replace(self, operand_names=tuple([n for n, _ in there])), [a for _, a in there]

    def batched(self, size: int) -> Call:
        """The call with a leading batch axis of the given size."""
        reduction = replace(self.plan.reduction, over=Axes(tuple(a + 1 for a in self.plan.reduction.axes)))
        first, second = (None if s is None else (size, *s) for s in self.grad_shapes)
        return replace(self, plan=replace(self.plan, reduction=reduction), grad_shapes=(first, second))


def is_of_rows(mask, x, axes: tuple[int, ...]) -> bool:
    """Whether a mask, of x's rank, is constant over what is reduced."""
    return all([mask.shape[a] == 1 or x.shape[a] == 0 for a in axes])


def packed(order: tuple[str, ...], operands: Sequence) -> tuple[tuple[str, ...], list]:
    """The names and values of the operands that are there."""
    there = [(name, a) for name, a in zip(order, operands, strict=True) if a is not None]
    return tuple([name for name, _ in there]), [a for _, a in there]


def varying_axes(*parameters: Array | None) -> frozenset[int]:
    """The axes along which a scale or a bias, of x's rank, has more than one value."""
    return frozenset([a for p in parameters if p is not None for a, size in enumerate(p.shape) if size != 1])
