"""Camera paths written by hand."""

from __future__ import annotations

import pytest
import torch

from diffportrait3d.cameras.keyframes import Keyframe, interpolate_keyframes, parse_keyframes

DEFAULTS = {"roll": 1.0, "distance": 2.7, "fov": 13.37}


def test_lines_with_and_without_defaults():
    text = "# a comment\n-30 5\n\n 0, 0, 10   # the middle\n30 -5 0 3.1 20\n"
    assert parse_keyframes(text, **DEFAULTS) == [
        Keyframe(-30, 5, 1.0, 2.7, 13.37),
        Keyframe(0, 0, 10, 2.7, 13.37),
        Keyframe(30, -5, 0, 3.1, 20),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 0\n1 x", "line 2: pitch 'x' is not a number"),
        ("0 0\n\n5", "line 3: expected 'yaw pitch .*got 1"),
        ("1 2 3 4 5 6", "line 1: .*got 6 numbers"),
        ("0 90", "line 1: pitch must lie between -89 and 89, got 90"),
        ("0 0 0 -1", "line 1: distance must lie"),
        ("nan 0", "line 1: yaw must lie"),
        (" # nothing", "no keyframes"),
    ],
)
def test_a_bad_line_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_keyframes(text, **DEFAULTS)


def test_passes_through_every_keyframe():
    keyframes = parse_keyframes("-40 0\n-10 12\n0 12 20\n35 -8 0 3 20", **DEFAULTS)
    path = interpolate_keyframes(keyframes, 10)
    for field, values in path.items():
        assert values.shape == (10,)
        torch.testing.assert_close(values[::3], torch.tensor([getattr(k, field) for k in keyframes]).double())


def test_smooth_and_never_beyond_its_keyframes():
    keyframes = parse_keyframes("0 0\n10 30\n50 30\n60 -20", **DEFAULTS)
    path = interpolate_keyframes(keyframes, 3001)
    yaw, pitch = path["yaw"], path["pitch"]
    assert (yaw.diff() >= 0).all()  # rising keyframes, rising path
    assert pitch.max() <= 30 + 1e-9 and pitch.min() >= -20 - 1e-9
    torch.testing.assert_close(pitch[1000:2001], torch.full((1001,), 30.0).double())
    assert yaw.diff().diff().abs().max() < 1e-3  # no kink in the speed


def test_one_keyframe_and_one_view():
    still = parse_keyframes("5 6", **DEFAULTS)
    assert interpolate_keyframes(still, 3)["yaw"].tolist() == [5, 5, 5]
    assert interpolate_keyframes(parse_keyframes("5 6\n7 8", **DEFAULTS), 1)["yaw"].tolist() == [5]
