from __future__ import annotations

from liger_kernel.transformers import functional

from benchmarks.harness.case import EPSILON
from benchmarks.peers.torch import Torch


class Liger(Torch):
    package = "liger_kernel"
    norms = ("layer", "rms")

    def norm(self, which, x, scale, bias=None):
        if which == "rms":  # not in place: its backward pass would overwrite the cotangent
            return functional.liger_rms_norm(x, scale, EPSILON, 0.0, "llama", False)
        return functional.liger_layer_norm(x, scale, bias, EPSILON)
