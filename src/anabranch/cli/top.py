"""``anabranch top``: what a server does right now, inference and fine-tuning side by side."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from anabranch.cli.output import out, print_json
from anabranch.errors import AnabranchError

if TYPE_CHECKING:
    import httpx

REFRESH_SECONDS = 1.0
SHOWN_JOBS = 20
_PREFIX = "anabranch_"


class ServerUnreachable(AnabranchError):
    """No server answers at the address, or not as one of ours does."""


@dataclass(frozen=True)
class ModelLoad:
    """One base model: rates in tokens per second, shares as fractions of 1.

    ``slo_attainment`` is the share of steps that kept the latency target since the last look (since
    the server started, at the first one); None if the target applied to none.
    """

    name: str
    tokens_per_second: float = 0.0
    finetune_tokens_per_second: float = 0.0
    slo_attainment: float | None = None
    cache_usage: float = 0.0
    waiting: int = 0
    running: int = 0
    finetune_jobs: int = 0


@dataclass(frozen=True)
class JobLine:
    """One fine-tuning job. ``eta_seconds`` is None unless the server can tell."""

    id: str
    model: str
    state: str
    step: int = 0
    total_steps: int = 0
    loss: float | None = None
    validation_loss: float | None = None
    eta_seconds: int | None = None


@dataclass(frozen=True)
class Snapshot:
    """What one look showed. ``jobs`` is None if the server keeps none."""

    time: float
    models: list[ModelLoad]
    jobs: list[JobLine] | None
    totals: dict[str, dict[str, float]] = field(repr=False)
    """Metric -> model -> value, from which the next look's shares follow."""


def top(
    url: Annotated[str, typer.Option(help="The server.")] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None, typer.Option(envvar="ANABRANCH_API_KEY", help="To see the key's jobs.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Show it once and exit.")] = False,
    json_: Annotated[
        bool, typer.Option("--json", help="For programs: one document a look.")
    ] = False,
) -> None:
    """Watch a server: speed, latency target, memory, queue and fine-tuning jobs."""
    import httpx

    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    base_url = url.rstrip("/").removesuffix("/v1")
    with httpx.Client(base_url=base_url, headers=headers, timeout=5.0) as client:
        shown = look(client)
        if once or json_:
            _print(shown, json_)
            while not once:
                time.sleep(REFRESH_SECONDS)
                shown = look(client, shown)
                _print(shown, json_)
            return
        with Live(render(shown), console=out, screen=out.is_terminal) as live:
            try:
                while True:
                    time.sleep(REFRESH_SECONDS)
                    shown = look(client, shown)
                    live.update(render(shown))
            except KeyboardInterrupt:
                return


def look(client: httpx.Client, before: Snapshot | None = None) -> Snapshot:
    """Read the server's metrics and jobs. Raises :class:`ServerUnreachable`."""
    now = time.time()
    totals = _metrics(_get(client, "/metrics").text)
    if f"{_PREFIX}running_requests" not in totals:
        raise ServerUnreachable(f"{client.base_url} is no Anabranch server: its metrics are others")
    answer = _get(client, "/v1/fine_tuning/jobs", params={"limit": SHOWN_JOBS}, missing=True)
    jobs = None
    if answer.status_code == 200:
        jobs = [_job(job, now) for job in answer.json()["data"]]
    names = sorted(totals[f"{_PREFIX}running_requests"])
    models = [_model(name, totals, before.totals if before else {}) for name in names]
    return Snapshot(now, models, jobs, totals)


def render(shown: Snapshot) -> RenderableType:
    """Two tables: models and jobs."""
    parts: list[RenderableType] = [_model_table(shown.models)]
    if shown.jobs is None:
        parts.append(Text("This server keeps no fine-tuning jobs."))
    elif not shown.jobs:
        parts.append(Text("No fine-tuning jobs."))
    else:
        parts.append(_job_table(shown.jobs))
    return Group(*parts)


def _model_table(models: list[ModelLoad]) -> Table:
    table = Table(title="models", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("model")
    for name in ("tokens/s", "trained/s", "SLO kept", "KV use", "queue", "running", "jobs"):
        table.add_column(name, justify="right")
    for model in models:
        attained = model.slo_attainment
        table.add_row(
            Text(model.name),
            f"{model.tokens_per_second:,.1f}",
            f"{model.finetune_tokens_per_second:,.1f}",
            "-" if attained is None else f"{attained:.1%}",
            f"{model.cache_usage:.0%}",
            str(model.waiting),
            str(model.running),
            str(model.finetune_jobs),
        )
    return table


def _job_table(jobs: list[JobLine]) -> Table:
    table = Table(title="fine-tuning jobs", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("job", overflow="fold")
    for name in ("makes", "state"):
        table.add_column(name, no_wrap=True)
    for name in ("steps", "loss", "valid.", "left"):
        table.add_column(name, justify="right")
    for job in jobs:
        table.add_row(
            Text(job.id),
            Text(job.model),
            job.state,
            f"{job.step}/{job.total_steps}" if job.total_steps else "-",
            "-" if job.loss is None else f"{job.loss:.4f}",
            "-" if job.validation_loss is None else f"{job.validation_loss:.4f}",
            "-" if job.eta_seconds is None else _duration(job.eta_seconds),
        )
    return table


def _print(shown: Snapshot, as_json: bool) -> None:
    if as_json:
        document = asdict(shown)
        del document["totals"]
        print_json(document, indent=None)
    else:
        out.print(render(shown))


def _get(client: httpx.Client, path: str, missing: bool = False, **options: Any) -> httpx.Response:
    import httpx

    try:
        answer = client.get(path, **options)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServerUnreachable(
            f"no server answers at {client.base_url}: {error}; name it with --url"
        ) from error
    if answer.status_code == 401:
        raise ServerUnreachable(
            "the server wants an API key: give one with --api-key or in ANABRANCH_API_KEY"
        )
    if answer.status_code >= 400 and not (missing and answer.status_code == 404):
        raise ServerUnreachable(f"{answer.url} answers with the status {answer.status_code}")
    return answer


def _metrics(text: str) -> dict[str, dict[str, float]]:
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, dict[str, float]] = defaultdict(dict)
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if set(sample.labels) == {"model"}:
                    found[sample.name][sample.labels["model"]] = sample.value
    except ValueError as error:
        raise ServerUnreachable(f"the metrics cannot be read: {error}") from error
    return dict(found)


def _model(
    name: str, now: dict[str, dict[str, float]], before: dict[str, dict[str, float]]
) -> ModelLoad:
    def value(metric: str) -> float:
        return now.get(_PREFIX + metric, {}).get(name, 0.0)

    def grown(metric: str) -> float:
        return value(metric) - before.get(_PREFIX + metric, {}).get(name, 0.0)

    steps = grown("steps_slo_total")
    return ModelLoad(
        name,
        tokens_per_second=value("tokens_per_second"),
        finetune_tokens_per_second=value("finetune_tokens_per_second"),
        slo_attainment=grown("steps_slo_met_total") / steps if steps > 0 else None,
        cache_usage=value("cache_usage_ratio"),
        waiting=int(value("waiting_requests")),
        running=int(value("running_requests")),
        finetune_jobs=int(value("finetune_jobs")),
    )


def _job(job: dict[str, Any], now: float) -> JobLine:
    ours = job["anabranch"]
    finish = job["estimated_finish"]
    return JobLine(
        job["id"],
        ours["adapter"],
        ours["state"],
        ours["step"] or 0,
        ours["total_steps"] or 0,
        ours["loss"],
        ours["validation_loss"],
        None if finish is None else max(0, int(finish - now)),
    )


def _duration(seconds: int) -> str:
    hours, rest = divmod(seconds, 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
