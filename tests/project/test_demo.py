"""The demo: as a command, from the options to the picture; and its mathematics, on several devices and in float64."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.jit import FLAGS
from jax.sharding import Mesh

import jaxnorm as jn
from jaxnorm import demo

optax = pytest.importorskip("optax")
pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[2]
COUNTS = (1, 4)


def command(*arguments: str, cwd) -> subprocess.CompletedProcess:
    """The demo in a process of its own, without the test suite's device count."""
    theirs = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "FORCE_COLOR")}
    return subprocess.run(
        [sys.executable, "-m", "jaxnorm.demo", *arguments], cwd=cwd, capture_output=True, text=True, timeout=240,
        env=theirs | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS, "COLUMNS": "100", "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip


def mesh(count: int) -> Mesh:
    devices = jax.devices()
    assert len(devices) >= count, "conftest makes 8 host devices"
    return Mesh(np.array(devices[:count]), ("data",))


@pytest.fixture(scope="module")
def digits():
    """(train, test) of a few standardized images, for speed."""
    train, test = demo.load()
    pixels = demo.pixel_statistics(demo.in_order(train, 128, 128))
    few = lambda data, n: demo.Batch(*(a[:n] for a in demo.standardized(data, pixels)))
    return few(train, 100), few(test, 30)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_default_run_prints_the_table_and_draws(tmp_path):
    done = command("--steps", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "over 4 cpu devices" in done.stdout
    for title in ("no normalization", "batch norm", "layer norm"):
        assert re.search(rf"\n{title} +\d+\.\d % +not in 2 +\d+\.\d ms\n", done.stdout), done.stdout
        assert re.search(rf"\n{title} +step 2/2  loss \S+  test \d+\.\d%\n", done.stdout), done.stdout
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", done.stdout), "control characters in a log"
    assert max(map(len, done.stdout.splitlines())) < 100
    assert len(done.stdout.splitlines()) < 20

    from matplotlib.image import imread

    picture = imread(tmp_path / "digits.png")
    assert picture.shape[0] > 600
    assert picture.shape[1] > 1200
    colours = {tuple(c) for c in np.round(255 * picture[..., :3].reshape(-1, 3)).astype(int)}
    assert {(0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2), (0x00, 0x9E, 0x73), (255, 255, 255)} <= colours
    assert (tmp_path / "digits.png").stat().st_size < 200_000


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    """`demo.main` in this process and an empty folder, with results that nothing was trained for."""
    z = np.random.default_rng(0).normal(size=(demo.TEST, 4, 4, demo.CHANNELS)).astype(np.float32)

    def fit(norm, mesh, batches, test, *, steps, learning_rate, seed, on_step):
        looks = np.arange(0, steps + 1, min(5, steps))
        for step in range(steps):
            on_step(step + 1, 0.125, 0.5)
        return demo.Run((), (), np.ones(steps), looks, np.linspace(0.1, 0.9, len(looks)), z, 2 * z, 0.0123)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "fit", fit)
    return demo.main


def test_options_reach_the_run_and_the_users_device_count_stays(made_up, tmp_path, capsys):
    made_up(["--norm", "layer", "--steps", "1", "--batch-size", "9", "--seed", "3", "--out", "my.svg"])
    printed = capsys.readouterr().out
    assert "batches of 9 over 8 cpu devices" in printed, "those of XLA_FLAGS, see conftest"
    assert "layer norm" in printed
    assert "batch norm" not in printed
    picture = (tmp_path / "my.svg").read_text()
    assert "<svg" in picture
    assert "--norm layer --devices 8 --steps 1 --batch-size 9 --learning-rate 0.5 --seed 3<" in picture


def test_a_training_prints_five_lines_and_its_result(made_up, capsys):
    made_up(["--steps", "10", "--norm", "none"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[3] for line in lines[1:6]] == ["2/10", "4/10", "6/10", "8/10", "10/10"]
    assert lines[5] == "no normalization  step 10/10  loss 0.125  test 50.0%"
    assert re.split("  +", lines[8]) == ["no normalization", "90.0 %", "not in 10", "12.3 ms"]


def test_the_readme_shows_what_the_command_draws(made_up, tmp_path):
    """Its title names the settings; they are those of the command with no options. And all but the curves is equal."""
    image = pytest.importorskip("PIL.Image")
    made_up(["--devices", str(demo.HOST_DEVICES)])
    fresh, shown = (image.open(folder / "digits.png") for folder in (tmp_path, ROOT / "notebooks"))
    assert shown.text["Title"] == fresh.text["Title"]
    assert (shown.size, shown.mode, shown.info["dpi"]) == (fresh.size, fresh.mode, fresh.info["dpi"])
    width, height = shown.size
    for box in ((0, 0, width, height // 8), (0, 0, width // 16, height), (0, height * 7 // 8, width // 2, height)):
        one, other = (np.asarray(picture.crop(box), np.float32) for picture in (fresh, shown))
        assert np.abs(one - other).mean() < 1, f"titles or labels in {box}"
        assert one.std() > 10, f"something stands in {box}"


BAD = {
    "--norm group": "argument --norm: invalid choice: 'group'",
    "--devices 0": "argument --devices: must be a whole number from 1 to 2147483647, got '0'",
    "--devices 9": "there are 8 cpu devices to be had, not 9. Write --devices 8, or unset your own setting",
    "--steps -3": "argument --steps: must be a whole number from 1 to 1000000, got '-3'",
    "--steps 2.5": "argument --steps: must be a whole number from 1 to 1000000, got '2.5'",
    "--steps 1000001": "argument --steps: must be a whole number from 1 to 1000000, got '1000001'",
    f"--steps {'9' * 5000}": f"argument --steps: must be a whole number from 1 to 1000000, got '{'9' * 100}'",
    "--batch-size 0": "argument --batch-size: must be a whole number from 1 to 2147483647, got '0'",
    "--batch-size 2": "2 images are too few for 8 devices. Write --batch-size 8, or --devices 2",
    "--batch-size 5000": "must be at most the 1347 training images, got 5000",
    "--seed -1": "argument --seed: must be a whole number from 0 to 2147483647, got '-1'",
    "--learning-rate nan": "argument --learning-rate: must be a number from 1e-30 to 1e+30, got 'nan'",
    "--learning-rate 1e-46": "argument --learning-rate: must be a number from 1e-30 to 1e+30, got '1e-46'",
    "--learning-rate inf": "argument --learning-rate: must be a number from 1e-30 to 1e+30, got 'inf'",
    "--out nowhere/digits.png": "argument --out: cannot write 'nowhere/digits.png': No such file or directory",
    "--out folder.png": "argument --out: cannot write 'folder.png': Is a directory",
    "--out folder.png/": "argument --out: cannot write 'folder.png': Is a directory",
    "--out digits.doc": "argument --out: must end in .png",
    f"--out {'a' * 300}.png": f"argument --out: cannot write '{'a' * 300}.png': File name too long",
    "--stpes 3": "unrecognized arguments: --stpes 3",
}


@pytest.mark.parametrize("line", BAD, ids=lambda line: line[:30])
def test_a_bad_option_prints_one_message_before_any_training(line, made_up, monkeypatch, tmp_path, capsys):
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(demo, "fit", lambda *_, **__: pytest.fail("it trains"))
    with pytest.raises(SystemExit) as end:
        made_up(line.split())
    assert end.value.code == 2
    printed, message = capsys.readouterr()
    assert printed == ""
    assert message.startswith("python -m jaxnorm.demo: ")
    assert BAD[line] in message
    assert message.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["folder.png"], "a refused run leaves nothing behind"


def test_a_bad_option_ends_the_command_itself_with_status_2(tmp_path):
    """Of devices, which must be asked for before JAX starts: 64 at most are made of a CPU."""
    done = command("--devices", "1000", "--batch-size", "1000", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"python -m jaxnorm\.demo: .*there are 64 cpu devices to be had, not 1000.*\n", done.stderr)


def test_a_picture_that_cannot_be_written_gives_one_message(made_up, monkeypatch, tmp_path, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "draw", full)
    with pytest.raises(SystemExit) as end:
        made_up(["--norm", "layer", "--steps", "1"])
    assert end.value.code == 2
    message = "python -m jaxnorm.demo: argument --out: cannot write 'digits.png': No space left on device.\n"
    assert capsys.readouterr().err == message


def test_a_link_to_a_picture_not_yet_drawn_is_kept(made_up, tmp_path):
    (tmp_path / "link.png").symlink_to("picture.png")
    made_up(["--norm", "layer", "--steps", "1", "--out", "link.png"])
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "picture.png").stat().st_size > 1000


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, 130), (BrokenPipeError, 141)])
def test_ctrl_c_and_a_closed_pipe_end_it_without_a_traceback(error, status, monkeypatch, capfd):
    def ended():
        raise error

    with open(os.devnull, "w") as nowhere:
        monkeypatch.setattr(sys, "stdout", nowhere)
        with pytest.raises(SystemExit) as end:
            demo.finish(ended)
    assert end.value.code == status
    assert capfd.readouterr() == ("", "")


def test_a_missing_dependency_is_named_with_the_line_to_write(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optax", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(SystemExit) as end:
        demo.main([])
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        'python -m jaxnorm.demo: needs optax, scikit-learn. Write: pip install "jaxnorm[demo]"\n'
    )


# --- the mathematics --------------------------------------------------------------------------------------------------


def test_four_devices_with_uneven_masks_train_as_one_does(digits):
    train, test = digits
    runs = []
    for count in COUNTS:  # 100 images by 33: the fourth batch holds one image, three devices of four are empty
        batches = demo.shuffled(train, 33, 36, seed=5)
        (looked_at,) = demo.in_order(test, 30, 32)
        given = dict(steps=5, learning_rate=0.02, seed=1)
        runs.append(demo.fit(demo.NORMS["batch"], mesh(count), batches, looked_at, **given))
    one, four = runs
    assert {len(d.sharding.device_set) for d in jax.tree.leaves(four.params)} == {4}
    np.testing.assert_allclose(four.losses, one.losses, rtol=2e-3)
    np.testing.assert_allclose(four.accuracies, one.accuracies, atol=1.01 / 30)
    assert one.after.shape == four.after.shape == (30, 4, 4, demo.CHANNELS)
    np.testing.assert_allclose(four.after, one.after, atol=0.02)
    assert np.ptp(one.losses) > 1e-3, "it trained"


def test_padding_leaves_no_trace_in_a_step(digits):
    train, _ = digits
    (batch,) = demo.in_order(demo.Batch(*(a[:33] for a in train)), 33, 64)  # 16, 16, 1 and 0 images on four devices
    assert batch.mask.reshape(4, 16).sum(1).tolist() == [16, 16, 1, 0]
    norm, optimizer = demo.NORMS["batch"], optax.sgd(0.1)
    params, states = demo.init(norm, 0)
    step = demo.make_step(norm, optimizer, mesh(4))

    def after(garbage):
        images = np.where(batch.mask[:, None, None, None], batch.images, np.float32(garbage))
        spoilt = batch._replace(images=images)
        new_params, new_states, _, loss = step(params, states, optimizer.init(params), spoilt)
        return new_params, (new_states, loss)

    clean, large, nan = after(0), after(1e6), after(np.nan)
    assert not np.array_equal(clean[1][0][0].mean, states[0].mean), "statistics were taken"
    jax.tree.map(np.testing.assert_array_equal, clean, large)
    jax.tree.map(np.testing.assert_array_equal, clean[1], nan[1])  # a kernel's own gradient is sum(0 * NaN)


def test_pixel_statistics_are_those_of_all_images_and_constant_pixels_stay_of_moderate_size():
    train, test = demo.load()
    pixels = demo.pixel_statistics(demo.in_order(train, 128, 128))
    images = train.images.astype(np.float64)
    np.testing.assert_array_equal(pixels.count, float(demo.TRAIN))
    np.testing.assert_allclose(pixels.mean, images.mean(0), rtol=1e-6)
    np.testing.assert_allclose(pixels.var, images.var(0), rtol=1e-5, atol=1e-9)
    assert (np.asarray(pixels.var) == 0).any(), "the case at hand"
    for data in (train, test):
        assert np.abs(demo.standardized(data, pixels).images).max() <= 16


def test_no_norm_keeps_the_protocol_and_all_norms_start_from_the_same_weights():
    assert all(isinstance(norm, jn.Norm) for norm in demo.NORMS.values())
    kernels = [[b.kernel for b in demo.init(norm, 7)[0].blocks] for norm in demo.NORMS.values()]
    for others in kernels[1:]:
        jax.tree.map(np.testing.assert_array_equal, kernels[0], others)
