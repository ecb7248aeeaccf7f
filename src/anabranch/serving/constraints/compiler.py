"""The way in: a constraint becomes compiled, checked, limited in time and size, and cached."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from anabranch import registry
from anabranch.errors import (
    ConfigurationError,
    ConstraintTooComplex,
    InvalidConstraint,
    MissingExtra,
    RequestFailed,
    UnsatisfiableConstraint,
    UnsupportedConstraint,
    did_you_mean,
)
from anabranch.models.constraint import OutputConstraint
from anabranch.serving.constraints.base import (
    CompiledConstraint,
    ConstraintBackend,
    Whitespace,
)
from anabranch.serving.constraints.cache import CompiledCache
from anabranch.serving.constraints.normal_form import FIELD
from anabranch.serving.constraints.vocabulary import Vocabulary, unpack

FIRST, SECOND = "llguidance", "xgrammar"
"""What ``auto`` tries, in order."""
PROBE_TOKENS = 16
"""Tokens that every new constraint is walked along, so that one whose automaton explodes is
refused before an answer begins."""


@dataclass(frozen=True)
class ConstraintLimits:
    """What one constraint may cost. ``characters`` of its text; ``seconds`` to compile it.

    ``concurrent`` compilations run at a time. One that passes its time cannot be stopped, only
    left alone: it keeps its place until it ends, so that a flood of them cannot take all cores.
    """

    characters: int = 500_000
    seconds: float = 10.0
    concurrent: int = 2
    cache_bytes: int = 256 * 2**20


class ConstraintCompiler:
    """Compiles constraints for one tokenizer. Any thread may use it, but not the event loop's."""

    def __init__(
        self,
        tokenizer: Any,
        vocabulary: int,
        end_tokens: tuple[int, ...],
        backend: str = "auto",
        *,
        whitespace: Whitespace = "spaced",
        limits: ConstraintLimits | None = None,
        cache: CompiledCache | None = None,
    ) -> None:
        """``vocabulary`` is the rows of the head, of which the tokenizer may know fewer.

        ``backend`` is a plug-in's name, or ``auto``: llguidance, and xgrammar where llguidance
        refuses. Raises :class:`UnsupportedConstraint` if the tokenizer's tokens have no bytes,
        and :class:`MissingExtra` if the library is not installed.
        """
        known = registry.available("constraints")
        if backend != "auto" and backend not in known:
            raise ConfigurationError(
                f"constraint_backend must be auto, {', '.join(known)}, not {backend!r}"
                f"{did_you_mean(backend, [*known, 'auto'])}"
            )
        self.vocabulary = Vocabulary.of(tokenizer, vocabulary, end_tokens)
        self.limits = limits or ConstraintLimits()
        self.cache = cache or CompiledCache(self.limits.cache_bytes)
        self._whitespace = whitespace
        names = (FIRST, SECOND) if backend == "auto" else (backend,)
        self._backends: list[ConstraintBackend] = [known[names[0]](self.vocabulary, whitespace)]
        for name in names[1:]:
            try:
                self._backends.append(known[name](self.vocabulary, whitespace))
            except MissingExtra:
                continue  # ``auto`` is what is there
        self._places = threading.BoundedSemaphore(self.limits.concurrent)
        # What all constraints share is imported and built now, not within the first one's time.
        self._backends[0].compile(OutputConstraint.json_object())

    def compile(self, constraint: OutputConstraint) -> CompiledConstraint:
        """The compiled constraint, from the cache if it is there.

        Raises what :meth:`ConstraintBackend.compile` raises; if no back-end honours it, what the
        first one says.
        """
        if len(constraint.text) > self.limits.characters:
            raise ConstraintTooComplex(
                FIELD,
                f"it has {len(constraint.text)} characters, and the limit is "
                f"{self.limits.characters}",
            )
        refusal: InvalidConstraint | None = None
        for backend in self._backends:
            try:
                return self._cached(backend, constraint)
            except (UnsupportedConstraint, ConstraintTooComplex) as error:
                refusal = refusal or error
            except InvalidConstraint:
                if refusal is None:
                    raise
                continue  # a grammar in the first one's notation is none to the next
        assert refusal is not None
        raise refusal

    def _cached(
        self, backend: ConstraintBackend, constraint: OutputConstraint
    ) -> CompiledConstraint:
        key = (constraint, backend.name, self._whitespace, self.vocabulary.fingerprint)
        return self.cache.get(key, lambda: self._limited(backend, constraint))

    def _limited(
        self, backend: ConstraintBackend, constraint: OutputConstraint
    ) -> CompiledConstraint:
        """Compile on a thread that is left behind if it takes too long."""
        outcome: list[CompiledConstraint | BaseException] = []

        def work() -> None:
            try:
                compiled = backend.compile(constraint)
                self._probe(compiled)
                outcome.append(compiled)
            except BaseException as error:
                outcome.append(error)
            finally:
                self._places.release()

        seconds = self.limits.seconds
        if not self._places.acquire(timeout=seconds):
            raise ConstraintTooComplex(
                FIELD, f"waited {seconds:g} s for other constraints to be compiled; try again later"
            )
        thread = threading.Thread(target=work, name="anabranch-constraint", daemon=True)
        thread.start()
        thread.join(seconds)
        if not outcome:
            raise ConstraintTooComplex(
                FIELD, f"{backend.name} did not compile it within {seconds:g} s"
            )
        (result,) = outcome
        if isinstance(result, BaseException):
            raise result
        return result

    def _probe(self, compiled: CompiledConstraint) -> None:
        state, row = compiled.start(), np.zeros(self.vocabulary.words, dtype=np.int32)
        generator = random.Random(0)
        for step in range(PROBE_TOKENS):
            try:
                state.fill_mask(row)
            except RequestFailed as error:
                kind = ConstraintTooComplex if step else UnsatisfiableConstraint
                raise kind(FIELD, f"no answer gets far: {error}") from error
            tokens = unpack(row & self.vocabulary.text_mask)
            if not len(tokens):
                return
            state.accept(int(tokens[generator.randrange(len(tokens))]))
