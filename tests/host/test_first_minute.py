"""What a person meets who has just installed the pack: a fresh server, the editor's own settings, nothing prepared."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import av
import numpy as np
import pytest

from tools import frontend
from tools.browser import Browser
from tools.frontend import READY
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
def page(server):
    """The editor at 1600 x 900, as it greets somebody new: with the dialog of templates, over an empty canvas."""
    with Browser(server.url, width=1600, height=900) as browser:
        browser.wait_for(READY, seconds=180)
        yield browser


def open_template(page: Browser, name: str) -> None:
    """Choose a template as a person does; what the console says afterwards is in `page.errors`."""
    title = frontend.layout(name)["title"]
    if page.evaluate("() => window.app.graph.nodes.length > 0"):  # the greeting is gone: by the side bar
        page.click("() => [...document.querySelectorAll('button')].find((b) => /^Tem/.test(b.innerText.trim()))")
    page.click(
        "(pack) => [...document.querySelectorAll('nav *, [role=dialog] *')]"
        ".find((part) => !part.children.length && part.innerText === pack)",
        PACK_NAME,
    )
    page.wait_for("(title) => document.body.innerText.includes(title)", title)
    page.errors.clear()
    page.click('(title) => document.querySelector(`[data-testid="template-workflow-${title}"]`)', title)
    page.wait_for("(title) => window.app.extensionManager.workflow.activeWorkflow?.filename.startsWith(title)", title)
    page.wait_for("() => window.app.graph.nodes.length > 1 && !document.querySelector('[data-testid=dialog-overlay]')")


def shown(page: Browser) -> dict:
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


def only_few_views(page: Browser) -> None:
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


def press_run(page: Browser, server: Server) -> dict:
    """The finished run's outputs by node: the button is pressed, and nothing else is done."""
    before = len(history(server))
    page.evaluate("""() => {
        window.previews = 0;
        window.app.api.addEventListener('b_preview_with_metadata', () => { window.previews += 1; });
    }""")
    page.click("() => document.querySelector('[data-testid=queue-button]')")
    finished = page.wait_for(
        """async (before) => {
        const runs = Object.values(await (await fetch('/history')).json());
        return runs.length > before && runs.at(-1).status;
    }""",
        before,
        seconds=SECONDS,
    )
    assert finished["status_str"] == "success", finished["messages"]
    return history(server)[-1]["outputs"]


def frames_of(video: Path) -> list[np.ndarray]:
    with av.open(str(video)) as container:
        return [frame.to_ndarray(format="rgb24").astype(float) for frame in container.decode(video=0)]


@pytest.mark.parametrize("name", RUNS_AS_IT_OPENS)
def test_runs_as_it_opens(server, page, name):
    """Opened from the dialog: nothing red, text is drawn; Run makes the views and the video, without previews."""
    open_template(page, name)
    found = shown(page)
    assert page.errors == [] and found["faulty"] == []
    assert "missing" not in found["words"].lower(), "a warning about missing files or models"
    assert found["scale"] >= 0.6 and not found["textless"]
    assert found["muted"] == [PORTRAIT_OF_ONE_S_OWN]
    if name == "six_nodes":
        assert found["nodes"] <= 6
    only_few_views(page)
    outputs = press_run(page, server)
    page.wait_for("() => document.querySelector('video')?.readyState > 0", seconds=20)
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
    page.wait_for("() => /Execution\\s+Live preview method/.test(document.body.innerText)", seconds=20)
    page.press("Escape")
    for name in frontend.names():
        text = " ".join(frontend.layout(name)["note"]["text"])
        sentences = [sentence for sentence in text.split(". ") if "preview" in sentence.lower()]
        assert len(sentences) == 1 and "*Settings > Comfy > Execution > Live preview method*" in sentences[0], name
