"""Names and tooltips in the editor's languages: complete, and readable by the editor's message format."""

from __future__ import annotations

import re

import pytest

from tools import locales
from tools.embedded import pack_nodes


@pytest.fixture(scope="module")
def english(pack):
    """What the nodes themselves say, in the form of a locale."""
    return locales.english(pack_nodes(pack))


def test_english_is_what_the_nodes_say(english):
    assert locales.read_locale("en") == english, "run `python -m tools.locales`"


@pytest.mark.parametrize("language", locales.LANGUAGES)
def test_translations_have_every_text_and_no_other(english, language):
    translated = dict(locales.texts(locales.read_locale(language)))
    assert sorted(translated) == sorted(path for path, _ in locales.texts(english))
    assert all(text.strip() for text in translated.values())


@pytest.mark.parametrize("language", ["en", *locales.LANGUAGES])
def test_no_text_is_taken_for_a_pattern(language):
    """The editor reads names and descriptions with vue-i18n, where these characters mean something else."""
    for path, text in locales.texts(locales.read_locale(language)):
        assert not re.search(r"[{}@|]", text), path


@pytest.mark.parametrize(("language", "script"), [("zh", r"[\u4e00-\u9fff]"), ("ja", r"[\u3040-\u30ff]")])
def test_translations_are_in_their_language(language, script):
    for path, text in locales.texts(locales.read_locale(language)):
        if path.endswith(("tooltip", "description")):
            assert re.search(script, text), path


@pytest.mark.parametrize("language", locales.LANGUAGES)
def test_translations_keep_numbers_and_names(english, language):
    """Defaults, file names and choices of a list are the same in every language."""
    translated = dict(locales.texts(locales.read_locale(language)))
    for path, text in locales.texts(english):
        if path.endswith("tooltip"):
            kept = re.findall(r"\d+(?:\.\d+)?|[\w/]+\.(?:json|npy|png|txt)|models/\w+", text)
            missing = [word for word in kept if word not in translated[path]]
            assert not missing, f"{path}: {missing}"


def test_update_names_what_a_person_has_to_look_at(tmp_path, monkeypatch, english):
    monkeypatch.setattr(locales, "locale_file", lambda language: tmp_path / f"{language}.json")
    node = {
        "input": {"required": {"gap": ["INT", {"tooltip": "old"}]}},
        "display_name": "Grid",
        "description": "All.",
        "output_name": ["IMAGE"],
        "output_tooltips": ["One."],
    }
    locales.update({"A": node})
    assert locales.update({"A": node}) == []
    node["input"] = {"required": {"gap": ["INT", {"tooltip": "new"}], "columns": ["INT"]}}
    found = locales.update({"A": node})
    assert found[0] == "changed: A.inputs.gap.tooltip: new"
    assert "translate into zh: A.inputs.columns.name: columns" in found
    kept = locales.read_locale("zh")["A"]["inputs"]
    assert kept["gap"]["tooltip"] == "old" and kept["columns"]["name"] == "columns"
    node["input"] = {}
    assert "dropped from ja: A.inputs.gap.name" in locales.update({"A": node})
    assert locales.read_locale("ja")["A"]["inputs"] == {}
