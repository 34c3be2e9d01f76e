"""The error of each quantized format against the output in float32: `python -m benchmarks.quantized`.

RMS norm of (256, 4096) values: normal ones, and the same with one channel in 256 thirty times as large, as in trained
transformers. Errors are root mean squares, relative to that of the output, in percent.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

import jaxnorm as jn

FORMATS = {
    "Fp8()": jn.Fp8(), 'Fp8(per="row")': jn.Fp8(per="row"), 'Fp8(per="block")': jn.Fp8(per="block"),
    'Fp8(per="row", dtype="float8_e5m2")': jn.Fp8(per="row", dtype="float8_e5m2"), "Int8()": jn.Int8(),
    'Int8(per="block")': jn.Int8(per="block"), "MxFp8()": jn.MxFp8(), 'MxFp8(rounding="ocp")': jn.MxFp8(rounding="ocp"),
    "NvFp4()": jn.NvFp4(),
}  # fmt: skip


def error(fmt, x: np.ndarray) -> float:
    y = jn.rms_norm(x)
    off = jn.rms_norm(x, quantize=fmt).dequantize() - y
    return float(100 * jnp.sqrt(jnp.mean(off**2) / jnp.mean(y**2)))


def rows() -> list[str]:
    x = np.random.default_rng(0).normal(size=(256, 4096)).astype("f")
    outliers = x * np.where(np.arange(4096) % 256 == 0, np.float32(30), np.float32(1))
    head = ["| format | normal | with outliers |", "| --- | --- | --- |"]
    return head + [f"| `{name}` | {error(f, x):.2f} | {error(f, outliers):.2f} |" for name, f in FORMATS.items()]


if __name__ == "__main__":
    print("\n".join(rows()))
