"""Law 9: bad input of every kind, by its message: the norm, what it got, what it needs, and the line to write."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnorm as jn

x = np.ones((4, 6, 8), np.float32)
state = jn.RunningStats(jnp.zeros(8), jnp.ones(8))
batch = lambda x=x, params=None, state=state, train=True, **options: jn.batch_norm(
    x, params, state, train=train, **options
)
group = lambda x=x, *params, **options: jn.group_norm(x, *params, **{"num_groups": 2, **options})
FIVE = {
    "layer_norm": lambda x=x, scale=None, **o: jn.layer_norm(x, scale, **o),
    "rms_norm": lambda x=x, scale=None, **o: jn.rms_norm(x, scale, **o),
    "group_norm": lambda x=x, scale=None, **o: group(x, scale, **o),
    "instance_norm": lambda x=x, scale=None, **o: jn.instance_norm(x, scale, **o),
    "batch_norm": lambda x=x, scale=None, **o: batch(x, jn.Affine(scale, None), **o),
}

OF_EACH = [  # what is wrong, the error, what the message says (after the norm's name), the line to write
    (dict(x=np.float32(1.0)), ValueError, r"rank \d or more.*got shape \(\)", r"Write x\.reshape\("),
    (dict(x=np.array(["a"])), TypeError, "x must be an array", r"Write jnp\.asarray\(x\)"),
    (dict(axis=3), ValueError, "axis=3 is out of range for x of rank 3, whose axes are -3..2", "Write axis=-1"),
    (dict(axis="channels"), TypeError, "axis must be an int or a tuple of ints, got 'channels'", "Write axis=-1"),
    (dict(axis=(1, -2)), ValueError, "names an axis twice|too many values|axis must be one int", "Write axis="),
    (dict(scale=np.ones(7)), ValueError, r"scale of shape \(7,\) fits neither the feature shape", r"Write scale=jnp\.ones\("),
    (dict(scale=np.ones((1, 1, 1, 8))), ValueError, "scale of shape .* fits neither", r"Write scale=jnp\.ones\("),
    (dict(mask=np.ones((5, 6))), ValueError, r"mask of shape \(5, 6\) neither broadcasts to x", r"Write .*mask=jnp\.ones\(\(4, 6\)\)"),
    (dict(mask=np.ones((4, 6, 8, 1))), ValueError, "mask of shape .* neither broadcasts", "Write .*mask="),
    (dict(epsilon=-1.0), ValueError, "epsilon must be a number >= 0, got -1.0", "Write epsilon=1e-6"),
    (dict(epsilon=float("nan")), ValueError, "epsilon must be a number >= 0, got nan", "Write epsilon=1e-6"),
    (dict(epsilon=jnp.ones(2)), ValueError, "epsilon must be a number >= 0", "It is static"),
    (dict(activation="rleu"), ValueError, r"activation must be one of \['gelu', .*\], a function, or None; got 'rleu'", 'Write activation="relu"'),
    (dict(activation=3), ValueError, "activation must be one of .*; got 3", 'Write activation="relu"'),
    (dict(activation=jax.nn.glu), ValueError, r"activation must be elementwise, but glu makes float32\[4, 6, 4\] of float32\[4, 6, 8\]", "Write activation=None"),
    (dict(activation=jnp.isnan), ValueError, r"activation must be elementwise, but isnan makes bool", "Write activation=None"),
    (dict(x=x + 1j, activation="relu"), TypeError, "activation='relu' is for real values, got complex|needs a complex running mean", "Write "),
    (dict(dtype=np.int32), TypeError, "dtype must be a floating dtype, got int32", r"Write dtype=jnp\.float32"),
    (dict(x=x + 1j, dtype=np.float32), TypeError, "cannot hold a complex|needs a complex running mean", "Write "),
    (dict(implementation="cuda"), ValueError, "implementation='cuda' is not a room of this build", "Write implementation=None"),
    (dict(axis_name="nowhere"), NameError, "axis_name='nowhere' is not bound here", "write axis_name=None"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "says", "write"), OF_EACH, ids=lambda v: str(v)[:40])
@pytest.mark.parametrize("norm", FIVE)
def test_each_norm(norm, wrong, error, says, write):
    with pytest.raises(error, match=rf"^{norm}: (?s:.*)({says})(?s:.*){write}"):
        FIVE[norm](**wrong)


ONE = [
    (lambda: jn.rms_norm(x, cast="sometimes"), ValueError, r'rms_norm: cast must be .* got \'sometimes\'\. Write cast="after_scale"'),
    (lambda: jn.RMSNorm(cast="no"), ValueError, "rms_norm: cast must be"),
    (lambda: jn.group_norm(x), ValueError, r"group_norm: give one of num_groups and group_size.*Write num_groups=32"),
    (lambda: group(group_size=2), ValueError, "give one of num_groups and group_size, got num_groups=2 and group_size=2"),
    (lambda: group(num_groups=3), ValueError, r"num_groups=3 does not divide the 8 channels of x\. Write num_groups=[24]\."),
    (lambda: group(num_groups=0), ValueError, "num_groups=0 does not divide"),
    (lambda: jn.group_norm(x, group_size=5), ValueError, r"group_size=5 does not divide the 8 channels of x\. Write group_size=4"),
    (lambda: group(reduction_axes=(1,)), ValueError, r"must include the channel axis.*Write reduction_axes=\(1, 2\)"),
    (lambda: group(reduction_axes=(1, 5)), ValueError, r"group_norm: reduction_axes=\(1, 5\) is out of range"),
    (lambda: jn.GroupNorm(num_groups=3).init(8), ValueError, r"GroupNorm\.init: num_groups=3 does not divide the 8 channels"),
    (lambda: jn.instance_norm(x, axis=0), ValueError, r"instance_norm: axis=0 is the batch axis.*Write axis=-1"),
    (lambda: batch(momentum=1.5), ValueError, r"batch_norm: momentum is the weight of the old statistics.*got 1\.5\. Write momentum=0\.9"),
    (lambda: jn.BatchNorm(momentum=-1.0), ValueError, "BatchNorm: momentum is the weight"),
    (lambda: jn.LayerNorm(epsilon=-1.0), ValueError, "LayerNorm: epsilon must be"),
    (lambda: jn.LayerNorm(implementation="x"), ValueError, "LayerNorm: implementation='x' is not a room"),
    (lambda: jn.LayerNorm().init(-3), ValueError, r"LayerNorm\.init: features must be ints >= 0, got -3\. Write init\(64\)"),
    (lambda: jn.LayerNorm().init(2.5), ValueError, r"LayerNorm\.init: features must be"),
    (lambda: batch(train=1), TypeError, r"batch_norm: train must be a bool or a scalar bool array, got 1\. Write train=True"),
    (lambda: batch(train=np.array([True])), TypeError, "train must be a bool"),
    (lambda: batch(state=(jnp.zeros(8), jnp.ones(8))), TypeError, r"state must be a jaxnorm\.RunningStats, got tuple\. Write params, state"),
    (lambda: batch(x[..., :7]), ValueError, r"state\.mean of shape \(8,\) does not fit the \(7,\) features.*Write .*init\(\(7,\)\)"),
    (lambda: batch(momentum=None), ValueError, r"need state\.count, which is None\. Write state\._replace\(count="),
    (lambda: batch(zero_debias=True), ValueError, r"need state\.count"),
    (lambda: batch(virtual_batch_size=0), ValueError, "virtual_batch_size must be an int >= 1, got 0"),
    (lambda: batch(weights=np.ones((5, 6))), ValueError, r"weights of shape \(5, 6\) neither broadcasts"),
    (lambda: batch(mask=np.ones((5, 6)), train=False), ValueError, "mask of shape"),
    (lambda: jn.layer_norm(np.ones((6, 6)), mask=np.ones(6)), ValueError,
     r"fits x of shape \(6, 6\) both as its leading and as its trailing axes\. Write mask\.reshape\(\(6, 1\)\)"),
    (lambda: jn.moments(x, 7), ValueError, "moments: axes=7 is out of range"),
    (lambda: jn.moments(x, 0, mask=np.ones(3)), ValueError, "moments: mask of shape"),
    (lambda: jn.normalize(x, np.ones(3), np.ones(8)), ValueError, "normalize: mean of shape"),
    (lambda: jn.as_affine(np.ones(3), np.ones(3), epsilon=-1), ValueError, "as_affine: epsilon"),
    (lambda: jn.LayerNorm(activation="rleu"), ValueError, "LayerNorm: activation must be one of .*got 'rleu'"),
    (lambda: jax.jit(lambda a: jn.layer_norm(x, activation=lambda z: a * z))(2.0), ValueError,
     "layer_norm: activation must be a function of its argument alone, but <lambda> holds traced values.*Write activation=None"),
    (lambda: jn.normalize(x, np.ones(8), np.ones(8), activation="no"), ValueError, "normalize: activation must be one of"),
    (lambda: jn.add_rms_norm(x, x[0]), ValueError,
     r"add_rms_norm: residual must have x's shape \(4, 6, 8\), got \(6, 8\)\. Write jnp\.broadcast_to\(residual, \(4, 6, 8\)\)"),
    (lambda: jn.add_layer_norm(x, x[..., :1]), ValueError, "add_layer_norm: residual must have x's shape"),
    (lambda: jn.add_layer_norm(x + 1j, x), TypeError, r"add_layer_norm: a residual of float32 cannot hold .*Write residual\.astype\(complex64\)"),
    (lambda: jn.add_rms_norm(x, x, dtype=np.int32), TypeError, "add_rms_norm: dtype must be a floating dtype"),
    (lambda: jn.add_rms_norm(x, "text"), TypeError, r"add_rms_norm: residual must be an array, got str\. Write jnp\.asarray\(residual\)"),
    (lambda: jn.gated_rms_norm(x, "text"), TypeError, r"gated_rms_norm: gate must be an array, got str"),
    (lambda: jn.gated_rms_norm(x, x[..., :7]), ValueError,
     r"gated_rms_norm: gate of shape \(4, 6, 7\) does not broadcast to x of shape \(4, 6, 8\)\. Write jnp\.broadcast_to\(gate"),
    (lambda: jn.gated_rms_norm(x, x[None]), ValueError, "gated_rms_norm: gate of shape .* does not broadcast"),
    (lambda: jn.gated_rms_norm(x, x + 1j, activation=jnp.exp), TypeError, r"gated_rms_norm: a complex gate needs a complex x.*Write x\.astype"),
    (lambda: jn.gated_rms_norm(x, x, activation=None), ValueError, r'gated_rms_norm: activation=None gates by nothing\. Write activation="silu"'),
    (lambda: jn.gated_rms_norm(x, x, activation="no"), ValueError, "gated_rms_norm: activation must be one of"),
    (lambda: jn.gated_rms_norm(x, x, group_size=3), ValueError, r"gated_rms_norm: group_size=3 does not divide the 8 channels of x\. Write group_size="),
    (lambda: jn.gated_rms_norm(x, x, group_size=4, axis_name="d"), ValueError,
     r"gated_rms_norm: group_size=4 makes 2 groups on each device, and axis_name='d' would merge .*Write axis_name=None"),
    (lambda: jn.gated_rms_norm(x, x, cast="no"), ValueError, "gated_rms_norm: cast must be"),
    (lambda: jn.gated_rms_norm(x, x, np.ones(7)), ValueError, r"gated_rms_norm: scale of shape \(7,\) fits neither"),
    (lambda: jn.layer_norm("text"), TypeError, r"layer_norm: x must be an array, got str\. Write jnp\.asarray"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), ONE, ids=[m[:50] for _, _, m in ONE])
def test_one_norm(call, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        call()


@pytest.mark.parametrize("norm", FIVE)
@pytest.mark.parametrize("shape", [(0, 6, 8), (4, 0, 8), (4, 6, 0), (0, 0, 0)], ids=str)
def test_an_empty_x_is_normalized_to_an_empty_y(norm, shape):
    call = FIVE[norm]
    if norm == "batch_norm" and shape[-1] == 0:
        call = lambda x: batch(x, state=jn.RunningStats(jnp.zeros(0), jnp.ones(0)))
    y, vjp = jax.vjp(lambda x: jax.tree.leaves(call(x))[0], jnp.ones(shape))
    assert y.shape == shape
    assert vjp(y)[0].shape == shape
    if norm == "batch_norm":
        for a, b in zip(call(jnp.ones(shape))[1][:2], (0.0, 1.0), strict=True):
            assert np.all(np.asarray(a) == b)


def test_moments_of_nothing():
    assert [np.asarray(p).tolist() for p in jn.moments(np.ones((0, 2)), 0)] == [[0.0, 0.0]] * 3
