from __future__ import annotations

import quack

from benchmarks.harness.case import EPSILON
from benchmarks.peers.torch import Torch


class Quack(Torch):
    """It also has a layer norm, but without a backward pass."""

    package = "quack"
    norms = ("rms",)

    def norm(self, which, x, scale, bias=None):
        return quack.rmsnorm(x, scale, eps=EPSILON)

    def add_rms(self, x, scale, residual):
        return quack.rmsnorm(x, scale, residual=residual, eps=EPSILON, prenorm=True)
