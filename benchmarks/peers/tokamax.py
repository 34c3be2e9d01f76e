from __future__ import annotations

import tokamax

from benchmarks.harness.case import EPSILON
from benchmarks.peers.base import Peer


class Tokamax(Peer):
    package = "tokamax"
    norms = ("layer", "rms")

    def norm(self, which, x, scale, bias=None):
        return tokamax.layer_norm(x, scale, bias, epsilon=EPSILON, subtract_mean=which == "layer")
