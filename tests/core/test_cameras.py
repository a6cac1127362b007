"""Camera labels: EG3D's convention, the inverse of the angles, trajectories, projection and files."""

from __future__ import annotations

import pytest
import torch

from diffportrait3d.cameras import labels as cameras
from diffportrait3d.cameras.projection import project, world_to_camera


def test_frontal_camera_looks_at_the_pivot_from_the_front():
    pose, intrinsics = cameras.split_label(cameras.orbit_camera(0, 0))
    torch.testing.assert_close(pose[:3, 3], torch.tensor([0.0, 0.0, 2.9]))  # pivot 0.2 + radius 2.7
    torch.testing.assert_close(pose[:3, :3], torch.diag(torch.tensor([1.0, -1.0, -1.0])))  # OpenCV: y down, z forward
    torch.testing.assert_close(intrinsics, torch.tensor([[4.2647, 0, 0.5], [0, 4.2647, 0.5], [0, 0, 1]]))


def test_eg3d_camera_circles_the_origin():
    frontal, side = cameras.orbit_camera([0.0, 90.0], 0.0, around="eg3d")
    torch.testing.assert_close(cameras.split_label(frontal)[0][:3, 3], torch.tensor([0.0, 0.0, 2.7]))
    pose = cameras.split_label(side)[0]
    torch.testing.assert_close(pose[:3, 3], torch.tensor([2.7, 0.0, 0.0]), atol=1e-6, rtol=0)
    towards = torch.tensor([-2.7, 0.0, 0.2])
    torch.testing.assert_close(pose[:3, 2], towards / towards.norm())


def test_signs_of_yaw_and_pitch():
    right, above = cameras.orbit_camera([40.0, 0.0], [0.0, 25.0])
    assert right[3] > 1 and abs(right[7]) < 1e-6  # position x, y
    assert above[7] > 1 and abs(above[3]) < 1e-6


def test_angles_invert_orbit():
    generator = torch.Generator().manual_seed(0)
    yaw, pitch, roll = (torch.rand(3, 50, generator=generator) * 2 - 1) * torch.tensor([[175.0], [85.0], [170.0]])
    labels = cameras.orbit_camera(yaw, pitch, roll, radius=torch.linspace(1, 4, 50))
    assert labels.shape == (50, 25) and labels.dtype == torch.float32
    found = cameras.camera_angles(labels)
    for angle, wanted in zip(found, (yaw, pitch, roll), strict=True):
        torch.testing.assert_close(angle, wanted, atol=2e-3, rtol=0)
    cameras.validate_labels(labels)


def test_roll_turns_the_picture_counter_clockwise():
    up = torch.tensor([[0.0, 0.1, 0.2]])
    plain = project(up, cameras.orbit_camera(0, 0), 100)[0]
    rolled = project(up, cameras.orbit_camera(0, 0, roll=30.0), 100)[0]
    assert plain[0] == pytest.approx(50) and plain[1] < 50  # above the centre
    assert rolled[0] < 49 and rolled[1] < 50


def test_projection_of_known_points():
    label = cameras.orbit_camera(0, 0)
    seen = project(torch.tensor([[0.0, 0.0, 0.2], [0.1, 0.2, 0.9]]), label, 512)
    torch.testing.assert_close(seen[0], torch.tensor([256.0, 256.0, 2.7]))
    torch.testing.assert_close(seen[1], torch.tensor([256 + 4.2647 * 512 * 0.1 / 2, 256 - 4.2647 * 512 * 0.2 / 2, 2.0]))
    oblong = project(torch.tensor([[0.1, 0.2, 0.9]]), label, (256, 512))[0]
    torch.testing.assert_close(oblong[1], seen[1, 1] / 2)


def test_world_to_camera_inverts_the_pose():
    label = cameras.orbit_camera([30.0, -50.0], [10.0, 15.0], 7.0)
    product = world_to_camera(label) @ cameras.split_label(label)[0]
    torch.testing.assert_close(product, torch.eye(4).expand(2, 4, 4), atol=1e-6, rtol=0)
    assert torch.equal(cameras.join_label(*cameras.split_label(label)), label)


def _broken(change) -> torch.Tensor:
    label = cameras.orbit_camera([0.0, 20.0], 0.0)
    change(label[1])
    return label


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(2, 24), r"\[V, 25\]"),
        (_broken(lambda label: label[0:1].fill_(float("nan"))), "view 1 contains NaN"),
        (_broken(lambda label: label[0:3].mul_(1.1)), "view 1 has a rotation that is not orthonormal"),
        (_broken(lambda label: label[0:12:4].neg_()), "mirrored"),
        (_broken(lambda label: label[12:13].fill_(1.0)), "last pose row"),
        (_broken(lambda label: label[16:17].fill_(-1.0)), "focal length"),
        (_broken(lambda label: label[16:22].mul_(512.0)), "pixels"),
    ],
)
def test_wrong_labels_are_named(labels, message):
    with pytest.raises(ValueError, match=message):
        cameras.validate_labels(labels, "my file")


def test_pitch_at_the_pole_is_refused():
    with pytest.raises(ValueError, match="pitch"):
        cameras.orbit_camera(0, 90)


@pytest.mark.parametrize("kind", cameras.TRAJECTORIES)
def test_trajectories_stay_in_range(kind):
    labels = cameras.trajectory(kind, 24, yaw=(-50, 30), pitch=(-5, 15), radius=3.0)
    yaw, pitch, roll = cameras.camera_angles(labels)
    assert labels.shape == (24, 25)
    assert yaw.min() >= -50.01 and yaw.max() <= 30.01 and yaw.max() - yaw.min() > 50
    assert pitch.min() >= -5.01 and pitch.max() <= 15.01
    assert roll.abs().max() < 1e-3
    centre = cameras.split_label(labels)[0][:, :3, 3] - torch.tensor(cameras.PIVOT)
    torch.testing.assert_close(centre.norm(dim=1), torch.full((24,), 3.0))


def test_closed_trajectories_step_evenly_across_the_seam():
    for kind in ("orbit", "figure_eight"):
        centre = cameras.split_label(cameras.trajectory(kind, 40))[0][:, :3, 3]
        steps = (centre - centre.roll(1, 0)).norm(dim=1)
        assert steps[0] < 1.01 * steps[1:].max()  # closing is no longer a step than any other


def test_arc_and_single_view():
    assert cameras.camera_angles(cameras.trajectory("arc", 3, yaw=(-30, 30)))[0].tolist() == pytest.approx(
        [-30, 0, 30], abs=1e-3
    )
    assert cameras.camera_angles(cameras.trajectory("arc", 1, yaw=(-30, 30)))[0].tolist() == pytest.approx(
        [0], abs=1e-3
    )
    with pytest.raises(ValueError, match="zigzag"):
        cameras.trajectory("zigzag", 3)


def test_a_path_around_the_origin_is_eg3ds():
    path = cameras.trajectory("orbit", 5, (-20, 20), (-14, 14), around="eg3d")
    phase = 2 * torch.pi * torch.arange(5) / 5
    wanted = cameras.orbit_camera(20 * torch.sin(phase), 14 * torch.cos(phase), around="eg3d")
    torch.testing.assert_close(path, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(cameras.split_label(path)[0][:, :3, 3].norm(dim=1), torch.full((5,), 2.7))
    with pytest.raises(ValueError, match="'sun'"):
        cameras.trajectory("orbit", 5, around="sun")


def test_fov_and_focal():
    assert cameras.fov_from_focal(cameras.FOCAL) == pytest.approx(13.373, abs=1e-3)
    assert cameras.focal_from_fov(cameras.fov_from_focal(2.0)) == pytest.approx(2.0)


def test_the_loop_of_eg3ds_video_script_is_an_orbit_around_its_centre():
    """docs/cameras.md: azimuth 90 degrees + 0.35 sin, vertical number v = pi/2 - 0.05 + 0.25 cos (radians)."""
    phase = 2 * torch.pi * torch.arange(48, dtype=torch.float64) / 48
    v = torch.pi / 2 - 0.05 + 0.25 * torch.cos(phase)
    pitch = torch.rad2deg(torch.asin(1 - 2 * v / torch.pi))
    script = cameras.orbit_camera(torch.rad2deg(0.35 * torch.sin(phase)), pitch, around="eg3d")
    ours = cameras.trajectory("orbit", 48, (-20.05, 20.05), (11.01, -7.32), around="eg3d")
    for angle, wanted in zip(cameras.camera_angles(ours), cameras.camera_angles(script), strict=True):
        torch.testing.assert_close(angle, wanted, atol=0.1, rtol=0)
