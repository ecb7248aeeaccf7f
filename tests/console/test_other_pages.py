"""Models, Engine, Federation and Claims: what they show, and what they may change."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from nicegui import ui

from anabranch.claims.base import ClaimResult, find
from anabranch.claims.store import save
from anabranch.console.claims import documented_figures
from anabranch.console.components.chart import Chart
from anabranch.console.components.reply import formatted, utf16_length
from anabranch.console.federations import Federations, UnknownFederation
from anabranch.evaluation.plotting import Plot
from anabranch.federated.ledger import Account, Ledger
from anabranch.federated.store import write_state
from tests.api.conftest import EchoModel
from tests.api.fake_trainer import TrainingModel

from .simulation import Visit, visit


def adapter(folder: Path, name: str) -> None:
    (folder / name).mkdir()
    (folder / name / "adapter_config.json").write_text("{}")


def test_adapters_are_loaded_and_unloaded(tmp_path: Path) -> None:
    adapter(tmp_path, "one")
    adapter(tmp_path, "two")
    (tmp_path / "no-adapter").mkdir()
    model = TrainingModel()

    async def story(at: Visit) -> None:
        await at.open("models")
        await at.sees("1,000 tokens")
        pick = at.one(ui.select, "adapter")
        assert pick.options == ["one", "two"]
        at.user.find(marker="load").click()
        await at.sees("choose a folder first")
        pick.value = "one"
        at.user.find(marker="load").click()
        await at.sees("base:one")
        assert at.one(ui.select, "adapter").options == ["two"]
        at.user.find(marker="unload base:one").click()
        await at.sees("Unload base:one?")
        at.user.find(marker="confirm").click()
        await at.until(lambda: not model.served)
        await at.until(lambda: at.one(ui.select, "adapter").options == ["one", "two"])

    visit(story, model, adapters=tmp_path)


def test_a_folder_that_is_no_adapter_is_refused_in_its_own_words(tmp_path: Path) -> None:
    adapter(tmp_path, "broken")

    async def story(at: Visit) -> None:
        await at.open("models")
        at.one(ui.select, "adapter").value = "broken"
        at.user.find(marker="load").click()
        await at.sees("'echo' cannot take adapters")
        assert [model.name for model in at.console.service.listed()] == ["echo"]

    visit(story, EchoModel(), adapters=tmp_path)


def test_engine_shows_history_and_grows() -> None:
    async def story(at: Visit) -> None:
        await at.until(lambda: len(at.console.sampler.history["echo"]) >= 1)
        await at.open("engine")
        charts = list(at.user.find(kind=Chart).elements)
        assert len(charts) == 6
        throughput = next(c for c in charts if c._props["title"] == "Throughput")
        assert throughput._props["series"][0]["points"]
        tab = at.user.client
        assert tab is not None and "25 %" in at.texts()
        sent: list[Any] = []
        tab.run_javascript = lambda code, **_: sent.append(  # type: ignore[method-assign, assignment]
            json.loads(code.removesuffix(")").partition("}, ")[2])["echo"]
        )
        conversation = at.console.conversations.new(None)
        conversation.ask("one two three")
        await at.until(lambda: any(each["series"][0][0] > 0 for each in sent))
        assert all(len(each["series"]) == 7 and len(each["tiles"]) == 9 for each in sent)
        assert len(sent) <= 6  # one message a second, whatever it holds
        tab.delete()
        count = len(sent)
        await asyncio.sleep(1.2)
        assert len(sent) == count

    visit(story)


def test_the_target_is_a_line_in_the_chart_of_percentiles() -> None:
    promising = TrainingModel()
    promising.time_between_tokens = 0.05

    async def story(at: Visit) -> None:
        sampler = at.console.sampler
        await at.until(lambda: len(sampler.history["base"]) >= 1)
        await at.open("engine")
        charts = [chart._props for chart in at.user.find(kind=Chart).elements]
        assert len(charts) == 7 + 6  # echo has no target to keep
        both = [props for props in charts if props["title"] == "Time between tokens"]
        levels = {tuple(props["levels"]): props["series"] for props in both}
        names = {level: [one["name"] for one in series] for level, series in levels.items()}
        assert names == {("target",): ["p50", "p95", "p99", "target"], (): ["p50", "p95", "p99"]}
        assert levels["target",][-1]["points"][0][1] == 0.05
        assert [p["title"] for p in charts].count("Steps that kept the target") == 1

    visit(story, promising, EchoModel())


JOB = {
    "federate": "silos",
    "strategy": {"name": "fedprox"},
    "schedule": {"rounds": 4},
    "runtime": "simulation",
}
HISTORY = [{"seconds": 1.0 * n, "loss": 2.0 / n, "valid/accuracy": 0.2 * n} for n in (1, 2, 3, 4)]


def traffic(direction: str, client: str) -> dict[str, Any]:
    return {
        "direction": direction, "client": client, "kind": "train",
        "messages": 4, "payload": 1000, "envelope": 24,
    }  # fmt: skip


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A finished run, one that goes on, one that cannot be read, and a folder of something else."""
    for name in ("done", "going", "damaged"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "job.json").write_text(json.dumps(JOB))
    rows = [traffic(d, c) for d in ("up", "down") for c in ("a", "b")]
    report = {
        "versions": 4, "clock": "real", "seconds": 90.0, "history": HISTORY, "traffic": rows,
        "incidents": [{"what": "late", "client": "a", "count": 2, "message": "too slow"}],
    }  # fmt: skip
    (tmp_path / "done" / "report.json").write_text(json.dumps(report))
    (tmp_path / "damaged" / "report.json").write_text("{")
    ledger = Ledger()
    ledger.record(Account("up", "a", "train", 1), 500, 12)
    run = {"version": 2, "now": 3.5, "history": HISTORY[:2], "ledger": ledger.state_dict()}
    (tmp_path / "going" / "run").mkdir()
    write_state(tmp_path / "going" / "run" / "snapshot-000000004", {"run": run})
    (tmp_path / "going" / "run" / "snapshot-000000009").write_bytes(b"torn")
    (tmp_path / "something else").mkdir()
    return tmp_path


def test_runs_are_read_as_they_are(runs: Path) -> None:
    found = {run.name: run for run in Federations(runs).all()}
    assert set(found) == {"done", "going", "damaged"}
    done, going = found["done"], found["going"]
    assert (done.state, done.rounds, done.wanted, done.up, done.down) == (
        "finished", 4, 4, 2048, 2048,
    )  # fmt: skip
    assert [(c.name, c.messages, c.up) for c in done.clients] == [("a", 8, 1024), ("b", 8, 1024)]
    assert done.metrics == {"loss": 0.5, "valid/accuracy": 0.8}
    assert done.curves(["loss", "absent"]) == {"loss": [(1, 2), (2, 1), (3, 2 / 3), (4, 0.5)]}
    assert (going.state, going.rounds, going.up, going.seconds) == (
        "unfinished",
        2,
        512,
        3.5,
    )
    assert found["damaged"].problem.startswith("JSONDecodeError")
    assert Federations(runs / "nowhere").all() == []
    for name in ("../x", "something else", ""):
        with pytest.raises(UnknownFederation):
            Federations(runs).get(name)


def test_federation_pages(runs: Path) -> None:
    async def story(at: Visit) -> None:
        await at.open("federation")
        await at.sees("fedprox · 4 of 4 rounds · 2 clients · 2.0 KiB up, 2.0 KiB down · loss 0.5")
        await at.sees("cannot be read: JSONDecodeError")
        await at.open("federation/done")
        await at.sees("too slow")
        assert {chart._props["title"] for chart in at.user.find(kind=Chart).elements} == {
            "loss",
            "valid/accuracy",
        }
        assert (await at.http.get("/console/federation/absent")).status_code == 404

    async def none(at: Visit) -> None:
        await at.open("federation")
        await at.sees("No federations yet")

    visit(story, runs=runs)
    visit(none)


def result(verdict: str, finished: str) -> ClaimResult:
    claim = find("S46")
    texts = {name: getattr(claim, name) for name in ("paper", "baseline", "method", "threshold")}
    return ClaimResult(
        id="S46", name=claim.name, system=claim.system, **texts, verdict=verdict,  # type: ignore[arg-type]
        figures={"p95": {"ratio": 0.41}}, note="one core", seconds=80.0, seeds=(0, 1), versions={},
        machine={"cores": 2}, finished=finished,
        plots=(Plot("Load", "rate", "p95", {"splitfuse": [(1, 2), (2, 3)]}, levels={"goal": 2.5}),),
    )  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path))
    return tmp_path


def test_claims_show_the_newest_verdict_and_how_often_it_held(cache: Path) -> None:
    save(result("falls short", "2026-01-01T00:00:00+00:00"))
    save(result("holds", "2026-01-02T00:00:00+00:00"))

    async def story(at: Visit) -> None:
        await at.open("claims")
        await at.sees("Here, 1 hold, 0 fall short")
        texts = at.texts()
        assert "holds" in texts and "1 of 2" in texts and "not measured" in texts
        await at.open("claims/S46")
        await at.sees("p95: ratio")
        assert "0.41" in at.texts() and "one core" in at.texts()
        chart = at.one(Chart)
        assert chart._props["levels"] == ["goal"]
        assert [s["name"] for s in chart._props["series"]] == ["splitfuse", "goal"]
        assert not at.has("measure")
        await at.sees("It cannot be measured from here. This server keeps no jobs.")
        assert (await at.http.get("/console/claims/S00")).status_code == 404

    visit(story)


def test_documented_figures_are_read_from_the_table_of_systems(tmp_path: Path) -> None:
    page = tmp_path / "systems.md"
    page.write_text(
        "# T\n\n| id | x | figure |\n|---|---|---|\n| S46 | y | 0.41x, 2.27x |\nS1 | no\n"
    )
    assert documented_figures(page) == {"S46": "0.41x, 2.27x"}
    assert documented_figures(tmp_path / "absent.md") == {}


def test_answers_are_formatted_without_obeying_their_tags() -> None:
    html = formatted("**bold** <script>alert(1)</script> ![a cat](http://evil.example/cat.png)")
    assert "<strong>bold</strong>" in html and "<script" not in html
    assert "<img" not in html and "evil" not in html and "a cat" in html
    assert "javascript:" not in formatted("[x](javascript:alert(1))")


def test_length_is_counted_as_browsers_do() -> None:
    assert [utf16_length(text) for text in ("", "aé", "🌊", "a🌊")] == [0, 2, 2, 3]
