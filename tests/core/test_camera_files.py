"""EG3D's labels in files, in every form in which people have them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from diffportrait3d.cameras.files import read_labels, read_rows, write_labels
from diffportrait3d.cameras.labels import orbit_camera, trajectory

LABELS = trajectory("arc", 3)
ROWS = LABELS.tolist()
LABEL = orbit_camera(0, 0).tolist()


@pytest.mark.parametrize("suffix", [".json", ".npy"])
def test_files_round_trip(tmp_path, suffix):
    labels = trajectory("orbit", 5)
    path = tmp_path / "sub" / f"cameras{suffix}"
    write_labels(path, labels)
    assert torch.equal(read_labels(path), labels)
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no temporary file is left


def test_reads_eg3d_dataset_json(tmp_path):
    labels = trajectory("arc", 2)
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"labels": [[f"{k}.png", row] for k, row in enumerate(labels.tolist())]}))
    assert torch.equal(read_labels(path), labels)


def test_bad_files_are_named(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 24)))
    (tmp_path / "b.json").write_text("{}")
    (tmp_path / "c.txt").write_text("")
    for name in ("a.npy", "b.json", "c.txt", "missing.json"):
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            read_labels(tmp_path / name)
    with pytest.raises(ValueError, match="txt"):
        write_labels(tmp_path / "d.txt", orbit_camera(0, 0))


def test_named_labels_are_sorted_like_their_pictures(tmp_path):
    labels = trajectory("arc", 11)
    path = tmp_path / "dataset.json"
    write_labels(path, labels, [f"view{k}.png" for k in range(11)])
    rows = json.loads(path.read_text())["labels"]
    assert rows[10][0] == "view10.png" and len(rows[0][1]) == 25
    path.write_text(json.dumps({"labels": rows[::-1]}))
    assert torch.equal(read_labels(path), labels)


def test_one_label_per_file(tmp_path):
    labels = trajectory("arc", 12)
    for view, label in enumerate(labels[:10]):
        np.save(tmp_path / f"{view}.npy", label.numpy())
    (tmp_path / "10.json").write_text(json.dumps(labels[10].tolist()))
    (tmp_path / "11.txt").write_text(" ".join(map(repr, labels[11].tolist())))
    (tmp_path / "0.png").write_bytes(b"")
    assert torch.equal(read_labels(tmp_path), labels)
    np.save(tmp_path / "3.npy", labels.numpy())
    with pytest.raises(ValueError, match=r"3\.npy: expected one camera per file.* got 12"):
        read_labels(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([LABEL, LABEL[:16]], "view 1 has 16 numbers where a label has 25"),
        ([LABEL, 7], "view 1 has 7 where"),
        ({"labels": [["a.png", LABEL], ["b.png", [None] * 25]]}, r"view 1 \(b.png\) has None in place 1"),
        ({"labels": [["a.png", [2.0, *LABEL[1:]]]]}, r"view 0 \(a.png\) has a rotation .*off by 3"),
        ([[*LABEL[:3], float("nan"), *LABEL[4:]]], "view 0 contains NaN or infinity .first in place 4 of 25"),
        ({"labels": None}, "no 'labels'"),
        ({"labels": [["a.png"]]}, "view 0 has 1 numbers"),
        ([], "expected a list of labels"),
    ],
)
def test_bad_label_files_name_file_view_and_value(tmp_path, content, message):
    path = tmp_path / "cams.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"cams\.json: .*{message}"):
        read_labels(path)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}: no camera files"):
        read_labels(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        LABELS[:, None].tolist(),
        LABELS[None].tolist(),
        {"labels": {f"{view}.png": row for view, row in enumerate(ROWS)}},
        {"labels": [[f"{view}.png", [row]] for view, row in enumerate(ROWS)]},
        {"labels": [[None, row] for row in ROWS]},
        {"labels": [["", row] for row in ROWS]},
        {"labels": [[view, row] for view, row in enumerate(ROWS)]},
        [[str(value) for value in row] for row in ROWS],
    ],
    ids=["V,1,25", "1,V,25", "object", "wrapped", "names null", "names empty", "names numbers", "numbers as text"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_forms_and_encodings_of_json(tmp_path, content, encoding):
    (tmp_path / "cams.json").write_text(json.dumps(content), encoding=encoding)
    assert torch.equal(read_labels(tmp_path / "cams.json"), LABELS)


@pytest.mark.parametrize("shape", [(3, 25), (3, 1, 25), (1, 3, 25), (3, 25, 1), (1, 1, 3, 25)])
def test_shapes_of_npy(tmp_path, shape):
    np.save(tmp_path / "cams.npy", LABELS.numpy().astype(np.float64).reshape(shape))
    assert torch.equal(read_labels(tmp_path / "cams.npy"), LABELS)
    np.save(tmp_path / "one.npy", LABELS[:1].numpy().reshape(tuple(1 if side == 3 else side for side in shape)))
    assert torch.equal(read_labels(tmp_path / "one.npy"), LABELS[:1])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_text_with_a_byte_order_mark(tmp_path, encoding):
    text = "\r\n".join(", ".join(map(repr, row)) for row in ROWS)
    (tmp_path / "cams.txt").write_text(text, encoding=encoding)
    assert torch.equal(read_labels(tmp_path / "cams.txt"), LABELS)


def test_one_label_with_its_name(tmp_path):
    (tmp_path / "cams.json").write_text(json.dumps(["a.png", LABEL]))
    assert torch.equal(read_labels(tmp_path / "cams.json")[0], torch.tensor(LABEL))
    assert read_rows(tmp_path / "cams.json").names == ["a.png"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([["a.png", LABEL], LABEL], "view 1 has no name, others have; name every view, or none"),
        ([LABEL, ["a.png", LABEL]], "view 0 has no name"),
        ({"labels": [["a.png", LABEL], [None, LABEL]]}, "view 1 has no name"),
        ({"labels": {"a.png": LABEL, "": LABEL}}, "view 1 has no name"),
        ({"labels": {"a.png": LABEL[:3]}}, r"view 0 \(a.png\) has 3 numbers"),
        ({"labels": {"a.png": None}}, r"view 0 \(a.png\) has None where"),
        ({"labels": "all"}, "expected a list of labels"),
        ([{"name": "a.png", "label": LABEL}], "view 0 has {'name'.* where a label has 25"),
        ([[10**400] * 25], "view 0 has 1000.* which is not a number"),
        ("a.png", "expected a list of labels"),
        (None, "expected a list of labels"),
    ],
)
def test_rows_that_are_none_are_named(tmp_path, content, message):
    (tmp_path / "cams.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"cams\.json: cannot read camera labels: .*{message}"):
        read_labels(tmp_path / "cams.json")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b"\xff\xfe\x00", "it is not a text file in UTF-8"),
        ("a.json", b"\x89PNG\r\n", "it is not a text file in UTF-8"),
        ("a.json", b"{", "it is not JSON: "),
        ("a.json", b"", "it is not JSON: "),
        ("a.txt", b"\xe9\xe9", "it is not a text file in UTF-8"),
        ("a.npy", b"", "cannot read camera labels"),
        ("a.csv", b"", "unknown suffix '.csv'; use .json, .npy, .txt"),
    ],
)
def test_bytes_that_are_no_cameras_are_named(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_labels(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and "codec" not in str(caught.value)


def test_arrays_of_other_shapes_are_named(tmp_path):
    for name, array in (("a.npy", np.zeros((2, 3, 25))), ("b.npy", np.zeros((2, 4, 4)))):
        np.save(tmp_path / name, array)
        with pytest.raises(ValueError, match=rf"{name}: .*numbers, got shape \[2, "):
            read_labels(tmp_path / name)
    np.savez(tmp_path / "c.npz", LABELS.numpy())
    (tmp_path / "c.npz").rename(tmp_path / "c.npy")
    with pytest.raises(ValueError, match="c.npy: .*holds several arrays"):
        read_labels(tmp_path / "c.npy")
