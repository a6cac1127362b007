"""The whole recipe, from rendering to exported files, on four people at 64 px."""

from __future__ import annotations

from diffportrait3d.checkpoints import load_network, read_metadata
from training import miniature
from training.state import newest_checkpoint

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
    assert all(stage in printed for stage in miniature.STAGES) and "total" in printed

    # A second run finds everything finished and trains nothing.
    before = {stage: newest_checkpoint(out / stage).stat().st_mtime_ns for stage in miniature.STAGES}
    assert miniature.main(arguments[:4]) == 0
    assert before == {stage: newest_checkpoint(out / stage).stat().st_mtime_ns for stage in miniature.STAGES}


def test_exporting_an_unfinished_run_is_refused(tmp_path, dataset, capsys):
    try:
        miniature.export(tmp_path, tmp_path / "weights")
    except ValueError as error:
        assert "autoencoder" in str(error) and "not finished" in str(error)
    else:
        raise AssertionError("exported a run that does not exist")
