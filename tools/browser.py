"""The system's Chromium, headless, driven by Playwright; Playwright's own browsers are not downloaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import ConsoleMessage, Page, sync_playwright

from tools.host import ToolError

NAMES = ("chromium", "chromium-browser", "google-chrome")
TIMEOUT = 60_000  # milliseconds
# A page must not depend on what the internet answers: every name but this machine's is unknown.
OPTIONS = ("--no-sandbox", "--disable-quic", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")


@contextmanager
def open_page(url: str, width: int = 1600, height: int = 900) -> Iterator[tuple[Page, list[str]]]:
    """A page of `width` x `height` CSS pixels, and a list that grows by what its console shows in red.

    A process can have one at a time; more pages come from `page.context`.

    Raises:
        ToolError: there is no Chromium; the message says how to get it.
    """
    executable, errors = next(filter(None, map(shutil.which, NAMES)), None), []
    if executable is None:
        names = ", ".join(NAMES)
        raise ToolError(f"No browser: none of {names} is on PATH; install Chromium (Debian: apt-get install chromium).")

    def note(message: ConsoleMessage) -> None:
        if message.type in ("error", "assert"):
            errors.append(f"{message.text} {message.location['url']}".strip())

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=OPTIONS)
        page = browser.new_page(viewport={"width": width, "height": height}, locale="en")
        page.set_default_timeout(TIMEOUT)
        page.on("console", note)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        yield page, errors
        browser.close()
