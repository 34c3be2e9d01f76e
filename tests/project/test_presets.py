"""The presets against transcriptions of the models' arithmetic, in torch, on the weights as models store them."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxnorm as jn

torch = pytest.importorskip("torch")


def over_rms(x, epsilon):
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)


def llama(x, w, epsilon):
    return w * over_rms(x, epsilon).to(x.dtype)


def gemma(x, w, epsilon):
    return (over_rms(x, epsilon) * (1.0 + w.float())).type_as(x)


def olmo2(x, w, epsilon):
    return (w.float() * over_rms(x, epsilon)).to(x.dtype)


def layer_norm_1p(x, w, epsilon):
    return torch.nn.functional.layer_norm(x.float(), x.shape[-1:], w.float() + 1, None, epsilon).to(x.dtype)


def bare(x, w, epsilon):
    return torch.nn.functional.rms_norm(x, x.shape[-1:])


TRANSCRIBED = {
    **dict.fromkeys(("llama", "mistral", "glm4", "qwen2", "qwen3", "deepseek", "t5"), llama),
    **dict.fromkeys(("gemma", "qwen3_next", "openpi"), gemma),
    **dict.fromkeys(("gemma3n", "olmo2"), olmo2),
    **dict.fromkeys(("torch", "modded_nanogpt"), bare),
    **dict.fromkeys(("layer_norm_1p", "xlstm"), layer_norm_1p),
}


def test_every_preset_is_transcribed_and_starts_as_the_identity_of_its_model():
    found = jn.presets()
    assert found.keys() == TRANSCRIBED.keys()
    for norm in found.values():
        params, _ = norm.init(4)
        assert params.scale is None or np.all(np.asarray(params.scale) + norm.scale_offset == 1.0)
        assert jn.make(**jn.as_dict(norm)) == norm


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", sorted(TRANSCRIBED))
def test_a_preset_computes_what_its_model_does(name, dtype, rng):
    """To the bit, but for the order of a sum, which moves a rounding now and then."""
    norm = jn.presets()[name]
    kind, own = getattr(torch, dtype), getattr(jnp, dtype)
    x = torch.from_numpy(rng.normal(0.5, 2.0, (64, 256)).astype(np.float32)).to(kind)
    w = torch.from_numpy((rng.normal(0, 0.2, 256) + 1.0 - norm.scale_offset).astype(np.float32)).to(kind)
    want = TRANSCRIBED[name](x, w, norm.epsilon).float().numpy()
    as_jax = lambda a: jnp.asarray(a.float().numpy()).astype(own)
    params = norm.Params(as_jax(w) if norm.use_scale else None, None)
    got = norm.apply(params, (), as_jax(x))[0]
    assert got.dtype == own
    got, one = np.asarray(got.astype(jnp.float32)), 2.0**-6 if dtype == "bfloat16" else 6e-7
    np.testing.assert_allclose(got, want, rtol=one, atol=1e-6)
    if dtype == "bfloat16":
        assert np.mean(got != want) < 2e-3


def test_the_roundings_differ_where_models_do(rng):
    """What tells Llama from OLMo 2: with the wrong one many elements are a unit in the last place off."""
    x, w = (jnp.asarray(rng.normal(1, 0.3, n), jnp.bfloat16) for n in ((64, 256), 256))
    found = jn.presets()
    y = {name: found[name].apply(found[name].Params(w, None), (), x)[0] for name in ("qwen3", "olmo2")}
    assert 0.05 < np.mean(np.asarray(y["qwen3"] != y["olmo2"])) < 0.6
