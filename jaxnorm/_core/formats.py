"""The formats that a norm can quantize its output to: the values of `quantize=`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, dataclass_transform

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from .arrays import as_dtype
from .checks import canonicalize_flags, canonicalize_number, check_axis_name
from .docstrings import described, joined, listed, sections
from .messages import shown, to_python

Array = jax.Array


@dataclass_transform(frozen_default=True, kw_only_default=True)
def _format(cls: type) -> type:
    """Make a class a format: a frozen dataclass whose docstring also says what its bases say of their fields."""
    cls = dataclass(frozen=True, kw_only=True)(cls)
    cls.described = described(cls)
    texts = {name: text for base in reversed(cls.__mro__) for name, text in vars(base).get("described", {}).items()}
    cls.__doc__ = joined({**sections(cls), "Args": listed([field.name for field in dataclasses.fields(cls)], texts)})
    return cls


_FP8 = ("float8_e4m3fn", "float8_e5m2")
FLOAT_FLOOR, INT_FLOOR = 1.0 / (448 * 512), 2.0**-23  # least scales of a row or block, those of vLLM


@_format
class Format:
    """What all formats have in common.

    Args:
      round_first: round y to the output's dtype before it is quantized. The default quantizes it as it is in float32.
      straight_through: give the output a gradient, that of the norm without quantization. Without it differentiating
        the norm raises.
    """

    round_first: bool = False
    straight_through: bool = False

    per: ClassVar[Any] = "block"
    block: ClassVar[int]  # elements of a block

    def __post_init__(self) -> None:
        name = type(self).__name__
        for field in dataclasses.fields(self):
            value = given = getattr(self, field.name)
            if field.name == "dtype":
                value = as_dtype(name, value, "dtype")
                if value.name not in _FP8:
                    raise ValueError(
                        f'{name}: dtype must be one of {_FP8}, got {value.name}. Write dtype="float8_e4m3fn".'
                    )
            elif isinstance(field.default, bool):
                (value,) = canonicalize_flags(name, **{field.name: value})
            elif field.name in ("scale", "floor", "upper"):
                value = None if value is None else _positive(name, field.name, value)
            elif field.name == "axis_name":
                check_axis_name(name, value)
                value = to_python(value)
            if value is not given:
                object.__setattr__(self, field.name, value)

    @property
    def kind(self) -> Any:
        """The dtype of data."""
        return jnp.dtype(self.dtype)  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def found(self) -> Any:
        """The dtype of what is found on the way to data: scales, or the largest values of rows; of `MxFp8` bits."""
        return jnp.dtype(jnp.uint8 if isinstance(self, MxFp8) else jnp.float32)

    @property
    def largest(self) -> float:
        """The largest finite number of the data."""
        return float(jnp.iinfo(self.kind).max if self.kind == jnp.int8 else jnp.finfo(self.kind).max)

    @property
    def of_tensor(self) -> bool:
        """Whether one scale is of everything."""
        return self.per == "tensor"


def _positive(name: str, what: str, value: Any) -> float:
    number = canonicalize_number(name, what, value, "1.0")
    if number <= 0.0:
        raise ValueError(f"{name}: {what} must be a number > 0, got {shown(value)}. Write {what}=1.0.")
    return number


def _scale_from(amax: Any, factor: float, old: Any) -> Array:
    """amax * factor; the old scale where amax is 0 or not finite."""
    amax = jnp.asarray(amax, jnp.float32)
    fits = (amax > 0) & (amax < jnp.inf)
    return jnp.where(fits, amax * jnp.float32(factor), jnp.asarray(old, jnp.float32))


@_format
class _Linear(Format):
    """A format with scales in float32.

    Args:
      per: what has a scale of its own: the whole "tensor", each "row", or each "block" of `block` channels.
      block: channels of a block, which divide the last axis.
      scale: the scale of a tensor. None takes `quantize_scale` of the call, and without one the scale that brings the
        largest value of y to the largest number of the format, for which y is computed twice.
      margin: of a tensor: that scale is 2**margin as large.
      floor: the least scale of a row or block.
      upper: values of a row or block beyond it are clipped; None is no limit.
      axis_name: of a tensor: mapped axes that it is spread over, beside those of the norm.
    """

    scale: float | None = None
    margin: int = 0
    upper: float | None = None
    axis_name: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.per not in ("tensor", "row", "block"):
            raise ValueError(f'{name}: per must be "tensor", "row" or "block", got {shown(self.per)}. Write per="row".')
        if not isinstance(self.margin, int) or not isinstance(self.block, int) or self.block < 1:
            raise ValueError(
                f"{name}: margin must be an int, and block one >= 1, got margin={shown(self.margin)} and "
                f"block={shown(self.block)}. Write margin=0, block=128."
            )
        of_tensor = dict(scale=None, margin=0, axis_name=None)
        for what, default in (of_tensor if not self.of_tensor else dict(upper=None)).items():
            if getattr(self, what) != default:
                where = "tensor" if not self.of_tensor else "row"
                raise ValueError(
                    f'{name}: {what}={shown(getattr(self, what))} is for per="{where}", got per="{self.per}". '
                    f"Write {what}={default}."
                )

    def scale_for(self, amax: Any, old: Any = 1.0) -> Array:
        """The scale of a tensor whose largest absolute value is amax: amax / largest * 2**margin.

        Where amax is 0 or not finite it is the old scale. For delayed scaling amax is the largest of a history.

        >>> import jaxnorm as jn
        >>> float(jn.Fp8().scale_for(896.0)), float(jn.Fp8().scale_for(float("nan"), old=0.5))
        (2.0, 0.5)
        """
        return _scale_from(amax, 2.0**self.margin / self.largest, old)


@_format
class Fp8(_Linear):
    """Floats of 8 bits, with a scale in float32 for the tensor, for each row, or for each block of a row.

    Source: Micikevicius et al., "FP8 Formats for Deep Learning" (2022), arXiv:2209.05433. Used by TransformerEngine and
    vLLM (per tensor), vLLM (per row), DeepSeek-V3 (per block of 128).

    Args:
      dtype: float8_e4m3fn, or float8_e5m2.
      transposed_scale: scales of blocks are (..., C / block, T) for x of (..., T, C), as some matrix products want
        them.

    >>> import jaxnorm as jn, numpy as np
    >>> y = jn.rms_norm(np.array([[3., -3.]], "f"), quantize=jn.Fp8(scale=0.5), epsilon=0.)
    >>> y.data.tolist(), float(y.scale), float(y.amax)
    ([[2.0, -2.0]], 0.5, 1.0)
    """

    per: str = "tensor"  # pyright: ignore[reportIncompatibleVariableOverride]
    dtype: DTypeLike = jnp.float8_e4m3fn
    block: int = 128  # pyright: ignore[reportIncompatibleVariableOverride]
    floor: float = FLOAT_FLOOR
    transposed_scale: bool = False


@_format
class Int8(_Linear):
    """Integers of 8 bits, with a scale in float32 for each row, for the tensor, or for each block of a row.

    y is divided by scale, rounded to the nearest integer, ties to even, and clipped to -128..127.

    Used by vLLM and W8A8 models; with floor=1e-5 / 127 by BitNet b1.58.

    >>> import jaxnorm as jn, numpy as np
    >>> y = jn.rms_norm(np.array([[3., -3.]], "f"), quantize=jn.Int8(), epsilon=0.)
    >>> y.data.tolist(), float(y.scale[0, 0] * 127)
    ([[127, -127]], 1.0)
    """

    per: str = "row"  # pyright: ignore[reportIncompatibleVariableOverride]
    block: int = 128  # pyright: ignore[reportIncompatibleVariableOverride]
    floor: float = INT_FLOOR

    dtype: ClassVar[Any] = jnp.int8


@_format
class MxFp8(Format):
    """Floats of 8 bits with a power of two, in float8_e8m0fnu, for each block of 32 channels: what
    `jax.nn.scaled_matmul` takes.

    Source: Rouhani et al., "Microscaling Data Formats for Deep Learning" (2023), arXiv:2310.10537. Used by
    TransformerEngine and quack.

    Args:
      dtype: float8_e4m3fn, or float8_e5m2.
      rounding: "up" takes the least power of two with which nothing saturates, as NVIDIA and JAX do; "ocp" the one of
        the paper, 2**(floor(log2(amax)) - emax), with which the largest values of a block may be clipped.

    >>> import jaxnorm as jn, numpy as np
    >>> y = jn.rms_norm(np.ones((1, 64), "f"), quantize=jn.MxFp8(), epsilon=0.)
    >>> y.data[0, 0].item(), y.scale.tolist()
    (256.0, [[0.00390625, 0.00390625]])
    """

    dtype: DTypeLike = jnp.float8_e4m3fn
    rounding: str = "up"

    block: ClassVar[int] = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounding not in ("up", "ocp"):
            raise ValueError(f'MxFp8: rounding must be "up" or "ocp", got {shown(self.rounding)}. Write rounding="up".')


@_format
class NvFp4(Format):
    """Floats of 4 bits with a scale in float8_e4m3fn for each block of 16 channels, and one in float32 for all.

    y ~ data * scale * global_scale. Used by TransformerEngine, quack, and inference on Blackwell.

    Args:
      scale: the global scale. None takes `quantize_scale` of the call, and without one amax / (448 * 6) of all of y,
        which computes y twice.
      axis_name: mapped axes that y is spread over, beside those of the norm.

    >>> import jaxnorm as jn, numpy as np
    >>> y = jn.rms_norm(np.ones((1, 16), "f"), quantize=jn.NvFp4(), epsilon=0.)
    >>> y.data.astype("f")[0, 0].item(), y.scale.astype("f").tolist(), float(y.global_scale * 2688)
    (6.0, [[448.0]], 1.0)
    """

    scale: float | None = None
    axis_name: str | Sequence[str] | None = None

    block: ClassVar[int] = 16
    dtype: ClassVar[Any] = jnp.float4_e2m1fn

    def scale_for(self, amax: Any, old: Any = 1.0) -> Array:
        """The global scale of a tensor whose largest absolute value is amax, amax / (448 * 6); see `Fp8.scale_for`."""
        return _scale_from(amax, 1.0 / (448 * 6), old)


FORMATS = (Fp8, Int8, MxFp8, NvFp4)


def check_format(norm: str, fmt: Any, scale: Any) -> None:
    """Raise if this is no format, or if a scale is given that it has no use for."""
    if fmt is not None and not isinstance(fmt, FORMATS):
        raise TypeError(
            f"{norm}: quantize must be a format such as jaxnorm.Fp8(), got {shown(fmt)}. "
            'Write quantize=jaxnorm.Fp8(per="row").'
        )
    if scale is None:
        return
    if fmt is None or not (fmt.of_tensor or isinstance(fmt, NvFp4)) or getattr(fmt, "scale", None) is not None:
        got = "no format" if fmt is None else shown(fmt)
        raise ValueError(
            f"{norm}: quantize_scale is the scale of a tensor for a format that has none of its own, got {got}. "
            "Write quantize=jaxnorm.Fp8(), or quantize_scale=None."
        )


def data_of(fmt: Any, y: Array) -> Array:
    """y, divided by its scale, in the format's dtype: clipped to its largest numbers, rounded to the nearest even."""
    if fmt.kind == jnp.int8:
        y = jnp.round(jnp.where(y == y, y, 0.0))  # NaN is in the scale
        return jnp.clip(y, -128.0, 127.0).astype(jnp.int8)
    return jnp.clip(y, -fmt.largest, fmt.largest).astype(fmt.kind)
