"""The whole recipe, from rendering to exported files, on four people at 64 px."""

from __future__ import annotations

from pathlib import Path

from diffportrait3d.networks import NETWORKS
from diffportrait3d.weights.files import load_network, read_metadata
from training import miniature
from training.engine.state import checkpoints

KINDS = {"autoencoder", "unet", "reference_encoder", "view_controlnet", "view_consistency", "novel_view"}


def test_the_whole_recipe(tmp_path, capsys):
    out, weights = tmp_path / "run", tmp_path / "weights"
    arguments = ["--preset", "smoke", "--out", str(out), "--export", "--weights", str(weights)]
    assert miniature.main(arguments) == 0
    assert {p.stem for p in weights.iterdir()} == KINDS
    for kind in KINDS:
        metadata = read_metadata(weights / f"{kind}.safetensors")
        assert metadata["network"] == kind and metadata["image_size"] == 64
        assert str(tmp_path) not in str(metadata)
        load_network(weights / f"{kind}.safetensors", kind)
    printed = capsys.readouterr().out
    assert all(stage.name in printed for stage in miniature.STAGES) and "total" in printed

    # A second run finds everything finished and trains nothing.
    before = {stage: checkpoints(out / stage.name)[0].stat().st_mtime_ns for stage in miniature.STAGES}
    assert miniature.main(arguments[:4]) == 0
    assert before == {stage: checkpoints(out / stage.name)[0].stat().st_mtime_ns for stage in miniature.STAGES}


def test_a_run_goes_on_from_the_networks_of_a_folder(tmp_path):
    start, out, data = Path("start"), Path("run"), Path("data")
    for stage in miniature.STAGES:
        values = dict(line.split("=", 1) for line in miniature.stage_overrides(stage, out, data, start))
        assert values.pop(f"inputs.{stage.kind}") == f'"{start / stage.kind}.safetensors"'
        assert (values.pop("decoder_only", "false") == "true") == (stage.name == "autoencoder")
        fresh = dict(line.split("=", 1) for line in miniature.stage_overrides(stage, out, data))
        assert values == fresh and {f"inputs.{name}" for name in NETWORKS[stage.kind].needs} <= set(fresh)


def test_exporting_an_unfinished_run_is_refused(tmp_path, dataset, capsys):
    try:
        miniature.export(tmp_path, tmp_path / "weights")
    except ValueError as error:
        assert "autoencoder" in str(error) and "not finished" in str(error)
    else:
        raise AssertionError("exported a run that does not exist")
