"""Fine-tuning by a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anabranch.files import write_text
from anabranch.jobs.kinds.base import JobKind, Terms, anabranch, as_file
from anabranch.jobs.layout import OUTPUT


class FinetuneSpec(Terms):
    """``recipe`` is a recipe's YAML, or the name of one that comes with the program."""

    recipe: str
    overrides: list[str] = []


class Finetune(JobKind[FinetuneSpec]):
    """``anabranch finetune``: data, training, evaluation, report."""

    name = "finetune"
    spec = FinetuneSpec
    heading = "Recipes"
    example = """\
# A recipe, docs/recipes.md, or the name of one that comes with the program
recipe: arithmetic
overrides: [train.steps=100]
"""

    def from_words(self, words: Sequence[str]) -> dict[str, Any]:
        """A recipe, then overrides; relative paths in it are from where it lies."""
        from anabranch.training.recipe_file import dump_yaml, load_recipe

        return {"recipe": dump_yaml(load_recipe(words[0], words[1:]).resolved())}

    def check(self, values: Any) -> FinetuneSpec:
        """The recipe's keys are checked, too."""
        spec = super().check(values)
        self._recipe(spec)
        return spec

    def title(self, spec: FinetuneSpec) -> str:
        """The recipe's name."""
        return self._recipe(spec).recipe

    def command(self, spec: FinetuneSpec, folder: Path) -> list[str]:
        """On a copy of the recipe beside the result."""
        source = spec.recipe
        if is_yaml(source):
            source = "recipe.yaml"
            write_text(folder / source, spec.recipe)
        return anabranch("finetune", source, *spec.overrides, "--output", OUTPUT, "--json")

    def _recipe(self, spec: FinetuneSpec) -> Any:
        from anabranch.training.recipe_file import load_recipe

        if not is_yaml(spec.recipe):
            return load_recipe(spec.recipe, spec.overrides)
        with as_file(spec.recipe, "recipe.yaml") as path:
            return load_recipe(path, spec.overrides)


def is_yaml(text: str) -> bool:
    """Whether this is the text of a file, not the name of one."""
    return ":" in text
