"""Local training of many sites as one batch: a kernel for all of them instead of one for each.

For small models most of a step is what torch does around its kernels, and that is paid once for a
cohort. Each site still has its own weights, optimiser state, data order and clipping::

    cohort = Cohort()
    with cohort.gathering():
        ...             # LocalTraining.run raises Postponed, once for each site
    cohort.train()
    with cohort.handing_out():
        ...             # LocalTraining.run returns what came out

What cannot be batched trains alone, as ever: with hooks or privacy, in another precision than fp32,
models with buffers or dropout, objectives that are not :attr:`~Objective.batchable`, tasks that no
other is like, and sites whose loss or gradient is not finite.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.training.objective import Objective
from anabranch.training.optimizers import build_optimizer, set_lr_factor
from anabranch.training.options import TrainOptions
from anabranch.training.sampler import Sampler, in_order, shuffled
from anabranch.training.schedules import lr_factor

Key = tuple[str, int]
"""Site and task."""

BATCH_BYTES = 1 << 28
"""Weights of a batch. Gradients, optimiser state and activations come on top."""


class Postponed(BaseException):
    """A task has come to its training, which waits for that of others. No failure."""


@dataclass(frozen=True)
class Trained:
    """The shared parameters afterwards, the loss of every step, and how many items there are."""

    tensors: dict[str, Tensor]
    losses: list[float]
    examples: int


class Cohort:
    """The tasks that sites of this process were given at one time."""

    def __init__(self) -> None:
        self._gathering = False
        self._waiting: dict[Key, _Request] = {}
        self._trained: dict[Key, Trained] = {}

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Meanwhile training that can be batched is noted and raises :class:`Postponed`."""
        with self._active(gathering=True):
            yield

    @contextmanager
    def handing_out(self) -> Iterator[None]:
        """Meanwhile training is looked up; what was not batched is done."""
        with self._active(gathering=False):
            yield

    def train(self) -> None:
        """Do what was noted, in as few batches as possible."""
        alike: dict[Any, dict[Key, _Request]] = defaultdict(dict)
        for key, request in self._waiting.items():
            alike[request.likeness][key] = request
        self._waiting = {}
        for requests in alike.values():
            for keys in _batches(requests):
                if len(keys) > 1:
                    found = _train([requests[key] for key in keys])
                    self._trained |= {
                        key: trained
                        for key, trained in zip(keys, found, strict=True)
                        if trained is not None
                    }

    @contextmanager
    def _active(self, gathering: bool) -> Iterator[None]:
        self._gathering = gathering
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def _find(self, key: Key, training: tuple[Any, ...]) -> Trained | None:
        if not self._gathering:
            return self._trained.pop(key, None)
        request = _request(*training)
        if request is None:
            return None
        self._waiting[key] = request
        raise Postponed


def trained_together(
    key: Key,
    model: nn.Module,
    objective: Objective[Any, Any],
    options: TrainOptions,
    data: Sequence[Any],
    start: Mapping[str, Tensor],
) -> Trained | None:
    """What a cohort made of this training; None if there is no cohort, or not for this."""
    cohort = _current.get()
    if cohort is None:
        return None
    return cohort._find(key, (model, objective, options, data, start))


_current: ContextVar[Cohort | None] = ContextVar("cohort", default=None)


@dataclass(frozen=True)
class _Request:
    """Batchable training. ``plan`` has a micro-batch and its denominators for every step."""

    model: nn.Module
    objective: Objective[Any, Tensor]
    options: TrainOptions
    start: dict[str, Tensor]
    plan: list[tuple[Tensor, Mapping[str, float]]]
    examples: int

    @property
    def likeness(self) -> Any:
        """What requests of one batch have in common."""
        return (
            id(self.model),
            id(self.objective),
            self.options.model_copy(update={"seed": 0}).model_dump_json(),
            tuple((batch.shape, tuple(sorted(counts.items()))) for batch, counts in self.plan),
        )


def _request(
    model: nn.Module,
    objective: Objective[Any, Any],
    options: TrainOptions,
    data: Sequence[Any],
    start: Mapping[str, Tensor],
) -> _Request | None:
    """None for what has to be trained alone, mistakes included, which are named there."""
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not (
        trainable
        and objective.batchable
        and not objective.two_pass
        and options.precision == "fp32"
        and options.ema is None
        and not options.gradient_checkpointing
        and start.keys() <= trainable.keys()
        and all(trainable[name].shape == tensor.shape for name, tensor in start.items())
        and not any(True for _ in model.buffers())
        and not any(isinstance(m, nn.modules.dropout._DropoutNd) for m in model.modules())
    ):
        return None
    items = objective.prepare(data).items
    if not items:
        return None
    objective.check(model)
    count = len(items)
    order = shuffled(count, options.seed) if options.shuffle else in_order(count)
    sampler = Sampler(order, options.batch)
    plan = []
    for _ in range(options.total_steps(sampler.steps_per_epoch)):
        drawn = [items[index] for index in sampler.next_batch()]
        micro_batches = objective.plan(drawn)
        if len(micro_batches) != 1:
            return None
        plan.append((micro_batches[0], objective.denominators(drawn)))
    beginning = {name: start.get(name, p).detach().to(p) for name, p in trainable.items()}
    return _Request(model, objective, options, beginning, plan, count)


def _batches(requests: dict[Key, _Request]) -> Iterator[list[Key]]:
    """As many sites at a time as have :data:`BATCH_BYTES` of weights."""
    each = sum(t.nbytes for t in next(iter(requests.values())).start.values())
    keys = list(requests)
    size = max(1, BATCH_BYTES // each)
    for first in range(0, len(keys), size):
        yield keys[first : first + size]


def _train(requests: Sequence[_Request]) -> list[Trained | None]:
    """All at once, each as the trainer would; None for those with a step that was not finite."""
    first = requests[0]
    model, objective, options = first.model, first.objective, first.options
    names = list(first.start)
    # [sites, ...] each
    weights: dict[str, Any] = {
        n: nn.Parameter(torch.stack([r.start[n] for r in requests])) for n in names
    }
    optimizer = build_optimizer(options, weights, stacked=True)
    steps = len(first.plan)
    warmup = options.warmup_steps(steps)
    finite = torch.ones(len(requests), dtype=torch.bool, device=weights[names[0]].device)
    losses = []

    with _training(_Loss(model, objective)) as module:
        for step in range(steps):
            set_lr_factor(
                optimizer, lr_factor(step, steps, warmup, options.schedule, options.min_lr)
            )
            denominators = first.plan[step][1]

            def loss_of(own: dict[str, Tensor], batch: Tensor) -> Tensor:
                arguments = (batch, denominators)  # noqa: B023 (called within this turn)
                own = {f"model.{name}": tensor for name, tensor in own.items()}
                found: Tensor = torch.func.functional_call(module, own, arguments)
                return found

            batch = torch.stack([request.plan[step][0] for request in requests])
            loss = torch.func.vmap(loss_of)(weights, batch)  # [sites]
            gradients = torch.autograd.grad(loss.sum(), list(weights.values()), allow_unused=True)
            found = [g for g in gradients if g is not None]
            norm = torch.stack([g.flatten(1).norm(dim=1) for g in found]).norm(dim=0)  # [sites]
            if options.clip is not None:
                # As torch.nn.utils.clip_grads_with_norm_ does.
                scale = (options.clip / (norm + 1e-6)).clamp(max=1.0)
                for gradient in found:
                    gradient.mul_(scale.view(-1, *[1] * (gradient.ndim - 1)))
            for parameter, own in zip(weights.values(), gradients, strict=True):
                # The fused AdamW of processors takes every gradient for laid out as its weights.
                parameter.grad = None if own is None else own.contiguous()
            optimizer.step()
            losses.append(loss.detach())
            finite &= loss.detach().isfinite() & norm.isfinite()

    by_site = torch.stack(losses, 1).tolist()
    return [
        Trained({n: w.detach()[i].clone() for n, w in weights.items()}, by_site[i], r.examples)
        if whole
        else None
        for i, (r, whole) in enumerate(zip(requests, finite.tolist(), strict=True))
    ]


class _Loss(nn.Module):
    """A step's loss as a module, so that all that is called has the replaced parameters."""

    def __init__(self, model: nn.Module, objective: Objective[Any, Tensor]) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, micro_batch: Tensor, denominators: Mapping[str, float]) -> Tensor:
        """A scalar."""
        return self.objective.loss(self.model, micro_batch, denominators).loss


@contextmanager
def _training(module: _Loss) -> Iterator[_Loss]:
    modes = [(each, each.training) for each in module.modules()]
    module.train()
    try:
        yield module
    finally:
        for each, training in modes:
            each.training = training
