"""What every method of ours shares with PEFT, once: a method is a :class:`Branch` and its options.

A branch is one adapter on one module. It has its parameters and acts in one place:

    input       W(b(x))          changes what goes into the module
    parallel    W(x) + b(x)      is added to what comes out
    output      b(W(x))          changes what comes out

With several active adapters on a module, the input branches are applied in the order of
activation, then the module together with the sum of the parallel ones, which see the changed
input, then the output branches in order. ``adapter_names=[...]`` chooses a branch for each row.

A branch computes in float32 if the base is in 16 or fewer bits, and its result is cast back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from anabranch.adapters.errors import AdapterError, NotMergeable
from anabranch.adapters.info import MethodInfo
from anabranch.adapters.registration import peft_type, register
from anabranch.adapters.targets import is_linear, is_norm, plain_modules, resolve_targets

Place = Literal["input", "parallel", "output"]
Kind = Literal["linear", "norm"]
BASE = "__base__"
"""The name that selects no adapter for a row, as in PEFT."""


@dataclass
class AdapterConfig(PeftConfig):
    """Options that all methods of ours have. Subclasses check their own in ``__post_init__``."""

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or presets of the modules to adapt."}
    )
    exclude_modules: list[str] | None = field(
        default=None, metadata={"help": "Names that are not adapted although targeted."}
    )
    layers_to_transform: list[int] | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt; None: all."}
    )
    method: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type(self.method)
        self.target_parameters = None
        if isinstance(self.target_modules, list):
            # What PEFT expects of a list of names.
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]

    def require(self, condition: bool, message: str) -> None:
        """Raise :class:`AdapterError` naming the method unless the condition holds."""
        if not condition:
            raise AdapterError(f"{self.method}: {message}")


@dataclass(frozen=True)
class Site:
    """A module of the base that is to be adapted.

    ``name`` is its path. A norm has the same width on both sides.
    """

    name: str
    module: nn.Module
    kind: Kind
    in_features: int
    out_features: int

    @classmethod
    def of(cls, name: str, module: nn.Module) -> Site | None:
        """The site of a module, or None if it is of no kind that a branch understands."""
        known: Any = module  # quantised modules have in_features, too
        if isinstance(module, Conv1D):
            return cls(name, module, "linear", *module.weight.shape)
        if is_linear(module):
            return cls(name, module, "linear", int(known.in_features), int(known.out_features))
        if is_norm(module):
            return cls(name, module, "norm", *2 * known.weight.shape)
        return None

    @property
    def weight(self) -> Tensor:
        """The weight: [out_features, in_features] of a linear module, [features] of a norm."""
        weight = getattr(self.module, "weight", None)
        if weight is None or not weight.is_floating_point():
            raise NotMergeable(
                f"{self.name} ({type(self.module).__name__}) has no plain weight to work with"
            )
        return weight.data.T if self.transposed else weight.data

    @property
    def transposed(self) -> bool:
        """Whether the module stores [in_features, out_features]."""
        return isinstance(self.module, Conv1D)

    @property
    def dtype(self) -> torch.dtype:
        """In which a branch computes: the base's, but at least float32."""
        weight = getattr(self.module, "weight", None)
        if weight is None or not weight.is_floating_point():
            return torch.float32
        return torch.promote_types(weight.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        """Where the module lives."""
        tensors = (*self.module.parameters(), *self.module.buffers())
        return tensors[0].device if tensors else torch.device("cpu")


class Branch(nn.Module, ABC):
    """One adapter on one module: override :meth:`forward`, and :meth:`fold` if it can be merged.

    Trainable tensors are parameters, frozen ones buffers; both are saved.
    """

    place: Place = "parallel"
    kinds: ClassVar[tuple[Kind, ...]] = ("linear",)

    def __init__(self, site: Site, config: Any) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, z: Tensor) -> Tensor:
        """[..., features of the place] -> the same for input and output, out_features else."""

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight and bias of a module that does what the given ones and this branch do."""
        raise NotMergeable(f"{type(self).__name__} cannot be expressed as a weight")


class AdaptedLayer(nn.Module, BaseTunerLayer):
    """A module of the base with the branches of its adapters. Built by :class:`Tuner`."""

    def __init__(self, site: Site, container: str, active: Sequence[str]) -> None:
        super().__init__()
        self.base_layer = site.module
        self.site = site
        self.adapter_layer_names = (container,)
        self._container = container
        setattr(self, container, nn.ModuleDict())
        self._active_adapter = list(active)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._unmerged: tuple[Tensor, Tensor | None] | None = None
        self._rows: Sequence[str] | None = None

    @property
    def branches(self) -> nn.ModuleDict:
        """Branch by adapter name."""
        return getattr(self, self._container)

    def add(self, adapter: str, branch: Branch) -> None:
        """Hold a branch for one more adapter."""
        on_meta = any(tensor.is_meta for tensor in branch.state_dict().values())
        if not on_meta or self.site.device.type == "meta":
            branch.to(device=self.site.device, dtype=self.site.dtype)
        self.branches[adapter] = branch

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The module's output with the active adapters, or those chosen for each row."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        if self._rows is not None:
            return self._forward_rows(x, self._rows, *args, **kwargs)
        branches = [self.branches[name] for name in self._present(self.active_adapters)]
        for branch in branches:
            if branch.place == "input":
                x = self._run(branch, x)
        y = self.base_layer(x, *args, **kwargs)
        for branch in branches:
            if branch.place == "parallel":
                y = y + self._run(branch, x).to(y.dtype)
        for branch in branches:
            if branch.place == "output":
                y = self._run(branch, y)
        return y

    def _forward_rows(self, x: Tensor, rows: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        if len(rows) != len(x):
            raise AdapterError(
                f"adapter_names has {len(rows)} names, but {self.site.name} sees {len(x)} rows"
            )
        chosen = [
            (self.branches[name], [row for row, own in enumerate(rows) if own == name])
            for name in self._present(dict.fromkeys(rows))
        ]
        for branch, own in chosen:
            if branch.place == "input":
                x = x.index_put((torch.tensor(own, device=x.device),), self._run(branch, x[own]))
        y = self.base_layer(x, *args, **kwargs)
        for branch, own in chosen:
            if branch.place == "parallel":
                y[own] = y[own] + self._run(branch, x[own]).to(y.dtype)
            elif branch.place == "output":
                y[own] = self._run(branch, y[own])
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put adapters into the module's weight. The old one is kept, so that unmerging is exact.

        Raises :class:`NotMergeable` if a branch has no equivalent weight, ValueError if the result
        would not be finite (always checked, whatever ``safe_merge``).
        """
        names = self._present(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        base: Any = self.get_base_layer()
        before = self._unmerged or (
            self.site.weight,
            base.bias.data if _has_bias(base) else None,
        )
        merged = [*self.merged_adapters, *names]
        weight, bias = self._fold([self.branches[name] for name in merged], *before)
        if not (torch.isfinite(weight).all() and (bias is None or torch.isfinite(bias).all())):
            raise ValueError(f"merging {', '.join(names)} into {self.site.name} is not finite")
        self._set(weight, bias)
        self._unmerged = before
        self.merged_adapters = merged

    def unmerge(self) -> None:
        """Put the module's own weight back, bit for bit."""
        if self._unmerged is not None:
            self._set(*self._unmerged)
        self._unmerged = None
        self.merged_adapters = []

    def _fold(
        self, branches: list[Any], weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        # Inside out: parallel branches see what the input branches made, the first of which acts
        # first and so stands rightmost in the product.
        order = [b for b in branches if b.place == "parallel"]
        order += [b for b in reversed(branches) if b.place == "input"]
        order += [b for b in branches if b.place == "output"]
        stored = weight.dtype
        weight, bias = (
            weight.to(self.site.dtype),
            None if bias is None else bias.to(self.site.dtype),
        )
        with torch.no_grad():
            for branch in order:
                weight, bias = branch.fold(weight, bias)
        return weight.to(stored), None if bias is None else bias.to(stored)

    def _set(self, weight: Tensor, bias: Tensor | None) -> None:
        base: Any = self.get_base_layer()
        base.weight.data = weight.T if self.site.transposed else weight
        if bias is None and _has_bias(base):
            base.bias = None
        elif bias is not None and _has_bias(base):
            base.bias.data = bias
        elif bias is not None:
            base.bias = nn.Parameter(bias, requires_grad=False)

    def _run(self, branch: nn.Module, z: Tensor) -> Tensor:
        return branch(z.to(self.site.dtype)).to(z.dtype)

    def _present(self, names: Any) -> list[str]:
        return [name for name in names if name in self.branches]


class Tuner(BaseTuner):
    """A method: :attr:`info`, and the :attr:`branch` it puts on each target. Register with
    :meth:`enlist` at the end of its module, or from an entry point of group ``anabranch.adapters``.
    """

    name: ClassVar[str] = ""
    info: ClassVar[MethodInfo]
    branch: ClassVar[type[Branch]]
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    """Further names for the method with some options set."""

    tuner_layer_cls = AdaptedLayer
    target_module_mapping: dict[str, list[str]] = {}

    @classmethod
    def enlist(cls) -> None:
        """Make the method known to PEFT under the name in :attr:`info`."""
        cls.name = cls.info.name
        register(cls.name, cls.info.config, cls, prefix=f"anabn_{cls.name}_")

    @classmethod
    def merge_obstacle(cls, config: Any) -> str:
        """Why an adapter with this configuration cannot be merged, or an empty string."""
        return "" if cls.info.mergeable else cls.info.merge_note

    def make_branch(self, site: Site, config: Any, adapter: str) -> Branch:
        """The branch for one target. Override to give it more than its site and options."""
        return self.branch(site, config)

    @property
    def _container(self) -> str:
        return self.prefix + "branches"

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None:
            peft_config.target_modules = set(
                resolve_targets(self.model, self.default_targets(peft_config))
            )
        self._check_sites(peft_config)
        return peft_config

    def default_targets(self, config: Any) -> str | Sequence[str]:
        """What is adapted if the configuration does not say."""
        assert self.info.targets is not None
        return self.info.targets

    def _check_sites(self, config: Any) -> None:
        for name, module in plain_modules(self.model).items():
            if not self._check_target_module_exists(config, name):
                continue
            site = Site.of(name, module)
            if site is None or site.kind not in self.branch.kinds:
                raise AdapterError(
                    f"{self.name} cannot adapt {name}, a {type(module).__name__}; "
                    f"it adapts {' and '.join(self.branch.kinds)} modules"
                )

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, AdaptedLayer):
            layer = target
        else:
            site = Site.of(current_key, target)
            assert site is not None, "checked in _check_sites"
            layer = AdaptedLayer(site, self._container, self.active_adapters)
        layer.add(adapter_name, self.make_branch(layer.site, peft_config, adapter_name))
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        container = cls.prefix + "branches"
        return key.replace(f".{container}.{adapter_name}.", f".{container}.")

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        rows = kwargs.get("adapter_names")
        if rows is None:
            yield
            return
        unknown = sorted(set(rows) - {BASE, *self.peft_config})
        if unknown:
            raise AdapterError(
                f"adapter_names: no adapter {', '.join(unknown)}; the model has "
                f"{', '.join(sorted(self.peft_config))}, and {BASE} for none"
            )
        if self.training:
            raise AdapterError("adapter_names is for inference; call eval() first")
        layers = [layer for layer in self.modules() if isinstance(layer, AdaptedLayer)]
        if any(layer.merged for layer in layers):
            raise AdapterError(
                "adapter_names needs separate adapters; call unmerge_adapter() first"
            )
        beams = kwargs.get("num_beams") or 1
        for layer in layers:
            layer._rows = [name for name in rows for _ in range(beams)]
        try:
            yield
        finally:
            for layer in layers:
                layer._rows = None


def _has_bias(module: nn.Module) -> bool:
    return getattr(module, "bias", None) is not None
