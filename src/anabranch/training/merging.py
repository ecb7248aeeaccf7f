"""A stored adapter folded into its base: a new model in the cache, under a name of its own."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, cast

from anabranch import adapters, models
from anabranch.errors import ConfigurationError
from anabranch.models import cache
from anabranch.models.progress import Progress, silent
from anabranch.training import deploy


def merge_into_base(base: str, adapter: Path, name: str, progress: Progress = silent) -> Path:
    """Write the base with the adapter in its weights to the cache as ``name``; returns the folder.

    It is computed in float32 and stored in the base's number format, whole or not at all; a second
    call with the same base and adapter finds it there. Raises :class:`ConfigurationError` for a
    name or folder that cannot be used, :class:`~anabranch.adapters.AdapterMismatch` for an adapter
    of another base, and :class:`~anabranch.adapters.NotMergeable` for one with no equivalent in
    the base's weights.
    """
    deploy.require_mergeable(adapter, name)
    card = models.card(base)
    run = _identity(card.fingerprint, adapter)
    if (taken := deploy.taken_by(name, run)) is not None:
        raise ConfigurationError(f"{name!r} is taken by {taken}; choose another name, or remove it")
    if (made := cache.Entry(cache.slug(name)).path).exists():
        return made
    loaded = models.load(base, dtype="float32", progress=progress)
    network = loaded.network
    progress("merging", 0.4)
    wanted = set(network.state_dict())
    merged = cast(Any, adapters.merge(adapters.load(network, adapter)))
    if added := sorted(merged.state_dict().keys() - wanted):
        raise adapters.NotMergeable(
            f"the merged network has {added[0]}, which {base} has no place for on disk; serve the "
            f"adapter beside its base instead"
        )
    progress("writing the model", 0.6)
    facts = {
        "kind": "model",
        "name": name,
        "run": run,
        "base": {"name": loaded.name, "fingerprint": card.fingerprint},
        "licence": card.licence,
    }
    text = f"# {name}\n\n{loaded.name} with an adapter in its weights. Licence: {card.licence}\n"
    provenance = f"{loaded.name} merged with the adapter {run[:16]}"
    folder = deploy.publish_model(
        name, merged, loaded.tokenizer, card, provenance, text, facts, monitor={}
    )
    progress(f"anabranch up --model {name} serves it", 1.0)
    return folder


def _identity(base: str, adapter: Path) -> str:
    """What the result is made of, in 32 hexadecimal digits."""
    digests = [
        cache.file_sha256(adapter / file)
        for file in (deploy.ADAPTER_CONFIG, deploy.ADAPTER_WEIGHTS)
    ]
    return hashlib.sha256("/".join([base, *digests]).encode()).hexdigest()[:32]
