"""Cache pages set aside for training, so that it never competes with requests for them."""

from __future__ import annotations


class PagePool:
    """The pages from ``first`` on, ``count`` of ``page_size`` tokens each."""

    def __init__(self, first: int, count: int, page_size: int) -> None:
        self.page_size = page_size
        self.count = count
        self._free = list(range(first + count - 1, first - 1, -1))

    @property
    def capacity(self) -> int:
        """Tokens of the longest sequence that fits."""
        return self.count * self.page_size

    def pages_for(self, tokens: int) -> int:
        """Pages that a sequence takes."""
        return -(-tokens // self.page_size)

    def take(self, lengths: list[int]) -> list[list[int]] | None:
        """Pages for sequences of these lengths, or None if there are not enough free ones."""
        counts = [self.pages_for(length) for length in lengths]
        if sum(counts) > len(self._free):
            return None
        return [[self._free.pop() for _ in range(count)] for count in counts]

    def give_back(self, pages: list[int]) -> None:
        """Free pages that :meth:`take` gave."""
        self._free.extend(pages)
