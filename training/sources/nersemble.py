"""NeRSemble (Kirschstein et al., SIGGRAPH 2023), both versions: 16 calibrated, synchronised cameras around a head.

v1: PID/camera_params.json, PID/sequences/SEQ/frame_00000/images-2x-73fps/cam_SERIAL.png (or `images-2x`),
    PID/annotations/SEQ/color_correction/SERIAL.npy
v2: PID/calibration/camera_params.json, PID/calibration/color_calibration.json, PID/sequences/SEQ/images/cam_SERIAL.mp4

`camera_params.json` holds `world_2_cam` (OpenCV, 4x4 by serial) and one 3x3 `intrinsics` for images of 2200x3208.
Source: the code published with v1 and the v2 downloader (`nersemble_data`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffportrait3d.images import UserImage

from ..dataset.images import DataError
from .alignment import (
    OUTSIDE,
    Camera,
    calibrated_camera,
    eg3d_crop,
    head_similarity,
    triangulate_face,
    warp,
)
from .colour import apply_affine, apply_polynomial
from .groups import (
    SPLITS,
    PortraitView,
    SkippedGroup,
    Splits,
    ViewGroup,
    folder_name,
    read_json,
    read_view,
    reason_of,
)
from .landmarks import read_points, sequence_points
from .video import frame_count, read_frame

CALIBRATED_SIZE = (2200, 3208)  # width, height
V1_IMAGES = ("images-2x-73fps", "images-2x")
NOT_A_PORTRAIT = "BACKGROUND"  # v2 keeps images of the empty room there


@dataclass(frozen=True)
class Options:
    """What decides the images.

    groups: how many time steps each split gets. views: cameras a time step, the first one the reference of a fixed
    protocol. sequences: patterns of sequence names. tolerance: see `triangulate_face`. least_inside: share of a crop
    that its image must cover. outside: see `warp`.
    """

    groups: dict[str, int]
    views: int = 9
    sequences: tuple[str, ...] = ("*",)
    colour: bool = True
    tolerance: float = 0.02
    least_inside: float = 0.6
    outside: str = OUTSIDE[0]
    seed: int = 0

    def __post_init__(self):
        if self.views < 2:
            raise DataError(f"A group needs at least 2 views (reference and target), got {self.views}.")


@dataclass(frozen=True)
class Participant:
    """The files of one participant, whichever version they have."""

    folder: Path
    version: int

    @property
    def name(self) -> str:
        return self.folder.name

    def sequences(self) -> list[str]:
        folders = [path for path in (self.folder / "sequences").glob("*") if path.is_dir()]
        return sorted(path.name for path in folders if path.name != NOT_A_PORTRAIT)

    def frames(self, sequence: str) -> list[int]:
        """Numbers of the time steps that have images."""
        if self.version == 2:
            return list(range(self._length(sequence)))
        folders = (self.folder / "sequences" / sequence).glob("frame_*")
        return sorted(int(path.name[6:]) for path in folders if re.fullmatch(r"frame_\d+", path.name))

    def cameras(self, sequence: str, frame: int) -> list[str]:
        """Serials that have an image of this time step, in order."""
        folder = self._videos(sequence) if self.version == 2 else self._images(sequence, frame)
        pattern = "cam_*.mp4" if self.version == 2 else "cam_*.png"
        return sorted(path.stem[4:] for path in folder.glob(pattern))

    def image(self, sequence: str, frame: int, serial: str) -> UserImage:
        """[H, W, 3] as it was taken, colours not corrected, with the reader's notes."""
        if self.version == 2:
            image = UserImage(read_frame(self._videos(sequence) / f"cam_{serial}.mp4", frame), ())
        else:
            image = read_view(self._images(sequence, frame) / f"cam_{serial}.png")
        height, width = image.pixels.shape[:2]
        if abs(width / height / (CALIBRATED_SIZE[0] / CALIBRATED_SIZE[1]) - 1) > 0.01:
            raise SkippedGroup(
                f"camera {serial} of participant {self.name}, '{sequence}', has images of {width}x{height}; the "
                f"calibration is for {CALIBRATED_SIZE[0]}x{CALIBRATED_SIZE[1]} or the same shape"
            )
        return image

    def correct_colours(self, image: np.ndarray, sequence: str, serial: str) -> np.ndarray:
        """The image after this version's colour correction."""
        if self.version == 2:
            path = self.folder / "calibration" / "color_calibration.json"
        else:
            path = self.folder / "annotations" / sequence / "color_correction" / f"{serial}.npy"
        if not path.is_file():
            raise SkippedGroup(f"there is no colour correction '{path}'; --no-colour-correction does without")
        if self.version == 1:
            return apply_affine(image, np.load(path, allow_pickle=False).astype(np.float64))
        matrices = read_json(path, "colour calibration")
        if serial not in matrices:
            raise SkippedGroup(f"participant {self.name} has no colour calibration of camera {serial}")
        return apply_polynomial(image, np.array(matrices[serial], dtype=np.float64))

    def _length(self, sequence: str) -> int:
        """Frames of a sequence, as the first video that can be read gives them; 0 without videos."""
        reasons = []
        for path in sorted(self._videos(sequence).glob("cam_*.mp4")):
            try:
                return frame_count(path)
            except SkippedGroup as reason:
                reasons.append(reason)
        if reasons:
            raise reasons[0]
        return 0

    def _videos(self, sequence: str) -> Path:
        return self.folder / "sequences" / sequence / "images"

    def _images(self, sequence: str, frame: int) -> Path:
        folder = self.folder / "sequences" / sequence / f"frame_{frame:05d}"
        return next((folder / name for name in V1_IMAGES if (folder / name).is_dir()), folder / V1_IMAGES[0])


def find_participants(root: Path, left_out: dict[str, str] | None = None) -> list[Participant]:
    """Every participant below `root`, of either version, in order; `left_out` gets those that cannot be one, and why.

    Raises:
        DataError: there is none.
    """
    found, wrong = [], {}
    for folder in sorted(path for path in root.glob("*") if path.is_dir()):
        participant = participant_in(folder)
        if participant is not None and folder.name.isdecimal():
            found.append(participant)
        elif participant is not None:
            wrong[f"participant {folder.name}"] = "its folder's name is no participant's number, such as '018'"
        elif folder.name.isdecimal() or (folder / "sequences").is_dir():
            wrong[f"participant {folder.name}"] = (
                "there is neither 'camera_params.json' (v1) nor 'calibration/camera_params.json' (v2) in its folder"
            )
    if not found:
        raise DataError(
            f"No participant of NeRSemble below '{root}': expected folders such as '018' with 'camera_params.json' "
            f"(v1) or 'calibration/camera_params.json' (v2).{_sentence(wrong)}"
        )
    if left_out is not None:
        left_out.update(wrong)
    return found


def participant_in(folder: Path) -> Participant | None:
    """The participant of a folder; where its calibration is tells the version."""
    if (folder / "calibration" / "camera_params.json").is_file():
        return Participant(folder, 2)
    return Participant(folder, 1) if (folder / "camera_params.json").is_file() else None


def _sentence(left_out: dict[str, str]) -> str:
    return "".join(f" Left out: {name}: {reason}." for name, reason in list(left_out.items())[:3])


@lru_cache(maxsize=32)
def read_cameras(participant: Participant) -> dict[str, Camera]:
    """The rig by serial."""
    inner = "calibration/camera_params.json" if participant.version == 2 else "camera_params.json"
    path = participant.folder / inner
    content = read_json(path, "camera calibration")
    try:
        intrinsics = torch.tensor(content["intrinsics"], dtype=torch.float64).view(3, 3)
        poses = {str(name): torch.tensor(pose, dtype=torch.float64) for name, pose in content["world_2_cam"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise DataError(f"'{path}' needs 'world_2_cam' (4x4 by serial) and 'intrinsics' (3x3); {error!r}.") from None
    for name, pose in poses.items():
        if pose.shape != (4, 4) or not _is_rotation(pose[:3, :3]):
            raise DataError(f"'{path}': the pose of camera {name} is not a rotation and a shift.")
    return {name: calibrated_camera(pose, intrinsics, CALIBRATED_SIZE) for name, pose in poses.items()}


def _is_rotation(turn: Tensor) -> bool:
    return torch.allclose(turn @ turn.T, torch.eye(3, dtype=turn.dtype), atol=1e-3)


class NeRSemble:
    """Time steps of NeRSemble: `views` cameras each, aligned to EG3D.

    landmarks: folder of five points (see `landmarks`); None plans without being able to read.
    """

    name = "nersemble"

    def __init__(self, root: Path, splits: Splits, options: Options, landmarks: Path | None = None):
        self.root, self.splits, self.options, self.landmarks = root, splits, options, landmarks
        self.left_out: dict[str, str] = {}

    def settings(self) -> dict[str, Any]:
        options = {**vars(self.options), "sequences": list(self.options.sequences)}
        return {**options, "splits": self.splits.settings()}

    def groups(self) -> list[ViewGroup]:
        """The plan, a function of the seed and of what is below the folder: participants take turns."""
        self.left_out.clear()
        people = find_participants(self.root, self.left_out)
        usable = [person for person in people if self._is_calibrated(person)]
        if not usable:
            raise DataError(f"No participant below '{self.root}' can be used.{_sentence(self.left_out)}")
        planned = []
        for number, split in enumerate(SPLITS):
            wanted = self.options.groups.get(split, 0)
            chosen = [person for person in people if self.splits.of(person_name(person)) == split]
            if wanted and not chosen:
                raise DataError(
                    f"None of the {len(people)} participants below '{self.root}' is in split '{split}'; name them in a "
                    f"--split-file, or ask for --{split}-groups 0.{_sentence(self.left_out)}"
                )
            rng = np.random.default_rng((self.options.seed, number))
            chosen = [person for person in chosen if person in usable]
            drawn = [self._group(person, split, *place) for person, place in self._draw(chosen, wanted, rng)]
            if len(drawn) < wanted:
                self.left_out[f"split {split}"] = (
                    f"{len(drawn)} of {wanted} groups planned, because the {len(chosen)} usable participants have no "
                    f"more time steps that {self.options.views} cameras see"
                )
            planned += drawn
        return planned

    def _is_calibrated(self, person: Participant) -> bool:
        try:
            return bool(read_cameras(person))
        except DataError as error:
            self.left_out[f"participant {person.name}"] = reason_of(error)
            return False

    def views(self, group: ViewGroup, resolution: int) -> list[PortraitView]:
        participant, sequence, frame = self._participant(group), group.place["sequence"], group.place["frame"]
        by_camera, world = self._five_points(participant, sequence, frame)
        images = {serial: participant.image(sequence, frame, serial) for serial in group.place["cameras"]}
        cameras = read_cameras(participant)
        if world is None:
            height, width = next(iter(images.values())).pixels.shape[:2]
            size = torch.tensor([width, height])
            world = triangulate_face(
                {name: (points + 0.5) / size for name, points in by_camera.items()}, cameras, self.options.tolerance
            )
        similarity, views = head_similarity(world), []
        for serial, image in images.items():
            crop = eg3d_crop(cameras[serial], similarity)
            pixels, inside = warp(image.as_bytes(), crop.homography, resolution, self.options.outside)
            if inside < self.options.least_inside:
                raise SkippedGroup(
                    f"the image of camera {serial} covers {inside:.0%} of its crop (--least-inside "
                    f"{self.options.least_inside:g})"
                )
            if self.options.colour:
                pixels = participant.correct_colours(pixels, sequence, serial)
            views.append(PortraitView(pixels, crop.label, serial, image.notes))
        return views

    def extracted(self, group: ViewGroup) -> Iterator[tuple[str, np.ndarray]]:
        """The group's images for a detector: (path without suffix, uint8 [H, W, 3])."""
        participant, place = self._participant(group), group.place
        for serial in place["cameras"]:
            path = f"{participant.name}/{place['sequence']}/frame_{place['frame']:05d}/cam_{serial}"
            yield path, participant.image(place["sequence"], place["frame"], serial).as_bytes()

    def _draw(self, people: list[Participant], count: int, rng: np.random.Generator):
        """(participant, (sequence, frame, cameras)) `count` times or until nothing is left; people take turns, their
        sequences too."""
        queues = {person: self._time_steps(person, rng) for person in (people[i] for i in rng.permutation(len(people)))}
        while count and queues:
            for person in list(queues):
                place = next(queues[person], None)
                if place is None:
                    del queues[person]
                    continue
                yield person, place
                count -= 1
                if not count:
                    return

    def _time_steps(self, person: Participant, rng: np.random.Generator) -> Iterator[tuple[str, int, list[str]]]:
        """Random time steps of a participant that enough calibrated cameras saw, one sequence after the other."""
        names = self._sequences(person)
        left = {name: None for name in (names[i] for i in rng.permutation(len(names)))}
        calibrated, used, most = set(read_cameras(person)), set(), dict.fromkeys(names, 0)
        while left:
            for name in list(left):
                if left[name] is None:
                    left[name] = list(rng.permutation(self._frames(person, name)))
                place = None
                while left[name] and place is None:
                    frame = int(left[name].pop())
                    serials = [serial for serial in person.cameras(name, frame) if serial in calibrated]
                    most[name] = max(most[name], len(serials))
                    if len(serials) >= self.options.views:
                        chosen = rng.permutation(len(serials))[: self.options.views]
                        place = name, frame, [serials[i] for i in chosen]
                if place is not None:
                    used.add(name)
                    yield place
                    continue
                del left[name]
                if name not in used:
                    self.left_out.setdefault(
                        f"participant {person.name}, sequence {name}",
                        f"at most {most[name]} calibrated cameras see a time step, --views asks for "
                        f"{self.options.views}",
                    )

    def _sequences(self, person: Participant) -> list[str]:
        """The sequences that `--sequences` names."""
        there = person.sequences()
        names = [name for name in there if any(fnmatch(name, pattern) for pattern in self.options.sequences)]
        if not names:
            asked = " ".join(self.options.sequences)
            self.left_out[f"participant {person.name}"] = (
                f"none of its {len(there)} sequences matches --sequences {asked}" if there else "it has no sequences"
            )
        return names

    def _frames(self, person: Participant, sequence: str) -> list[int]:
        what = f"participant {person.name}, sequence {sequence}"
        try:
            frames = person.frames(sequence)
        except SkippedGroup as reason:
            self.left_out[what] = reason_of(reason)
            return []
        if not frames:
            self.left_out[what] = "it has no time steps: " + (
                "no 'images/cam_SERIAL.mp4'" if person.version == 2 else "no folders 'frame_NNNNN'"
            )
        return frames

    def _group(self, person: Participant, split: str, sequence: str, frame: int, cameras: list[str]) -> ViewGroup:
        name = folder_name(f"nersemble-{person.name}-{sequence}-{frame:05d}")
        place = {"participant": person.name, "sequence": sequence, "frame": frame, "cameras": cameras}
        return ViewGroup(name, person_name(person), split, place)

    def _participant(self, group: ViewGroup) -> Participant:
        participant = participant_in(self.root / group.place["participant"])
        if participant is None:
            raise SkippedGroup(f"participant {group.place['participant']} has no 'camera_params.json' any more")
        return participant

    def _five_points(self, person: Participant, sequence: str, frame: int) -> tuple[dict[str, Tensor], Tensor | None]:
        if self.landmarks is None:
            raise DataError("NeRSemble has no five points of its own: --landmarks names the folder that has them.")
        folder = self.landmarks / person.name
        if (folder / f"{sequence}.json").is_file():
            return sequence_points(folder / f"{sequence}.json", frame)
        texts = sorted((folder / sequence / f"frame_{frame:05d}").glob("cam_*.txt"))
        if not texts:
            raise SkippedGroup(f"no five points for frame {frame} of '{sequence}' of participant {person.name}")
        return {path.stem[4:]: read_points(path) for path in texts}, None


def person_name(participant: Participant) -> str:
    """The same person in both versions."""
    return f"nersemble-{int(participant.name):03d}"
