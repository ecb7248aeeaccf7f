"""A site's job over a network: the coordinator's recipe, on rows that stay here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anabranch.errors import AnabranchError, ConfigurationError, UnknownName
from anabranch.federated.errors import FederationError
from anabranch.federated.job import FederateJob
from anabranch.federated.runtimes.network.errors import NotKnown
from anabranch.federated.runtimes.network.invitation import Invitation
from anabranch.federated.runtimes.network.link import Link
from anabranch.federated.runtimes.network.serving import check, without_evaluations
from anabranch.federated.runtimes.network.site import Membership, Watch, join, work
from anabranch.models.progress import Progress, silent
from anabranch.training.data import prepare
from anabranch.training.options import parse_options
from anabranch.training.recipe import FORMATS, Data, Recipe, Split
from anabranch.training.setup import Setup, load_base

ENDINGS = {"csv": "csv", "parquet": "parquet", "txt": "text"}


@dataclass(frozen=True)
class Plan:
    """What a coordinator says will be run: a job, for a base with this fingerprint.

    ``shared`` are the shapes of what is sent, by name. The job is checked like one of a file, so
    that nothing but known options of installed methods comes from elsewhere.
    """

    job: FederateJob
    base: Mapping[str, str]
    shared: Mapping[str, list[int]]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Plan:
        """Checked. Raises :class:`ConfigurationError`."""
        try:
            job = parse_options(FederateJob, values["job"])
            check(job)
            job.make_strategy(), job.make_codec("up"), job.make_codec("down")
        except AnabranchError as error:
            raise ConfigurationError(
                f"the coordinator's job cannot be run here; both sides need the same version of "
                f"anabranch and the same plug-ins: {error}"
            ) from error
        return cls(job, values["base"], values["shared"])

    @property
    def numbers(self) -> int:
        """How many numbers a model, or a change of it, has that is sent."""
        return sum(math.prod(shape) for shape in self.shared.values())


def fetch_plan(invitation: Invitation, folder: Path, **options: Any) -> Plan:
    """Ask the coordinator, as a member or as one who is invited. ``options``: :class:`Link`'s."""
    member = Membership.load(folder)
    if member is not None:
        try:
            return _ask_for_plan(invitation, member.key, **options)
        except NotKnown:
            pass  # it never got as far as joining
    return _ask_for_plan(invitation, invitation.secret, **options)


def take_part(
    plan: Plan,
    invitation: Invitation,
    folder: Path,
    name: str,
    data: Path,
    *,
    source: str | None = None,
    base: str | None = None,
    progress: Progress = silent,
    watch: Watch = lambda task, reply: None,
    **options: Any,
) -> str:
    """Join, if need be, and train until the run is over; returns why it is.

    ``source`` is the entry of the recipe's data that says how rows are read, ``base`` where the
    base is found on this machine. Raises :class:`FederationError` if that is another one.
    """
    recipe = local_recipe(plan.job.recipe, data, source, base)
    progress("reading data", 0.0)
    prepared = prepare(recipe, progress)
    loaded = load_base(recipe, progress)
    if loaded.card.fingerprint != plan.base["fingerprint"]:
        raise FederationError(
            f"{recipe.base} is another model than the federation's {plan.base['name']}: their "
            f"fingerprints are {loaded.card.fingerprint[:12]} and "
            f"{plan.base['fingerprint'][:12]}; name the right one with --base"
        )
    setup = Setup.of(recipe, loaded, prepared)
    items = setup.objective.prepare(setup.train).items
    member = join(invitation, folder, name, len(items), **options)
    progress("waiting for the run to begin", None)
    return work(
        member,
        folder,
        plan.job.make_strategy().client(plan.job.make_local(setup.objective)),
        items,
        setup.model,
        up=plan.job.make_codec("up"),
        down=plan.job.make_codec("down"),
        watch=watch,
        **options,
    )


def local_recipe(recipe: Recipe, data: Path, source: str | None, base: str | None) -> Recipe:
    """The recipe with one source: a file here, read like the entry of this name, to train on."""
    entries = {entry.name: entry for entry in recipe.data}
    if source is None:
        if len({entry.task.name for entry in recipe.data}) > 1:
            raise ConfigurationError(
                f"the recipe reads several kinds of rows; say which yours are: --source "
                f"{' or --source '.join(entries)}"
            )
        source = recipe.data[0].name
    if source not in entries:
        raise UnknownName("source of the recipe", source, entries)
    if not data.exists():
        raise ConfigurationError(f"there is no file {data}")
    like = entries[source]
    changes: dict[str, Any] = {
        "source": _format(data),
        "path": data.absolute(),
        "split": Split(train=1.0),
        "options": {},
        "fallback": None,
        "limit": None,
        # Columns were renamed for the coordinator's own file; a generator's need none.
        "map": like.map if like.source in FORMATS else {},
    }
    own = {"data": [Data.model_validate({**like.model_dump(), **changes})]}
    if base is not None:
        own["base"] = base  # type: ignore[assignment]
    return without_evaluations(recipe).model_copy(update=own)


def _ask_for_plan(invitation: Invitation, token: str, **options: Any) -> Plan:
    link = Link(invitation.address, invitation.fingerprint, token, **options)
    try:
        return Plan.of(link.plan())
    finally:
        link.close()


def _format(data: Path) -> str:
    """By the file's ending; compressed files end in .gz, .xz or .bz2 besides."""
    if data.is_dir():
        return "hf-dir"
    endings = [ending.lstrip(".") for ending in data.suffixes]
    return next((ENDINGS[ending] for ending in endings if ending in ENDINGS), "jsonl")
