"""`make demo` against the real server, over real HTTP and websocket, with a small workflow of stock nodes."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import psutil
import pytest
from PIL import Image

from diffportrait3d.weights.files import read_metadata
from tools import client, demo
from tools.client import Client
from tools.host import PACK, ToolError
from tools.server import Server

VIEWS = 3
WORKFLOW = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "portrait.png"}},
    "2": {"class_type": "RepeatImageBatch", "inputs": {"image": ["1", 0], "amount": VIEWS}},
    "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "views"}},
    "4": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "one"}},
}


@pytest.fixture(scope="module")
def server():
    with Server(cpu=True) as running:
        yield running


@pytest.fixture
def portrait(tmp_path):
    path = tmp_path / "face.png"
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def _changed(**nodes):
    return {**WORKFLOW, **nodes}


def test_views_come_back_bit_for_bit(server, portrait):
    run = Client(server).run(WORKFLOW, {"1": portrait})
    assert demo.choose_views(WORKFLOW, run) == "3"
    assert len(run.images["3"]) == VIEWS and len(run.images["4"]) == 1
    expected = np.asarray(Image.open(portrait))
    for data in run.images["3"]:
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), expected)
    assert set(run.seconds) <= set(WORKFLOW) and "3" in run.seconds


def test_pack_is_there_over_http(server):
    """The server loaded this pack, and it alone."""
    with urllib.request.urlopen(f"{server.url}/object_info") as response:
        nodes = json.load(response)
    modules = {node["python_module"] for node in nodes.values() if node["python_module"].startswith("custom_nodes.")}
    assert modules == {"custom_nodes.ComfyUI-DiffPortrait3D"}


def test_shipped_workflow_with_the_shipped_miniature(server):
    """Few views in two steps; everything else is what `make demo` runs, at the size that the weights' files say."""
    prompt = demo.load_workflow(demo.WORKFLOW)
    [sampler] = [node for node in prompt.values() if node["class_type"] == "DP3D_ViewConsistencySampler"]
    [cameras] = [node for node in prompt.values() if node["class_type"] == "DP3D_CameraTrajectory"]
    sampler["inputs"] |= {"preset": "custom", "steps": 2}
    cameras["inputs"]["views"] = VIEWS
    uploads = {demo.portrait_node(prompt): demo.PORTRAIT}
    uses = [name for node in prompt.values() for name, wire in node["inputs"].items() if wire == ["portrait", 0]]
    assert uses == ["image", "image"], "F_ref and S both read the portrait that is given, not the miniature's own"
    run = Client(server).run(prompt, uploads)
    views = [np.asarray(Image.open(io.BytesIO(data))) for data in run.images[demo.choose_views(prompt, run)]]
    side = read_metadata(PACK / "weights/miniature/autoencoder.safetensors")["image_size"]
    assert len(views) == VIEWS and {view.shape for view in views} == {(side, side, 3)}
    assert all(view.std() > 5 for view in views), "a view is flat"
    assert len({view.tobytes() for view in views}) == VIEWS


@pytest.mark.parametrize(
    ("workflow", "message"),
    [
        (_changed(**{"2": {"class_type": "NoSuchNode", "inputs": {}}}), "NoSuchNode"),
        (
            _changed(**{"4": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x"}}}),
            "refused SaveImage: Required input is missing: images",
        ),
        (
            _changed(
                **{
                    "5": {
                        "class_type": "CheckpointLoaderSimple",
                        "inputs": {"ckpt_name": "absent.safetensors"},
                        "_meta": {"title": "Base model"},
                    },
                    "6": {"class_type": "PreviewAny", "inputs": {"source": ["5", 0]}},
                }
            ),
            "refused Base model: Value not in list: .*absent.safetensors.*make miniature",
        ),
    ],
)
def test_refused_workflow_is_one_sentence(server, portrait, workflow, message):
    with pytest.raises(ToolError, match=message) as caught:
        Client(server).run(workflow, {"1": portrait})
    assert "\n" not in str(caught.value)


def test_progress_is_one_line_that_moves(capsys):
    """Whatever the number of ticks and rounds; another node begins another line."""
    bar = None
    for label, total in (("Sampler", 25), ("Sampler", 8), ("VAE Decode", 4)):
        for value in range(1, total + 1):
            bar = client._advance(bar, label, value, total)
    client._close(bar)
    lines = capsys.readouterr().err.rstrip("\n").split("\n")
    assert [line.rsplit("\r", 1)[-1].split(":")[0] for line in lines] == ["Sampler", "VAE Decode"]
    assert "8/8" in lines[0] and "4/4" in lines[1]


def test_failing_node_is_named_and_the_server_goes_on(server, tmp_path, portrait):
    text = tmp_path / "text.png"
    text.write_text("not an image")
    with pytest.raises(ToolError, match="LoadImage failed: .*text.png"):
        Client(server).run(WORKFLOW, {"1": text})
    assert Client(server).run(WORKFLOW, {"1": portrait}).images["4"]


def test_server_that_cannot_start_shows_its_last_words():
    with pytest.raises(ToolError, match="no-such-option"):
        with Server(cpu=True, options=("--no-such-option",)):
            pass


def _demo(tmp_path, *arguments, workflow=WORKFLOW):
    (tmp_path / "workflow.json").write_text(json.dumps(workflow))
    return [
        sys.executable,
        "-m",
        "tools.demo",
        "--workflow",
        str(tmp_path / "workflow.json"),
        "--outputs",
        str(tmp_path / "outputs"),
        *arguments,
    ]


def test_command_writes_everything_and_stops_the_server(tmp_path, portrait):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = _demo(tmp_path, "--portrait", str(portrait), "--port", str(port))
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "rendered heads" in done.stdout and f"{VIEWS} views in" in done.stdout
    [folder] = (tmp_path / "outputs").iterdir()
    names = {path.name for path in folder.iterdir()}
    assert names == {"grid.png", "turntable.webp", "turntable.gif", *(f"view_{i:02d}.png" for i in range(VIEWS))}
    assert str(folder) in done.stdout
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0, "the server still listens"


def test_a_transparent_portrait_on_its_side_is_shown_upright_on_white(tmp_path):
    """The host's own Load Image would show the colour under the transparency."""
    path, exif = tmp_path / "cut-out.png", Image.Exif()
    exif[0x0112] = 6
    stored = Image.new("RGBA", (24, 16), (255, 0, 255, 0))
    stored.paste((0, 0, 200, 255), (12, 0, 24, 16))
    stored.save(path, exif=exif)
    done = subprocess.run(_demo(tmp_path, "--portrait", str(path)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "cut-out.png: transparent areas are filled with white" in done.stdout
    [folder] = (tmp_path / "outputs").iterdir()
    upright = np.full((24, 16, 3), 255)
    upright[12:] = (0, 0, 200)
    assert np.array_equal(np.asarray(Image.open(folder / "view_00.png")), upright)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_stops_the_server_when_it_is_stopped(tmp_path, portrait, number):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = _demo(tmp_path, "--portrait", str(portrait), "--port", str(port))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not _children(process.pid):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    [child] = _children(process.pid)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 128 + number
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert not (tmp_path / "outputs").exists()


def _children(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children()]


def test_port_in_use_is_one_sentence(tmp_path, portrait, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ToolError, match=f"Port {port} cannot be used .*PORT=number"):
            Server(port).__enter__()


@pytest.mark.parametrize(
    ("portrait_file", "content", "message"),
    [
        ("absent.png", None, "There is no portrait"),
        ("text.png", b"text", "not a readable image"),
    ],
)
def test_bad_portrait_stops_before_the_server(tmp_path, portrait_file, content, message, capsys):
    path = tmp_path / portrait_file
    if content is not None:
        path.write_bytes(content)
    assert demo.main(_demo(tmp_path, "--portrait", str(path))[3:]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("Error: ") and message in printed.err and str(path) in printed.err
    assert "Starting ComfyUI" not in printed.out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "There is no workflow"),
        ("{", "is not JSON"),
        ('{"nodes": []}', "not in API format"),
        ("{}", "not in API format"),
        ('{"1": {"class_type": "SaveImage", "inputs": {}}}', "0 LoadImage nodes"),
    ],
)
def test_bad_workflow_is_refused(tmp_path, text, message):
    path = tmp_path / "workflow.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ToolError, match=message):
        demo.portrait_node(demo.load_workflow(path))


def test_results_show_every_view_in_order(tmp_path):
    """Grid cells and animation frames are the views; the arc is played to its end and back."""
    count, size = 16, 16
    views = [Image.new("RGB", (size, size), (index * 16, 255 - index * 16, 128)) for index in range(count)]
    files = []
    for view in views:
        buffer = io.BytesIO()
        view.save(buffer, "PNG")
        files.append(buffer.getvalue())
    demo.write_results(tmp_path / "out", Image.new("RGB", (40, 40), "red"), files)
    grid = Image.open(tmp_path / "out" / "grid.png")
    assert grid.size == (2 * size + 8 * size, 2 * size) and grid.getpixel((0, 0)) == (255, 0, 0)
    for index in range(count):
        corner = (2 * size + index % 8 * size, index // 8 * size)
        assert grid.getpixel(corner) == views[index].getpixel((0, 0))
        assert (tmp_path / "out" / f"view_{index:02d}.png").read_bytes() == files[index]
    with Image.open(tmp_path / "out" / "turntable.webp") as animation:
        assert animation.n_frames == 2 * count - 2
        reds = []
        for frame in range(animation.n_frames):
            animation.seek(frame)
            reds.append(animation.convert("RGB").getpixel((8, 8))[0])
    expected = [index * 16 for index in [*range(count), *range(count - 2, 0, -1)]]
    assert np.abs(np.subtract(reds, expected)).max() <= 6
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_failed_results_leave_nothing(tmp_path):
    with pytest.raises(OSError):
        demo.write_results(tmp_path / "out", Image.new("RGB", (8, 8)), [b"not a png"])
    assert list(tmp_path.iterdir()) == []


def test_dead_server_is_an_error_not_a_hang(server, portrait):
    """Last in this file: it ends the server that the other tests share, while it is at work."""
    slow = _changed(**{"2": {"class_type": "RepeatImageBatch", "inputs": {"image": ["1", 0], "amount": 4096}}})
    threading.Timer(1.0, server.process.kill).start()
    for workflow in (slow, WORKFLOW):
        with pytest.raises(ToolError, match="ended with exit code -9"):
            Client(server).run(workflow, {"1": portrait})
