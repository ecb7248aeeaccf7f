"""Contrast in the engine's batch: equal to contrast without any cache, whatever else runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import InvalidRequest, RequestTooLong
from anabranch.models.protocol import SamplingParameters
from anabranch.serving import Engine, Request
from anabranch.serving.batch import StepPlan, StepResult
from anabranch.serving.contrast import UncertaintyContrast
from anabranch.serving.contrast.pairs import Contrast
from tests import tiny
from tests.serving.contrast.test_processor import ALWAYS, LAME, NEW, PROMPTS, SOME, without_cache
from tests.serving.test_engine import assert_idle


def request_of(
    index: int, contrast: UncertaintyContrast | None, lazy: bool = True, **sampling: Any
) -> Request:
    options = {"max_tokens": NEW, "temperature": 0.0, **sampling}
    lame = Contrast(tuple(LAME[index]), contrast, lazy) if contrast else None
    return Request(str(index), PROMPTS[index], SamplingParameters(**options), contrast=lame)


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("contrast", [ALWAYS, SOME, UncertaintyContrast(threshold=0.0)])
def test_equals_two_sequences_computed_anew(contrast: UncertaintyContrast, lazy: bool) -> None:
    engine = tiny.engine()
    tokens = engine.generate([request_of(i, contrast, lazy) for i in range(3)])
    model = tiny._llama()
    for index in range(3):
        expected = without_cache(model, contrast, PROMPTS[index], LAME[index])
        assert tokens[str(index)] == [expected]
    assert_idle(engine)


def test_threshold_0_is_plain_decoding_and_computes_no_companion_token() -> None:
    plain, lazy = tiny.engine(), tiny.engine()
    never = UncertaintyContrast(threshold=0.0)
    expected = plain.generate([request_of(i, None) for i in range(3)])
    assert lazy.generate([request_of(i, never) for i in range(3)]) == expected


@settings(max_examples=25, deadline=None)
@given(
    contrasts=st.lists(st.sampled_from([None, ALWAYS, SOME]), min_size=3, max_size=3),
    temperature=st.sampled_from([0.0, 0.8]),
    top_p=st.sampled_from([1.0, 0.9]),
    budget=st.sampled_from([1, 3, 64]),
    pages=st.sampled_from([6, 8, 100]),
    sequences=st.sampled_from([2, 3, 64]),
    policy=st.sampled_from(["splitfuse", "prefill_first", "orca"]),
)
def test_answers_do_not_depend_on_laziness_batch_or_preemption(
    contrasts: list[Any],
    temperature: float,
    top_p: float,
    budget: int,
    pages: int,
    sequences: int,
    policy: str,
) -> None:
    """Prompts of a page and a half, so that a cache of six pages preempts all the time."""
    runner = tiny.runner()
    requests = [
        [
            Request(
                str(i),
                [*range(40), *PROMPTS[i]],
                SamplingParameters(max_tokens=9, temperature=temperature, top_p=top_p, seed=i),
                contrast=Contrast((*range(30), *LAME[i]), each, lazy) if each else None,
            )
            for i, each in enumerate(contrasts)
        ]
        for lazy in (True, False)
    ]
    free = tiny.engine_of(runner, 100).generate(requests[1])
    options = {"token_budget": budget, "max_sequences": sequences, "policy": policy}
    for wanted in requests:
        engine = tiny.engine_of(runner, pages, **options)
        assert engine.generate(wanted) == free
        assert_idle(engine)


def test_aborting_a_leader_takes_its_companion_along() -> None:
    engine = tiny.engine()
    for index in range(3):
        engine.add(request_of(index, ALWAYS))
    for index in range(3):
        engine.step()
        engine.abort(str(index))
    assert not engine.has_work
    assert_idle(engine)


class Fails:
    """A runner that fails on, or computes NaN for, sequences with one prompt."""

    def __init__(self, inner: Any, prompt: list[int], nan: bool) -> None:
        self._inner, self._prompt, self._nan = inner, prompt, nan

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def execute(self, plan: StepPlan) -> StepResult:
        bad = [list(s.sequence.request.prompt) == self._prompt for s in plan.segments]
        if any(bad) and not self._nan:
            raise RuntimeError("a defect")
        result = self._inner.execute(plan)
        row = 0
        for segment, is_bad in zip(plan.segments, bad, strict=True):
            if is_bad:
                result.logits[row : row + segment.num_logits] = float("nan")
            row += segment.num_logits
        return result


@pytest.mark.parametrize("nan", [True, False])
@pytest.mark.parametrize("which", [PROMPTS[1], LAME[1]])
def test_a_bad_companion_fails_its_own_request_only(which: list[int], nan: bool) -> None:
    engine = tiny.engine()
    engine.runner = Fails(engine.runner, which, nan)  # type: ignore[assignment]
    for index in range(3):
        engine.add(request_of(index, ALWAYS))
    ends: dict[str, str] = {}
    for output in engine.run():
        if output.delta.finish_reason:
            ends[output.request_id] = output.delta.finish_reason
    assert ends == {"0": "length", "1": "error", "2": "length"}
    assert_idle(engine)


def test_what_cannot_be_contrasted_is_refused() -> None:
    engine = tiny.engine(pages=8)

    def refused(error: type[Exception], match: str, to: Engine = engine, **changes: Any) -> None:
        lame = changes.pop("lame", (1, 2))
        sampling = SamplingParameters(**{"max_tokens": 5, **changes})
        with pytest.raises(error, match=match):
            to.add(Request("r", [5, 6], sampling, contrast=Contrast(lame)))

    refused(InvalidRequest, "another prompt", lame=())
    refused(InvalidRequest, "another prompt", lame=(5, 6))
    refused(InvalidRequest, "must be 1 with contrast", n=2)
    refused(RequestTooLong, "leaves 0 for the answer", lame=tuple(range(1, 256)) * 2)
    refused(RequestTooLong, "lower max_tokens", max_tokens=200)
    refused(InvalidRequest, "max_sequences of 2", to=tiny.engine(max_sequences=1))
    assert_idle(engine)


def test_logprobs_are_the_models_own() -> None:
    engine = tiny.engine()
    engine.add(request_of(0, ALWAYS, logprobs=1))
    (first, *_) = [o.delta.logprobs for o in engine.run() if o.delta.logprobs]
    with torch.no_grad():
        row = tiny._llama()(torch.tensor([PROMPTS[0]])).logits[0, -1].log_softmax(-1)
    assert first[0].logprob == pytest.approx(float(row[first[0].token_id]), abs=1e-3)
