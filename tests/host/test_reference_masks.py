"""Masks of portraits as Load Image gives them: white on the background of a cut-out, white where somebody painted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.goldens.host import NARROW_CONFIG, HostPath, host_path

SIDE = 64


@pytest.fixture(scope="module")
def path(pack, host) -> HostPath:
    return host_path(pack, host.comfy, NARROW_CONFIG)


@pytest.fixture(scope="module")
def vae(path, stock_autoencoder):
    return path.comfy.sd.VAE(sd=stock_autoencoder())


def head(height=SIDE, width=SIDE, shift=0.0, edge=0.0) -> torch.Tensor:
    """1 on a head with shoulders that touch the lower border [H, W]; `edge` makes its outline soft."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    inside = torch.maximum(
        1 - ((x - shift) ** 2 / 0.25 + (y + 0.1) ** 2 / 0.4), torch.minimum(y - 0.6, 0.8 - (x - shift).abs()) * 5
    )
    return (inside > 0).float() if edge == 0.0 else torch.sigmoid(inside / edge)


def load(host, alpha: torch.Tensor | None, name: str):
    """(IMAGE, MASK) of the host's Load Image from a PNG with that alpha."""
    height, width = (SIDE, SIDE) if alpha is None else alpha.shape
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    if alpha is not None:
        pixels = np.dstack([pixels, (255 * alpha).round().byte().numpy()])
    file = Path(host.folder_paths.get_input_directory()) / name
    Image.fromarray(pixels).save(file)
    return host.nodes.NODE_CLASS_MAPPINGS["LoadImage"]().load_image(name)


def apply(host, path, vae, image, mask, white=None):
    """MODEL of the node, and what it reads of the portrait [R, 1, 8, 8]."""
    node = host.nodes.NODE_CLASS_MAPPINGS["DP3D_ApplyReferenceAttention"]
    settings = {} if white is None else {"mask_white": white}
    model = node.execute(path.model, path.encoder, vae, image, 1.0, 0.0, 1.0, mask=mask, **settings).args[0]
    [patch] = {id(p): p for p in model.model_options["transformer_options"]["patches"]["attn1_patch"]}.values()
    return model, patch.references.mask_at(8, 8)


def run(path, model):
    draw = lambda seed, *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    with torch.inference_mode():
        return path.comfy.sample.sample(
            model,
            draw(1, 2, 4, 8, 8),
            1,
            3.0,
            "ddim",
            "normal",
            [[draw(2, 1, 7, 32), {}]],
            [[draw(3, 1, 7, 32), {}]],
            torch.zeros(2, 4, 8, 8),
            disable_pbar=True,
            seed=1,
        )


def said(caplog) -> int:
    found = [record for record in caplog.records if "inverted" in record.message]
    caplog.clear()
    return len(found)


@pytest.mark.parametrize("edge", [0.0, 0.1], ids=["hard edge", "soft edge"])
@pytest.mark.parametrize("size", [(64, 64), (96, 64), (64, 96)])
def test_cut_out_reads_the_person_either_way_round(host, path, vae, caplog, size, edge):
    """The mask straight from Load Image, and through the host's Invert Mask: the same views; the first is said."""
    image, mask = load(host, head(*size, edge=edge), "cut_out.png")
    assert mask[0, 0, 0] == 1.0 and mask[0, size[0] // 2, size[1] // 2] < 0.1, "white on the background"
    model, straight = apply(host, path, vae, image, mask)
    assert said(caplog) == 1
    inverted = host.nodes.NODE_CLASS_MAPPINGS["InvertMask"].execute(mask).args[0]
    other, turned = apply(host, path, vae, image, inverted)
    assert said(caplog) == 0
    assert torch.equal(straight, turned) and straight[0, 0, 4, 4] > 0.9 and straight[0, 0, 0, 0] < 0.1
    assert torch.equal(run(path, model), run(path, other))


def test_head_out_of_the_middle_is_known_by_its_alpha(host, path, vae, caplog):
    """Join Image with Alpha keeps the alpha beside the colours: it is decisive, both ways round."""
    image, mask = load(host, head(shift=0.9), "aside.png")
    with_alpha = host.nodes.NODE_CLASS_MAPPINGS["JoinImageWithAlpha"].execute(image, mask).args[0]
    assert with_alpha.shape[-1] == 4
    _, read = apply(host, path, vae, with_alpha, mask)
    assert said(caplog) == 1
    _, again = apply(host, path, vae, with_alpha, 1.0 - mask)
    assert said(caplog) == 0 and torch.allclose(read, again)
    _, colours_only = apply(host, path, vae, image, mask)
    assert said(caplog) == 0 and torch.allclose(colours_only, 1.0 - read), "the mask alone does not tell here"


def test_what_somebody_painted_stays(host, path, vae, caplog):
    """The mask editor leaves alpha 0 where it is white: the head, hair, one half, a frame with the shoulders out."""
    hair = head() * (torch.linspace(-1, 1, SIDE)[:, None] < -0.4)
    half = torch.zeros(SIDE, SIDE)
    half[:, : SIDE // 2] = 1.0
    for number, painted in enumerate((head(), hair, half, torch.ones(SIDE, SIDE))):
        image, mask = load(host, 1.0 - painted, f"painted_{number}.png")
        _, read = apply(host, path, vae, image, mask)
        assert said(caplog) == 0
        expected = torch.nn.functional.interpolate(painted[None, None], (8, 8), mode="area")
        assert torch.allclose(read, expected, atol=0.01)


def test_choosing_what_white_means(host, path, vae, caplog):
    image, mask = load(host, head(), "cut_out.png")
    _, background = apply(host, path, vae, image, mask, "read")
    _, person = apply(host, path, vae, image, mask, "background")
    assert said(caplog) == 0, "nothing is found out where it is said"
    assert torch.allclose(background, 1.0 - person) and person[0, 0, 4, 4] > 0.9
    _, automatic = apply(host, path, vae, image, mask, "auto")
    assert torch.equal(automatic, person)
    with pytest.raises(ValueError, match="mask_white must be one of auto, read, background, got the text 'grey'"):
        apply(host, path, vae, image, mask, "grey")


def test_every_mask_by_itself(host, path, vae, caplog):
    """Two portraits, one mask each, one of them turned; one mask for both."""
    image, mask = load(host, head(), "cut_out.png")
    images = image.repeat(2, 1, 1, 1)
    _, read = apply(host, path, vae, images, torch.cat([mask, 1.0 - mask]))
    assert [r.message for r in caplog.records if "Reference mask 1 is white on the background" in r.message]
    assert said(caplog) == 1 and torch.allclose(read[0], read[1])
    _, both = apply(host, path, vae, images, mask)
    assert torch.equal(both, read)


def test_picture_without_alpha(host, path, vae):
    """Load Image then gives a small black mask: nothing may be read, which has its own message."""
    image, mask = load(host, None, "opaque.png")
    with pytest.raises(ValueError, match="Reference mask 1 of 1 is empty"):
        apply(host, path, vae, image, mask)


def test_in_a_graph_it_is_said_on_the_node(host, path, vae, run_workflow, monkeypatch):
    """Load Image wired into `image` and `mask`; the line is sent to the node that turns the mask."""
    load(host, head(), "cut_out.png")

    class Networks:
        RETURN_TYPES, FUNCTION = ("MODEL", "DP3D_REFERENCE_ENCODER", "VAE"), "give"

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {}}

        def give(self):
            return path.model, path.encoder, vae

    lines = []
    server = host.server
    monkeypatch.setitem(host.nodes.NODE_CLASS_MAPPINGS, "Networks", Networks)
    monkeypatch.setattr(server, "send_progress_text", lambda text, node_id, sid=None: lines.append((node_id, text)))
    inputs = {
        "model": ["networks", 0],
        "reference_encoder": ["networks", 1],
        "vae": ["networks", 2],
        "image": ["portrait", 0],
        "mask": ["portrait", 1],
        "strength": 1.0,
        "start_percent": 0.0,
        "end_percent": 1.0,
    }
    run_workflow(
        {
            "networks": {"class_type": "Networks", "inputs": {}},
            "portrait": {"class_type": "LoadImage", "inputs": {"image": "cut_out.png"}},
            "apply": {"class_type": "DP3D_ApplyReferenceAttention", "inputs": inputs},
            "shown": {"class_type": "PreviewAny", "inputs": {"source": ["apply", 0]}},
        }
    )
    [(node_id, text)] = lines
    assert node_id == "apply" and "inverted" in text and "set mask_white to read" in text
