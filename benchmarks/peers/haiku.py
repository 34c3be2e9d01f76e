from __future__ import annotations

import haiku as hk
import jax.numpy as jnp

from benchmarks.harness.case import EPSILON, GROUPS
from benchmarks.peers.base import Peer

LAYERS = {
    "layer": lambda x: hk.LayerNorm(-1, True, True, eps=EPSILON)(x),
    "rms": lambda x: hk.RMSNorm(-1, eps=EPSILON)(x),
    "batch": lambda x: hk.BatchNorm(True, True, 0.9, eps=EPSILON)(x, is_training=True),
    "group": lambda x: hk.GroupNorm(GROUPS, eps=EPSILON)(x),
    "instance": lambda x: hk.InstanceNorm(True, True, eps=EPSILON)(x),
}


class Haiku(Peer):
    package = "haiku"

    def norm(self, which, x, *params):
        norm = hk.transform_with_state(LAYERS[which])
        values = dict(zip(("scale", "offset"), params, strict=False))
        own, state = norm.init(None, jnp.zeros(x.shape, x.dtype))
        fill = lambda param, like: values[param].astype(x.dtype).reshape(like.shape)
        own = {module: {param: fill(param, a) for param, a in of.items()} for module, of in own.items()}
        return norm.apply(own, state, None, x)[0]
