"""The Python reference: a page for each public package, filled in by mkdocstrings."""

from __future__ import annotations

PACKAGES: dict[str, tuple[str, ...]] = {
    "models": ("anabranch.models",),
    "serving": (
        "anabranch.serving",
        "anabranch.serving.coserving",
        "anabranch.serving.speculation",
        "anabranch.serving.constraints",
        "anabranch.serving.contrast",
    ),
    "adapters": ("anabranch.adapters",),
    "training": (
        "anabranch.training.trainer",
        "anabranch.training.options",
        "anabranch.training.example",
        "anabranch.training.objective",
        "anabranch.training.language",
        "anabranch.training.losses",
        "anabranch.training.tasks",
        "anabranch.training.recipe",
        "anabranch.training.pipeline",
    ),
    "federated": (
        "anabranch.federated",
        "anabranch.federated.strategies",
        "anabranch.federated.aggregation",
        "anabranch.federated.codecs",
        "anabranch.federated.secure",
    ),
    "graphs": (
        "anabranch.graphs",
        "anabranch.graphs.embedding",
        "anabranch.graphs.ppr",
        "anabranch.graphs.recommend",
    ),
    "jobs": ("anabranch.jobs",),
    "evaluation": ("anabranch.evaluation",),
    "planning": ("anabranch.planning",),
    "api": ("anabranch.api",),
    "claims": ("anabranch.claims",),
    "registry": ("anabranch.registry",),
}
"""Page -> the modules whose public names it shows."""


def pages() -> dict[str, str]:
    """File name -> Markdown."""
    made = {f"{name}.md": _page(name, modules) for name, modules in PACKAGES.items()}
    links = [f"- [`anabranch.{name}`]({name}.md)" for name in PACKAGES]
    head = "# Python\n\nThe public names of each package, made from their docstrings.\n\n"
    return {"index.md": head + "\n".join(links) + "\n", **made}


def _page(name: str, modules: tuple[str, ...]) -> str:
    return f"# `anabranch.{name}`\n\n" + "\n".join(f"::: {module}\n" for module in modules)
