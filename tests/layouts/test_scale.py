"""Planning for many chips: the arithmetic of the model, and the counts from compiled programs behind it."""

from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.compiled import TARGETS, hlo, missing, scaling
from helpers.compiled import torus as model

from benchmarks.harness import records

V5E, V5P = model.CHIPS["v5e"], model.CHIPS["v5p"]
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def boxes(kind: str) -> list[tuple[int, ...]]:
    """The sides of the slices, the smallest first."""
    found = [t for t in TARGETS.values() if t.name.startswith(f"{kind}x")]
    return [tuple(map(int, t.topology.split(":")[1].split("x"))) for t in sorted(found, key=lambda t: t.devices)]


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chip", "box", "payload", "want"),
    [
        (V5E, (4, 2, 1), 45_000, 2 * (4e-6 + 1e-6)),  # open sides: 3 hops and 1, one direction of a link
        (V5E, (16, 16, 1), 90_000, 2 * (16e-6 + 1e-6)),  # rings: 8 hops and 8, both directions
        (V5E, (16, 2, 1), 45_000, 2 * (9e-6 + 1e-6)),
        (V5P, (2, 2, 2), 0, 6e-6),
        (V5P, (8, 8, 16), 180_000, 2 * (16e-6 + 1e-6)),
    ],
)
def test_the_model_times_an_all_reduce(chip, box, payload, want):
    assert model.seconds(chip, box, payload) == pytest.approx(want, rel=1e-12)
    assert model.seconds(chip, box, payload, ways=1) == pytest.approx(want / 2, rel=1e-12)


def test_one_chip_does_not_communicate():
    assert model.seconds(V5E, (1, 1, 1), 1 << 30) == 0
    assert model.total(V5E, []) == 0


@pytest.mark.parametrize("kind", model.CHIPS)
def test_more_chips_and_more_bytes_take_longer(kind):
    chip = model.CHIPS[kind]
    by_size = [model.seconds(chip, box, 4096) for box in boxes(kind)]
    assert len(by_size) >= 3
    assert by_size == sorted(by_size)
    by_bytes = [model.seconds(chip, boxes(kind)[-1], size) for size in (0, 1 << 10, 1 << 20)]
    assert by_bytes == sorted(set(by_bytes))


def test_collectives_run_one_after_another():
    one = {"kind": "all-reduce", "bytes": 45_000, "chips": 8, "box": [4, 2, 1]}
    gather = one | {"kind": "all-gather", "bytes": 45_000 // 8}
    assert model.total(V5E, [one, one, gather]) == pytest.approx(25e-6, rel=1e-12)
    with pytest.raises(ValueError, match="got all-to-all"):
        model.total(V5E, [one | {"kind": "all-to-all"}])


def test_a_resnet50_has_the_published_norms():
    norms = model.resnet50()
    assert len(norms) == 53
    assert sum(2 * channels for channels, _ in norms) == 53_120, "scales and biases, as published"
    assert norms[:3] == [(64, 112 * 112), (64, 56 * 56), (64, 56 * 56)]
    assert norms[-1] == (2048, 49)
    one = model.memory_seconds(V5E, [(256, 3136)], images=16)
    assert one == pytest.approx(8 * 2 * 16 * 256 * 3136 / 819e9, rel=1e-12)


def test_a_step_takes_at_least_the_published_time():
    memory = model.memory_seconds(V5P, model.resnet50(), 16)
    assert model.step_seconds(V5P, 16) == pytest.approx(memory + 16 * 24.6e9 / 459e12, rel=1e-12)


def test_the_advice_follows_from_the_waiting_times():
    waits = {"global": 1.0, "groups": 0.1, "local": 0.0}
    assert model.choose(4, waits, 10.0, 8) == "global", "it adds a tenth"
    assert model.choose(32, waits, 9.9, 8) == "local"
    assert model.choose(4, waits, 9.9, 8) == "groups", "of 32 images"
    assert model.choose(3, waits, 9.9, 8) == "global", "24 images are too few"
    assert model.choose(4, waits | {"groups": 1.0}, 9.9, 8) == "global", "there is but one group"


# --- what was counted -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found() -> list[dict]:
    return records.read(RESULTS / "scale.jsonl")


def test_groups_wait_at_most_as_long_as_all_and_local_does_not_wait(found):
    waits = model.waits(found)
    assert {TARGETS[t].devices for t in waits} == {8, 64, 256, 1024}
    for by in waits.values():
        for form in ("jit", "shard_map"):
            assert by[f"local, {form}"] == 0 < by[f"groups of 8, {form}"] <= by[f"global, {form}"]


def test_small_planes_communicate_as_much_as_large_ones(found):
    """What is compiled with 2 images of 8 x 8 on a chip is what 16 of 56 x 56 would give."""
    key = lambda it: (it["target"], it["sync"])
    sent = lambda it: sorted((c["kind"], c["bytes"], c["chips"]) for c in it["collectives"])
    small = {key(it): sent(it) for it in records.results(found) if it["of"] == "stage" and it["form"] == "jit"}
    large = {key(it): sent(it) for it in records.results(found) if it["of"] == "whole stage"}
    assert {TARGETS[target].devices for target, _ in large} == {8, 256, 1024}
    assert large == {k: small[k] for k in large}


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=1,'c'=2] {'b','c'}", [[0, 1], [2, 3]]),
        ("{}", []),
    ],
)
def test_replica_groups_are_parsed_in_every_syntax(text, groups):
    got = hlo.replica_groups(f", channel_id=1, replica_groups={text}, use_global_device_ids=true, to_apply=%add")
    assert [list(group) for group in got] == groups


def test_an_unknown_form_is_an_error():
    with pytest.raises(ValueError, match="unknown form"):
        hlo.replica_groups("replica_groups=mesh['a':(1)2=4] {'a'}, x=1")


def counts(target: str, sync: str, form: str) -> list[tuple[str, int, int, int]]:
    result = scaling.alone(target, sync, form, 256)["collectives"]
    return [(it["kind"], it["bytes"], it["chips"], int(np.prod(it["box"]))) for it in result]


@pytest.mark.compiled
@pytest.mark.skipif(missing("tpu") is not None, reason=str(missing("tpu")))
def test_a_compiled_batch_norm_communicates_its_statistics_alone():
    """256 float32 channels. Forward a slot for each chip, with 3 values (4 with an axis name), backward 2 sums."""
    values, back = 256 * 4, ("all-reduce", 2 * 256 * 4, 8, 8)
    assert counts("v5ex8", "global", "jit") == [("all-reduce", 8 * 3 * values, 8, 8), back]
    assert counts("v5ex8", "global", "shard_map") == [("all-reduce", 8 * 4 * values, 8, 8), back]
    assert counts("v5ex8", "local", "jit") == counts("v5ex8", "local", "shard_map") == []
    assert counts("v5ex64", "groups of 8", "jit") == [("all-reduce", 8 * 3 * values, 8, 8), back], "not among all 64"


@pytest.mark.compiled
@pytest.mark.skipif(missing("tpu") is not None, reason=str(missing("tpu")))
def test_compiled_row_norms_communicate_gradients_alone():
    """Over features that are spread, in shard_map: an all-reduce each way, nothing gathered, and no chip outside."""
    for norm, values in (("LayerNorm", 4), ("RMSNorm", 2)):
        found = scaling.spread("v5ex64", norm, "shard_map")["collectives"]
        assert [it["kind"] for it in found] == ["all-reduce"] * 2
        assert [it["bytes"] for it in found] == [8 * values * 4 * scaling.ROWS, values // 2 * 4 * scaling.ROWS]
        assert {it["chips"] for it in found} == {8}


@pytest.mark.compiled
@pytest.mark.skipif(missing("tpu") is not None, reason=str(missing("tpu")))
@jax.numpy_dtype_promotion("standard")  # for flax
@jax.numpy_rank_promotion("allow")
def test_a_compiled_step_communicates_as_predicted():
    """Two all-reduces for each of six norms, and the gradients; where each chip is alone, one for all six besides."""
    bytes_of = lambda sync: [it["bytes"] for it in scaling.stage("v5ex8", sync)["collectives"]]
    sent = {sync: bytes_of(sync) for sync in ("global", "local", None)}
    weights = 2 * 2 * (256 * 64 + 9 * 64 * 64 + 64 * 256)  # bfloat16, of two blocks
    channels = 2 * (64 + 64 + 256)
    assert sent[None] == [weights]
    assert len(sent["global"]) == 2 * 6 + 1
    assert len(sent["local"]) == 2
    assert sum(sent["global"]) == sum(sent["local"]) == weights + 4 * channels * (8 * 3 + 2)
