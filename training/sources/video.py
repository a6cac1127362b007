"""Single frames of video files, through PyAV."""

from __future__ import annotations

from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from .reader import SkippedGroup


@contextmanager
def _opened(path: Path):
    try:
        with av.open(str(path)) as container:
            yield container, container.streams.video[0]
    except (av.FFmpegError, IndexError) as error:
        raise SkippedGroup(f"video '{path}' cannot be read ({error})") from None


def frame_count(path: Path) -> int:
    """Number of frames as the file's header gives it."""
    with _opened(path) as (_, stream):
        if stream.frames:
            return stream.frames
        if stream.duration is None:
            raise SkippedGroup(f"video '{path}' does not say how long it is")
        return int(stream.duration * stream.time_base * stream.average_rate)


def read_frame(path: Path, index: int) -> np.ndarray:
    """Frame `index` (from 0) of a video of constant frame rate as uint8 [H, W, 3]."""
    with _opened(path) as (container, stream):
        start = stream.start_time or 0
        step = 1 / Fraction(stream.average_rate * stream.time_base)  # time stamps per frame
        container.seek(int(start + index * step), stream=stream)  # to the key frame before it
        for frame in container.decode(stream):
            place = round((frame.pts - start) / step)
            if place == index:
                return frame.to_ndarray(format="rgb24")
            if place > index:
                break
    raise SkippedGroup(f"video '{path}' has no frame {index}")
