"""Headless Chromium over its DevTools protocol: nothing to install but the browser.

with Browser(url) as browser:
    browser.evaluate("(a, b) => a + b", 1, 2)  # 3
    browser.screenshot(Path("page.png"))
    browser.errors                             # what the page reported since the start
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome")
START_SECONDS = 60
STOP_SECONDS = 10
# A page must not depend on what the internet answers: every name but this machine's is unknown.
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--remote-debugging-port=0",
)


class BrowserError(RuntimeError):
    """There is no browser, or the page failed; the message says what happened."""


def find_browser() -> str:
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        raise BrowserError(
            f"No browser: none of {', '.join(NAMES)} is on PATH; install Chromium (on Debian: apt-get"
            " install chromium)."
        )
    return found


class Browser:
    """One page of a headless Chromium that ends with the `with` block.

    Args:
        url: the page to open
        width, height: size of the page in CSS pixels
        language: what the page takes for the user's language

    Raises on entry:
        BrowserError: there is no Chromium, or it did not start
    """

    def __init__(self, url: str, width: int = 1600, height: int = 900, language: str = "en"):
        self.errors: list[str] = []
        self._url = url
        self._options = [*OPTIONS, f"--window-size={width},{height}", f"--lang={language}"]
        self._size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._calls = 0

    def __enter__(self) -> Browser:
        executable = find_browser()
        self._profile = tempfile.TemporaryDirectory(prefix="diffportrait3d-browser-", ignore_cleanup_errors=True)
        command = [executable, *self._options, f"--user-data-dir={self._profile.name}", "about:blank"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._loop = asyncio.new_event_loop()
        try:
            self._loop.run_until_complete(self._connect())
            for domain in ("Page", "Runtime", "Log"):
                self.call(f"{domain}.enable")
            self.call("Emulation.setDeviceMetricsOverride", **self._size)
            self.call("Page.navigate", url=self._url)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        if hasattr(self, "_session"):
            self._loop.run_until_complete(self._session.close())
        self._loop.close()
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, 9)  # its own session, so no other process is meant
            self._process.wait()
        self._profile.cleanup()

    def call(self, method: str, timeout: float = 60, **parameters) -> dict:
        """A command of the DevTools protocol (chromedevtools.github.io/devtools-protocol) and its result.

        Raises:
            BrowserError: refused, or not answered within `timeout` seconds
        """
        try:
            return self._loop.run_until_complete(asyncio.wait_for(self._call(method, parameters), timeout))
        except TimeoutError:
            raise BrowserError(f"The browser did not answer {method} within {timeout:g} s. {self._told()}") from None

    def evaluate(self, function: str, *arguments, timeout: float = 60):
        """Call a JavaScript function in the page with JSON arguments; waits for its promise, returns its JSON value.

        Raises:
            BrowserError: it threw, or did not end within `timeout` seconds
        """
        expression = f"({function})(...{json.dumps(arguments)})"
        answer = self.call("Runtime.evaluate", timeout, expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise BrowserError(f"The page failed: {_exception(answer['exceptionDetails'])}")
        return answer["result"].get("value")

    def wait_for(self, condition: str, *arguments, seconds: float = 60):
        """Wait until a JavaScript function returns something true; returns that.

        Raises:
            BrowserError: it did not within `seconds`
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            value = self.evaluate(condition, *arguments)
            if value:
                return value
            time.sleep(0.1)
        raise BrowserError(f"Still not so after {seconds:g} s: {condition} {arguments or ''}. {self._told()}")

    def click(self, find: str, *arguments, seconds: float = 60) -> None:
        """Press the left button on the element that a JavaScript function finds, once it stands still, uncovered.

        Raises:
            BrowserError: there was no such element within `seconds`
        """
        centre = f"""async (...all) => {{
            const place = () => {{
                const found = ({find})(...all);
                found?.scrollIntoView({{ block: 'nearest' }});
                const box = found?.getBoundingClientRect();
                if (!box?.width) return null;
                const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
                const top = document.elementFromPoint(x, y);
                return found.contains(top) || top?.contains(found) ? [x, y] : null;
            }};
            const before = place();
            await new Promise((resolve) => setTimeout(resolve, 300));
            const after = place();
            return before && after && before.every((value, axis) => value === after[axis]) && after;
        }}"""
        self.click_at(*self.wait_for(centre, *arguments, seconds=seconds))

    def click_at(self, x: float, y: float) -> None:
        """Press the left button at a place on the page, in CSS pixels."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for event in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=event, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Type into the element that has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """Press and release a key by its name, e.g. Escape."""
        for event in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=event, key=key, code=key)

    def resize(self, width: int, height: int) -> None:
        """Give the page another size in CSS pixels."""
        self._size |= {"width": width, "height": height}
        self.call("Emulation.setDeviceMetricsOverride", **self._size)

    def screenshot(self, path: Path) -> None:
        """Save the page as it looks: PNG, or JPEG by the file's suffix."""
        kind = "jpeg" if path.suffix in (".jpg", ".jpeg") else "png"
        answer = self.call("Page.captureScreenshot", format=kind)
        part = path.with_name(path.name + ".part")
        part.write_bytes(base64.b64decode(answer["data"]))
        os.replace(part, path)

    def _told(self) -> str:
        return f"The page reported: {'; '.join(self.errors[-3:])}." if self.errors else "The page reported no error."

    async def _connect(self) -> None:
        port_file = Path(self._profile.name) / "DevToolsActivePort"  # appears when the browser listens
        deadline = time.monotonic() + START_SECONDS
        while not (port_file.is_file() and port_file.read_text().count("\n")):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise BrowserError(
                    f"Chromium did not start (exit code {self._process.poll()}): run `{find_browser()}"
                    " --headless=new --no-sandbox about:blank` to see why."
                )
            await asyncio.sleep(0.1)
        self._session = aiohttp.ClientSession(f"http://127.0.0.1:{port_file.read_text().split()[0]}")
        async with self._session.get("/json/list") as response:
            [page] = [target for target in await response.json() if target["type"] == "page"]
        self._socket = await self._session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)

    async def _call(self, method: str, parameters: dict) -> dict:
        self._calls += 1
        number = self._calls
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive()
            if message.type != aiohttp.WSMsgType.TEXT:
                raise BrowserError(f"The browser ended during {method}. {self._told()}")
            answer = json.loads(message.data)
            if answer.get("id") != number:
                self._note(answer.get("method"), answer.get("params", {}))
            elif "error" in answer:
                raise BrowserError(f"The browser refused {method}: {answer['error']['message']}")
            else:
                return answer["result"]

    def _note(self, event: str | None, data: dict) -> None:
        """Keep what a person would see in red in the page's console."""
        if event == "Runtime.exceptionThrown":
            self.errors.append(_exception(data["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and data["type"] in ("error", "assert"):
            self.errors.append(" ".join(str(part.get("value", part.get("description"))) for part in data["args"]))
        elif event == "Log.entryAdded" and data["entry"]["level"] == "error":
            self.errors.append(f"{data['entry']['text']} {data['entry'].get('url', '')}".strip())


def _exception(details: dict) -> str:
    return details.get("exception", {}).get("description") or details["text"]
