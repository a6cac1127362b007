"""Windows of views: nothing dropped, neighbours together, another grid at every step."""

from __future__ import annotations

import pytest

from diffportrait3d.views import van_der_corput, view_windows, window_weights


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("views, size, overlap", [(9, 8, 2), (64, 8, 2), (17, 6, 0), (13, 6, 5), (7, 2, 1)])
def test_every_view_and_every_pair_of_neighbours(views, size, overlap, closed):
    neighbours = {(view, view + 1) for view in range(views - 1)} | ({(views - 1, 0)} if closed else set())
    together = set()
    for step in range(8):
        windows = view_windows(views, size, overlap, closed, step)
        assert all(len(set(window)) == size for window in windows)
        assert {view for window in windows for view in window} == set(range(views))
        pairs = {pair for window in windows for pair in zip(window, window[1:], strict=False)}
        assert pairs <= neighbours, "a window holds neighbours only"
        assert overlap == 0 or pairs == neighbours
        together |= pairs
    assert together == neighbours, "no border stands at every step"


@pytest.mark.parametrize("closed", [False, True])
def test_overlap_is_kept_and_the_grid_moves(closed):
    grids = [view_windows(64, 8, 3, closed, step) for step in range(4)]
    for windows in grids:
        shared = [len(set(one) & set(other)) for one, other in zip(windows, windows[1:], strict=False)]
        assert min(shared) >= 3
    assert len({tuple(map(tuple, windows)) for windows in grids}) == 4
    assert len(grids[0]) in (13, 14), "no more windows than it takes"


def test_few_views_are_one_window():
    assert view_windows(5, 8, 2, True, 3) == [[0, 1, 2, 3, 4]]


def test_weights_and_sequence():
    assert window_weights(5) == [1, 2, 3, 2, 1] and window_weights(4) == [1, 2, 2, 1]
    assert [van_der_corput(index) for index in range(5)] == [0, 0.5, 0.25, 0.75, 0.125]


def test_errors_name_the_numbers():
    with pytest.raises(ValueError, match="at least 2 views, not 1"):
        view_windows(9, 1, 0)
    with pytest.raises(ValueError, match="windows of 4 views must be 0 to 3, not 4"):
        view_windows(9, 4, 4)
