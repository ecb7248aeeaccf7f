"""GGUF files: checked, converted once, converted again when needed."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anabranch import models
from anabranch.errors import ModelCorrupt, ModelError, ModelUnsupported
from anabranch.models import conversion
from anabranch.models.gguf import read_header

from .conftest import GGUF_WORDS, start_python, write_gguf


def cached(own_cache: Path) -> list[Path]:
    return sorted(p for p in (own_cache / "models").iterdir() if not p.name.startswith("."))


def partial(own_cache: Path) -> list[Path]:
    folder = own_cache / "models" / ".partial"
    return list(folder.iterdir()) if folder.is_dir() else []


def test_the_weights_are_the_files(own_cache: Path, tiny_gguf: Path) -> None:
    from gguf import GGUFReader, dequantize

    state = models.load(str(tiny_gguf)).network.state_dict()
    stored = {t.name: t for t in GGUFReader(tiny_gguf).tensors}
    for ours, theirs in {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight",
        "model.norm.weight": "output_norm.weight",
    }.items():
        tensor = stored[theirs]
        wanted = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
        assert torch.equal(state[ours], wanted.to(torch.bfloat16))


def test_the_card_is_the_same_before_and_after(own_cache: Path, tiny_gguf: Path) -> None:
    before = models.card(str(tiny_gguf))
    assert not (own_cache / "models").exists()
    model = models.load(str(tiny_gguf))
    after = models.card(str(tiny_gguf))
    assert before.to_dict() | {"size_bytes": 0} == after.to_dict() | {"size_bytes": 0}
    assert after.parameters == sum(p.numel() for p in model.network.parameters())
    assert (after.name, after.context_length, after.licence) == ("tiny", 128, "mit")
    assert after.provenance == f"file {tiny_gguf} (Q8_0, dequantised to bfloat16)"
    assert model.tokenizer.model_max_length == 128
    assert after.size_bytes == (model.path / "model.safetensors").stat().st_size


def test_it_is_converted_once_and_found_by_name(own_cache: Path, tiny_gguf: Path) -> None:
    said: list[tuple[str, float | None]] = []
    models.load(str(tiny_gguf), progress=lambda m, f: said.append((m, f)))
    fractions = [f for _, f in said if f is not None]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    assert any("tensor 20 of 20" in m for m, _ in said)
    said.clear()
    for name in (str(tiny_gguf), "tiny", cached(own_cache)[0].name):
        models.load(name, progress=lambda m, f: said.append((m, f)))
    assert [m for m, _ in said] == ["loading tiny"] * 3
    tiny_gguf.unlink()
    assert models.load("tiny").path == cached(own_cache)[0]
    assert partial(own_cache) == []


def test_a_changed_file_is_converted_again(
    own_cache: Path, tiny_gguf: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = models.load(str(tiny_gguf))
    write_gguf(tiny_gguf, seed=1)
    with caplog.at_level(logging.WARNING, "anabranch.models"):
        second = models.load(str(tiny_gguf))
    assert "has changed" in caplog.text
    assert first.card.fingerprint != second.card.fingerprint
    assert not torch.equal(first.network.lm_head.weight, second.network.lm_head.weight)


def test_a_touched_file_is_not(own_cache: Path, tiny_gguf: Path) -> None:
    models.load(str(tiny_gguf))
    os.utime(tiny_gguf, (1, 1))
    said: list[str] = []
    models.load(str(tiny_gguf), progress=lambda m, f: said.append(m))
    assert said == ["loading tiny"]


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "anabranch.json"])
@pytest.mark.parametrize("keep", [None, 0, 50])
def test_a_damaged_copy_is_made_again(
    own_cache: Path,
    tiny_gguf: Path,
    caplog: pytest.LogCaptureFixture,
    file: str,
    keep: int | None,
) -> None:
    path = models.load(str(tiny_gguf)).path / file
    size = path.stat().st_size
    path.unlink() if keep is None else os.truncate(path, keep)
    with caplog.at_level(logging.WARNING, "anabranch.models"):
        models.load(str(tiny_gguf))
    assert "is converted again" in caplog.text
    assert path.stat().st_size == size


def test_a_damaged_copy_without_its_source_says_how_to_repair_it(
    own_cache: Path, tiny_gguf: Path
) -> None:
    path = models.load(str(tiny_gguf)).path
    tiny_gguf.unlink()
    os.truncate(path / "model.safetensors", 1000)
    with pytest.raises(ModelCorrupt, match=r"has 1000 bytes.*models remove tiny"):
        models.load("tiny")
    assert models.remove("tiny") > 1000
    assert cached(own_cache) == []


@pytest.mark.parametrize("keep", [0, 3, 4, 20, 100, 1500, -1000, -1])
def test_a_half_downloaded_file(own_cache: Path, tiny_gguf: Path, keep: int) -> None:
    data = tiny_gguf.read_bytes()
    tiny_gguf.write_bytes(data[:keep])
    with pytest.raises(ModelCorrupt) as caught:
        models.load(str(tiny_gguf))
    assert str(tiny_gguf) in str(caught.value)
    if keep > 3:
        assert f"has {keep} bytes" in str(caught.value)
    if keep < 0:  # the header is whole, so the size is known; the last tensor needs no padding
        assert f"has {len(data) + keep} bytes, expected {len(data)};" in str(caught.value)
    assert cached(own_cache) == partial(own_cache) == []


def test_wrong_magic(own_cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"<html>not found</html>" * 10)
    with pytest.raises(ModelCorrupt, match="not a GGUF file"):
        models.load(str(file))


def test_wrong_version(own_cache: Path, tiny_gguf: Path) -> None:
    data = bytearray(tiny_gguf.read_bytes())
    data[4] = 9
    tiny_gguf.write_bytes(data)
    with pytest.raises(ModelUnsupported, match="version 9"):
        models.load(str(tiny_gguf))


@given(place=st.integers(4, 2500), value=st.binary(min_size=1, max_size=9))
@settings(
    deadline=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_damage_to_the_header_is_read_or_named(
    tiny_gguf: Path, place: int, value: bytes
) -> None:
    data = bytearray(tiny_gguf.read_bytes())
    data[place : place + len(value)] = value
    damaged = tiny_gguf.with_name("damaged.gguf")
    damaged.write_bytes(data)
    try:
        read_header(damaged)
    except ModelError as error:
        assert str(damaged) in str(error)


def test_an_unsupported_architecture_is_named(own_cache: Path, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "odd.gguf", architecture="rwkv9000")
    with pytest.raises(ModelUnsupported, match="rwkv9000"):
        models.load(str(file))
    assert cached(own_cache) == partial(own_cache) == []


def test_missing_tensors_are_not_left_random(own_cache: Path, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "holes.gguf", skip="blk.1.attn_q")
    with pytest.raises(ModelCorrupt, match=r"layers\.1\.self_attn\.q_proj"):
        models.load(str(file))
    assert cached(own_cache) == partial(own_cache) == []


def test_a_failed_conversion_leaves_the_old_model(
    own_cache: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = models.load(str(tiny_gguf)).path
    before = (path / "anabranch.json").read_text()
    write_gguf(tiny_gguf, seed=1)

    def full(header: object, folder: Path, progress: object) -> None:
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion, "convert", full)
    with pytest.raises(ModelError, match="No space left on device; free some space"):
        models.load(str(tiny_gguf))
    assert (path / "anabranch.json").read_text() == before
    assert partial(own_cache) == []


def test_a_full_disk_is_noticed_first(
    own_cache: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(ModelError, match="10 free"):
        models.load(str(tiny_gguf))


def test_a_cache_that_cannot_be_written(
    tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="set ANABRANCH_CACHE"):
        models.load(str(tiny_gguf))


CONVERT_SLOWLY = """
import sys
from anabranch import models

def progress(message, fraction):
    if message == "writing safetensors":
        print("writing", flush=True)
        sys.stdin.readline()

models.load({path!r}, progress=progress)
"""


def test_kill_9_leaves_nothing_that_a_new_load_trips_over(own_cache: Path, tiny_gguf: Path) -> None:
    child = start_python(CONVERT_SLOWLY.format(path=str(tiny_gguf)), own_cache)
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    child.kill()
    child.wait()
    child.communicate()
    assert len(partial(own_cache)) == 1
    assert cached(own_cache) == []
    assert models.card(str(tiny_gguf)).name == "tiny"
    assert models.load(str(tiny_gguf)).card.name == "tiny"
    assert partial(own_cache) == []


def test_what_another_model_left_behind_is_cleaned_too(own_cache: Path, tiny_gguf: Path) -> None:
    (own_cache / "models" / ".partial" / "dead").mkdir(parents=True)
    models.load(str(tiny_gguf))
    assert partial(own_cache) == []


def test_a_second_process_waits_and_does_not_convert(own_cache: Path, tiny_gguf: Path) -> None:
    child = start_python(CONVERT_SLOWLY.format(path=str(tiny_gguf)), own_cache)
    assert child.stdout is not None
    assert child.stdin is not None
    assert child.stdout.readline() == "writing\n"
    said: list[str] = []

    def progress(message: str, fraction: float | None) -> None:
        said.append(message)
        if message.startswith("waiting"):
            child.stdin.write("go on\n")
            child.stdin.flush()

    model = models.load(str(tiny_gguf), progress=progress)
    assert said[0].startswith("waiting for another process")
    assert said[1:] == ["loading tiny"]
    assert child.wait(60) == 0
    child.communicate()
    assert json.loads((model.path / "anabranch.json").read_text())["kind"] == "conversion"


def test_threads_convert_once_and_do_not_disturb_each_other(
    own_cache: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversions: list[float] = []
    real = conversion.convert

    def counted(*arguments: object) -> None:
        conversions.append(time.monotonic())
        real(*arguments)

    monkeypatch.setattr(conversion, "convert", counted)
    loaded: list[models.LoadedModel] = []
    threads = [
        threading.Thread(target=lambda: loaded.append(models.load(str(tiny_gguf))))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 3
    assert len(conversions) == 1
    for model in loaded:
        assert model.network.lm_head.weight is model.network.model.embed_tokens.weight


def test_two_files_of_one_name_are_two_models(own_cache: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        models.load(str(write_gguf(tmp_path / folder / "same.gguf", seed=len(folder))))
    assert len(cached(own_cache)) == 2
    with pytest.raises(ModelError, match="several models"):
        models.remove("same")
    for path in cached(own_cache):
        assert models.load(path.name).name == "same"
        models.remove(path.name)


def test_the_vocabulary_comes_along(own_cache: Path, tiny_gguf: Path) -> None:
    tokenizer = models.load(str(tiny_gguf)).tokenizer
    assert len(tokenizer) == len(GGUF_WORDS)
    assert tokenizer.eos_token_id == 2
