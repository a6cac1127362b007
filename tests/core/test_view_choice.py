"""Choosing views by number and by angle."""

from __future__ import annotations

import pytest

from diffportrait3d.cameras.labels import orbit_camera, trajectory
from diffportrait3d.cameras.view_choice import left_over, nearest_views, parse_numbers, views_within


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0", [0]),
        ("5, 0-2", [5, 0, 1, 2]),
        ("7-5", [7, 6, 5]),
        ("-1", [7]),
        ("-3--1", [5, 6, 7]),
        ("2;4\n6", [2, 4, 6]),
        ("1 - 3,-1", [1, 2, 3, 7]),
        ("0-7", list(range(8))),
        (" 3 ", [3]),
        ("3 -1", [3, 2, 1]),
    ],
)
def test_numbers(text, numbers):
    assert parse_numbers(text, 8) == numbers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "numbers is empty; write the numbers of the views as 0, 2, 5-7"),
        (" ,, ", "numbers is empty"),
        ("8", "there is no view 8; the 8 views are 0 to 7"),
        ("-9", "there is no view -9"),
        ("2-9", "there is no view 9"),
        ("1, 0-2", "names view 1 more than once"),
        ("two", "'two' is no number of a view"),
        ("1.5", "'1.5' is no number of a view"),
        ("3-", "'3-' is no number of a view"),
        ("1:3", "'1:3' is no number of a view"),
    ],
)
def test_numbers_that_are_none(text, message):
    with pytest.raises(ValueError, match=message):
        parse_numbers(text, 8)


def test_angles():
    """Ends of the range belong to it; a range may go through the back of the head."""
    labels = orbit_camera([-170.0, -90.0, -45.0, 0.0, 45.0, 90.0, 170.0], [0.0, 0.0, 20.0, 10.0, -20.0, 0.0, 0.0])
    everywhere = (-90.0, 90.0)
    assert views_within(labels, (-45.0, 45.0), everywhere) == [2, 3, 4]
    assert views_within(labels, (-180.0, 180.0), (0.0, 20.0)) == [0, 1, 2, 3, 5, 6]
    assert views_within(labels, (90.0, -90.0), everywhere) == [0, 1, 5, 6]
    with pytest.raises(ValueError, match="no view lies in yaw 10.0 to 20.0 .* have yaw -170.0 to 170.0 and pitch -"):
        views_within(labels, (10.0, 20.0), everywhere)
    with pytest.raises(ValueError, match="pitch_min 5.0 is larger than pitch_max -5.0; swap them"):
        views_within(labels, (0.0, 1.0), (5.0, -5.0))


def test_nearest():
    labels = trajectory("arc", 5, (-40.0, 40.0), (0.0, 0.0))  # 20 degrees apart
    assert nearest_views(labels, orbit_camera(17.0, 5.0), 1) == [3]
    assert nearest_views(labels, orbit_camera(12.0, 0.0), 3) == [3, 2, 4]
    around = orbit_camera([-175.0, 0.0], [0.0, 0.0])
    assert nearest_views(around, orbit_camera(175.0, 0.0), 1) == [0], "179 and -179 degrees are neighbours"
    with pytest.raises(ValueError, match="count must be 1 to 5, as there are so many views, not 6"):
        nearest_views(labels, orbit_camera(0.0, 0.0), 6)


def test_left_over():
    assert left_over([3, 0], 5) == [1, 2, 4] and left_over([1, 0], 2) == []
