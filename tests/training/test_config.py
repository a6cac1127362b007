"""Configurations: strict keys and types, overrides, and that every preset is valid."""

from __future__ import annotations

import pytest

from training.engine.config import ConfigError, StageConfig, load_config, to_dict
from training.miniature import CONFIGS, PRESETS, STAGES

PAPER_STAGES = [stage for stage in STAGES if stage.name not in ("autoencoder", "base")]


def test_overrides_and_types():
    config = load_config(StageConfig, None, ["optimizer.lr=1e-3", "loop.steps=7", "optimizer.ema=", "data.flip=false"])
    assert config.optimizer.lr == 1e-3 and config.loop.steps == 7
    assert config.optimizer.ema is None and config.data.flip is False


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loop.stepz=3", "loop.stepz"),
        ("nothing=1", "nothing"),
        ("loop.steps=many", "loop.steps"),
        ("loop.steps=true", "loop.steps"),
        ("loop.steps=", "loop.steps"),
        ("loop=3", "loop"),
        ("loop.steps", "key=value"),
        ("noise_offset=0.05", "3D-aware noise"),
        ("prediction_type=v_prediction", "3D-aware noise"),
        ("loop.zero_snr=true", "3D-aware noise"),
        ("loop.accumulate=0", "loop.accumulate.*greater than or equal to 1, not 0"),
        ("loop.precision=float8", "loop.precision.*'float16', not 'float8'"),
        ("optimizer.name=lion", "optimizer.name.*'adamw8bit', not 'lion'"),
        ("optimizer.lr=fast", "optimizer.lr.*'fast'"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(StageConfig, None, [override])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="presets"):
        load_config(StageConfig, tmp_path / "no.yaml")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("stage", STAGES)
def test_presets_are_valid(preset, stage):
    config = load_config(stage.config_class, CONFIGS / preset / f"{stage.name}.yaml")
    assert config.run_dir.endswith(stage.name)
    assert load_config(stage.config_class, None, []) is not None and "loop" in to_dict(config)


@pytest.mark.parametrize("preset", ["paper_6xa100", "single_24gb"])
@pytest.mark.parametrize("stage", PAPER_STAGES)
def test_presets_at_full_width_are_valid(preset, stage):
    config = load_config(stage.config_class, CONFIGS / preset / f"{stage.name}.yaml")
    assert config.run_dir.endswith(stage.name) and config.loop.precision == "bfloat16"
    if stage.name != "novel_view":
        views = config.views if stage.name == "view_consistency" else 1
        assert config.optimizer.lr == 1e-5  # the paper's, as are 16 images a step
        assert config.loop.batch_size * config.loop.accumulate * views == 16
