"""Speculation against none, by load and by how good the drafts are: tokens per second, as ratios.

    python -m benchmarks.speculation            # about ten minutes on two cores
    python -m benchmarks.speculation --json

Two engines in one process answer the same greedy requests, in turns of a third of a second, so that
whatever else the machine does slows both; the ratio is that of their seconds, with its spread over
the rounds. The answers must be the same. Lookups draft; goodput decides what is worth verifying.
``copy`` repeats a file, ``edit`` renames something in it, ``chat`` answers freely. The first lines
of the file and of the edited one are given with the question, or so small a model would write
something else.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from anabranch.models.protocol import SamplingParameters
from anabranch.serving import Engine, EngineModel, EngineOptions, Request

SOURCE = Path(__file__).parents[1] / "src/anabranch/serving/detokenizer.py"
TURN_SECONDS = 0.3
LINE = (
    "{task:5} {streams:3} streams: {ratio:.2f}x  (rounds {least:.2f} to {most:.2f}; "
    "{drafted} drafted, {accepted} accepted, {generated} generated)"
)
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
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=96, help="of each answer")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--weights", default="bf16", choices=["bf16", "int8"])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)

    on, off = (
        EngineModel.load(options=EngineOptions(weights=options.weights, speculation=speculation))
        for speculation in (EngineOptions().speculation, "off")
    )
    cells = []
    for task in TASKS:
        for streams in options.streams:
            requests = prompts(on.tokenizer, task, streams, options.tokens)
            cell = {"task": task, "streams": streams}
            cell |= measure(on.engine, off.engine, requests, options.rounds)
            cells.append(cell)
            if not options.json:
                print(LINE.format(**cell), flush=True)
    if options.json:
        print(json.dumps({"threads": torch.get_num_threads(), "cells": cells}))


def measure(
    on: Engine, off: Engine, requests: Sequence[Request], rounds: int
) -> dict[str, float | int]:
    """How much faster ``on`` answers than ``off``, and what became of its drafts."""
    engines = [on, off]
    in_turns(engines, requests)  # fills the prefix cache, and lets the cost model see steps
    before = on.statistics()
    seconds = []
    for number in range(rounds):
        seconds.append(in_turns(engines if number % 2 else engines[::-1], requests))
    after = on.statistics()
    ratios = [spent[off] / spent[on] for spent in seconds]
    return {
        "ratio": sum(spent[off] for spent in seconds) / sum(spent[on] for spent in seconds),
        "least": min(ratios),
        "most": max(ratios),
        "drafted": after.drafted_tokens - before.drafted_tokens,
        "accepted": after.accepted_tokens - before.accepted_tokens,
        "generated": after.generated_tokens - before.generated_tokens,
    }


def in_turns(engines: Sequence[Engine], requests: Sequence[Request]) -> dict[Engine, float]:
    """Seconds that each engine computes until it has answered all requests."""
    seconds = dict.fromkeys(engines, 0.0)
    answers: list[dict[str, list[int]]] = [{r.id: [] for r in requests} for _ in engines]
    for engine in engines:
        for request in requests:
            engine.add(request)
    while any(engine.has_work for engine in engines):
        for engine, answer in zip(engines, answers, strict=True):
            began = time.perf_counter()
            while engine.has_work and time.perf_counter() - began < TURN_SECONDS:
                for output in engine.step():
                    answer[output.request_id].extend(output.delta.token_ids)
            seconds[engine] += time.perf_counter() - began
    if any(answer != answers[0] for answer in answers):
        raise SystemExit(f"{requests[0].id}: speculation changed an answer")
    return seconds


def prompts(tokenizer: Any, task: str, streams: int, tokens: int) -> list[Request]:
    """Requests that differ, so that streams do not run in step."""
    code = SOURCE.read_text().splitlines()
    made = []
    for number in range(streams):
        part = "\n".join(code[number % 20 : number % 20 + 45])
        content = TASKS[task].format(code=part, number=number)
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )["input_ids"]
        if task != "chat":
            given = "".join(line + "\n" for line in part.split("\n")[:GIVEN])
            if task == "edit":
                given = given.replace("text", "words")
            ids = [*ids, *tokenizer(given)["input_ids"]]
        sampling = SamplingParameters(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        made.append(Request(f"{task} {number}", ids, sampling))
    return made


if __name__ == "__main__":
    main()
