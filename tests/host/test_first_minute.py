"""What a person meets who has just installed the pack: a fresh server, the editor's own settings, nothing prepared."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from pathlib import Path

import av
import numpy as np
import pytest
from playwright.sync_api import Page

from tools import frontend
from tools.browser import open_page
from tools.frontend import DIALOG, READY
from tools.host import PACK_NAME
from tools.server import Server

VIEWS = 3
SECONDS = 600
RUNS_AS_IT_OPENS = ("six_nodes", "turntable", "many_views_to_3d")
PORTRAIT_OF_ONE_S_OWN = "2"


@pytest.fixture(scope="module")
def server():
    with Server(cpu=True) as running:
        folders = [running.base_directory / name for name in ("input", "user")]
        prepared = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".png", ".json")]
        assert not prepared, "no portrait, no settings"
        yield running


@pytest.fixture(scope="module")
def opened(server):
    """The editor at 1600 x 900, as it greets somebody new: with the dialog of templates, over an empty canvas."""
    with open_page(server.url, width=1600, height=900) as (page, errors):
        page.wait_for_function(READY, timeout=180_000)
        yield page, errors


@pytest.fixture(scope="module")
def page(opened):
    return opened[0]


def open_template(page: Page, errors: list[str], name: str) -> None:
    """Choose a template as a person does; what the console says afterwards is in `errors`."""
    title = frontend.layout(name)["title"]
    if page.evaluate("window.app.graph.nodes.length > 0"):  # the greeting is gone: by the side bar
        page.locator("button").filter(has_text=re.compile(r"^\s*Tem")).click()
    page.locator("nav, [role=dialog]").get_by_text(PACK_NAME, exact=True).first.click()
    card = page.get_by_test_id(f"template-workflow-{title}")
    card.wait_for()
    errors.clear()
    card.click()
    active = "(title) => window.app.extensionManager.workflow.activeWorkflow?.filename.startsWith(title)"
    page.wait_for_function(active, arg=title)
    page.wait_for_function("window.app.graph.nodes.length > 1")
    page.locator(DIALOG).wait_for(state="detached")


def shown(page: Page) -> dict:
    """What the editor shows of the graph."""
    return page.evaluate("""async () => {
        await new Promise((resolve) => setTimeout(resolve, 2000)); // warnings come late
        const { canvas, graph } = window.app;
        return {
            scale: canvas.ds.scale, textless: canvas.low_quality, nodes: graph.nodes.length,
            faulty: graph.nodes.filter((node) => node.has_errors).map(({ title }) => title),
            muted: graph.nodes.filter(({ mode }) => mode === 2).map(({ id }) => String(id)),
            words: document.body.innerText,
        };
    }""")


def only_few_views(page: Page) -> None:
    """The one thing changed, so that the test does not take minutes."""
    page.evaluate(
        """(views) => {
        const widgets = window.app.graph.nodes.flatMap((node) => node.widgets ?? []);
        widgets.find(({ name }) => name === 'views').value = views;
    }""",
        VIEWS,
    )


def history(server: Server) -> list[dict]:
    with urllib.request.urlopen(f"{server.url}/history") as response:
        return list(json.load(response).values())


def press_run(page: Page, server: Server) -> dict:
    """The finished run's outputs by node: the button is pressed, and nothing else is done."""
    before = len(history(server))
    page.evaluate("""() => {
        window.previews = 0;
        window.app.api.addEventListener('b_preview_with_metadata', () => { window.previews += 1; });
    }""")
    page.get_by_test_id("queue-button").click()
    deadline = time.monotonic() + SECONDS
    while len(history(server)) == before and time.monotonic() < deadline:
        page.wait_for_timeout(500)
    finished = history(server)[before]
    assert finished["status"]["status_str"] == "success", finished["status"]["messages"]
    return finished["outputs"]


def frames_of(video: Path) -> list[np.ndarray]:
    with av.open(str(video)) as container:
        return [frame.to_ndarray(format="rgb24").astype(float) for frame in container.decode(video=0)]


@pytest.mark.parametrize("name", RUNS_AS_IT_OPENS)
def test_runs_as_it_opens(server, opened, name):
    """Opened from the dialog: nothing red, text is drawn; Run makes the views and the video, without previews."""
    page, errors = opened
    open_template(page, errors, name)
    found = shown(page)
    assert errors == [] and found["faulty"] == []
    assert "missing" not in found["words"].lower(), "a warning about missing files or models"
    assert found["scale"] >= 0.6 and not found["textless"]
    assert found["muted"] == [PORTRAIT_OF_ONE_S_OWN]
    if name == "six_nodes":
        assert found["nodes"] <= 6
    only_few_views(page)
    outputs = press_run(page, server)
    page.wait_for_function("document.querySelector('video')?.readyState > 0", timeout=20_000)
    live = page.evaluate("() => window.previews")
    if name != "many_views_to_3d":  # there, Reference View draws while its numbers change
        assert live == 0, "previews are off by default, and no node has room kept for them"
    [file] = [
        entry for output in outputs.values() for entry in output.get("images", ()) if entry["filename"].endswith(".mp4")
    ]
    frames = frames_of(server.base_directory / "output" / file["subfolder"] / file["filename"])
    if name == "many_views_to_3d":
        return  # a closed orbit goes round, not back
    assert len(frames) == 2 * VIEWS - 2, "there and back, without showing either end twice"
    there, back = frames[1], frames[-1]
    assert np.abs(there - back).mean() < 0.2 * np.abs(frames[0] - frames[VIEWS - 1]).mean()


def test_notes_say_where_previews_are_turned_on(page):
    """The host's default is off, so no note promises any; each names the setting as the settings' dialog does."""
    page.evaluate("() => window.app.extensionManager.command.execute('Comfy.ShowSettingsDialog')")
    page.wait_for_function("/Execution\\s+Live preview method/.test(document.body.innerText)", timeout=20_000)
    page.keyboard.press("Escape")
    for name in frontend.names():
        text = " ".join(frontend.layout(name)["note"]["text"])
        sentences = [sentence for sentence in text.split(". ") if "preview" in sentence.lower()]
        assert len(sentences) == 1 and "*Settings > Comfy > Execution > Live preview method*" in sentences[0], name
