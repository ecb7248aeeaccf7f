"""GGUF to safetensors, through transformers' own converters."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from anabranch.errors import ModelCorrupt, ModelError, ModelUnsupported
from anabranch.models.gguf import GgufHeader
from anabranch.models.progress import Progress, within
from anabranch.models.quiet import quiet


def convert(header: GgufHeader, folder: Path, progress: Progress) -> None:
    """Write the model of a checked GGUF file to ``folder`` as a Hugging Face checkpoint.

    Raises :class:`ModelUnsupported` if transformers cannot convert this architecture and
    :class:`ModelCorrupt` if tensors that the network needs are not in the file.
    """
    needed = header.parameters * (4 if header.dtype == "float32" else 2) + (64 << 20)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelError(
            f"converting {header.path} needs {needed} bytes in {folder.parent.parent}, which has "
            f"{free} free; free some space, or set ANABRANCH_CACHE to another folder"
        )
    progress(f"reading {header.path.name}", 0.0)
    import torch
    import transformers

    try:
        with quiet(), _tensors_reported(within(progress, 0.6, 0.9)):
            network, tokenizer = _read(header, getattr(torch, header.dtype), progress)
            progress("writing safetensors", 0.9)
            network.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except (ModelError, OSError):
        raise
    except Exception as error:
        # The converters raise whatever the file makes them trip over.
        raise ModelUnsupported(
            f"{header.path}: transformers {transformers.__version__} cannot convert a GGUF file "
            f"of architecture {header.architecture!r}: {error}"
        ) from error


def _read(header: GgufHeader, dtype: Any, progress: Progress) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file: dict[str, Any] = {
        "pretrained_model_name_or_path": str(header.path.parent),
        "gguf_file": header.path.name,
        "local_files_only": True,
    }
    config = AutoConfig.from_pretrained(**file)
    progress("reading the tokenizer", 0.2)
    tokenizer = AutoTokenizer.from_pretrained(**file)
    tokenizer.model_max_length = header.context_length
    progress("reading the weights", 0.4)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        **file,
        config=config,
        dtype=dtype,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    network, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ModelCorrupt(
            f"{header.path} lacks {len(missing)} tensors that its architecture needs: "
            f"{', '.join(missing[:5])}"
        )
    return network, tokenizer


@contextlib.contextmanager
def _tensors_reported(progress: Progress) -> Iterator[None]:
    """Turn the converter's own terminal progress bar into progress reports.

    It has no setting for this; if a later version has no such bar, only detail is lost.
    """
    from transformers import modeling_gguf_pytorch_utils as converter

    def reported(tensors: Iterable[Any], **_: Any) -> Iterator[Any]:
        items = list(tensors)
        for done, tensor in enumerate(items):
            progress(f"dequantising tensor {done + 1} of {len(items)}", done / len(items))
            yield tensor

    before = getattr(converter, "tqdm", None)
    if before is None:
        yield
        return
    converter.tqdm = reported
    try:
        yield
    finally:
        converter.tqdm = before
