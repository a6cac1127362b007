"""Datasets: reading, mirroring, samplers, the latent cache."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffportrait3d.cameras.labels import camera_angles
from diffportrait3d.weights.files import load_network
from training.dataset.images import (
    DataError,
    MultiViewDataset,
    SingleImages,
    ViewGroups,
    cached_latents,
    fixed_groups,
    mirror_label,
    pick,
    pick_labels,
    pick_latents,
    read_manifest,
)

from .conftest import DAMAGES, label, write_dataset


def test_reading(dataset):
    data = MultiViewDataset(dataset, "train")
    assert data.images.shape == data.conditions.shape == (27, 3, 64, 64)
    assert data.images.dtype == torch.uint8 and data.labels.shape == (27, 25)
    assert [list(rows) for rows in data.subjects] == [list(range(9)), list(range(9, 18)), list(range(18, 27))]
    assert data.ids == ["s0", "s1", "s2"]


def test_clear_errors(tmp_path):
    with pytest.raises(DataError, match="training.render"):
        MultiViewDataset(tmp_path, "train")
    root = write_dataset(tmp_path / "data", ("train",))
    with pytest.raises(DataError, match="'val'"):
        MultiViewDataset(root, "val")
    (root / "train/s0/03.png").unlink()
    with pytest.raises(DataError, match="03.png"):
        MultiViewDataset(root, "train")


def test_mirrored_label_is_the_label_of_the_mirrored_camera():
    for yaw in (-40.0, 0.0, 25.0):
        mirrored = mirror_label(torch.tensor(label(yaw)))
        assert torch.allclose(mirrored, torch.tensor(label(-yaw)), atol=1e-6)
    one = torch.randn(3, 25)
    assert torch.allclose(mirror_label(mirror_label(one)), one, atol=1e-6)


def test_a_mirrored_label_projects_to_mirrored_pixels():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(50, 3, generator=generator) * 0.2
    camera = torch.tensor(label(33.0))
    camera[7] = 0.3  # raised, and with an off-centre principal point and skew
    camera[17], camera[18] = 0.1, 0.46

    def project(points, camera):
        pose, k = camera[:16].view(4, 4), camera[16:].view(3, 3)
        inside = (points - pose[:3, 3]) @ pose[:3, :3]
        uv = inside @ k.T
        return uv[:, :2] / uv[:, 2:]

    straight = project(points, camera)
    mirrored = project(points * torch.tensor([-1.0, 1.0, 1.0]), mirror_label(camera))
    assert torch.allclose(mirrored[:, 0], 1 - straight[:, 0], atol=1e-5)
    assert torch.allclose(mirrored[:, 1], straight[:, 1], atol=1e-5)


def test_pick_mirrors_and_scales(dataset):
    data = MultiViewDataset(dataset, "train")
    rows, flips = np.array([3, 3]), np.array([False, True])
    a, b = pick(data.images, rows, flips)
    assert torch.equal(b, a.flip(-1)) and -1 <= a.min() and a.max() <= 1
    assert torch.allclose((a + 1) * 127.5, data.images[3].float(), atol=1e-3)


@pytest.mark.parametrize(("kind", "sizes"), [(SingleImages, (4,)), (ViewGroups, (4,)), (ViewGroups, (2, 4))])
def test_samplers_resume_at_any_batch(dataset, kind, sizes):
    data = MultiViewDataset(dataset, "train")
    first, second = kind(data, *sizes, seed=5), kind(data, *sizes, seed=5)
    for _ in range(7):
        next(first)
    second.load_state_dict(first.state_dict())
    for _ in range(20):
        a, b = next(first), next(second)
        assert np.array_equal(a.targets, b.targets) and np.array_equal(a.flips, b.flips)
        assert (a.references is None and b.references is None) or np.array_equal(a.references, b.references)


def test_an_epoch_shows_every_image_once(dataset):
    data = MultiViewDataset(dataset, "train")
    sampler = SingleImages(data, 9, seed=1)
    for _ in range(3):
        seen = np.concatenate([next(sampler).targets for _ in range(3)])
        assert sorted(seen) == list(range(27))


def test_pairs_are_two_views_of_one_subject(dataset):
    data = MultiViewDataset(dataset, "train")
    owner = {int(row): i for i, rows in enumerate(data.subjects) for row in rows}
    sampler, flips = ViewGroups(data, 8, seed=2), 0
    for _ in range(40):
        batch = next(sampler)
        flips += batch.flips.sum()
        for target, reference in zip(batch.targets, batch.references, strict=True):
            assert owner[int(target)] == owner[int(reference)] and target != reference
    assert 100 < flips < 220


def test_groups_are_shuffled_views_without_the_reference(dataset):
    data = MultiViewDataset(dataset, "train")
    orders = set()
    for batch in (next(s) for s in [ViewGroups(data, 3, 8, seed=3)] for _ in range(20)):
        assert batch.targets.shape == (3, 8) and len(batch) == 24
        for targets, reference in zip(batch.targets, batch.references, strict=True):
            assert len({*targets, reference}) == 9
            orders.add(tuple(np.argsort(targets)))
    assert len(orders) > 50
    with pytest.raises(DataError, match="10 views"):
        ViewGroups(data, 1, 9)


def test_ordered_groups_go_from_one_side_to_the_other(dataset):
    data = MultiViewDataset(dataset, "train")
    sampler, mirrored = ViewGroups(data, 3, 8, ordered=True), 0
    for batch in (next(sampler) for _ in range(4)):
        flips = batch.flips.repeat(8)
        yaws = camera_angles(pick_labels(data.labels, batch.targets.ravel(), flips)).yaw.view(3, 8)
        assert (yaws.diff() >= 0).all()
        mirrored += batch.flips.sum()
    assert 0 < mirrored < 12


def test_validation_groups_refer_to_the_frontal_view(dataset):
    data = MultiViewDataset(dataset, "train")
    batch = fixed_groups(data, 3, 4)
    yaws = [math.degrees(math.atan2(data.labels[r, 3], data.labels[r, 11])) for r in batch.references]
    assert max(map(abs, yaws)) < 1e-3
    assert not {*batch.references} & {*batch.targets.ravel()}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_latent_cache_is_named_and_encoded_again(dataset, networks, tmp_path, capsys, how):
    data = MultiViewDataset(dataset, "val")
    autoencoder, _ = load_network(networks["autoencoder"])
    values = cached_latents(data, autoencoder, tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(DAMAGES[how](whole))
    assert torch.equal(cached_latents(data, autoencoder, tmp_path), values)
    assert f"{file.name}' is damaged" in capsys.readouterr().err and file.read_bytes() == whole


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_manifest_is_named(dataset, tmp_path, how):
    content = DAMAGES[how]((dataset / "manifest.jsonl").read_bytes())
    (tmp_path / "manifest.jsonl").write_bytes(content)
    with pytest.raises(DataError, match="manifest.jsonl' is damaged .*training.render, training.import_data"):
        read_manifest(tmp_path)


def test_latent_cache(dataset, networks, tmp_path):
    data = MultiViewDataset(dataset, "val")
    autoencoder, _ = load_network(networks["autoencoder"])
    latents = cached_latents(data, autoencoder, tmp_path)
    rows, flips = np.array([2, 5]), np.array([True, False])
    expected = autoencoder.encode(pick(data.images, rows, flips))
    assert torch.allclose(pick_latents(latents, rows, flips), expected, atol=1e-5)
    (file,) = tmp_path.iterdir()
    stamp = file.stat().st_mtime_ns
    assert torch.equal(cached_latents(data, autoencoder, tmp_path), latents)
    assert file.stat().st_mtime_ns == stamp
    with torch.no_grad():
        autoencoder.decoder.conv_in.weight.add_(1)
    cached_latents(data, autoencoder, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1  # a decoder changes no latent
    with torch.no_grad():
        autoencoder.encoder.conv_in.weight.add_(1)
    other = cached_latents(data, autoencoder, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 and not torch.equal(other, latents)
