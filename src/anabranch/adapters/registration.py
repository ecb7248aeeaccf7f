"""Makes a method of ours a method of PEFT.

PEFT accepts only names that its ``PeftType`` enum already has, so the enum is extended first. From
then on everything of PEFT's works for it: ``get_peft_model``, ``PeftModel.from_pretrained``,
several named adapters, safetensors checkpoints. A checkpoint of ours can be loaded with plain PEFT
after ``import anabranch.adapters``. Checked with peft 0.21.2.
"""

from __future__ import annotations

from typing import TypeVar

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method

from anabranch.errors import ConfigurationError

T = TypeVar("T", bound=type[BaseTuner])


def register(name: str, config: type[PeftConfig], tuner: T, prefix: str) -> T:
    """Make ``get_peft_model`` know a method, and return its tuner. A second call does nothing.

    ``name`` is lower case. ``prefix`` begins the name of whatever a layer stores for the method.
    Raises :class:`ConfigurationError` if another method has the name.
    """
    member = peft_type(name)
    known = PEFT_TYPE_TO_TUNER_MAPPING.get(member)
    if known is tuner:
        return tuner
    if known is not None:
        raise ConfigurationError(
            f"the adapter method {name!r} is already registered by {known.__module__}; "
            f"give {tuner.__module__}.{tuner.__qualname__} another name"
        )
    tuner.prefix = prefix
    register_peft_method(name=name, config_cls=config, model_cls=tuner, prefix=prefix)
    return tuner


def peft_type(name: str) -> PeftType:
    """The member of PEFT's enum for a method's name, created if PEFT does not have it."""
    value = name.upper()
    if value in PeftType.__members__:
        return PeftType[value]
    member = str.__new__(PeftType, value)
    member._name_ = value
    member._value_ = value
    # The same bookkeeping that EnumType does for members written in the class body.
    PeftType._member_map_[value] = member
    PeftType._member_names_.append(value)
    PeftType._value2member_map_[value] = member
    type.__setattr__(PeftType, value, member)
    return member
