"""The pose regressor: it learns, its file says what it is, and its mirror average is sound."""

import pytest
import torch
from safetensors.torch import load_file

from diffportrait3d.cameras.labels import orbit_camera, viewing_directions
from evaluation import pose_regressor
from evaluation.metrics.pose import (
    PoseRegressor,
    angle_between,
    load_pose_regressor,
    save_pose_regressor,
)
from evaluation.pose_regressor import augment
from training.dataset.images import MultiViewDataset, mirror_label


def test_command_learns_and_saves(ball_dataset, tmp_path, capsys):
    out = tmp_path / "pose.safetensors"
    data = MultiViewDataset(ball_dataset, "train")
    torch.manual_seed(0)
    untrained = pose_regressor.floor(PoseRegressor(16).eval(), data).mean()
    arguments = ["--data", str(ball_dataset), "--out", str(out), "--steps", "40", "--batch-size", "16", "--width", "16"]
    assert pose_regressor.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "test:" in printed and "3 identities" in printed
    assert pose_regressor.floor(load_pose_regressor(out), data).mean() < 0.5 * untrained
    first = load_file(out)
    pose_regressor.main(arguments)
    assert all(torch.equal(value, first[name]) for name, value in load_file(out).items())  # limited by steps


def test_file_stays_small_and_is_checked(tmp_path):
    path = tmp_path / "pose.safetensors"
    model = PoseRegressor().eval()
    save_pose_regressor(path, model, seed=1)
    assert path.stat().st_size < 1.5e6
    images = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert angle_between(load_pose_regressor(path)(images), model(images)).max() < 0.5  # float16 rounding
    with pytest.raises(FileNotFoundError, match="evaluation.pose_regressor"):
        load_pose_regressor(tmp_path / "absent.safetensors")
    path.write_bytes(b"not a network")
    with pytest.raises(ValueError, match="not a readable"):
        load_pose_regressor(path)


def test_mirror_average_is_equivariant():
    torch.manual_seed(0)
    model = PoseRegressor(16).eval()
    images = torch.rand(3, 3, 64, 64) * 2 - 1
    turned = model.predict(images.flip(-1)) * torch.tensor([-1.0, 1.0, 1.0])
    torch.testing.assert_close(turned, model.predict(images))
    label = orbit_camera([20.0], [10.0])
    mirrored = viewing_directions(mirror_label(label))
    torch.testing.assert_close(mirrored, viewing_directions(label) * torch.tensor([-1.0, 1.0, 1.0]))


def test_augmentation_moves_little_and_is_repeatable():
    images = torch.full((16, 3, 64, 64), -1.0)
    images[:, :, 24:40, 24:40] = 1.0
    first, again = (augment(images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again) and not torch.equal(first, images)
    weight = (first.mean(1) - first.mean(1).amin(dim=(1, 2), keepdim=True)).clamp(min=0) ** 4
    axis = torch.arange(64) + 0.5
    centre = (weight.sum(1) * axis).sum(1) / weight.sum(dim=(1, 2))
    assert (centre.median() - 32).abs() < 3
