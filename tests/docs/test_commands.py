"""Commands, job files and links in the documentation are ones that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from anabranch.cli import app
from anabranch.federated.job import load_job
from tools.docs.commands import walk

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
QUICKSTART = (ROOT / "docs" / "quickstart.md").read_text()
COMMANDS = dict(walk(typer.main.get_command(app), ("anabranch",)))


def blocks(text: str, language: str = "") -> list[str]:
    """The fenced blocks of one language; those without any by default."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [block for name, block in fenced if name == language]


def command_lines(text: str) -> list[str]:
    """Lines of blocks without a language that begin with the program's name."""
    lines = "\n".join(blocks(text)).replace("\\\n", " ").splitlines()
    return [line for line in lines if re.match(r"(\.venv/bin/)?anabranch\s", line)]


def wrong_with(line: str) -> str:
    """What a command line asks that the program does not have; empty if nothing."""
    words = shlex.split(re.sub(r"\[([^\]=]*)\]", r"\1", line), comments=True)
    path: tuple[str, ...] = ("anabranch",)
    rest = words[1:]
    while rest and (*path, rest[0]) in COMMANDS:
        path, rest = (*path, rest[0]), rest[1:]
    if getattr(COMMANDS[path], "commands", {}) and rest and not rest[0].startswith("-"):
        return f"no command {' '.join([*path, rest[0]])}"
    known = {name for p in COMMANDS[path].params for name in [*p.opts, *p.secondary_opts]}
    known |= {"--help", "-h"}
    used = [word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)]
    return ", ".join(f"{' '.join(path)} has no {word}" for word in used if word not in known)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_exists_with_its_options(page):
    assert [fault for line in command_lines(page.read_text()) if (fault := wrong_with(line))] == []


def test_wrong_commands_are_found():
    assert wrong_with("anabranch upp --port 1") == "no command anabranch upp"
    assert wrong_with("anabranch up --prot 1  # comment") == "anabranch up has no --prot"
    assert not wrong_with("anabranch federate job.yaml [key=value ...] [-o FOLDER] [--json]")
    assert len(command_lines(QUICKSTART)) >= 6


def test_the_job_file_of_the_quickstart_is_accepted(tmp_path):
    (text,) = blocks(QUICKSTART, "yaml")
    file = tmp_path / "sites.yaml"
    file.write_text(text)
    job = load_job(file)
    assert (job.federate, job.clients.count, job.schedule.rounds) == ("together", 3, 2)


def test_the_programs_of_the_quickstart_compile():
    programs = blocks(QUICKSTART, "python")
    assert len(programs) == 2
    for program in programs:
        compile(program, "quickstart.md", "exec")


def test_links_of_the_readme_lead_to_files():
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / "README.md").read_text())
    assert len(targets) > 10
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_readme_counts_the_systems():
    rows = re.findall(r"^\| S\d+ \|", (ROOT / "docs" / "systems.md").read_text(), re.MULTILINE)
    assert f"| {len(rows)} of 92 systems |" in (ROOT / "README.md").read_text()
