"""Modulation: the scale, shift and gate of a norm that come from a condition, such as a time step or a caption.

Legend: B batch, C channels, P parts, K features of the condition; c is what a dense layer made of the condition.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from .._core.arrays import align_param, as_float_array, concrete_value, refuse_a_shape
from .._core.dtypes import accumulator, widest
from .._core.explain import explained
from .._core.messages import shown, to_python
from .activation import Activation, activate
from .formula import effective_scale

Array = jax.Array
Parts = dict[str, Array]

PARTS = ("scale", "shift", "gate")


@explained("function")
def modulation(c: ArrayLike, parts: int, names: str | Sequence[str]) -> Any:
    """Split what a dense layer made of a condition into its parts, by name.

        c = [part 1 | part 2 | ...],   C channels each

    Models agree on the formula and differ in the order. A dict has no order that a caller could mistake:

    | names | models |
    | --- | --- |
    | "shift scale gate" | DiT, SD3, FLUX, PixArt, Sana, Wan, LTX, Mochi; CogVideoX's blocks |
    | "shift scale" | DiT's and PixArt's output layer; CogVideoX's and OmniGen's |
    | "scale shift" | diffusers' `AdaLayerNorm`, `AdaLayerNormContinuous` (output of FLUX, SD3) and `AdaGroupNorm` |
    | "scale gate" | Lumina |
    | "scale shift gate" | openpi (pi0.5) |

    Args:
      c: array of shape (..., P C): (B, P C), or for each token (B, T, P C).
      parts: P, how many there are.
      names: of the parts in their order, as a string or a sequence. Fewer names than parts are repeated: six parts
        named "shift scale gate" are those of attention and those of the MLP.

    Returns:
      A dict of arrays (..., C) by name; a tuple of dicts where names are repeated.

    Raises:
      ValueError: parts that do not divide the last axis of c, or that the names do not divide; a name twice.
      TypeError: c is not an array.

    Source: Peebles, Xie, "Scalable Diffusion Models with Transformers" (2022), arXiv:2212.09748, for six parts.

    >>> import jaxnorm as jn, numpy as np
    >>> {name: part.tolist() for name, part in jn.modulation(np.array([[1., 2.]]), 2, "shift scale").items()}
    {'shift': [[1.0]], 'scale': [[2.0]]}
    >>> attention, mlp = jn.modulation(np.arange(12.)[None], 6, "shift scale gate")
    >>> mlp["gate"].tolist()
    [[10.0, 11.0]]
    """
    c, given = as_float_array("modulation", c, what="c"), parts
    listed, parts = split_names("modulation", names), to_python(parts)
    number = len(listed)
    if not isinstance(parts, int) or isinstance(parts, bool) or parts < 1 or parts % number:
        raise ValueError(
            f"modulation: parts must be a multiple of the {number} names {shown(names)}, got {shown(given)}. "
            f"Write modulation(c, {number}, {names!r})."
        )
    if c.ndim == 0 or c.shape[-1] % parts:
        raise ValueError(
            f"modulation: parts={parts} does not divide the last axis of c {c.shape}. "
            f"Write nn.Dense({parts} * channels) for the layer that makes c."
        )
    width = c.shape[-1] // parts
    cut = [lax.slice_in_dim(c, i * width, (i + 1) * width, axis=-1) for i in range(parts)]
    dicts = tuple(dict(zip(listed, cut[i : i + number], strict=True)) for i in range(0, parts, number))
    return dicts[0] if len(dicts) == 1 else dicts


def split_names(norm: str, names: Any, known: Sequence[str] | None = None) -> tuple[str, ...]:
    """Names of parts in their order: of a string that has blanks between them, or a sequence of strings."""
    listed = names.split() if isinstance(names, str) else to_python(names)
    good = isinstance(listed, (tuple, list)) and listed and all(isinstance(n, str) for n in listed)
    if not good or len({*listed}) != len(listed) or (known is not None and not {*listed} <= {*known}):
        some = "" if known is None else f" some of {', '.join(known)},"
        what, write = ("names", "'shift scale gate'") if known is None else ("parts", 'parts="shift scale"')
        raise ValueError(
            f"{norm}: {what} must be the names of the parts in their order,{some} each once; got {shown(names)}. "
            f"Write {write}."
        )
    return tuple(listed)


def named_parts(norm: str, modulation: Any, parts: str, channels: int) -> Parts:
    """The parts of a modulation, given as a dict of them or as an array of all, one after the other."""
    if hasattr(modulation, "_asdict"):
        modulation = {name: part for name, part in modulation._asdict().items() if part is not None}
    if isinstance(modulation, Mapping):
        if unknown := sorted(str(name) for name in {*modulation} - {*PARTS}):
            raise ValueError(
                f"{norm}: a modulation has the parts {', '.join(PARTS)}, got {', '.join(unknown)}. "
                f'Write {{"shift": shift, "scale": scale}}.'
            )
        return {name: as_float_array(norm, p, what=name) for name, p in modulation.items() if p is not None}
    c, names = as_float_array(norm, modulation, what="modulation"), split_names(norm, parts, PARTS)
    if c.ndim == 0 or c.shape[-1] != len(names) * channels:
        width = c.shape[-1] if c.ndim else 1
        more = width // channels if channels and width % channels == 0 else 0
        write = f"{norm}(x, nn.Dense({len(names) * channels})(c)), or condition_features={width} in the spec"
        write = f"for m in jaxnorm.modulation(c, {more}, {parts!r})" if more and more % len(names) == 0 else write
        raise ValueError(
            f"{norm}: the modulation of shape {c.shape} must have {len(names)} parts ({parts}) of x's {channels} "
            f"channels each, {len(names) * channels} on its last axis. Write {write}."
        )
    return modulation_of(c, names)


def modulation_of(c: Array, names: tuple[str, ...]) -> Parts:
    return modulation(c, len(names), names)


def align_modulation(norm: str, what: str, part: Any, shape: tuple[int, ...], channel: int) -> Array:
    """A part with x's rank: (B, C), or (B, ..., C) of x's leading axes, or already of x's rank."""
    refuse_a_shape(norm, what, part)
    part = as_float_array(norm, part, what=what)
    fits = lambda sizes, into: len(sizes) <= len(into) and all(m in (1, n) for m, n in zip(sizes, into, strict=False))
    if part.ndim == len(shape) and fits(part.shape, shape):
        return part
    leading = tuple(n for a, n in enumerate(shape) if a != channel)
    if 0 < part.ndim < len(shape) and part.shape[-1] in (1, shape[channel]) and fits(part.shape[:-1], leading):
        spread = part.reshape(part.shape[:-1] + (1,) * (len(shape) - part.ndim) + part.shape[-1:])
        return jnp.moveaxis(spread, -1, channel)
    raise ValueError(
        f"{norm}: {what} of shape {part.shape} fits x of shape {shape} nowhere. Its axes are x's leading ones and then "
        f"the channels, or all of x's. Write {_line(what, part.shape, shape, channel)}."
    )


def _line(what: str, part: tuple[int, ...], shape: tuple[int, ...], channel: int) -> str:
    """The line that makes a part fit x."""
    channels, rows = shape[channel], math.prod(shape[:-1])
    if not part or part[-1] != channels:
        if part and channels and part[-1] % channels == 0:
            return f'jaxnorm.modulation({what}, {part[-1] // channels}, "shift scale"), which splits it'
        return f"{what} of shape {(shape[0], channels)}"
    examples = math.prod(part[:-1])
    if len(shape) == 2 and examples and rows % examples == 0:  # tokens of all examples, one after the other
        return f"x.reshape({(examples, rows // examples, channels)})"
    at, sizes = 0, [1] * len(shape)
    for size in part[:-1]:  # where the sizes are found among x's axes, in their order
        while at < len(shape) and (at == channel or shape[at] != size):
            at += 1
        if at == len(shape):
            return f"{what} of shape {(shape[0], channels)}"
        sizes[at], at = size, at + 1
    sizes[channel] = channels
    return f"{what}.reshape({tuple(sizes)})"


def modulated(
    norm: str, modulation: Any, parts: str, shape: tuple[int, ...], channel: int, scale, bias, scale_offset, offset
) -> tuple[dict[str, Any], Array | None]:
    """The scale, bias and scale_offset of a norm with a modulation, and the gate; each of x's rank.

    (xhat scale + bias) (m.scale + offset) + m.shift is one scale and one bias for each example. Where the norm has no
    parameters of its own they are those of the modulation, as they came.
    """
    named = named_parts(norm, modulation, parts, shape[channel])
    m = {name: align_modulation(norm, name, part, shape, channel) for name, part in named.items()}
    by, shift, gate = (m.get(name) for name in PARTS)
    scale, bias = (align_param(norm, name, p, shape, (channel,)) for name, p in (("scale", scale), ("bias", bias)))
    if scale is None and bias is None:
        return dict(scale=by, bias=shift, scale_offset=offset), gate
    wide = widest(jnp.float32, *(a.dtype for a in (scale, bias, by, shift) if a is not None))
    factor = effective_scale(by, offset, wide)
    both = factor if scale is None else effective_scale(scale, scale_offset, wide) * factor
    moved = None if bias is None else bias.astype(wide) * factor
    if shift is not None:
        moved = shift if moved is None else moved + shift.astype(wide)
    if by is None and scale is None:
        both = None
    return dict(scale=both, bias=moved, scale_offset=0.0), gate


def gated(y: Array, gate: Array | None) -> Any:
    """y, and beside it the gate in its dtype where there is one."""
    return y if gate is None else (y, gate.astype(y.dtype))


def dense(norm: str, condition: Any, kernel: Array, bias: Array | None, activation: Activation | None) -> Array:
    """f(condition) kernel + bias, in float32 or wider: (..., K) to (..., P C)."""
    c = as_float_array(norm, condition, what="condition")
    if c.ndim == 0 or c.shape[-1] != kernel.shape[0]:
        raise ValueError(
            f"{norm}: the condition of shape {c.shape} must have the {kernel.shape[0]} features that the kernel of "
            f"shape {kernel.shape} is for. Write condition_features={c.shape[-1] if c.ndim else 1}."
        )
    acc, common = widest(accumulator(c), accumulator(kernel)), widest(c.dtype, kernel.dtype)
    if activation is not None:
        c = activate(activation, c.astype(acc))
    over = (((c.ndim - 1,), (0,)), ((), ()))
    out = lax.dot_general(c.astype(common), kernel.astype(common), over, preferred_element_type=acc)
    return out if bias is None else out + bias.astype(acc).reshape((1,) * (out.ndim - 1) + bias.shape)


def rows_of_table(norm: str, what: str, table: Any, labels: Array, x: Array) -> Array:
    """The rows of a table for the labels, or their mixtures: (N, C)."""
    table = as_float_array(norm, table, what=what)
    if table.ndim != 2:
        raise ValueError(
            f"{norm}: {what} must be a table of shape (classes, channels), got {table.shape}. "
            f"Write {what}=jnp.ones((10, {x.shape[-1]}))."
        )
    if jnp.issubdtype(labels.dtype, jnp.inexact):
        if labels.shape != (x.shape[0], table.shape[0]):
            raise ValueError(
                f"{norm}: weights of classes must have shape {(x.shape[0], table.shape[0])}, a row for each example of "
                f"x {x.shape} and a column for each class; got {labels.shape}. Write jax.nn.one_hot(labels, "
                f"{table.shape[0]})."
            )
        acc = widest(labels.dtype, table.dtype, jnp.float32)
        return lax.dot(labels.astype(acc), table.astype(acc), precision=lax.Precision.HIGHEST)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"{norm}: labels must be integers or weights, got {shown(labels)}. Write labels.astype(int).")
    if labels.shape != x.shape[:1]:
        raise ValueError(
            f"{norm}: labels of shape {labels.shape} must be one for each of the {x.shape[0]} examples of x {x.shape}. "
            f"Write labels.reshape({x.shape[0]})."
        )
    values = concrete_value(labels)
    if values is not None and values.size and not (values.min() >= 0 and values.max() < table.shape[0]):
        raise ValueError(
            f"{norm}: labels must be from 0 to {table.shape[0] - 1}, got {values.min()} to {values.max()}. "
            f"Write num_classes={values.max() + 1} where the tables are made."
        )
    return jnp.take(table, jnp.where(labels < 0, table.shape[0], labels), axis=0, mode="fill")
