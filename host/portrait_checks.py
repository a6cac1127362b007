"""What an artist should know about a portrait before the views disappoint: said in the log, and on the node."""

from __future__ import annotations

import logging
from typing import Any

from server import PromptServer
from torch import Tensor

from ..diffportrait3d.portraits.alignment import EG3D, AlignmentError, photograph_crop
from ..diffportrait3d.portraits.detector import model_folder
from ..diffportrait3d.portraits.warping import corners
from .loading import HostNetwork
from .photographs import ALIGN, find_faces

SD15_CHANNELS = 320  # the width of SD1.5's UNet
SQUARE = 1.05  # a side against the other, up to which nothing of a head is lost
LEAST_CROP = 0.45  # of the portrait's side, that EG3D's crop of its face takes; rendered heads have 0.74
OWN_FILES = ("LoadImage", "LoadImageMask", "LoadImageOutput")


def portrait_warnings(image: Tensor, encoder: HostNetwork, own_file: bool) -> list[str]:
    """Sentences about portraits IMAGE [R, H, W, C]; none where nothing is wrong.

    Args:
        encoder: the reference encoder; the width of its network tells the miniature.
        own_file: whether the image comes from a file of the user's, see `from_own_file`.
    """
    height, width = image.shape[1:3]
    found = []
    if max(height, width) > SQUARE * min(height, width):
        found.append(
            f"The portrait is {width}x{height}, not square: views see its middle only. {ALIGN} finds the head in it."
        )
    elif (share := _head_share(image)) is not None and share < LEAST_CROP:
        found.append(
            f"The head is small in the portrait: the crop that the networks know takes {share:.0%} of its side. "
            f"{ALIGN} makes it."
        )
    if own_file and encoder.config.model_channels < SD15_CHANNELS:
        found.append(
            "The miniature knows rendered heads only and distorts the face of a photograph; the released weights "
            "(template 7) know photographs."
        )
    return found


def warn(node: str, node_id: str | None, sentences: list[str]) -> None:
    """In the log, and on the node where there is one."""
    for sentence in sentences:
        logging.warning("%s: %s", node, sentence)
    if sentences and node_id is not None:
        PromptServer.instance.send_progress_text("\n".join(sentences), node_id)


def from_own_file(prompt: dict[str, Any] | None, node_id: str | None, name: str) -> bool:
    """Whether what comes to input `name` of a node was loaded from a file of the user's, somewhere before it."""
    waiting, seen = [((prompt or {}).get(node_id, {}).get("inputs", {})).get(name)], set()
    while waiting:
        link = waiting.pop()
        if not isinstance(link, list) or link[0] in seen or link[0] not in prompt:
            continue
        seen.add(link[0])
        if prompt[link[0]]["class_type"] in OWN_FILES:
            return True
        waiting += prompt[link[0]]["inputs"].values()
    return False


def _head_share(image: Tensor) -> float | None:
    """The side of EG3D's crop of the largest face in parts of the portrait's; None without dlib or a face."""
    faces = find_faces(image[0]) if model_folder() is not None else []
    try:
        crop = photograph_crop(faces[0], tuple(image.shape[1:3]), EG3D) if faces else None
    except AlignmentError:
        return None
    return None if crop is None else float((corners(crop.homography)[1] - corners(crop.homography)[0]).norm())
