"""Two weights folders, of one or two resolutions, and a grid of samplings: the whole commands on tiny systems."""

import json
import shutil

import pytest
import torch
from PIL import Image

from diffportrait3d.networks import NovelViewConfig, NovelViewModel
from diffportrait3d.weights.files import save_network
from evaluation import compare, shortcuts, solvers
from evaluation.metrics.views import QUALITY_METRICS
from evaluation.subjects.dataset import at_size, held_out_lines, load_subject, resize
from evaluation.tables.report import publish


@pytest.fixture(scope="module")
def small_weights(weights, tmp_path_factory):
    """The tiny system, but of 32 px: S's size is the system's."""
    folder = tmp_path_factory.mktemp("small") / "weights"
    shutil.copytree(weights, folder)
    config = NovelViewConfig(image_size=32, render_size=16, base_channels=8, feature_channels=6, volume_size=8,
                             volume_channels=4, prior_channels=2, samples_per_ray=8)  # fmt: skip
    torch.manual_seed(1)
    (folder / "novel_view.safetensors").unlink()
    save_network(folder / "novel_view.safetensors", NovelViewModel(config), "novel_view")
    return folder


def command(data, out, *more: str) -> list[str]:
    few = ["--identities", "2", "--views", "2", "--pictures", "1", "--no-faces"]
    return ["--data", str(data), "--out", str(out), "--store", str(out.parent / "views"), *few, *more]


@pytest.mark.parametrize("order", [1, -1], ids=["small first", "large first"])
def test_two_resolutions_are_measured_at_the_larger(weights, small_weights, ball_dataset, tmp_path, capsys, order):
    folders = [str(small_weights), str(weights)][::order]
    out, page = tmp_path / "compare.json", tmp_path / "page.md"
    arguments = command(ball_dataset, out, "--steps", "1", "--doc", str(page))
    assert compare.main([*folders, *arguments]) == 0
    results = json.loads(out.read_text())
    summary, conditions = results["summary"], results["conditions"]
    measured_by = conditions["second_sha256" if order == 1 else "first_sha256"]
    assert conditions["resolution"] == 64 and conditions["weights_sha256"] == measured_by
    assert summary["ground_truth"]["mini_lpips"]["mean"] == 0 < summary["small_truth"]["mini_lpips"]["mean"]
    assert results["titles"]["small_truth"] == "ground truth at 32 px"
    for metric in QUALITY_METRICS:
        first, second = (summary[name][metric]["mean"] for name in ("first", "second"))
        assert results["second_minus_first"][metric]["mean"] == pytest.approx(second - first, abs=1e-6)
        assert first != second
    with Image.open(out.with_suffix(".png")) as picture:  # portrait, truth, both
        assert picture.height == 4 * 64 + 8
    assert "(32 px)" in page.read_text() and (tmp_path / "page" / "compare.webp").is_file()
    assert out.with_suffix(".md").read_text().strip() in capsys.readouterr().out


def test_a_folder_against_itself_differs_in_nothing(weights, ball_dataset, tmp_path):
    out = tmp_path / "compare.json"
    compare.main([str(weights), str(weights), *command(ball_dataset, out, "--steps", "1")])
    results = json.loads(out.read_text())
    assert all(interval["low"] == interval["high"] == 0 for interval in results["second_minus_first"].values())
    assert "small_truth" not in results["summary"]


def test_data_of_the_smaller_resolution_are_refused(weights, small_weights, ball_dataset, tmp_path):
    with pytest.raises(SystemExit, match="64 px images, the weights in .* work at 32 px"):
        arguments = command(ball_dataset, tmp_path / "x.json", "--steps", "1")
        compare.main([str(small_weights), str(small_weights), *arguments])
    with pytest.raises(SystemExit, match="nowhere"):
        compare.main([str(weights), "nowhere", *command(ball_dataset, tmp_path / "x.json")])


def test_what_the_smaller_networks_are_given(ball_dataset):
    subject = load_subject(ball_dataset, held_out_lines(ball_dataset, 1)[0], 2)
    small = at_size(subject, 32)
    assert small.images.shape == (2, 3, 32, 32) and small.reference.shape == (1, 3, 32, 32)
    assert torch.equal(small.labels, subject.labels) and small.id == subject.id and small.depth is None
    assert torch.equal(small.conditions, resize(subject.conditions, 32))
    assert torch.equal(small.images * 255, (small.images * 255).round())
    assert torch.equal(at_size(subject, 64).images, subject.images)  # nothing to do


def test_solvers_and_steps(weights, ball_dataset, tmp_path, capsys):
    out = tmp_path / "solvers.json"
    arguments = ["--weights", str(weights), *command(ball_dataset, out)]
    assert solvers.main([*arguments, "--steps", "1", "2", "--doc", str(tmp_path / "page.md")]) == 0
    results = json.loads(out.read_text())
    grid = {"dpmpp_2m-1", "dpmpp_2m-2", "ddim-1", "ddim-2"}
    assert set(results["summary"]) == {"ground_truth", "autoencoder", *grid}
    assert len({results["summary"][name]["psnr"]["mean"] for name in grid}) == 4
    against = results["first_minus_others"]
    assert set(against) == grid - {"dpmpp_2m-1"}
    assert all(seconds > 0 for record in results["identities"] for seconds in record["seconds"].values())
    printed = capsys.readouterr().out
    assert "| DPM++ 2M, 1 steps - DDIM, 2 steps" in printed and "seconds per person" in printed
    folders = {path.name.rpartition("-")[0] for path in (tmp_path / "views").iterdir()}
    assert folders == {*grid, "autoencoder"}  # which the other commands read, too
    with pytest.raises(SystemExit, match="other .*samplings"):
        solvers.main([*arguments, "--steps", "2"])


def test_shortcuts_and_what_they_save(weights, ball_dataset, tmp_path, capsys):
    arguments = ["--weights", str(weights), *command(ball_dataset, tmp_path / "s.json"), "--identities", "1"]
    assert shortcuts.main([*arguments, "--rows", "eight", "guided", "eight_both", "four"]) == 0
    printed = capsys.readouterr().out
    assert "| DPM++ 2M, 8 steps - 8 steps, guidance and F_cam in the noisy half" in printed
    table = printed.partition("times fewer")[2].splitlines()[2:6]
    fewer = [float(line.split("|")[3]) for line in table]
    assert fewer[0] == 1 and fewer[3] == pytest.approx(2, abs=0.005)
    assert 1.05 < fewer[1] < 1.5 and fewer[1] * 1.02 < fewer[2]  # half of the second passes; also half of F_cam's


@pytest.mark.parametrize(("steps", "message"), [(["0"], "--steps"), (["4", "-1"], "--steps")])
def test_options_are_checked(steps, message, capsys):
    with pytest.raises(SystemExit):
        solvers.main(["--steps", *steps])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    ["miniature", "compare", "solvers", "shortcuts", "ablations --group main", "ablations --group faces"],
)
def test_the_miniature_s_page_has_a_place_for_every_command(repository, tmp_path, command):
    page = tmp_path / "miniature.md"
    shutil.copy(repository / "docs/miniature.md", page)
    publish(page, f"evaluation.{command}", "the tables")
    assert page.read_text().count("the tables") == 1 and f"evaluation.{command.split()[0]}" in page.read_text()
