from __future__ import annotations

import equinox as eqx
import jax

from benchmarks.harness.case import EPSILON, GROUPS
from benchmarks.peers.base import Peer

LAYERS = {
    "layer": lambda channels: eqx.nn.LayerNorm(channels, eps=EPSILON),
    "rms": lambda channels: eqx.nn.RMSNorm(channels, eps=EPSILON, use_bias=False),
    "batch": lambda channels: eqx.nn.BatchNorm(channels, "batch", eps=EPSILON, mode="batch"),
    "group": lambda channels: eqx.nn.GroupNorm(GROUPS, channels, eps=EPSILON),
}


class Equinox(Peer):
    package = "equinox"
    norms = tuple(LAYERS)
    channels_first = True

    def norm(self, which, x, *params):
        norm, state = eqx.nn.make_with_state(LAYERS[which])(x.shape[1])
        norm = eqx.tree_at(lambda n: (n.weight, n.bias)[: len(params)], norm, params)
        y, _ = jax.vmap(norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
        return y.astype(x.dtype)  # its batch norm promotes
