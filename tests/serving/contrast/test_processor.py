"""The processor inside transformers' ``generate``, against contrast without any cache."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from anabranch.errors import InvalidRequest, RequestFailed, RequestTooLong
from anabranch.serving.contrast import UncertaintyContrast
from anabranch.serving.contrast.companion import Companion
from anabranch.serving.contrast.processor import ContrastProcessor
from tests import tiny

PROMPTS = [[5, 17, 99, 4, 31], [201, 3], [8, 8, 9, 120, 44, 7, 61]]
LAME = [[5, 31], [201, 3, 3], [44, 61]]
NEW = 12
ALWAYS = UncertaintyContrast(threshold=2.0)
SOME = UncertaintyContrast(threshold=0.13)
"""Of the tiny model's steps, some are below and some above."""


def generate(model: Any, processor: ContrastProcessor | None, **options: Any) -> list[list[int]]:
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        pad_token_id=0,
        logits_processor=[processor] if processor else [],
        **{"do_sample": False, **options},
    )
    return output[:, width:].tolist()


def processor_of(model: Any, contrast: UncertaintyContrast, **options: Any) -> ContrastProcessor:
    return ContrastProcessor(model, contrast, PROMPTS, LAME, max_new_tokens=NEW, **options)


@torch.no_grad()
def without_cache(
    model: Any,
    contrast: UncertaintyContrast,
    prompt: list[int],
    lame: list[int],
    temperature: float = 1.0,
) -> list[int]:
    """Greedy, one row, both sequences computed anew at every step."""
    made: list[int] = []
    for _ in range(NEW):
        p, q = (
            (model(torch.tensor([ids + made])).logits[:, -1] / temperature).softmax(-1)
            for ids in (prompt, lame)
        )
        logits = contrast.mix(p, q) if contrast.uncertain(p) else p.log()
        made.append(int(logits.argmax()))
    return made


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("contrast", [ALWAYS, SOME])
def test_a_padded_batch_gives_what_each_row_gives_without_cache(
    lazy: bool, contrast: UncertaintyContrast
) -> None:
    model = tiny.llama()
    expected = [without_cache(model, contrast, p, n) for p, n in zip(PROMPTS, LAME, strict=True)]
    assert generate(model, processor_of(model, contrast, lazy=lazy)) == expected


def test_contrast_changes_tokens_here() -> None:
    """Else the tests above would show nothing."""
    model = tiny.llama()
    assert generate(model, processor_of(model, SOME)) != generate(model, None)


@pytest.mark.parametrize("sampled", [False, True])
def test_lazy_equals_eager_and_computes_in_fewer_passes(sampled: bool) -> None:
    model = tiny.llama()
    found = {}
    processors = {}
    for lazy in (True, False):
        torch.manual_seed(3)
        processors[lazy] = processor_of(model, SOME, lazy=lazy, temperature=0.8)
        found[lazy] = generate(
            model, processors[lazy], do_sample=sampled, **({"top_p": 0.95} if sampled else {})
        )
    assert found[True] == found[False]
    lazy, eager = processors[True], processors[False]
    assert 0 < lazy.contrasted == eager.contrasted < lazy.steps == len(PROMPTS) * NEW
    assert lazy.forwards == lazy.contrasted < eager.forwards == eager.steps
    assert lazy.computed_tokens <= eager.computed_tokens


def test_threshold_0_is_standard_decoding_and_computes_no_companion() -> None:
    model = tiny.llama()
    processor = processor_of(model, UncertaintyContrast(threshold=0.0))
    assert generate(model, processor) == generate(model, None)
    assert processor.contrasted == processor.forwards == 0


def test_weight_0_is_the_filtered_standard_law() -> None:
    model = tiny.llama()
    scores = torch.randn(1, 256, generator=torch.Generator().manual_seed(1))
    contrast = UncertaintyContrast(threshold=2.0, weight=0.0)
    processor = ContrastProcessor(model, contrast, [[1, 2]], [[3]], max_new_tokens=4)
    law = scores.softmax(-1)
    expected = law.masked_fill(law < (2 / 3) / 256, 0.0).log()
    assert torch.equal(processor(torch.tensor([[1, 2]]), scores), expected)


def test_several_answers_to_each_prompt_have_companions_of_their_own() -> None:
    model = tiny.llama()
    torch.manual_seed(0)
    processor = processor_of(model, SOME)
    rows = generate(model, processor, do_sample=True, num_return_sequences=2)
    assert len(rows) == 2 * len(PROMPTS)
    companions = processor._companions
    assert companions is not None
    for row, companion in enumerate(companions):
        assert companion is not None
        for token in rows[row][-1:]:
            companion.append(token)
        whole = torch.tensor([LAME[row // 2] + rows[row]])
        with torch.no_grad():
            torch.testing.assert_close(
                companion.logits(), model(whole).logits[0, -1], atol=1e-4, rtol=1e-4
            )


def test_a_chunk_gives_the_logits_of_single_steps() -> None:
    model = tiny.llama()
    chunk, steps = Companion(model, [7, 8]), Companion(model, [7, 8])
    steps.logits()
    for token in (9, 200, 31):
        chunk.append(token)
        steps.append(token)
        steps.logits()
    torch.testing.assert_close(chunk.logits(), steps.logits(), atol=1e-5, rtol=1e-4)
    assert (chunk.forwards, steps.forwards) == (1, 4)
    assert chunk.computed == steps.computed == 5
    assert chunk.logits() is chunk.logits()  # nothing waits: nothing is computed


def test_a_lame_prompt_that_equals_the_prompt_is_warned_of_and_switched_off(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny.llama()
    with caplog.at_level(logging.WARNING, "anabranch.serving"):
        processor = ContrastProcessor(
            model, ALWAYS, PROMPTS, [LAME[0], PROMPTS[1], None], max_new_tokens=NEW
        )
    assert "off for prompt 1" in caplog.text
    assert "prompt 2" not in caplog.text
    rows, plain = generate(model, processor), generate(model, None)
    assert rows[1:] == plain[1:]
    assert rows[0] == without_cache(model, ALWAYS, PROMPTS[0], LAME[0])
    assert processor.contrasted == NEW


def test_the_laws_are_mixed_after_the_temperature() -> None:
    model = tiny.llama()
    expected = [
        without_cache(model, SOME, p, n, temperature=2.0)
        for p, n in zip(PROMPTS, LAME, strict=True)
    ]
    assert generate(model, processor_of(model, SOME, temperature=2.0)) == expected


def test_a_companion_that_could_outgrow_the_context_is_refused_at_once() -> None:
    model = tiny.llama()
    with pytest.raises(RequestTooLong, match="1020 tokens and 12 new ones exceed"):
        ContrastProcessor(model, ALWAYS, [[1]], [[2] * 1020], max_new_tokens=12)
    ContrastProcessor(model, ALWAYS, [[1]], [[2] * 1012], max_new_tokens=12)


def test_rows_with_nan_fail() -> None:
    model = tiny.llama()
    processor = ContrastProcessor(model, ALWAYS, [[1]], [[2]], max_new_tokens=4)
    scores = torch.zeros(1, 256)
    scores[0, 9] = float("nan")
    with pytest.raises(RequestFailed, match="NaN"):
        processor(torch.tensor([[1]]), scores)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"lame": [[1]]}, "contrast.lame_prompt"),
        ({"lame": [[], [1], [2]]}, "contrast.lame_prompt"),
        ({"temperature": 0.0}, "contrast.temperature"),
        ({"temperature": float("nan")}, "contrast.temperature"),
    ],
)
def test_inputs_that_do_not_fit_name_their_field(changes: dict[str, Any], field: str) -> None:
    values = {"prompts": PROMPTS, "lame": LAME, "max_new_tokens": 4, **changes}
    with pytest.raises(InvalidRequest) as caught:
        ContrastProcessor(tiny.llama(), ALWAYS, **values)
    assert caught.value.field == field


def test_beams_right_padding_and_a_second_use_are_refused() -> None:
    model = tiny.llama()
    with pytest.raises(InvalidRequest, match="beam search"):
        generate(model, processor_of(model, ALWAYS), num_beams=3)
    processor = processor_of(model, ALWAYS)
    generate(model, processor)
    with pytest.raises(InvalidRequest, match="new processor"):
        generate(model, processor)
    padded = ContrastProcessor(model, ALWAYS, [[1, 2]], [[3]], max_new_tokens=4)
    with pytest.raises(InvalidRequest, match="pad on the left"):
        padded(torch.tensor([[1, 2, 0]]), torch.zeros(1, 256))
    with pytest.raises(InvalidRequest, match="4 rows"):
        processor_of(model, ALWAYS)(torch.ones(4, 9, dtype=torch.long), torch.zeros(4, 256))
