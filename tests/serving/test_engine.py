"""The engine against ``generate``, and what must hold whatever happens to a request."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import InvalidRequest, RequestTooLong
from anabranch.models.protocol import SamplingParameters
from anabranch.serving import Engine, Request
from anabranch.serving.batch import StepPlan, StepResult
from tests import tiny

UNLIMITED = 10**9
POLICIES = ("splitfuse", "prefill_first", "orca")


@cache
def expected(prompt: tuple[int, ...], max_tokens: int) -> list[int]:
    return tiny.reference(tiny._llama(), list(prompt), max_tokens)


def mix(seed: int) -> list[tuple[int, list[int], int]]:
    """Arrival step, prompt and output length of some requests; a third share a beginning."""
    rng = random.Random(seed)
    common = [rng.randrange(tiny.VOCABULARY) for _ in range(300)]
    requests = []
    for _ in range(rng.randint(2, 5)):
        length = rng.choice((1, 2, 31, 32, 33, 64, rng.randint(1, 600)))
        prompt = [rng.randrange(tiny.VOCABULARY) for _ in range(length)]
        if rng.random() < 0.33:
            prompt = common[: rng.choice((32, 64, 200))] + prompt[: 600 - 200]
        requests.append((rng.randint(0, 12), prompt, rng.choice((1, 2, 9, 33))))
    return requests


def serve(engine: Engine, requests: list[tuple[int, list[int], int]]) -> dict[str, list[int]]:
    """Run requests that arrive at given steps; tokens by request."""
    waiting = sorted((at, str(i), p, n) for i, (at, p, n) in enumerate(requests))
    tokens: dict[str, list[int]] = {name: [] for _, name, _, _ in waiting}
    step = 0
    while waiting or engine.has_work:
        while waiting and waiting[0][0] <= step:
            _, name, prompt, count = waiting.pop(0)
            engine.add(tiny.greedy(prompt, count, name))
        for output in engine.step():
            tokens[output.request_id].extend(output.delta.token_ids)
        step += 1
    return tokens


def assert_idle(engine: Engine) -> None:
    engine.cache.check_integrity()
    assert engine.cache.usage == 0.0
    assert not engine._requests
    assert engine.statistics().running == engine.statistics().waiting == 0


@pytest.mark.parametrize("budget", [1, 7, 64, UNLIMITED])
@pytest.mark.parametrize("policy", POLICIES)
def test_greedy_equals_generate_for_40_random_mixes(policy: str, budget: int) -> None:
    """Forty mixes per budget and policy, spread over prefix reuse on and off and cache sizes."""
    runner = tiny.runner()
    preemptions = 0
    for seed in range(40):
        requests = mix(seed)
        if seed % (8 if budget == 1 else 3):  # the long prompts of some mixes are enough
            requests = [(at, prompt[: 40 if budget == 1 else 130], n) for at, prompt, n in requests]
        longest = max(len(prompt) + count for _, prompt, count in requests)
        # Every other cache holds little more than the longest sequence, so others are preempted.
        pages = -(-longest // 32) + 1 if seed % 2 else 400
        options = {"token_budget": budget, "policy": policy, "prefix_reuse": seed % 4 < 2}
        engine = tiny.engine_of(runner, pages, **options)
        tokens = serve(engine, requests)
        for index, (_, prompt, count) in enumerate(requests):
            assert tokens[str(index)] == expected(tuple(prompt), count), (seed, index)
        assert_idle(engine)
        preemptions += engine.statistics().preemptions
    if policy != "splitfuse" or budget > 64:
        assert preemptions > 0


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_schedule_of_arrivals_and_aborts_leaves_all_pages_free(data: st.DataObject) -> None:
    draw = data.draw
    engine = tiny.engine_of(
        _shared_runner(),
        pages=draw(st.integers(8, 12)),
        token_budget=draw(st.sampled_from((1, 3, 8, 64, UNLIMITED))),
        policy=draw(st.sampled_from(POLICIES)),
        prefix_reuse=draw(st.booleans()),
        max_sequences=draw(st.integers(1, 6)),
    )
    wanted: dict[str, Request] = {}
    got: dict[str, list[list[int]]] = {}
    aborted: set[str] = set()
    for number in range(draw(st.integers(1, 6))):
        length = draw(st.integers(1, 20))
        prompt = draw(st.lists(st.integers(0, 3), min_size=length, max_size=length))
        choices = draw(st.integers(1, 3))
        request = tiny.greedy(prompt, draw(st.integers(1, 10)), str(number), n=choices)
        engine.add(request)
        wanted[request.id], got[request.id] = request, [[] for _ in range(choices)]
        for _ in range(draw(st.integers(0, 8))):
            for output in engine.step():
                assert output.request_id not in aborted
                got[output.request_id][output.delta.index].extend(output.delta.token_ids)
            engine.cache.check_integrity()
        if draw(st.booleans()):
            victim = draw(st.sampled_from(sorted(wanted)))
            engine.abort(victim)
            aborted.add(victim)
    for output in engine.run():
        assert output.request_id not in aborted
        got[output.request_id][output.delta.index].extend(output.delta.token_ids)
    for name, request in wanted.items():
        if name not in aborted:
            tokens = expected(tuple(request.prompt), request.sampling.max_tokens or 0)
            assert got[name] == [tokens] * request.sampling.n
    assert_idle(engine)


@cache
def _shared_runner() -> tiny.TransformersRunner:
    return tiny.runner(page_size=4)


def test_sampled_tokens_do_not_depend_on_batch_mates_or_chunks() -> None:
    prompt = list(range(40))
    sampling = SamplingParameters(max_tokens=12, temperature=1.0, top_p=0.9, seed=5, n=2)
    alone = tiny.engine().generate([Request("a", prompt, sampling)])["a"]
    crowd = [tiny.greedy([i] * 30, 20, f"other{i}") for i in range(5)]
    mixed = tiny.engine(token_budget=9).generate([*crowd, Request("a", prompt, sampling)])["a"]
    assert alone == mixed
    assert alone[0] != alone[1]


def test_prefix_reuse_computes_the_shared_beginning_once() -> None:
    engine = tiny.engine(prefix_reuse=True)
    prompt = [i % 50 for i in range(320)]
    first = engine.generate([tiny.greedy(prompt, 3, "a")])
    steps = engine.statistics()
    second = engine.generate([tiny.greedy(prompt, 3, "b")])
    assert first["a"] == second["b"]
    # The last full page is computed again: something must be left to sample from.
    assert engine.statistics().cached_prompt_tokens - steps.cached_prompt_tokens == 288


def test_long_prompt_is_split_evenly_when_nothing_else_waits() -> None:
    engine = tiny.engine(token_budget=100)
    engine.add(tiny.greedy([1] * 301, 1))
    sizes = []
    original = engine.runner.execute

    def record(plan: StepPlan) -> StepResult:
        sizes.append(plan.num_tokens)
        return original(plan)

    engine.runner.execute = record  # type: ignore[method-assign]
    list(engine.run())
    assert sizes == [76, 75, 75, 75]


def test_abort_in_the_middle_of_a_prefill_frees_its_pages_at_once() -> None:
    engine = tiny.engine(token_budget=16)
    engine.add(tiny.greedy([1] * 200, 5))
    engine.step()
    assert engine.cache.usage > 0
    engine.abort("r")
    assert_idle(engine)
    assert engine.step() == []


class TestFailures:
    def test_a_request_whose_step_raises_fails_alone(self) -> None:
        engine = tiny.engine()
        original = engine.runner.execute

        def poisoned(plan: StepPlan) -> StepResult:
            if any(s.sequence.request.id == "bad" for s in plan.segments):
                raise RuntimeError("boom")
            return original(plan)

        engine.runner.execute = poisoned  # type: ignore[method-assign]
        prompts = {name: [ord(name[0])] * 20 for name in ("alpha", "bad", "charlie")}
        for name, prompt in prompts.items():
            engine.add(tiny.greedy(prompt, 6, name, n=2))
        tokens: dict[str, list[int]] = {name: [] for name in prompts}
        errors = []
        for output in engine.run():
            if output.delta.finish_reason == "error":
                errors.append((output.request_id, output.delta.index))
            elif output.delta.index == 0:
                tokens[output.request_id].extend(output.delta.token_ids)
        assert errors == [("bad", 0), ("bad", 1)]
        for name in ("alpha", "charlie"):
            assert tokens[name] == expected(tuple(prompts[name]), 6)
        assert_idle(engine)

    def test_a_retried_batch_does_not_copy_pages_again(self) -> None:
        """The source of a copy may have a new owner in the very batch that is retried."""
        engine = tiny.engine(pages=3, page_size=8, prefix_reuse=False)
        original = engine.runner.execute
        prompt = [9] * 12
        first = expected(tuple(prompt), 6)
        # Choice 0 ends at once; its last page, of which choice 1 gets a copy, is free again.
        engine.add(tiny.greedy(prompt, 6, "fork", n=2))
        parent = engine._requests["fork"][0]
        parent.max_tokens = 1
        engine.step()
        engine.add(tiny.greedy([3] * 8, 2, "stranger"))
        failures = iter([True])

        def fails_after_computing(plan: StepPlan) -> StepResult:
            result = original(plan)
            if next(failures, False):
                raise RuntimeError("boom")
            return result

        engine.runner.execute = fails_after_computing  # type: ignore[method-assign]
        tokens = first[:1]
        for output in engine.run():
            if output.request_id == "fork":
                tokens.extend(output.delta.token_ids)
        assert tokens == first
        assert_idle(engine)

    def test_non_finite_logits_fail_one_request_and_leave_no_trace_in_its_pages(self) -> None:
        engine = tiny.engine(pages=8)
        original = engine.runner.execute
        engine.add(tiny.greedy([9] * 40, 8, "bad"))
        engine.add(tiny.greedy([5] * 40, 8, "good"))

        def poisoned(plan: StepPlan) -> StepResult:
            result = original(plan)
            for segment in plan.segments:
                if segment.sequence.request.id == "bad":
                    pages = segment.sequence.pages
                    for cache in engine.runner._caches:  # type: ignore[attr-defined]
                        cache.keys[:, pages] = float("nan")
                        cache.values[:, pages] = float("nan")
            return result

        engine.runner.execute = poisoned  # type: ignore[method-assign]
        reasons = {}
        tokens: list[int] = []
        for output in engine.run():
            reasons[output.request_id] = output.delta.finish_reason or reasons.get(
                output.request_id
            )
            if output.request_id == "good":
                tokens.extend(output.delta.token_ids)
        assert reasons == {"bad": "error", "good": "length"}
        assert tokens == expected((5,) * 40, 8)
        # The next owner of the pages must not inherit NaN, which no mask would hide.
        engine.runner.execute = original  # type: ignore[method-assign]
        assert engine.generate([tiny.greedy([9] * 200, 4, "c")])["c"] == [expected((9,) * 200, 4)]
        assert_idle(engine)


class TestRefusals:
    @pytest.mark.parametrize(
        ("request_", "field"),
        [
            (Request("r", []), "prompt"),
            (Request("r", [1, -1]), "prompt"),
            (Request("r", [tiny.VOCABULARY]), "prompt"),
            (tiny.greedy([1], 2, logit_bias={tiny.VOCABULARY: 1.0}), "logit_bias"),
            (tiny.greedy([1], 2, stop_token_ids=(-1,)), "stop_token_ids"),
        ],
    )
    def test_names_the_field(self, request_: Request, field: str) -> None:
        engine = tiny.engine()
        with pytest.raises(InvalidRequest) as caught:
            engine.add(request_)
        assert caught.value.field == field
        assert_idle(engine)

    def test_too_long_names_both_numbers(self) -> None:
        engine = tiny.engine(max_model_len=100)
        with pytest.raises(RequestTooLong, match=r"100 tokens.*at most 99"):
            engine.add(tiny.greedy([1] * 100, 1))
        with pytest.raises(RequestTooLong, match=r"make 101, but at most 100"):
            engine.add(tiny.greedy([1] * 90, 11))
        assert len(engine.generate([tiny.greedy([1] * 90, 10)])["r"][0]) == 10

    def test_longer_than_the_whole_cache(self) -> None:
        engine = tiny.engine(pages=3)
        with pytest.raises(RequestTooLong, match="cache of 96"):
            engine.add(tiny.greedy([1] * 96, 1))

    def test_the_same_id_twice(self) -> None:
        engine = tiny.engine()
        engine.add(tiny.greedy([1], 4))
        with pytest.raises(InvalidRequest, match="already running"):
            engine.add(tiny.greedy([1], 4))


class TestTextAndEnd:
    def test_text_is_that_of_the_tokens(self) -> None:
        tokenizer = tiny.byte_tokenizer()
        engine = tiny.engine(tokenizer=tokenizer)
        engine.add(tiny.greedy([70, 71], 50))
        outputs = list(engine.run())
        tokens = [token for output in outputs for token in output.delta.token_ids]
        assert "".join(output.delta.text for output in outputs) == tokenizer.decode(tokens)
        assert [output.delta.finish_reason for output in outputs][-1] == "length"

    def test_stop_token_and_stop_string_end_it(self) -> None:
        tokenizer = tiny.byte_tokenizer()
        tokens = expected((70, 71), 30)
        stop_id = tokens[10]
        engine = tiny.engine(tokenizer=tokenizer)
        stopped = engine.generate([tiny.greedy([70, 71], 30, stop_token_ids=(stop_id,))])["r"][0]
        assert stopped == tokens[: tokens.index(stop_id) + 1]

        text = tokenizer.decode(tokens)
        stop = text[4:6]
        engine.add(tiny.greedy([70, 71], 30, stop=(stop,)))
        outputs = list(engine.run())
        assert "".join(output.delta.text for output in outputs) == text[: text.index(stop)]
        assert outputs[-1].delta.finish_reason == "stop"
        assert_idle(engine)

    def test_logprobs_are_those_of_the_model(self) -> None:
        engine = tiny.engine(tokenizer=tiny.byte_tokenizer())
        engine.add(tiny.greedy([70, 71], 4, logprobs=3))
        entries = [entry for output in engine.run() for entry in output.delta.logprobs]
        tokens = [70, 71]
        for entry in entries:
            row = tiny._llama()(torch.tensor([tokens])).logits[0, -1].detach().log_softmax(-1)
            values, ids = row.topk(3)
            assert [top.token_id for top in entry.top] == ids.tolist()
            assert [top.logprob for top in entry.top] == pytest.approx(values.tolist(), abs=1e-4)
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
            tokens.append(entry.token_id)


def test_pooling_is_the_mean_of_the_last_hidden_states_for_any_budget() -> None:
    prompt = [i % 97 for i in range(150)]
    with torch.inference_mode():
        hidden = tiny._llama().model(torch.tensor([prompt])).last_hidden_state[0]
    for budget in (1, 40, UNLIMITED):
        engine = tiny.engine(token_budget=budget)
        engine.add(Request("e", prompt, pooling=True))
        engine.add(tiny.greedy(prompt, 3, "g"))
        vectors = [o.embedding for o in engine.run() if o.embedding is not None]
        torch.testing.assert_close(vectors[0], hidden.mean(0), rtol=1e-4, atol=1e-5)
        assert_idle(engine)
