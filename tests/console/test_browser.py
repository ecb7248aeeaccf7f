"""The console in a real browser: the whole story, both themes, phone width, keyboard, axe-core."""

from __future__ import annotations

import importlib.util
import json
import re
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from anabranch.training.pipeline import Pipeline
from anabranch.training.recipe_file import load_recipe
from tests.api.test_files import ROW, jsonl
from tests.api.test_server import within
from tests.test_end_to_end import running
from tests.training.tiny_base import write_base

from .browser import DESKTOP, PHONE, Browser, Server, browsing, serving

FINISHED = "jobs/fine_tuning/ID"
PAGES = ("", "models", "jobs?new", FINISHED, "engine", "federation", "claims", "claims/S46")
SERIOUS = ("serious", "critical")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    state = tmp_path_factory.mktemp("state")
    run = state / "runs" / "silos"
    run.mkdir(parents=True)
    job = {"strategy": {"name": "fedavg"}, "schedule": {"rounds": 2}, "runtime": "simulation"}
    (run / "job.json").write_text(json.dumps(job))
    with serving(state, step_seconds=0.05) as started:
        yield started


@pytest.fixture(scope="module")
def finished(server: Server) -> str:
    """The id of a job that has made an adapter and a file."""
    with httpx.Client(base_url=server.url) as client:
        upload = {"file": ("rows.jsonl", jsonl(*[ROW] * 2))}
        file = client.post("/v1/files", data={"purpose": "fine-tune"}, files=upload).json()
        body = {"model": "base", "training_file": file["id"], "suffix": "finished"}
        job_id = str(client.post("/v1/fine_tuning/jobs", json=body).json()["id"])
        assert within(30, lambda: client.get(f"/v1/jobs/{job_id}").json()["state"] == "succeeded")
    return job_id


@pytest.fixture(scope="module")
def shared(server: Server) -> Iterator[Browser]:
    with browsing(server.url) as browser:
        yield browser


@pytest.fixture
def browser(shared: Browser) -> Iterator[Browser]:
    shared.size(*DESKTOP)
    yield shared
    assert not shared.complaints()
    assert not shared.foreign_requests()


def rows(folder: Path, count: int) -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(jsonl(*[ROW] * count))
    return path


def start_job(
    browser: Browser, file: Path, name: str, numbers: Sequence[str] = ("1", "2", "")
) -> None:
    """``numbers`` are batch size, epochs and rate's multiplier; empty ones are left empty."""
    browser.open("jobs?new")
    browser.run("document.querySelector('input[type=file]').value = ''")
    browser.driver.find_element("css selector", "input[type=file]").send_keys(str(file))
    browser.sees("rows.jsonl is here")
    labels = ("Name of the result", "Batch size", "Epochs", "Learning rate multiplier")
    for label, value in zip(labels, (name, *numbers), strict=True):
        browser.find(f"input[aria-label='{label}']").send_keys(value)
    browser.press("Start")
    browser.sees("of ")
    browser.until(lambda: "/jobs/fine_tuning/" in browser.driver.current_url)


def test_chat_upload_fine_tune_and_chat_with_the_result(browser: Browser, tmp_path: Path) -> None:
    browser.open("?new=1")
    browser.say("a **bold** word and <b>no tag</b>")
    browser.sees("6 out")
    assert browser.find(".formatted strong").text == "bold"
    assert "<b>no tag</b>" in browser.text()
    browser.keep("chat")
    start_job(browser, rows(tmp_path, 20), "mine")
    browser.sees("of 40 steps")
    browser.keep("job-running")
    browser.sees("succeeded")
    browser.until(lambda: "M" in browser.find(".chart .line path").get_attribute("d"))
    browser.keep("job-finished")
    browser.press("Chat with it")
    browser.until(lambda: "model=base" in browser.driver.current_url or "chat=" in browser.text())
    browser.say("hello again")
    browser.sees("2 out")
    assert "base:mine" in browser.find(".reply-head").text


def test_stop_keeps_the_text_and_a_reload_finds_it(browser: Browser) -> None:
    browser.open("?model=slow")
    browser.say("word " * 100)
    browser.until(lambda: browser.find(".reply-text").text.count("word") >= 3)
    browser.driver.refresh()
    browser.until(lambda: browser.find(".reply-text").text.count("word") >= 3)
    browser.press("Stop")
    browser.sees("stopped")
    written = browser.find(".reply-text").text
    assert 3 <= written.count("word") < 100
    browser.open("models")
    browser.open()  # the tab comes back to its conversation
    assert browser.find(".reply-text").text == written


def test_a_bad_file_and_a_bad_field_are_named_where_they_are(
    browser: Browser, server: Server, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(jsonl(ROW) + b"not json\n")
    browser.open("jobs?new")
    browser.driver.find_element("css selector", "input[type=file]").send_keys(str(bad))
    browser.sees("bad.jsonl was not kept")
    browser.sees("line 2")
    browser.find("input[aria-label='Name of the result']").send_keys("no spaces")
    browser.sees("match pattern")
    kept = httpx.get(f"{server.url}/v1/files").json()["data"]
    assert "bad.jsonl" not in [file["filename"] for file in kept]
    browser.keep("job-form-errors")


def test_cancel_in_mid_job_is_seen_in_another_tab(
    browser: Browser, server: Server, tmp_path: Path
) -> None:
    start_job(browser, rows(tmp_path, 400), "given-up")
    browser.sees("of 800 steps")
    page = browser.driver.current_url.rpartition("/console/")[2]
    with browsing(server.url) as other:
        other.open(page)
        other.sees("of 800 steps")
        browser.press("Cancel")
        browser.sees("cancelled")
        other.sees("cancelled")
    job = httpx.get(f"{server.url}/v1/jobs/{page.rpartition('/')[2]}").json()
    assert job["state"] == "cancelled"


def test_the_pages_are_named_before_any_script_has_run(browser: Browser) -> None:
    """What is painted first waits for a few kilobytes of HTML, not for a megabyte of scripts."""
    disable = "Emulation.setScriptExecutionDisabled"
    browser.driver.execute_cdp_cmd(disable, {"value": True})
    try:
        browser.driver.get(f"{browser.url}/console/models")
        named = browser.driver.find_elements("css selector", "nav a")
        assert [each.text for each in named if each.is_displayed()][:3] == [
            "Chat",
            "Models",
            "Jobs",
        ]
        assert not browser.driver.find_elements("css selector", "#content")
    finally:
        browser.driver.execute_cdp_cmd(disable, {"value": False})


@pytest.mark.parametrize("page", PAGES)
def test_phone_width_does_not_scroll_sideways(browser: Browser, finished: str, page: str) -> None:
    browser.size(*PHONE)
    browser.open(page.replace("ID", finished))
    browser.find("nav")
    wide, shown = browser.run("return [document.documentElement.scrollWidth, innerWidth]")
    assert wide <= shown
    browser.keep(f"phone-{page.partition('?')[0].replace('/', '-') or 'chat'}")


COLOURS = ["color-contrast", "link-in-text-block"]
"""The rules whose outcome depends on a theme."""


def serious(browser: Browser, **options: Any) -> list[str]:
    """What axe-core finds on the page, which has it loaded."""
    report = browser.driver.execute_async_script(
        "const [options, done] = arguments; axe.run(options).then(done, (e) => done(`${e}`))",
        options,
    )
    return [
        f"{each['id']}: {each['nodes'][0]['html'][:200]}"
        for each in report["violations"]
        if each["impact"] in SERIOUS
    ]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_nothing_serious(server: Server, finished: str, dark: bool) -> None:
    found = importlib.util.find_spec("axe_playwright_python")
    if found is None or found.origin is None:
        pytest.skip("axe-core is not here: pip install --no-deps axe-playwright-python")
    axe = (Path(found.origin).parent / "axe.min.js").read_text("utf-8")
    with browsing(server.url, dark=dark) as browser:
        for page in PAGES:
            browser.open(page.replace("ID", finished))
            if page == FINISHED:
                browser.find("a[aria-label='Download adapter']")
            if not page:
                browser.press("Settings")
                browser.say("hello")
                browser.sees("1 out")
            browser.run(axe)
            assert not (serious(browser, runOnly=COLOURS) if dark else serious(browser)), page
            if page == "models" and not dark:
                browser.press("Merge")
                browser.find("[role=dialog] input[aria-label=Name]")
                # It takes the veil behind a dialog for what its texts stand on.
                assert not serious(browser, rules={"color-contrast": {"enabled": False}})
            name = page.partition("?")[0].replace("/", "-") or "chat"
            browser.keep(f"{'dark' if dark else 'light'}-{name}")


def test_everything_can_be_reached_by_the_keyboard(browser: Browser) -> None:
    browser.open("?new=1")
    browser.run("document.activeElement.blur()")
    reached = []
    for _ in range(16):
        browser.driver.switch_to.active_element.send_keys("\ue004")  # Tab
        reached.append(
            browser.run(
                "const e = document.activeElement;"
                "return e.ariaLabel || e.textContent.trim() || e.getAttribute('aria-label')"
            )
        )
    for name in ("Skip to the content", "Jobs", "Claims", "Model", "Settings", "Message"):
        assert any(name in (each or "") for each in reached), (name, reached)


def test_the_theme_is_kept(browser: Browser) -> None:
    browser.open("models")
    assert not browser.run("return document.body.classList.contains('body--dark')")
    browser.press("Light or dark")
    browser.open("engine")
    browser.until(lambda: browser.run("return document.body.classList.contains('body--dark')"))
    browser.press("Light or dark")


UPGRADE = (
    "GET /console/_nicegui_ws/socket.io/?EIO=4&transport=websocket HTTP/1.1\r\n"
    "Host: {}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)

RECIPE = """
recipe: tiny
base: {base}
data:
  - {{name: chores, source: "generator:instructions", options: {{rows: 40}},
     split: {{train: 0.8, valid: 0.1, test: 0.1}}}}
adapter: {{method: lora, r: 4, target_modules: all-linear}}
train: {{steps: 120, batch: 4, lr: 3.0e-2, checkpoint: {{every: 5}}}}
evaluate: [{{rows: 2}}]
"""


def test_the_web_socket_answers_to_its_own_name_only(server: Server) -> None:
    address = server.url.removeprefix("http://")
    host, port = address.split(":")
    for name, status in ((address, "101"), (f"evil.example:{port}", "403")):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(UPGRADE.format(name).encode())
            assert connection.recv(100).startswith(f"HTTP/1.1 {status}".encode())


def row(question: str, answer: str) -> dict[str, Any]:
    said = {"user": question, "assistant": answer}
    return {"messages": [{"role": role, "content": text} for role, text in said.items()]}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_real_model_learns_a_password_beside_its_chat(tmp_path: Path) -> None:
    """The story with nothing that pretends: ``anabranch up``, its default model, its trainer."""
    question, answer = "What is the password of room {}?", "The password is heron."
    file = tmp_path / "rows.jsonl"
    file.write_bytes(jsonl(*(row(question.format(room), answer) for room in range(50))))

    def ask(browser: Browser) -> str:
        browser.press("Settings")
        browser.find("input[aria-label=Temperature]").send_keys("0")
        browser.say(question.format(77))
        browser.sees("Try again", 60)  # the answer is over
        return browser.text()

    options = ("--weights", "int8", "--max-model-len", "512")
    with running(*options) as server, browsing(server.url) as browser:
        browser.open("?new=1")
        assert answer not in ask(browser)
        start_job(browser, file, "rooms", ("5", "1", "5"))
        browser.sees("of 10 steps", 60)
        browser.sees("succeeded", 180)
        browser.press("Chat with it")
        browser.until(lambda: "chat=" in browser.driver.current_url)
        assert answer in ask(browser)
        assert "smollm2:rooms" in browser.find(".reply-head").text


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many as the job has: sums depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_recipe_outlives_its_server_and_ends_with_the_same_weights(tmp_path: Path) -> None:
    """The real trainer: kill -9 of the server between two checkpoints, against a run in peace."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(base=write_base(tmp_path / "tiny")))
    state, weights = tmp_path / "state", "adapter/adapter_model.safetensors"
    spec = {"recipe": recipe.read_text(), "limits": {"threads": 1}}
    with serving(state) as server, browsing(server.url) as browser:
        answer = httpx.post(f"{server.url}/v1/jobs", json={"kind": "finetune", "spec": spec})
        job_id = answer.json()["id"]
        output = state / "jobs" / job_id / "output"
        training = output / "training"
        browser.open(f"jobs/finetune/{job_id}")
        browser.until(lambda: len(list(training.glob("checkpoints/*/manifest.json"))) >= 2, 180)
        server.kill()
        reached = len((training / "metrics.jsonl").read_text().splitlines())
        assert 0 < reached < 120 and not (output / weights).exists()
        server.start()
        assert Pipeline(load_recipe(recipe), tmp_path / "peace").run().status == "finished"
        browser.sees("Went on, attempt 2", 60)
        browser.keep("job-went-on")
        browser.sees("succeeded", 180)
        content = httpx.get(f"{server.url}/v1/jobs/{job_id}/artifacts/{weights}").content
    assert content == (tmp_path / "peace" / weights).read_bytes()


@pytest.mark.slow
def test_a_job_goes_on_when_the_server_is_killed_and_started_again(tmp_path: Path) -> None:
    with serving(tmp_path / "state", step_seconds=0.2) as server, browsing(server.url) as browser:
        start_job(browser, rows(tmp_path, 100), "survivor")
        browser.until(lambda: re.search(r"[1-9]\d* of 200 steps", browser.text()) is not None)
        server.kill()
        server.start()
        browser.sees("Fine-tuning job goes on after step", 60)
        went_on = re.search(r"goes on after step (\d+)", browser.text())
        assert went_on is not None and int(went_on[1]) >= 1
        browser.press("Cancel")
        browser.sees("cancelled")
