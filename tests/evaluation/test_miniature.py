"""The whole command on a tiny untrained system: tables, files, resuming, pairing, errors."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffportrait3d.files import WriteError, append_line
from diffportrait3d.pipeline import Sampling
from evaluation import miniature
from evaluation.studies.generator import ViewGenerator
from evaluation.studies.study import test_data as data_of
from evaluation.subjects.dataset import held_out_lines, json_digest, load_subject
from evaluation.subjects.variants import PART_VARIANTS
from evaluation.tables.report import save_png, stack_pages
from evaluation.tables.results_log import read_log


def command(weights, data, out, *more: str) -> list[str]:
    paths = ["--weights", str(weights), "--data", str(data), "--out", str(out)]
    store = ["--store", str(out.parent / "views"), "--no-faces"]
    return [*paths, *store, "--identities", "2", "--views", "3", "--steps", "2", "--pictures", "1", *more]


def test_end_to_end(weights, ball_dataset, tmp_path, capsys):
    out = tmp_path / "deep" / "results.json"
    assert miniature.main(command(weights, ball_dataset, out)) == 0
    printed = capsys.readouterr().out
    for title in (
        "full system",
        "no reference",
        "no camera",
        "no view consistency",
        "random noise",
        "full - no camera",
    ):
        assert f"| {title}" in printed
    results = json.loads(out.read_text())
    summary = results["summary"]
    floor = summary["ground_truth"]
    assert floor["foreground_l1"]["mean"] == 0 and floor["ssim"]["mean"] == pytest.approx(1)
    assert 0 < floor["reprojection"]["mean"] < 0.1 < summary["full"]["foreground_l1"]["mean"]
    for row in summary.values():
        for interval in row.values():
            assert interval["low"] <= interval["mean"] <= interval["high"] and interval["count"] == 2
    for arm in set(PART_VARIANTS) - {"full"}:
        paired = results["full_minus_arm"][arm]["psnr"]["mean"]
        assert paired == pytest.approx(summary["full"]["psnr"]["mean"] - summary[arm]["psnr"]["mean"], abs=1e-6)
        assert abs(paired) > 1e-6  # removing the part changed something: exactly 0 means it was not removed
    assert len(results["conditions"]["weights_sha256"]) == 6 and results["conditions"]["steps"] == 2
    assert [r["id"] for r in results["identities"]] == ["ball-test-0", "ball-test-1"]
    with Image.open(out.with_suffix(".png")) as page:
        assert page.width > 3 * 64 and page.height > 8 * 64


def test_resumes_and_refuses_other_conditions(weights, ball_dataset, tmp_path):
    out, journal = tmp_path / "results.json", tmp_path / "results.identities.jsonl"
    arguments = command(weights, ball_dataset, out)
    miniature.main(arguments)
    whole, lines = json.loads(out.read_text())["summary"], journal.read_text().splitlines()
    record = json.loads(lines[1])
    record["results"]["full"]["psnr"] += 3  # a mark that only survives if the record is reused
    journal.write_text(f"{lines[0]}\n{json.dumps(record)}\n" + lines[2][:40])  # killed while writing
    miniature.main(arguments)
    resumed = json.loads(out.read_text())["summary"]
    assert resumed["full"]["psnr"]["mean"] == pytest.approx(whole["full"]["psnr"]["mean"] + 1.5, abs=1e-6)
    assert resumed["no_camera"] == whole["no_camera"]  # the repeated identity gave the same numbers
    with pytest.raises(SystemExit, match="other seed"):
        miniature.main([*arguments, "--seed", "5"])
    miniature.main([*arguments, "--identities", "3"])  # more identities continue where the two ended
    more = json.loads(out.read_text())
    assert len(more["identities"]) == 3 and more["identities"][0]["results"] == record["results"]
    journal.write_text(journal.read_text().replace(record["digest"], "0" * 64))
    with pytest.raises(SystemExit, match="other subjects"):
        miniature.main(arguments)


DAMAGE = {  # what is left of a journal of two records, and how many of these count
    "cut off in the second record": (lambda text: text[:-40], 1),
    "zeros in the second record": (lambda text: text[:-60] + b"\0" * 60, 1),
    "random bytes in the first record": (lambda text: text.replace(b"ball-test-0", bytes(range(150, 161))), 0),
    "another file": (lambda text: b"[1, 2]\n" + text, 0),
    "zeros": (lambda text: bytes(len(text)), 0),
    "empty": (lambda text: b"", 0),
    "random bytes": (lambda text: np.random.default_rng(0).bytes(len(text)), 0),
    "a record of something else": (lambda text: text + b'{"id": "x"}\n', 2),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_journal_is_named_and_measured_again(tmp_path, ball_dataset, capsys, damage):
    lines = held_out_lines(ball_dataset, 2)
    records = [{"id": line["id"], "digest": json_digest(line), "results": {"full": {"psnr": 1.0}}} for line in lines]
    path, expected = tmp_path / "run.identities.jsonl", {"views": 3}
    assert read_log(path, expected, ball_dataset) == []
    for record in records:
        append_line(path, json.dumps(record))
    assert read_log(path, expected, ball_dataset) == records and not capsys.readouterr().err
    spoil, left = DAMAGE[damage]
    whole = path.read_bytes()
    path.write_bytes(spoil(whole))
    assert read_log(path, expected, ball_dataset) == records[:left]
    assert str(path) in capsys.readouterr().err
    for record in records[left:]:
        append_line(path, json.dumps(record))
    assert path.read_bytes() == whole


def test_a_damaged_page_is_named_and_left_out(tmp_path, capsys):
    pages = [tmp_path / f"{k}.png" for k in range(3)]
    for page in pages:
        save_png(Image.new("RGB", (8, 8)), page)
    pages[0].write_bytes(b"")
    pages[1].write_bytes(pages[1].read_bytes()[:40] + b"x" * 20)
    stack_pages(pages, tmp_path / "all.png")
    assert Image.open(tmp_path / "all.png").height == 16
    said = capsys.readouterr().err
    assert str(pages[0]) in said and str(pages[1]) in said and str(pages[2]) not in said


def test_goes_on_when_there_is_room_again(weights, ball_dataset, tmp_path, room):
    out = tmp_path / "results.json"
    arguments = command(weights, ball_dataset, out)
    with room(3000), pytest.raises(WriteError, match="cannot be written: .* make room, then run it again"):
        miniature.main(arguments)
    assert not list(tmp_path.rglob("*.tmp")) and not out.exists()
    miniature.main(arguments)
    assert len(json.loads(out.read_text())["identities"]) == 2


def test_results_stay_out_of_the_folder_where_it_is_run(weights, ball_dataset):
    assert miniature.parse([]).out.parts[0] == "runs"
    options = miniature.parse(["--data", str(ball_dataset)])
    data_of(options, 64)
    assert options.identities == 3  # all there are, up to 100


def test_arms_share_noise_and_differ_in_one_part(weights, ball_dataset):
    system = ViewGenerator(weights)
    subject = load_subject(ball_dataset, held_out_lines(ball_dataset, 1)[0], 3)
    proxies = system.proxies(subject)

    def views(name: str, seed: int = 0):
        return system.generate(PART_VARIANTS[name], [(subject, proxies, seed)], Sampling(2, "ddim"))[0]

    full = views("full")
    assert full.shape == (3, 3, 64, 64) and torch.equal(full, views("full")) and not torch.equal(full, views("full", 1))
    subject.conditions = subject.conditions.flip(0)
    assert not torch.equal(full, views("full"))
    without_camera = views("no_camera")
    subject.conditions = subject.conditions.flip(0)
    assert torch.equal(without_camera, views("no_camera"))
    subject.reference = 1 - subject.reference
    changed = views("no_reference")
    subject.reference = 1 - subject.reference
    assert torch.equal(changed, views("no_reference"))  # the reference is not read; S's views were held fixed
    random = views("random_noise")
    proxies = 1 - proxies
    assert torch.equal(random, views("random_noise")) and not torch.equal(full, views("full"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--identities", "9"], "3 test subjects of 9"),
        (["--views", "7"], "Use --views 4"),
        (["--weights", "nowhere"], "nowhere"),
        (["--pose-regressor", "nothing.safetensors"], "evaluation.pose_regressor"),
        (["--data", "nothing"], "training.render"),
    ],
)
def test_errors_are_one_sentence(weights, ball_dataset, tmp_path, more, message):
    with pytest.raises(SystemExit, match=message) as caught:
        miniature.main(command(weights, ball_dataset, tmp_path / "results.json", *more))
    assert "Traceback" not in str(caught.value)


def test_renders_its_own_subjects(weights, tmp_path):
    """Without --data, held-out people are rendered into the cache and kept there."""
    options = miniature.parse(["--identities", "1", "--views", "1", "--cache", str(tmp_path), "--threads", "1"])
    folder = data_of(options, 32)
    subject = load_subject(folder, held_out_lines(folder, 1)[0], 1)
    assert subject.images.shape == (1, 3, 32, 32) and subject.mask.float().mean() > 0.15
    assert 2.3 < subject.depth[subject.mask].mean() < 2.9
    before = (folder / "manifest.jsonl").stat().st_mtime_ns, sorted(p.name for p in folder.rglob("*.png"))
    data_of(options, 32)
    assert before[1] == sorted(p.name for p in folder.rglob("*.png"))
