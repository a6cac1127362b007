"""Heads from the ICT Face Model Light (USC Institute for Creative Technologies, MIT licence), quantised to int8.

The file is made by the project's tools from the public model (github.com/ICT-VGL/ICT-FaceKit) and is not part of the
repository. Arrays: V [N, 3] mean shape in cm, F [Q, 4] quads, mat [Q] and mats (material names), I [100, N, 3] int8
with I_scale (identity modes), E [57, N, 3] int8 with E_scale and ex (expression names, ARKit style).
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .materials import Dice
from .mesh import SKIN, SOCKET, TEETH, HeadMesh

# The 68 iBUG landmarks as vertex numbers, published with the model (FaceXModel/vertex_indices.json).
# fmt: off
LANDMARKS = (
    1225, 1888, 1052, 367, 1719, 1722, 2199, 1447, 966, 3661, 4390, 3927, 3924, 2608, 3272, 4088, 3443,
    268, 493, 1914, 2044, 1401, 3615, 4240, 4114, 2734, 2509, 978, 4527, 4942, 4857, 1140, 2075, 1147,
    4269, 3360, 1507, 1542, 1537, 1528, 1518, 1511, 3742, 3751, 3756, 3721, 3725, 3732, 5708, 5695, 2081,
    0, 4275, 6200, 6213, 6346, 6461, 5518, 5957, 5841, 5702, 5711, 5533, 6216, 6207, 6470, 5517, 5966,
)
# fmt: on
MOUTH_CAVITY = range(11248, 13294)  # the inside of the mouth, by the model's own vertex ranges
_NEEDED = ("V", "F", "mat", "mats", "I", "I_scale", "E", "E_scale", "ex")
_DRAWN = ("M_Face", "M_BackHead", "M_Teeth")
_FRONT_TEETH = 8.0  # teeth behind this z (cm) are never seen, nor is the tongue
# A smile and a frown use both sides; these names are completed with _L and _R.
_PAIRED = (
    "mouthSmile mouthFrown mouthDimple mouthPress browDown browOuterUp browInnerUp eyeSquint eyeBlink cheekRaiser "
    "mouthUpperUp mouthLowerDown mouthStretch noseSneer eyeWide"
).split()


class IctHeads:
    """The model, loaded once; `head` draws a person. Raises ValueError, naming the file, if it is missing or wrong."""

    def __init__(self, path: str | os.PathLike):
        arrays = _load(Path(path))
        self.mean = torch.from_numpy(arrays["V"]).float()
        self.identity = _dequantise(arrays, "I")  # [100, N*3]
        self.expression = _dequantise(arrays, "E")  # [57, N*3]
        self.expression_names = [str(name) for name in arrays["ex"]]
        names = [str(name) for name in arrays["mats"]]
        quads, material = torch.from_numpy(arrays["F"]).long(), torch.from_numpy(arrays["mat"]).long()
        drawn = torch.isin(material, torch.tensor([names.index(name) for name in _DRAWN]))
        drawn &= (material != names.index("M_Teeth")) | (self.mean[quads][..., 2].amin(1) > _FRONT_TEETH)
        self.triangles, triangle_material = _split_quads(quads[drawn], material[drawn])
        self.part = self._parts(triangle_material, names)
        self._eyes = [quads[material == names.index(f"M_Sclera{side}")].unique() for side in ("Right", "Left")]
        self.skull = self._skull()

    def head(self, generator: torch.Generator) -> HeadMesh:
        """A random person with a random mild expression."""
        weights = (torch.randn(len(self.identity), generator=generator) * 0.9).clamp(-2.2, 2.2)
        return self.build(weights, self.sample_expression(generator))

    def build(self, identity: Tensor, expression: dict[str, float] | None = None) -> HeadMesh:
        """The head for identity weights [100] (unit normal) and named expression weights (0..1)."""
        rest = self.mean + (identity @ self.identity).view(-1, 3)
        rest, shift, scale = self._align(rest)
        weights = torch.zeros(len(self.expression_names))
        for name, value in (expression or {}).items():
            if name not in self.expression_names:
                raise ValueError(f"unknown expression {name!r}; known: {', '.join(self.expression_names)}")
            weights[self.expression_names.index(name)] = value
        posed = rest + (weights @ self.expression).view(-1, 3) * scale
        low, high = (torch.stack([getattr(rest[eye], end)(0) for eye in self._eyes]) for end in ("amin", "amax"))
        eye_radius = float((high - low)[:, :2].mean()) / 2
        eyes = torch.cat([(low + high)[:, :2] / 2, low[:, 2:] + eye_radius], 1)
        used, triangles = self.triangles.unique(return_inverse=True)
        return HeadMesh(
            vertices=posed[used],
            rest=rest[used],
            triangles=triangles,
            part=self.part[used],
            landmarks=rest[list(LANDMARKS)],
            posed_landmarks=posed[list(LANDMARKS)],
            eyes=eyes,
            eye_radius=eye_radius,
            skull=torch.searchsorted(used, self.skull),
        )

    def sample_expression(self, generator: torch.Generator) -> dict[str, float]:
        """A mild, mostly symmetric expression: a mouth shape, the brows, the eyes, each present or not."""
        draw = Dice(generator).uniform
        mouth = ("mouthSmile", "mouthSmile", "mouthSmile", "mouthFrown", "mouthPucker", "mouthFunnel", "", "")
        result: dict[str, float] = {}
        for options, low, high in (
            (mouth, 0.2, 0.9),
            (("browInnerUp", "browDown", "browOuterUp", ""), 0.2, 0.8),
            (("eyeSquint", "eyeBlink", "", "", ""), 0.1, 0.35),
            (("jawOpen", "mouthUpperUp", "", "", ""), 0.1, 0.4),
        ):
            name, value = options[int(draw(0, len(options) - 1e-6))], draw(low, high)
            if not name:
                continue
            for full in (f"{name}_L", f"{name}_R") if name in _PAIRED else (name,):
                result[full] = value * draw(0.85, 1.0)
        return result

    def _parts(self, material: Tensor, names: list[str]) -> Tensor:
        part = torch.full((len(self.mean),), SKIN)
        part[self.triangles[material == names.index("M_Teeth")].unique()] = TEETH
        part[list(MOUTH_CAVITY)] = SOCKET
        return part

    def _skull(self) -> Tensor:
        p, skin = self.mean, torch.zeros(len(self.mean), dtype=torch.bool)
        skin[self.triangles.unique()] = True
        skin &= self.part == SKIN
        ear_box = (p[:, 0].abs() > 7.0) & (p[:, 1] > -3.5) & (p[:, 1] < 7.5) & (p[:, 2] > -4.0) & (p[:, 2] < 4.2)
        return torch.nonzero(skin & ~ear_box & (p[:, 1] > -9)).squeeze(1)

    def _align(self, rest: Tensor) -> tuple[Tensor, Tensor, float]:
        """Bring eyes and mouth to the mean's place and half-way to its size, as a landmark-aligned crop does."""

        def frame(shape: Tensor) -> tuple[Tensor, Tensor]:
            marks = shape[list(LANDMARKS)]
            eyes, mouth = marks[36:48].mean(0), marks[48:60].mean(0)
            return (eyes + mouth) / 2, (eyes - mouth).norm()

        (here, size), (there, wanted) = frame(rest), frame(self.mean)
        scale = float((wanted / size) ** 0.5)
        return (rest - here) * scale + there, there - here * scale, scale


def _load(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; ICT heads need the quantised model (an .npz), or use analytic heads")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable .npz file: {error}") from error
    missing = [key for key in _NEEDED if key not in arrays]
    if missing:
        raise ValueError(f"{path}: not a quantised ICT model, arrays missing: {', '.join(missing)}")
    if arrays["I"].shape[1:] != arrays["V"].shape or arrays["E"].shape[1:] != arrays["V"].shape:
        raise ValueError(f"{path}: identity and expression modes do not match the {len(arrays['V'])} vertices")
    return arrays


def _dequantise(arrays: dict[str, np.ndarray], key: str) -> Tensor:
    modes = torch.from_numpy(arrays[key]).float() * torch.from_numpy(arrays[f"{key}_scale"]).float()
    return modes.flatten(1)


def _split_quads(quads: Tensor, material: Tensor) -> tuple[Tensor, Tensor]:
    triangles = torch.cat([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])
    a, b, c = triangles.unbind(1)
    whole = (a != b) & (b != c) & (c != a)
    return triangles[whole], material.repeat(2)[whole]
