"""Putting an adapter on a network."""

from __future__ import annotations

import functools
import inspect
import typing
import warnings
from collections.abc import Mapping
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from torch import nn
from transformers.pytorch_utils import Conv1D

from anabranch.adapters.catalogue import method
from anabranch.adapters.errors import AdapterError
from anabranch.adapters.info import MethodInfo
from anabranch.adapters.rollback import unchanged_on_error
from anabranch.adapters.targets import matching, plain_modules, resolve_targets
from anabranch.errors import did_you_mean


def build(name: str, model: nn.Module, adapter: str = "default", **options: Any) -> PeftModel:
    """Put a new adapter of a method on a model, which is changed in place and frozen.

    ``model`` is a network, or a :class:`PeftModel` that gets one more adapter of the same method
    (not active until ``set_adapter``). ``target_modules`` may name presets, see :mod:`.targets`.
    The other options are those of the method's configuration class, see ``MethodInfo.options``.

    Raises :class:`UnknownName` for the method and :class:`AdapterError` for its options before the
    model is touched. If the method itself fails, the model is put back as it was.
    """
    info = method(name)
    config = configure(info, model, options)
    if isinstance(model, PeftModel):
        if adapter in model.peft_config:
            raise AdapterError(f"the model already has an adapter named {adapter!r}")
    elif any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise AdapterError(
            "the model already has adapters but is no PeftModel; pass the PeftModel that build "
            "returned to add another adapter"
        )
    return attach(model, config, adapter, name)


def attach(model: nn.Module, config: Any, adapter: str, name: str) -> PeftModel:
    """Wrap the model by a configuration, or add to its adapters; undone if that fails."""
    with unchanged_on_error(model), warnings.catch_warnings():
        # An adapter may be called like its method.
        warnings.filterwarnings("ignore", message="Adapter name '.*' should not be contained")
        # PEFT 0.21 asks transformers 5.23 by the attribute's former name.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        try:
            if isinstance(model, PeftModel):
                model.add_adapter(adapter, config)
                return model
            adapted = get_peft_model(model, config, adapter_name=adapter)
        except AdapterError:
            raise
        except Exception as error:  # PEFT's methods raise what they happen to run into
            raise AdapterError(f"{name} cannot be built on this model: {_line(error)}") from error
        if not config.inference_mode and not any(p.requires_grad for p in adapted.parameters()):
            raise AdapterError(f"{name} would train nothing on this model")
        return adapted


def configure(info: MethodInfo, model: nn.Module, options: Mapping[str, Any]) -> Any:
    """The configuration of a method for a model, checked; nothing is changed."""
    known = info.options()
    for option in options:
        if option not in known:
            raise AdapterError(
                f"{info.name} has no option {option!r}{did_you_mean(option, known)}; "
                f"it has {', '.join(sorted(known))}"
            )
    values = {**info.defaults, **options}
    if "target_modules" in known:
        targets = values.get("target_modules", info.targets)
        if targets is not None:
            values["target_modules"] = resolve_targets(model, targets)
            _check_layers(info, model, values["target_modules"])
    _check_types(info, values)
    generates = hasattr(model, "prepare_inputs_for_generation")
    try:
        return info.config(task_type="CAUSAL_LM" if generates else None, **values)
    except AdapterError:
        raise
    except (ValueError, TypeError, AttributeError) as error:
        raise AdapterError(f"{info.name}: {_line(error)}") from error


def _check_layers(info: MethodInfo, model: nn.Module, targets: list[str]) -> None:
    modules = plain_modules(model)
    for name in matching(model, targets):
        if isinstance(modules[name], Conv1D) and not info.conv1d:
            raise AdapterError(
                f"{info.name} cannot adapt {name}, a Conv1D, which stores its weight transposed; "
                f"it adapts nn.Linear only"
            )


def _check_types(info: MethodInfo, values: Mapping[str, Any]) -> None:
    """Compare values with the annotations of the configuration class, which PEFT does not do."""
    for option, value in values.items():
        annotation, checker = _checker(info.config, option)  # type: ignore[arg-type]
        try:
            checker.validate_python(value)
        except ValidationError as error:
            raise AdapterError(
                f"{info.name}: {option}={value!r} is not a value of type "
                f"{annotation.replace('typing.', '')}: {error.errors()[0]['msg']}"
            ) from None


@functools.cache
def _checker(config: type[PeftConfig], option: str) -> tuple[str, TypeAdapter[Any]]:
    hint = typing.get_type_hints(config)[option]
    name = inspect.formatannotation(hint)
    try:
        return name, TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # a dataclass brings its own settings
        return name, TypeAdapter(hint)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
