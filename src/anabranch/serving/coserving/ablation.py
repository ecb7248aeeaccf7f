"""How much each step of the memory planning saves, beside the paper's own ablation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from anabranch.serving.coserving.layer_shape import IA3, Bottleneck, Bypass, LayerShape, Lora
from anabranch.serving.coserving.pruning import Mode, plan_activations

LLAMA_8B = LayerShape(
    hidden=4096,
    intermediate=14336,
    heads=32,
    kv_heads=8,
    head_dim=128,
    layers=32,
    vocabulary=128256,
)
LLAMA_70B = LayerShape(
    hidden=8192,
    intermediate=28672,
    heads=64,
    kv_heads=8,
    head_dim=128,
    layers=80,
    vocabulary=128256,
)

METHODS: Mapping[str, Mapping[str, Bypass]] = {
    "LoRA": {"down_proj": Lora(16)},
    "Adapter": {"o_proj": Bottleneck(64), "down_proj": Bottleneck(64)},
    "IA3": {"k_proj": IA3(), "v_proj": IA3(), "down_proj": IA3("input")},
}
PAPER_GB: Mapping[str, tuple[float, float, float, float]] = {
    "LoRA": (84.6, 21.5, 16.1, 12.5),
    "Adapter": (84.6, 21.5, 21.5, 12.8),
    "IA3": (98.0, 28.2, 20.1, 12.8),
}
"""Conventional, pruned, with rematerialisation, token level (Oliaro et al., ablation figure)."""


@dataclass(frozen=True)
class Step:
    """A column of the table; ``paper`` is the place of the figure to compare it with."""

    name: str
    mode: Mode
    flash: bool = True
    windows: bool = False
    """Head and backward pass one window at a time, instead of the whole sequence."""
    paper: int | None = None


STEPS = (
    Step("conventional, no flash", "conventional", flash=False, paper=0),
    Step("conventional", "conventional"),
    Step("PyTorch", "autograd"),
    Step("pruned", "pruned", paper=1),
    Step("+ remat", "pruned+remat", paper=2),
    Step("+ windows", "pruned+remat", windows=True, paper=3),
    Step("layer input", "layer_input", windows=True),
)


def ablation(shape: LayerShape, tokens: int, window: int) -> dict[str, list[float]]:
    """GB (10^9 bytes) of activations in 16 bits for each method and each of :data:`STEPS`.

    All include the head, and the most that is made again at a time.
    """
    return {
        name: [_gigabytes(shape, targets, step, tokens, window) for step in STEPS]
        for name, targets in METHODS.items()
    }


def ablation_markdown(
    shape: LayerShape, tokens: int, window: int, *, published: bool = False
) -> str:
    """The ablation as a Markdown table; ``published`` adds the paper's figures in brackets."""
    lines = [
        f"| GB | {' | '.join(step.name for step in STEPS)} |",
        f"|---|{'---:|' * len(STEPS)}",
    ]
    for method, sizes in ablation(shape, tokens, window).items():
        cells = [
            f"{size:.1f} ({PAPER_GB[method][step.paper]})"
            if published and step.paper is not None
            else f"{size:.1f}"
            for step, size in zip(STEPS, sizes, strict=True)
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _gigabytes(
    shape: LayerShape, targets: Mapping[str, Bypass], step: Step, tokens: int, window: int
) -> float:
    plan = plan_activations(
        shape,
        targets,
        step.mode,
        tokens,
        window=window if step.windows else None,
        flash=step.flash,
    )
    return (plan.bytes + plan.workspace_bytes) / 1e9
