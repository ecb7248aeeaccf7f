"""GSM8K and HumanEval: prompts, what counts as an answer, and what is run."""

from __future__ import annotations

import os
import time
from decimal import Decimal

import pytest

from anabranch.errors import ConfigurationError
from anabranch.evaluation.benchmarks import base, human_eval
from anabranch.evaluation.benchmarks.gsm8k import GSM8K, stated
from anabranch.evaluation.benchmarks.human_eval import HumanEval, judge
from anabranch.evaluation.contrast.code_tasks import CodeTask
from anabranch.evaluation.sandbox import Limits, run_program
from anabranch.training.errors import DataError
from tests.evaluation.benchmarks.helpers import subject, write_rows
from tests.training.tiny_base import tokenizer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7\n#### 7", "7"),
        ("#### $1,234.50 in all", "1234.50"),
        ("#### -3", "-3"),
        ("#### .5", "0.5"),
        ("####18\n#### 19", "18"),
        ("The answer is 7", None),
        ("#### none", None),
        ("7 ####", None),
        ("", None),
    ],
)
def test_the_number_after_the_mark(text, number):
    assert stated(text) == (None if number is None else Decimal(number))


@pytest.fixture
def data(tmp_path, monkeypatch):
    test = [{"question": f"What is {i} + {i}?", "answer": f"<<{i}+{i}>>It is.\n#### {2 * i}"} for i in range(1, 5)]  # fmt: skip # noqa: E501
    train = [{"question": f"And {i}?", "answer": f"Just {i}.\n#### {i}"} for i in range(9)]
    write_rows(tmp_path / "gsm8k" / "test.jsonl", test)
    write_rows(tmp_path / "gsm8k" / "train.jsonl", train)
    monkeypatch.setenv("ANABRANCH_DATA", str(tmp_path))
    return tmp_path


def test_shots_stand_before_each_problem_and_exact_numbers_count(data, monkeypatch):
    answers = [" Well.\n#### 2", " #### 4.0\nQuestion: more #### 9", "#### 7", "it is 8"]
    asked = []

    def answer(model, tokens, prompts, ends, options, progress):
        asked.extend(tokens.decode(prompt) for prompt in prompts)
        assert options.max_tokens == 64
        return answers

    monkeypatch.setattr(base, "generate_answers", answer)
    benchmark = GSM8K(shots=2, max_tokens=64, asked="plain")
    result = benchmark.examine(subject())
    assert result.score == 0.5 and result.others == {"stated": 0.75} and result.rows == 4
    shown = "".join(
        f"Question: {example.question}\nAnswer: {example.worked}\n\n"
        for example in benchmark.examples()
    )
    assert asked[0] == f"{shown}Question: What is 1 + 1?\nAnswer:" and "<<" not in asked[0]
    assert GSM8K(shots=2).examples() == benchmark.examples() != GSM8K(shots=2, seed=1).examples()


def test_as_a_conversation(data, monkeypatch):
    asked = []

    def answer(model, tokens, prompts, *rest):
        asked.extend(prompts)
        return ["#### 2"] * len(prompts)

    monkeypatch.setattr(base, "generate_answers", answer)
    assert GSM8K(shots=1).examine(subject()).score == 0.25
    text = tokenizer().decode(asked[0])
    assert text.count("<|im_start|>") == 4 and text.endswith("assistant\n")


def test_a_model_answers_greedily_and_the_same_again(data):
    first, second = (GSM8K(shots=1, max_tokens=8).examine(subject()) for _ in range(2))
    assert first == second and first.score == 0.0


def test_problems_that_cannot_be_asked(data):
    with pytest.raises(DataError, match=r"test.jsonl:1: the question takes \d+ tokens"):
        GSM8K(shots=2).examine(subject(context=100))
    with pytest.raises(DataError, match="10 shots, but gsm8k/train has 9"):
        GSM8K(shots=10).examine(subject())
    with pytest.raises(ConfigurationError, match="shots is at least 0"):
        GSM8K(shots=-1)
    write_rows(data / "gsm8k" / "test.jsonl", [{"question": "?", "answer": "no number"}])
    with pytest.raises(DataError, match="states no number after ####"):
        GSM8K().questions  # noqa: B018


ADD = CodeTask(
    "T/0",
    'def add(a, b):\n    """Sum."""\n',
    "    return a + b\n",
    "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(0, 0) == 0\n",
    "add",
)


@pytest.mark.parametrize(
    ("completion", "passed", "reason"),
    [
        ("    return a + b\n", True, ""),
        ("    return a + b\n\ndef check(f):\n    pass\n", True, ""),
        ("    return a - b\n", False, "AssertionError"),
        ("    return a +", False, "SyntaxError"),
        ("    while True: pass\n", False, "still running after 1 s"),
        ("    import time; time.sleep(60)\n", False, "still running after 1 s"),
        ("    exit()\n", False, "NameError"),
        ("    import sys; sys.exit()\n", False, "SystemExit"),
        ("    import os; os._exit(0)\n", False, "exit status 0"),
        ("    return 'x' * 10**10\n", False, "MemoryError"),
        ("    import os; os.kill(os.getppid(), 9)\n", False, "os.kill is refused"),
        ("    import socket; socket.socket()\n", False, "socket.__new__ is refused"),
        ("    import os; os.fork()\n", False, "os.fork is refused"),
        ("    import os; os.system('true')\n", False, "os.system is refused"),
        ("    import subprocess; subprocess.run(['true'])\n", False, "refused"),
        ("    import ctypes; ctypes.CDLL(None)\n", False, "refused"),
        ("    open('kept', 'w')\n", False, "for writing is refused"),
        ("    import os; os.open('kept', os.O_CREAT)\n", False, "for writing is refused"),
        ("    print('x' * 10**7)\n    return a + b\n", True, ""),
    ],
)
def test_what_becomes_of_a_completion(completion, passed, reason):
    verdict = judge(ADD, completion, Limits(seconds=1.0, memory=2**29))
    assert verdict.passed == passed and reason in verdict.reason, verdict


def test_tests_of_a_completion_cannot_be_talked_away():
    """A program that catches everything, or writes a verdict of its own, has not passed."""
    forged = """
import os
for stream in range(3, 10):
    try:
        os.write(stream, b'{"token": "?", "error": ""}')
    except OSError:
        pass
os._exit(0)
"""
    assert not run_program(forged).passed
    assert not run_program("import os, signal\nos.abort()").passed


def test_a_hanging_program_leaves_no_process_behind():
    before = time.monotonic()
    assert not run_program("while True: pass", Limits(seconds=0.5)).passed
    assert time.monotonic() - before < 5
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_pass_at_1_is_the_share_of_greedy_completions_that_pass(monkeypatch):
    monkeypatch.setattr(human_eval, "human_eval", lambda: [ADD] * 4)
    answers = ["    return a + b", "    return b + a\nclass X", "    return 0", "    while 1: pass"]
    monkeypatch.setattr(base, "generate_answers", lambda *a, **k: answers)
    result = HumanEval(seconds=1.0).examine(subject())
    assert result.score == 0.5 and result.others == {"hung": 0.25} and result.chance == 0.0
    with pytest.raises(ConfigurationError, match="seconds above 0"):
        HumanEval(seconds=0)
