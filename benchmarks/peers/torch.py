from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from benchmarks.harness.case import EPSILON, GROUPS, HEAD
from benchmarks.peers import Peer


class Torch(Peer):
    package = "torch"
    channels_first = True

    def __init__(self, name: str, compiled: bool = False):
        super().__init__(name)
        self.compiled = compiled

    def norm(self, which, x, scale, bias=None):
        return {
            "layer": lambda: functional.layer_norm(x, scale.shape, scale, bias, EPSILON),
            "rms": lambda: functional.rms_norm(x, scale.shape, scale.to(x.dtype), EPSILON),
            "batch": lambda: functional.batch_norm(x, None, None, scale, bias, training=True, eps=EPSILON),
            "group": lambda: functional.group_norm(x, GROUPS, scale, bias, EPSILON),
            "instance": lambda: functional.instance_norm(x, weight=scale, bias=bias, eps=EPSILON),
        }[which]()

    def call(self, norm: str) -> Callable:
        call = super().call(norm)
        if not self.compiled:
            return call
        torch._dynamo.reset()
        return torch.compile(call, dynamic=False)

    def silu(self, gate):
        return functional.silu(gate)

    # The family as models in torch have it, and as the reference formulas of kernel libraries do.

    def ada_layer(self, x, scale, shift):  # DiT
        y = functional.layer_norm(x, x.shape[-1:], eps=EPSILON)
        return (y * (1 + scale[:, None]) + shift[:, None],)

    def ada_layer_zero(self, x, scale, shift, gate):
        return *self.ada_layer(x, scale, shift), gate

    def ada_rms(self, x, scale, shift):  # Lumina, with a shift
        return (rms(x) * (1 + scale[:, None]) + shift[:, None],)

    def qk(self, q, q_scale, k, k_scale):  # Qwen 3
        return q_scale.to(q.dtype) * rms(q), k_scale.to(k.dtype) * rms(k)

    def rms_add(self, x, scale, residual):  # OLMo 2
        return (residual + scale.to(x.dtype) * rms(x),)

    def layer_add(self, x, scale, bias, residual):  # Swin V2
        return (residual + self.norm("layer", x, scale, bias),)

    def rms_add_next(self, x, residual, scale, next_scale):  # Gemma 2
        (stream,) = self.rms_add(x, scale, residual)
        return stream, next_scale.to(x.dtype) * rms(stream)

    def group_rms(self, x, scale):  # Mamba 2
        return (scale.to(x.dtype) * rms(x.unflatten(-1, (-1, HEAD))).flatten(-2),)

    def l2(self, x):  # gated DeltaNet
        return (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + EPSILON),)

    def dyt(self, x, alpha, scale, bias):
        return (torch.tanh(alpha.to(x.dtype) * x) * scale.to(x.dtype) + bias.to(x.dtype),)

    def derf(self, x, alpha, shift, scale, bias):
        return (torch.erf(alpha.to(x.dtype) * x + shift.to(x.dtype)) * scale.to(x.dtype) + bias.to(x.dtype),)


def rms(x):
    """As Llama's models have it."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)).to(x.dtype)


class Liger(Torch):
    package = "liger_kernel.transformers.functional"
    norms = ("layer", "rms")

    def norm(self, which, x, scale, bias=None):
        if which == "rms":  # not in place: its backward pass would overwrite the cotangent
            return self.library.liger_rms_norm(x, scale, EPSILON, 0.0, "llama", False)
        return self.library.liger_layer_norm(x, scale, bias, EPSILON)
