"""``anabranch jobs``: what runs, what ran, and what became of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from anabranch.cli.output import bytes_text, errors, out, print_json, progress

if TYPE_CHECKING:
    from anabranch.jobs import Job
    from anabranch.jobs.service import Jobs

app = typer.Typer(
    help="Jobs: fine-tunings, federations and measurements that outlive a terminal.",
    no_args_is_help=True,
)

State = Annotated[
    Path | None,
    typer.Option(envvar="ANABRANCH_STATE", help="Folder of the jobs: that of anabranch up."),
]
Url = Annotated[
    str | None,
    typer.Option("--jobs-url", envvar="ANABRANCH_JOBS_URL", help="Database of the jobs."),
]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]
Id = Annotated[str, typer.Argument(help="A job's id, or the beginning of it.")]

WATCH_SECONDS = 0.5
NOTHING_YET = "the job has made nothing yet"


@app.command("submit")
def submit(
    kind: Annotated[str, typer.Argument(help="See: anabranch list jobs.")],
    what: Annotated[
        list[str], typer.Argument(help="A recipe or job file and overrides, claims, or KEY=VALUE.")
    ],
    priority: Annotated[int, typer.Option(help="Higher ones run first.")] = 0,
    retries: Annotated[int, typer.Option(min=0, help="After the process was killed.")] = 0,
    seconds: Annotated[float | None, typer.Option(help="Limit of running time.")] = None,
    memory_mb: Annotated[int | None, typer.Option(help="Limit of memory, in MiB.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    state: State = None,
    jobs_url: Url = None,
    json: Json = False,
) -> None:
    """Queue a job, for a running server or ``anabranch jobs work``.

    What follows a file are overrides: submit finetune recipe.yaml train.lr=1e-4.
    """
    limits = {"seconds": seconds, "memory_mb": memory_mb, "threads": threads}
    terms = {"retries": retries, "limits": limits}
    with opened(state, jobs_url) as jobs:
        spec = jobs.kind(kind).from_words(what)
        job = jobs.submit(kind, spec | terms, priority=priority)
    if json:
        print_json(_shown(job))
    else:
        out.print(f"{job.id} is queued; anabranch jobs watch {job.id}")


@app.command("list")
def list_(
    kind: Annotated[str | None, typer.Option(help="Only of this kind.")] = None,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="Only those.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 20,
    state: State = None,
    jobs_url: Url = None,
    json: Json = False,
) -> None:
    """List jobs, newest first."""
    from anabranch.jobs.states import FINISHED, TRANSITIONS

    with opened(state, jobs_url) as jobs:
        states = set(TRANSITIONS) - FINISHED if unfinished else set()
        page = jobs.store.find(kind, states=states, limit=limit)
    if json:
        print_json([_shown(job) for job in page.items])
        return
    table = Table("id", "kind", "name", "state", "done", "created", box=None, pad_edge=False)
    for job in page.items:
        table.add_row(job.id, job.kind, job.name, job.state, _done(job), _when(job.created))
    out.print(table)
    if page.has_more:
        out.print(f"and older ones; see --limit {2 * limit}", style="dim")


@app.command("show")
def show(job_id: Id, state: State = None, jobs_url: Url = None, json: Json = False) -> None:
    """Show one job: what was asked, how far it is, what it made."""
    with opened(state, jobs_url) as jobs:
        job = _find(jobs, job_id)
        made = jobs.store.artefacts(job.id)[job.id]
    if json:
        print_json(_shown(job) | {"artefacts": {name: vars(one) for name, one in made.items()}})
        return
    out.print(f"{job.id}  {job.kind} {job.name}: {job.state}")
    for label, at in (
        ("created", job.created),
        ("started", job.started),
        ("finished", job.finished),
    ):
        if at is not None:
            out.print(f"  {label:<9} {_when(at)}")
    for name, value in job.progress.items():
        out.print(f"  {name:<9} {value}")
    if job.error:
        out.print(f"  error     {job.error}", style="red")
    for one in made.values():
        out.print(f"  made      {one.path} ({bytes_text(one.size)})")


@app.command("watch")
def watch(job_id: Id, state: State = None, jobs_url: Url = None) -> None:
    """Follow a job to its end; the exit status is 0 if it succeeded."""
    from anabranch.jobs import FINISHED

    with opened(state, jobs_url) as jobs, progress() as report:
        job, after = _find(jobs, job_id), 0
        while True:
            job = jobs.store.get(job.id)
            for event in jobs.store.events(job.id, after=after, limit=1000).items:
                after = event.sequence
                if event.kind != "progress":
                    errors.print(f"{_when(event.time)}  {event.message}")
            if job.state in FINISHED:
                break
            message = job.progress.get("message", job.state)
            report(f"{job.state}: {message}", job.progress.get("fraction"))
            time.sleep(WATCH_SECONDS)
    raise typer.Exit(0 if job.state == "succeeded" else 1)


@app.command("logs")
def logs(job_id: Id, state: State = None, jobs_url: Url = None) -> None:
    """Print what a job's process said."""
    with opened(state, jobs_url) as jobs:
        job = _find(jobs, job_id)
        if text := jobs.log(job.id):
            out.print(text, end="")
            return
        for event in jobs.store.events(job.id, limit=10_000).items:
            out.print(f"{_when(event.time)}  {event.level:<5} {event.message}")


@app.command("artifacts")
def artifacts(job_id: Id, state: State = None, jobs_url: Url = None, json: Json = False) -> None:
    """List the files and folders that a job has made."""
    with opened(state, jobs_url) as jobs:
        made = jobs.artefacts(_find(jobs, job_id).id)
    if json:
        print_json([vars(one) for one in made])
        return
    for one in made:  # no table, which would cut digests off
        out.print(f"{one.sha256 or 'a folder':64}  {bytes_text(one.size):>9}  {one.name}")
    if not made:
        errors.print(NOTHING_YET)


@app.command("download")
def download(
    job_id: Id,
    names: Annotated[
        list[str] | None, typer.Argument(help="Artefacts, or files in one: NAME/PATH. None: all.")
    ] = None,
    output: Annotated[Path, typer.Option(help="The folder to write to.")] = Path(),
    state: State = None,
    jobs_url: Url = None,
) -> None:
    """Copy what a job has made, folders as ZIP archives. Nothing is overwritten."""
    with opened(state, jobs_url) as jobs:
        job = _find(jobs, job_id)
        names = names or [one.name for one in jobs.artefacts(job.id)]
        if not names:
            errors.print(NOTHING_YET)
        for name in names:
            found = jobs.download(job.id, name)
            out.print(f"{found.save(output)}  {bytes_text(found.size)}  sha256 {found.sha256}")


@app.command("cancel")
def cancel(job_id: Id, state: State = None, jobs_url: Url = None) -> None:
    """Give a job up. What it has made so far stays."""
    _ask(job_id, "cancel", state, jobs_url)


@app.command("pause")
def pause(job_id: Id, state: State = None, jobs_url: Url = None) -> None:
    """Stop a job with a checkpoint."""
    _ask(job_id, "pause", state, jobs_url)


@app.command("resume")
def resume(job_id: Id, state: State = None, jobs_url: Url = None) -> None:
    """Let a paused job go on from its checkpoint."""
    _ask(job_id, "run", state, jobs_url)


@app.command("work")
def work(
    max_jobs: Annotated[int, typer.Option(min=1, help="At a time.")] = 1,
    until_idle: Annotated[
        bool, typer.Option("--until-idle", help="End when nothing is queued or runs.")
    ] = False,
    state: State = None,
    jobs_url: Url = None,
) -> None:
    """Run queued jobs without a server. Ctrl-C leaves checkpoints; jobs go on next time."""
    with opened(state, jobs_url) as jobs:
        runner = jobs.runner(max_jobs)
        runner.start()
        errors.print(f"running jobs of {jobs.workspace.folder}; Ctrl-C stops")
        try:
            while not until_idle or _anything(jobs):
                time.sleep(WATCH_SECONDS)
        except KeyboardInterrupt:
            errors.print("stopping, with checkpoints")
        finally:
            runner.stop()


@contextmanager
def opened(state: Path | None, url: str | None) -> Iterator[Jobs]:
    """The jobs of a state folder."""
    from anabranch.jobs import Workspace
    from anabranch.jobs.service import Jobs
    from anabranch.models import cache

    workspace = Workspace.open(state or cache.root() / "state", url)
    try:
        yield Jobs(workspace)
    finally:
        workspace.close()


def _anything(jobs: Jobs) -> bool:
    return any(
        jobs.store.find(kind, states=("queued", "running"), limit=1).items for kind in jobs.kinds
    )


def _ask(job_id: str, wanted: Any, state: Path | None, url: str | None) -> None:
    with opened(state, url) as jobs:
        job = jobs.ask(_find(jobs, job_id).id, wanted)
    told = "" if job.wanted == "run" or job.state != "running" else f", asked to {job.wanted}"
    out.print(f"{job.id} is {job.state}{told}")


def _find(jobs: Jobs, start: str) -> Job:
    """The job whose id begins so."""
    from anabranch.jobs import UnknownJob

    found = jobs.store.starting_with(start)
    if len(found) > 1:
        listed = ", ".join(job.id for job in found[:5])
        raise UnknownJob(f"{start!r} is the beginning of several jobs: {listed}")
    return found[0] if found else jobs.store.get(start)


def _shown(job: Job) -> dict[str, Any]:
    hidden = ("owner", "lease", "beat")
    return {name: value for name, value in vars(job).items() if name not in hidden}


def _done(job: Job) -> str:
    fraction = job.progress.get("fraction")
    return "" if fraction is None or job.state == "succeeded" else f"{100 * fraction:.0f} %"


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
