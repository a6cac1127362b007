"""What a file of weights without our metadata is, by its keys: the authors' networks, or a format of other software.

A network that somebody has cut out of the authors' checkpoint with another tool is recognised, so that it runs with the
conventions that it was trained with, which its tensors do not show, or is rejected.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

from ..networks import NETWORKS, NetworkSpec, UNetConfig
from ..networks.sizes import Shapes, unet_sizes

OFFICIAL = {kind: spec for kind, spec in NETWORKS.items() if spec.official}
OFFICIAL_CONFIG = UNetConfig()
CONTROLNET = "a ControlNet checkpoint of another kind"
# Name of a format, and parts of keys of which one gives it away; the first match wins, so that what is built on top of
# something else comes first.
KNOWN_FORMATS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("a LoRA", (".lora_up.", ".lora_down.", ".lora_A.", ".lora_B.", ".lora.up.", ".hada_w1_a", ".lokr_w1")),
    ("an SDXL checkpoint", ("conditioner.embedders.",)),
    (
        CONTROLNET,
        ("control_model.zero_convs.", "zero_convs.0.0.", "controlnet_cond_embedding.", "controlnet_down_blocks."),
    ),
    ("an SDXL UNet", ("add_embedding.linear_1.", "model.diffusion_model.label_emb.", "label_emb.0.0.")),
    ("a Stable Diffusion 3 or Flux checkpoint", ("joint_blocks.", "double_blocks.")),
    ("a Stable Diffusion 2 checkpoint", ("cond_stage_model.model.transformer.resblocks.",)),
    ("an AnimateDiff motion module", ("motion_modules.",)),
    ("an IP-Adapter", ("ip_adapter.", "image_proj.")),
    ("a diffusers UNet", ("down_blocks.0.resnets.",)),
    ("an ordinary Stable Diffusion 1.5 checkpoint", ("model.diffusion_model.input_blocks.",)),
    ("an autoencoder", ("first_stage_model.decoder.", "decoder.up.0.block.")),
    ("a UNet alone", ("input_blocks.0.0.",)),
)


def known_format(keys: Iterable[str]) -> str | None:
    """The name of the format that has such keys; None if it is not a known one."""
    keys = list(keys)
    return next((name for name, parts in KNOWN_FORMATS if any(part in key for part in parts for key in keys)), None)


def describe(keys: Collection[str]) -> str:
    """The same for messages: never None."""
    return known_format(keys) or f"a file whose keys begin with {', '.join(sorted(keys)[:3])}"


@dataclass(frozen=True)
class OfficialNetwork:
    """One of the authors' networks in a file that does not say so."""

    spec: NetworkSpec
    config: UNetConfig
    keys: dict[str, str]  # name of each tensor in the network -> its name in the file

    @property
    def metadata(self) -> dict[str, Any]:
        """What the converter would have written."""
        return {"network": self.spec.kind, "config": self.config.to_dict(), **self.spec.conventions}


def official_kind(keys: Collection[str]) -> str | None:
    """Kind of the one authors' network in a file, by a look at a few keys; what it lacks is found when it is read."""
    found = _candidates(keys)
    return found[0][0].kind if len(found) == 1 else None


def official_network(shapes: Shapes) -> OfficialNetwork | None:
    """The one authors' network in a file, by its keys and shapes; None if there is none.

    Raises:
        ValueError: several networks in one file, keys missing, unknown or of another shape, or another width than
            SD1.5's, where nothing tells the number of attention heads. The message goes after the file's name.
    """
    found = _candidates(shapes)
    if not found:
        return None
    if len(found) > 1:
        titles = " and ".join(spec.title for spec, _ in found)
        raise ValueError(f"holds {titles} in one; split it with `python -m diffportrait3d.convert`")
    spec, prefix = found[0]
    keys = {key.removeprefix(prefix): key for key in shapes if spec.owns(key, prefix)}
    keys = {name: key for name, key in keys.items() if not (spec.unused and name.startswith(spec.unused))}
    present = {name: shapes[key] for name, key in keys.items()}
    config = _config(spec, present)
    expected = spec.shapes(config)
    problems = {
        "are missing": [name for name in expected if name not in present],
        "are unknown": [name for name in present if name not in expected],
        "have another shape": [n for n in expected if n in present and present[n] != expected[n]],
    }
    for problem, names in problems.items():
        if names:
            raise ValueError(
                f"has keys of the official {spec.title}, but {len(names)} {problem}, {names[0]} first; cut it out of "
                "the checkpoint with `python -m diffportrait3d.convert`"
            )
    return OfficialNetwork(spec, config, {name: keys[name] for name in expected})


def _candidates(keys: Collection[str]) -> list[tuple[NetworkSpec, str]]:
    """Networks whose signature is among `keys`, and its prefix; without one, a view ControlNet looks like any."""
    places = [(spec, spec.prefix) for spec in OFFICIAL.values()]
    places += [(spec, "") for spec in OFFICIAL.values() if not spec.sd15_prefix]
    return [(spec, prefix) for spec, prefix in places if spec.is_signed(keys, prefix)]


def _config(spec: NetworkSpec, present: Shapes) -> UNetConfig:
    sizes = unet_sizes(present)
    width = sizes.get("model_channels", OFFICIAL_CONFIG.model_channels)
    if width != OFFICIAL_CONFIG.model_channels:
        raise ValueError(
            f"has the keys of a {spec.title} that is {width} channels wide, but no metadata: the number of its "
            f"attention heads is known for the official {OFFICIAL_CONFIG.model_channels} channels only"
        )
    return replace(OFFICIAL_CONFIG, max_views=sizes.get("max_views", OFFICIAL_CONFIG.max_views))
