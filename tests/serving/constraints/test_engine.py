"""Constraints in the engine's step: every answer is from its language, drafted or not."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch import registry
from anabranch.errors import InvalidRequest, RequestFailed
from anabranch.models.constraint import OutputConstraint
from anabranch.models.protocol import SamplingParameters
from anabranch.serving import Engine, EngineOptions, Request
from anabranch.serving.constraints import CompiledConstraint, ConstraintCompiler
from anabranch.serving.speculation.lookup import Lookup
from tests.serving.constraints.tiny_tokenizers import END, byte_level
from tests.serving.speculation.helpers import Guess, Table, markov, speculating

ROWS = 320
BACKENDS = sorted(registry.available("constraints"))
PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["é", "ab"]}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
CONSTRAINTS = [
    OutputConstraint.json_schema(PERSON),
    OutputConstraint.regex("[0-9]{1,3}(,[0-9]{1,3}){0,4}"),
    OutputConstraint.choice(["true", "false", "null", "nullable"]),
]


@cache
def compiled(backend: str, constraint: OutputConstraint) -> CompiledConstraint:
    tokenizer = byte_level()
    end = tokenizer.convert_tokens_to_ids(END)
    return ConstraintCompiler(tokenizer, ROWS, (end,), backend).compile(constraint)


def request_of(name: str, backend: str, constraint: OutputConstraint, **sampling: Any) -> Request:
    options = {"max_tokens": 60, "temperature": 1.0, **sampling}
    parameters = SamplingParameters(constraint=constraint, **options)
    return Request(name, [65, 66], parameters, constraint=compiled(backend, constraint))


def engine() -> Engine:
    tokenizer = byte_level()
    end = tokenizer.convert_tokens_to_ids(END)
    options = EngineOptions(kv_memory=2000, page_size=16, speculation="off")
    table = Table(markov(5, ROWS, spread=2.0))
    return Engine(table, tokenizer, (end,), options)


def answers(running: Engine, requests: list[Request]) -> dict[tuple[str, int], tuple[str, str]]:
    texts: dict[tuple[str, int], str] = {}
    ends: dict[tuple[str, int], str] = {}
    for request in requests:
        running.add(request)
    for output in running.run():
        key = output.request_id, output.delta.index
        texts[key] = texts.get(key, "") + output.delta.text
        ends[key] = output.delta.finish_reason or ""
    return {key: (texts[key], ends[key]) for key in texts}


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.0, 1.0, 1.5]),
    n=st.sampled_from([1, 3]),
    top_p=st.sampled_from([1.0, 0.9]),
)
def test_finished_answers_are_from_their_language(
    backend: str, seed: int, temperature: float, n: int, top_p: float
) -> None:
    """And drafts, right and wrong, change no answer."""
    sampling = {"seed": seed, "temperature": temperature, "n": n, "top_p": top_p}
    requests = [request_of(str(i), backend, c, **sampling) for i, c in enumerate(CONSTRAINTS)]
    found = answers(engine(), requests)
    for (name, _), (text, end) in found.items():
        if end == "stop":
            assert_inside(CONSTRAINTS[int(name)], text)
        else:
            assert end == "length"
    wild = Guess(lambda s, count: s.tokens[-count:], ROWS, trees=False, seed=seed)
    for proposer in (Lookup(), wild):
        assert answers(speculating(engine(), proposer), requests) == found


def assert_inside(constraint: OutputConstraint, text: str) -> None:
    if constraint.kind == "json_schema":
        value = json.loads(text)
        assert set(value) == {"name", "age"} and value["name"] in ("é", "ab")
        assert isinstance(value["age"], int) and value["age"] <= 99
    elif constraint.kind == "choice":
        assert text in json.loads(constraint.text)
    else:
        parts = text.split(",")
        assert 1 <= len(parts) <= 5 and all(1 <= len(p) <= 3 and p.isdigit() for p in parts)


@pytest.mark.parametrize("backend", BACKENDS)
def test_forced_text_takes_fewer_steps(backend: str) -> None:
    constraint = OutputConstraint.choice(["a long text that leaves no choice at all once begun"])
    running = engine()
    request = request_of("r", backend, constraint, temperature=0.0)
    found = answers(running, [request])
    assert found["r", 0] == (json.loads(constraint.text)[0], "stop")
    totals = running.statistics()
    assert totals.accepted_tokens > 0
    assert totals.steps < 0.85 * totals.generated_tokens


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_law_is_the_models_renormalised_over_what_is_allowed(backend: str) -> None:
    """First tokens of 20,000 answers, by chi-square."""
    constraint = OutputConstraint.choice(["true", "false", "null", "12"])
    running = engine()
    counts = torch.zeros(ROWS)
    for name in map(str, range(160)):
        request = request_of(name, backend, constraint, max_tokens=1, n=125)
        for tokens in running.generate([request])[name]:
            counts[tokens[0]] += 1
    state = compiled(backend, constraint).start()
    words = torch.zeros(-(-ROWS // 32), dtype=torch.int32).numpy()
    state.fill_mask(words)
    allowed = torch.tensor([bool(words[t // 32] >> (t % 32) & 1) for t in range(ROWS)])
    logits = running.runner.logits[66].masked_fill(~allowed, float("-inf"))  # type: ignore[attr-defined]
    expected = 20_000 * logits.softmax(-1)
    assert counts[~allowed].sum() == 0
    some = expected > 5
    statistic = ((counts - expected)[some] ** 2 / expected[some]).sum()
    cells = int(some.sum()) - 1
    assert cells > 1 and statistic < cells + 5 * (2 * cells) ** 0.5


def test_a_constraint_must_be_compiled_and_allow_the_end() -> None:
    constraint = CONSTRAINTS[0]
    sampling = SamplingParameters(constraint=constraint)
    with pytest.raises(InvalidRequest, match="compiled"):
        engine().add(Request("r", [65], sampling))
    with pytest.raises(InvalidRequest, match="ignore_eos"):
        engine().add(request_of("r", BACKENDS[0], constraint, ignore_eos=True))


def test_an_aborted_answer_leaves_other_answers_of_the_constraint_alone() -> None:
    running = engine()
    expected = answers(engine(), [request_of("b", BACKENDS[0], CONSTRAINTS[0], seed=1)])
    running.add(request_of("a", BACKENDS[0], CONSTRAINTS[0], seed=2))
    running.step()
    running.step()
    running.abort("a")
    assert answers(running, [request_of("b", BACKENDS[0], CONSTRAINTS[0], seed=1)]) == expected


class Limited(CompiledConstraint):
    """Gives up at one of its calls, as back-ends do at their run-time limits."""

    memory = 0

    def __init__(self, inner: CompiledConstraint, call: str, after: int) -> None:
        self._inner, self._call, self._after = inner, call, after

    def start(self) -> Any:
        state, calls = self._inner.start(), itertools.count()
        method = getattr(state, self._call)

        def limited(*arguments: Any) -> Any:
            if next(calls) >= self._after:
                raise RequestFailed("the constraint needs more memory than allowed")
            return method(*arguments)

        setattr(state, self._call, limited)
        return state


@pytest.mark.parametrize("call", ["fill_mask", "accept", "forced"])
@pytest.mark.parametrize("after", [0, 2])
def test_a_limit_of_the_back_end_fails_one_request_and_says_why(call: str, after: int) -> None:
    requests = [
        request_of(str(i), "llguidance", CONSTRAINTS[1], seed=1, max_tokens=20) for i in range(3)
    ]
    expected = answers(engine(), requests)
    limited = Limited(compiled("llguidance", CONSTRAINTS[1]), call, after)
    requests[1] = replace(requests[1], constraint=limited)
    running, errors = engine(), []
    for request in requests:
        running.add(request)
    texts = {"0": "", "1": "", "2": ""}
    for output in running.run():
        texts[output.request_id] += output.delta.text
        errors += [(output.request_id, output.delta.error)] if output.delta.error else []
    assert errors == [("1", "the constraint needs more memory than allowed")]
    assert {name: texts[name] for name in ("0", "2")} == {
        name: expected[name, 0][0] for name in ("0", "2")
    }
    assert expected["1", 0][0].startswith(texts["1"])
