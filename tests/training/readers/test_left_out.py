"""One bad file never ends an import: its group is left out and named with the reason, the rest is imported, and the
check repeats it. By the real commands."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training import check_data, import_data
from training.dataset.images import read_manifest

from .conftest import write_json
from .test_exports import write_export
from .test_nersemble import SERIALS, write_nersemble

TRANSPARENT = "transparent areas are filled with white"


@pytest.fixture
def exported(tmp_path) -> Path:
    return write_export(tmp_path / "data", people=4)


def run_import(*arguments, out: Path) -> int:
    size = [] if "--resolution" in arguments else ["--resolution", "40"]
    return import_data.main([*map(str, arguments), "--out", str(out), *size, "--condition-people", "1"])


def import_export(root: Path, out: Path, *arguments) -> int:
    return run_import("panohead", "--source", root, *arguments, "--val-share", "0", "--test-share", "0", out=out)


def huge_png() -> bytes:
    """A header that claims 200 megapixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20000, 10000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def broken_inside(data: bytes) -> bytes:
    """The second half of the pixels in a chunk whose name is none: Pillow notices while it decodes (SyntaxError)."""
    at = data.index(b"IDAT") + 4
    (length,) = struct.unpack(">I", data[at - 8 : at - 4])
    half = data[at : at + length // 2]
    checksum = struct.pack(">I", zlib.crc32(b"IDAT" + half))
    return data[: at - 8] + struct.pack(">I", len(half)) + b"IDAT" + half + checksum + b"\xff" * 8 + data[at:]


def spoil(path: Path, how: str) -> None:
    """Pillow raises something else for each of these."""
    data = path.read_bytes()
    path.write_bytes(
        {
            "cut off": lambda: data[: len(data) // 2],
            "a broken start": lambda: data[:33] + b"\xff" * 8 + data[41:],
            "broken inside": lambda: broken_inside(data),
            "too large": huge_png,
            "empty": lambda: b"",
            "text": lambda: b"<html>404</html>",
        }[how]()
    )


@pytest.mark.parametrize(
    ("how", "workers"),
    [
        ("cut off", 1),
        ("a broken start", 1),
        ("broken inside", 1),
        ("too large", 1),
        ("empty", 1),
        ("text", 1),
        ("broken inside", 2),
    ],
)
def test_a_damaged_image_leaves_out_its_person(exported, tmp_path, capsys, how, workers):
    out, bad = tmp_path / "set", exported / "seed0001" / "02.png"
    whole = bad.read_bytes()
    spoil(bad, how)
    assert import_export(exported, out, "--workers", workers) == 0
    said = capsys.readouterr().err
    assert f"skipped panohead-seed0001: image '{bad}' cannot be read (" in said and "1 of 4 groups skipped" in said
    assert [s["id"] for s in read_manifest(out)[1]] == [f"panohead-seed000{k}" for k in (0, 2, 3)]
    check_data.main([str(out)])
    assert f"note: left out of panohead: panohead-seed0001: image '{bad}' cannot be" in capsys.readouterr().out
    bad.write_bytes(whole)
    assert import_export(exported, out) == 0 and len(read_manifest(out)[1]) == 4  # mended, it joins
    capsys.readouterr()
    check_data.main([str(out)])
    assert "left out" not in capsys.readouterr().out


def test_all_that_can_be_wrong_with_an_export_at_once(exported, tmp_path, capsys):
    labels = json.loads((exported / "dataset.json").read_text())["labels"]
    labels[0][1] = "no label"
    labels[3][1][0] = 7.0
    Image.new("RGB", (40, 30)).save(exported / "seed0002" / "00.png")
    labels += [["alone.png", labels[9][1]], ["short row"], None]
    write_json(exported / "dataset.json", {"labels": labels})
    assert import_export(exported, tmp_path / "set") == 0
    said = capsys.readouterr().err
    for what in (
        "left out of the plan: alone.png: The name 'alone.png' does not tell whom it shows",
        "left out of the plan: dataset.json: 2 rows that are not [name, [25 numbers]]",
        "skipped panohead-seed0000: camera labels: ",
        "skipped panohead-seed0001: camera labels: dataset.json:",
        f"skipped panohead-seed0002: image '{exported / 'seed0002/00.png'}' is 40x30, not square",
    ):
        assert what in said
    assert [s["id"] for s in read_manifest(tmp_path / "set")[1]] == ["panohead-seed0003"]
    assert len(json.loads((tmp_path / "set/left_out/panohead.json").read_text())) == 5


def test_a_damaged_landmark_file(exported, tmp_path, capsys):
    for name in ("seed0001/00.txt", "seed0002/00.txt"):
        (tmp_path / "points" / name).parent.mkdir(parents=True)
        (tmp_path / "points" / name).write_text("1 2\n")
    with pytest.raises(SystemExit):  # nobody has five points: that ends it, and every reason is said
        import_export(exported, tmp_path / "set", "--landmarks", tmp_path / "points")
    said = capsys.readouterr().err
    assert "Nothing could be imported" in said and "4 of 4 groups skipped" in said
    assert "skipped panohead-seed0001: " in said and "expected five points" in said


def test_subjects_of_a_data_set_of_this_format(dataset, tmp_path, capsys):
    root = shutil.copytree(dataset, tmp_path / "data")
    header, *subjects = [json.loads(line) for line in (root / "manifest.jsonl").read_text().splitlines()]
    del subjects[0]["views"][3]["label"]
    subjects[1]["split"] = "training"
    (root / subjects[2]["views"][4]["image"]).write_bytes(b"")
    (root / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [header, *subjects]))
    assert run_import("heads", "--source", root, out=tmp_path / "set") == 0
    said = capsys.readouterr().err
    assert "left out of the plan: subject 0: its line in the manifest is incomplete (KeyError('label'))" in said
    assert "left out of the plan: s1: split 'training' is none of train, val, test" in said
    assert "skipped s2: image" in said
    assert [s["id"] for s in read_manifest(tmp_path / "set")[1]] == ["s3"]
    assert check_data.main([str(tmp_path / "set")]) == 1  # only val is left
    printed = capsys.readouterr().out
    assert "no subjects in split 'train': training refuses the data set" in printed and printed.count("note: ") == 3


def test_one_damaged_render_for_the_conditions(exported, tmp_path, capsys):
    out, renders = tmp_path / "set", tmp_path / "eg3d"
    assert import_export(exported, out) == 0  # conditions of our own renderer first
    for k, (name, _) in enumerate(json.loads((out / "cameras.json").read_text())["labels"]):
        (renders / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(k).integers(0, 255, (40, 40, 4), dtype=np.uint8)
        Image.fromarray(pixels).save(renders / name)
    (renders / "train/panohead-seed0002/01.png").write_bytes(b"damaged")
    capsys.readouterr()
    assert import_export(exported, out, "--conditions", renders) == 0
    said = capsys.readouterr().err
    assert "skipped panohead-seed0002: Condition image" in said and "Render every camera of 'cameras.json'" in said
    subjects = read_manifest(out)[1]
    assert [s["id"][-1] for s in subjects] == ["0", "1", "3"] and {s["conditions"] for s in subjects} == {
        "given by eg3d"
    }
    check_data.main([str(out)])
    assert "note: left out of panohead: panohead-seed0002: Condition image" in capsys.readouterr().out


# NeRSemble -----------------------------------------------------------------------------------------------------------


def nersemble_command(root: Path, out: Path, *arguments, train: int = 3, views: int = 4, points: bool = True) -> int:
    counts = ["--train-groups", train, "--val-groups", "0", "--test-groups", "0", "--views", views]
    split = write_json(root.parent / "split.json", {"train": [f"nersemble-{k:03d}" for k in (18, 30, 101)]})
    rest = ["--landmarks", root.parent / "points"] if points else []
    return run_import(
        "nersemble", "--source", root, *counts, "--split-file", split, "--resolution", "32", *rest, *arguments, out=out
    )


def rename(path: Path) -> None:
    path.rename(path.with_name("camera_params_v2.json"))


TROUBLE = {
    "no colour calibration": (
        2,
        lambda p: (p / "calibration/color_calibration.json").unlink(),
        "there is no colour correction '{folder}/calibration/color_calibration.json'; --no-colour-correction does",
    ),
    "damaged colour calibration": (
        2,
        lambda p: (p / "calibration/color_calibration.json").write_text("{"),
        "(colour calibration) cannot be read",
    ),
    "colour calibration of another form": (
        2,
        lambda p: (p / "calibration/color_calibration.json").write_text(json.dumps(dict.fromkeys(SERIALS, "x"))),
        "ValueError: could not convert string to float",
    ),
    "renamed calibration": (
        2,
        lambda p: rename(p / "calibration/camera_params.json"),
        "participant 030: there is neither 'camera_params.json' (v1) nor 'calibration/camera_params.json' (v2)",
    ),
    "renamed calibration of v1": (1, lambda p: rename(p / "camera_params.json"), "participant 030: there is neither"),
    "damaged calibration": (
        1,
        lambda p: (p / "camera_params.json").write_text("{"),
        "participant 030: '{folder}/camera_params.json'",
    ),
    "calibration of another form": (
        1,
        lambda p: (p / "camera_params.json").write_text('{"world_2_cam": {"1": [1, 2]}, "intrinsics": [[1]]}'),
        "participant 030: '{folder}/camera_params.json' needs 'world_2_cam'",
    ),
    "renamed participant": (
        1,
        lambda p: p.rename(p.with_name("p030")),
        "participant p030: its folder's name is no participant's number",
    ),
    "damaged videos": (
        2,
        lambda p: [v.write_bytes(b"x") for v in p.rglob("*.mp4")],
        "participant 030, sequence EMO-1-shout+laugh: v",
    ),
    "damaged images": (
        1,
        lambda p: [v.write_bytes(v.read_bytes()[:60]) for v in p.rglob("*.png")],
        "skipped nersemble-030-",
    ),
    "no colour correction of v1": (
        1,
        lambda p: shutil.rmtree(p / "annotations"),
        "there is no colour correction '{folder}/annotations",
    ),
    "damaged colour correction of v1": (
        1,
        lambda p: [f.write_bytes(b"") for f in p.rglob("*.npy")],
        "skipped nersemble-030-",
    ),
    "no sequences": (1, lambda p: shutil.rmtree(p / "sequences"), "participant 030: it has no sequences"),
    "too few cameras": (
        1,
        lambda p: [f.unlink() for s in SERIALS[:2] for f in p.rglob(f"cam_{s}.png")],
        "participant 030, sequence EMO-1-shout+laugh: at most 3 calibrated cameras see a time step, --views asks",
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[int, Path]:
    folders = {version: tmp_path_factory.mktemp(f"v{version}") for version in (1, 2)}
    for version, folder in folders.items():
        write_nersemble(folder / "data", version, frames=1)
    return folders


@pytest.mark.parametrize("kind", TROUBLE)
def test_a_participant_in_trouble_leaves_the_others(whole, tmp_path, capsys, kind):
    version, damage, reason = TROUBLE[kind]
    root = shutil.copytree(whole[version], tmp_path / "copy") / "data"
    folder = root / "030"
    damage(folder)
    reason, out = reason.format(folder=folder), tmp_path / "set"
    assert nersemble_command(root, out) == 0
    assert reason in capsys.readouterr().err
    people = [s["person"] for s in read_manifest(out)[1]]
    assert {"nersemble-018", "nersemble-101"} <= set(people) and "nersemble-030" not in people
    check_data.main([str(out)])
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: left out of nersemble: ")]
    assert any(reason.removeprefix("skipped ") in line for line in notes)


def test_extraction_goes_on_behind_a_damaged_image(whole, tmp_path, capsys):
    root = shutil.copytree(whole[1], tmp_path / "copy") / "data"
    for path in (root / "030").rglob("*.png"):
        path.write_bytes(b"damaged")
    images = tmp_path / "images"
    assert nersemble_command(root, tmp_path / "set", "--extract", images, points=False) == 0
    assert "skipped nersemble-030-" in capsys.readouterr().err
    assert {path.parts[len(images.parts)] for path in images.rglob("*.png")} == {"018", "101"}


SMALL = {
    "more views than cameras": (
        {"views": 9},
        (),
        "participant 018, sequence EMO-1-shout+laugh: at most 5 calibrated cameras see a time step",
    ),
    "a pattern that matches nothing": (
        {},
        ("--sequences", "GLASSES"),
        "participant 018: none of its 2 sequences matches --sequences GLASSES",
    ),
}


@pytest.mark.parametrize("kind", SMALL)
def test_a_small_folder_says_why_nothing_was_planned(whole, tmp_path, capsys, kind):
    changes, arguments, reason = SMALL[kind]
    with pytest.raises(SystemExit):
        nersemble_command(whole[1] / "data", tmp_path / "set", *arguments, **changes)
    said = capsys.readouterr().err
    assert f"left out of the plan: {reason}" in said and "Nothing could be imported: " in said
    assert "split train: 0 of 3 groups planned" in said
    assert nersemble_command(whole[1] / "data", tmp_path / "set") == 0  # an empty plan is not kept


def test_a_small_folder_says_what_is_missing(whole, tmp_path, capsys):
    assert nersemble_command(whole[1] / "data", tmp_path / "set", train=99) == 0
    reason = "split train: 6 of 99 groups planned, because the 3 usable participants have no more time steps that 4"
    assert reason in capsys.readouterr().err
    check_data.main([str(tmp_path / "set")])
    assert reason in capsys.readouterr().out


# Images of other kinds ----------------------------------------------------------------------------------------------


def test_images_of_other_kinds_come_out_right_and_are_reported(tmp_path, capsys):
    root, exif = write_export(tmp_path / "data", people=2, views=2), Image.Exif()
    exif[0x0112] = 6
    stored = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(np.tile(np.arange(40, dtype=np.uint16) * 1600, (40, 1))).save(root / "seed0000/00.png")
    Image.fromarray(stored).save(root / "seed0000/01.png", exif=exif)
    clear = Image.new("RGBA", (40, 40), (255, 0, 255, 0))
    clear.paste((0, 0, 200, 255), (20, 0, 40, 40))
    clear.save(root / "seed0001/00.png")
    out = tmp_path / "set"
    assert import_export(root, out) == 0
    said = capsys.readouterr().err
    assert f"1 images: {TRANSPARENT} (the first is panohead-seed0001, seed0001/00.png)" in said
    deep, turned = (np.asarray(Image.open(out / f"train/panohead-seed0000/0{k}.png")).astype(int) for k in range(2))
    assert np.abs(deep[:, :, 1] - np.arange(40) * 1600 / 257).max() <= 0.5
    assert np.array_equal(turned, np.rot90(stored, -1))
    cut_out = np.asarray(Image.open(out / "train/panohead-seed0001/00.png"))
    assert (cut_out[:, :20] == 255).all() and (cut_out[:, 20:] == (0, 0, 200)).all()
    check_data.main([str(out)])
    printed = capsys.readouterr().out
    assert f"note: 1 images: in the source, {TRANSPARENT} (the first is train/panohead-seed0001, seed0001/00" in printed


def test_the_same_five_points_fit_an_image_that_was_turned(whole, tmp_path):
    """Detectors see the extracted, upright image; the import must see the same one."""
    root = shutil.copytree(whole[1], tmp_path / "copy") / "data"
    upright = tmp_path / "upright"
    assert nersemble_command(root, upright, "--no-colour-correction") == 0
    exif = Image.Exif()
    exif[0x0112] = 8
    for path in root.rglob("*.png"):
        pixels = np.asarray(Image.open(path))
        Image.fromarray(np.ascontiguousarray(np.rot90(pixels, -1))).save(path, exif=exif)
    turned = tmp_path / "turned"
    assert nersemble_command(root, turned, "--no-colour-correction") == 0
    names = [view["image"] for s in read_manifest(upright)[1] for view in s["views"]]
    for name in names:
        assert np.array_equal(np.asarray(Image.open(upright / name)), np.asarray(Image.open(turned / name)))
