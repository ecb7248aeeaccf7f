"""A recipe that trains in a second, as a file beside the jobs of tests."""

from __future__ import annotations

from pathlib import Path

from tests.training.tiny_base import write_base

RECIPE = """
recipe: tiny
base: {base}
data:
  - source: generator:instructions
    options: {{rows: 60}}
    split: {{train: 0.8, valid: 0.2}}
adapter: {{method: lora, r: 4}}
train: {{steps: 6, batch: 8, lr: 1.0e-2, schedule: constant}}
evaluate: []
"""


def write_recipe(folder: Path) -> None:
    """``tiny.yaml`` and the base that it names."""
    base = write_base(folder / "base")
    (folder / "tiny.yaml").write_text(RECIPE.format(base=base))
