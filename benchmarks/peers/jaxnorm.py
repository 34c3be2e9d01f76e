from __future__ import annotations

import jaxnorm as jn
from benchmarks.harness.case import EPSILON, FP8_SCALE, GROUPS, HEAD
from benchmarks.peers import Peer


class Jaxnorm(Peer):
    """By a backend of that name, or by the default. Not `fused`: only the compositions that fused calls replace."""

    package = "jaxnorm"

    def __init__(self, name: str, backend: str | None = None, fused: bool = True):
        super().__init__(name)
        self.fused = self.strict = fused
        self.options = {"epsilon": EPSILON, "implementation": backend}

    @property
    def version(self) -> str:  # of this tree, which need not be installed
        return jn.__version__

    def takes(self, norm: str) -> bool:
        rows = norm == "layer" or norm.endswith("rms")
        here = rows or "mosaic" not in (self.options["implementation"] or "")
        return here and super().takes(norm) and (self.fused or (norm.endswith("_rms") and norm != "rms"))

    def norm(self, which, x, *params):
        if which == "batch":
            _, state = jn.BatchNorm().init(x.shape[-1])
            return jn.batch_norm(x, jn.Affine(*params), state, train=True, **self.options)[0]
        groups = {"num_groups": GROUPS} if which == "group" else {}
        return getattr(jn, f"{which}_norm")(x, *params, **groups, **self.options)

    def add_rms(self, x, scale, residual):
        if not self.fused:
            return super().add_rms(x, scale, residual)
        return jn.add_rms_norm(x, residual, scale, **self.options)

    def gated_rms(self, x, gate, scale):
        return (jn.gated_rms_norm(x, gate, scale, **self.options),) if self.fused else super().gated_rms(x, gate, scale)

    def ada_layer(self, x, scale, shift):
        return (jn.ada_layer_norm(x, {"scale": scale, "shift": shift}, **self.options),)

    def ada_layer_zero(self, x, scale, shift, gate):
        y, gate = jn.ada_layer_norm_zero(x, {"scale": scale, "shift": shift, "gate": gate}, **self.options)
        return y, gate[:, 0]

    def ada_rms(self, x, scale, shift):
        return (jn.ada_rms_norm(x, {"scale": scale, "shift": shift}, parts="scale shift", **self.options),)

    def qk(self, q, q_scale, k, k_scale):
        return jn.qk_norm(q, k, q_scale, k_scale, **self.options)

    def rms_add(self, x, scale, residual):
        return (jn.rms_norm_add(x, residual, scale, **self.options),)

    def layer_add(self, x, scale, bias, residual):
        return (jn.layer_norm_add(x, residual, scale, bias, **self.options),)

    def rms_add_next(self, x, residual, scale, next_scale):
        y, stream = jn.rms_norm_add(x, residual, scale, next=jn.Affine(next_scale, None), **self.options)
        return stream, y

    def group_rms(self, x, scale):
        return (jn.group_rms_norm(x, scale, group_size=HEAD, **self.options),)

    def l2(self, x):
        return (jn.l2_norm(x, **self.options),)

    def dyt(self, x, alpha, scale, bias):
        return (jn.dynamic_tanh(x, alpha, scale, bias, implementation=self.options["implementation"]),)

    def derf(self, x, alpha, shift, scale, bias):
        return (jn.dynamic_erf(x, alpha, shift, scale, bias, implementation=self.options["implementation"]),)

    def fp8(self, x, scale):
        return self._quantized(x, scale, jn.Fp8(scale=FP8_SCALE))

    def fp8_row(self, x, scale):
        return self._quantized(x, scale, jn.Fp8(per="row"))

    def int8_row(self, x, scale):
        return self._quantized(x, scale, jn.Int8())

    def mxfp8(self, x, scale):
        return self._quantized(x, scale, jn.MxFp8())

    def _quantized(self, x, scale, how):
        y = jn.rms_norm(x, scale, quantize=how, **self.options)
        return y.data, y.scale

    def masked(self, which, x, mask):
        return jn.layer_norm(x, mask=mask, **self.options) if which == "layer" else self._batch_norm(x, mask)[0]

    def synchronized(self, x, mask):
        state = self._batch_norm(x, mask, axis_name="devices")[1]
        return state.mean, state.var

    def _batch_norm(self, x, mask, **options):
        norm = jn.BatchNorm(momentum=0.0, **self.options, **options)
        return norm.apply(*norm.init(x.shape[-1]), x, train=True, mask=mask)


class Plain(Peer):
    """The plain norm of the same arrays: what a norm of the family costs that only adds parameters to it."""

    package = "jaxnorm"
    norms = ()
    strict = None

    def __init__(self, name: str):
        super().__init__(name)
        self.norm = Jaxnorm(name).norm

    def ada_layer(self, x, scale, shift):
        return (self.norm("layer", x, scale[0], shift[0]),)

    def ada_layer_zero(self, x, scale, shift, gate):
        return self.norm("layer", x, scale[0], shift[0]), gate

    def ada_rms(self, x, scale, shift):
        return (self.norm("rms", x, scale[0]),)

    def qk(self, q, q_scale, k, k_scale):
        return self.norm("rms", q, q_scale), self.norm("rms", k, k_scale)

    def group_rms(self, x, scale):
        return (self.norm("rms", x, scale),)

    def l2(self, x):
        return (self.norm("rms", x),)

    def dyt(self, x, alpha, scale, bias):
        return (self.norm("layer", x, scale, bias),)

    def derf(self, x, alpha, shift, scale, bias):
        return (self.norm("layer", x, scale, bias),)

    fp8 = fp8_row = int8_row = mxfp8 = group_rms
