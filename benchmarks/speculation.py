"""Speculation against none, by load and by how good the drafts are: tokens per second, as ratios.

    python -m benchmarks.speculation            # about ten minutes on two cores
    python -m benchmarks.speculation --json

Each cell runs the same greedy requests with and without, in turns, in one process; the ratio is
that of medians, and the answers must be the same. Lookups draft; goodput decides what is worth
verifying. ``copy`` repeats a file, ``edit`` renames something in it, ``chat`` answers freely. The
first lines of the file and of the edited one are given with the question, or so small a model would
write something else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from anabranch.models.protocol import SamplingParameters
from anabranch.serving import EngineModel, EngineOptions, Request

SOURCE = Path(__file__).parents[1] / "src/anabranch/serving/detokenizer.py"
GIVEN = 3
"""Lines of the answer that are given."""
TASKS = {
    "copy": "Repeat this file exactly:\n\n{code}",
    "edit": "Rename the variable `text` to `words` and return the whole file:\n\n{code}",
    "chat": "Explain how bread is made, and why the dough has to rest. Number {number}.",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line per cell, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16, 48])
    parser.add_argument("--tokens", type=int, default=96, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--weights", default="bf16", choices=["bf16", "int8"])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)

    model = EngineModel.load(options=EngineOptions(weights=options.weights))
    cells = [
        measure(model, task, streams, options.tokens, options.rounds, show=not options.json)
        for task in TASKS
        for streams in options.streams
    ]
    if options.json:
        print(json.dumps({"threads": torch.get_num_threads(), "cells": cells}))


def measure(
    model: EngineModel, task: str, streams: int, tokens: int, rounds: int, show: bool
) -> dict[str, float | int | str]:
    """Median seconds with and without speculation, and what became of the drafts."""
    engine = model.engine
    proposer = engine.speculation.proposer
    requests = prompts(model, task, streams, tokens)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    answers: dict[bool, object] = {}
    for on in (True, False):  # fills the prefix cache, and lets the cost model see both
        engine.speculation.proposer = proposer if on else None
        engine.generate(requests)
    before = engine.statistics()
    for number in range(rounds):
        for on in (True, False) if number % 2 else (False, True):
            engine.speculation.proposer = proposer if on else None
            began = time.perf_counter()
            answers[on] = engine.generate(requests)
            seconds[on].append(time.perf_counter() - began)
        if answers[True] != answers[False]:
            raise SystemExit(f"{task} with {streams} streams: speculation changed an answer")
    engine.speculation.proposer = proposer
    after = engine.statistics()
    cell: dict[str, float | int | str] = {
        "task": task,
        "streams": streams,
        "ratio": statistics.median(seconds[False]) / statistics.median(seconds[True]),
        "drafted": after.drafted_tokens - before.drafted_tokens,
        "accepted": after.accepted_tokens - before.accepted_tokens,
        "generated": (after.generated_tokens - before.generated_tokens) // 2,
    }
    if show:
        print(
            "{task:5} {streams:3} streams: {ratio:.2f}x  ({drafted} drafted, {accepted} accepted, "
            "{generated} generated)".format(**cell),
            flush=True,
        )
    return cell


def prompts(model: EngineModel, task: str, streams: int, tokens: int) -> list[Request]:
    """Requests that differ, so that streams do not run in step."""
    code = SOURCE.read_text().splitlines()
    made = []
    for number in range(streams):
        part = "\n".join(code[number % 20 : number % 20 + 45])
        content = TASKS[task].format(code=part, number=number)
        ids = model.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )["input_ids"]
        if task != "chat":
            given = "".join(line + "\n" for line in part.split("\n")[:GIVEN])
            if task == "edit":
                given = given.replace("text", "words")
            ids = [*ids, *model.tokenizer(given)["input_ids"]]
        sampling = SamplingParameters(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        made.append(Request(f"{task} {number}", ids, sampling))
    return made


if __name__ == "__main__":
    main()
