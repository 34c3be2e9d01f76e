"""A norm of the family and its arrays, at the shapes of models. Its truth is the formula as authors of JAX models write
it, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness.case import FORMATS, Case, Data, Outcome

DIT, FLUX, PI0, LUMINA = (32, 256, 1152), (4, 1024, 3072), (32, 256, 1024), (4, 1024, 2304)  # examples, tokens, width
HEADS = ((8192, 16, 64), (4096, 32, 128), (1024, 128, 128))  # tokens, heads, their width
WIDTHS = ((8192, 1024), (4096, 4096), (1024, 8192))  # tokens, width
#: By norm: its shapes, and its arrays: "x" has x's shape, "k" that of a quarter of the heads, "example" a row for each
#: example, all in x's dtype; "scale", "bias" and "number" are parameters in float32. After "|": not differentiated.
ROWS: dict[str, tuple[tuple[tuple[int, ...], ...], str]] = {
    "ada_layer": ((DIT, FLUX), "x example example"),
    "ada_layer_zero": ((DIT, FLUX), "x example example example"),
    "ada_rms": ((PI0, LUMINA), "x example example"),
    "qk": (HEADS, "x scale k scale"),
    "l2": (HEADS, "x"),
    "group_rms": (WIDTHS, "x scale"),
    "rms_add": (WIDTHS, "x scale | x"),
    "layer_add": (WIDTHS, "x scale bias | x"),
    "rms_add_next": (WIDTHS, "x x scale scale"),
    "dyt": (WIDTHS, "x number scale bias"),
    "derf": (WIDTHS, "x number bias-number scale bias"),
    **dict.fromkeys(FORMATS, (WIDTHS, "x scale")),
}


class FamilyCase(Case):
    @property
    def tile(self) -> int:
        return self.shape[0]

    def data(self) -> Data:
        normal, dtype = np.random.default_rng(0).standard_normal, np.dtype(self.dtype)
        *tokens, width = self.shape
        made = {
            "x": lambda: normal(self.shape, np.float32).astype(dtype),
            "k": lambda: normal((tokens[0], tokens[1] // 4, width), np.float32).astype(dtype),
            "example": lambda: normal((tokens[0], width), np.float32).astype(dtype),
            "scale": lambda: (1 + normal(width, np.float32) / 8).astype(dtype).astype(np.float32),
            "bias": lambda: (normal(width, np.float32) / 8).astype(dtype).astype(np.float32),
            "number": lambda: np.array(0.75, np.float32),
            "bias-number": lambda: np.array(0.125, np.float32),
        }
        args, consts = ([made[kind]() for kind in part.split()] for part in f"{ROWS[self.norm][1]}|".split("|")[:2])
        outs = () if self.norm in FORMATS else jax.eval_shape(self.formula, *args, *consts)
        return Data([normal(out.shape, np.float32).astype(dtype) for out in outs], args, consts)

    @property
    def formula(self):
        from benchmarks.peers.written import Written

        return getattr(Written("jnp"), "rms_alone" if self.norm in FORMATS else self.norm)

    def truth(self, data: Data) -> Outcome:
        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
            cotangents, args, consts = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), data)
            outs, pull = jax.vjp(lambda *args: self.formula(*args, *consts), *args)
            gradients = pull(tuple(cotangents)) if cotangents else ()
            return Outcome(*jax.tree.map(np.asarray, (list(outs), list(gradients))))

    def errors(self, got: Outcome, truth: Outcome, strict: bool | None) -> list[float]:
        if self.norm in FORMATS and strict is not None:
            return [self.rounding(*got.outs, truth.outs[0])]
        strict = strict and self.norm != "rms_add_next"  # which rounds the sum, and then the norm of it
        return [] if strict is None else super().errors(got, truth, strict)

    def rounding(self, data: np.ndarray, scale: np.ndarray, y: np.ndarray) -> float:
        """The relative error in the 2-norm of what is dequantized. Raises if it is not that of 8 bits."""
        data, scale = (np.asarray(a, np.float64) for a in (data, scale))
        error = data * np.repeat(scale, y.shape[-1] // scale.shape[-1] if scale.ndim else 1, -1) - y
        found = float(f"{np.linalg.norm(error) / np.linalg.norm(y):.4g}")
        if not found <= 0.04:
            raise ValueError(f"a relative error of {found:.1e} (limit: 0.04)")
        return found
