"""What the bench counts, and the command itself on tiny networks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from evaluation import bench
from training.engine.cost import StepCounts

REPOSITORY = Path(__file__).resolve().parents[2]


def counted(network: nn.Module, x: torch.Tensor, **settings) -> tuple[StepCounts, torch.Tensor]:
    counts = StepCounts(**settings)
    with torch.no_grad(), counts:
        out = network(x)
    return counts, out


def test_kernels_bytes_and_flops():
    """Three matrix products and their sum; views of a tensor are no kernels."""
    x = torch.randn(4, 8)
    counts, _ = counted(nn.Sequential(nn.Linear(8, 16), nn.Unflatten(1, (2, 8)), nn.Flatten(), nn.ReLU()), x)
    assert counts.kernels == {"matrix products": 1, "elementwise": 1}
    assert counts.flops["matrix products"] == 2 * 4 * 8 * 16
    assert counts.bytes["matrix products"] == 4 * (4 * 8 + 8 * 16 + 16 + 4 * 16)
    q = torch.randn(2, 4, 16, 8)
    counts = StepCounts()
    with torch.no_grad(), counts:
        nn.functional.scaled_dot_product_attention(q, q, q)
    assert counts.kernels == {"attention": 1} and counts.flops["attention"] == 2 * 2 * 2 * 4 * 16 * 16 * 8


def test_without_computing_shapes_and_counts_are_the_same():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 1))
    x = torch.randn(2, 4, 16, 16)
    computed, expected = counted(network, x)
    empty, out = counted(network, x, compute_below=64, networks=[network])
    assert out.shape == expected.shape and out.stride() == expected.stride() and not torch.equal(out, expected)
    assert (empty.kernels, empty.bytes, empty.flops) == (computed.kernels, computed.bytes, computed.flops)
    assert torch.equal(network(x), expected), "nothing is left on the network"


def test_places_where_the_host_waits():
    x = torch.ones(3)
    counts = StepCounts()
    with counts:
        x.sum().item()
        x.cpu()
        float(x[0])
        x + 1
    assert sorted(counts.waits.values()) == [1, 1, 1]
    assert all(place.startswith("evaluation/test_bench.py:") for place in counts.waits)


def test_the_command(tmp_path):
    out = tmp_path / "bench.json"
    command = [sys.executable, "-m", "evaluation.bench", "--views", "2", "--side", "32", "--steps", "1"]
    parts = ["--parts", "all", "F alone", "--out", str(out)]
    done = subprocess.run([*command, *parts], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the host waits at" in done.stdout and "together" in done.stdout
    whole, alone = (record["this"] for record in json.loads(out.read_text())["records"])
    assert whole["kernels"] > 2 * alone["kernels"] and whole["flops"] > alone["flops"] > 0
    assert whole["seconds"] > 0 and whole["operator_seconds"] > alone["operator_seconds"] > 0
    assert whole["activation_bytes"] > 0


def test_full_width_is_not_computed_on_a_cpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("here it can be")
    with pytest.raises(SystemExit):
        bench.parse(["--width", "sd15"])
    assert "add --count" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "way_out"),
    [
        (["--count", "--compile"], "leave one of them out"),
        (["--peer", "DIR"], "add --parts all"),
        (["--peer", "DIR", "--parts", "all", "--views", "12"], "--views 8, 16"),
    ],
)
def test_options_that_do_not_go_together(arguments, way_out, capsys):
    with pytest.raises(SystemExit):
        bench.parse(arguments)
    assert way_out in capsys.readouterr().err
