"""Names for files that people take for this method's."""

from __future__ import annotations

from collections.abc import Iterable

CONTROLNET = "a ControlNet checkpoint of another kind"
# What the file is, and substrings or whole beginnings (ending in a dot) of keys of which one gives it away; the first
# match wins, so that what is built on top of something else comes first.
SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
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


def describe_stranger(names: Iterable[str]) -> str | None:
    """What a file with these keys is, in words; None if it is nothing known."""
    names = list(names)
    for description, signs in SIGNS:
        if any(sign in name for sign in signs for name in names):
            return description
    return None
