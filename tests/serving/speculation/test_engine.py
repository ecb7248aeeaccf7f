"""Whatever is drafted: what the engine emits is what it would have emitted without."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import ConfigurationError
from anabranch.models.protocol import SamplingParameters
from anabranch.serving import Engine, EngineOptions, Request
from anabranch.serving.adapters import AdapterCheckpoint
from anabranch.serving.batch import StepPlan
from anabranch.serving.runner.fused import FusedRunner
from anabranch.serving.sequence import Segment, Sequence
from anabranch.serving.speculation import Proposal
from anabranch.serving.speculation.errors import VocabularyMismatch
from anabranch.serving.speculation.lookup import Lookup
from tests import tiny
from tests.serving.coserving.helpers import job, rows
from tests.serving.speculation.helpers import Guess, Table, markov, speculating, table_engine
from tests.serving.test_fused_runner import lora_folder, rounded

PROMPTS = [[5], list(range(40)), [9, 8, 7] * 12, [3] * 31, [90, 1, 90, 1, 90]]


@cache
def fused() -> FusedRunner:
    return FusedRunner(rounded("LlamaConfig", {}), 512, 32)


@cache
def transformers_runner() -> Any:
    return tiny.runner()


RUNNERS = {"fused": fused, "transformers": transformers_runner}


def engine_on(runner: Any, **options: Any) -> Engine:
    memory = options.pop("pages", 200) * runner.page_bytes
    made = {name: options.pop(name, None) for name in ("tokenizer", "draft_runner")}
    limits = EngineOptions(kv_memory=memory, page_size=runner.page_size, **options)
    return Engine(runner, options=limits, **made)


def outputs_of(engine: Engine, requests: list[Request]) -> dict[tuple[str, int], list[Any]]:
    """Tokens, log-probabilities, text and end of every choice; the cache must be left empty."""
    found: dict[tuple[str, int], list[Any]] = {}
    for request in requests:
        engine.add(request)
    for output in engine.run():
        entry = found.setdefault((output.request_id, output.delta.index), [[], [], "", None])
        entry[0] += output.delta.token_ids
        entry[1] += [each.logprob for each in output.delta.logprobs]
        entry[2] += output.delta.text
        entry[3] = output.delta.finish_reason
    engine.cache.check_integrity()
    assert engine.cache.usage == 0.0
    return found


def oracle(found: dict[tuple[str, int], list[Any]]) -> Any:
    def continuation(sequence: Sequence, count: int) -> list[int]:
        tokens = found[sequence.request.id, sequence.index][0]
        done = sequence.num_generated
        return tokens[done : done + count]

    return continuation


SAMPLING = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.7, 1.0]),
        "top_p": st.sampled_from([1.0, 0.8]),
        "top_k": st.sampled_from([0, 20]),
        "frequency_penalty": st.sampled_from([0.0, 0.8]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "logprobs": st.sampled_from([None, 2]),
        "max_tokens": st.integers(1, 24),
        "seed": st.integers(0, 5),
        "n": st.sampled_from([1, 1, 3]),
        "stop": st.sampled_from([(), ("e",), ("th", "A")]),
        "stop_token_ids": st.sampled_from([(), (65, 66, 67)]),
    }
)


@pytest.mark.parametrize("kind", RUNNERS)
@settings(max_examples=30, deadline=None)
@given(
    wanted=st.lists(st.tuples(st.sampled_from(PROMPTS), SAMPLING), min_size=1, max_size=4),
    trees=st.booleans(),
    budget=st.sampled_from([None, 3, 11]),
    pages=st.sampled_from([200, 12]),
    seed=st.integers(0, 1000),
)
def test_chosen_drafts_change_nothing_at_all(
    kind: str, wanted: list[Any], trees: bool, budget: int | None, pages: int, seed: int
) -> None:
    """Tokens, log-probabilities, text and ends equal those of an engine that does not draft."""
    requests = [
        Request(str(i), prompt, SamplingParameters(**sampling))
        for i, (prompt, sampling) in enumerate(wanted)
    ]
    options = {"tokenizer": tiny.byte_tokenizer(), "token_budget": budget, "pages": pages}
    runner = RUNNERS[kind]()
    plain = outputs_of(engine_on(runner, speculation="off", **options), requests)
    engine = speculating(
        engine_on(runner, speculation="off", **options),
        Guess(oracle(plain), runner.vocabulary, trees, seed),
    )
    found = outputs_of(engine, requests)
    assert found.keys() == plain.keys()
    for key, (tokens, logprobs, text, end) in found.items():
        assert [tokens, text, end] == [plain[key][0], *plain[key][2:]]
        # Branches of a tree lie between a row and its context, so that sums are taken in another
        # order; rows of the transformers runner depend on the batch anyway.
        assert logprobs == pytest.approx(plain[key][1], abs=1e-5 if kind == "fused" else 1e-3)


@pytest.mark.parametrize("kind", RUNNERS)
def test_lookup_changes_nothing(kind: str) -> None:
    requests = [tiny.greedy(prompt, 60, str(i)) for i, prompt in enumerate(PROMPTS)]
    runner = RUNNERS[kind]()
    expected = outputs_of(engine_on(runner, speculation="off"), requests)
    engine = speculating(engine_on(runner, speculation="off"), Lookup())
    assert outputs_of(engine, requests) == expected
    assert engine.statistics().accepted_tokens > 0


def test_a_right_prediction_saves_steps() -> None:
    request = tiny.greedy(PROMPTS[1], 60)
    expected = outputs_of(engine_on(fused(), speculation="off"), [request])
    predicted = replace(request, prediction=expected["r", 0][0])
    engine = speculating(engine_on(fused(), speculation="off"), Lookup())
    assert outputs_of(engine, [predicted]) == expected
    assert engine.statistics().steps < 20


@pytest.mark.parametrize("drafts", [1, 3])
@pytest.mark.parametrize("name", ["layers", "model"])
def test_greedy_answers_do_not_depend_on_the_drafting_model(name: str, drafts: int) -> None:
    requests = [tiny.greedy(prompt, 40, str(i)) for i, prompt in enumerate(PROMPTS)]
    expected = outputs_of(engine_on(fused(), speculation="off"), requests)
    draft = FusedRunner(rounded("LlamaConfig", {"num_hidden_layers": 1}), 512, 32)
    engine = engine_on(fused(), speculation=name, draft_layers=1, drafts=drafts, draft_runner=draft)
    speculating(engine, engine.speculation.proposer, 4)
    assert outputs_of(engine, requests) == expected
    assert engine.statistics().drafted_tokens > 0
    if name == "model":
        cache = engine.speculation.proposer._cache  # type: ignore[union-attr]
        cache.check_integrity()
        assert cache.usage == 0.0


def test_a_draft_model_that_is_the_target_is_always_right() -> None:
    """What it keeps of accepted drafts is what it would compute, also after many in a row."""
    twin = FusedRunner(rounded("LlamaConfig", {}), 512, 32)
    for drafts in (1, 3):
        engine = engine_on(fused(), speculation="model", drafts=drafts, draft_runner=twin)
        speculating(engine, engine.speculation.proposer, 4)
        for seed, temperature in ((None, 0.0), (3, 1.0)):
            sampling = SamplingParameters(max_tokens=61, temperature=temperature, seed=seed)
            engine.generate([Request(str(i), p, sampling) for i, p in enumerate(PROMPTS)])
        totals = engine.statistics()
        if drafts == 1:
            assert totals.accepted_tokens == totals.drafted_tokens
        assert totals.steps <= 4 * (61 // 5 + 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("drafts", "batch", "tokens"),
    [(1, 128, 100_000), (4, 128, 20_000), (2, 128, 12_000)]
    + [(drafts, batch, 1200 * batch) for drafts in (1, 2, 4) for batch in (1, 7)],
)
def test_the_law_of_drawn_answers_is_the_targets(drafts: int, batch: int, tokens: int) -> None:
    """Chi-square of drawn tokens, as answers of four, against the law of the target."""
    vocabulary, length = 3, 4
    target, draft = markov(0, vocabulary), markov(1, vocabulary)
    engine = table_engine(target, draft, drafts)
    speculating(engine, engine.speculation.proposer, 3)
    counts: Counter[tuple[int, ...]] = Counter()
    for start in range(0, tokens // length, batch):
        sampling = SamplingParameters(max_tokens=length, temperature=0.9, n=min(batch, 128))
        request = Request(str(start), [0], sampling)
        counts.update(map(tuple, engine.generate([request])[str(start)]))
    assert_law(counts, (target / 0.9).softmax(-1), length)
    assert 0 < engine.statistics().accepted_tokens < engine.statistics().drafted_tokens


@pytest.mark.slow
@pytest.mark.parametrize("trees", [False, True])
def test_the_law_with_chosen_drafts_is_the_targets(trees: bool) -> None:
    vocabulary, length = 3, 4
    target = markov(2, vocabulary)
    engine = speculating(
        table_engine(target, None, 1),
        Guess(lambda sequence, count: [1, 0, 2][:count], vocabulary, trees),
    )
    counts: Counter[tuple[int, ...]] = Counter()
    for name in map(str, range(200)):
        sampling = SamplingParameters(max_tokens=length, temperature=1.0, n=125)
        counts.update(map(tuple, engine.generate([Request(name, [1], sampling)])[name]))
    assert_law(counts, target.softmax(-1), length, start=1)


def assert_law(
    counts: Counter[tuple[int, ...]], law: torch.Tensor, length: int, start: int = 0
) -> None:
    """Chi-square over all answers of a length, rare ones together: a false alarm in 100,000."""
    total = counts.total()
    cells: list[tuple[float, float]] = []
    rare_expected, rare_seen = 0.0, 0
    for answer in itertools.product(range(law.shape[0]), repeat=length):
        steps = zip((start, *answer), answer, strict=False)
        expected = total * torch.prod(torch.stack([law[a, b] for a, b in steps])).item()
        if expected < 5:
            rare_expected, rare_seen = rare_expected + expected, rare_seen + counts[answer]
        else:
            cells.append((expected, counts[answer]))
    if rare_expected:
        cells.append((max(rare_expected, 5.0), rare_seen))
    statistic = sum((seen - expected) ** 2 / expected for expected, seen in cells)
    freedom = len(cells) - 1
    assert freedom > 3
    assert statistic < freedom + 6 * (2 * freedom) ** 0.5, f"{statistic:.0f} over {freedom} cells"


@pytest.mark.parametrize("kind", RUNNERS)
@pytest.mark.parametrize("past", [1, 31, 70])
def test_rows_of_a_tree_equal_rows_of_its_paths(kind: str, past: int) -> None:
    """And once its keys and values are moved, what follows is computed as after the path."""
    runner = RUNNERS[kind]()
    runner.allocate(20)
    tokens = [(7 * i) % 90 for i in range(past)]
    tree = Proposal((4, 5, 6, 7, 8, 9, 4), (-1, -1, 0, 2, 1, 2, 5))
    pages = [11, 3, 7, 5]
    sequence = Sequence(Request("r", tokens), 0, tokens, 1, pages=pages)

    def run(*segments: Segment) -> torch.Tensor:
        return runner.execute(StepPlan(segments, runner.page_size)).logits

    rows = run(Segment(sequence, 0, past, tree))
    assert len(rows) == 1 + len(tree)
    for node in range(len(tree)):
        path = [*tokens, *tree.spelled(node)]
        alone = Sequence(Request("a", path), 0, path, 1, pages=[0, 1, 2, 4])
        torch.testing.assert_close(rows[1 + node], run(Segment(alone, 0, len(path)))[0], **CLOSE)

    kept = tree.path(6)

    def slot(place: int) -> int:
        return pages[place // 32] * 32 + place % 32

    runner.move_slots(
        [slot(past + node) for node in kept], [slot(past + i) for i in range(len(kept))]
    )
    grown = [*tokens, *tree.spelled(6), 77]
    after = Sequence(Request("g", grown), 0, grown, 1, pages=pages)
    row = run(Segment(after, len(grown) - 1, len(grown)))
    alone = Sequence(Request("a", grown), 0, grown, 1, pages=[0, 1, 2, 4])
    torch.testing.assert_close(row, run(Segment(alone, 0, len(grown))), **CLOSE)


CLOSE = {"rtol": 1e-3, "atol": 1e-3}


@pytest.mark.parametrize("name", ["lookup", "layers"])
def test_adapters_draft_and_verify_with_their_own_weights(name: str, tmp_path: Path) -> None:
    runner = FusedRunner(rounded("LlamaConfig", {}), 512, 32)
    checkpoint = AdapterCheckpoint.read(lora_folder(tmp_path))
    answers = []
    for speculation in ("off", name):
        engine = engine_on(runner, speculation=speculation, draft_layers=1)
        speculating(engine, engine.speculation.proposer, 4)
        adapter = engine.add_adapter("a", checkpoint)
        requests = [tiny.greedy(prompt, 40, str(i)) for i, prompt in enumerate(PROMPTS)]
        requests += [replace(r, id=f"{r.id} adapted", adapter=adapter) for r in requests]
        answers.append(outputs_of(engine, requests))
    assert answers[0] == answers[1]
    assert answers[0]["1", 0] != answers[0]["1 adapted", 0]
    assert engine.statistics().accepted_tokens > 0


@pytest.mark.parametrize("name", ["lookup", "layers"])
def test_jobs_train_in_the_same_steps(name: str, tmp_path: Path) -> None:
    requests = [tiny.greedy(prompt, 40, str(i)) for i, prompt in enumerate(PROMPTS)]
    expected = outputs_of(engine_on(fused(), speculation="off"), requests)
    engine = engine_on(fused(), speculation=name, draft_layers=1)
    speculating(engine, engine.speculation.proposer, 4)
    handle = engine.finetune(job(tmp_path / "job", rows([40, 60, 30])))
    assert outputs_of(engine, requests) == expected
    while engine.has_work:
        engine.step()
    assert handle.progress.state == "succeeded"
    assert engine.statistics().accepted_tokens > 0


class Broken(Lookup):
    """Raises, now and then."""

    name = "broken"

    def propose(self, sequences: Any, lengths: Any) -> Any:
        if sum(len(sequence.tokens) for sequence in sequences) % 2:
            raise RuntimeError("a defect")
        return super().propose(sequences, lengths)


def test_a_drafter_that_fails_costs_no_request() -> None:
    requests = [tiny.greedy(prompt, 30, str(i)) for i, prompt in enumerate(PROMPTS)]
    expected = outputs_of(engine_on(fused(), speculation="off"), requests)
    engine = speculating(engine_on(fused(), speculation="off"), Broken())
    assert outputs_of(engine, requests) == expected


class FailsOnDrafts(Table):
    """A target that cannot verify."""

    def execute(self, plan: StepPlan) -> Any:
        if any(segment.draft for segment in plan.segments):
            raise RuntimeError("a defect")
        return super().execute(plan)


def test_a_verification_that_fails_is_done_without_the_draft() -> None:
    table = markov(3, 6)
    memory = EngineOptions(kv_memory=100, page_size=16, speculation="off")
    engine = speculating(Engine(FailsOnDrafts(table), options=memory), Lookup())
    requests = [tiny.greedy([1, 2, 1, 2, 1, 2], 12, str(i)) for i in range(3)]
    expected = table_engine(table, None, 1).generate(requests)
    assert engine.generate(requests) == expected


def test_aborting_between_steps_leaves_nothing_behind() -> None:
    twin = FusedRunner(rounded("LlamaConfig", {}), 512, 32)
    engine = engine_on(fused(), speculation="model", drafts=2, draft_runner=twin)
    speculating(engine, engine.speculation.proposer, 4)
    for i, prompt in enumerate(PROMPTS):
        engine.add(tiny.greedy(prompt, 40, str(i)))
    for i in range(len(PROMPTS)):
        engine.step()
        engine.step()
        engine.abort(str(i))
    assert not engine.has_work
    engine.cache.check_integrity()
    assert engine.cache.usage == 0.0
    assert engine.speculation.proposer._cache.usage == 0.0  # type: ignore[union-attr]


def test_what_cannot_draft_is_refused_at_the_start() -> None:
    with pytest.raises(ConfigurationError, match="needs draft_model"):
        engine_on(fused(), speculation="model")
    with pytest.raises(ConfigurationError, match="needs draft_layers"):
        engine_on(fused(), speculation="layers")
    with pytest.raises(ConfigurationError, match="between 1 and 1, not 2"):
        engine_on(fused(), speculation="layers", draft_layers=2)
    with pytest.raises(ConfigurationError, match="fused runner"):
        engine_on(transformers_runner(), speculation="layers", draft_layers=1)
    with pytest.raises(VocabularyMismatch, match="4 tokens"):
        engine_on(fused(), speculation="model", draft_runner=Table(markov(0, 4)))
    with pytest.raises(ConfigurationError, match="drafts must be between 1 and 63, not 0"):
        engine_on(fused(), speculation="layers", draft_layers=1, drafts=0)
