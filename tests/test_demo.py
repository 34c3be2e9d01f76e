"""The demo: as a command, from the options to the picture; and its mathematics, on several devices and in float64."""

import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import jaxnorm as jn

pytest.importorskip("optax")
pytest.importorskip("sklearn")

from jaxnorm.demo import _data, _train

COUNTS = (1, 4)


def command(*arguments: str, cwd, code: str | None = None, **env: str) -> subprocess.CompletedProcess:
    """The demo in a process of its own, without the test suite's device count."""
    theirs = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "FORCE_COLOR")}
    start = ["-m", "jaxnorm.demo"] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, *start, *arguments], cwd=cwd, capture_output=True, text=True, timeout=240,
        env=theirs | {"JAX_PLATFORMS": "cpu", "COLUMNS": "100", "PYTHONIOENCODING": "utf-8"} | env,
    )  # fmt: skip


def mesh(count: int) -> Mesh:
    devices = jax.devices()
    assert len(devices) >= count, "conftest makes 8 host devices"
    return Mesh(np.array(devices[:count]), ("data",))


@pytest.fixture(scope="module")
def digits():
    """(train, test) of a few standardized images, for speed."""
    train, test = _data.load()
    pixels = _data.pixel_moments(_data.in_order(train, 128, 128))
    few = lambda data, n: _data.Images(*(a[:n] for a in _data.standardized(data, pixels)))
    return few(train, 100), few(test, 30)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_default_run_prints_the_tables_and_draws(tmp_path):
    done = command("--steps", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "over 4 cpu devices" in done.stdout
    for title in ("no normalization", "batch norm", "layer norm"):
        assert re.search(rf"\b{title} +\S +\d+\.\d % \S +never \S +\d+\.\d ms", done.stdout), done.stdout
    for title in ("all test images at once", "one image at a time", "exact statistics of the training set"):
        assert re.search(rf"{title} +\S +\d+\.\d %", done.stdout), done.stdout
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", done.stdout), "control characters in a log"
    assert len(done.stdout.splitlines()) < 30

    from matplotlib.image import imread

    picture = imread(tmp_path / "digits.png")
    assert picture.shape[0] > 600
    assert picture.shape[1] > 1200
    colours = {tuple(c) for c in np.round(255 * picture[..., :3].reshape(-1, 3)).astype(int)}
    assert {(0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2), (0x00, 0x9E, 0x73), (255, 255, 255)} <= colours
    assert (tmp_path / "digits.png").stat().st_size < 200_000


def test_options_reach_the_run_and_the_users_device_count_stays(tmp_path):
    given = ("--norm", "layer", "--steps", "1", "--batch-size", "7", "--seed", "3", "--out", "my.svg")
    done = command(*given, cwd=tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=3")
    assert done.returncode == 0, done.stderr
    assert "batches of 7 over 3 cpu devices" in done.stdout
    assert "layer norm" in done.stdout
    assert "Batch norm" not in done.stdout
    assert "<svg" in (tmp_path / "my.svg").read_text()


BAD = {
    "--norm group": "argument --norm: invalid choice: 'group'",
    "--devices 0": "argument --devices: must be a whole number, 1 or more, got '0'",
    "--devices 1000 --batch-size 1000": "there are 64 cpu devices to be had, not 1000",
    "--steps -3": "argument --steps: must be a whole number, 1 or more, got '-3'",
    "--steps 2.5": "argument --steps: must be a whole number, 1 or more, got '2.5'",
    "--batch-size 0": "argument --batch-size: must be a whole number, 1 or more, got '0'",
    "--batch-size 2": "2 images are too few for 4 devices. Write --batch-size 4, or --devices 2",
    "--batch-size 5000": "must be at most the 1347 training images, got 5000",
    "--seed -1": "argument --seed: must be a whole number",
    "--learning-rate nan": "argument --learning-rate: must be a number above 0, got 'nan'",
    "--out nowhere/digits.png": "argument --out: cannot write 'nowhere/digits.png'",
    "--out folder.png": "argument --out: cannot write 'folder.png'",
    "--out digits.doc": "argument --out: must end in .png",
    "--stpes 3": "unrecognized arguments: --stpes 3",
}
MANY = """
import sys, jaxnorm.demo.__main__ as demo, jaxnorm.demo._train as train
train.fit = lambda *_, **__: print("TRAINED")
for line in sys.argv[1:]:
    try:
        demo.main(line.split())
    except SystemExit as end:
        print(f"{line}|{end.code}", flush=True)
        print("END", file=sys.stderr, flush=True)
"""


def test_each_bad_option_is_one_message_and_status_2_before_any_training(tmp_path):
    (tmp_path / "folder.png").mkdir()
    largest_first = sorted(BAD, key=lambda line: "1000" not in line)  # it sets the number of devices, once a process
    largest, *others = largest_first
    for lines, env in (([largest], {}), (others, {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"})):
        done = command(*lines, cwd=tmp_path, code=MANY, **env)
        assert done.stdout.splitlines() == [f"{line}|2" for line in lines], done.stderr
        for line, message in zip(lines, done.stderr.split("END\n"), strict=False):
            assert BAD[line] in message
            assert message.startswith("python -m jaxnorm.demo: ")
            assert message.count("\n") == 1, message
    assert [p.name for p in tmp_path.iterdir()] == ["folder.png"], "a refused run leaves nothing behind"


def test_a_bad_option_ends_the_command_itself_with_status_2(tmp_path):
    done = command("--norm", "group", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


def test_a_missing_dependency_is_named_with_the_line_to_write(tmp_path):
    hide = "import runpy, sys; sys.modules['optax'] = sys.modules['sklearn'] = None; "
    done = command(cwd=tmp_path, code=hide + "runpy.run_module('jaxnorm.demo', run_name='__main__')")
    assert done.returncode == 2
    assert done.stderr == (
        'python -m jaxnorm.demo: needs optax, scikit-learn. Write: pip install "jaxnorm[demo]"\n'
    )


# --- the mathematics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["batch", "layer"])
def test_four_devices_with_uneven_masks_train_as_one_does(digits, name):
    train, test = digits
    runs = []
    for count in COUNTS:  # 100 images by 33: the fourth batch holds one image, three devices of four are empty
        batches = _data.shuffled(train, 33, 36, seed=5)
        (looked_at,) = _data.in_order(test, 30, 32)
        given = dict(steps=5, learning_rate=0.02, seed=1)
        runs.append(_train.fit(_train.NORMS[name], mesh(count), batches, looked_at, **given))
    one, four = runs
    assert {len(d.sharding.device_set) for d in jax.tree.leaves(four.params)} == {4}
    np.testing.assert_allclose(four.losses, one.losses, rtol=2e-3)
    np.testing.assert_allclose(four.accuracies, one.accuracies, atol=1.01 / 30)
    assert one.after.shape == four.after.shape == (30, 4, 4, _train.CHANNELS)
    np.testing.assert_allclose(four.after, one.after, atol=0.02)
    assert np.ptp(one.losses) > 1e-3, "it trained"


def test_padding_leaves_no_trace_in_a_step(digits):
    train, _ = digits
    (batch,) = _data.in_order(_data.Images(*(a[:33] for a in train)), 33, 64)  # 16, 16, 1 and 0 images on four devices
    assert batch.mask.reshape(4, 16).sum(1).tolist() == [16, 16, 1, 0]
    norm, optimizer = _train.NORMS["batch"], _train.optax.sgd(0.1)
    params, states = _train.init(norm, 0)
    step = _train.make_step(norm, optimizer, mesh(4))

    def after(garbage):
        images = np.where(batch.mask[:, None, None, None], batch.images, np.float32(garbage))
        spoilt = batch._replace(images=images)
        new_params, new_states, _, loss = step(params, states, optimizer.init(params), spoilt)
        return new_params, (new_states, loss)

    clean, large, nan = after(0), after(1e6), after(np.nan)
    assert not np.array_equal(clean[1][0][0].mean, states[0].mean), "statistics were taken"
    jax.tree.map(np.testing.assert_array_equal, clean, large)
    jax.tree.map(np.testing.assert_array_equal, clean[1], nan[1])  # a kernel's own gradient is sum(0 * NaN)


def test_pixel_moments_are_those_of_all_images_and_constant_pixels_stay_of_moderate_size():
    train, test = _data.load()
    pixels = _data.pixel_moments(_data.in_order(train, 128, 128))
    images = train.images.astype(np.float64)
    np.testing.assert_array_equal(pixels.count, float(_data.TRAIN))
    np.testing.assert_allclose(pixels.mean, images.mean(0), rtol=1e-6)
    np.testing.assert_allclose(pixels.var, images.var(0), rtol=1e-5, atol=1e-9)
    assert (np.asarray(pixels.var) == 0).any(), "the case at hand"
    for data in (train, test):
        assert np.abs(_data.standardized(data, pixels).images).max() <= 16


def test_exact_statistics_are_those_of_the_whole_training_set_layer_by_layer(digits):
    train, _ = digits
    norm = _train.NORMS["batch"]
    params, _ = _train.init(norm, 2)
    stacked = jax.tree.map(lambda *a: np.stack(a), *_data.in_order(train, 33, 36))
    exact = _train.make_exact_statistics(norm, mesh(4))(params, stacked)
    x = train.images.astype(np.float64)
    for block, state, stride in zip(params.blocks, exact, _train.STRIDES, strict=True):
        x = convolved(x, np.asarray(block.kernel, np.float64), stride)
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        np.testing.assert_allclose(state.mean, mean, atol=1e-4)
        np.testing.assert_allclose(state.var, var, rtol=1e-4)
        x = np.maximum((x - mean) / np.sqrt(var + norm.epsilon), 0)


def convolved(x, kernel, stride: int):
    """In float64: 3 x 3, "SAME" as XLA pads it, for images of even size."""
    low = 0 if stride == 2 else 1
    x = np.pad(x, [(0, 0), (low, 2 - low), (low, 2 - low), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))[:, ::stride, ::stride]
    return np.einsum("nhwcij,ijcd->nhwd", windows, kernel, optimize=True)


def test_one_image_at_a_time_gives_what_the_whole_batch_gives(digits):
    _, test = digits
    (batch,) = _data.in_order(test, 30, 32)
    norm = _train.NORMS["batch"]
    params, states = _train.init(norm, 0)
    states = tuple(s._replace(mean=s.mean + 0.3, var=2 * s.var) for s in states)
    together, alone = (_train.make_evaluate(norm, mesh(2), one_by_one=one) for one in (False, True))
    (accuracy, z), (other, w) = together(params, states, batch), alone(params, states, batch)
    assert float(accuracy) == float(other)
    assert z.shape == w.shape
    np.testing.assert_allclose(z, w, atol=1e-4)


def test_no_norm_keeps_the_protocol_and_all_norms_start_from_the_same_weights():
    assert all(isinstance(norm, jn.Norm) for norm in _train.NORMS.values())
    kernels = [[b.kernel for b in _train.init(norm, 7)[0].blocks] for norm in _train.NORMS.values()]
    for others in kernels[1:]:
        jax.tree.map(np.testing.assert_array_equal, kernels[0], others)
