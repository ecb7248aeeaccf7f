"""Answers with and without a constraint, and how long they took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from anabranch.errors import InvalidConstraint
from anabranch.models.constraint import OutputConstraint
from anabranch.models.loading import LoadedModel
from anabranch.models.protocol import FinishReason, SamplingParameters
from anabranch.serving import Engine, EngineOptions, Request
from anabranch.serving.constraints import ConstraintCompiler
from anabranch.serving.model import end_tokens
from anabranch.serving.runner.selection import make_runner


@dataclass(frozen=True)
class Task:
    """One greedy answer that is wanted. ``prompt`` is what the user says."""

    prompt: str
    constraint: OutputConstraint | None = None
    max_tokens: int = 256


@dataclass(frozen=True)
class Answer:
    """What came of a task. Times in seconds; ``refusal`` is why the constraint was not accepted."""

    text: str = ""
    finish_reason: FinishReason | None = None
    tokens: int = 0
    compile_seconds: float = 0.0
    first_token_seconds: float = 0.0
    """From the moment that the prompt could begin to be computed."""
    seconds: float = 0.0
    refusal: InvalidConstraint | None = None

    @property
    def seconds_per_token(self) -> float:
        """Mean time of the tokens after the first."""
        return (self.seconds - self.first_token_seconds) / max(self.tokens - 1, 1)


class Generator(Protocol):
    """Whatever answers tasks greedily."""

    def generate(self, tasks: Sequence[Task]) -> list[Answer]:
        """An answer for each task, in order."""


class EngineGenerator:
    """Answers on the serving engine, ``concurrency`` at a time."""

    def __init__(
        self, loaded: LoadedModel, backend: str = "auto", concurrency: int = 1, **options: Any
    ) -> None:
        engine_options = EngineOptions(max_sequences=concurrency, **options)
        runner = make_runner(loaded, engine_options)
        ends = tuple(sorted(end_tokens(loaded)))
        self.tokenizer = loaded.tokenizer
        self.engine = Engine(runner, loaded.tokenizer, ends, engine_options)
        self.compiler = ConstraintCompiler(loaded.tokenizer, runner.vocabulary, ends, backend)
        self.concurrency = concurrency

    def generate(self, tasks: Sequence[Task]) -> list[Answer]:
        """An answer for each task, in order."""
        answers: dict[int, Answer] = {}
        waiting = list(enumerate(tasks))[::-1]
        running: dict[str, _Running] = {}
        while waiting or running:
            while waiting and len(running) < self.concurrency:
                index, task = waiting.pop()
                try:
                    running[str(index)] = self._start(index, task)
                except InvalidConstraint as refusal:
                    answers[index] = Answer(refusal=refusal)
            for output in self.engine.step() if running else ():
                under_way = running[output.request_id]
                under_way.take(output.delta)
                if output.delta.finish_reason is not None:
                    answers[int(output.request_id)] = under_way.answer()
                    del running[output.request_id]
        return [answers[index] for index in range(len(tasks))]

    def _start(self, index: int, task: Task) -> _Running:
        began = time.perf_counter()
        compiled = self.compiler.compile(task.constraint) if task.constraint else None
        compile_seconds = time.perf_counter() - began
        sampling = SamplingParameters(task.max_tokens, temperature=0.0, constraint=task.constraint)
        prompt = self._render(task.prompt)
        self.engine.add(Request(str(index), prompt, sampling, constraint=compiled))
        return _Running(compile_seconds)

    def _render(self, prompt: str) -> list[int]:
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


class _Running:
    def __init__(self, compile_seconds: float) -> None:
        self._compile_seconds = compile_seconds
        self._began = time.perf_counter()
        self._first = 0.0
        self._text = ""
        self._tokens = 0
        self._reason: FinishReason | None = None

    def take(self, delta: Any) -> None:
        if not self._tokens and delta.token_ids:
            self._first = time.perf_counter() - self._began
        self._text += delta.text
        self._tokens += len(delta.token_ids)
        self._reason = delta.finish_reason

    def answer(self) -> Answer:
        return Answer(
            self._text,
            self._reason,
            self._tokens,
            self._compile_seconds,
            self._first,
            time.perf_counter() - self._began,
        )
