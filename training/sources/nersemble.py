"""NeRSemble (Kirschstein et al., SIGGRAPH 2023), both versions: 16 calibrated, synchronised cameras around a head.

v1: PID/camera_params.json, PID/sequences/SEQ/frame_00000/images-2x-73fps/cam_SERIAL.png (or `images-2x`),
    PID/annotations/SEQ/color_correction/SERIAL.npy
v2: PID/calibration/camera_params.json, PID/calibration/color_calibration.json, PID/sequences/SEQ/images/cam_SERIAL.mp4

`camera_params.json` holds `world_2_cam` (OpenCV, 4x4 by serial) and one 3x3 `intrinsics` for images of 2200x3208.
Source: the code published with v1 and the v2 downloader (`nersemble_data`).
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffportrait3d.images import UserImage

from ..dataset.images import SPLITS, DataError
from .alignment import Camera, aligned_views, triangulate_face
from .colour import apply_affine, apply_polynomial
from .landmarks import read_points, sequence_points
from .reader import OUTSIDE, PhotographReader, PortraitView, SkippedGroup, ViewGroup, folder_name, read_json, read_view
from .video import frame_count, read_frame

CALIBRATED_SIZE = (2200, 3208)  # width, height
CALIBRATION = {1: "camera_params.json", 2: "calibration/camera_params.json"}  # by version
V1_IMAGES = ("images-2x-73fps", "images-2x")
NOT_A_PORTRAIT = "BACKGROUND"  # v2 keeps images of the empty room there


@dataclass(frozen=True)
class Options:
    """What decides the images.

    groups: how many time steps each split gets. views: cameras a time step, the first one the reference of a fixed
    protocol. sequences: patterns of sequence names. least_inside: share of a crop that its image must cover.
    """

    groups: dict[str, int]
    views: int = 9
    sequences: Sequence[str] = ("*",)
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

    @property
    def person(self) -> str:
        """The same in both versions."""
        return f"nersemble-{int(self.name):03d}"

    def sequences(self) -> list[str]:
        folders = [path for path in (self.folder / "sequences").glob("*") if path.is_dir()]
        return sorted(path.name for path in folders if path.name != NOT_A_PORTRAIT)

    def frames(self, sequence: str) -> list[int]:
        """Numbers of the time steps that have images; of videos, as the first one that can be read gives them.

        Raises:
            SkippedGroup: there are none.
        """
        if self.version == 1:
            folders = (self.folder / "sequences" / sequence).glob("frame_*")
            numbers = sorted(int(path.name[6:]) for path in folders if re.fullmatch(r"frame_\d+", path.name))
            if not numbers:
                raise SkippedGroup("it has no time steps: no folders 'frame_NNNNN'")
            return numbers
        unreadable = None
        for path in sorted(self._image_folder(sequence, 0).glob("cam_*.mp4")):
            try:
                return list(range(frame_count(path)))
            except SkippedGroup as reason:
                unreadable = unreadable or reason
        raise unreadable or SkippedGroup("it has no time steps: no 'images/cam_SERIAL.mp4'")

    def cameras(self, sequence: str, frame: int) -> list[str]:
        """Serials that have an image of this time step, in order."""
        files = self._image_folder(sequence, frame).glob("cam_*.mp4" if self.version == 2 else "cam_*.png")
        return sorted(path.stem[4:] for path in files)

    def image(self, sequence: str, frame: int, serial: str) -> UserImage:
        """[H, W, 3] as it was taken, colours not corrected."""
        folder = self._image_folder(sequence, frame)
        if self.version == 2:
            image = UserImage(read_frame(folder / f"cam_{serial}.mp4", frame), ())
        else:
            image = read_view(folder / f"cam_{serial}.png")
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

    def _image_folder(self, sequence: str, frame: int) -> Path:
        folder = self.folder / "sequences" / sequence
        if self.version == 2:
            return folder / "images"
        folders = [folder / f"frame_{frame:05d}" / name for name in V1_IMAGES]
        return next((folder for folder in folders if folder.is_dir()), folders[0])


def participant_in(folder: Path) -> Participant | None:
    """The participant of a folder; where its calibration is tells the version."""
    return next((Participant(folder, v) for v in (2, 1) if (folder / CALIBRATION[v]).is_file()), None)


@lru_cache(maxsize=32)
def read_rig(participant: Participant) -> dict[str, Camera]:
    """Cameras by serial."""
    path = participant.folder / CALIBRATION[participant.version]
    content = read_json(path, "camera calibration")
    try:
        intrinsics = torch.tensor(content["intrinsics"], dtype=torch.float64).view(3, 3)
        poses = {str(name): torch.tensor(pose, dtype=torch.float64) for name, pose in content["world_2_cam"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise DataError(f"'{path}' needs 'world_2_cam' (4x4 by serial) and 'intrinsics' (3x3); {error!r}.") from None
    for name, pose in poses.items():
        if pose.shape != (4, 4) or not _is_rotation(pose[:3, :3]):
            raise DataError(f"'{path}': the pose of camera {name} is not a rotation and a shift.")
    half = torch.tensor([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]], dtype=torch.float64)  # pixels' centres are integers
    scale = torch.diag(1 / torch.tensor([*CALIBRATED_SIZE, 1], dtype=torch.float64))
    return {name: Camera(pose, scale @ half @ intrinsics) for name, pose in poses.items()}


def _is_rotation(turn: Tensor) -> bool:
    return torch.allclose(turn @ turn.T, torch.eye(3, dtype=turn.dtype), atol=1e-3)


class NeRSemble(PhotographReader):
    """Time steps of NeRSemble: `views` cameras each, aligned to EG3D. Without `landmarks` they can be planned and
    extracted, but not read."""

    help = "NeRSemble v1 or v2"
    options_class = Options

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        super().add_options(parser)
        add = parser.add_argument
        for split, count in (("train", 2000), ("val", 50), ("test", 500)):
            add(f"--{split}-groups", type=int, default=count, help=f"time steps in {split} ({count})")
        add("--views", type=int, help="cameras a time step: 1 reference and 8 targets (9)")
        add("--sequences", nargs="+", help="patterns of sequence names (all)")
        add("--no-colour-correction", dest="colour", action="store_false")
        add("--least-inside", type=float, help="share of a crop that its image must cover")
        add("--seed", type=int, help="another seed chooses other time steps and cameras")
        add("--extract", type=Path, help="only write the chosen images here, for a detector")

    @classmethod
    def from_options(cls, args: argparse.Namespace) -> PhotographReader:
        if args.landmarks is None and args.extract is None:
            raise DataError(
                "NeRSemble needs five facial points: '--extract DIR' writes the chosen images, any detector adds a "
                ".txt of five lines 'x y' beside each, then '--landmarks DIR' imports them (docs/data.md)"
            )
        args.groups = {split: getattr(args, f"{split}_groups") for split in SPLITS}
        return super().from_options(args)

    def groups(self) -> list[ViewGroup]:
        """The plan, a function of the seed and of what is below the folder: participants take turns."""
        self.left_out.clear()
        people, usable = self.participants(), []
        for person in people:
            with self.leaving_out(f"participant {person.name}"):
                usable += [person] if read_rig(person) else []
        if not usable:
            raise DataError(f"No participant below '{self.root}' can be used.{self._reasons()}")
        planned = []
        for number, split in enumerate(SPLITS):
            wanted = self.options.groups.get(split, 0)
            chosen = [person for person in people if self.splits.of(person.person) == split]
            if wanted and not chosen:
                raise DataError(
                    f"None of the {len(people)} participants below '{self.root}' is in split '{split}'; name them in a "
                    f"--split-file, or ask for --{split}-groups 0.{self._reasons()}"
                )
            rng = np.random.default_rng((self.options.seed, number))
            chosen = [person for person in chosen if person in usable]
            queues = (self._time_steps(chosen[i], split, rng) for i in rng.permutation(len(chosen)))
            drawn = list(itertools.islice(_in_turns(queues), wanted))
            if len(drawn) < wanted:
                self.left_out[f"split {split}"] = (
                    f"{len(drawn)} of {wanted} groups planned, because the {len(chosen)} usable participants have no "
                    f"more time steps that {self.options.views} cameras see"
                )
            planned += drawn
        return planned

    def participants(self) -> list[Participant]:
        """Every participant, of either version, in order; `left_out` gets folders that cannot be one, and why.

        Raises:
            DataError: there is none.
        """
        found = []
        for folder in sorted(path for path in self.root.glob("*") if path.is_dir()):
            participant, numbered, what = participant_in(folder), folder.name.isdecimal(), f"participant {folder.name}"
            if participant and numbered:
                found.append(participant)
            elif participant:
                self.left_out[what] = "its folder's name is no participant's number, such as '018'"
            elif numbered or (folder / "sequences").is_dir():
                self.left_out[what] = (
                    f"there is neither '{CALIBRATION[1]}' (v1) nor '{CALIBRATION[2]}' (v2) in its folder"
                )
        if not found:
            raise DataError(
                f"No participant of NeRSemble below '{self.root}': expected folders such as '018' with "
                f"'{CALIBRATION[1]}' (v1) or '{CALIBRATION[2]}' (v2).{self._reasons()}"
            )
        return found

    def _reasons(self) -> str:
        return "".join(f" Left out: {name}: {reason}." for name, reason in list(self.left_out.items())[:3])

    def views(self, group: ViewGroup, resolution: int) -> list[PortraitView]:
        participant, sequence, frame = self._participant(group), group.place["sequence"], group.place["frame"]
        by_camera, face = self._five_points(participant, sequence, frame)
        images = {serial: participant.image(sequence, frame, serial) for serial in group.place["cameras"]}
        cameras = read_rig(participant)
        if face is None:
            height, width = next(iter(images.values())).pixels.shape[:2]
            size = torch.tensor([width, height])
            by_camera = {serial: (points + 0.5) / size for serial, points in by_camera.items()}
            face = triangulate_face(by_camera, cameras, self.options.tolerance)
        views = []
        for view, inside in aligned_views(images, cameras, face, resolution, self.options.outside):
            if inside < self.options.least_inside:
                raise SkippedGroup(
                    f"the image of camera {view.name} covers {inside:.0%} of its crop (--least-inside "
                    f"{self.options.least_inside:g})"
                )
            if self.options.colour:
                view = view._replace(image=participant.correct_colours(view.image, sequence, view.name))
            views.append(view)
        return views

    def extracted(self, group: ViewGroup) -> Iterator[tuple[str, np.ndarray]]:
        """The group's images for a detector: (path without suffix, uint8 [H, W, 3])."""
        participant, place = self._participant(group), group.place
        for serial in place["cameras"]:
            path = f"{participant.name}/{place['sequence']}/frame_{place['frame']:05d}/cam_{serial}"
            yield path, participant.image(place["sequence"], place["frame"], serial).as_bytes()

    def _time_steps(self, person: Participant, split: str, rng: np.random.Generator) -> Iterator[ViewGroup]:
        """Random time steps of a participant that enough calibrated cameras saw; sequences take turns."""
        there = person.sequences()
        names = [name for name in there if any(fnmatch(name, pattern) for pattern in self.options.sequences)]
        if not names:
            asked = " ".join(self.options.sequences)
            self.left_out[f"participant {person.name}"] = (
                f"none of its {len(there)} sequences matches --sequences {asked}" if there else "it has no sequences"
            )
        order = rng.permutation(len(names))
        yield from _in_turns(self._of_sequence(person, names[i], split, rng) for i in order)

    def _of_sequence(
        self, person: Participant, sequence: str, split: str, rng: np.random.Generator
    ) -> Iterator[ViewGroup]:
        what, wanted, most = f"participant {person.name}, sequence {sequence}", self.options.views, 0
        calibrated, frames = read_rig(person), []
        with self.leaving_out(what):
            frames = rng.permutation(person.frames(sequence)).tolist()
        for frame in reversed(frames):
            serials = [serial for serial in person.cameras(sequence, frame) if serial in calibrated]
            most = max(most, len(serials))
            if len(serials) >= wanted:
                cameras = [serials[i] for i in rng.permutation(len(serials))[:wanted]]
                name = folder_name(f"nersemble-{person.name}-{sequence}-{frame:05d}")
                place = {"participant": person.name, "sequence": sequence, "frame": frame, "cameras": cameras}
                yield ViewGroup(name, person.person, split, place)
        if most < wanted:
            reason = f"at most {most} calibrated cameras see a time step, --views asks for {wanted}"
            self.left_out.setdefault(what, reason)

    def _participant(self, group: ViewGroup) -> Participant:
        participant = participant_in(self.root / group.place["participant"])
        if participant is None:
            raise SkippedGroup(f"participant {group.place['participant']} has no 'camera_params.json' any more")
        return participant

    def _five_points(self, person: Participant, sequence: str, frame: int) -> tuple[dict[str, Tensor], Tensor | None]:
        """In pixels by camera, or in the cameras' world."""
        folder = self.landmarks / person.name
        if (folder / f"{sequence}.json").is_file():
            return sequence_points(folder / f"{sequence}.json", frame)
        texts = sorted((folder / sequence / f"frame_{frame:05d}").glob("cam_*.txt"))
        if not texts:
            raise SkippedGroup(f"no five points for frame {frame} of '{sequence}' of participant {person.name}")
        return {path.stem[4:]: read_points(path) for path in texts}, None


def _in_turns(queues: Iterable[Iterator[ViewGroup]]) -> Iterator[ViewGroup]:
    """One of each queue, then the next of each that has more. None begins before its turn: they share a generator of
    random numbers."""
    queues = list(queues)
    while queues:
        for queue in list(queues):
            group = next(queue, None)
            if group is None:
                queues.remove(queue)
            else:
                yield group
