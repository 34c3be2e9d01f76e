"""Law 9: bad input of every kind, by its message: the norm, what it got, what it needs, and the line to write."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnorm as jn

x = np.ones((4, 6, 8), np.float32)
ids = np.arange(4)
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
    (dict(implementation="cuda"), ValueError, "implementation='cuda' is not a backend of this build", "Write implementation=None"),
    (dict(axis_name="nowhere"), NameError, "axis_name='nowhere' is not bound here", "write axis_name=None"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "says", "write"), OF_EACH, ids=lambda v: str(v)[:40])
@pytest.mark.parametrize("norm", FIVE)
def test_every_norm_explains_a_wrong_input(norm, wrong, error, says, write):
    with pytest.raises(error, match=rf"^{norm}: (?s:.*)({says})(?s:.*){write}"):
        FIVE[norm](**wrong)


ONE = [
    (lambda: jn.rms_norm(x, cast="sometimes"), ValueError, r'rms_norm: cast must be .* got \'sometimes\'\. Write cast="after_scale"'),
    (lambda: jn.RMSNorm(cast="no"), ValueError, "rms_norm: cast must be"),
    (lambda: jn.group_norm(x), ValueError, r"group_norm: give one of num_groups and group_size.*Write num_groups=32"),
    (lambda: group(group_size=2), ValueError, "give one of num_groups and group_size, got num_groups=2 and group_size=2"),
    (lambda: group(num_groups=3), ValueError, r"num_groups=3 does not divide the 8 channels of x\. Write num_groups=[24], or axis=1, where x \(4, 6, 8\) has 6\."),
    (lambda: group(num_groups=0), ValueError, "num_groups=0 does not divide"),
    (lambda: jn.group_norm(x, group_size=5), ValueError, r"group_size=5 does not divide the 8 channels of x\. Write group_size=4"),
    (lambda: group(reduction_axes=(1,)), ValueError, r"must include the channel axis.*Write reduction_axes=\(1, 2\)"),
    (lambda: group(reduction_axes=(1, 5)), ValueError, r"group_norm: reduction_axes=\(1, 5\) is out of range"),
    (lambda: jn.filter_response_norm(x, axis=0), ValueError, r"filter_response_norm: axis=0 is the batch axis of x \(4, 6, 8\).*Write axis=-1"),
    (lambda: jn.filter_response_norm(x + 1j, threshold=np.zeros(8)), TypeError, r"filter_response_norm: a threshold is for real values, got complex.*Write threshold=None"),
    (lambda: jn.filter_response_norm(x, threshold=np.zeros(7)), ValueError, r"filter_response_norm: threshold of shape \(7,\) fits neither"),
    (lambda: jn.filter_response_norm(x, implementation="native"), ValueError, r"filter_response_norm: implementation='native' cannot run here: it has no kernel.*Write implementation=None"),
    (lambda: jn.filter_response_norm(x, axis_name="nowhere"), NameError, "filter_response_norm: axis_name='nowhere' is not bound here"),
    (lambda: jn.segment_norm(x, ids), ValueError, r"segment_norm: num_segments must be an int >= 1, got None\. It is static\. Write num_segments=4"),
    (lambda: jn.segment_norm(x, ids, num_segments=0), ValueError, r"num_segments must be an int >= 1, got 0"),
    (lambda: jn.segment_norm(x, ids[:3], num_segments=4), ValueError, r"segment_norm: segment_ids of shape \(3,\) must have the sizes of x's leading axes.*Write segment_ids of shape \(4,\)"),
    (lambda: jn.segment_norm(x, np.zeros((4, 6, 8), int), num_segments=4), ValueError, r"without its channels.*Write segment_ids of shape \(4, 6\)"),
    (lambda: jn.segment_norm(x, ids * 1.0, num_segments=4), TypeError, r"segment_norm: segment_ids must be integers, got an array float.*Write segment_ids\.astype\(jnp\.int32\)"),
    (lambda: jn.segment_norm(x, ids, num_segments=4, kind="batch"), ValueError, r"segment_norm: kind must be one of .* got 'batch'\. Write kind=\"layer\""),
    (lambda: jn.SegmentNorm(num_segments=4, num_groups=2), ValueError, r"SegmentNorm: num_groups=2 and group_size=None are for kind=\"group\".*Write kind=\"group\""),
    (lambda: jn.segment_norm(x, ids, num_segments=4, kind="group"), ValueError, r"segment_norm: give one of num_groups and group_size.*Write num_groups=32"),
    (lambda: jn.segment_norm(x, ids, num_segments=4, kind="group", num_groups=3), ValueError, r"num_groups=3 does not divide the 8 channels"),
    (lambda: jn.segment_norm(x, ids, num_segments=4, implementation="native"), ValueError, r"segment_norm: implementation='native' cannot run here: segments have kernels of their own, which only implementation=None runs\. Write implementation=None"),
    (lambda: jn.segment_norm(x, num_segments=4), TypeError, r"segment_norm: segment_ids missing\. Write segment_norm\(x, segment_ids"),
    (lambda: jn.SegmentNorm(num_segments=4).apply(None, (), x), TypeError, r"SegmentNorm\.apply: segment_ids missing"),
    (lambda: jn.GroupNorm(num_groups=3).init(8), ValueError, r"GroupNorm\.init: num_groups=3 does not divide the 8 channels"),
    (lambda: jn.instance_norm(x, axis=0), ValueError, r"instance_norm: axis=0 is the batch axis.*Write axis=-1"),
    (lambda: batch(momentum=1.5), ValueError, r"batch_norm: momentum is the weight of the old statistics.*got 1\.5\. Write momentum=0\.9"),
    (lambda: jn.BatchNorm(momentum=-1.0), ValueError, "BatchNorm: momentum is the weight"),
    (lambda: jn.LayerNorm(epsilon=-1.0), ValueError, "LayerNorm: epsilon must be"),
    (lambda: jn.LayerNorm(implementation="x"), ValueError, "LayerNorm: implementation='x' is not a backend"),
    (lambda: jn.LayerNorm().init(-3), ValueError, r"LayerNorm\.init: features must be ints >= 0, got -3\. Write init\(64\)"),
    (lambda: jn.LayerNorm().init(2.5), ValueError, r"LayerNorm\.init: features must be"),
    (lambda: batch(train=1), TypeError, r"batch_norm: train must be a bool or a scalar bool array, got 1\. Write train=True"),
    (lambda: batch(train=np.array([True])), TypeError, "train must be a bool"),
    (lambda: batch(state=(jnp.zeros(8), jnp.ones(8))), TypeError, r"state must be a jaxnorm\.RunningStats, .* got \(an array float32\[8\], .*\)\. Write state=jaxnorm\.RunningStats\(\*state\)"),
    (lambda: batch(state=()), TypeError, r"batch_norm: state must be .* got \(\)\. Write params, state = jaxnorm\.BatchNorm\(\)\.init\(\(8,\)\)"),
    (lambda: batch(state={"batch_stats": {}}), TypeError, r"got a dict with keys \['batch_stats'\]\. Write params, state"),
    (lambda: batch(state=jn.Affine(None, None)), TypeError, r"batch_norm: params and state are swapped.*Write batch_norm\(x, params, state, train=True\)"),
    (lambda: batch(params=state), TypeError, r"batch_norm: params and state are swapped: got running statistics as params"),
    (lambda: batch(params=np.ones(8)), TypeError, r"params must be jaxnorm\.Affine\(scale, bias\), a dict of the same names, or None; got an array float64\[8\]\. Write"),
    (lambda: batch(params={"params": {}}), TypeError, r"params must be .* got a dict with keys \['params'\]"),
    (lambda: batch(jn.Affine(None, None)), TypeError, r"batch_norm: x must be an array, got Affine\. Write batch_norm\(x, \.\.\.\): x comes first"),
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
    (lambda: jn.gated_rms_norm(x, x, activation=None), ValueError, r'gated_rms_norm: activation=None leaves nothing to gate with\. Write activation="silu"'),
    (lambda: jn.gated_rms_norm(x, x, activation="no"), ValueError, "gated_rms_norm: activation must be one of"),
    (lambda: jn.gated_rms_norm(x, x, group_size=3), ValueError, r"gated_rms_norm: group_size=3 does not divide the 8 channels of x\. Write group_size="),
    (lambda: jn.gated_rms_norm(x, x, group_size=4, axis_name="d"), ValueError,
     r"gated_rms_norm: group_size=4 makes 2 groups on each device, and axis_name='d' would merge .*Write axis_name=None"),
    (lambda: jn.gated_rms_norm(x, x, cast="no"), ValueError, "gated_rms_norm: cast must be"),
    (lambda: jn.gated_rms_norm(x, x, np.ones(7)), ValueError, r"gated_rms_norm: scale of shape \(7,\) fits neither"),
    (lambda: jn.layer_norm("text"), TypeError, r"layer_norm: x must be an array, got str\. Write jnp\.asarray"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), ONE, ids=[m[:50] for _, _, m in ONE])
def test_one_norm_explains_a_wrong_input(call, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        call()


# --- habits from other libraries --------------------------------------------------------------------------------------

scale, params, planes = np.ones(8, np.float32), jn.Affine(jnp.ones(8), jnp.zeros(8)), np.ones((2, 12, 5, 4), np.float32)
additive, steps = np.array([[0.0], [0.0], [0.0], [-1e9], [-np.inf], [-np.inf]], np.float32), np.arange(6)[:, None]
HABITS = [
    # A shape, or a number of channels, in the place of a scale.
    (lambda: jn.layer_norm(x, (8,)), r"layer_norm: scale must be an array or None, got \(8,\)\. .* Write layer_norm\(x, axis=-1\)"),
    (lambda: jn.layer_norm(x, x.shape[1:]), r"layer_norm: scale must be .* got \(6, 8\)\. .* Write layer_norm\(x, axis=\(-2, -1\)\)"),
    (lambda: jn.layer_norm(x, (8,), scale, scale), r"layer_norm: takes x, scale, bias by position, got 4 arguments\. Write layer_norm\(x, scale, bias, axis=-1\)"),
    (lambda: jn.rms_norm(x, [8]), r"rms_norm: scale must be .* got \[8\]\. .* Write rms_norm\(x, axis=-1\)"),
    (lambda: jn.rms_norm(x, np.int64(8)), r"rms_norm: scale must be .* got 8\."),
    (lambda: jn.rms_norm(x, [0.5] * 8), r"rms_norm: scale must be .* got \[0\.5, .* Write scale=jnp\.asarray\(scale\)\."),
    (lambda: jn.layer_norm(x, scale, 8), r"layer_norm: bias must be .* got 8\..* bias=jnp\.asarray\(bias\) for values"),
    (lambda: jn.add_rms_norm(x, x, (8,)), r"add_rms_norm: scale must be .* got \(8,\)"),
    (lambda: jn.gated_rms_norm(x, x, 8), r"gated_rms_norm: scale must be .* got 8"),
    (lambda: jn.instance_norm(x, 3), r"instance_norm: scale must be .* got 3\. .* Write instance_norm\(x, axis=-1\)"),
    (lambda: jn.group_norm(x, 4), r"group_norm: scale must be .* got 4\. .* Write group_norm\(x, num_groups=4\)"),
    (lambda: batch(params=jn.Affine(8, None)), r"batch_norm: scale must be .* got 8\. .* Write jaxnorm\.BatchNorm\(\)\.init\(8\)"),
    (lambda: jn.normalize(x, scale, scale, (8,)), r"normalize: scale must be .* got \(8,\)"),
    (lambda: jn.layer_norm(x, params), r"layer_norm: scale must be .* got Affine\. Write scale=params\.scale, bias=params\.bias"),
    (lambda: jn.layer_norm(x, {"scale": scale}), r"got a dict with keys \['scale'\]\. Write .*params\[\"scale\"\]"),
    # Masks and weights.
    (lambda: jn.layer_norm(x, mask=additive), r"layer_norm: mask must be True or 1 where .* got float32 values from -inf to 0\. Write mask=mask == 0"),
    (lambda: group(mask=additive), r"group_norm: mask .* Write mask=mask == 0"),
    (lambda: batch(mask=additive), r"batch_norm: mask .* Write mask=mask == 0"),
    (lambda: batch(mask=additive, train=False), r"batch_norm: mask .* Write mask=mask == 0"),
    (lambda: jn.moments(x, mask=additive), r"moments: mask .* Write mask=mask == 0"),
    (lambda: jax.jit(lambda x: jn.rms_norm(x, mask=additive))(x), r"rms_norm: mask .* Write mask=mask == 0"),
    (lambda: jn.layer_norm(x, mask=steps / 6), r"mask .* from 0 to 0\.833333\. Write mask=mask != 0, or weights="),
    (lambda: batch(weights=1.0 - steps), r"batch_norm: weights must be >= 0, got -4\. Write weights=jnp\.maximum\(weights, 0\)"),
    (lambda: jn.moments(x, weights=-x), r"moments: weights must be >= 0, got -1\. Write"),
    # Specs: what goes to the constructor, to init and to apply.
    (lambda: jn.LayerNorm(64), r"LayerNorm: takes keywords alone, got 64\. .* Write norm = LayerNorm\(\), and params, state = norm\.init\(64\)"),
    (lambda: jn.GroupNorm(32, 64), r"Write norm = GroupNorm\(num_groups=32\), and params, state = norm\.init\(64\)"),
    (lambda: jn.LayerNorm()(x), r"LayerNorm: a spec is not called.* Write y, state = norm\.apply\(params, state, x\)"),
    (lambda: jn.BatchNorm()(x, train=True), r"BatchNorm: a spec is not called"),
    (lambda: jn.RMSNorm().init(x), r"RMSNorm\.init: features must be ints >= 0, got an array float32\[4, 6, 8\]\. Write init\(8\)"),
    (lambda: jn.InstanceNorm(axis=1).init(planes), r"got an array float32\[2, 12, 5, 4\]\. Write init\(12\)"),
    (lambda: jn.BatchNorm().init(x.shape), r"BatchNorm\.init: features are the sizes of x along axis=-1 alone, got \(4, 6, 8\)\. Write init\(8\)"),
    (lambda: jn.BatchNorm(axis=(1, 2)).init(x.shape), r"axis=\(1, 2\) alone, got \(4, 6, 8\)\. Write init\(\(6, 8\)\)"),
    (lambda: jn.GroupNorm(num_groups=2, axis=1).init(planes.shape), r"GroupNorm\.init: .* axis=1 alone, got .* Write init\(12\)"),
    (lambda: jn.GroupNorm(num_groups=3).init((8,)), r"GroupNorm\.init: num_groups=3 does not divide the 8 channels"),
    (lambda: jn.InstanceNorm().init((6, 8)), r"InstanceNorm\.init: features .* Write init\(8\)"),
    (lambda: jn.LayerNorm().init(x.shape), r"LayerNorm\.init: features .* Write init\(8\)"),
    (lambda: jn.BatchNorm().apply(state, params, x, train=True), r"BatchNorm\.apply: params and state are swapped.* Write norm\.apply\(params, state, x\)"),
    (lambda: jn.LayerNorm().apply((), params, x), r"LayerNorm: params and state are swapped.* Write norm\.apply\(params, state, x\)"),
    (lambda: jn.LayerNorm().apply(x, (), params), r"LayerNorm: params must be .* got an array float32\[4, 6, 8\]\. Write norm\.apply\(params, state, x\)"),
    (lambda: jn.LayerNorm().apply(params, x), r"LayerNorm\.apply: x missing\. Write y, state = norm\.apply\(params, state, x\)"),
    (lambda: jn.BatchNorm().as_affine(state, params), r"BatchNorm\.as_affine: params and state are swapped.* Write norm\.as_affine"),
    (lambda: jn.LayerNorm().init(jax.random.key(0), x), r"LayerNorm\.init: .* Write params, state = norm\.init\(8\): it takes sizes alone, no key"),
    (lambda: jn.BatchNorm().init(jax.random.key(0)), r"BatchNorm\.init: features must be ints >= 0, got an array key<fry>\[\]\. Write init\(64\)"),
    (lambda: jn.merge(state, state), r"merge: needs jaxnorm\.Moments, got RunningStats\."),
    (lambda: jn.merge_across({"count": 1, "mean": 1, "m2": 1}, "d"), r"merge_across: .* got a dict with keys .* Write jaxnorm\.Moments\(\*\*m\)"),
    (lambda: jn.update_state(jn.moments(x), state), r"update_state: state must be running statistics, got Moments\. Write jaxnorm\.update_state\(state, moments\)"),
    (lambda: jn.sync_state(jn.moments(x), "d"), r"sync_state: .* Write jaxnorm\.merge_across\(moments, axis_name\)"),
    # A missing train, and names that other libraries have.
    (lambda: jn.batch_norm(x, None, state), r"batch_norm: train is missing\. Write train=True in training and train=False at inference"),
    (lambda: jn.BatchNorm().apply(params, state, x), r"batch_norm: train is missing\. Write train=True"),
    (lambda: batch(training=True), r"batch_norm: there is no argument training\. Write train=True\."),
    (lambda: batch(use_running_average=True), r"no argument use_running_average\. Write train=False\."),
    (lambda: batch(weight=scale), r"no argument weight\. Write params=jaxnorm\.Affine\(scale, bias\)"),
    (lambda: batch(running_mean=scale), r"no argument running_mean\. Write state=jaxnorm\.RunningStats\(running_mean, running_var\)"),
    (lambda: jn.layer_norm(x, eps=1e-5), r"layer_norm: there is no argument eps\. Write epsilon=1e-05\."),
    (lambda: jn.layer_norm(x, weight=scale), r"no argument weight\. Write scale=weight\."),
    (lambda: jn.layer_norm(x, normalized_shape=(8,)), r"no argument normalized_shape\. Sizes are read off x.* write axis="),
    (lambda: jn.rms_norm(x, epsilom=1.0), r"rms_norm: there is no argument epsilom\. Write epsilon=1\.0\."),
    (lambda: jn.rms_norm(x, colour=1), r"no argument colour\. Write one of x, scale, bias, axis, "),
    (lambda: jn.group_norm(x, groups=2), r"no argument groups\. Write num_groups=2\."),
    (lambda: jn.instance_norm(x, data_format="NCHW"), r"Write axis=1 for channels first"),
    (lambda: jn.instance_norm(x, momentum=0.1), r"no argument momentum\. This norm has no running statistics\. Leave it out"),
    (lambda: jn.moments(x, axis=1), r"moments: there is no argument axis\. Write axes=1\."),
    (lambda: jn.LayerNorm(eps=1e-5, elementwise_affine=False), r"LayerNorm: .* Write epsilon=1e-05\. There is no .* Write use_scale=False, use_bias=False"),
    (lambda: jn.LayerNorm(num_features=8), r"no argument num_features\. Sizes are given to init\. Write params, state = norm\.init\(8\)"),
    (lambda: jn.BatchNorm(track_running_stats=False), r"Write train=True, update_stats=False at the call"),
    (lambda: jn.BatchNorm(use_running_average=True), r"Write norm\.apply\(params, state, x, train=False\)"),
    (lambda: jn.BatchNorm(train=True), r"no argument train\. It is the call's\. Write norm\.apply\(params, state, x, train="),
    (lambda: jn.BatchNorm().apply(params, state, x, train=True, epsilon=1e-3), r"BatchNorm\.apply: .* Write BatchNorm\(epsilon=0\.001\)"),
    (lambda: jn.RMSNorm().apply(params, (), x, training=True), r"RMSNorm\.apply: there is no argument training\. Write train=True"),
    # Channels first, without `axis`.
    (lambda: jn.BatchNorm().apply(*jn.BatchNorm().init(12), planes, train=True), r"state\.mean of shape \(12,\) .* Write axis=1, where x has 12"),
    (lambda: jn.group_norm(planes, num_groups=6), r"num_groups=6 does not divide the 4 channels of x\. Write num_groups=4, or axis=1, where x .* has 12"),
    (lambda: jn.group_norm(planes, np.ones(12), num_groups=2), r"group_norm: scale of shape \(12,\) .* Write axis=1, where x has 12"),
    (lambda: jn.layer_norm(planes, np.ones(12)), r"layer_norm: scale of shape \(12,\) .* Write axis=1, where x has 12"),
    (lambda: group(axis=(1, 2)), r"group_norm: axis must be one int, got \(1, 2\)\. Write axis=2"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), HABITS, ids=[m[:60] for _, m in HABITS])
def test_habits_of_other_libraries_are_explained(call, message):
    with pytest.raises((TypeError, ValueError), match=f"(?s){message}") as caught:
        call()
    assert len(str(caught.value)) < 320


def test_a_traced_additive_mask_gives_nan():
    """Its values are not known, so where it is negative the output is NaN; 1 and 0 are a mask in any dtype."""
    run = jax.jit(lambda x, mask: jn.layer_norm(x, axis=(1, 2), mask=mask))
    assert np.isnan(run(x, additive)).all()
    truth = run(x, additive == 0)
    for dtype in (np.float32, np.int32):
        np.testing.assert_array_equal(run(x, (additive == 0).astype(dtype)), truth)
    running = jax.jit(lambda mask: batch(mask=mask, train=False)[0])(additive)  # here each element is on its own
    np.testing.assert_array_equal(np.isnan(running), np.broadcast_to(additive < 0, x.shape))


def test_torch_s_momentum_warns_once_at_the_line_that_gives_it():
    with pytest.warns(UserWarning, match=r"BatchNorm: momentum=0\.125 keeps 12\.5 % .* Write momentum=0\.875 where") as caught:
        norm = jn.BatchNorm(momentum=0.125)
    assert [w.filename for w in caught] == [__file__]
    assert jn.BatchNorm(momentum=0.125) == norm  # warnings are errors here
    with pytest.warns(UserWarning, match=r"update_state: momentum=0\.0625 .* Write momentum=0\.9375"):
        jn.update_state(state, jn.moments(x, (0, 1)), momentum=np.float32(0.0625))
    for _ in range(2):  # as an error it is told again
        with pytest.raises(UserWarning, match=r"batch_norm: momentum=0\.03125"):
            batch(momentum=0.03125)
    for quiet in (0.0, 0.25, 0.99, None):
        jn.BatchNorm(momentum=quiet)
    jn.update_state(state, jn.moments(x, (0, 1)), momentum=jnp.array(0.015625))  # a schedule may pass through it


# --- what messages do not print ---------------------------------------------------------------------------------------

LOUD = np.full((7, 5), 12345.678, np.float32)
CALLS = {
    **FIVE,
    "gated_rms_norm": lambda **o: jn.gated_rms_norm(x, x, **o),
    "add_rms_norm": lambda **o: jn.add_rms_norm(x, x, **o),
    "add_layer_norm": lambda **o: jn.add_layer_norm(x, x, **o),
    "normalize": lambda **o: jn.normalize(x, scale, scale, **o),
    "as_affine": lambda **o: jn.as_affine(scale, scale, **o),
    "update_state": lambda **o: jn.update_state(state, jn.moments(x, (0, 1)), **o),
    "moments": lambda **o: jn.moments(x, **o),
}


def refused(call, name: str, option: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{name}: ") as caught:
        call()
    message = str(caught.value)
    assert "12345" not in message, option
    assert "[7, 5]" in message or "(7, 5)" in message or option in message, message
    assert len(message) < 400, message


@pytest.mark.parametrize("name", CALLS)
def test_an_array_given_as_an_option_is_named_by_its_shape(name):
    takes = inspect.signature(getattr(jn, name)).parameters.values()
    options = [p.name for p in takes if p.kind is p.KEYWORD_ONLY]
    for loud in (LOUD, jnp.asarray(LOUD)):
        for option in options:
            refused(lambda loud=loud, option=option: CALLS[name](**{option: loud}), name, option)


@pytest.mark.parametrize("spec", [jn.BatchNorm, jn.LayerNorm, jn.RMSNorm, jn.GroupNorm, jn.InstanceNorm])
def test_an_array_in_a_spec_is_named_by_its_shape(spec):
    for option in inspect.signature(spec).parameters:
        for loud in (LOUD, jnp.asarray(LOUD)):
            refused(lambda loud=loud, option=option: spec(**{option: loud}), spec.__name__, option)
    refused(lambda: spec().init(LOUD), f"{spec.__name__}.init", "features")


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


def test_moments_of_an_empty_array_are_zero():
    assert [np.asarray(p).tolist() for p in jn.moments(np.ones((0, 2)), 0)] == [[0.0, 0.0]] * 3
