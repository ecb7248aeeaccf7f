"""k-SEQ and SpecTr give exactly the target's law, and accept nearly as much as can be."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from anabranch.errors import AnabranchError
from anabranch.evaluation.speculation.transport import optimal_acceptance, optimal_transport_plan
from anabranch.serving.speculation import spectr
from anabranch.serving.speculation.errors import InvalidLaw
from anabranch.serving.speculation.proposal import Proposal
from anabranch.serving.speculation.spectr import (
    acceptance_probability,
    division_factor,
    draw,
    kseq,
    merge_drafts,
    residual,
    select,
)

BOUND = 1 - 1 / np.e


def laws(rows: int, vocabulary: int, seed: int, sharpness: float = 1.0) -> Tensor:
    """Random laws ``[rows, vocabulary]``; the larger the sharpness, the fewer tokens matter."""
    alpha = np.full(vocabulary, 1 / sharpness)
    return torch.from_numpy(np.random.default_rng(seed).dirichlet(alpha, rows))


@st.composite
def law_pairs(draw: st.DrawFn, vocabulary: int = 6) -> tuple[Tensor, Tensor]:
    """Laws with zeros, equal laws, disjoint ones, one-hot ones."""
    size = draw(st.integers(1, vocabulary))
    weights = st.lists(
        st.sampled_from([0.0, 0.0, 1e-9, 0.1, 1.0, 3.0]), min_size=size, max_size=size
    )
    rows = [draw(weights.filter(any)) for _ in range(2)]
    p, q = torch.tensor(rows, dtype=torch.float64)
    return p / p.sum(), q / q.sum()


class Paths:
    """A generator of random numbers that lets a function run once for every outcome.

    Each comparison of a number with a chance, each shuffle and each draw from a law is a branch;
    :func:`exact_law` adds up the probabilities of the branches that lead to each result.
    """

    def __init__(self, script: list[int]) -> None:
        self.script = script
        self.taken: list[int] = []
        self.open: list[list[int]] = []
        self.probability = 1.0

    def choose(self, weights: Sequence[float]) -> int:
        possible = [i for i, weight in enumerate(weights) if weight > 0]
        at = len(self.taken)
        choice = self.script[at] if at < len(self.script) else possible[0]
        if at >= len(self.script):
            self.open += [[*self.taken, other] for other in possible[1:]]
        self.taken.append(choice)
        self.probability *= weights[choice]
        return choice

    def random(self) -> Any:
        return Number(self)

    def shuffle(self, values: list[int]) -> None:
        for last in range(len(values) - 1, 0, -1):
            other = self.choose([1 / (last + 1)] * (last + 1))
            values[last], values[other] = values[other], values[last]


class Number:
    """A uniform number whose comparison is a branch."""

    def __init__(self, paths: Paths) -> None:
        self.paths = paths

    def __lt__(self, chance: float) -> bool:
        chance = min(1.0, chance)
        return self.paths.choose([1 - chance, chance]) == 1


@pytest.fixture(autouse=True, scope="module")
def solve_once() -> Iterator[None]:
    """Enumerations ask for the same division factors again and again."""
    solve, known = spectr._division_factor, {}

    def remembered(p: Tensor, q: Tensor, k: Tensor) -> Tensor:
        key = p.numpy().tobytes(), q.numpy().tobytes(), k.numpy().tobytes()
        if key not in known:
            known[key] = solve(p, q, k)
        return known[key]

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(spectr, "_division_factor", remembered)
        yield


def exact_law(run: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> dict[Any, float]:
    """Probability of each result of a function of a random generator, without sampling."""

    def choose(law: Tensor, uniform: Number) -> int:
        return uniform.paths.choose(law.tolist())

    monkeypatch.setattr(spectr, "draw", choose)
    found: dict[Any, float] = defaultdict(float)
    scripts: list[list[int]] = [[]]
    while scripts:
        paths = Paths(scripts.pop())
        result = run(paths)
        found[result] += paths.probability
        scripts += paths.open
    return dict(found)


def one_step_law(p: Tensor, q: Tensor, k: int, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Law of k-SEQ's token over all drafts."""
    total = np.zeros(len(p))
    for drafts in product(range(len(p)), repeat=k):
        weight = float(p[list(drafts)].prod())
        if weight == 0:
            continue
        found = exact_law(lambda r, d=drafts: kseq(p, q, d, r.random)[0], monkeypatch)
        for token, probability in found.items():
            total[token] += weight * probability
    return total


# --- the law ---


@pytest.mark.parametrize(("vocabulary", "k"), [(2, 3), (3, 3), (5, 2), (6, 1), (4, 3)])
def test_one_token_has_the_targets_law(
    vocabulary: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, q = laws(2, vocabulary, seed=vocabulary + k)
    np.testing.assert_allclose(one_step_law(p, q, k, monkeypatch), q, atol=1e-12)


@given(law_pairs(vocabulary=4), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_law_holds_with_zeros_and_equal_and_disjoint_laws(
    pair: tuple[Tensor, Tensor], k: int
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        np.testing.assert_allclose(one_step_law(*pair, k, monkeypatch), pair[1], atol=1e-12)


@given(law_pairs(), st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_acceptance_and_residual_add_up_to_the_target(pair: tuple[Tensor, Tensor], k: int) -> None:
    """The same for more drafts, by formula: tokens are accepted as min(p, q / rho) has them."""
    p, q = pair
    rho = division_factor(p, q, k)
    accepted = torch.minimum(p, q / rho)
    beta = accepted.sum()
    chance = acceptance_probability(p, q, k)
    share = accepted / beta if beta > 0 else torch.zeros_like(p)
    total = share * chance + residual(p, q, k, rho) * (1 - chance)
    torch.testing.assert_close(total, q, atol=1e-12, rtol=0)
    assert 1 <= float(rho) <= k
    torch.testing.assert_close(chance, 1 - (1 - beta) ** k, atol=1e-12, rtol=0)
    assert bool((share * chance <= q + 1e-12).all())


@given(law_pairs(), st.integers(2, 9))
@settings(max_examples=200, deadline=None)
def test_the_division_factor_is_the_least_that_is_valid(
    pair: tuple[Tensor, Tensor], k: int
) -> None:
    p, q = pair
    rho = float(division_factor(p, q, k))

    def excess(rho: float) -> float:
        beta = min(1.0, float(torch.minimum(p, q / rho).sum()))
        return 1 - (1 - beta) ** k - rho * beta

    assert excess(rho) <= 1e-12
    if rho > 1 + 1e-5:
        assert excess(rho - 1e-5) > -1e-12


@pytest.mark.parametrize("k", [1, 2, 4])
def test_samples_have_the_targets_law(k: int) -> None:
    p, q = laws(2, 6, seed=3)
    rng = random.Random(k)
    drafts = torch.multinomial(
        p, 20_000 * k, replacement=True, generator=torch.Generator().manual_seed(k)
    ).view(-1, k)
    tokens = [kseq(p, q, draft, rng.random)[0] for draft in drafts.tolist()]
    counts = np.bincount(tokens, minlength=6)
    assert chisquare(counts, 20_000 * q.numpy()).pvalue > 0.01


# --- whole sequences ---

DEPTH = 2


def markov(seed: int) -> Tensor:
    """[3 tokens + start, 3]: a law after each token; the last row is the law at the start."""
    return laws(4, 3, seed)


def rows_of(proposal: Proposal, chain: Tensor) -> Tensor:
    """Laws at the root and after each node."""
    return chain[[3, *proposal.tokens]]


def output_law(
    draft: Tensor, target: Tensor, k: int, run: Any, monkeypatch: pytest.MonkeyPatch
) -> dict[tuple[int, ...], float]:
    """Law of the first ``DEPTH + 1`` tokens, those after a correction sampled from the target."""
    total: dict[tuple[int, ...], float] = defaultdict(float)
    singles = {
        path: float(draft[3, path[0]] * draft[list(path[:-1]), list(path[1:])].prod())
        for path in product(range(3), repeat=DEPTH)
    }
    for drafts in product(singles, repeat=k):
        weight = float(np.prod([singles[d] for d in drafts]))
        tree, _ = merge_drafts(drafts)
        found = exact_law(
            lambda r, t=tree: tuple(run(t, rows_of(t, draft), rows_of(t, target), r).tokens),
            monkeypatch,
        )
        for emitted, probability in found.items():
            for rest in product(range(3), repeat=DEPTH + 1 - len(emitted)):
                whole = emitted + rest
                later = [float(target[a, b]) for a, b in pairwise(whole)]
                after = np.prod(later[len(emitted) - 1 :])
                total[whole] += weight * probability * after
    return total


def target_law(target: Tensor) -> dict[tuple[int, ...], float]:
    return {
        path: float(target[3, path[0]] * target[list(path[:-1]), list(path[1:])].prod())
        for path in product(range(3), repeat=DEPTH + 1)
    }


@pytest.mark.parametrize(("k", "seed"), [(1, 0), (2, 1), (2, 2)])
def test_whole_sequences_have_the_targets_law(
    k: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft, target = markov(2 * seed), markov(2 * seed + 1)
    found = output_law(draft, target, k, select, monkeypatch)
    expected = target_law(target)
    for path, probability in expected.items():
        assert found[path] == pytest.approx(probability, abs=1e-9)


def test_the_order_of_candidates_must_not_be_the_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal tokens next to each other, without shuffling, give another law: the shuffle matters."""
    p, q = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3]], dtype=torch.float64)

    def first_token(shuffled: bool) -> np.ndarray:
        total = np.zeros(3)
        for drafts in product(range(3), repeat=3):
            tree, _ = merge_drafts([[d] for d in drafts])
            rows = [torch.stack([law, *[law] * len(tree)]) for law in (p, q)]

            def run(paths: Paths, tree: Proposal = tree, rows: list[Tensor] = rows) -> int:
                if not shuffled:
                    paths.shuffle = lambda values: None  # type: ignore[method-assign]
                return select(tree, *rows, paths).tokens[0]

            for token, chance in exact_law(run, monkeypatch).items():
                total[token] += float(p[list(drafts)].prod()) * chance
        return total

    np.testing.assert_allclose(first_token(shuffled=True), q, atol=1e-9)
    assert np.abs(first_token(shuffled=False) - q.numpy()).max() > 1e-3


def test_one_draft_is_rejection_sampling_number_for_number() -> None:
    length, vocabulary = 4, 8
    rng = np.random.default_rng(0)
    for seed in range(200):
        p, q = (
            laws(length + 1, vocabulary, 2 * seed, 2),
            laws(length + 1, vocabulary, 2 * seed + 1, 2),
        )
        draft = [int(rng.choice(vocabulary, p=row)) for row in p[:length].numpy()]
        tree, _ = merge_drafts([draft])
        judged = select(tree, p, q, random.Random(seed))

        uniform = random.Random(seed).random
        expected: list[int] = []
        for t, token in enumerate(draft):
            if uniform() < q[t, token] / p[t, token]:
                expected.append(token)
                continue
            left = (q[t] - p[t]).clamp(min=0)
            expected.append(draw(left / left.sum(), uniform()))
            break
        else:
            expected.append(draw(q[length], uniform()))
        assert judged.tokens == expected
        assert judged.nodes == list(range(len(expected) - 1))


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=5), st.data()
)
@settings(max_examples=60, deadline=None)
def test_a_target_without_choice_is_followed_down_the_tree(
    drafts: list[list[int]], data: st.DataObject
) -> None:
    length = min(map(len, drafts))
    drafts = [draft[:length] for draft in drafts]
    tree, _ = merge_drafts(drafts)
    best = data.draw(st.lists(st.integers(0, 2), min_size=len(tree) + 1, max_size=len(tree) + 1))
    target = torch.nn.functional.one_hot(torch.tensor(best), 3).double()
    judged = select(tree, laws(len(tree) + 1, 3, 0), target, random.Random(0))
    node, expected = -1, []
    while True:
        expected.append(best[1 + node])
        if (found := tree.children[1 + node].get(expected[-1])) is None:
            break
        node = found
    assert judged.tokens == expected


@given(st.lists(st.lists(st.integers(0, 2), max_size=4), max_size=6))
def test_merging_keeps_every_draft_and_how_many_share_a_node(drafts: list[list[int]]) -> None:
    tree, paths = merge_drafts(drafts)
    assert [list(tree.spelled(path[-1])) if path else [] for path in paths] == drafts
    assert sum(tree.counts or ()) == sum(map(len, drafts))
    assert tree.depths == sorted(tree.depths)
    assert len({(tree.spelled(node)) for node in range(len(tree))}) == len(tree)


# --- how much is accepted ---


@pytest.mark.parametrize(("vocabulary", "k"), [(2, 3), (3, 2), (4, 2), (3, 3), (6, 1)])
def test_acceptance_against_the_linear_program(vocabulary: int, k: int) -> None:
    for seed in range(12):
        p, q = laws(2, vocabulary, seed, sharpness=1 + seed % 4)
        plan, optimum = optimal_transport_plan(p.numpy(), q.numpy(), k)
        np.testing.assert_allclose(plan.sum(0), q, atol=1e-9)
        assert float(optimal_acceptance(p, q, k)) == pytest.approx(optimum, abs=1e-9)
        reached = float(acceptance_probability(p, q, k))
        assert (1 - (1 - 1 / k) ** k) * optimum - 1e-6 <= reached <= optimum + 1e-9
        assert reached >= BOUND * optimum - 1e-6


@given(law_pairs(), st.integers(1, 12))
@settings(max_examples=300, deadline=None)
def test_acceptance_is_within_the_bound_of_the_optimum(pair: tuple[Tensor, Tensor], k: int) -> None:
    optimum = float(optimal_acceptance(*pair, k))
    reached = float(acceptance_probability(*pair, k))
    assert (1 - (1 - 1 / k) ** k) * optimum - 1e-5 <= reached <= optimum + 1e-9


def test_more_drafts_are_accepted_more_often_and_one_as_in_maximal_coupling() -> None:
    p, q = laws(50, 40, 1, sharpness=10), laws(50, 40, 2, sharpness=10)
    one = acceptance_probability(p, q, 1)
    torch.testing.assert_close(one, torch.minimum(p, q).sum(-1))
    chances = torch.stack([acceptance_probability(p, q, k) for k in (1, 2, 4, 8, 16)])
    assert bool((chances.diff(dim=0) > -1e-6).all())


def test_rows_are_judged_alone_each_with_its_own_k() -> None:
    p, q = laws(12, 30, 5, sharpness=5).view(3, 4, 30), laws(12, 30, 6, sharpness=5).view(3, 4, 30)
    k = torch.arange(1, 13).view(3, 4)
    rho, chance = division_factor(p, q, k), acceptance_probability(p, q, k)
    rest = residual(p, q, k, rho)
    assert rho.shape == chance.shape == (3, 4)
    for i, j in product(range(3), range(4)):
        row = p[i, j], q[i, j], int(k[i, j])
        torch.testing.assert_close(rho[i, j], division_factor(*row), atol=2e-6, rtol=0)
        torch.testing.assert_close(chance[i, j], acceptance_probability(*row), atol=2e-6, rtol=0)
        torch.testing.assert_close(rest[i, j], residual(*row, rho[i, j]))


# --- bad input ---


@pytest.mark.parametrize("bad", [[0.5, 0.6], [1.5, -0.5], [float("nan"), 1.0], [0.0, 0.0]])
def test_a_row_that_is_no_law_is_named(bad: list[float]) -> None:
    good = torch.tensor([[0.5, 0.5], [0.5, 0.5], [1.0, 0.0]])
    wrong = good.clone()
    wrong[1] = torch.tensor(bad)
    with pytest.raises(InvalidLaw, match="of the draft, row 1"):
        division_factor(wrong, good, 2)
    with pytest.raises(ValueError, match="of the target, row 1"):
        acceptance_probability(good, wrong, 2)
    with pytest.raises(AnabranchError, match="of the target"):
        kseq(good[0], wrong[1], [0], random.random)


def test_other_impossible_input_is_refused() -> None:
    p = torch.tensor([0.5, 0.5, 0.0])
    with pytest.raises(InvalidLaw, match=r"\[3\] and \[2\]"):
        division_factor(p, torch.tensor([0.5, 0.5]), 2)
    with pytest.raises(InvalidLaw, match="vocabulary has 3 tokens, the target's 2"):
        kseq(p, torch.tensor([0.5, 0.5]), [0], random.random)
    with pytest.raises(InvalidLaw, match="at least 1"):
        division_factor(p, p, 0)
    with pytest.raises(InvalidLaw, match="at least one candidate"):
        kseq(p, p, [], random.random)
    with pytest.raises(InvalidLaw, match="token 2 was drafted"):
        kseq(p, p, [0, 2], random.random)


def test_a_tree_with_drafts_left_out_is_refused() -> None:
    cut = Proposal((0, 1), (-1, 0), counts=(2, 1))
    rows = torch.full((3, 3), 1 / 3)
    target = torch.nn.functional.one_hot(torch.tensor([0, 1, 1]), 3).double()
    with pytest.raises(InvalidLaw, match="2 drafts pass through node 0, but 1 "):
        select(cut, rows, target, random.Random(0))
    whole_level = Proposal((0,), (-1,), counts=(2,))
    assert select(whole_level, rows, target, random.Random(0)).tokens == [0, 1]


def test_half_precision_laws_are_normalised_first() -> None:
    p = laws(1, 500, 0, 20)[0]
    rough = p.bfloat16()
    exact = rough.double() / rough.double().sum()
    assert float(division_factor(rough, p.float(), 3)) == pytest.approx(
        float(division_factor(exact, p, 3)), abs=1e-5
    )


def test_draw_never_gives_a_token_without_mass() -> None:
    law = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0])
    assert [draw(law, u) for u in (0.0, 0.29, 0.31, 1 - 1e-16)] == [1, 1, 3, 3]
