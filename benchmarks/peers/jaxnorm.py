from __future__ import annotations

import jaxnorm as jn
from benchmarks.harness.case import EPSILON, GROUPS
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

    def masked(self, which, x, mask):
        return jn.layer_norm(x, mask=mask, **self.options) if which == "layer" else self._batch_norm(x, mask)[0]

    def synchronized(self, x, mask):
        state = self._batch_norm(x, mask, axis_name="devices")[1]
        return state.mean, state.var

    def _batch_norm(self, x, mask, **options):
        norm = jn.BatchNorm(momentum=0.0, **self.options, **options)
        return norm.apply(*norm.init(x.shape[-1]), x, train=True, mask=mask)
