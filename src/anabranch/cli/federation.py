"""``anabranch federation``: learn together over a network."""

from __future__ import annotations

import re
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from anabranch.cli.federate import INTERRUPTED, Publish, draw, show, showing, with_publish
from anabranch.cli.federate import as_json as outcome_json
from anabranch.cli.output import bytes_text, count_text, errors, out, print_json, progress
from anabranch.errors import ConfigurationError

if TYPE_CHECKING:
    from anabranch.federated.messages import Reply, Task
    from anabranch.federated.runtimes.network import Invitation, Network, Roster
    from anabranch.federated.runtimes.network.joining import Plan

app = typer.Typer(help="Learn together over a network.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="The federation's folder, as served.")]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]


@app.command()
def serve(
    file: Annotated[Path, typer.Argument(help="A job file, see docs/federation.md.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as seed=1.")
    ] = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 to be reached from elsewhere.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8443,
    address: Annotated[
        str | None,
        typer.Option(help="What sites connect to, HOST or HOST:PORT, if it is not --host."),
    ] = None,
    clients: Annotated[
        int | None, typer.Option(min=1, help="Sites to wait for; default: the job's.")
    ] = None,
    absent_after: Annotated[
        float, typer.Option(min=1, help="Seconds of silence after which a site has left.")
    ] = 60.0,
    no_data: Annotated[
        bool, typer.Option("--no-data", help="The recipe's data are not here: evaluate nothing.")
    ] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Without TLS: only on a network that is trusted.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: runs/<name of the job>.")
    ] = None,
    publish: Publish = None,
    json: AsJson = False,
) -> None:
    """Coordinate a job for sites that join with the invitations that this prints.

    Killed or interrupted, the same command goes on; sites come back by themselves.
    """
    from anabranch.federated.job import load_job

    job = load_job(file, with_publish(overrides, publish))
    if job.clients.held_out:
        raise ConfigurationError(
            "clients.held_out: sites that join have rows of their own, which nobody divides"
        )
    folder = output or Path("runs") / job.federate

    def listening(network: Network) -> None:
        known, open_ = len(network.roster.sites()), network.roster.open_invitations()
        texts = [
            str(network.invite())
            for _ in range((clients or job.clients.count or 0) - known - open_)
        ]
        if json:
            print_json({"address": network.address, "invitations": texts}, indent=None)
        else:
            _announce(network.address, texts, folder, known, open_)
        sys.stdout.flush()

    with showing() as (report, observe):
        report("importing torch", None)
        from anabranch.federated.runtimes.network.serving import Place
        from anabranch.federated.runtimes.network.serving import serve as run

        place = Place(host, port, clients, address, insecure, absent_after)
        try:
            outcome = run(job, folder, place, report, observe, listening, own_data=not no_data)
        except KeyboardInterrupt:
            errors.print("interrupted; the same command goes on")
            raise typer.Exit(INTERRUPTED) from None
    draw(outcome)
    if json:
        print_json(outcome_json(outcome), indent=None)
    else:
        show(outcome)


@app.command()
def join(
    invitation: Annotated[str, typer.Argument(help="The line that the coordinator printed.")],
    data: Annotated[Path, typer.Option(help="Rows to train on: JSONL, CSV, Parquet or text.")],
    name: Annotated[
        str | None, typer.Option(help="What this site is called; default: the machine's name.")
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="Which entry of the recipe's data the rows are like.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Where the base model is here, if not under its name.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Accept a coordinator without TLS.")
    ] = False,
    patience: Annotated[
        float, typer.Option(min=1, help="Seconds to wait for a coordinator that is away.")
    ] = 600.0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where this site keeps its key and state.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Take part: train on rows that stay here, and send what the plan says.

    Killed or interrupted, the same command goes on.
    """
    from anabranch.federated.runtimes.network.invitation import Invitation

    given = Invitation.parse(invitation)
    name = name or _machine()
    folder = output or Path("runs") / f"site-{given.run}-{name}"
    with progress() as report:
        report("importing torch", None)
        from anabranch.federated.runtimes.network.joining import fetch_plan, take_part

        options: dict[str, Any] = {"insecure": insecure, "patience": patience}
        plan = fetch_plan(given, folder, **options)
    _show_plan(plan, given, data)
    if not yes:
        if not sys.stdin.isatty():
            errors.print("nobody can be asked here; agree with --yes", style="red")
            raise typer.Exit(2)
        typer.confirm("Take part?", abort=True, err=True)
    counts = {"tasks": 0, "bytes": 0}
    with progress() as report:

        def watch(task: Task, reply: Reply | None) -> None:
            if reply is None:
                report(f"version {task.version}: at work on {task.kind} {task.id}", None)
                return
            counts["tasks"] += 1
            counts["bytes"] += len(reply.body)
            what = reply.error or ", ".join(f"{n} {v:.4f}" for n, v in reply.metrics.items())
            report(f"version {task.version}: sent {bytes_text(len(reply.body))}, {what}", None)

        try:
            reason = take_part(
                plan,
                given,
                folder,
                name,
                data,
                source=source,
                base=base,
                progress=report,
                watch=watch,
                **options,
            )
        except KeyboardInterrupt:
            errors.print("interrupted; the same command goes on")
            raise typer.Exit(INTERRUPTED) from None
    if json:
        print_json({"reason": reason, "site": name, **counts, "output": str(folder)})
    else:
        out.print(
            f"{reason}; {counts['tasks']} replies, {bytes_text(counts['bytes'])} sent",
            style="green",
        )


@app.command()
def invite(
    folder: Folder,
    name: Annotated[str | None, typer.Option(help="Admit only a site of this name.")] = None,
    json: AsJson = False,
) -> None:
    """Print an invitation for one more site. It works once."""
    from anabranch.federated.runtimes.network.runtime import invitation

    text = str(invitation(_roster(folder), name))
    print_json({"invitation": text}) if json else out.print(text)


@app.command()
def sites(folder: Folder, json: AsJson = False) -> None:
    """List the sites that joined, and what they declared."""
    roster = _roster(folder)
    members = roster.sites()
    if json:
        print_json(
            {
                "run": roster.run,
                "sites": [vars(member) for member in members],
                "open_invitations": roster.open_invitations(),
            }
        )
        return
    table = Table("site", "examples", "joined", "revoked", box=None, pad_edge=False)
    for member in members:
        revoked = "" if member.revoked is None else _when(member.revoked)
        table.add_row(member.name, str(member.examples), _when(member.joined), revoked)
    out.print(table)
    out.print(f"{roster.open_invitations()} invitations are not used yet")


@app.command()
def revoke(
    folder: Folder, name: Annotated[str, typer.Argument(help="A site of this federation.")]
) -> None:
    """Refuse a site from now on. A running coordinator notices at once."""
    _roster(folder).revoke(name)
    out.print(f"{name} is refused from now on")


def _roster(folder: Path) -> Roster:
    from anabranch.federated.runtimes.network.roster import Roster

    if not (folder / "network" / "sites.sqlite").exists():
        raise ConfigurationError(
            f"{folder} is no folder of a federation over a network; name the one that "
            f"anabranch federation serve writes to, such as runs/<name of the job>"
        )
    return Roster(folder / "network")


def _announce(address: str, texts: list[str], folder: Path, known: int, open_: int) -> None:
    out.print(f"listening on {address}")
    if known or open_:
        out.print(f"{known} sites joined before, {open_} invitations are open")
    for text in texts:
        out.print(f"anabranch federation join --data ROWS.jsonl {text}")
    out.print(f"each admits one site, once; for more: anabranch federation invite {folder}")


def _show_plan(plan: Plan, invitation: Invitation, data: Path) -> None:
    """What will be run here, and what leaves the machine."""
    job = plan.job
    adapter = {"method": job.recipe.adapter.method, **job.recipe.adapter.options}
    codec = ", ".join(choice.name for choice in job.codec) or "as they are"
    work = f"{job.local.steps} steps" if job.local.steps else f"{job.local.epochs} epochs"
    strategy = {"name": job.strategy.name, **job.strategy.options}
    hidden = []
    if job.privacy is not None:
        hidden.append(f"private steps here, epsilon {job.privacy.epsilon:g} for the whole run")
    if job.secure is not None:
        hidden.append("masked: the coordinator opens the sum over sites only")
    lines = {
        "federation": f"{job.federate} at {invitation.address}",
        "base": f"{plan.base['name']}, loaded here",
        "runs here": f"{_words(strategy)}; {work} a task, {job.schedule.rounds} versions",
        "trains": _words(adapter),
        "data": f"{data}, which never leaves this machine",
        "is sent": f"{count_text(plan.numbers)} numbers a task, {codec}; how many examples there "
        "are, figures such as the mean loss, how much was done; of a task that fails, the error",
    }
    if hidden:
        lines["protection"] = "; ".join(hidden)
    for key, text in lines.items():
        # Some of it is the coordinator's text: nothing in it may steer the terminal.
        errors.print(f"{key:11}{''.join(c if c.isprintable() else '?' for c in text)}")


def _words(values: dict[str, Any]) -> str:
    first, *rest = values.items()
    return f"{first[1]}" + (f" ({', '.join(f'{k}={v}' for k, v in rest)})" if rest else "")


def _machine() -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", socket.gethostname()).strip("-._")[:64]
    return name or "site"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
