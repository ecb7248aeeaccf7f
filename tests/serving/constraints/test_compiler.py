"""The way in: choice of back-end, limits, cache."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from anabranch.errors import (
    ConfigurationError,
    ConstraintTooComplex,
    InvalidConstraint,
    RequestFailed,
    UnsatisfiableConstraint,
    UnsupportedConstraint,
)
from anabranch.models.constraint import OutputConstraint
from anabranch.serving.constraints import (
    CompiledCache,
    CompiledConstraint,
    ConstraintCompiler,
    ConstraintLimits,
    ConstraintState,
)
from tests.serving.constraints.tiny_tokenizers import ROWS, byte_level, end_of


def make(backend: str = "llguidance", **limits: Any) -> ConstraintCompiler:
    tokenizer = byte_level()
    return ConstraintCompiler(
        tokenizer, ROWS, (end_of(tokenizer),), backend, limits=ConstraintLimits(**limits)
    )


class Compiled(CompiledConstraint):
    def __init__(self, memory: int = 1) -> None:
        self.memory = memory

    def start(self) -> ConstraintState:
        raise NotImplementedError


def test_equal_constraints_are_compiled_once() -> None:
    compiler = make()
    first = compiler.compile(OutputConstraint.json_schema({"type": "null"}))
    assert compiler.compile(OutputConstraint.json_schema({"type": "null"})) is first
    assert compiler.compile(OutputConstraint.json_schema({"type": "string"})) is not first
    assert (compiler.cache.hits, compiler.cache.misses) == (1, 2)


def test_auto_takes_the_second_back_end_where_the_first_refuses() -> None:
    pytest.importorskip("xgrammar", reason="the extra 'xgrammar' is not installed")
    schema = {"type": "object", "properties": {"a": {"uniqueItems": True}}}
    with pytest.raises(UnsupportedConstraint, match="#/properties/a/uniqueItems: llguidance"):
        make("auto").compile(OutputConstraint.json_schema(schema))


def test_unknown_back_ends_are_refused_with_a_hint() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'llguidance'"):
        make("llguidence")


@pytest.mark.parametrize(
    ("constraint", "error"),
    [
        (OutputConstraint.choice([]), UnsatisfiableConstraint),
        (OutputConstraint("choice", '["a", 1]'), InvalidConstraint),
        (OutputConstraint("choice", "{"), InvalidConstraint),
        (OutputConstraint("choice", '["\\ud800"]'), InvalidConstraint),
        (OutputConstraint.regex("("), InvalidConstraint),
        (OutputConstraint.regex("(?=a)a"), UnsupportedConstraint),
        (OutputConstraint.grammar("nonsense"), InvalidConstraint),
        (OutputConstraint.grammar("start: start"), UnsatisfiableConstraint),
        (OutputConstraint.grammar(""), InvalidConstraint),
        (OutputConstraint("json_schema", "{"), InvalidConstraint),
        (OutputConstraint.json_schema(False), UnsatisfiableConstraint),
        (OutputConstraint.json_schema({"enum": []}), UnsatisfiableConstraint),
        (OutputConstraint.json_schema({"not": {"type": "null"}}), UnsupportedConstraint),
        (OutputConstraint.json_schema({"minProperties": 2}), UnsupportedConstraint),
    ],
)
def test_bad_constraints_are_refused_and_not_kept(
    constraint: OutputConstraint, error: type[Exception]
) -> None:
    compiler = make()
    for _ in range(2):
        with pytest.raises(error):
            compiler.compile(constraint)
    assert len(compiler.cache) == 0


def test_long_texts_are_refused_before_anything_reads_them() -> None:
    with pytest.raises(ConstraintTooComplex, match="has 32 characters, and the limit is 10"):
        make(characters=10).compile(OutputConstraint.regex("a" * 32))


def test_slow_compilations_are_left_behind_and_keep_their_place() -> None:
    compiler = make(seconds=0.2, concurrent=1)
    release = threading.Event()
    backend = compiler._backends[0]
    compile_now: Callable[[OutputConstraint], CompiledConstraint] = backend.compile

    def slow(constraint: OutputConstraint) -> CompiledConstraint:
        release.wait(10)
        return compile_now(constraint)

    backend.compile = slow  # type: ignore[method-assign]
    with pytest.raises(ConstraintTooComplex, match="did not compile it within"):
        compiler.compile(OutputConstraint.regex("a"))
    with pytest.raises(ConstraintTooComplex, match=r"waited 0.2 s for other"):
        compiler.compile(OutputConstraint.regex("b"))
    release.set()
    backend.compile = compile_now  # type: ignore[method-assign]
    deadline = time.monotonic() + 10
    while True:
        try:
            assert compiler.compile(OutputConstraint.regex("b"))
            return
        except ConstraintTooComplex:
            assert time.monotonic() < deadline


@pytest.mark.parametrize(
    ("steps", "error"), [(0, UnsatisfiableConstraint), (3, ConstraintTooComplex)]
)
def test_what_fails_on_the_first_tokens_is_refused_before_an_answer_begins(
    steps: int, error: type[Exception]
) -> None:
    class Failing(ConstraintState):
        complete = False
        left = steps

        def fill_mask(self, row: np.ndarray) -> None:
            if not self.left:
                raise RequestFailed("the automaton has too many states")
            self.left -= 1
            row[:] = -1

        def accept(self, token: int) -> bool:
            return True

        def rollback(self, count: int) -> None: ...

        def forced(self) -> list[int]:
            return []

    compiler, compiled = make(), Compiled()
    compiled.start = Failing  # type: ignore[method-assign]
    compiler._backends[0].compile = lambda _: compiled  # type: ignore[method-assign]
    with pytest.raises(error, match="too many states"):
        compiler.compile(OutputConstraint.json_object())


def test_one_compilation_for_any_number_of_threads() -> None:
    cache, calls = CompiledCache(), []

    def compile_slowly() -> CompiledConstraint:
        calls.append(1)
        time.sleep(0.05)
        return Compiled()

    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: cache.get("key", compile_slowly), range(8)))
    assert len(calls) == 1 and len(found) == 1
    assert (cache.hits, cache.misses) == (7, 1)


def test_a_failure_is_seen_by_all_who_wait_and_kept_by_nobody() -> None:
    cache = CompiledCache()

    def fail() -> CompiledConstraint:
        raise InvalidConstraint("response_format", "no")

    for _ in range(2):
        with pytest.raises(InvalidConstraint):
            cache.get("key", fail)
    assert cache.get("key", Compiled).memory == 1


def test_the_least_recently_used_goes_first() -> None:
    cache = CompiledCache(capacity=10)
    first = cache.get("a", lambda: Compiled(4))
    cache.get("b", lambda: Compiled(4))
    assert cache.get("a", Compiled) is first
    cache.get("c", lambda: Compiled(4))
    assert cache.memory == 8 and cache.get("a", Compiled) is first
    cache.get("huge", lambda: Compiled(11))
    assert cache.memory == 8 and len(cache) == 2
