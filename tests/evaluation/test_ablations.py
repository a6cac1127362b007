"""The ablations on a tiny untrained system: variants, verdicts, resuming, processes, the document."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation import ablations
from evaluation.metrics.faces import FACE_METRICS
from evaluation.metrics.images import background_variation, leak, mini_lpips
from evaluation.metrics.views import ABLATION_METRICS
from evaluation.subjects.misalignment import MISALIGNMENTS, unaligned
from evaluation.subjects.variants import ABLATION_VARIANTS, ALL_VARIANTS, GROUPS, ORDER_VARIANTS
from evaluation.tables.expectations import BETTER, EQUAL, EXPECTATIONS, SMALL, Expectation, verdict
from evaluation.tables.report import publish

FEW = ["untrained_reference", "two_references", "swapped_condition", "swapped_reference"]


def command(weights, data, out, *more: str) -> list[str]:
    paths = ["--weights", str(weights), "--data", str(data), "--out", str(out), "--store", str(out.parent / "views")]
    few = ["--identities", "2", "--views", "3", "--steps", "1", "--pictures", "1", "--no-faces"]
    return [*paths, *few, "--arms", *FEW, *more]


@pytest.fixture(scope="module")
def finished(weights, ball_dataset, tmp_path_factory):
    """The files of one run."""
    folder = tmp_path_factory.mktemp("ablations")
    more = ["--doc", str(folder / "doc.md")]
    assert ablations.main(command(weights, ball_dataset, folder / "results.json", *more)) == 0
    return folder


def test_files_of_a_run(finished):
    results = json.loads((finished / "results.json").read_text())
    assert set(results["conditions"]["arms"]) == {"full", *FEW}
    words = {(v["first"], v["second"], v["metric"]): v["verdict"] for v in results["verdicts"]}
    assert ("full", "untrained_reference", "ssim") in words and ("two_references", "full", "far_psnr") in words
    assert not any("guidance_1" in key for key in words)  # its arm was not run
    assert set(words.values()) <= {"holds", "does not", "undecided"}
    summary = results["summary"]
    assert summary["full"]["change"]["mean"] == 0 and summary["ground_truth"]["mini_lpips"]["mean"] == 0
    for name in FEW:
        assert summary[name]["change"]["mean"] > 1e-6, name
    document = (finished / "doc.md").read_text()
    assert "Table 1b" in document and "| full system" in document
    with Image.open(finished / "results.png") as page:
        assert page.height > 10 * 64
    with Image.open(finished / "doc" / "camera.webp") as rows:  # 5 rows of what was given, the full system, 1 arm
        assert rows.height == 7 * 64
    assert not (finished / "doc" / "start_noise.webp").exists()  # none of its arms was run
    assert (finished / "results.md").read_text().strip() in document


def test_nothing_is_published_unless_asked(weights, ball_dataset, tmp_path, repository):
    """`make ablations` measures into runs/; a page is changed by --doc alone."""
    recipe = (repository / "Makefile").read_text().partition("\nablations:")[2].partition("\n\n")[0]
    assert "evaluation.ablations" in recipe and "docs" not in recipe
    options = ablations.parse([])
    assert options.doc is None and options.out.parts[0] == "runs"
    arguments = command(weights, ball_dataset, tmp_path / "deep" / "results.json")
    arguments[arguments.index("--identities") + 1] = "1"
    ablations.main(arguments)
    names = ["results.identities.jsonl", "results.json", "results.md", "results.pages", "results.png", "views"]
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == names and len(list(tmp_path.iterdir())) == 1


def test_goes_on_where_it_was(finished, weights, ball_dataset, tmp_path, capsys):
    journal = (finished / "results.identities.jsonl").read_text().splitlines()
    marked = json.loads(journal[1])
    marked["results"]["full"]["psnr"] = 99.0
    (tmp_path / "results.identities.jsonl").write_text(f"{journal[0]}\n{json.dumps(marked)}\n")
    arguments = command(weights, ball_dataset, tmp_path / "results.json")
    ablations.main(arguments)
    records = json.loads((tmp_path / "results.json").read_text())["identities"]
    assert records[0]["results"]["full"]["psnr"] == 99.0
    assert records[1]["results"] == json.loads(json.dumps(json.loads(journal[2])["results"]).replace("NaN", "null"))
    with pytest.raises(SystemExit, match="other guidance"):
        ablations.main([*arguments, "--guidance", "2"])
    with pytest.raises(SystemExit, match="other .*arms"):
        ablations.main([*arguments[:-1]])


def test_processes_give_the_same_numbers(finished, weights, ball_dataset, tmp_path):
    arguments = command(weights, ball_dataset, tmp_path / "results.json")
    ablations.main([*arguments[: arguments.index("--arms")], "--arms", "two_references", "--workers", "2"])
    journals = [(f / "results.identities.jsonl").read_text().splitlines()[1:] for f in (tmp_path, finished)]
    for first, second in zip(*journals, strict=True):
        expected = json.loads(second)["results"]
        for arm, values in json.loads(first)["results"].items():
            assert values == pytest.approx(expected[arm], rel=1e-3, abs=1e-4, nan_ok=True), arm


def test_every_arm_changes_something(weights, ball_dataset, tmp_path):
    names = [n for n in ALL_VARIANTS if ALL_VARIANTS[n].steps_factor == 1 and ALL_VARIANTS[n].references < 3]
    ordered = ["--order-weights", *[str(weights / "view_consistency.safetensors")] * 2]
    steps = ["--steps", "2"]  # one of them in each half
    options = ablations.parse([*command(weights, ball_dataset, tmp_path / "r.json", *names), *ordered, *steps])
    study = ablations.AblationStudy(options)
    subject = study.subject(0)
    views, _ = study.views(subject, seed=0)
    as_they_come = [name for name in ORDER_VARIANTS if not ABLATION_VARIANTS[name].in_order]
    assert set(names) < set(views) and len(as_they_come) == 2
    assert all(torch.equal(views["full"], views[name]) for name in as_they_come)  # one file
    different = {name: views[name] for name in names if name not in ("full", *as_they_come)}
    for name, images in different.items():
        assert (images - views["full"]).abs().mean() > 1e-6, name
    reference = subject.reference
    assert not torch.equal(subject.other_reference[0], reference[0])
    person = subject, views["proxy"], 0
    again = study.generator.generate(ABLATION_VARIANTS["shared_noise"], [person], study.store.sampling)[0]
    assert torch.equal((again * 255).round() / 255, views["shared_noise"])  # which is not made of S's views


def test_expectations_name_what_exists():
    for expectation in EXPECTATIONS:
        assert expectation.variants <= set(ALL_VARIANTS) and set(expectation.metrics) <= {
            *ABLATION_METRICS,
            *FACE_METRICS,
        }
        assert (expectation.margin > 0) == (expectation.relation != BETTER) and expectation.source


def test_groups():
    """The main orders' arms are all that the paper's tables 1b and 2 and figures 5 and 8 need."""
    assert all(set(names) <= set(ALL_VARIANTS) for names in GROUPS.values())
    main = {"full", *GROUPS["main"]}
    for expectation in EXPECTATIONS:
        place = expectation.source.partition(":")[0]
        if any(name in place for name in ("Table 1b", "Table 2", "Figure 5", "Figure 8")):
            assert expectation.variants <= main, expectation
    arms = ablations.chosen_variants(ablations.parse(["--group", "faces"]))
    assert list(arms)[0] == "full" and set(arms) == {"full", *GROUPS["faces"]}
    assert set(ablations.chosen_variants(ablations.parse([]))) == set(ABLATION_VARIANTS) - set(ORDER_VARIANTS)


def records(**columns) -> list[dict]:
    count = len(next(iter(columns.values())))
    return [{"results": {arm: {"psnr": v[k], "pose": v[k]} for arm, v in columns.items()}} for k in range(count)]


@pytest.mark.parametrize(
    ("relation", "margin", "metric", "shift", "word"),
    [
        (BETTER, 0, "psnr", 1.0, "holds"),  # more is better
        (BETTER, 0, "psnr", -1.0, "does not"),
        (BETTER, 0, "psnr", 0.0, "undecided"),
        (BETTER, 0, "pose", -1.0, "holds"),  # less is better
        (BETTER, 0, "pose", 1.0, "does not"),
        (EQUAL, 0.05, "psnr", 0.0, "holds"),
        (EQUAL, 0.05, "psnr", 3.0, "does not"),
        (EQUAL, 0.05, "psnr", 1.0, "undecided"),  # right at the margin of 5 % of 20
        (SMALL, 25.0, "pose", 0.0, "holds"),
        (SMALL, 5.0, "pose", 0.0, "does not"),
    ],
)
def test_verdicts(relation, margin, metric, shift, word):
    rng = np.random.default_rng(0)
    second = 20 + rng.normal(0, 5, 200)
    first = second + shift + rng.normal(0, 0.5, 200)
    first += second.mean() + shift - first.mean()  # the mean difference is exactly the shift
    expectation = Expectation("a test", "a", relation, "" if relation == SMALL else "b", (metric,), margin)
    found = records(a=first, b=second)
    assert verdict(expectation, metric, found).word == word
    assert verdict(expectation, metric, found[:5]).word == "undecided"  # too few people to say


def test_leak_is_the_slope():
    generator = torch.Generator().manual_seed(0)
    base, condition, other = torch.rand(3, 2, 3, 8, 8, generator=generator)
    assert leak(base, base + 0.3 * (other - condition), condition, other) == pytest.approx(0.3, abs=1e-5)
    assert leak(base, base, condition, other) == 0


def test_background_variation_sees_only_changes_between_views():
    truth, mask = torch.rand(4, 3, 8, 8), torch.zeros(4, 8, 8, dtype=torch.bool)
    mask[:, 2:6, 2:6] = True
    assert background_variation(truth + 0.1, truth, mask) == pytest.approx(0, abs=1e-6)  # wrong everywhere alike
    shift = torch.tensor([0.0, 0.2, 0.0, 0.2])[:, None, None, None]
    assert background_variation(truth + shift, truth, mask) == pytest.approx(0.1155, abs=1e-3)
    assert background_variation(truth + shift * mask[:, None], truth, mask) == pytest.approx(0, abs=1e-6)


def test_mini_lpips_grows_with_the_change(weights):
    from evaluation.studies.generator import ViewGenerator

    autoencoder = ViewGenerator(weights).pipeline.autoencoder
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    small, large = (mini_lpips((images + s * noise).clamp(0, 1), images, autoencoder) for s in (0.05, 0.3))
    assert (mini_lpips(images, images, autoencoder) == 0).all() and (0 < small).all() and (small < large).all()


def test_unaligned_is_a_small_similarity():
    images = torch.zeros(3, 3, 64, 64)
    images[:, :, 31:33, 31:33] = 1.0
    moved = unaligned(images, seed=3)
    assert torch.equal(moved, unaligned(images, seed=3)) and not torch.equal(moved, unaligned(images, seed=4))
    assert torch.allclose(unaligned(images, 3, ()), images, atol=1e-5)
    for part in MISALIGNMENTS:
        assert not torch.allclose(unaligned(images, 3, (part,)), images, atol=1e-2), part
    rows = moved.mean((1, 3)) @ torch.arange(64.0) / moved.mean((1, 3)).sum(-1)
    assert (rows - 31.5).abs().max() < 0.06 * 64 and not torch.allclose(moved[0], moved[1])


def test_document_without_marks_is_left_alone(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("# Mine\n")
    with pytest.raises(ValueError, match="lacks the lines"):
        publish(path, "a.command", "text")
    marks = [f"<!-- made by {name}: {word} -->" for name in ("a.command", "another") for word in ("begin", "end")]
    path.write_text(f"# Mine\n{marks[0]}\nold\n{marks[1]}\n{marks[2]}\nkept\n{marks[3]}\nafter\n")
    publish(path, "a.command", "new")
    text = path.read_text()
    assert "old" not in text and "new" in text and "kept" in text and text.endswith("after\n")


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--workers", "0"], "--workers"), (["--arms", "ordered_views"], "--order-weights")],
)
def test_options_are_checked(more, message, capsys):
    with pytest.raises(SystemExit):
        ablations.parse(more)
    assert message in capsys.readouterr().err
