"""Which array of the source becomes which of the target, and how. All that does not fit is found before anything moves.

The two trees are compared by module and role: "layer1.0.bn.weight" and "layer1_0/bn/scale" are the same.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from .._core.messages import shown
from .._core.paths import matches, renamed, wildcards
from .layouts import KINDS, LAYOUTS, Kernel, from_flax, to_flax
from .leaf import OPTIONAL, ROLES, Leaf, Store, as_numpy, module_name
from .report import ConversionError, Report, Row

Rename = Mapping[str, str | None]
Layouts = Mapping[str, str]


class Options(NamedTuple):
    """What a user says about a conversion."""

    name: str  # of the function, for messages
    rename: Rename = MappingProxyType({})
    skip: Sequence[str] = ()
    layouts: Layouts = MappingProxyType({})
    cast: bool = False


class Misfit(Exception):
    """Why one array does not fit."""


def move(source: Store, target: Store, options: Options) -> tuple[dict[str, np.ndarray], Report]:
    """The target's new arrays by path, and the report. A ConversionError says all that does not fit."""
    refused: list[tuple[str, str]] = []
    found = _by_key(source, options, refused, options.rename)
    wanted = _by_key(target, options, refused, {})
    refused += _unused_patterns(source, target, options)
    values: dict[str, np.ndarray] = {}
    rows: list[Row] = []
    for key, leaf in wanted.items():
        if _skipped(leaf, options):
            rows.append(Row("", leaf.path, leaf.shape, "kept: skip"))
            continue
        try:
            value, row = _one(key, leaf, found, target, options)
        except Misfit as reason:
            refused.append((leaf.path, str(reason)))
            continue
        rows.append(row)
        if value is not None:
            values[leaf.path] = value
    used = {*wanted} | {(key[0], role) for key, leaf in wanted.items() for role, *_ in leaf.otherwise}
    for key, leaf in found.items():
        skipped = _skipped(leaf, options) or (key in wanted and _skipped(wanted[key], options))
        if skipped or (key not in used and leaf.role in OPTIONAL):
            how = "left out: skip" if skipped else "not needed"
            rows.append(Row(leaf.path, "", leaf.shape, how))
        elif key not in used:
            near = _near(key, wanted)
            refused.append((leaf.path, f"{target.library} has no place for it{near}. Rename it, or skip it."))
    modules = {wanted[key].module: found[key].module for key in found.keys() & wanted.keys()}
    _compare_specs(source, target, modules, refused, rows)
    if refused:
        raise ConversionError(options.name, refused)
    return values, Report(rows)


def _one(
    key: tuple[str, str], leaf: Leaf, found: Mapping[tuple[str, str], Leaf], target: Store, options: Options
) -> tuple[np.ndarray | None, Row]:
    if key in found:
        value, how = _fitted(found[key], leaf, options)
        return value, Row(found[key].path, leaf.path, leaf.shape, how)
    for role, make, how in leaf.otherwise:
        if make is None:
            return None, Row("", leaf.path, leaf.shape, how)
        other = found.get((key[0], role))
        if other is not None or not role:
            value = np.asarray(make(None if other is None else as_numpy(other.value)), leaf.dtype)
            if value.shape != leaf.shape:
                value = np.broadcast_to(value, leaf.shape) if value.ndim == 0 else value.reshape(leaf.shape)
            return value, Row("" if other is None else other.path, leaf.path, leaf.shape, how)
    write = "Rename one to it, or skip it." if options.name == "transfer" else f"Write use_{leaf.keys[-1]}=False."
    raise Misfit(f"missing{_near(key, found)}. {write}")


def _fitted(source: Leaf, target: Leaf, options: Options) -> tuple[np.ndarray, str]:
    value, how = _laid_out(source, target, options)
    if value.shape != target.shape:
        raise Misfit(f"its shape is {target.shape}, and {source.path} gives {value.shape}{how and f' ({how})'}.")
    have, want = source.dtype, target.dtype
    if have != want:
        floats = jnp.issubdtype(have, jnp.floating) and jnp.issubdtype(want, jnp.floating)
        if not (floats and (options.cast or _holds(want, have))):
            write = " Write cast=True to round." if floats else ""
            raise Misfit(f"its dtype is {want}, and {source.path} has {have}.{write}")
        value, how = value.astype(want), f"{how or 'as it is'}, {have} as {want}"
    return value, how or "as it is"


def _holds(wide: Any, narrow: Any) -> bool:
    """Whether a floating dtype holds all values of another."""
    w, n = jnp.finfo(wide), jnp.finfo(narrow)
    return w.nmant >= n.nmant and w.maxexp >= n.maxexp and w.minexp - w.nmant <= n.minexp - n.nmant


def _laid_out(source: Leaf, target: Leaf, options: Options) -> tuple[np.ndarray, str]:
    """The source's value in the target's layout, and in words what was done."""
    value = as_numpy(source.value)
    kernels = _kernels(source, target, options)
    if kernels is None:
        alike = value.shape == target.shape or not _reshapes(source, target)
        return (value, "") if alike else (value.reshape(target.shape), f"{value.shape} -> {target.shape}")
    have, want = kernels
    if have.order == want.order and have.flipped == want.flipped and value.ndim == len(target.shape):
        return value, ""
    ranks = sorted((value.ndim, len(target.shape)))
    if have.kind == "dense" and ranks[0] == 2 < ranks[1]:
        return _general(value, have, want, target.shape)
    flat = have.kind in ("dense", "embedding")
    if ranks[0] != ranks[1] or (ranks[0] != 2 if flat else ranks[0] < 3):
        raise Misfit(f"its shape is {target.shape}, and {source.path} has {value.shape}: not the axes of one kernel.")
    groups = _groups(value.shape, have, target.shape, want)
    words = f"{have.words(value.ndim)} -> {want.words(value.ndim)}"
    words += ", flipped" if have.flipped != want.flipped else ""
    words += f", {groups} groups" if groups > 1 else ""
    try:
        return from_flax(to_flax(value, have, groups), want, target.shape, groups), words
    except ValueError:
        raise Misfit(f"its shape is {target.shape}, and {source.path} has {value.shape} ({words}).") from None


def _reshapes(source: Leaf, target: Leaf) -> bool:
    """Whether a vector is one of other axes: (1, 1, C) or (C,), and attention's bias with its heads or without."""
    flat = lambda shape: [n for n in shape if n != 1]
    if source.role == "bias" and 1 in (len(source.shape), len(target.shape)):
        return np.prod(source.shape, dtype=int) == np.prod(target.shape, dtype=int)
    vectors = "vector" in (source.kind, target.kind) or source.role in ("bias", "mean", "var")
    vectors = vectors or 1 in (len(source.shape), len(target.shape))
    return vectors and flat(source.shape) == flat(target.shape)


def _general(value: Any, have: Kernel, want: Kernel, shape: tuple[int, ...]) -> tuple[np.ndarray, str]:
    """A dense kernel of several input or output axes, such as attention's (in, heads, width), from and to a matrix."""
    if len(shape) > 2:  # Flax's
        value = to_flax(value, have)
        fits = value.size == np.prod(shape, dtype=int) and (shape[0] == value.shape[0] or shape[-1] == value.shape[-1])
        return (value.reshape(shape), f"{have.order} -> IO, reshaped") if fits else (value, f"{have.order} -> IO")
    i, o = to_flax(np.empty(shape, bool), want).shape
    fits = value.size == i * o and (value.shape[0] == i or value.shape[-1] == o)
    return (from_flax(value.reshape(i, o), want, shape) if fits else value), f"reshaped, IO -> {want.order}"


def _groups(value: tuple[int, ...], have: Kernel, shape: tuple[int, ...], want: Kernel) -> int:
    """The groups of torch's transposed convolution, whose kernel has I inputs where Flax's has I / g."""
    if (have.order == "IOk") == (want.order == "IOk"):
        return 1
    torch, other, order = (value, shape, want) if have.order == "IOk" else (shape, value, have)
    at = len(other) - 2 if order.order[0] == "k" else 0
    inputs = other[at + order.order.replace("k", "").index("I")]
    return torch[0] // inputs if inputs and torch[0] % inputs == 0 else 1


def _kernels(source: Leaf, target: Leaf, options: Options) -> tuple[Kernel, Kernel] | None:
    """How the two lay the kernel out; None if it is none, or if it is the same kind of tree."""
    fits = lambda pattern: matches(pattern, source.name) or matches(pattern, target.name)
    said = [kind for pattern, kind in options.layouts.items() if fits(pattern)]
    kinds = [said[0]] * 2 if said else [source.kind, target.kind]
    names = {source.keys[-1:], target.keys[-1:]}
    if source.role != "weight" or "vector" in kinds or "as_it_is" in kinds:
        return None
    if kinds == [None, None]:
        tables = {("embedding",), ("embeddings",)}
        if not names & {("kernel",), ("w",), *tables} or source.layout == target.layout:
            return None
        rank = min(len(source.shape), len(target.shape))
        likely = "transposed" if "convtranspose" in f"{source.name}/{target.name}".lower() else "conv"
        kinds = ["embedding" if names & tables else "dense" if rank == 2 else likely] * 2
    own, other = kinds
    have, want = LAYOUTS[source.layout][own or other or ""], LAYOUTS[target.layout][other or own or ""]
    if have.kind != want.kind:
        raise Misfit(f"it is a kernel of kind {want.kind}, and {source.path} one of kind {have.kind}.")
    if have.kind == "transposed" and not said:
        have = _oriented(source, target, have, want)
        want = _oriented(target, source, want, have)
    return have, want


def _oriented(leaf: Leaf, other: Leaf, own: Kernel, others: Kernel) -> Kernel:
    """Flax's transposed kernels are of two kinds. Where no object says which, the shapes may, or they do not."""
    if leaf.layout != "flax" or leaf.kind is not None or other.layout == "flax":
        return own
    flax = LAYOUTS["flax"]
    shape = leaf.shape
    if len(shape) < 3 or len(other.shape) != len(shape):
        return own
    inputs = other.shape[0] if others.order == "IOk" else other.shape[len(shape) - 2 + (others.order == "kOI")]
    inputs = other.shape[1] if others.order == "OIk" else inputs
    if shape[-1] == shape[-2]:
        raise Misfit(
            "a transposed convolution of as many inputs as outputs. Write layouts={"
            f'"{leaf.name}": "transposed"}}, or "transposed_flipped" if the layer has transpose_kernel=True.'
        )
    return flax["transposed_flipped" if shape[-1] == inputs else "transposed"]


# --- names ------------------------------------------------------------------------------------------------------------


def check_options(options: Options) -> None:
    """Raise where a user's patterns are no patterns."""
    name = options.name
    if not isinstance(options.rename, Mapping) or not isinstance(options.layouts, Mapping):
        raise TypeError(f'{name}: rename and layouts must be dicts, such as {{"body/**": "**"}}.')
    if isinstance(options.skip, str) or not all(isinstance(pattern, str) for pattern in options.skip):
        raise TypeError(f'{name}: skip must be a list of patterns, got {shown(options.skip)}. Write ["**/rope/*"].')
    for pattern, new in options.rename.items():
        if not isinstance(pattern, str) or not (new is None or isinstance(new, str)):
            raise TypeError(f"{name}: rename has {shown(pattern)}: {shown(new)}; both must be patterns (or None).")
        if new is not None and wildcards(pattern) != wildcards(new):
            raise ValueError(
                f'{name}: rename has "{pattern}": "{new}", whose wildcards must be the same, in the same order. '
                'Write {"model/layers/*/**": "block_*/**"}.'
            )
    for pattern, kind in options.layouts.items():
        if kind not in KINDS:
            raise ValueError(f'{name}: layouts has "{pattern}": {shown(kind)}; it must be one of {", ".join(KINDS)}.')


def _new_name(leaf: Leaf, rename: Rename) -> tuple[str, ...] | None:
    """The keys of a leaf by a user's names: of the leaf, or of the module that it is in. None leaves it out."""
    whole, inside = "/".join(leaf.keys), "/".join(leaf.keys[:-1])
    for pattern, new in rename.items():
        for path, rest in ((whole, ()), (inside, leaf.keys[-1:])):
            if matches(pattern, path):
                return None if new is None else (*(renamed(pattern, new, path) or "").split("/"), *rest)
    return leaf.keys


def _by_key(
    store: Store, options: Options, refused: list[tuple[str, str]], rename: Rename
) -> dict[tuple[str, str], Leaf]:
    """The leaves by module and role. If two of a module have one role, both are called by their own names."""
    named = [(keys, leaf) for leaf in store.leaves if (keys := _new_name(leaf, rename)) is not None]
    role = lambda keys, leaf: str(leaf.role if keys[-1:] == leaf.keys[-1:] else ROLES.get(keys[-1], keys[-1]))
    groups: dict[tuple[str, str], list[tuple[tuple[str, ...], Leaf]]] = {}
    for keys, leaf in named:
        groups.setdefault((module_name(keys[:-1]), role(keys, leaf)), []).append((keys, leaf))
    found: dict[tuple[str, str], Leaf] = {}
    for key, members in groups.items():
        for keys, leaf in members:
            own = key if len(members) == 1 else (key[0], keys[-1])
            if own in found:
                refused.append((leaf.path, f"it has the same name as {found[own].path}. Rename one."))
            found[own] = leaf
    return found


def _skipped(leaf: Leaf, options: Options) -> bool:
    return any(matches(pattern, leaf.name) for pattern in options.skip)


def _unused_patterns(source: Store, target: Store, options: Options) -> list[tuple[str, str]]:
    """A pattern that matches nothing is a typing error."""
    names = lambda store: {leaf.name for leaf in store.leaves} | {leaf.name.rpartition("/")[0] for leaf in store.leaves}
    of_source, of_both = names(source), names(source) | names(target)
    fits = lambda pattern, paths: any(matches(pattern, path) for path in paths)
    lost = [f'rename["{p}"]' for p in options.rename if not fits(p, of_source)]
    lost += [f'skip: "{p}"' for p in options.skip if not fits(p, of_both)]
    lost += [f'layouts["{p}"]' for p in options.layouts if not fits(p, of_both)]
    return [(pattern, f"it matches nothing. There are {', '.join(sorted(of_source)[:6])}, ...") for pattern in lost]


def _near(key: tuple[str, str], others: Mapping[tuple[str, str], Leaf]) -> str:
    paths = {"/".join(other): leaf.path for other, leaf in others.items()}
    close = difflib.get_close_matches("/".join(key), paths, 1, 0.6)
    return f"; the nearest name is {paths[close[0]]}" if close else ""


# --- hyperparameters --------------------------------------------------------------------------------------------------

_COMPARED = ("epsilon", "num_groups", "momentum", "zero_debias", "unbiased_running_var")


def _compare_specs(
    source: Store, target: Store, modules: Mapping[str, str], refused: list[tuple[str, str]], rows: list[Row]
) -> None:
    """Norms of one place whose numbers differ, where the objects of both libraries say them.

    How another library updates its running statistics cannot be chosen there: that is a row, and no refusal.
    """
    for module, of_source in sorted(modules.items()):
        if module not in target.specs or of_source not in source.specs:
            continue
        (there, _), (here, adjustable) = source.specs[of_source], target.specs[module]
        for option in _COMPARED:
            a, b = getattr(there, option, None), getattr(here, option, None)
            close = isinstance(a, float) and isinstance(b, float) and abs(a - b) <= 1e-6 * max(abs(a), abs(b))
            counted = option == "zero_debias" and not a  # the target's counter says that nothing is to be corrected
            if a == b or close or counted or not (hasattr(there, option) and hasattr(here, option)):
                continue
            differs = f"{option} is {a} in {source.library} and {b} in {target.library}"
            if option in ("zero_debias", "unbiased_running_var") and not adjustable:
                rows.append(Row(of_source, module, (), differs))
            else:
                refused.append((module, f"{differs}. Write {option}={a}, or hand over the arrays alone."))
