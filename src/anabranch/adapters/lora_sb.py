"""LoRA-SB: a trained r x r matrix between frozen factors (Ponkshe et al. 2024, section 3).

    y = W x + B R A x       B: [out, r], R: [r, r], A: [r, in]; only R is trained

B, R and A begin as the best rank-r approximation of the first step of full fine-tuning, so that
training R is the best that the subspace allows. Averaging R over clients is exact, because
``B mean(R) A = mean(B R A)`` (Fed-SB).

Two steps: build the adapter (random orthonormal factors, R = 0), then give it the gradients::

    model = adapters.build("lora_sb", network, r=64)
    gradients = estimate_gradients(model, losses)     # losses: a few mini-batches
    initialise(model, gradients, learning_rate)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.adapters.base import AdaptedLayer, AdapterConfig, Branch, Site, Tuner
from anabranch.adapters.errors import AdapterError
from anabranch.adapters.info import MethodInfo, Size

SVD_SEED = 42
SVD_ITERATIONS = 10


@dataclass
class LoraSBConfig(AdapterConfig):
    """Options of LoRA-SB."""

    r: int = field(default=64, metadata={"help": "Rank; r * r weights are trained per module."})
    seed: int = field(
        default=0, metadata={"help": "Of the random factors used until `initialise` is called."}
    )
    method: ClassVar[str] = "lora_sb"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.r >= 1, f"r is at least 1, not {self.r}")


class BRA(Branch):
    """``B R A x`` with frozen B and A. R is an ``nn.Linear``, which Opacus can privatise."""

    def __init__(self, site: Site, config: LoraSBConfig) -> None:
        super().__init__(site, config)
        smaller = min(site.in_features, site.out_features)
        if config.r > smaller:
            raise AdapterError(
                f"lora_sb: r={config.r} is more than {site.name} allows, which is "
                f"{site.out_features} x {site.in_features}; at most {smaller}"
            )
        # Drawn per module and independently of the global generator, so that parties that build
        # the same adapter hold the same factors.
        key = int.from_bytes(hashlib.sha256(f"{config.seed}:{site.name}".encode()).digest()[:4])
        generator = torch.Generator().manual_seed(key)
        self.A: Tensor
        self.B: Tensor
        self.register_buffer(
            "A", _orthonormal(site.in_features, config.r, generator).T.contiguous()
        )
        self.register_buffer("B", _orthonormal(site.out_features, config.r, generator))
        self.R = nn.Linear(config.r, config.r, bias=False)
        nn.init.zeros_(self.R.weight)

    def forward(self, z: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return F.linear(self.R(F.linear(z, self.A)), self.B)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``W + B R A``."""
        return weight + self.B @ self.R.weight @ self.A, bias


class LoraSBTuner(Tuner):
    """Low rank with frozen factors and a trained core: r^2 weights a module."""

    branch = BRA
    info = MethodInfo(
        name="lora_sb",
        summary="Trains an r x r matrix between factors taken from the first full gradient.",
        family="reparameterised",
        leaf="low rank",
        paper="LoRA-SB (Ponkshe et al. 2024), arXiv:2411.19557",
        config=LoraSBConfig,
        source="anabranch",
        size=Size("r"),
        mixed_batch=True,
        engine="batched",
    )


def estimate_gradients(
    model: nn.Module,
    losses: Iterable[Callable[[], Tensor]],
    adapter: str | None = None,
) -> dict[str, Tensor]:
    """Gradient of the summed losses by every adapted weight of the base, without the adapter.

    ``losses`` are functions that run ``model`` on one mini-batch each and return a scalar. A
    weight's gradient is added up on the CPU in float32 the moment it is formed, and never held on
    the device with the others. Keys are module names, values [out, in].

    Raises :class:`AdapterError` if a weight has no gradient, an all-zero one or one with NaN.
    """
    sums = base_gradients(model, losses, adapter)
    for name in _layers(model, adapter):
        require_subspace(name, sums.get(name))
    return sums


def base_gradients(
    model: nn.Module,
    losses: Iterable[Callable[[], Tensor]],
    adapter: str | None = None,
) -> dict[str, Tensor]:
    """:func:`estimate_gradients` as they are, for parties that add theirs up before they look."""
    layers = _layers(model, adapter)
    sums: dict[str, Tensor] = {}
    handles = []
    for name, layer in layers.items():
        weight: Any = layer.get_base_layer().weight
        weight.requires_grad_(True)
        handles.append(
            weight.register_post_accumulate_grad_hook(_collector(sums, name, layer.site))
        )
    training = model.training
    model.eval()
    try:
        for layer in layers.values():
            layer._disable_adapters = True
        for loss in losses:
            loss().backward()
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers.values():
            layer._disable_adapters = False
            layer.get_base_layer().weight.requires_grad_(False)
        model.train(training)
    return sums


def initialise(
    model: nn.Module,
    gradients: Mapping[str, Tensor],
    learning_rate: float,
    adapter: str | None = None,
) -> None:
    """Set B, R and A to the best rank-r form of one Adam step, ``-learning_rate * sign(G)``.

    ``learning_rate`` is the effective one of the first steps: ``lr / (warmup_ratio * steps)`` in
    the paper's recipes. Raises :class:`AdapterError` before anything is changed if a gradient is
    missing or unusable.
    """
    layers = _layers(model, adapter)
    for name, layer in layers.items():
        gradient = gradients.get(name)
        require_subspace(name, gradient)
        assert gradient is not None
        wanted = (layer.site.out_features, layer.site.in_features)
        if tuple(gradient.shape) != wanted:
            raise AdapterError(
                f"lora_sb: the gradient for {name} is {list(gradient.shape)}, not {list(wanted)}"
            )
    for name, layer in layers.items():
        branch = layer.branches[_name(layer, adapter)]
        assert isinstance(branch, BRA)
        b, core, a = first_step(gradients[name], branch.R.in_features, learning_rate)
        with torch.no_grad():
            branch.B.copy_(b)
            branch.R.weight.copy_(core)
            branch.A.copy_(a)


def first_step(gradient: Tensor, rank: int, learning_rate: float) -> tuple[Tensor, Tensor, Tensor]:
    """B [out, r], R [r, r] and A [r, in] of the best rank-r form of ``-learning_rate * sign(G)``.

    Directions are ordered by how much of the step they carry.
    """
    u, s, v = _svd(-learning_rate * torch.sign(gradient.float()), rank)
    return u.contiguous(), torch.diag(s), v.T.contiguous()


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``[out, r]`` and ``[r, in]`` whose product is the best rank-r form of a matrix."""
    u, s, v = _svd(matrix.float(), min(rank, *matrix.shape))
    return (u * s).contiguous(), v.T.contiguous()


@dataclass(frozen=True)
class Place:
    """Where an adapted module's parts are in the model, as names of parameters and buffers.

    ``site`` is the module's name in the base, ``shape`` its weight's [out, in].
    """

    site: str
    shape: tuple[int, int]
    core: str
    a: str
    b: str


def places(model: nn.Module, adapter: str | None = None) -> list[Place]:
    """Every adapted module, in the order of names."""
    wanted = {id(layer) for layer in _layers(model, adapter).values()}
    found = []
    for name, layer in model.named_modules():
        if id(layer) in wanted:
            assert isinstance(layer, AdaptedLayer)
            site = layer.site
            stem = f"{name}.{layer._container}.{_name(layer, adapter)}".removeprefix(".")
            shape = site.out_features, site.in_features
            found.append(Place(site.name, shape, f"{stem}.R.weight", f"{stem}.A", f"{stem}.B"))
    return sorted(found, key=lambda place: place.site)


def factors(model: nn.Module, adapter: str | None = None) -> dict[str, Tensor]:
    """Copies of all A and B, by their names as buffers."""
    buffers = dict(model.named_buffers())
    names = [name for place in places(model, adapter) for name in (place.a, place.b)]
    return {name: buffers[name].detach().clone() for name in names}


def fingerprint(model: nn.Module, adapter: str | None = None) -> str:
    """A hash of the frozen factors: parties may average R only if theirs agree."""
    digest = hashlib.sha256()
    for name, layer in _layers(model, adapter).items():
        branch: Any = layer.branches[_name(layer, adapter)]
        for factor in (branch.A, branch.B):
            digest.update(name.encode())
            digest.update(factor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _layers(model: nn.Module, adapter: str | None) -> dict[str, AdaptedLayer]:
    layers = {
        layer.site.name: layer
        for layer in model.modules()
        if isinstance(layer, AdaptedLayer)
        and isinstance(next(iter(layer.branches.values()), None), BRA)
        and _name(layer, adapter) in layer.branches
    }
    if not layers:
        raise AdapterError(f"the model has no lora_sb adapter{f' {adapter!r}' if adapter else ''}")
    return layers


def _name(layer: AdaptedLayer, adapter: str | None) -> str:
    return adapter if adapter is not None else layer.active_adapters[0]


def _collector(sums: dict[str, Tensor], name: str, site: Site) -> Callable[[Tensor], None]:
    def collect(weight: Tensor) -> None:
        assert weight.grad is not None
        gradient = weight.grad.detach()
        if site.transposed:
            gradient = gradient.T
        gradient = gradient.to("cpu", torch.float32)
        sums[name] = sums[name] + gradient if name in sums else gradient.clone()
        weight.grad = None

    return collect


def require_subspace(name: str, gradient: Tensor | None) -> None:
    """Raise :class:`AdapterError` unless a first step can be taken along this gradient."""
    if gradient is None:
        raise AdapterError(f"lora_sb: no gradient for {name}; does the loss depend on it?")
    if not torch.isfinite(gradient).all():
        raise AdapterError(f"lora_sb: the gradient for {name} has NaN or infinite entries")
    if not gradient.any():
        raise AdapterError(
            f"lora_sb: the gradient for {name} is zero everywhere, and a zero update spans no "
            "subspace; are all labels masked?"
        )


def _svd(update: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Truncated, in float32: exact if that is cheap, else from a fixed random range."""
    if min(update.shape) <= 4 * rank:
        u, s, vh = torch.linalg.svd(update, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank].T
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SVD_SEED)
        return torch.svd_lowrank(update, q=rank, niter=SVD_ITERATIONS)


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    if torch.get_default_device().type == "meta":  # only shapes are wanted
        return torch.empty(rows, columns)
    drawn = torch.randn(rows, columns, generator=generator, device=generator.device)
    return torch.linalg.qr(drawn).Q


LoraSBTuner.enlist()
