"""Two checkouts' training steps, beside each other: here this one and itself."""

from __future__ import annotations

import json

import pytest

from evaluation import step_costs


def test_a_checkout_is_as_good_as_itself(tmp_path, capsys):
    """Counts are equal and losses, too; a step does not wait."""
    arguments = ["--preset", "smoke", "--stages", "base", "--against", str(step_costs.ROOT), "--losses", "2",
                 "--seconds", "--rounds", "1", "--cache", str(tmp_path), "--out", f"{tmp_path}/costs.json"]  # fmt: skip
    assert step_costs.main(arguments) == 0
    record = json.loads((tmp_path / "costs.json").read_text())["records"][0]
    this, other = record["this"], record["other"]
    assert this["kernels"] == other["kernels"] and this["kernels"]["convolutions"] > 0
    assert this["flops"] == other["flops"] and this["waits"] == {} and this["samples_per_second"] > 0
    assert record["loss_difference"] == 0 and "losses differ by" in capsys.readouterr().out


def test_losses_are_of_two_checkouts(capsys):
    with pytest.raises(SystemExit):
        step_costs.parse(["--losses", "20"])
    assert "--against" in capsys.readouterr().err
