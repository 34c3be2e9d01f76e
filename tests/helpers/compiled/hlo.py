"""Count kernels, memory traffic and collectives in the optimized HLO text of a compiled program.

The bytes of an instruction are those of its operands and results in main memory. If it reads or writes a slice of an
array, only the slice counts. Arrays in another memory space (`S(1)` is the vector memory of a TPU) cost nothing; an
asynchronous copy between the two costs its end in main memory. Padding to tiles is not counted.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
        "opt-barrier", "add-dependency", "domain"}  # fmt: skip
COLLECTIVES = {"all-reduce", "all-gather", "all-to-all", "ragged-all-to-all", "reduce-scatter", "collective-permute",
               "collective-broadcast"}  # fmt: skip
NO_WORK = {"AllocateBuffer", "ConcatBitcast", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"}

_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.$~-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.$~-]+) = ")
_NAME = re.compile(r"%([\w.$~-]+)")


def main_memory_bytes(type_text: str) -> int:
    """The bytes of all arrays of a type that are in main memory."""
    total = 0
    for dtype, sizes, layout in _SHAPE.findall(type_text):
        width = 8 if dtype == "pred" else int(re.search(r"\d+", dtype).group()) if re.search(r"\d", dtype) else 0
        if re.search(r"S\([1-9]", layout):
            continue
        count = 1
        for n in sizes.split(","):
            count *= int(n.lstrip("<=")) if n else 1
        total += count * width // 8
    return total


@dataclass
class Instruction:
    name: str
    type: str
    opcode: str
    operands: list[str]
    rest: str  # attributes
    root: bool

    @cached_property
    def bytes(self) -> int:
        return main_memory_bytes(self.type)

    def attribute(self, name: str) -> list[str]:
        """The computations named by an attribute, one or a list."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|%?[\w.$~-]+)", self.rest)
        return [] if found is None else re.findall(r"%?([\w.$~-]+)", found.group(1))


Computation = dict[str, Instruction]


def parsed(text: str) -> tuple[str, dict[str, Computation]]:
    """The name of the entry computation, and all computations by name."""
    entry, computations, current = "", {}, {}
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        head = _HEAD.match(line)
        if head:
            current = computations.setdefault(head.group(2), {})
            entry = head.group(2) if head.group(1) else entry
            continue
        start = _INSTRUCTION.match(line)
        if start:
            body = line[start.end() :]
            type_text, body = _split(body) if body.startswith("(") else body.split(" ", 1)
            opcode, body = body.strip().split("(", 1)
            operands, rest = _split("(" + body)
            given = (opcode, _NAME.findall(operands), rest, bool(start.group(1)))
            if opcode in ("constant", "parameter"):
                given = (opcode, [operands], rest, bool(start.group(1)))
            current[start.group(2)] = Instruction(start.group(2), type_text, *given)
    return entry, computations


def _split(text: str) -> tuple[str, str]:
    """Split a text that starts with a parenthesis after its closing parenthesis."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return text[: i + 1], text[i + 1 :]
    raise ValueError(f"unbalanced: {text[:80]}")


@dataclass(frozen=True)
class Cost:
    """The cost of a program, or of a part of one, on each device."""

    kernels: int = 0  # launches: those in the body of a loop count once per trip
    bytes: int = 0  # read from and written to main memory
    collectives: Counter = field(default_factory=Counter)  # by kind: how many
    collective_bytes: Counter = field(default_factory=Counter)  # by kind: of their operands
    endless: int = 0  # loops with an unknown trip count, counted once

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f) + getattr(other, f) for f in self.__dataclass_fields__))

    def __mul__(self, times: int) -> Cost:
        many = lambda c: Counter({k: v * times for k, v in c.items()})
        return Cost(
            self.kernels * times, self.bytes * times, many(self.collectives), many(self.collective_bytes), self.endless
        )


def cost(text: str) -> Cost:
    """The cost of a program, from its text."""
    entry, computations = parsed(text)
    return _of_computation(entry, computations)


@dataclass(frozen=True)
class Collective:
    kind: str
    bytes: int  # of its operands, on each device
    groups: tuple[tuple[int, ...], ...]  # of positions in the mesh; () if the program does not say


def collectives(text: str) -> list[Collective]:
    """All collectives of a program. One inside a loop is listed once."""
    found = []
    for computation in parsed(text)[1].values():
        for it in computation.values():
            if (kind := it.opcode.removesuffix("-start")) in COLLECTIVES:
                payload = sum(_everything(computation[o].type) for o in it.operands)
                found.append(Collective(kind, payload, replica_groups(it.rest)))
    return found


def replica_groups(attributes: str) -> tuple[tuple[int, ...], ...]:
    """The groups of a collective. XLA writes them as lists, as rows of a transposed grid, or as axes of a mesh.

    >>> replica_groups("replica_groups={{0,1},{2,3}}, x=1")
    ((0, 1), (2, 3))
    >>> replica_groups("replica_groups=[2,2]<=[2,2]T(1,0), x=1")
    ((0, 2), (1, 3))
    >>> replica_groups("replica_groups=mesh['a'=2,'b'=2] {'b'}, x=1")
    ((0, 1), (2, 3))
    """
    if not (said := re.search(r"replica_groups=(\{\}|[{\[m].*?)(?=, \w+=|$)", attributes)):
        return ()
    whole, rows = said.group(1), lambda a: tuple(tuple(row) for row in a.tolist())
    if re.fullmatch(r"\{(\{[\d,]*\},?)*\}", whole):
        return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", whole))
    numbers = lambda text: [int(n) for n in text.split(",")]
    if grid := re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", whole):
        shape, dims, order = grid.groups()
        ids = np.arange(math.prod(numbers(dims))).reshape(numbers(dims))
        return rows(ids.transpose(numbers(order) if order else None).reshape(numbers(shape)))
    if axes := re.fullmatch(r"mesh\[((?:'\w+'=\d+,?)+)\] ?\{((?:'\w+',?)+)\}", whole):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes.group(1))}
        over, all_axes = re.findall(r"'(\w+)'", axes.group(2)), list(sizes)
        order = [all_axes.index(a) for a in sizes if a not in over] + [all_axes.index(a) for a in over]
        ids = np.arange(math.prod(sizes.values())).reshape([*sizes.values()])
        return rows(ids.transpose(order).reshape(-1, math.prod(sizes[a] for a in over)))
    raise ValueError(f"replica groups of an unknown form: {whole[:200]}")


def _of_computation(name: str, computations: dict[str, Computation]) -> Cost:
    total = Cost()
    for instruction in computations[name].values():
        total += _of_instruction(instruction, computations[name], computations)
    return total


def _of_instruction(it: Instruction, around: Computation, computations: dict[str, Computation]) -> Cost:
    op = it.opcode
    called = lambda attribute: [_of_computation(c, computations) for c in it.attribute(attribute)]
    if op in FREE or op.endswith("-done") or op.endswith("-update"):
        return Cost()
    if op == "while":
        turns, body = _turns(it, computations), sum(called("body"), Cost())
        return replace(body, endless=body.endless + 1) if turns is None else body * turns
    if op == "conditional":
        branches = called("branch_computations") + called("true_computation") + called("false_computation")
        return max(branches, key=lambda branch: branch.bytes)
    if op in ("call", "async-start"):
        return sum(called("to_apply") + called("calls"), Cost())
    kind = op.removesuffix("-start")
    if kind in COLLECTIVES:
        payload = sum(_everything(around[o].type) for o in it.operands)
        moved = sum(around[o].bytes for o in it.operands)
        written = moved if op != kind else it.bytes  # the type of a start may include its operands
        return Cost(0, moved + written, Counter({kind: 1}), Counter({kind: payload}))
    if op.endswith("-start"):  # of a copy: (destination, source, context); of a slice: ((source), destination, context)
        arrays = [found.group() for found in _SHAPE.finditer(it.type)]
        destination = arrays[0 if op == "copy-start" else len(it.operands)]
        read = _everything(destination) if around[it.operands[0]].bytes else 0
        return Cost(0, read + main_memory_bytes(destination))
    if re.match(r"[a-z]\w*\[\]", it.type) and op not in ("fusion", "custom-call", "reduce"):
        return Cost()  # a counter
    if op == "custom-call" and (re.search(r'custom_call_target="([^"]*)"', it.rest) or [""] * 2)[1] in NO_WORK:
        return Cost()
    if op == "fusion":
        inside = _inside(it, computations)
        within = Cost()
        for inner in inside.values():
            if inner.opcode.removesuffix("-start") in COLLECTIVES:
                within += replace(_of_instruction(inner, inside, computations), bytes=0)
        return within + Cost(1, fused_bytes(it, around, computations))
    return Cost(1, _plain_bytes(it, around))


def _turns(loop: Instruction, computations: dict[str, Computation]) -> int | None:
    """The trip count of a loop: as the compiler states it, or from its condition i < n (JAX counts from 0 by 1)."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known.group(1))
    condition = computations[loop.attribute("condition")[0]]
    root = next(i for i in condition.values() if i.root)
    bounds = [condition[o].operands[0].strip("()") for o in root.operands if condition[o].opcode == "constant"]
    return int(bounds[0]) if root.opcode == "compare" and "direction=LT" in root.rest and bounds else None


def _everything(type_text: str) -> int:
    return main_memory_bytes(re.sub(r"\{[^}]*\}", "", type_text))


def _plain_bytes(it: Instruction, around: Computation) -> int:
    operands = [around[o].bytes for o in it.operands]
    if it.opcode in ("slice", "dynamic-slice", "gather"):
        return min(operands[0], _everything(it.type)) + it.bytes + sum(operands[1:])
    if it.opcode == "dynamic-update-slice":
        return 2 * operands[1]
    return sum(operands) + it.bytes


def _inside(fusion: Instruction, computations: dict[str, Computation]) -> Computation:
    return computations[fusion.attribute("calls")[0]]


def fused_bytes(it: Instruction, around: Computation, computations: dict[str, Computation]) -> int:
    """The bytes of a fusion: whole operands and results, or the slices if it slices them or updates them in place."""
    inside = _inside(it, computations)
    users: dict[str, list[Instruction]] = {}
    for inner in inside.values():
        for operand in inner.operands:
            users.setdefault(operand, []).append(inner)

    def read(name: str, whole: int) -> int:
        """The bytes that the fusion reads of a value of `whole` bytes."""
        taken = 0
        for user in users.get(name, []):
            if user.opcode == "bitcast":
                taken += read(user.name, whole)
            elif user.opcode in ("slice", "dynamic-slice", "gather") and user.operands[0] == name:
                taken += _everything(user.type)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                taken += 0  # in place
            else:
                return whole
        return min(taken, whole)

    parameters = {int(p.operands[0].strip("()")): p.name for p in inside.values() if p.opcode == "parameter"}
    total = 0
    for i, operand in enumerate(it.operands):
        whole = around[operand].bytes
        total += read(parameters[i], whole) if whole else 0
    return total + _written(next(i for i in inside.values() if i.root), inside, it)


def _written(root: Instruction, inside: Computation, it: Instruction) -> int:
    """The bytes of the results of a fusion; if a result is an operand with a slice updated, those of the slice."""
    saved, results = 0, root.operands if root.opcode == "tuple" else [root.name]
    for name in results:
        result = inside[name]
        while result.opcode == "bitcast":
            result = inside[result.operands[0]]
        if result.opcode == "dynamic-update-slice" and main_memory_bytes(it.type):
            saved += _everything(result.type) - _everything(inside[result.operands[1]].type)
    return max(it.bytes - saved, 0)
