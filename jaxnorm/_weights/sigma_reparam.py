"""Sigma reparametrization: a weight over its spectral norm, times one learned number."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from .._core.arrays import sizes_along
from .._core.dtypes import accumulator
from .._core.types import AxisName
from .base import BY_LIKE, Reparametrization, bound_names, divided
from .operator import Matrix
from .spectral_norm import SpectralNormState, iterate

Array = jax.Array


class SigmaReparamParams(NamedTuple):
    """The parameters of `SigmaReparam`."""

    w: Array  # the shape of the weight
    gamma: Array  # ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SigmaReparam(Reparametrization):
    """Sigma reparametrization.

        gamma w / sigma(w),       sigma the largest singular value of w as an (out, rest) matrix

    gamma starts at sigma, so the effective weight starts as the weight itself. The singular vectors start from an SVD
    and take one power iteration at each call with `train`. Gradients flow through w in sigma. Decay no w.

    Args:
      axis: the output axis or axes: -1 in a kernel of Flax, 0 in a weight of torch.
      n_steps: iterations at each call with `train`.
      epsilon: the least length of a vector.
      axis_name, out_axis_name: inside `shard_map`, the mesh axes over which the other axes, and the output axes, of w
        are split; `init` needs the whole of w. Under jit, leave them out.
      dtype: of the result; None is w's.
      like: "torch" is axis=0.

    Used by sigmaReparam transformers and speech transformers.

    Source: Zhai et al., "Stabilizing Transformer Training by Preventing Attention Entropy Collapse" (2023),
    arXiv:2303.06296.

    >>> import numpy as np
    >>> from jaxnorm import weights
    >>> params, state = weights.SigmaReparam().init(np.diag([4., 2.]).astype("f"))
    >>> params.gamma.round(3).tolist(), weights.SigmaReparam().bake(params, state).diagonal().round(3).tolist()
    (4.0, [4.0, 2.0])
    """

    defaults: ClassVar[Mapping[str | None, Mapping[str, Any]]] = {None: {"axis": -1}, "torch": {"axis": 0}}
    Params: ClassVar[Any] = SigmaReparamParams
    labels: ClassVar[Mapping[str, str]] = MappingProxyType({"w": "undecayed"})

    axis: int | Sequence[int] = BY_LIKE
    n_steps: int = 1
    epsilon: float = 0.0
    axis_name: AxisName | None = None
    out_axis_name: AxisName | None = None
    dtype: DTypeLike | None = None

    def of(self, w: Array) -> Matrix:
        return Matrix.of(self.name, w, self.axis, self.axis_name, self.out_axis_name)

    def init(self, w: ArrayLike, key: Array | None = None) -> tuple[SigmaReparamParams, SpectralNormState]:
        w = self.as_weight(w)
        of, wide = self.of(w), accumulator(w)
        if bound_names(self.axis_name) or bound_names(self.out_axis_name):
            raise ValueError(
                f"{self.name}: the SVD of init needs the whole weight, got a shard. Write params, state = spec.init(w) "
                "outside of shard_map."
            )
        sizes = [sizes_along(w.shape, axes) for axes in (of.kept, of.rest)]
        matrix = w.astype(wide).transpose(of.kept + of.rest).reshape(math.prod(sizes[0]), -1)
        u, sigma, v = jnp.linalg.svd(matrix, full_matrices=False)
        state = SpectralNormState(u[:, 0].reshape(sizes[0]), v[0].reshape(sizes[1]))
        return SigmaReparamParams(w, sigma[0].astype(w.dtype)), jax.lax.stop_gradient(state)

    def apply(self, params: Any, state: Any = (), *, train: bool = False) -> tuple[Array, Any]:
        w, gamma = map(jnp.asarray, self.read(params))
        old = SpectralNormState(**state) if isinstance(state, Mapping) else SpectralNormState(*state)
        new, sigma = iterate(self.of(w), w, old, self.n_steps if train else 0, "u", self.epsilon, "max")
        kept = new._asdict() if isinstance(state, Mapping) else new
        return divided(w, sigma, self.dtype, gamma), kept if train else state
