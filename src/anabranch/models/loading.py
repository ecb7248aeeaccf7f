"""``load``: a name becomes a network in memory with everything needed to talk to it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anabranch.errors import ConfigurationError, ModelCorrupt, ModelUnsupported
from anabranch.models.architectures import require_causal
from anabranch.models.card import ModelCard
from anabranch.models.library import ready
from anabranch.models.progress import Progress, silent
from anabranch.models.quiet import quiet

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("anabranch.models")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LoadedModel:
    """A base model in memory.

    ``network`` is in evaluation mode and takes no gradients. ``generation`` has the end tokens.
    ``card`` describes the model as stored; ``network.dtype`` may differ if another was asked for.
    ``path`` is the folder that it was loaded from.
    """

    name: str
    card: ModelCard
    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    generation: GenerationConfig
    path: Path


def load(
    name: str,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load a language model by name: packaged, folder, GGUF file, cached, or hub id.

    The first load of a GGUF file converts it (about 20 s for 135M parameters), the first load of a
    hub id downloads it; both report to ``progress``. ``dtype`` None keeps the stored type.
    ``device`` None is the CPU.

    Raises :class:`ModelNotFound`, :class:`ModelCorrupt` or :class:`ModelUnsupported` (see
    ``errors``), and :class:`ConfigurationError` for an impossible dtype or device.
    """
    wanted_dtype, wanted_device = _dtype(dtype), _device(device)
    progress = progress or silent
    with ready(name, progress) as model:
        folder = model.contents.folder
        require_causal(model.contents.config, folder)
        progress(f"loading {model.card.name}", None)
        with quiet():
            tokenizer = read_tokenizer(folder)
            network = _network(folder, wanted_dtype or _dtype(model.card.dtype), wanted_device)
    if len(tokenizer) > network.config.get_text_config().vocab_size:
        log.warning(
            "%s: the tokenizer knows %d tokens, the network only %d; texts that contain the others "
            "cannot be run",
            model.card.name,
            len(tokenizer),
            network.config.get_text_config().vocab_size,
        )
    generation = network.generation_config
    if generation.eos_token_id is None:
        generation.eos_token_id = tokenizer.eos_token_id
    return LoadedModel(model.card.name, model.card, network, tokenizer, generation, folder)


def read_tokenizer(folder: Path) -> Any:
    """A folder's tokenizer; :class:`ModelCorrupt` if its files cannot be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # The tokenizers library raises plain Exception for a broken file.
        raise ModelCorrupt(f"{folder}: its tokenizer cannot be read: {_line(error)}") from error


def require_complete(info: dict[str, Any], folder: Path, ignored: str = "") -> None:
    """Raise :class:`ModelCorrupt` if tensors of the network were not in the files.

    transformers would leave them random. ``ignored``: prefix of tensors that are never used.
    """
    missing = sorted(k for k in info["missing_keys"] if not (ignored and k.startswith(ignored)))
    if missing:
        raise ModelCorrupt(
            f"{folder} lacks {len(missing)} tensors that its config.json asks for: "
            f"{', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}"
        )


def _network(folder: Path, dtype: torch.dtype | None, device: torch.device | None) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or "auto",
            device_map={"": device} if device is not None else None,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except RuntimeError as error:
        if "size mismatch" in str(error) or "mismatch" in str(error):
            raise ModelCorrupt(
                f"{folder}: the shapes in the weights are not those of config.json: {_line(error)}"
            ) from error
        raise
    except (ValueError, TypeError, KeyError, ImportError, AttributeError) as error:
        raise ModelUnsupported(f"{folder} cannot be built: {_line(error)}") from error
    network, info = loaded
    require_complete(info, folder)
    return network.eval().requires_grad_(False)


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    import torch

    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ConfigurationError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    found: torch.dtype = getattr(torch, dtype)
    return found


def _device(device: str | torch.device | None) -> torch.device | None:
    import torch

    if device is None:
        return None
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(f"device {device!r} cannot be used: {_line(error)}") from error


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
