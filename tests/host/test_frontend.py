"""ComfyUI's own editor, in headless Chromium, with this pack: examples, previews, errors, help, languages."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import shutil
import urllib.parse
import urllib.request
from datetime import datetime
from pathlib import Path

import pytest

from diffportrait3d.pipeline import PRESETS
from tools import frontend, help_pages, locales
from tools.frontend import open_editor
from tools.host import PACK_NAME
from tools.server import Server

# Nodes of the turntable and of many_views_to_3d.
SAMPLER, NOVEL_VIEW, TRAJECTORY, SAVE_VIEWS, GRID, REFERENCE_VIEW = "12", "10", "3", "14", "14", "19"
STEPS, VIEWS = 3, 4


@pytest.fixture(scope="module")
def server():
    with Server(cpu=True) as running:
        frontend.prepare(running, [frontend.prompt(name) for name in frontend.names()])
        yield running


@pytest.fixture(scope="module")
def editor(server):
    with open_editor(server) as opened:
        yield opened


@pytest.fixture(scope="module")
def nodes(server):
    return json.loads(fetch(server, "/object_info")[1])


def default_of(node: dict, name: str):
    """What an input is where nobody says anything."""
    kind, options = (node["input"].get("optional", {}) | node["input"]["required"])[name]
    return options.get("default", options["options"][0] if kind == "COMBO" else None)


def fetch(server, path: str):
    with urllib.request.urlopen(f"{server.url}{path}") as response:
        return response.headers.get_content_type(), response.read()


def set_widgets(editor, node_id: str, **values) -> None:
    editor.page.evaluate(
        """([id, values]) => {
        const { widgets } = window.app.graph.getNodeById(Number(id));
        for (const name in values) widgets.find((widget) => widget.name === name).value = values[name];
    }""",
        [node_id, values],
    )


def outlined(editor) -> list[str]:
    """Ids of the nodes that the editor marks as faulty."""
    faulty = "window.app.graph.nodes.filter((node) => node.has_errors).map(({ id }) => String(id))"
    return editor.page.evaluate(faulty)


def flat(prompt: dict) -> dict:
    """What is queued, with the nodes of a subgraph under their own numbers: "20:12" -> "12"."""
    own = {node_id: node_id.split(":")[-1] for node_id in prompt}
    assert len(set(own.values())) == len(own)

    def value(given):
        return [own[given[0]], given[1]] if isinstance(given, list) else given

    return {
        own[node_id]: {**node, "inputs": {name: value(given) for name, given in node["inputs"].items()}}
        for node_id, node in prompt.items()
    }


@pytest.mark.parametrize("name", frontend.names())
def test_example_opens(editor, nodes, name):
    """No missing node, nothing red in the console, and what would be queued is what the API form says."""
    editor.errors.clear()
    editor.open(frontend.template(name))
    assert editor.errors == [] and outlined(editor) == []
    queued, wanted = flat(editor.ask("prompt")), frontend.prompt(name)
    assert sorted(queued) == sorted(wanted)
    for node_id, node in wanted.items():
        assert queued[node_id]["class_type"] == node["class_type"]
        unsaid = {key: value for key, value in queued[node_id]["inputs"].items() if key not in node["inputs"]}
        assert queued[node_id]["inputs"] == node["inputs"] | unsaid, f"node {node_id}"
        whole = {key for key in unsaid if "." not in key}  # the rest is what a newer host asks about a choice
        if node["class_type"] == "Load3D":
            continue  # its buttons, and what its viewport shows
        assert {key: unsaid[key] for key in whole} == {key: default_of(nodes[node["class_type"]], key) for key in whole}


@pytest.mark.parametrize("size", [(1920, 1080), (1600, 900)])
@pytest.mark.parametrize("name", frontend.names())
def test_text_is_drawn_where_a_template_opens(editor, name, size):
    """The editor leaves text out below a zoom of 8/14; every node lies inside the page and no node on another."""
    editor.page.set_viewport_size({"width": size[0], "height": size[1]})
    editor.page.wait_for_function("(width) => window.app.canvas.canvas.width === width", arg=size[0])
    editor.open(frontend.template(name))
    scale, without_text = editor.page.evaluate("() => [window.app.canvas.ds.scale, window.app.canvas.low_quality]")
    assert scale >= 0.6 and not without_text
    boxes = editor.ask("boxes")
    for title, (left, top, right, bottom) in boxes.items():
        assert left >= 0 and top >= 0 and right <= size[0] and bottom <= size[1], title
    for (title, one), (other, two) in itertools.combinations(boxes.items(), 2):
        apart = one[2] <= two[0] or two[2] <= one[0] or one[3] <= two[1] or two[3] <= one[1]
        assert apart, f"{title} and {other}"


def test_subgraph_opens_readable(editor):
    """What is inside the six nodes' subgraph can be looked at and says what it is."""
    editor.open(frontend.template("six_nodes"))
    inside, scale = editor.page.evaluate("""async () => {
        const { canvas, graph } = window.app;
        const node = graph.nodes.find((candidate) => candidate.isSubgraphNode?.());
        canvas.openSubgraph(node.subgraph, node);
        await new Promise((resolve) => setTimeout(resolve, 1000));
        return [canvas.graph.nodes.map(({ type }) => type), canvas.low_quality ? 0 : canvas.ds.scale];
    }""")
    assert "DP3D_ViewConsistencySampler" in inside and len(inside) > 6 and scale >= 0.6


def test_blueprint_is_in_the_library_and_can_be_added(editor):
    """From the side bar's search to a node on an empty canvas, with the same nodes inside as in the template."""
    [file] = sorted(frontend.BLUEPRINTS.glob("*.json"))
    assert file == frontend.blueprint("six_nodes")
    page = editor.page
    page.evaluate("() => window.app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    library = page.locator("button").filter(has_text=re.compile(r"^\s*Nodes\s*$"))
    library.click()
    page.get_by_placeholder(re.compile("^Search")).first.fill(file.stem)
    page.locator("span").get_by_text(file.stem, exact=True).first.click()
    page.mouse.click(1000, 400)
    page.wait_for_function("() => window.app.graph.nodes.length === 1")
    inputs, inside = page.evaluate("""() => {
        const [node] = window.app.graph.nodes;
        return [node.inputs.map(({ label, name }) => label ?? name), node.subgraph.nodes.map(({ id }) => id)];
    }""")
    assert {"model", "vae", "portrait", "cameras", "prompt", "seed", "preset"} <= set(inputs)
    assert len(inside) == len(frontend.prompt("six_nodes")) - 3, "all but the loader, the cameras and the saving"
    library.click()


def shown_images(editor, node_id: str) -> int:
    """How many images a node shows, once there are any."""
    count = "(id) => window.app.graph.getNodeById(Number(id)).imgs?.length"
    return editor.page.wait_for_function(count, arg=node_id, timeout=10_000).json_value()


def test_miniature_runs_and_shows_its_views(editor, tmp_path):
    """Previews arrive for the sampler at every step; the saved views stand on their node."""
    editor.open(frontend.template("turntable"))
    set_widgets(editor, SAMPLER, preset="custom", steps=STEPS)
    set_widgets(editor, TRAJECTORY, views=VIEWS)
    editor.errors.clear()
    told = editor.run(120)
    assert told["error"] is None and told["node_errors"] == {} and editor.errors == []
    assert told["previews"][SAMPLER] >= STEPS and told["progress"][SAMPLER] >= STEPS
    assert SAVE_VIEWS in told["outputs"] and shown_images(editor, SAVE_VIEWS) == VIEWS
    editor.page.screenshot(path=tmp_path / "views.png")


def test_windows_show_previews_and_are_exported(editor, server):
    """More views than a window holds: previews as before; grid, video and the folder for 3D reconstruction."""
    editor.open(frontend.template("many_views_to_3d"))
    set_widgets(editor, SAMPLER, preset="custom", steps=2, window_size=4, overlap=2)
    set_widgets(editor, TRAJECTORY, views=6)
    told = editor.run(120)
    assert told["error"] is None and told["node_errors"] == {}
    assert told["previews"][SAMPLER] >= 2 and shown_images(editor, GRID) == 1
    assert told["progress"][SAMPLER] > 2 + 1, "the bar moves with every window, not only with every step"
    [folder] = (server.base_directory / "output/views").iterdir()
    assert len(list((folder / "images").iterdir())) == 6 and (folder / "transforms.json").is_file()
    assert list((server.base_directory / "output/diffportrait3d").glob("orbit*.mp4"))


def test_names_of_saved_files_are_filled_in(editor):
    """What the editor does for Save Image it does for our nodes that save: dates, and widgets of other nodes."""
    editor.open(frontend.template("many_views_to_3d"))
    queued = editor.page.evaluate("""async () => {
        const { graph } = window.app;
        const [node] = graph.nodes.filter(({ type }) => type === 'DP3D_ExportViews');
        const save = window.LiteGraph.createNode('DP3D_SaveCameras');
        graph.add(save);
        const prefix = '%date:yyyy%/%DP3D_CameraTrajectory.kind%_%width%';
        for (const { widgets } of [node, save]) widgets.find(({ name }) => name === 'filename_prefix').value = prefix;
        const { output } = await window.app.graphToPrompt();
        return [node, save].map(({ id }) => output[id].inputs.filename_prefix);
    }""")
    kind = next(
        node["inputs"]["kind"]
        for node in frontend.prompt("many_views_to_3d").values()
        if node["class_type"] == "DP3D_CameraTrajectory"
    )
    assert queued == [f"{datetime.now().year}/{kind}_%width%"] * 2


def test_reference_view_follows_its_numbers(editor):
    """A picture on the node as soon as it is loaded, and a new one when a number changes, without a run."""
    editor.open(frontend.template("many_views_to_3d"))
    assert shown_images(editor, REFERENCE_VIEW) == 1
    seen = editor.page.evaluate(
        """(id) => new Promise((resolve) => {
        const { api, graph } = window.app;
        const drawn = ({ detail }) => resolve({ id: String(detail.nodeId), bytes: detail.blob.size });
        api.addEventListener('b_preview_with_metadata', drawn, { once: true });
        const yaw = graph.getNodeById(Number(id)).widgets.find((widget) => widget.name === 'yaw');
        yaw.value = 20;
        yaw.callback(20);
    })""",
        REFERENCE_VIEW,
    )
    assert seen["id"] == REFERENCE_VIEW and seen["bytes"] > 1000


def test_late_picture_is_not_shown_in_another_graph(editor):
    """The other graph has a node of the same number, and that one is no Reference View."""
    editor.open(frontend.template("many_views_to_3d"))
    assert shown_images(editor, REFERENCE_VIEW) == 1
    other = json.loads(frontend.template("with_another_controlnet").read_text(encoding="utf-8"))
    assert {str(node["id"]): node["type"] for node in other["nodes"]}[REFERENCE_VIEW] == "ControlNetLoader"
    shown = editor.page.evaluate(
        """async ([id, other]) => {
        const { app } = window;
        let answers = 0;
        const count = new PerformanceObserver((list) => {
            answers += list.getEntries().filter(({ name }) => name.endsWith('reference_view')).length;
        });
        count.observe({ entryTypes: ['resource'] });
        app.graph.getNodeById(Number(id)).widgets.find((widget) => widget.name === 'yaw').callback(20);
        await app.loadGraphData(other, true, true, 'workflow');
        while (!answers) await new Promise((resolve) => setTimeout(resolve, 50));
        await new Promise((resolve) => setTimeout(resolve, 500));
        app.canvas.draw(true, true);
        return app.graph.getNodeById(Number(id)).imgs?.length ?? 0;
    }""",
        [REFERENCE_VIEW, other],
    )
    assert shown == 0


SCHEDULE_WIDGETS = ("steps", "eta")
GUIDED_WIDGETS = ("guided_start_percent", "guided_end_percent")


def schedule_widgets(
    editor, node_id: str, preset: str | None = None, names: tuple[str, ...] = SCHEDULE_WIDGETS
) -> list:
    """[numbers of widgets, whether they are greyed] of a node, after a choice of `preset` as a person makes it."""
    return editor.page.evaluate(
        """([id, preset, names]) => {
        const widget = (name) => window.app.graph.getNodeById(Number(id)).widgets.find((each) => each.name === name);
        if (preset) {
            widget('preset').value = preset;
            widget('preset').callback(preset);
        }
        const numbers = names.map(widget);
        return [...numbers.map(({ value }) => value), numbers.every(({ disabled }) => disabled)];
    }""",
        [node_id, preset, names],
    )


def test_presets_show_what_they_take(editor):
    """A preset's numbers stand on the node, greyed; the person's own come back with custom. Saved graphs likewise."""
    editor.open(frontend.template("turntable"))
    assert schedule_widgets(editor, SAMPLER) == [8, 0, True], "as the template is saved"
    schedule_widgets(editor, SAMPLER, "custom")
    set_widgets(editor, SAMPLER, steps=25, eta=0.25)
    assert schedule_widgets(editor, SAMPLER) == [25, 0.25, False]
    assert schedule_widgets(editor, SAMPLER, "paper") == [100, 0.5, True]
    assert schedule_widgets(editor, SAMPLER, "fast") == [8, 0, True]
    assert schedule_widgets(editor, SAMPLER, "custom") == [25, 0.25, False]
    set_widgets(editor, SAMPLER, guided_start_percent=0.25)
    assert schedule_widgets(editor, SAMPLER, "faster", GUIDED_WIDGETS) == [0, 0.5, True]
    assert schedule_widgets(editor, SAMPLER) == [PRESETS["faster"].steps, 0, True]
    assert schedule_widgets(editor, SAMPLER, "release", GUIDED_WIDGETS) == [0.25, 1, False], "the person's own"
    schedule_widgets(editor, SAMPLER, "faster")
    editor.page.evaluate("() => window.app.loadGraphData(window.app.graph.serialize(), true, true, 'workflow')")
    assert schedule_widgets(editor, SAMPLER, names=GUIDED_WIDGETS) == [0, 0.5, True]
    assert schedule_widgets(editor, SAMPLER, "fast", GUIDED_WIDGETS) == [0, 1, False], "what was shown is nobody's own"
    released = json.loads(frontend.template("released_weights").read_text(encoding="utf-8"))
    [sampler] = [node for node in released["nodes"] if node["type"] == "DP3D_ViewConsistencySampler"]
    place = sampler["widgets_values"].index("release")
    sampler["widgets_values"][place : place + 2] = ["paper", 7]  # saved before the numbers followed
    editor.page.evaluate("(graph) => window.app.loadGraphData(graph, true, true, 'workflow')", released)
    assert schedule_widgets(editor, str(sampler["id"])) == [100, 0.5, True]


def test_refused_input_shows_on_its_node(editor):
    """A file that is not there: the host refuses the graph and the editor marks the loader, nothing else."""
    editor.open(frontend.template("turntable"))
    set_widgets(editor, NOVEL_VIEW, name="absent.safetensors")
    told = editor.run(60)
    assert list(told["node_errors"]) == [NOVEL_VIEW] and told["outputs"] == []
    assert "absent.safetensors" in json.dumps(told["node_errors"][NOVEL_VIEW])
    assert outlined(editor) == [NOVEL_VIEW]


def test_failing_node_is_named(editor):
    """An error while running carries the id of its node and one sentence; the next good run goes through."""
    editor.open(frontend.template("turntable"))
    set_widgets(editor, SAMPLER, preset="custom", steps=1)
    set_widgets(editor, TRAJECTORY, views=2, kind="keyframes", keyframes="ten degrees")
    told = editor.run(60)
    assert told["error"]["node_id"] == TRAJECTORY and told["error"]["node_type"] == "DP3D_CameraTrajectory"
    assert "ten" in told["error"]["exception_message"]
    set_widgets(editor, TRAJECTORY, kind="arc")
    assert editor.run(120)["error"] is None


def test_node_info_shows_the_help_page(editor):
    editor.open(frontend.template("turntable"))
    editor.page.evaluate("(id) => window.app.canvas.selectNode(window.app.graph.getNodeById(Number(id)))", SAMPLER)
    editor.page.get_by_test_id("info-button").click()
    help_page = editor.page.locator(".node-help-content")
    help_page.locator("table").first.wait_for()
    shown = help_page.inner_text()
    assert "View-Consistency Sampler" in shown and "Errors and ways out" in shown and "window_size" in shown


def test_every_help_page_is_served(server):
    for page in help_pages.FOLDER.glob("*.md"):
        kind, page = fetch(server, f"/extensions/{PACK_NAME}/docs/{page.name}")
        assert kind != "text/html" and page.startswith(b"# ")  # the editor takes HTML for a missing page


def test_every_language_is_served(server):
    served = json.loads(fetch(server, "/i18n")[1])
    for language in ("en", *locales.LANGUAGES):
        assert served[language]["nodeDefs"] == locales.read_locale(language)


def test_every_template_is_served_with_its_thumbnail(server):
    """Under a title that is a sentence: the editor shows the file's name as title and as description."""
    titles = sorted((frontend.layout(name)["title"] for name in frontend.names()), key=lambda t: int(t.split()[0]))
    assert set(json.loads(fetch(server, "/workflow_templates")[1])[PACK_NAME]) == set(titles)
    for number, title in enumerate(titles, start=1):
        assert re.fullmatch(rf"{number} [A-Z][a-z]+( [\w.]+){{5,}}", title), title
        address = f"/api/workflow_templates/{PACK_NAME}/{urllib.parse.quote(title)}"
        assert json.loads(fetch(server, f"{address}.json")[1])["nodes"]
        kind, thumbnail = fetch(server, f"{address}.jpg")
        assert kind == "image/jpeg" and len(thumbnail) < 100_000
    assert {path.stem for path in frontend.WORKFLOWS.glob("*.jpg")} == set(titles)


ALIGN = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "portrait.png"}},
    "2": {"class_type": "DP3D_AlignPortrait", "inputs": {"image": ["1", 0], "points": ""}},
    "3": {"class_type": "PreviewImage", "inputs": {"images": ["2", 0]}},
}
FACE = [(203.5, 102), (246.5, 103.5), (223.5, 125), (202, 139.5), (245, 141)]  # of the astronaut, pixels of 512


def click_widget(editor, node_id: str, name: str) -> None:
    """A click of the mouse in the middle of a widget that is drawn on the canvas."""
    x, y = editor.page.evaluate(
        """([id, name]) => {
        const { graph, canvas } = window.app;
        const node = graph.getNodeById(Number(id));
        const widget = node.widgets.find((each) => each.name === name);
        const { offset, scale } = canvas.ds;
        const { left, top } = canvas.canvas.getBoundingClientRect();
        const middle = [node.pos[0] + node.size[0] / 2, node.pos[1] + widget.last_y + 10];
        return [(middle[0] + offset[0]) * scale + left, (middle[1] + offset[1]) * scale + top];
    }""",
        [node_id, name],
    )
    editor.page.mouse.click(x, y)


def test_a_photograph_is_aligned_by_the_mouse(editor, server, tmp_path):
    """A file chosen in Load Image's list, five points dragged on the photograph, Run: the crop is in the preview."""
    [skimage] = importlib.util.find_spec("skimage").submodule_search_locations
    page, place = editor.page, server.base_directory / "input/astronaut.png"
    shutil.copy(Path(skimage) / "data/astronaut.png", place)
    page.set_viewport_size({"width": 1600, "height": 1000})
    page.evaluate(
        """async (graph) => {
        const { app } = window;
        await app.extensionManager.command.execute('Comfy.RefreshNodeDefinitions');
        app.clean();
        await app.loadApiJson(graph, 'photograph');
        await new Promise((resolve) => setTimeout(resolve, 1000)); // the editor's own view of it, a little later
        const [load, align, preview] = [1, 2, 3].map((id) => app.graph.getNodeById(id));
        load.pos = [0, 40];
        align.pos = [340, 40];
        align.setSize([420, align.size[1]]);
        preview.pos = [820, 40];
        preview.setSize([380, 420]);
        Object.assign(app.canvas.ds, { scale: 0.9, offset: [120, 60] });
        app.canvas.draw(true, true);
    }""",
        ALIGN,
    )
    editor.errors.clear()
    points = page.locator("circle")
    page.wait_for_function("() => document.querySelectorAll('polygon[points*=\",\"]').length === 1")
    click_widget(editor, "1", "image")
    page.get_by_role("menuitem", name="astronaut.png").or_(
        page.locator(".litemenu-entry", has_text="astronaut")
    ).click()
    photograph = page.locator("img[src*='astronaut.png']").first
    photograph.wait_for()
    found = page.locator("text=/yaw -?[0-9.]+/").first
    found.wait_for()
    for point, (x, y) in zip(points.all(), FACE, strict=True):
        box, start = photograph.bounding_box(), point.bounding_box()
        page.mouse.move(start["x"] + start["width"] / 2, start["y"] + start["height"] / 2)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * x / 512, box["y"] + box["height"] * y / 512, steps=4)
        page.mouse.up()
    typed = page.evaluate("() => window.app.graph.getNodeById(2).widgets.find(({ name }) => name === 'points').value")
    numbers = [float(number) * 512 for number in re.findall(r"[\d.]+", typed)]
    assert numbers == pytest.approx([part for point in FACE for part in point], abs=2)
    page.get_by_test_id("queue-button").click()
    page.wait_for_function("() => window.app.graph.getNodeById(3).imgs?.length === 1", timeout=60_000)
    page.wait_for_timeout(500)
    page.screenshot(path=tmp_path / "aligned.png")
    yaw, pitch = (float(number) for number in re.findall(r"(?:yaw|pitch) (-?[\d.]+)", found.inner_text()))
    assert abs(yaw) < 6 and abs(pitch) < 15 and editor.errors == []
    saved = page.evaluate("() => window.app.graph.serialize().nodes.find(({ id }) => id === 2).widgets_values")
    assert saved[-1] == typed, "the image is no part of the graph"
