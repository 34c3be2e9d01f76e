from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from benchmarks.harness.case import EPSILON, GROUPS
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


class Liger(Torch):
    package = "liger_kernel.transformers.functional"
    norms = ("layer", "rms")

    def norm(self, which, x, scale, bias=None):
        if which == "rms":  # not in place: its backward pass would overwrite the cotangent
            return self.library.liger_rms_norm(x, scale, EPSILON, 0.0, "llama", False)
        return self.library.liger_layer_norm(x, scale, bias, EPSILON)
