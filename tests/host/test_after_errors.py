"""A server that has refused or failed prompts of every kind goes on as a fresh one would, bit for bit."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from tools.client import Client
from tools.host import ToolError
from tools.server import Server

# Nodes of the turntable.
PATH, CONDITIONS, ENCODER, REFERENCE, CAMERAS, NOISE, SAMPLER = "3", "4", "5", "6", "8", "11", "12"


def change(node_id: str, **inputs):
    return lambda prompt: prompt[node_id]["inputs"].update(inputs)


def wired(node_id: str, name: str, kind: str, **inputs):
    """`name` of a node comes out of another node; "old" stands for the wire that is there."""

    def rewire(prompt):
        old = prompt[node_id]["inputs"].get(name)
        given = {key: old if value == "old" else value for key, value in inputs.items()}
        prompt["bad"] = {"class_type": kind, "inputs": given}
        prompt[node_id]["inputs"][name] = ["bad", 0]

    return rewire


def too_large(prompt):
    """Latents beyond what a float can hold."""
    prompt["number"] = {"class_type": "PrimitiveFloat", "inputs": {"value": 1e18}}
    latent = prompt[SAMPLER]["inputs"]["latent"]
    for place in ("once", "twice", "bad"):
        prompt[place] = {"class_type": "LatentMultiply", "inputs": {"samples": latent, "multiplier": ["number", 0]}}
        latent = [place, 0]
    change(SAMPLER, latent=latent)(prompt)


BAD = {
    "missing file": (change(ENCODER, name="gone.safetensors"), "no reference encoder 'gone.safetensors'"),
    "zero steps": (change(SAMPLER, steps=0), "Value 0 smaller than min of 1"),
    "zero steps over a wire": (wired(SAMPLER, "steps", "PrimitiveInt", value=0), "steps must lie between 1 and 1000"),
    "no keyframes": (change(PATH, kind="keyframes"), "There are no keyframes"),
    "empty mask": (wired(REFERENCE, "mask", "SolidMask", value=0.0, width=64, height=64), "mask 1 of 1 is empty"),
    "wrong batch, seen in the first step": (
        wired(CAMERAS, "image", "ImageFromBatch", image="old", batch_index=0, length=2),
        "2 condition images for 3 views",
    ),
    "infinite latent": (too_large, "latent contains NaN or infinity"),
    "another family's noise schedule": (
        wired(SAMPLER, "model", "ModelSamplingSD3", model="old", shift=3.0),
        "need SD1.5's discrete noise schedule",
    ),
    "one view": (change(PATH, views=1), "at least 2 views in one batch"),
}


@pytest.fixture
def turntable(repository) -> dict:
    """Three small views in one step, and the sampler's latents in a file."""
    prompt = json.loads((repository / "workflows/api/turntable.json").read_text(encoding="utf-8"))
    prompt[PATH]["inputs"]["views"] = 3
    prompt[SAMPLER]["inputs"].update(preset="custom", steps=1)
    prompt[NOISE]["inputs"]["resolution"] = prompt[CONDITIONS]["inputs"]["resolution"] = 64
    wanted = {node_id: node for node_id, node in prompt.items() if int(node_id) <= int(SAMPLER)}
    wanted["save"] = {"class_type": "SaveLatent", "inputs": {"samples": [SAMPLER, 0], "filename_prefix": "views"}}
    return wanted


def test_next_good_prompt_is_as_on_a_fresh_server(turntable):
    """Each bad prompt is followed by a good one with a seed of its own, which the other server runs undisturbed."""
    results = []
    for disturbed in (False, True):
        with Server(cpu=True) as server:
            client = Client(server)
            for seed, (name, (spoil, message)) in enumerate(BAD.items()):
                good = json.loads(json.dumps(turntable))
                good[NOISE]["inputs"]["seed"] = seed
                if disturbed:
                    bad = json.loads(json.dumps(good))
                    spoil(bad)
                    with pytest.raises(ToolError) as caught:
                        client.run(bad)
                    assert message in str(caught.value), name
                client.run(good)
            files = sorted((server.base_directory / "output").glob("views*.latent"))
            results.append([load_file(file)["latent_tensor"] for file in files])
    fresh, after_errors = results
    assert len(fresh) == len(after_errors) == len(BAD)
    for (name, _), expected, found in zip(BAD.items(), fresh, after_errors, strict=True):
        assert found.equal(expected), f"after {name}"
    assert not fresh[0].equal(fresh[1]), "the seeds reach the views"
