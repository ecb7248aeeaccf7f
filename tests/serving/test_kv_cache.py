"""Page bookkeeping against a model of what every page would contain."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from anabranch.errors import ConfigurationError
from anabranch.serving import KVCacheManager, Sequence
from tests.serving.helpers import make_sequence

tokens = st.lists(st.integers(0, 1), min_size=1, max_size=14)  # prefixes collide all the time
pick = st.integers(0, 10**6)


class CacheMachine(RuleBasedStateMachine):
    """Sequences come, compute and go; ``content`` plays the role of the tensors.

    A slot holds the tokens up to its position, because that is what keys and values depend on.
    """

    @initialize(
        num_pages=st.integers(1, 9),
        page_size=st.sampled_from([1, 2, 4]),
        reuse=st.sampled_from([True, True, True, False]),
    )
    def start(self, num_pages: int, page_size: int, reuse: bool) -> None:
        self.cache = KVCacheManager(num_pages, page_size, reuse)
        self.page_size = page_size
        self.content: list[list[Any]] = [[None] * page_size for _ in range(num_pages)]
        self.named: dict[int, tuple[int, ...]] = {}
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []

    @rule(prompt=tokens, pooling=st.sampled_from([False, False, False, True]))
    def arrive(self, prompt: list[int], pooling: bool) -> None:
        self.waiting.append(make_sequence(prompt, pooling=pooling))

    @precondition(lambda self: self.waiting)
    @rule(which=pick)
    def admit(self, which: int) -> None:
        sequence = self.waiting[which % len(self.waiting)]
        shared = self.expected_prefix(sequence)
        assert self.cache.match_prefix(sequence) == shared
        needed = -(-len(sequence.tokens) // self.page_size) - len(shared)
        idle = sum(not self.owners()[page] for page in shared)
        before = self.state(sequence)
        if self.cache.admit(sequence):
            assert needed <= before["available"] - idle
            assert sequence.pages[: len(shared)] == shared
            assert sequence.num_computed == len(shared) * self.page_size
            assert sequence.num_computed < len(sequence.tokens)
            self.rewritten(sequence.pages[len(shared) :])
            self.waiting.remove(sequence)
            self.running.append(sequence)
        else:
            assert needed > before["available"] - idle
            assert self.state(sequence) == before

    @precondition(lambda self: self.running)
    @rule(which=pick, token=st.integers(0, 1))
    def generate(self, which: int, token: int) -> None:
        sequence = self.running[which % len(self.running)]
        if not sequence.num_pending:
            sequence.tokens.append(token)

    @precondition(lambda self: self.running)
    @rule(which=pick, extra=st.integers(0, 6))
    def extend(self, which: int, extra: int) -> None:
        sequence = self.running[which % len(self.running)]
        length = len(sequence.tokens) + extra
        before, owned = self.state(sequence), len(sequence.pages)
        missing = max(0, -(-length // self.page_size) - owned)
        if self.cache.extend(sequence, length):
            assert missing <= before["available"]
            assert len(sequence.pages) == owned + missing
            self.rewritten(sequence.pages[owned:])
        else:
            assert missing > before["available"]
            assert self.state(sequence) == before

    @precondition(lambda self: self.running)
    @rule(which=pick, count=st.integers(1, 9))
    def compute(self, which: int, count: int) -> None:
        sequence = self.running[which % len(self.running)]
        room = len(sequence.pages) * self.page_size
        before, stop = sequence.num_computed, sequence.num_computed + count
        for position in range(before, min(stop, len(sequence.tokens), room)):
            page, slot = sequence.pages[position // self.page_size], position % self.page_size
            self.content[page][slot] = tuple(sequence.tokens[: position + 1])
            sequence.num_computed = position + 1
        self.cache.publish(sequence, before)
        if self.cache.prefix_reuse:
            for index in range(before // self.page_size, sequence.num_computed // self.page_size):
                page = sequence.pages[index]
                prefix = tuple(sequence.tokens[: (index + 1) * self.page_size])
                if prefix not in self.named.values() and page not in self.named:
                    self.named[page] = prefix

    @precondition(lambda self: self.running)
    @rule(which=pick)
    def fork(self, which: int) -> None:
        parent = self.running[which % len(self.running)]
        if not parent.num_computed:
            return
        child = make_sequence(parent.tokens[: parent.num_computed])
        before = self.state(parent), self.state(child)
        full, rest = divmod(parent.num_computed, self.page_size)
        copies = self.cache.fork(parent, child)
        if copies is None:
            assert rest and not before[0]["available"]
            assert (self.state(parent), self.state(child)) == before
            return
        assert child.num_computed == parent.num_computed
        assert child.pages[:full] == parent.pages[:full]
        assert len(child.pages) == full + bool(rest)
        assert len(copies) == bool(rest)
        self.rewritten(child.pages[full:])
        for source, target in copies:
            assert (source, target) == (parent.pages[full], child.pages[full])
            self.content[target] = list(self.content[source])
        self.running.append(child)

    @precondition(lambda self: self.running)
    @rule(which=pick, again=st.booleans())
    def release(self, which: int, again: bool) -> None:
        sequence = self.running.pop(which % len(self.running))
        self.cache.release(sequence)
        assert sequence.pages == [] and sequence.num_computed == 0
        if again:  # preempted: its output is now part of what it must compute
            self.waiting.append(sequence)

    @precondition(lambda self: self.running)
    @rule(which=pick)
    def forget(self, which: int) -> None:
        sequence = self.running.pop(which % len(self.running))
        alone = [page for page in sequence.pages if self.owners()[page] == 0]
        assert self.cache.forget(sequence) == alone
        assert sequence.pages == [] and sequence.num_computed == 0
        self.rewritten(alone)

    @invariant()
    def pages_are_consistent(self) -> None:
        self.cache.check_integrity()
        owners = self.owners()
        assert self.cache._references == [owners[p] for p in range(self.cache.num_pages)]
        assert self.cache.num_available == self.cache.num_pages - len(owners)
        assert self.cache.usage == pytest.approx(len(owners) / self.cache.num_pages)

    @invariant()
    def every_computed_token_is_where_its_sequence_looks_for_it(self) -> None:
        for sequence in self.running:
            for position in range(sequence.num_computed):
                page, slot = sequence.pages[position // self.page_size], position % self.page_size
                assert self.content[page][slot] == tuple(sequence.tokens[: position + 1])

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        for sequence in self.running:
            self.cache.release(sequence)
        self.running = []
        self.pages_are_consistent()
        assert self.cache.num_available == self.cache.num_pages

    def owners(self) -> Counter[int]:
        return Counter(page for sequence in self.running for page in sequence.pages)

    def expected_prefix(self, sequence: Sequence) -> list[int]:
        """The longest chain of named pages, looked up by their tokens."""
        pages: list[int] = []
        if sequence.request.pooling:
            return pages
        page_of = {prefix: page for page, prefix in self.named.items()}
        for stop in range(self.page_size, len(sequence.tokens), self.page_size):
            page = page_of.get(tuple(sequence.tokens[:stop]))
            if page is None:
                break
            pages.append(page)
        return pages

    def rewritten(self, pages: list[int]) -> None:
        """These pages have a new owner or were cleared: what they held is gone."""
        for page in pages:
            self.content[page] = [None] * self.page_size
            self.named.pop(page, None)

    def state(self, sequence: Sequence) -> dict[str, Any]:
        cache = self.cache
        return {
            "available": cache.num_available,
            "references": list(cache._references),
            "free": list(cache._free),
            "cached": set(cache._cached),
            "names": dict(cache._key_of),
            "pages": list(sequence.pages),
            "computed": (sequence.num_computed, sequence.cached_tokens),
        }


TestPages = CacheMachine.TestCase
TestPages.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def computed(cache: KVCacheManager, prompt: list[int], **options: Any) -> Sequence:
    """A sequence whose prompt is in the cache."""
    sequence = make_sequence(prompt, **options)
    assert cache.admit(sequence)
    before, sequence.num_computed = sequence.num_computed, len(prompt)
    cache.publish(sequence, before)
    return sequence


class TestPrefixes:
    @given(pages=st.integers(1, 5), rest=st.integers(0, 3))
    def test_a_fully_cached_prompt_still_computes_a_token(self, pages: int, rest: int) -> None:
        cache = KVCacheManager(20, 4)
        prompt = list(range(4 * pages + rest))
        cache.release(computed(cache, prompt))
        again = make_sequence(prompt)
        assert cache.admit(again)
        assert again.cached_tokens == again.num_computed == (len(prompt) - 1) // 4 * 4
        assert again.num_pending >= 1

    def test_a_page_matches_only_after_the_same_pages(self) -> None:
        cache = KVCacheManager(20, 2)
        computed(cache, [1, 2, 3, 4, 5])
        assert len(cache.match_prefix(make_sequence([1, 2, 3, 4, 9]))) == 2
        assert cache.match_prefix(make_sequence([9, 9, 3, 4, 9])) == []
        assert cache.match_prefix(make_sequence([3, 4, 9])) == []

    def test_nothing_is_shared_before_it_is_computed(self) -> None:
        cache = KVCacheManager(20, 2)
        assert cache.admit(make_sequence([1, 2, 3, 4]))
        assert cache.match_prefix(make_sequence([1, 2, 3, 4])) == []

    def test_pooling_shares_nothing(self) -> None:
        cache = KVCacheManager(20, 2)
        computed(cache, [1, 2, 3, 4, 5])
        pooling = make_sequence([1, 2, 3, 4, 5], pooling=True)
        assert cache.admit(pooling) and pooling.num_computed == 0

    def test_reuse_can_be_turned_off(self) -> None:
        cache = KVCacheManager(20, 2, prefix_reuse=False)
        cache.release(computed(cache, [1, 2, 3, 4, 5]))
        assert cache.match_prefix(make_sequence([1, 2, 3, 4, 5])) == []

    def test_the_end_of_the_oldest_prefix_is_evicted_first(self) -> None:
        cache = KVCacheManager(6, 2)
        old, new = [1] * 6, [2] * 6
        cache.release(computed(cache, old))
        cache.release(computed(cache, new))
        matched = []
        for pages in range(1, 7):
            other = computed(cache, [100 + pages] * 2 * pages, pooling=True)
            matched.append([len(cache.match_prefix(make_sequence([*p, 0]))) for p in (old, new)])
            cache.forget(other)
        assert matched == [[2, 3], [1, 3], [0, 3], [0, 2], [0, 1], [0, 0]]

    def test_use_makes_a_prefix_young_again(self) -> None:
        cache = KVCacheManager(4, 2)
        for prompt in ([1] * 4, [2] * 4, [1] * 4):
            cache.release(computed(cache, prompt))
        computed(cache, [9] * 4)
        assert len(cache.match_prefix(make_sequence([1] * 5))) == 2
        assert cache.match_prefix(make_sequence([2] * 5)) == []


class TestConstruction:
    @pytest.mark.parametrize("pages", [0, -1])
    def test_needs_a_page(self, pages: int) -> None:
        with pytest.raises(ConfigurationError, match=f"at least 1 page, not {pages}"):
            KVCacheManager(pages, 32)

    @pytest.mark.parametrize("size", [0, -2, 3, 48])
    def test_page_size_is_a_power_of_two(self, size: int) -> None:
        with pytest.raises(ConfigurationError, match=f"power of two, not {size}"):
            KVCacheManager(4, size)

    def test_counts_tokens_and_pages(self) -> None:
        cache = KVCacheManager(5, 8)
        assert (cache.capacity, cache.num_available, cache.usage) == (40, 5, 0.0)
