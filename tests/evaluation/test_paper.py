"""Views on disk, generated and measured: every metric, table, picture, and the errors."""

import json

import pytest
import torch
from PIL import Image

from evaluation import generate, paper
from evaluation.subjects.view_folders import Views, read_views, write_header, write_views
from evaluation.tables.paper_tables import NAMES, ROWS, rows_for


class Embedding(torch.nn.Module):
    """Mean colour of the quadrants: stands for a face embedding; a black picture has no face."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        means = torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)
        return torch.where(means.amax(1, keepdim=True) < -0.9, torch.full_like(means, float("nan")), means)


class Angles(torch.nn.Module):
    """Mean of the colour channels: stands for pitch, yaw and roll."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    """Person "a" is generated exactly, "b" 0.1 too bright in red; the left half is foreground."""
    root = tmp_path_factory.mktemp("views")
    write_header(root, "novel", "aligned", views=2)
    generator = torch.Generator().manual_seed(0)
    for name, error in (("a", 0.0), ("b", 0.1)):
        truth = (torch.rand(2, 3, 64, 64, generator=generator) * 0.8 * 255).round() / 255
        made = truth + error * torch.tensor([1.0, 0.0, 0.0])[:, None, None]
        mask = torch.zeros(2, 1, 64, 64)
        mask[..., :32] = 1
        write_views(root, Views(name, truth[:1], made, truth, mask))
    return root


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judges")
    torch.jit.script(Embedding()).save(folder / "identity.pt")
    torch.jit.script(Angles()).save(folder / "pose.pt")
    return ["--identity", str(folder / "identity.pt"), "--pose", str(folder / "pose.pt")]


def test_measures_and_reports(views, weights, files, tmp_path, capsys):
    more = ["--sizes", "64", "256", "--backgrounds", "with", "without", "--miniature", str(weights), *files]
    assert paper.main([str(views), "--out", str(tmp_path), "--no-faces", *more]) == 0
    found = json.loads((tmp_path / "paper.json").read_text())
    assert set(found["backbones_sha256"]) == {"identity", "pose", "mini_autoencoder", "mini_pose_regressor"}
    assert all(len(value) == 64 for value in found["backbones_sha256"].values())
    settings = {(s["size"], s["background"]): s for s in found["settings"]}
    assert set(settings) == {(64, "with"), (64, "without"), (256, "with"), (256, "without")}
    whole = settings[64, "with"]
    assert (whole["images"], whole["identities"], whole["views"]["task"]) == (4, 2, "novel")
    numbers = whole["intervals"]
    assert numbers["pose_mse"]["mean"] == pytest.approx(0.01 / 3 / 2, rel=0.05)  # one angle off by .1 for one of two
    assert numbers["pose_norm_degrees"]["mean"] == pytest.approx(5.73 / 2, rel=0.05)
    assert numbers["ssim"]["low"] < numbers["ssim"]["high"] == pytest.approx(1, abs=1e-5)
    assert 0 < numbers["id_truth"]["mean"] < 1 and numbers["id_failures"]["mean"] == 0
    assert {"mini_lpips", "mini_pose", "mini_fid", "mini_kid"} <= set(numbers)
    assert not {"lpips_alex", "dists", "fid", "kid"} & set(numbers)
    assert settings[64, "without"]["intervals"]["pose_mse"]["mean"] < numbers["pose_mse"]["mean"]
    text = (tmp_path / "paper.md").read_text()
    assert text in capsys.readouterr().out and "Table 1a, NeRSemble: DiffPortrait3D" in text
    assert "enlarged from 64 px" in text and "N = 4 images" in text and "--vgg16" in text.split("Not measured")[1]
    for name in ("plots.png", "pictures.png"):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 200


def test_a_face_that_is_not_found_is_counted(files, tmp_path):
    root = tmp_path / "views"
    write_header(root, "reconstruction", "aligned")
    bright = torch.full((2, 3, 64, 64), 0.5)
    write_views(root, Views("a", bright[:1], torch.stack([bright[0], bright[0] * 0]), bright))
    paper.main([str(root), "--out", str(tmp_path / "out"), "--sizes", "64", *files])
    numbers = json.loads((tmp_path / "out" / "paper.json").read_text())["settings"][0]["intervals"]
    assert numbers["id_failures"]["mean"] == 0.5 and numbers["id_truth"]["count"] == 1


@pytest.mark.parametrize("task", ["novel", "reconstruction"])
def test_generated_views(weights, ball_dataset, tmp_path, task):
    arguments = ["--weights", str(weights), "--data", str(ball_dataset), "--out", str(tmp_path), "--task", task]
    arguments += ["--reference", "unaligned", "--identities", "1", "--views", "2", "--steps", "1"]
    assert generate.main(arguments) == 0
    header = json.loads((tmp_path / "views.json").read_text())
    assert (header["task"], header["reference"], len(header["weights_sha256"])) == (task, "unaligned", 6)
    found = read_views(tmp_path / "ball-test-0")
    assert found.generated.shape == (2 if task == "novel" else 1, 3, 64, 64) and found.mask is not None
    assert torch.equal(found.truth[0], found.reference[0]) == (task == "reconstruction")
    before = (tmp_path / "ball-test-0" / "00_generated.png").stat().st_mtime_ns
    generate.main(arguments)  # is there already
    assert (tmp_path / "ball-test-0" / "00_generated.png").stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match="other steps"):
        generate.main([*arguments, "--steps", "2"])


def test_generates_for_all_who_are_there(weights, ball_dataset, tmp_path, capsys):
    """As docs/evaluation.md writes it, without --identities; a damaged header is named with the way out."""
    arguments = ["--weights", str(weights), "--data", str(ball_dataset), "--out", str(tmp_path), "--views", "2"]
    assert generate.main([*arguments, "--steps", "1"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == [f"ball-test-{k}" for k in range(3)]
    for damaged in (b"", b"\0" * 50, b'{"format":', bytes(range(128, 200)), b"[]"):
        (tmp_path / "views.json").write_bytes(damaged)
        with pytest.raises(SystemExit, match="views.json' is damaged.* delete the folder"):
            generate.main([*arguments, "--steps", "1"])


def test_the_paper_s_figures():
    assert all(set(row.numbers) <= set(NAMES) for row in ROWS) and len(ROWS) == 4 * 3 + 3 + 2 + 2 * 3
    novel = {row.method: row.numbers for row in rows_for("novel", 256, "with", "aligned")}
    ours = {"pose": 0.0068, "lpips": 0.23, "ssim": 0.62, "dists": 0.21, "id": 0.7, "fid": 27.4}
    assert novel["DiffPortrait3D"] == ours
    assert len(rows_for("novel", 512, "with", "aligned")) == 5 and len(rows_for("novel", 512, "with", "unaligned")) == 3
    assert {row.table for row in rows_for("reconstruction", 512, "without", "aligned")} == {"3"}


def test_errors_name_the_way_out(views, tmp_path, files):
    with pytest.raises(SystemExit, match="evaluation.generate"):
        paper.main([str(tmp_path)])
    with pytest.raises(SystemExit, match="Nothing is downloaded"):
        paper.main([str(views), "--vgg16", str(tmp_path / "vgg.pth")])
    (tmp_path / "bad.pt").write_text("x")
    with pytest.raises(SystemExit, match="TorchScript"):
        paper.main([str(views), "--pose", str(tmp_path / "bad.pt")])
    root = tmp_path / "maskless"
    write_header(root, "novel", "aligned")
    picture = torch.rand(1, 3, 64, 64)
    write_views(root, Views("a", picture, picture, picture))
    with pytest.raises(SystemExit, match="NN_mask.png"):
        paper.main([str(root), "--backgrounds", "without", "--sizes", "64", *files])
