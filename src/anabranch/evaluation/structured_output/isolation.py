"""Cases in a process of their own, so that a library that hangs or crashes takes nothing down."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from anabranch.evaluation.structured_output.cases import SchemaCase
from anabranch.evaluation.structured_output.maskbench import CaseResult, run_case
from anabranch.serving.constraints import ConstraintCompiler, ConstraintLimits

START_SECONDS = 120.0


def run_isolated(
    cases: Sequence[SchemaCase],
    backend: str,
    tokenizer: Callable[[], tuple[Any, int, tuple[int, ...]]],
    *,
    timeout: float = 40.0,
    draws: int = 2,
    seed: int = 0,
) -> Iterator[CaseResult]:
    """Results in order. ``tokenizer`` returns the constructor's first three arguments of
    :class:`ConstraintCompiler`; it is called in the new process, so it must be a module's function.

    After a crash or ``timeout`` seconds of one case the rest goes on in a fresh process.
    """
    worker: _Worker | None = None
    try:
        for case in cases:
            worker = worker or _Worker(backend, tokenizer, timeout, draws, seed)
            result = worker.run(case, timeout)
            if result.outcome == "crash" or (
                result.outcome == "timeout" and not result.reason.startswith("response_format")
            ):
                worker.close()
                worker = None
            yield result
    finally:
        if worker is not None:
            worker.close()


class _Worker:
    def __init__(self, backend: str, tokenizer: Any, *settings: Any) -> None:
        # One server imports what is heavy; workers are forked off it while it has no threads.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([run_case.__module__, "anabranch.models.loading"])
        self._backend = backend
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_work, args=(theirs, backend, tokenizer, *settings), daemon=True
        )
        self._process.start()
        theirs.close()
        if not self._pipe.poll(START_SECONDS):
            self.close()
            raise TimeoutError(f"the process for {backend} did not start in {START_SECONDS:g} s")
        ready = self._receive()
        if isinstance(ready, Exception):
            self.close()
            raise ready

    def run(self, case: SchemaCase, timeout: float) -> CaseResult:
        names = (case.name, case.dataset, case.category, self._backend)
        self._pipe.send(case)
        # Compiling has a limit of its own, and instances take as long again.
        if not self._pipe.poll(2 * timeout + 5):
            return CaseResult(*names, "timeout", reason=f"no result in {2 * timeout + 5:g} s")
        found = self._receive()
        if isinstance(found, CaseResult):
            return found
        return CaseResult(*names, "crash", reason=f"{type(found).__name__}: {found}"[:300])

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            self._process.join()
            return RuntimeError(f"the process ended with status {self._process.exitcode}")

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _work(pipe: Connection, *settings: Any) -> None:
    with suppress(EOFError, BrokenPipeError):  # whoever asked has gone
        _answer(pipe, *settings)


def _answer(
    pipe: Connection, backend: str, tokenizer: Any, timeout: float, draws: int, seed: int
) -> None:
    try:
        limits = ConstraintLimits(seconds=timeout, cache_bytes=0)
        tokens, rows, ends = tokenizer()
        compiler = ConstraintCompiler(tokens, rows, ends, backend, limits=limits)
        pipe.send(None)
    except Exception as error:
        pipe.send(error)
        return
    while True:
        case = pipe.recv()
        try:
            pipe.send(run_case(case, compiler, backend, draws, seed))
        except Exception as error:  # a defect of a library: told, and the next case goes on
            pipe.send(error)
