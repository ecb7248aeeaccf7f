"""The gradient of the base's adapted weights over the clients' examples, as small messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor

from anabranch.adapters import lora_sb
from anabranch.federated.client import Answer, ClientContext
from anabranch.federated.errors import PayloadMismatch
from anabranch.federated.local import LocalTraining
from anabranch.federated.payload import Payload, Value
from anabranch.training.trainer import Trainer

Sketch = Literal["low_rank", "signs"]
MOST_COUNTS = 127
"""Batches whose signs fit into a byte."""


def first_gradient(
    ctx: ClientContext, local: LocalTraining, samples: int, sketch: Sketch
) -> Answer:
    """A sketch of the mean gradient over some examples of a site, and their number.

    With privacy it is a private batch: each example in it by chance, its gradient over all adapted
    weights clipped together, noise added before anything else is made of it; one step is charged.
    """
    if not len(ctx.data):
        return {}, 0
    trainer: Trainer[Any] = Trainer(
        ctx.model, local.objective, local.for_task(ctx.work, ctx.seed), ctx.data
    )
    rank = len(dict(ctx.model.named_parameters())[lora_sb.places(ctx.model)[0].core])
    if local.privacy is not None:
        gradients, counted = _private(ctx, local, trainer)
        batches, shares = [gradients], [1.0]
    else:
        order = ctx.rng.permutation(len(trainer.items))[:samples]
        chosen = [trainer.items[index] for index in sorted(order.tolist())]
        counted, size = len(chosen), max(trainer.options.batch, -(-len(chosen) // MOST_COUNTS))
        groups = [chosen[i : i + size] for i in range(0, len(chosen), size)]
        shares = [len(group) / len(chosen) for group in groups]
        losses: list[float] = []
        batches = [_gradients(trainer, group, losses) for group in groups]
        ctx.report(loss=fmean(losses, shares))
    ctx.spend(len(batches))
    payload: dict[str, Value] = {}
    for number, place in enumerate(lora_sb.places(ctx.model)):
        parts = [batch.get(place.site, torch.zeros(place.shape)) for batch in batches]
        if sketch == "signs":
            counts = torch.stack([part.sign() for part in parts]).sum(0)
            payload[f"{number}.signs"] = counts.to(torch.int8)
            continue
        mean = torch.stack([share * part for share, part in zip(shares, parts, strict=True)]).sum(0)
        if 2 * rank * sum(place.shape) >= place.shape[0] * place.shape[1]:
            payload[f"{number}.whole"] = mean
        else:
            left, right = lora_sb.truncated_svd(mean, 2 * rank)
            payload[f"{number}.left"], payload[f"{number}.right"] = left, right
    return payload, counted


def sum_of_sketches(
    acc: Any, payload: Payload, places: Sequence[lora_sb.Place], weight: float, client: str
) -> dict[str, Any]:
    """``{"sums": float64 [out, in] by site, "weights": total}`` with one more sketch.

    Raises :class:`PayloadMismatch` naming the client and the part that does not fit.
    """
    acc = acc or {"sums": {}, "weights": 0.0}
    sums = dict(acc["sums"])
    for number, place in enumerate(places):
        gradient = _unfolded(payload, number, place, client).to(torch.float64) * weight
        sums[place.site] = sums[place.site] + gradient if place.site in sums else gradient
    return {"sums": sums, "weights": acc["weights"] + weight}


def _unfolded(payload: Payload, number: int, place: lora_sb.Place, client: str) -> Tensor:
    parts = {kind: payload.get(f"{number}.{kind}") for kind in ("signs", "whole", "left", "right")}
    left, right = parts["left"], parts["right"]
    found: Any = None
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        if left.dim() == right.dim() == 2 and left.shape[1] == right.shape[0]:
            found = left.float() @ right.float()
    else:
        found = parts["whole"] if isinstance(parts["whole"], Tensor) else parts["signs"]
    if not isinstance(found, Tensor) or tuple(found.shape) != place.shape:
        got = "absent" if not isinstance(found, Tensor) else str(list(found.shape))
        raise PayloadMismatch(client, f"gradient of {place.site}", str(list(place.shape)), got)
    return found


def _gradients(
    trainer: Trainer[Any], items: Sequence[Any], losses: list[float] | None = None
) -> dict[str, Tensor]:
    """Of the loss of a step with these items, by site; the loss goes to ``losses``."""
    objective, model = trainer.objective, trainer.model
    denominators = objective.denominators(items)
    parts: list[float] = []

    def loss_of(micro_batch: Any) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            found = objective.loss(model, micro_batch, denominators).loss
            parts.append(float(found.detach()))
            return found

        return loss

    found = lora_sb.base_gradients(model, [loss_of(batch) for batch in objective.plan(items)])
    if losses is not None:
        losses.append(sum(parts))
    return found


def _private(
    ctx: ClientContext, local: LocalTraining, trainer: Trainer[Any]
) -> tuple[dict[str, Tensor], int]:
    account = local.account(ctx, len(trainer.items))
    count, clip = len(trainer.items), account.privacy.clip
    q = min(1.0, trainer.options.batch / count)
    noise = account.noise(q, trainer.total_steps)
    account.charge(noise, q, 1)
    generator = account.generator(ctx.name, ctx.task, "first gradient")
    places = lora_sb.places(ctx.model)
    sums = {place.site: torch.zeros(place.shape) for place in places}
    for index in (torch.rand(count, generator=generator) < q).nonzero().flatten().tolist():
        own = _gradients(trainer, [trainer.items[index]])
        norm = torch.stack([gradient.norm() for gradient in own.values()]).norm()
        for site, gradient in own.items():
            sums[site].add_(gradient, alpha=float((clip / (norm + 1e-6)).clamp(max=1.0)))
    for place in places:
        drawn = torch.randn(place.shape, generator=generator)
        sums[place.site].add_(drawn, alpha=noise * clip)
    # Not how many were drawn: that is as secret as which.
    return {site: total / (q * count) for site, total in sums.items()}, count
