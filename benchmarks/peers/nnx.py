from __future__ import annotations

from flax import nnx

from benchmarks.harness.case import EPSILON
from benchmarks.peers.base import Peer
from benchmarks.peers.linen import LAYERS


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
