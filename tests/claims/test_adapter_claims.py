"""The verdicts of S03 and S32 on made-up runs, and where S03's prefix starts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from anabranch import adapters
from anabranch.claims.s03_llm_adapters import judge, start_from_text
from anabranch.claims.s32_peft_survey import METHODS, verdict
from anabranch.evaluation.adapter_comparison import FULL, Comparison, Problem, Row
from anabranch.training.example import Example, Item
from tests import tiny


def row(method: str, **figures: Any) -> Row:
    plain: dict[str, Any] = {
        "method": method,
        "seed": 0,
        "options": {},
        "trainable": 1000,
        "saved_bytes": 4000,
        "peak_bytes": 0,
        "step_seconds": 0.1,
        "tokens_per_second": None,
        "merged_tokens_per_second": None,
        "nll": 1.0,
        "base_nll": 2.0,
        "forgetting": 0.1,
        "base_intact": True,
        "gap_closed": 0.5,
    }
    return Row(**{**plain, **figures})


FOUR = {
    name: row(name, nll=nll)
    for name, nll in {"lora": 1.0, "parallel": 1.1, "pfeiffer": 1.05, "prefix_tuning": 1.2}.items()
}


def test_s03_holds_where_all_thresholds_are_met() -> None:
    assert judge(FOUR, 0).holds


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("prefix_tuning", {"nll": 1.61}),
        ("pfeiffer", {"nll": 1.02}),
        ("prefix_tuning", {"nll": 1.09}),
        ("lora", {"trainable": 1101}),
    ],
)
def test_s03_falls_short_by_each_threshold(name: str, change: dict[str, Any]) -> None:
    assert not judge({**FOUR, name: replace(FOUR[name], **change)}, 0).holds


def comparison(**changes: dict[str, Any]) -> Comparison:
    rows = [row(FULL, forgetting=0.5, gap_closed=1.0)]
    rows += [row(name, **changes.get(name, {})) for name in METHODS]
    return Comparison(1000, rows)


def test_s32_holds_where_all_thresholds_are_met() -> None:
    measured = verdict(comparison(), (0,), 50_000)
    assert measured.holds
    assert measured.figures["gap_closed_median"]["soft_prompts"] == 0.5


@pytest.mark.parametrize(
    "changes",
    [
        {"pafi": {"gap_closed": 0.29}},
        {"prefix_tuning": {"gap_closed": 0.9}, "prompt_tuning": {"gap_closed": 0.9}},
        {"lora": {"forgetting": 5.0}},
        {"dora": {"base_intact": False}},
    ],
)
def test_s32_falls_short_by_each_threshold(changes: dict[str, dict[str, Any]]) -> None:
    assert not verdict(comparison(**changes), (0,), 50_000).holds


def test_s32_falls_short_if_a_method_could_not_run() -> None:
    found = comparison()
    missing = Comparison(
        found.budget, [r for r in found.rows if r.method != "dora"], {"dora": "no setting"}
    )
    assert not verdict(missing, (0,), 50_000).holds


@torch.no_grad()
def test_s03s_prefix_starts_as_if_the_text_stood_in_front() -> None:
    items: list[Item] = [(Example([*range(i, i + 5)], [False] + [True] * 4),) for i in (3, 40, 80)]
    text, question = [*items[0][0].tokens, *items[1][0].tokens][:8], [7, 9, 200]
    base = tiny.llama()
    expected = base(torch.tensor([text + question])).logits[:, len(text) :]
    model = adapters.build("prefix_tuning", tiny.llama(), num_virtual_tokens=len(text))
    start_from_text(Problem(items, items, items))(model.eval())
    torch.testing.assert_close(model(torch.tensor([question])).logits, expected)
