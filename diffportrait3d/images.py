"""The one reader for image files that come from outside: from a user's folders, a data set, a detector or a camera.

Every file becomes upright RGB. Sixteen bits and more are scaled, not cut off; EXIF orientation is obeyed; transparency
is composited on `BACKGROUND`; of a file with several frames the first is read. Whatever had to be decided for the user
is in the image's `notes`, which the caller reports.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from .files import write_atomically

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")  # of the files that a folder is searched for
BACKGROUND, BACKGROUND_NAME = 255, "white"  # under transparent areas; also `evaluation.paper`'s "without background"
FILLED = f"transparent areas are filled with {BACKGROUND_NAME}"
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF tags, and a value of the second
_CLEARLY_DARKER = 32  # values that use less than this part of a guessed scale probably have another one

log = logging.getLogger(__name__)


class ImageError(ValueError):
    """A file that cannot be read as an image; the message names it and gives `reason`."""

    def __init__(self, path: Path, reason: str):
        super().__init__(path, reason)  # both, so that it can be pickled
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.args[0]} is not an image that can be read: {self.reason}"


class UserImage(NamedTuple):
    """pixels: [H, W, 3], uint8, or float32 in [0, 1] where the file has more than 8 bits. notes: what was decided for
    the user, each a phrase such as "transparent areas are filled with white"."""

    pixels: np.ndarray
    notes: tuple[str, ...]

    def as_bytes(self) -> np.ndarray:
        """uint8 [H, W, 3]."""
        if self.pixels.dtype == np.uint8:
            return self.pixels
        return (self.pixels * 255).round().astype(np.uint8)

    def as_floats(self) -> np.ndarray:
        """float32 [H, W, 3] in [0, 1]."""
        if self.pixels.dtype == np.uint8:
            return self.pixels.astype(np.float32) / 255
        return self.pixels

    def as_tensor(self) -> Tensor:
        """float32 [3, H, W] in [0, 1]."""
        return torch.from_numpy(self.as_floats()).permute(2, 0, 1).contiguous()


class NoteLog:
    """Logs every note once, with the first file that has it: a data set of cut-outs needs one line, not thousands."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, path: Path, image: UserImage) -> UserImage:
        for note in image.notes:
            if note not in self._said:
                self._said.add(note)
                log.warning("'%s': %s (other images alike are not named)", path, note)
        return image


def read_image(path: str | os.PathLike) -> UserImage:
    """The file as upright RGB.

    Raises:
        ImageError: it is missing, damaged, too large for Pillow's limit, no image, or its values have no known scale.
    """
    path = Path(path)
    try:
        with Image.open(path) as file:
            return _decoded(file)
    except FileNotFoundError:
        raise ImageError(path, "it does not exist") from None
    except Exception as error:  # on damaged files Pillow's plugins raise almost anything, struct.error for one
        raise ImageError(path, str(error) or type(error).__name__) from error


def _decoded(file: Image.Image) -> UserImage:
    notes = []
    frames = getattr(file, "n_frames", 1)
    if frames > 1:
        file.seek(0)
        notes.append(f"it has {frames} frames, the first is read")
    image = _upright(file, notes)
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        pixels = np.repeat(_deep_grey(image, file, notes)[..., None], 3, axis=-1)  # [H, W, 3]
        if (transparent := np.asarray(image) == image.info.get("transparency")).any():
            pixels[transparent] = BACKGROUND / 255
            notes.append(FILLED)
    else:
        pixels = _shallow(image, notes)
    return UserImage(pixels, tuple(notes))


def _upright(file: Image.Image, notes: list[str]) -> Image.Image:
    """The loaded image, turned as its EXIF orientation says. (`ImageOps.exif_transpose` also rewrites the EXIF block,
    which fails on blocks that cameras do write.)"""
    turned_by_pillow = getattr(file, "tag_v2", {}).get(ExifTags.Base.Orientation, 1)  # TIFF, while it is loaded
    file.load()  # first: a PNG may have its EXIF block behind the pixels
    try:
        orientation = file.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # see read_image
        notes.append("its EXIF block cannot be read, so the image is taken as upright")
        return file
    for value in (turned_by_pillow, orientation):
        if value in _UPRIGHT:
            notes.append(f"it is turned upright by its EXIF orientation {value}")
    if orientation not in _UPRIGHT:
        return file
    turned = file.transpose(_UPRIGHT[orientation])
    turned.info = file.info
    return turned


def _shallow(image: Image.Image, notes: list[str]) -> np.ndarray:
    """uint8 [H, W, 3] of every mode with 8 bits or fewer, palettes and CMYK included."""
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB"))
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:  # Pillow reads 16-bit RGB as 8 bits, but not its transparent colour
        image.info = {**image.info, "transparency": tuple(value >> 8 for value in key)}
    pixels = np.asarray(image.convert("RGBA"))
    alpha = pixels[..., 3:]
    if alpha.min(initial=255) == 255:
        return pixels[..., :3]
    notes.append(FILLED)
    share = alpha.astype(np.float32) / 255
    return (pixels[..., :3] * share + BACKGROUND * (1 - share)).round().astype(np.uint8)


def _deep_grey(image: Image.Image, file: Image.Image, notes: list[str]) -> np.ndarray:
    """float32 [H, W] in [0, 1] of modes I;16, I and F."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all() or values.min(initial=0) < 0:
        raise ValueError("it has values that are negative, infinite or not a number; save it with 8 or 16 bits")
    tags = getattr(file, "tag_v2", {})
    if image.mode.startswith("I;16"):
        top = 2 ** tags.get(_BITS, (16,))[0] - 1  # TIFF keeps 12 bits in 16
    elif image.mode == "I" and file.format in ("PNG", "PPM"):
        top = 2**16 - 1
    else:
        top = _guessed_scale(float(values.max(initial=0)), (1, 255, 65535) if image.mode == "F" else (255, 65535))
        notes.append(f"its {'floating-point' if image.mode == 'F' else '32-bit'} values are read as 0 to {top}")
    grey = np.minimum(values / top, 1).astype(np.float32)
    return 1 - grey if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else grey


def _guessed_scale(largest: float, scales: tuple[int, ...]) -> int:
    """The smallest scale that holds the largest value of a file that does not state one."""
    top = next((scale for scale in scales if largest <= scale), None)
    if top is None or (top != scales[0] and largest < top / _CLEARLY_DARKER):
        known = ", ".join(f"0 to {scale}" for scale in scales)
        raise ValueError(f"its values reach {largest:g}, no known scale ({known}); save it with 8 or 16 bits")
    return top


def as_pixels(images: Tensor) -> np.ndarray:
    """Images [..., 3, H, W] in [0, 1] as uint8 [..., H, W, 3]."""
    return (images.detach().clamp(0, 1) * 255).round().byte().movedim(-3, -1).contiguous().cpu().numpy()


def sheet(rows: Sequence[Tensor]) -> Tensor:
    """Rows of images [n, 3, H, W] as one image [3, rows * H, most * W]; short rows end in grey."""
    most = max(map(len, rows))
    full = [torch.cat([row, row.new_full((most - len(row), *row.shape[1:]), 128 / 255)]) for row in rows]
    return torch.cat([torch.cat(list(row), dim=-1) for row in full], dim=-2)


def save_image(path: str | os.PathLike, image: Tensor | np.ndarray, durable: bool = True) -> None:
    """Writes an image, [3, H, W] in [0, 1] or uint8 [H, W, 3], as PNG, whole or not at all.

    Args:
        durable: see `files.write_atomically`.

    Raises:
        WriteError: it says why the file cannot be written.
    """
    pixels = as_pixels(image) if isinstance(image, Tensor) else image
    write_atomically(Path(path), lambda file: Image.fromarray(pixels).save(file, "PNG"), durable)
