"""A headless Chromium and a server to look at, for the tests that need a real browser."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nicegui", reason="the extra `console` is not installed")
pytest.importorskip("selenium", reason="selenium is not installed")

from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

ROOT = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
MISSING = "no Chromium with its driver: apt-get install chromium chromium-driver"
DESKTOP, PHONE = (1280, 860), (390, 844)


def executables() -> tuple[str, str]:
    """Browser and driver; skips without them."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip(MISSING)
    return browser, driver


class Browser:
    """One window at a server's console. Nothing but the server can be reached from it."""

    def __init__(self, url: str, size: tuple[int, int] = DESKTOP, dark: bool = False) -> None:
        browser, driver = executables()
        options = webdriver.ChromeOptions()
        options.binary_location = browser
        for argument in (
            "--headless=new",
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--disable-gpu",
            "--hide-scrollbars",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        ):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.url = url
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        self.driver.set_script_timeout(60)
        self.size(*size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def size(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1}
        mobile = {"mobile": width < 500}
        command = "Emulation.setDeviceMetricsOverride"
        self.driver.execute_cdp_cmd(command, {**metrics, **mobile})

    def open(self, page: str = "") -> None:
        self.driver.get(f"{self.url}/console/{page}")
        self.until(lambda: self.driver.execute_script("return window.did_handshake === true"))

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> WebElement:
        """The first visible element, waited for."""
        found: list[WebElement] = []

        def look() -> bool:
            every = self.driver.find_elements(By.CSS_SELECTOR, selector)
            found[:] = [element for element in every if element.is_displayed()]
            return bool(found)

        self.until(look, what=selector)
        return found[0]

    def press(self, text: str) -> None:
        """Press the visible button with this text or name."""

        def press() -> bool:
            for button in self.driver.find_elements(By.CSS_SELECTOR, "button, [role=tab], label"):
                named = text in (button.text.strip(), button.get_attribute("aria-label"))
                if named and button.is_displayed():
                    button.click()
                    return True
            return False

        self.until(press, what=f"a button {text!r}")

    def text(self) -> str:
        return str(self.run("return document.body.innerText"))

    def sees(self, text: str, seconds: float = 20.0) -> None:
        self.until(lambda: text in self.text(), seconds, what=f"the text {text!r}")

    def until(
        self, condition: Callable[[], Any], seconds: float = 20.0, what: str = "the condition"
    ) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                if condition():
                    return
            except WebDriverException:  # an element went away while it was looked at
                pass
            assert time.monotonic() < deadline, f"{what} did not come; the page:\n{self.text()}"
            time.sleep(0.05)

    def say(self, message: str) -> None:
        box = self.find("textarea[aria-label=Message]")
        box.send_keys(message + "\n")

    def foreign_requests(self) -> list[str]:
        """What the page asked of other hosts."""
        names = self.run("return performance.getEntriesByType('resource').map(e => e.name)")
        return [name for name in names if not name.startswith((self.url, "data:", "blob:"))]

    def complaints(self) -> list[str]:
        """Errors on the browser's console."""
        logs = self.driver.get_log("browser")
        return [entry["message"] for entry in logs if entry["level"] == "SEVERE"]

    def keep(self, name: str) -> None:
        """A screenshot for people, in ``$ANABRANCH_SCREENSHOTS`` if that is set."""
        if folder := os.environ.get("ANABRANCH_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.driver.save_screenshot(str(Path(folder) / f"{name}.png"))

    def close(self) -> None:
        self.driver.quit()


class Server:
    """The server of :mod:`tests.console.serving`, which can be killed and started again."""

    def __init__(self, state: Path, step_seconds: float = 0.0) -> None:
        self._state = state
        self._step_seconds = step_seconds
        self._port = 0
        self.url = ""
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.console.serving", str(self._port)]
        command += [str(self._state), str(self._step_seconds)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := re.match(r"(http://\S+:(\d+))", line):
                self.url, self._port = found[1], int(found[2])
                return
        raise AssertionError("the server ended before it listened")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def serving(state: Path, step_seconds: float = 0.0) -> Iterator[Server]:
    executables()
    server = Server(state, step_seconds)
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def browsing(url: str, size: tuple[int, int] = DESKTOP, dark: bool = False) -> Iterator[Browser]:
    browser = Browser(url, size, dark)
    try:
        yield browser
    finally:
        browser.close()
