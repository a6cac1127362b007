"""What a node is given over its links, checked before it runs: the host checks only what is typed into widgets."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..diffportrait3d.cameras.labels import validate_labels
from ..host.images import as_images, as_masks


def _is_network(kind: str) -> Callable[[Any], bool]:
    return lambda value: getattr(value, "kind", None) == kind


# What travels through a link, by its type: whether a value is one, and what to connect.
LINKED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "IMAGE": (lambda value: isinstance(value, Tensor), "an IMAGE"),
    "MASK": (lambda value: isinstance(value, Tensor), "a MASK"),
    "LATENT": (lambda value: isinstance(value, dict) and isinstance(value.get("samples"), Tensor), "a LATENT"),
    "MODEL": (lambda value: hasattr(value, "get_model_object"), "a MODEL"),
    "VAE": (lambda value: hasattr(value, "first_stage_model"), "a VAE"),
    "CONDITIONING": (lambda value: isinstance(value, list) and all(map(_is_prompt, value)), "a CONDITIONING"),
    "CONTROL_NET": (lambda value: hasattr(value, "set_cond_hint"), "a CONTROL_NET, from Load View ControlNet"),
    "NOISE": (lambda value: hasattr(value, "generate_noise"), "a NOISE, from 3D-Aware Noise or RandomNoise"),
    "DP3D_CAMERAS": (
        lambda value: isinstance(value, dict) and "labels" in value,
        "cameras, from Camera Trajectory or Load Cameras",
    ),
    "FACE_LANDMARKS,POSE_KEYPOINT": (
        lambda value: isinstance(value, list) or (isinstance(value, dict) and bool({"frames", "people"} & set(value))),
        "face landmarks, from Detect Face Landmarks (MediaPipe) or DWPose",
    ),
    "DP3D_PLACE": (lambda value: hasattr(value, "homography"), "the place that Align Portrait gives"),
    "DP3D_REFERENCE_ENCODER": (_is_network("reference_encoder"), "what Load Reference Encoder gives"),
    "DP3D_VIEW_CONSISTENCY": (_is_network("view_consistency"), "what Load View Consistency gives"),
    "DP3D_NOVEL_VIEW": (_is_network("novel_view"), "what Load Novel-View Model gives"),
}
MAY_BE_NONE = ("VAE", "LOAD3D_CAMERA")  # whose nodes have an error of their own for it
TEXT_SHOWN = 40  # characters


class Node(io.ComfyNode):
    """A node whose `execute` is called with what its schema promises: numbers inside their ranges, names that are in
    their lists (those of `validate_inputs` asked again), objects of the right kind, IMAGE [V, H, W, 3 or 4], MASK
    [V, H, W], cameras with labels [V, 25]. Grey images are given three channels.

    `execute` otherwise raises ValueError that names the node, the input, what came and what belongs there. NaN is
    outside of every range.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(cls.execute, "__wrapped__"):  # the host runs copies of the class, which have it
            cls.execute = classmethod(_with_checks(cls))


def _with_checks(node: type[Node]) -> Callable[..., io.NodeOutput]:
    execute = node.execute.__func__
    signature = inspect.signature(execute)
    schema = functools.cache(node.define_schema)  # built once: some look for files

    @functools.wraps(execute)
    def checked(cls, *args, **kwargs) -> io.NodeOutput:
        call, name = signature.bind(cls, *args, **kwargs), schema().display_name
        for each in schema().inputs:
            value = call.arguments.get(each.id)
            if value is not None:
                call.arguments[each.id] = _checked(value, each, cls, name)
            elif each.optional:
                call.arguments.pop(each.id, None)  # nothing came: as if it were not connected
            elif each.get_io_type() not in MAY_BE_NONE:
                _, wanted = LINKED.get(each.get_io_type(), (None, "a value"))
                raise ValueError(f"{name} lacks {each.id}; connect {wanted}.")
        return execute(*call.args, **call.kwargs)

    return checked


def _checked(value: Any, each: io.Input, node: type[io.ComfyNode], name: str) -> Any:
    """`value` as the node may use it."""
    where, kind = f"{name}: {each.id}", each.get_io_type()
    if isinstance(each, io.Int.Input | io.Float.Input):
        return _number(value, each, where)
    if isinstance(each, io.Combo.Input):
        return _choice(value, each, node, name)
    if isinstance(each, io.String.Input | io.Boolean.Input):
        expected, words = (str, "a text") if isinstance(each, io.String.Input) else (bool, "on or off")
        if not isinstance(value, expected):
            raise ValueError(f"{where} must be {words}, got {_describe(value)}.")
        return value
    fits, wanted = LINKED.get(kind, (_is_no_literal, f"a {kind}"))
    if not fits(value):
        raise ValueError(f"{where} got {_describe(value)}; connect {wanted}.")
    if kind == "IMAGE":
        return as_images(value, where)
    if kind == "MASK":
        return as_masks(value, where)
    if kind == "DP3D_CAMERAS":
        return {**value, "labels": validate_labels(value["labels"], where)}
    return value


def _number(value: Any, limits: io.Int.Input | io.Float.Input, where: str) -> Any:
    whole = isinstance(limits, io.Int.Input)
    if not isinstance(value, Real):
        raise ValueError(f"{where} must be a number, got {_describe(value)}.")
    if not limits.min <= value <= limits.max:
        raise ValueError(f"{where} must lie between {limits.min} and {limits.max}, got {value}.")
    if whole and not isinstance(value, Integral) and math.modf(value)[0]:
        raise ValueError(f"{where} must be a whole number, got {value}.")
    return int(value) if whole else float(value)


def _choice(value: Any, choices: io.Combo.Input, node: type[io.ComfyNode], name: str) -> Any:
    if choices.id in inspect.signature(node.validate_inputs).parameters:
        answer = node.validate_inputs(**{choices.id: value})
        if answer is not True:
            raise ValueError(f"{name}: {answer}")
    elif value not in choices.options:
        listed = ", ".join(map(str, choices.options))
        raise ValueError(f"{name}: {choices.id} must be one of {listed}, got {_describe(value)}.")
    return value


def _is_no_literal(value: Any) -> bool:
    """Of kinds that only their own nodes know: no text or number, which an API graph may have in place of a link."""
    return not isinstance(value, str | Real)


def _is_prompt(entry: Any) -> bool:
    return isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[1], dict)


def _describe(value: Any) -> str:
    """A value as an error message names it."""
    if isinstance(value, str):
        return f"the text {value[:TEXT_SHOWN]!r}{'...' if len(value) > TEXT_SHOWN else ''}"
    if isinstance(value, Real):
        return f"the value {value!r}"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"an object of type {type(value).__name__}"
