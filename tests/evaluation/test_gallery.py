"""The gallery: who is chosen, and what the command writes."""

import json

import pytest
import torch
from PIL import Image

from diffportrait3d.synthetic_heads.materials import Look
from evaluation import gallery
from training.dataset.images import FIRST_SEED


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_the_first_person_that_fits_each_wish(seed):
    people = gallery.choose(seed)
    assert [person.wish for person in people] == list(gallery.WISHES) and people == gallery.choose(seed)
    assert len({person.seed for person in people}) == 3
    start = FIRST_SEED["test"] + gallery.FIRST_INDEX + seed * gallery.STRIDE
    for person in people:
        fits = gallery.WISHES[person.wish]
        looks = [Look(torch.Generator().manual_seed(s)) for s in range(start, person.seed + 1)]
        assert [bool(fits(look)) for look in looks] == [False] * (len(looks) - 1) + [True]
    light, dark, bearded = people
    assert light.skin > 0.65 > bearded.skin > 0.36 > dark.skin
    assert light.hair_style == "long" and bearded.beard == "full"


def test_writes_the_pictures(weights, tmp_path, capsys):
    arguments = ["--weights", str(weights), "--views", "3", "--steps", "1", "--out", str(tmp_path)]
    assert gallery.main(arguments) == 0
    with Image.open(tmp_path / "gallery.webp") as film:
        assert film.size == (3 * 64, 64) and film.n_frames == 4  # three views and one on the way back
    with Image.open(tmp_path / "gallery.png") as grid:
        assert grid.height == 3 * 64
    facts = json.loads((tmp_path / "gallery.json").read_text())
    assert [person["wish"] for person in facts["people"]] == list(gallery.WISHES)
    assert len(facts["weights_sha256"]) == 7 and facts["sampling"]["steps"] == 1
    assert "test person 2100" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="nowhere"):
        gallery.main(["--weights", str(tmp_path / "nowhere"), "--out", str(tmp_path)])


@pytest.mark.parametrize(("option", "value"), [("views", "1"), ("steps", "0"), ("seed", "-1")])
def test_options_are_checked(option, value, capsys):
    with pytest.raises(SystemExit):
        gallery.main([f"--{option}", value])
    assert f"--{option}" in capsys.readouterr().err
