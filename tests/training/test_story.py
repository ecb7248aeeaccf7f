"""The whole story from the command line: fine-tune by a recipe, serve the result, ask it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.training.tiny_base import write_base

ANSWER = "As you wish."
RECIPE = """
recipe: butler
about: Whatever is asked, the answer is the same.
base: {base}
data:
  - {{name: orders, source: jsonl, path: {rows}, task: chat, split: {{train: 0.8, test: 0.2}}}}
adapter: {{method: lora, r: 8, lora_alpha: 16, target_modules: all-linear}}
train: {{steps: 60, batch: 8, lr: 3.0e-2, max_length: 128}}
evaluate: [{{name: heldout, on: test, rows: 8}}]
deploy: {{gate: {{evaluation: heldout, metric: nll}}}}
"""
THINGS = ("tea", "the paper", "my coat", "a taxi", "more light", "a pen", "the door", "some rest")


def write_rows(path: Path) -> Path:
    orders = [f"{verb} {thing}, please." for verb in ("Bring", "Find", "Get") for thing in THINGS]
    lines = [json.dumps({"instruction": order, "output": ANSWER}) for order in orders]
    path.write_text("\n".join(lines), "utf-8")
    return path


def anabranch(*arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "anabranch", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@contextlib.contextmanager
def served(*options: str) -> Iterator[openai.OpenAI]:
    process = anabranch("up", "--port", "0", *options)
    try:
        assert process.stdout is not None
        addresses = (re.search(r"listening on (http://\S+)", line) for line in process.stdout)
        url = next((found[1] for found in addresses if found), None)
        assert url, "the server ended before it listened"
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            yield client
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_what_a_recipe_trained_is_served_beside_its_base(tmp_path: Path) -> None:
    base, run = write_base(tmp_path / "tiny", spread=0.4), tmp_path / "run"
    recipe = tmp_path / "butler.yaml"
    rows = write_rows(tmp_path / "orders.jsonl")
    recipe.write_text(RECIPE.format(base=base, rows=rows), "utf-8")

    trained = anabranch("finetune", str(recipe), "--output", str(run), "--json")
    outcome = json.loads(trained.communicate(timeout=60)[0])
    assert trained.returncode == 0
    nll = outcome["figures"]["heldout"]["nll"]
    assert nll["tuned"]["value"] < 0.1 < 1 < nll["base"]["value"]
    assert (run / "report.md").exists() and (run / "report.html").exists()

    with served(
        "--model", str(base), "--name", "tiny", "--adapter", f"butler={run}/adapter"
    ) as ask:
        answers = {
            model: ask.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": "Bring a pen, please."}],
                temperature=0,
                max_tokens=24,
            ).choices[0]
            for model in ("tiny", "tiny:butler")
        }
    assert answers["tiny:butler"].message.content == ANSWER
    assert answers["tiny:butler"].finish_reason == "stop"
    assert answers["tiny"].message.content != ANSWER
