"""Every command in every page exists, and takes the arguments that are written there."""

from __future__ import annotations

import argparse
import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^ *```(?:sh|bash)?\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`((?:python -m|make) [^`]+)`")
COMMAND = re.compile(r"^(python -m|make|pip|accelerate)\b")


class Parsed(Exception):
    """The command took its arguments; it need not run."""


def commands(text: str) -> list[str]:
    """Commands of the blocks and of the running text; optional arguments in [brackets] count as given."""
    lines = [line for block in BLOCK.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    found = [*lines, *(" ".join(inline.split()) for inline in INLINE.findall(text))]
    found = [line.split(" # ")[0].split("    #")[0].strip() for line in found]
    return [re.sub(r"(?<=\s)\[(--[^\]]+)\]", r"\1", line) for line in found if COMMAND.match(line)]


CASES = [
    pytest.param(c, id=f"{page.name}: {c[:70]}") for page in PAGES for c in dict.fromkeys(commands(page.read_text()))
]


def check_module(words: list[str], monkeypatch) -> None:
    """Give the words to the command's own parser."""
    original = argparse.ArgumentParser.parse_args

    def parse(self, args=None, namespace=None):
        original(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    name, *arguments = words
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(Parsed), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # some tests have imported the module before
        runpy.run_module(name, run_name="__main__", alter_sys=False)


def check_make(line: str, monkeypatch) -> None:
    """Expand the target, and check the command that it runs."""
    done = subprocess.run([*shlex.split(line), "-n"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for expanded in done.stdout.splitlines():
        words = shlex.split(expanded)
        if words[1:2] == ["-m"] and (ROOT / words[2].split(".")[0]).is_dir():  # of this repository
            check_module(words[2:], monkeypatch)


@pytest.mark.parametrize("line", CASES)
def test_command_takes_what_is_written(line, monkeypatch):
    words = shlex.split(line)
    if words[0] == "make":
        check_make(line, monkeypatch)
    elif words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = re.findall(r"\.\[([\w,]+)\]", line)
        assert all(extra in extras for names in named for extra in names.split(","))
    else:  # python -m MODULE ..., accelerate launch ... -m MODULE ...
        words = words[words.index("-m") + 1 :]
        if words[1:] not in (["..."], []):
            check_module(words, monkeypatch)
        assert importlib.util.find_spec(words[0])


def test_pages_are_read():
    assert len(CASES) > 40


@pytest.mark.parametrize(
    "line", ["python -m training.render --out DIR --no-such-option", "make demo ARGS=--no-such-option"]
)
def test_unknown_argument_is_found(line, monkeypatch):
    with pytest.raises(SystemExit):
        test_command_takes_what_is_written(line, monkeypatch)
