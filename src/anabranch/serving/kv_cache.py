"""Who owns which page of the key/value cache. Bookkeeping only: it never touches a tensor.

A page holds the keys and values of ``page_size`` consecutive tokens of one sequence, in every
layer. Full pages are named by a hash chain over their tokens, so that a later prompt with the
same beginning shares them:

    tokens   [ You are a help | ful assistant. | Hi! ]
    pages    [       7        |       2        |  9  ]
    keys     [ h(root, page)  | h(key0, page)  |  -  ]     only full pages have a key

The root is the adapter's version, because keys and values depend on it.

A page is free, owned by one or more sequences, or *cached*: owned by nobody, its content still
named. Cached pages are handed out again, least recently used first, when no free one is left.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict

from anabranch.errors import ConfigurationError
from anabranch.serving.batch import PageCopy
from anabranch.serving.sequence import Sequence


class KVCacheManager:
    """Allocates pages to sequences, shares prefixes, and counts references."""

    def __init__(self, num_pages: int, page_size: int, prefix_reuse: bool = True) -> None:
        if num_pages < 1:
            raise ConfigurationError(f"the cache needs at least 1 page, not {num_pages}")
        if page_size < 1 or page_size & (page_size - 1):
            raise ConfigurationError(f"page_size must be a power of two, not {page_size}")
        self.num_pages = num_pages
        self.page_size = page_size
        self.prefix_reuse = prefix_reuse
        self._references = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Pages that an allocation can have now."""
        return len(self._free) + len(self._cached)

    @property
    def usage(self) -> float:
        """Fraction of the pages that sequences own."""
        return 1.0 - self.num_available / self.num_pages

    @property
    def capacity(self) -> int:
        """Tokens that fit in the whole cache."""
        return self.num_pages * self.page_size

    def admit(self, sequence: Sequence) -> bool:
        """Reserve pages for all tokens of a sequence that owns none, sharing a cached prefix.

        Sets ``num_computed`` to the shared tokens. Returns False, changing nothing, if the pages
        do not exist now. Reserving the whole prompt is the admission guard: prompts admitted
        piece by piece could each hold half of what the other one needs.
        """
        shared = self.match_prefix(sequence)
        for page in shared:
            self._take(page)
        if not self.extend(sequence, len(sequence.tokens), shared):
            self._give_back(shared)
            return False
        sequence.num_computed = len(shared) * self.page_size
        sequence.cached_tokens = max(sequence.cached_tokens, sequence.num_computed)
        return True

    def extend(self, sequence: Sequence, length: int, shared: list[int] | None = None) -> bool:
        """Own pages for ``length`` tokens. Returns False, changing nothing, if there are none."""
        owned = len(sequence.pages) + len(shared or ())
        missing = -(-length // self.page_size) - owned
        if missing > self.num_available:
            return False
        sequence.pages.extend(shared or ())
        sequence.pages.extend(self._allocate() for _ in range(missing))
        return True

    def match_prefix(self, sequence: Sequence) -> list[int]:
        """Pages that already hold the beginning of a sequence, always leaving it one token.

        The last token must be computed to know what follows it. Pooling needs the hidden states
        of every token, so it shares nothing.
        """
        if not self.prefix_reuse or sequence.request.pooling:
            return []
        pages = []
        for index in range((len(sequence.tokens) - 1) // self.page_size):
            page = self._page_of.get(self._key(sequence, index))
            if page is None:
                break
            pages.append(page)
        return pages

    def publish(self, sequence: Sequence, computed_before: int) -> None:
        """Name the pages that a step filled, so that other sequences can share them."""
        if not self.prefix_reuse:
            return
        first, stop = computed_before // self.page_size, sequence.num_computed // self.page_size
        for index in range(first, stop):
            page, key = sequence.pages[index], self._key(sequence, index)
            if key not in self._page_of and page not in self._key_of:
                self._page_of[key] = page
                self._key_of[page] = key

    def fork(self, parent: Sequence, child: Sequence) -> list[PageCopy] | None:
        """Give the child the parent's computed tokens: full pages shared, the last one copied.

        Returns the copies that the next step must make first, or None if no page was free.
        """
        full, rest = divmod(parent.num_computed, self.page_size)
        if rest and not self.num_available:
            return None
        child.pages = parent.pages[:full]
        for page in child.pages:
            self._take(page)
        child.num_computed = parent.num_computed
        child.cached_tokens = parent.cached_tokens
        if not rest:
            return []
        child.pages.append(self._allocate())
        return [PageCopy(source=parent.pages[full], target=child.pages[full])]

    def truncate(self, sequence: Sequence) -> None:
        """Disown pages that a sequence reserved for drafts and has no tokens for."""
        kept = -(-len(sequence.tokens) // self.page_size)
        self._give_back(sequence.pages[kept:])
        del sequence.pages[kept:]

    def slot(self, sequence: Sequence, place: int) -> int:
        """Where the keys and values of a sequence's token, or of a draft behind it, lie."""
        return sequence.pages[place // self.page_size] * self.page_size + place % self.page_size

    def release(self, sequence: Sequence) -> None:
        """Disown all pages of a sequence; named ones stay cached until they are needed."""
        self._give_back(sequence.pages)
        sequence.pages = []
        sequence.num_computed = 0

    def forget(self, sequence: Sequence) -> list[int]:
        """Release a sequence whose cache content is unusable. Returns the pages to be cleared.

        Pages that another sequence shares are left alone: it holds them by right and will fail
        by itself if they are bad.
        """
        own = [page for page in sequence.pages if self._references[page] == 1]
        for page in own:
            self._unname(page)
        self.release(sequence)
        return own

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page is in exactly one state. For tests."""
        free, cached = set(self._free), set(self._cached)
        owned = {page for page, count in enumerate(self._references) if count}
        assert len(free) == len(self._free), "a page is free twice"
        assert not free & cached and not free & owned and not cached & owned, "overlapping states"
        assert len(free) + len(cached) + len(owned) == self.num_pages, "a page was lost"
        assert self._page_of == {key: page for page, key in self._key_of.items()}, "stale name"
        assert cached <= set(self._key_of), "a cached page has no name"
        assert not free & set(self._key_of), "a free page has a name"

    def _allocate(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            self._unname(page)
        self._references[page] = 1
        return page

    def _take(self, page: int) -> None:
        self._cached.pop(page, None)
        self._references[page] += 1

    def _give_back(self, pages: list[int]) -> None:
        # Last page first: the end of a prefix is the least likely to be shared, so it is evicted
        # before its beginning.
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._key_of:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def _unname(self, page: int) -> None:
        key = self._key_of.pop(page, None)
        if key is not None:
            del self._page_of[key]

    def _key(self, sequence: Sequence, index: int) -> bytes:
        """Name of the index-th page; computed once per sequence, because tokens only grow."""
        keys = sequence.page_keys
        while len(keys) <= index:
            start = len(keys) * self.page_size
            tokens = array("q", sequence.tokens[start : start + self.page_size])
            adapter = sequence.request.adapter
            previous = keys[-1] if keys else adapter.key if adapter else b""
            keys.append(hashlib.blake2b(previous + tokens.tobytes(), digest_size=16).digest())
        return keys[index]
