"""Some examples on their way through the model: forward, head and, to train, backward.

::

    for each pack of the examples:   forward windows ── head windows ── backward units
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Literal

from anabranch.serving.adapters import ServedAdapter
from anabranch.serving.coserving.pack import Pack
from anabranch.serving.coserving.pages import PagePool
from anabranch.serving.coserving.trainee import Trainee
from anabranch.serving.coserving.windows import Backward
from anabranch.serving.runner import DifferentiableRunner
from anabranch.serving.sequence import Segment
from anabranch.training.example import Example

PACK_TOKENS = 512
"""Tokens of a pack of short sequences: enough to keep the matrix products efficient."""

Phase = Literal["forward", "head", "backward"]


class Pass:
    """Computes the loss of a step's examples and, with ``gradients``, adds to ``parameter.grad``.

    ``number`` tells the passes of a job apart: dropout depends on it. ``prove`` compares what is
    computed again with what was served. Longer sequences than the pool holds never get their turn.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        trainee: Trainee,
        runner: DifferentiableRunner,
        pool: PagePool,
        gradients: bool,
        number: int = 0,
        prove: bool = False,
        name: str = "finetune",
    ) -> None:
        self.trained = sum(example.targets for example in examples)
        """Tokens that the loss counts."""
        self.nll = 0.0
        """Sum of the losses of the packs that are done."""
        self.tokens = 0
        """Tokens whose gradients are complete."""
        self._trainee, self._runner, self._pool = trainee, runner, pool
        self._gradients, self._prove, self._name = gradients, prove, name
        self._first = number << 16
        self._groups = deque(_grouped(examples, pool))
        self._num_packs = 0
        self._pack: Pack | None = None
        self._backward: Backward | None = None

    @property
    def done(self) -> bool:
        """Whether all examples have passed."""
        return self._pack is None and not self._groups

    def ready(self) -> bool:
        """Take up the next pack if there is none. False if other jobs have the pages for it."""
        if self._pack is not None:
            return True
        pages = self._pool.take([len(example) for example in self._groups[0]])
        if pages is None:
            return False
        trainee = self._trainee
        layers = len(trainee.trunk.layers)
        if trainee.dropout is not None:
            trainee.dropout.pack = self._first + self._num_packs
        self._pack = Pack(
            self._groups.popleft(),
            pages,
            # A pass begins and ends with the same weights, which have no version of their own.
            ServedAdapter(self._name, 0, b"", 0, trainee.handle),
            trainee.hidden,
            layers,
            lowest=trainee.lowest if self._gradients else layers,
            products=trainee.products if self._gradients else frozenset(),
            dropout=trainee.dropout if self._gradients else None,
            name=self._name,
        )
        return True

    def drop(self) -> None:
        """Give the present pack's pages and gradients up; it will be computed anew."""
        if self._pack is None:
            return
        self._groups.appendleft(self._pack.examples)
        self._release()

    @property
    def idle(self) -> bool:
        """Whether :meth:`ready` must be asked for the next pack first."""
        return self._pack is None

    @property
    def phase(self) -> Phase:
        """What the present pack needs next."""
        if self._backward is None:
            return "forward"
        return "head" if self._backward.head_left else "backward"

    @property
    def left(self) -> int:
        """Rows that are left of the phase; of the layer, in the backward phase."""
        assert self._pack is not None
        if self._backward is None:
            return self._pack.rows - self._pack.computed
        return self._backward.head_left or self._backward.stop

    def segments(self, tokens: int) -> list[Segment]:
        """Forward windows of at most so many tokens."""
        assert self._pack is not None
        return self._pack.segments(tokens)

    def computed(self, segment: Segment) -> None:
        """A forward window is in the cache, and recorded."""
        assert self._pack is not None
        segment.sequence.num_computed = segment.stop
        if self._pack.computed == self._pack.rows:
            self._backward = Backward(
                self._pack,
                self._trainee,
                self._runner.read_cache,
                self._runner.cache_dtype,
                scale=1 / self.trained,
                prove=self._prove and not self._num_packs,
            )

    def unit(self, rows: int) -> None:
        """Compute a head window or a backward unit of at most so many rows."""
        backward = self._backward
        assert backward is not None
        if backward.head_left:
            backward.head(rows, self._gradients)
        else:
            backward.unit(rows)
        if backward.done or (not self._gradients and not backward.head_left):
            self.nll += backward.nll
            self.tokens += backward.pack.rows if self._gradients else 0
            backward.add_gradients()
            self._num_packs += 1
            self._release()

    @property
    def bytes(self) -> int:
        """Memory of what is kept between steps, pages not included."""
        return sum(part.bytes for part in (self._pack, self._backward) if part is not None)

    def _release(self) -> None:
        assert self._pack is not None
        pages = [page for sequence in self._pack.sequences for page in sequence.pages]
        self._runner.clear_pages(pages)  # values that are not finite must not reach the next owner
        self._pool.give_back(pages)
        self._pack = self._backward = None


def _grouped(examples: Sequence[Example], pool: PagePool) -> Iterator[list[Example]]:
    """Examples in order, as many together as fit in a pack."""
    group: list[Example] = []
    for example in examples:
        lengths = [len(e) for e in (*group, example)]
        pages = sum(map(pool.pages_for, lengths))
        if group and (sum(lengths) > PACK_TOKENS or pages > pool.count):
            yield group
            group = []
        group.append(example)
    if group:
        yield group
