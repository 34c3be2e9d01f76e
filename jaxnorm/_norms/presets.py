"""The norms of released models: where their scale starts, what they round and when."""

from __future__ import annotations

from typing import Any

from . import SPECS


def presets() -> dict[str, Any]:
    """The norms of released language models by name, as specs that take the models' own weights.

    | name | scale | rounds |
    | --- | --- | --- |
    | llama, mistral, qwen2, qwen3, deepseek, glm4, t5 | from 1 | x / rms, and again after the scale |
    | gemma (1 to 3), qwen3_next, openpi | 1 + scale, from 0 | once |
    | gemma3n, olmo2 | from 1 | once |
    | torch (`F.rms_norm` with eps=None), modded_nanogpt | none | once |
    | layer_norm_1p (Nemotron), xlstm: layer norms | 1 + scale, from 0 | once |

    Epsilon is that of the usual configuration. Write `dataclasses.replace(norm, epsilon=config.rms_norm_eps)` for the
    one of yours.

    Returns:
      A new dict: its values are `RMSNorm` and `LayerNorm`.

    Source: the models' own code in Hugging Face transformers, torchtune and MaxText, as of 2025.

    >>> import jaxnorm as jn
    >>> jn.presets()["gemma"] == jn.RMSNorm(scale_offset=1.0)
    True
    """
    rms, layer = SPECS["RMSNorm"], SPECS["LayerNorm"]
    twice = lambda epsilon: rms(epsilon=epsilon, cast="before_scale")
    return {
        **dict.fromkeys(("llama", "mistral", "glm4"), twice(1e-5)),
        **dict.fromkeys(("qwen2", "qwen3", "deepseek", "t5"), twice(1e-6)),
        **dict.fromkeys(("gemma", "qwen3_next", "openpi"), rms(scale_offset=1.0, epsilon=1e-6)),
        **dict.fromkeys(("gemma3n", "olmo2"), rms(epsilon=1e-6)),
        # torch's default is the float32 epsilon, for bfloat16 as well.
        **dict.fromkeys(("torch", "modded_nanogpt"), rms(use_scale=False, epsilon=2.0**-23)),
        "layer_norm_1p": layer(scale_offset=1.0, epsilon=1e-5),
        "xlstm": layer(scale_offset=1.0, use_bias=False, epsilon=1e-5),
    }
