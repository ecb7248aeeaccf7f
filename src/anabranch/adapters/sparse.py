"""Sparse deltas: train k entries of the base's weights, chosen once, and store only those.

    fishmask    the k with the largest Fisher information (Sung et al. 2021, section 3)
    pafi        the k smallest in magnitude, which needs no data (Liao et al. 2023)
    lt_sft      the k that full fine-tuning moved most (Ansell et al. 2022, section 3.1)

The k are chosen over all targeted weights together; ties go to the earlier module and the lower
flat index. What is stored are positions and differences, ``W + scatter(positions, values)``.

PaFi chooses when it is built. The other two need data, so build them first (they then train what
PaFi would) and choose::

    model = adapters.build("fishmask", network, share=0.005)
    choose(model, fisher_information(model, losses))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.adapters.base import AdaptedLayer, AdapterConfig, Branch, Site, Tuner
from anabranch.adapters.errors import AdapterError
from anabranch.adapters.info import MethodInfo, Size
from anabranch.adapters.targets import plain_modules

Scores = Mapping[str, Tensor]
"""Importance of every entry of every targeted weight, [out, in] by module name."""


@dataclass
class SparseConfig(AdapterConfig):
    """Options of the sparse methods."""

    weights: int | None = field(
        default=None, metadata={"help": "How many entries are trained, over all modules together."}
    )
    share: float = field(
        default=0.005, metadata={"help": "The same as a share of the targeted weights."}
    )
    kept: dict[str, int] | None = field(
        default=None, metadata={"help": "Entries by module; filled in when they are chosen."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.share <= 1, f"share is in (0, 1], not {self.share}")
        self.require(
            self.weights is None or self.weights >= 1, f"weights is at least 1, not {self.weights}"
        )


@dataclass
class FishMaskConfig(SparseConfig):
    """Options of FishMask."""

    method: ClassVar[str] = "fishmask"


@dataclass
class PaFiConfig(SparseConfig):
    """Options of PaFi."""

    method: ClassVar[str] = "pafi"


@dataclass
class LTSFTConfig(SparseConfig):
    """Options of LT-SFT."""

    method: ClassVar[str] = "lt_sft"


class SparseDelta(Branch):
    """``scatter(positions, values) x``: a few entries added to the weight."""

    positions: Tensor

    def __init__(self, site: Site, positions: Tensor) -> None:
        super().__init__(site, None)
        self.shape = (site.out_features, site.in_features)
        self.register_buffer("positions", positions)
        self.values = nn.Parameter(torch.zeros(positions.shape, dtype=site.dtype))

    def dense(self) -> Tensor:
        """The delta, [out, in], with a gradient for the values only."""
        zeros = self.values.new_zeros(self.shape[0] * self.shape[1])
        return zeros.index_put((self.positions.long(),), self.values).view(self.shape)

    def forward(self, z: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return F.linear(z, self.dense())

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``W + delta``."""
        return weight + self.dense(), bias


class SparseTuner(Tuner):
    """Common part of the sparse methods: chooses as PaFi does until told otherwise."""

    _chosen: dict[str, Tensor]
    """Positions for the branches that are being made."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        object.__setattr__(self, "_chosen", {})
        super().__init__(*args, **kwargs)

    def make_branch(self, site: Site, config: SparseConfig, adapter: str) -> Branch:
        """Entries by module come from the stored configuration, or are chosen now for all."""
        if config.kept is None:
            self._chosen = self._smallest(config)
            config.kept = {name: len(positions) for name, positions in self._chosen.items()}
        if site.name not in config.kept:
            raise AdapterError(f"{self.name}: the stored choice does not mention {site.name}")
        unset = torch.zeros(config.kept[site.name], dtype=torch.int32)  # until they are loaded
        return SparseDelta(site, self._chosen.pop(site.name, unset))

    def _smallest(self, config: SparseConfig) -> dict[str, Tensor]:
        sites = {}
        for name, module in plain_modules(self.model).items():
            site = Site.of(name, module)
            if site is not None and self._check_target_module_exists(config, name):
                sites[name] = site
        total = sum(site.in_features * site.out_features for site in sites.values())
        count = _wanted(config, total)
        if any(site.device.type == "meta" for site in sites.values()):  # only the count matters
            first, *others = sites
            return {first: torch.zeros(count, dtype=torch.int32)} | {
                name: torch.zeros(0, dtype=torch.int32) for name in others
            }
        return top({name: -site.weight.abs() for name, site in sites.items()}, count)


def top(scores: Scores, count: int) -> dict[str, Tensor]:
    """Flat positions (ascending, int32) of the ``count`` largest scores over all modules."""
    flat = torch.cat([score.reshape(-1).float().cpu() for score in scores.values()])
    # A stable descending sort keeps the order among equals, and so prefers lower indices.
    order = torch.sort(flat, descending=True, stable=True).indices[:count]
    chosen = {}
    start = 0
    for name, score in scores.items():
        stop = start + score.numel()
        own = order[(order >= start) & (order < stop)] - start
        chosen[name] = own.sort().values.to(torch.int32)
        start = stop
    return chosen


def choose(model: nn.Module, scores: Scores, adapter: str = "default") -> None:
    """Train the entries with the largest scores from now on; what was trained before is lost.

    Raises :class:`AdapterError`, and changes nothing, if a module has no scores, or if they are not
    finite or zero everywhere.
    """
    layers = sparse_layers(model, adapter)
    for name, layer in layers.items():
        shape = (layer.site.out_features, layer.site.in_features)
        if name not in scores or tuple(scores[name].shape) != shape:
            given = list(scores[name].shape) if name in scores else "none"
            raise AdapterError(f"the scores of {name} are {given}, not {list(shape)}")
        if not torch.isfinite(scores[name]).all():
            raise AdapterError(f"the scores of {name} have NaN or infinite entries")
    if not any(bool(scores[name].any()) for name in layers):
        raise AdapterError("all scores are zero, so nothing can be chosen; are all labels masked?")
    config: Any = getattr(model, "peft_config", {})[adapter]
    count = sum(config.kept.values())
    chosen = top({name: scores[name] for name in layers}, count)
    config.kept = {name: len(positions) for name, positions in chosen.items()}
    for name, layer in layers.items():
        trained = any(p.requires_grad for p in layer.branches[adapter].parameters())
        layer.add(adapter, SparseDelta(layer.site, chosen[name]).requires_grad_(trained))


def fisher_information(
    model: nn.Module, losses: Iterable[Callable[[], Tensor]], adapter: str = "default"
) -> dict[str, Tensor]:
    """Mean squared gradient of each targeted weight, without the adapter.

    ``losses`` are functions that run ``model`` on one sample each and return its negative
    log-likelihood; the paper uses 1024 samples. With the data's labels this is the empirical
    Fisher information; draw the labels from the model for the true one.
    """
    sums: dict[str, Tensor] = {}
    samples = 0
    with _base_weights_trainable(model, adapter) as layers:
        for loss in losses:
            loss().backward()
            samples += 1
            for name, layer in layers.items():
                weight: Any = layer.get_base_layer().weight
                if weight.grad is None:
                    raise AdapterError(f"no gradient for {name}; does the loss depend on it?")
                gradient = weight.grad.T if layer.site.transposed else weight.grad
                squared = gradient.float().square()
                sums[name] = sums[name] + squared if name in sums else squared
                weight.grad = None
    if not samples:
        raise AdapterError("Fisher information needs at least one sample; none was given")
    return {name: total / samples for name, total in sums.items()}


def movement(
    model: nn.Module, tune: Callable[[], None], adapter: str = "default"
) -> dict[str, Tensor]:
    """How far full fine-tuning moves each targeted weight, which is then put back.

    ``tune`` trains the model's trainable parameters; during it those are the targeted weights of
    the base, and the adapter is off.
    """
    with _base_weights_trainable(model, adapter) as layers:
        before = {name: layer.site.weight.clone() for name, layer in layers.items()}
        try:
            tune()
            return {
                name: (layer.site.weight - before[name]).abs() for name, layer in layers.items()
            }
        finally:
            for name, layer in layers.items():
                layer.site.weight.copy_(before[name])


def sparse_layers(model: nn.Module, adapter: str) -> dict[str, AdaptedLayer]:
    """The adapted layers of a sparse adapter by module name."""
    layers = {
        layer.site.name: layer
        for layer in model.modules()
        if isinstance(layer, AdaptedLayer)
        and adapter in layer.branches
        and isinstance(layer.branches[adapter], SparseDelta)
    }
    if not layers:
        raise AdapterError(f"the model has no sparse adapter {adapter!r}")
    return layers


class _base_weights_trainable:  # noqa: N801
    """The targeted weights take gradients, nothing else does, and the adapter is off."""

    def __init__(self, model: nn.Module, adapter: str) -> None:
        self._layers = sparse_layers(model, adapter)
        self._model = model
        self._flags = [(p, p.requires_grad) for p in model.parameters()]
        self._training = model.training

    def __enter__(self) -> dict[str, AdaptedLayer]:
        self._model.eval().requires_grad_(False)
        for layer in self._layers.values():
            layer._disable_adapters = True
            layer.get_base_layer().weight.requires_grad_(True)
        return self._layers

    def __exit__(self, *_: object) -> None:
        for layer in self._layers.values():
            layer._disable_adapters = False
            layer.get_base_layer().weight.grad = None
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        self._model.train(self._training)


def _wanted(config: SparseConfig, total: int) -> int:
    count = config.weights if config.weights is not None else max(1, round(config.share * total))
    if count > total:
        raise AdapterError(
            f"{config.method}: weights={count:,} is more than the {total:,} targeted ones"
        )
    return count


def _info(name: str, summary: str, paper: str, config: type[SparseConfig]) -> MethodInfo:
    return MethodInfo(
        name=name,
        summary=summary,
        family="selective",
        leaf="unstructured",
        paper=paper,
        config=config,
        source="anabranch",
        size=Size("weights"),
        mixed_batch=True,
    )


class FishMaskTuner(SparseTuner):
    """Trains the weights with the largest Fisher information."""

    info = _info(
        "fishmask",
        "Trains the k weights with the largest Fisher information.",
        "FISH mask (Sung et al. 2021), arXiv:2111.09839",
        FishMaskConfig,
    )
    branch = SparseDelta


class PaFiTuner(SparseTuner):
    """Trains the smallest weights."""

    info = _info(
        "pafi",
        "Trains the k weights of the smallest magnitude; needs no data to choose.",
        "PaFi (Liao et al. 2023), arXiv:2305.16742",
        PaFiConfig,
    )
    branch = SparseDelta


class LTSFTTuner(SparseTuner):
    """Trains the weights that full fine-tuning moves most."""

    info = _info(
        "lt_sft",
        "Trains the k weights that full fine-tuning moved most, from their old values.",
        "LT-SFT (Ansell et al. 2022), arXiv:2110.07560",
        LTSFTConfig,
    )
    branch = SparseDelta


for _tuner in (FishMaskTuner, PaFiTuner, LTSFTTuner):
    _tuner.enlist()
