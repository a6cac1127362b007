"""The colour correction that NeRSemble's two versions ship.

v1: an affine map of the sRGB values, [3, 4] or [4, 4], applied from the right: out = rgb @ A[:3, :3] + A[:3, 3].
v2: a matrix [3, T] on T polynomial terms of linear RGB (Cheung et al., 2004; the number of columns says which terms).
Source: `nersemble_dataset.py` of the NeRSemble code, `color_correction.py` of the NeRSemble v2 downloader.
"""

from __future__ import annotations

import numpy as np

from ..dataset.images import DataError

_SECOND = "r g b rg rb gb"
_TRIPLE = f"{_SECOND} rr gg bb rgb"
_CUBIC = f"{_TRIPLE} rrg ggb bbr rrb ggr bbg rrr ggg bbb"
_TERMS = (  # "1" is the constant
    "r g b",
    "r g b 1",
    "r g b rgb 1",
    f"{_SECOND} 1",
    f"{_SECOND} rgb 1",
    f"{_SECOND} rr gg bb 1",
    f"{_TRIPLE} 1",
    f"{_TRIPLE} rrr ggg bbb 1",
    f"{_TRIPLE} rrg ggb bbr rrr ggg bbb",
    f"{_TRIPLE} rrg ggb bbr rrr ggg bbb 1",
    _CUBIC,
    f"{_CUBIC} 1",
    f"{_CUBIC} rrgb rggb rgbb",
)
TERMS = {len(terms.split()): terms.split() for terms in _TERMS}


def apply_affine(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """v1: image uint8 [H, W, 3], matrix [3, 4] or [4, 4]."""
    if matrix.ndim != 2 or matrix.shape[0] not in (3, 4) or matrix.shape[1] != 4:
        raise DataError(f"A v1 colour correction is [3, 4] or [4, 4], got {matrix.shape}.")
    return _to_bytes(image / 255 @ matrix[:3, :3] + matrix[:3, 3])


def apply_polynomial(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """v2: image uint8 [H, W, 3], matrix [3, T]."""
    if matrix.ndim != 2 or matrix.shape[0] != 3 or matrix.shape[1] not in TERMS:
        raise DataError(f"A v2 colour calibration is [3, T] with T one of {sorted(TERMS)}, got {matrix.shape}.")
    channels = dict(zip("rgb", np.moveaxis(_decode(image / 255), -1, 0), strict=True))
    one = channels["1"] = np.ones(image.shape[:2])
    terms = [np.prod([one, *(channels[c] for c in term)], axis=0) for term in TERMS[matrix.shape[1]]]
    return _to_bytes(_encode(np.clip(np.stack(terms, axis=-1) @ matrix.T, 0, 1)))


def _decode(values: np.ndarray) -> np.ndarray:
    """sRGB -> linear (IEC 61966-2-1)."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def _encode(values: np.ndarray) -> np.ndarray:
    return np.where(values <= 0.0031308, values * 12.92, 1.055 * values ** (1 / 2.4) - 0.055)


def _to_bytes(values: np.ndarray) -> np.ndarray:
    return (np.clip(values, 0, 1) * 255).round().astype(np.uint8)
