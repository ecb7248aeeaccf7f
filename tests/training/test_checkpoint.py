"""Checkpoints are whole or absent, whatever happens while they are written."""

import json
import logging
import resource
import signal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.training.checkpoint import CheckpointStore
from anabranch.training.errors import CheckpointError, TrainingError
from anabranch.training.state import TENSOR, differences, join_tensors, split_tensors

STATE = {"weights": {"a.b": torch.arange(6.0).view(2, 3)}, "step": 3, "list": [1, None, {"x": 0.1}]}


def store(folder, keep=2):
    return CheckpointStore(folder / "checkpoints", keep)


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_round_trip_keeps_the_newest(tmp_path):
    made = store(tmp_path)
    for step in (9, 10, 100):
        made.save(step, {"seed": 1}, {**STATE, "step": step})
    assert made.steps() == [10, 100]
    found = made.newest()
    assert (found.step, found.identity, found.state["step"]) == (100, {"seed": 1}, 100)
    assert found.state["list"] == STATE["list"]
    assert torch.equal(found.state["weights"]["a.b"], STATE["weights"]["a.b"])


def test_only_safetensors_and_json(tmp_path):
    folder = store(tmp_path).save(1, {}, STATE)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["manifest.json", "state.json", "state.safetensors"]


@pytest.mark.parametrize("name", ["state.json", "state.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, name, caplog):
    made = store(tmp_path)
    made.save(1, {}, STATE)
    newest = made.save(2, {}, STATE)
    damage(newest / name)
    with caplog.at_level(logging.WARNING):
        assert made.newest().step == 1
    assert "step-2" in caplog.text and "the one before" in caplog.text


@pytest.mark.parametrize("name", ["state.json", "state.safetensors", "manifest.json"])
def test_a_missing_file_is_damage(tmp_path, name):
    made = store(tmp_path)
    made.save(1, {}, STATE)
    (made.save(2, {}, STATE) / name).unlink()
    assert made.newest().step == 1


def test_all_damaged_is_an_error(tmp_path):
    made = store(tmp_path)
    for step in (1, 2):
        damage(made.save(step, {}, STATE) / "state.safetensors")
    with pytest.raises(CheckpointError, match="Start again in another folder"):
        made.newest()


def test_none(tmp_path):
    assert store(tmp_path).newest() is None


def test_leftovers_of_a_killed_process_are_ignored_and_removed(tmp_path):
    made = store(tmp_path)
    made.save(1, {}, STATE)
    leftover = made.folder / "step-2.tmp"
    leftover.mkdir()
    (leftover / "state.json").write_text("{")
    assert made.newest().step == 1
    made.save(2, {}, STATE)
    assert made.steps() == [1, 2]
    assert not leftover.exists()


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path):
    made = store(tmp_path)
    made.save(1, {}, STATE)
    damage(made.save(2, {}, STATE) / "state.json")
    made.save(2, {}, {**STATE, "step": 7})
    assert made.newest().state["step"] == 7


def test_a_full_disk_keeps_the_previous(tmp_path):
    made = store(tmp_path, keep=1)
    made.save(1, {}, STATE)
    large = {"weights": torch.zeros(10_000)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"step 2 could not be written.*kept: step 1"):
            made.save(2, {}, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in made.folder.iterdir()] == ["step-1"]
    assert made.newest().step == 1
    made.save(2, {}, large)
    assert made.steps() == [2]


def test_another_format_is_refused(tmp_path):
    made = store(tmp_path)
    manifest = made.save(1, {}, STATE) / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        made.newest()


def test_tensors_that_share_memory(tmp_path):
    one = torch.arange(4.0)
    made = store(tmp_path)
    made.save(1, {}, {"a": one, "b": one, "c": one[1:]})
    found = made.newest().state
    assert torch.equal(found["b"], one) and torch.equal(found["c"], one[1:])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text().filter(lambda key: key != TENSOR), inner, max_size=3)
    ),
)


@given(VALUES)
def test_any_json_survives(tree):
    made, tensors = split_tensors(tree)
    assert not tensors
    assert join_tensors(json.loads(json.dumps(made)), tensors) == tree


def test_what_cannot_be_stored_is_named():
    with pytest.raises(TrainingError, match="/a/1: a set cannot be stored"):
        split_tensors({"a": [1, {2}]})
    with pytest.raises(TrainingError, match="key 3 is not a string"):
        split_tensors({"a": {3: 1}})


def test_differences_are_listed_by_path():
    lines = differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 5}, "e": 4})
    assert lines == [
        "a.c: 2 in the checkpoint, 5 now",
        "d: 3 in the checkpoint, None now",
        "e: None in the checkpoint, 4 now",
    ]
