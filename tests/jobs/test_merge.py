"""Adapters leave the server: as files that plain PEFT loads, and as models of their own."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from typer.testing import CliRunner

from anabranch import adapters, models
from anabranch.cli import app
from anabranch.downloads import Download
from anabranch.errors import AdapterError, ConfigurationError
from anabranch.jobs.kinds.merge import Merge
from anabranch.models import cache
from anabranch.training.merging import merge_into_base
from tests.training.tiny_base import write_base

TOKENS = torch.arange(40)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "tiny", spread=0.2)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """A LoRA that changes what the base says."""
    model = adapters.build("lora", models.load(str(base)).network, r=4)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return adapters.save(model, tmp_path / "mine")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "cache"))
    yield


def logits(network: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return network.eval()(TOKENS).logits


def test_the_archive_is_one_that_plain_peft_loads(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    data = b"".join(Download.of(adapter).chunks())
    zipfile.ZipFile(io.BytesIO(data)).extractall(tmp_path / "unpacked")
    ours = adapters.load(models.load(str(base)).network, adapter)
    theirs = PeftModel.from_pretrained(models.load(str(base)).network, tmp_path / "unpacked/mine")
    assert torch.equal(logits(ours), logits(theirs))


def test_the_merged_model_says_what_the_adapted_one_says(base: Path, adapter: Path) -> None:
    seen: list[float | None] = []
    folder = merge_into_base(str(base), adapter, "both", lambda _, done: seen.append(done))
    assert seen[-1] == 1.0 and folder == cache.Entry("both").path
    merged = models.load("both")
    adapted = adapters.load(models.load(str(base)).network, adapter)
    torch.testing.assert_close(logits(merged.network), logits(adapted), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(merged.network), logits(models.load(str(base)).network))
    assert not any("lora" in name for name in merged.network.state_dict())
    assert (merged.card.name, merged.card.dtype) == ("both", models.card(str(base)).dtype)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert merge_into_base(str(base), adapter, "both") == folder  # the same again: nothing to do
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_what_cannot_be_merged_is_refused_and_leaves_nothing(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    network = models.load(str(base)).network
    shifting = adapters.save(adapters.build("ssf", network), tmp_path / "ssf")
    other = write_base(tmp_path / "other", layers=1)
    with pytest.raises(adapters.NotMergeable):
        merge_into_base(str(base), shifting, "shifted")
    with pytest.raises(adapters.AdapterMismatch, match="does not fit"):
        merge_into_base(str(other), adapter, "strange")
    with pytest.raises(AdapterError, match="no adapter"):
        merge_into_base(str(base), tmp_path, "nothing")
    with pytest.raises(ConfigurationError, match="cannot name a model"):
        merge_into_base(str(base), adapter, "../away")
    assert cache.entries() == []
    merge_into_base(str(base), adapter, "both")
    with pytest.raises(ConfigurationError, match="'both' is taken"):
        merge_into_base(str(other), adapter, "both")


def test_the_command_line_and_the_job_do_the_same(base: Path, adapter: Path) -> None:
    words = [str(base), str(adapter), "both"]
    spec = Merge().check(Merge().from_words(words))
    command = Merge().command(spec, Path())
    assert command[-6:] == ["adapters", "merge", *words, "--json"]
    result = CliRunner().invoke(app, command[-6:])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["path"] == str(cache.Entry("both").path)
    for wrong, named in (
        (words[:2], "BASE ADAPTER NAME"),
        ([*words[:1], "nowhere", "x"], "nowhere"),
    ):
        with pytest.raises((ConfigurationError, AdapterError), match=named):
            Merge().from_words(wrong)
    with pytest.raises(AdapterError, match="no adapter"):
        Merge().check({"base": words[0], "adapter": "/nowhere", "model": "x"})


def test_the_command_line_downloads_an_adapter(adapter: Path, tmp_path: Path) -> None:
    arguments = ["adapters", "download", str(adapter), "--output", str(tmp_path / "to")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert zipfile.ZipFile(tmp_path / "to" / "mine.zip").testzip() is None
