"""Recipes are read strictly: typos, wrong types and impossible combinations name their key."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import AnabranchError, ConfigurationError, UnknownName
from anabranch.training.checks import check
from anabranch.training.recipe_file import (
    built_in_recipes,
    difference,
    dump_yaml,
    load_recipe,
    parse_yaml,
)

BASE = """
recipe: mine
data:
  - {source: generator:instructions}
train: {steps: 10}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(BASE)
    return path


def test_defaults_file_and_overrides_merge_in_this_order(file: Path) -> None:
    file.write_text(BASE.replace("{steps: 10}", "{steps: 10, lr: 2e-4}"))
    recipe = load_recipe(file)
    assert (recipe.train.lr, recipe.train.batch, recipe.adapter.method) == (2e-4, 8, "lora")
    changed = load_recipe(
        file, ["train.lr=1e-3", "adapter.r=4", "data.0.split.test=1", "seed=7", "evaluate=[]"]
    )
    assert changed.train.lr == 1e-3
    assert changed.adapter.options == {"r": 4}
    assert changed.data[0].split is not None
    assert changed.data[0].split.shares["test"] == 1
    assert (changed.seed, changed.train.seed) == (7, 7)
    assert changed.evaluate == []


def test_short_forms_take_options_from_overrides(file: Path) -> None:
    file.write_text(BASE + "adapter: lora\nloss: causal\n")
    recipe = load_recipe(file, ["adapter.r=2", "loss.normalise=sample"])
    assert (recipe.adapter.method, recipe.adapter.options) == ("lora", {"r": 2})
    assert (recipe.loss.name, recipe.loss.options) == ("causal", {"normalise": "sample"})
    assert load_recipe(file, ["adapter=full"]).adapter.method == "full"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning=1", r"train\.learning: .*known: batch"),
        ("train.step=1", r"train\.step: .*did you mean 'steps'"),
        ("tran.steps=1", "tran: .*did you mean 'train'"),
        ("data.0.sorce=x", r"data\.0\.sorce: .*did you mean 'source'"),
        ("data.0.split.tset=1", r"data\.0\.split\.tset: .*did you mean 'test'"),
        ("data.0.filters.duplicate=no", r"data\.0\.filters\.duplicate: .*'duplicates'"),
        ("evaluate=[{rowz: 3}]", r"evaluate\.0\.rowz: .*did you mean 'rows'"),
        ("train.batch=many", r"train\.batch: .*'many' was given"),
        ("train.batch=0", r"train\.batch: .*greater than or equal to 1"),
        ("train.epochs=1", "train: give steps or epochs"),
        ("data=[]", "data: .*at least 1"),
        ("data.0.source=jsonl", "source jsonl needs path"),
        ("data.0.source=jsnl", "did you mean 'jsonl'"),
        ("data.0.path=x.jsonl", "takes no path"),
        ("data.0.split=tests", "must be one of train, valid, test"),
        ("data.0.split={train: 0.5}", "add up to 1; train 0.5"),
        ("data.0.weight=0", r"data\.0\.weight"),
        ("data.0.fallback=generator:x", "belongs to a builtin"),
        ("template=chta", "did you mean 'chat'"),
        ("recipe=a/b", "recipe: .*pattern"),
        ("deploy.register_as=../x", r"deploy\.register_as: .*pattern"),
        ("evaluate=[{data: [nope]}]", "names the data 'nope'"),
        ("evaluate=[{name: a}, {name: a}]", "two evaluations have the same name"),
        ("deploy={register_as: m, gate: {evaluation: heldot}}", "did you mean 'heldout'"),
        ("data.1.x=1", "not the position of an entry"),
        ("train.lr.x=1", "has no key 'x'|is a value"),
        ("train.lr", "not key=value"),
        ("train.lr={", "not YAML"),
    ],
)
def test_mistakes_name_their_key(file: Path, override: str, message: str) -> None:
    overrides = ["train={steps: 10, lr: 0.1}", override]
    with pytest.raises(ConfigurationError, match=message):
        load_recipe(file, overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter=pfeifer", "did you mean 'pfeiffer'"),
        ("adapter.rr=3", r"adapter\.rr: lora has no such option \(did you mean 'r'"),
        ("adapter={method: full, r: 3}", "has no options; r given"),
        ("adapter={method: hft, evry: 3}", r"adapter\.evry: .*did you mean 'every'"),
        ("loss=casual", "did you mean 'causal'"),
        ("loss.normalise=tokens", r"loss\.normalise: .*'token' or 'sample'"),
        ("loss.normalize=token", r"loss\.normalize: .*did you mean 'normalise'"),
        ("loss=dpo", "learns from pairs .*'data-0' has task: chat"),
        ("data.0.task=preference", "learns from single texts"),
        ("data.0.task=caht", "did you mean 'chat'"),
        ("data.0.task={name: arithmetic, consistent: perhaps}", r"task\.consistent"),
        ("data.0.options.rowz=3", "did you mean 'rows'"),
        ("data.0.source=generator:instruction", "did you mean 'instructions'"),
        ("template=missing.jinja", "cannot be read"),
    ],
)
def test_what_does_not_exist_is_refused_before_anything_is_loaded(
    file: Path, override: str, message: str
) -> None:
    recipe = load_recipe(file, [override])
    with pytest.raises(AnabranchError, match=message):
        check(recipe)


def test_a_reference_loss_needs_an_adapter(file: Path) -> None:
    pairs = ["data.0.source=generator:preferences", "data.0.task=preference", "loss=dpo"]
    check(load_recipe(file, pairs))
    with pytest.raises(ConfigurationError, match="compares with the frozen base"):
        check(load_recipe(file, [*pairs, "adapter=full"]))


def test_paths_start_at_the_file_and_overridden_ones_here(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(
        BASE.replace("source: generator:instructions", "source: jsonl, path: rows.jsonl")
        + "template: mine.jinja\nbase: ./model\n"
    )
    here = tmp_path / "elsewhere"
    here.mkdir()
    monkeypatch.chdir(here)
    recipe = load_recipe(file)
    assert recipe.data[0].path == tmp_path / "rows.jsonl"
    assert (recipe.template, recipe.base) == (
        str(tmp_path / "mine.jinja"),
        str(tmp_path / "model"),
    )
    assert load_recipe(file, ["data.0.path=rows.jsonl"]).data[0].path == here / "rows.jsonl"


def test_yaml_is_read_as_people_mean_it() -> None:
    assert parse_yaml("a: 1e-4\nb: on\nc: [no, true]\nd: 1_0", "x") == {
        "a": 1e-4,
        "b": "on",
        "c": ["no", True],
        "d": 10,
    }
    with pytest.raises(ConfigurationError, match="the key 'a' is there twice"):
        parse_yaml("a: 1\na: 2", "x")
    for text in ("- 1", "", "a: [", "!!python/object/apply:os.getcwd []"):
        with pytest.raises(ConfigurationError):
            parse_yaml(text, "x")


@given(st.text())
def test_any_text_is_yaml_or_refused(text: str) -> None:
    try:
        values = parse_yaml(text, "x")
    except ConfigurationError as error:
        assert "x" in str(error)  # names the file
    else:
        assert isinstance(values, dict)


def test_a_resolved_recipe_reads_back_as_itself(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(file, ["adapter.r=4", "data.0.split=train", "evaluate=[]"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_yaml(recipe.resolved()))
    assert load_recipe(again) == recipe


def test_differences_are_lines() -> None:
    old = {"a": {"b": 1, "c": [1, 2]}, "d": 1}
    new = {"a": {"b": 2, "c": [1, 3]}, "e": None}
    assert difference(old, new) == [
        "a.b: 1 -> 2",
        "a.c.1: 2 -> 3",
        "d: 1 -> (absent)",
        "e: (absent) -> None",
    ]
    assert difference(old, old) == []


def test_built_in_recipes_are_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = built_in_recipes()
    assert {"instruct", "gsm8k", "llm_adapters", "arithmetic", "shakespeare", "dpo"} <= set(found)
    for name, about in found.items():
        recipe = load_recipe(name)
        check(recipe)
        assert recipe.recipe == name
        assert about
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownName, match="did you mean 'gsm8k'"):
        load_recipe("gsm8")
    with pytest.raises(ConfigurationError, match="no recipe file"):
        load_recipe("missing.yaml")
