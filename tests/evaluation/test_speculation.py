"""Testbeds of speculation: trees against plain forward passes, replays against counting."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
import torch

from anabranch.evaluation.languages import Language
from anabranch.evaluation.speculation.replay import JudgedRequest, replay_judged
from anabranch.evaluation.speculation.texts import prompts
from anabranch.evaluation.speculation.traces import judged_traffic, judgements
from anabranch.evaluation.speculation.tree_decoding import (
    TreeModel,
    independent_drafts,
    tokens_per_call,
    with_layers,
)
from anabranch.evaluation.tiny_models import tiny_llama
from anabranch.serving.speculation.controller import FixedLength, NoSpeculation
from anabranch.serving.speculation.spectr import merge_drafts
from tests.tiny import byte_tokenizer, llama


@torch.inference_mode()
def test_rows_of_a_tree_are_those_of_plain_texts() -> None:
    network, text = llama(), [5, 17, 60, 3]
    model = TreeModel(network, text)
    for drafts in ([[1, 2, 3], [1, 4, 5], [9, 2, 3]], [[7, 7]]):
        tree, _ = merge_drafts(drafts)
        laws = model.laws(tree)
        torch.testing.assert_close(model.laws(tree, 2), laws[-2:])
        for node in range(-1, len(tree)):
            spelled = [*text, *tree.spelled(node)] if node >= 0 else text
            plain = network(torch.tensor([spelled])).logits[0, -1].softmax(-1)
            torch.testing.assert_close(laws[1 + node], plain, atol=1e-5, rtol=1e-4)
        model.append([1, 2])
        text = [*text, 1, 2]


def test_fewer_layers_share_tensors_and_leave_the_network_as_it_was() -> None:
    network = llama()
    ids = torch.tensor([[1, 2, 3]])
    before = network(ids).logits
    fewer = with_layers(network, [1])
    assert fewer.config.num_hidden_layers == 1
    assert network.config.num_hidden_layers == len(network.model.layers) == 2
    mine, theirs = fewer.model.layers[0], network.model.layers[1]
    assert mine.mlp.up_proj.weight is theirs.mlp.up_proj.weight
    assert (mine.self_attn.layer_idx, theirs.self_attn.layer_idx) == (0, 1)
    torch.testing.assert_close(network(ids).logits, before)
    assert not torch.allclose(fewer(ids).logits, before)


def test_a_perfect_draft_model_is_always_accepted() -> None:
    network = llama()
    emitted = tokens_per_call(network, network, [3, 4], (1, 2, 4), 3, calls=2, seed="a")
    assert {size: len(counts) for size, counts in emitted.items()} == {1: 8, 2: 4, 4: 2}
    assert all(count == 4 for counts in emitted.values() for count in counts)


def test_drafts_are_drawn_from_the_laws_that_come_with_them() -> None:
    drafts, laws = independent_drafts(TreeModel(llama(), [3, 4]), 3, 2, Random(0))
    tree, paths = merge_drafts(drafts)
    assert len(laws) == len(tree) + 1
    for draft, path in zip(drafts, paths, strict=True):
        for token, above in zip(draft, [-1, *path], strict=False):
            assert laws[1 + above, token] > 0
    leaves = [node for node in range(len(tree)) if not tree.children[1 + node]]
    assert not laws[[1 + node for node in leaves]].any()


@pytest.mark.parametrize("k", [0, 1, 3])
def test_a_replay_takes_as_many_steps_as_tokens_need(k: int) -> None:
    requests = [JudgedRequest(2.0, 300, np.ones(20, dtype=bool))]
    controller = FixedLength(k) if k else NoSpeculation()
    found = replay_judged(requests, controller, lambda *_: 1.0, None)
    # two steps for the prompt, which give the first token; then k + 1 tokens a step
    assert found.steps == 2 + math.ceil(19 / (k + 1))
    assert found.latencies.tolist() == [found.steps]
    assert found.seconds == 2.0 + found.steps


def test_a_replay_stops_a_draft_where_it_is_refused() -> None:
    flags = np.array([True, True, False, True, True, True])
    found = replay_judged(
        [JudgedRequest(0.0, 1, flags)], FixedLength(4), lambda *_: 1.0, lambda *_: 0.5
    )
    # prompt: token 0; then 1 is accepted and 2 corrected; then 3, 4 drafted, 5 behind them
    assert found.steps == 3
    looked_up = JudgedRequest(0.0, 1, flags, drafted=np.array([9, 1, 9, 1, 9, 9]))
    # token 0; 1 drafted, 2; 3 drafted, 4; 5
    assert replay_judged([looked_up], FixedLength(4), lambda *_: 1.0, None).steps == 4


def test_judgements_agree_with_the_overlap_of_the_laws() -> None:
    target, draft = tiny_llama(seed=1), tiny_llama(1, seed=2)
    flags = judgements(target.eval(), draft.eval(), Language(0), 16, 60, seed=0)
    assert flags.shape == (16, 60)
    assert 0.5 < flags.mean() < 1.0  # untrained models are nearly uniform, so nearly equal
    same = judgements(target, target, Language(0), 2, 10, seed=0)
    assert same.all()


def test_traffic_is_sorted_and_repeats_with_its_seed() -> None:
    flags = np.random.default_rng(0).random((4, 30)) < 0.5
    one, two = (judged_traffic(flags, 20, 2.0, (30.0, 9.0), seed=3) for _ in range(2))
    assert [r.seconds for r in one] == sorted(r.seconds for r in two)
    assert all(15 <= r.output_tokens <= 30 and r.prompt_tokens >= 1 for r in one)


@pytest.mark.parametrize("folder", [True, False])
def test_prompts_have_one_length(folder: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not folder:
        monkeypatch.delenv("ANABRANCH_DATA", raising=False)
    rows = prompts(byte_tokenizer(), 50, 40)
    assert len(rows) == 50
    assert {len(row) for row in rows} == {40}
    assert len({tuple(row) for row in rows}) > 25
