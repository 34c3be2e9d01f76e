"""What keeps the variance of a normal input through an activation."""

from __future__ import annotations

from .._core.messages import shown

# 1 / sqrt(Var f(z)) for a normal z, as DeepMind drew them for NFNets.
_GAINS = {
    "identity": 1.0, "celu": 1.270926833152771, "elu": 1.2716004848480225, "gelu": 1.7015043497085571,
    "leaky_relu": 1.70590341091156, "relu": 1.7139588594436646, "relu6": 1.7131484746932983,
    "selu": 1.0008515119552612, "sigmoid": 4.803835391998291, "silu": 1.7881293296813965,
    "soft_sign": 2.338853120803833, "softplus": 1.9203323125839233, "tanh": 1.5939117670059204,
}  # fmt: skip


def variance_gain(activation: str) -> float:
    """What keeps the variance through an activation: gamma of `scaled_standardize`, or a factor of the activation.

    Args:
      activation: the name of a function of `jax.nn`, such as "relu".

    >>> from jaxnorm import weights
    >>> round(weights.variance_gain("relu"), 4)
    1.714
    """
    name = {"swish": "silu", "linear": "identity"}.get(activation, activation)
    if name not in _GAINS:
        raise ValueError(
            f'variance_gain: activation must be one of {", ".join(_GAINS)}; got {shown(activation)}. Write "relu".'
        )
    return _GAINS[name]
