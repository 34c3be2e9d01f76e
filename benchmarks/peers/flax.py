from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx

from benchmarks.harness.case import EPSILON, GROUPS
from benchmarks.peers import Peer

LAYERS = {
    "layer": ("LayerNorm", {}),
    "rms": ("RMSNorm", {}),
    "batch": ("BatchNorm", {"use_running_average": False}),
    "group": ("GroupNorm", {"num_groups": GROUPS}),
    "instance": ("InstanceNorm", {}),
}


class Linen(Peer):
    package = "flax"

    def __init__(self, name: str, **options):
        super().__init__(name)
        self.options = {"epsilon": EPSILON, **options}

    def norm(self, which, x, *params):
        name, options = LAYERS[which]
        variables = {"params": dict(zip(("scale", "bias"), params, strict=False)), "batch_stats": self._stats(x)}
        norm = getattr(nn, name)(dtype=x.dtype, **options, **self.options)
        return norm.apply(variables, x, mutable=["batch_stats"])[0]

    def masked(self, which, x, mask):
        if which == "batch":
            return self._batch_norm(x, mask)[0]
        return nn.LayerNorm(use_scale=False, use_bias=False, **self.options).apply({}, x, mask=mask)

    def synchronized(self, x, mask):
        stats = self._batch_norm(x, mask, axis_name="devices")[1]["batch_stats"]
        return stats["mean"], stats["var"]

    def _batch_norm(self, x, mask, **options):
        norm = nn.BatchNorm(False, momentum=0.0, use_scale=False, use_bias=False, **self.options, **options)
        return norm.apply({"batch_stats": self._stats(x)}, x, mask=mask[:, None], mutable=["batch_stats"])

    def _stats(self, x):
        return {"mean": jnp.zeros(x.shape[-1]), "var": jnp.ones(x.shape[-1])}


class NNX(Peer):
    package = "flax.nnx"

    def norm(self, which, x, *params):
        name, options = LAYERS[which]
        norm = getattr(nnx, name)(x.shape[-1], epsilon=EPSILON, dtype=x.dtype, rngs=nnx.Rngs(0), **options)
        for param, value in zip(("scale", "bias"), params, strict=False):
            setattr(norm, param, nnx.Param(value))
        return norm(x)

    def masked(self, which, x, mask):
        if which == "batch":
            return self._batch_norm(x, mask)[0]
        norm = nnx.LayerNorm(x.shape[-1], epsilon=EPSILON, use_scale=False, use_bias=False, rngs=nnx.Rngs(0))
        return norm(x, mask=mask)

    def synchronized(self, x, mask):
        norm = self._batch_norm(x, mask, axis_name="devices")[1]
        return norm.mean[...], norm.var[...]

    def _batch_norm(self, x, mask, **options):
        norm = nnx.BatchNorm(x.shape[-1], momentum=0.0, epsilon=EPSILON, rngs=nnx.Rngs(0), **options)
        return norm(x, use_running_average=False, mask=mask[:, None]), norm
