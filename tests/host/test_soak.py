"""The commands that queue a server for long, for a short time."""

from __future__ import annotations

from tools.fuzz import fuzz
from tools.soak import soak


def test_views_and_log_after_many_changes():
    assert soak(prompts=100, seed=1) == ""


def test_random_prompts_run_or_are_told_why_not():
    assert fuzz(prompts=20, seed=2) == ""
