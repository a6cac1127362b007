"""Views are generated once: by whom they are shared, what makes other ones, what an interruption leaves."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch

from diffportrait3d.command import run_main
from diffportrait3d.pipeline import Sampling
from evaluation import ablations, miniature
from evaluation.metrics.pose import PoseRegressor
from evaluation.studies.generator import ViewGenerator
from evaluation.studies.view_store import SubjectViews, ViewStore, variant_inputs
from evaluation.subjects.dataset import Subject, held_out_lines, load_subject
from evaluation.subjects.variants import ABLATION_VARIANTS, PART_VARIANTS


@pytest.fixture(scope="module")
def system(weights):
    return ViewGenerator(weights)


@pytest.fixture
def subject(ball_dataset):
    return load_subject(ball_dataset, held_out_lines(ball_dataset, 1)[0], 2, references=2)


@pytest.fixture
def generated(monkeypatch):
    """Titles of the variants that were generated, in order, once for each person."""
    titles, generate = [], ViewGenerator.generate

    def counting(self, variant, people, sampling):
        titles.extend([variant.title] * len(people))
        return generate(self, variant, people, sampling)

    monkeypatch.setattr(ViewGenerator, "generate", counting)
    return titles


def command(weights, data, folder, name, *more):
    paths = ["--weights", str(weights), "--data", str(data), "--out", str(folder / name), "--store", str(folder)]
    return [*paths, "--identities", "1", "--views", "2", "--steps", "1", "--pictures", "0", "--no-faces", *more]


def test_commands_share_views_of_the_same_arm(weights, ball_dataset, tmp_path, generated):
    variants = ["--arms", "no_reference", "random_noise"]
    ablations.main(command(weights, ball_dataset, tmp_path, "a.json", *variants))
    assert sorted(generated) == sorted(
        ABLATION_VARIANTS[name].title for name in ("full", "no_reference", "random_noise")
    )
    del generated[:]
    miniature.main(command(weights, ball_dataset, tmp_path, "b.json"))
    assert sorted(generated) == sorted(PART_VARIANTS[name].title for name in ("no_camera", "no_view_consistency"))
    del generated[:]
    miniature.main(command(weights, ball_dataset, tmp_path, "c.json"))  # measured anew, nothing generated
    assert not generated
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("b.json", "c.json"))
    assert first["summary"] == second["summary"] and first["seconds_per_identity"] == second["seconds_per_identity"]


def test_people_are_made_together(weights, ball_dataset, tmp_path, generated, monkeypatch):
    """The numbers of one by one, but for pixels that are rounded to the other side of 8 bits; what an earlier command
    has left is not made again, and networks judge several rows at once."""
    judged, predict = [], PoseRegressor.predict
    monkeypatch.setattr(PoseRegressor, "predict", lambda *given: judged.append(len(given[1])) or predict(*given))
    few = ["--arms", "two_references", "no_view_consistency", "random_noise", "--solver", "ddim"]
    more = ["--identities", "3", "--views", "3", "--steps", "2"]
    alone, together = (command(weights, ball_dataset, tmp_path / name, "a.json", *few, *more) for name in ("1", "2"))
    assert ablations.main(alone) == 0 and len(generated) == 12 and judged == 3 * 8 * [3]
    del generated[:]
    assert ablations.main([*together, "--identities", "1"]) == 0 and len(generated) == 4
    del judged[:]
    assert ablations.main([*together, "--batch", "2"]) == 0 and len(generated) == 12 and judged == 2 * 4 * [6]
    alone, together = (json.loads((tmp_path / name / "a.json").read_text())["identities"] for name in ("1", "2"))
    assert [record["id"] for record in together] == [record["id"] for record in alone]
    for own, other in zip(together, alone, strict=True):
        for row, metrics in other["results"].items():
            there = {name: value for name, value in metrics.items() if value is not None}
            found = {name: value for name, value in own["results"][row].items() if value is not None}
            assert found == pytest.approx(there, rel=5e-3, abs=1e-3)


def test_bfloat16_has_views_of_its_own(weights, subject, tmp_path):
    """Close to those in float32, which keep their keys."""
    made = {}
    for precision in ("float32", "bfloat16"):
        store = ViewStore(tmp_path, ViewGenerator(weights, precision=precision), Sampling(2))
        made[precision] = SubjectViews(store, subject, 0).variant(PART_VARIANTS["full"]).images
    assert len(list(tmp_path.glob("dpmpp_2m-2-*/*.png"))) == 2 and made["bfloat16"].dtype == torch.float32
    assert 0 < (made["bfloat16"] - made["float32"]).abs().mean() < 0.05


def test_an_interrupted_person_keeps_its_finished_arms(weights, ball_dataset, tmp_path, monkeypatch):
    titles, generate = [], ViewGenerator.generate

    def two_arms_and_then_stop(self, variant, *rest):
        if len(titles) == 2:
            raise KeyboardInterrupt
        titles.append(variant.title)
        return generate(self, variant, *rest)

    arguments = command(weights, ball_dataset, tmp_path, "a.json")
    monkeypatch.setattr(ViewGenerator, "generate", two_arms_and_then_stop)
    assert run_main(lambda: miniature.main(arguments)) == 130
    before = list(titles)

    def the_rest(self, variant, *rest):
        titles.append(variant.title)
        return generate(self, variant, *rest)

    monkeypatch.setattr(ViewGenerator, "generate", the_rest)
    miniature.main(arguments)
    assert titles[:2] == before and sorted(titles) == sorted(
        variant.title for variant in PART_VARIANTS.values()
    )  # each of them once


def test_stored_views_are_what_is_read_again(system, subject, tmp_path, generated):
    store = ViewStore(tmp_path, system, Sampling(steps=1))
    made = SubjectViews(store, subject, 0).variant(PART_VARIANTS["full"])
    again = SubjectViews(store, subject, 0).variant(PART_VARIANTS["full"])
    assert len(generated) == 1 and torch.equal(made.images, again.images) and made.seconds == again.seconds > 0
    exact = system.generate(PART_VARIANTS["full"], [(subject, system.proxies(subject), 0)], store.sampling)[0]
    assert made.images.shape == (2, 3, 64, 64)
    assert 0 < (made.images - exact).abs().max() <= 0.5 / 255 + 1e-6
    assert torch.equal(made.images, (exact * 255).round() / 255)


@pytest.mark.parametrize("damage", [b"", b"\x89PNG\r\n\x1a\n", None], ids=["empty", "cut off", "half of it"])
def test_a_damaged_file_is_made_again(system, subject, tmp_path, generated, damage):
    store = ViewStore(tmp_path, system, Sampling(steps=1))
    made = SubjectViews(store, subject, 0).variant(PART_VARIANTS["full"])
    (path,) = tmp_path.rglob("*.png")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    again = SubjectViews(store, subject, 0).variant(PART_VARIANTS["full"])
    assert len(generated) == 2 and torch.equal(made.images, again.images)
    assert [p.name for p in tmp_path.rglob("*.png")] == [path.name]


CHANGES = {
    "steps": (Sampling(steps=2), PART_VARIANTS["full"], 0),
    "solver": (Sampling(1, "ddim"), PART_VARIANTS["full"], 0),
    "guidance": (Sampling(steps=1, guidance=2.0), PART_VARIANTS["full"], 0),
    "seed": (Sampling(steps=1), PART_VARIANTS["full"], 1),
    "variant": (Sampling(steps=1), PART_VARIANTS["no_camera"], 0),
    "guided": (Sampling(steps=1, guided=(0, 500)), PART_VARIANTS["full"], 0),
    "posed": (Sampling(steps=1, posed=(0, 500)), PART_VARIANTS["full"], 0),
    "F_ref read once": (Sampling(steps=1, reference_timestep=0), PART_VARIANTS["full"], 0),
    "strength": (Sampling(steps=1), replace(PART_VARIANTS["full"], strength=0.5), 0),
    "an variant's own solver": (Sampling(steps=1), replace(PART_VARIANTS["full"], solver="ddim"), 0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_conditions_make_other_views(system, subject, tmp_path, generated, change):
    SubjectViews(ViewStore(tmp_path, system, Sampling(steps=1)), subject, 0).variant(PART_VARIANTS["full"])
    sampling, variant, seed = CHANGES[change]
    SubjectViews(ViewStore(tmp_path, system, sampling), subject, seed).variant(variant)
    assert len(generated) == 2


@pytest.mark.parametrize("given", ["reference", "conditions", "labels", "reference_label"])
def test_other_inputs_make_other_views(system, subject, tmp_path, generated, given):
    store = ViewStore(tmp_path, system, Sampling(steps=1))
    SubjectViews(store, subject, 0).variant(PART_VARIANTS["full"])
    setattr(subject, given, getattr(subject, given) * 0.99)
    SubjectViews(store, subject, 0).variant(PART_VARIANTS["full"])
    assert len(generated) == 2


def test_what_the_networks_do_not_see_is_shared(system, subject, tmp_path, generated):
    """Titles, an variant that says what the command says, the eta of a solver that has none, pictures nobody reads."""
    store = ViewStore(tmp_path, system, Sampling(steps=1, guidance=2.0))
    SubjectViews(store, subject, 0).variant(PART_VARIANTS["full"])
    SubjectViews(ViewStore(tmp_path, system, Sampling(steps=1, eta=0.9)), subject, 0).variant(
        ABLATION_VARIANTS["guidance_2"]
    )
    subject.images = 1 - subject.images  # the truth: only judged by
    subject.reference[1] = 0  # the second portrait of an variant that reads one
    SubjectViews(store, subject, 0).variant(replace(PART_VARIANTS["full"], title="another name"))
    SubjectViews(store, subject, 0).variant(replace(PART_VARIANTS["full"], guided=(0, 1000), solver="dpmpp_2m"))
    assert len(generated) == 1


def test_the_folder_says_what_made_its_views(system, subject, tmp_path):
    SubjectViews(ViewStore(tmp_path, system, Sampling(1, "ddim", eta=0.25)), subject, 0).variant(
        PART_VARIANTS["no_camera"]
    )
    (path,) = tmp_path.rglob("conditions.json")
    facts = json.loads(path.read_text())
    assert path.parent.name.startswith("ddim-1-") and facts["arm"] == {"condition": "none"}
    assert facts["sampling"] == {"solver": "ddim", "steps": 1, "guidance": 3.0, "eta": 0.25}
    assert len(facts["weights_sha256"]) == 6 and facts["views"] == 2


def test_guidance_in_part_of_the_steps(system, subject):
    """Outside of the timesteps of `guided` a view is made as with guidance 1; S's strength changes the start."""
    proxies = system.proxies(subject)

    def views(**changes):
        variant = replace(PART_VARIANTS["full"], **changes)
        return system.generate(variant, [(subject, proxies, 0)], Sampling(steps=2))[0]

    full, none = views(), views(guidance=1.0)  # at timesteps 999 and 499
    assert torch.equal(views(guided=(0, 1000)), full) and torch.equal(views(guided=(0, 499)), none)
    early, late = views(guided=(500, 1000)), views(guided=(0, 500))
    assert len({tuple(images.flatten().tolist()) for images in (full, none, early, late, views(strength=0.5))}) == 5


def test_the_keys_of_stored_views_stay(system, tmp_path):
    """Views of earlier runs are found again only while these texts and a person's digest stay as they are."""
    start = '{"arm": %s, "linear_end": 0.00489, "reference_timestep": "current", "resolution": 64, "sampling": '
    end = ', "version": 1, "views": 6, "weights_sha256": {"unet.safetensors": "00"}}'
    full = PART_VARIANTS["full"]
    for sampling, variant, arm, facts, folder in (
        (Sampling(), full, "{}", '{"guidance": 3.0, "solver": "dpmpp_2m", "steps": 8}', "dpmpp_2m-8-023e6d729032"),
        (
            Sampling(8, "ddim", eta=0.25, guided=(0, 500)),
            replace(full, start="random", misaligned=("turn",)),
            '{"misaligned": ["turn"], "start": "random"}',
            '{"eta": 0.25, "guidance": 3.0, "guided": [0, 500], "solver": "ddim", "steps": 8}',
            "ddim-8-9af540756883",
        ),
    ):
        store = ViewStore(tmp_path, system, sampling)
        conditions = store.variant_conditions(variant, 6) | {"weights_sha256": {"unet.safetensors": "00"}}
        assert json.dumps(conditions, sort_keys=True) == start % arm + facts + end
        assert store.folder(folder[:-13], conditions).name == folder
    images, labels = torch.arange(96).reshape(2, 3, 4, 4) / 96, torch.arange(50.0).reshape(2, 25)
    person = Subject("a", "", images, labels, images / 2, images / 4, labels)
    text = json.dumps(variant_inputs(full, person, 3), sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == "d8e2a46cba2c"
