"""LPIPS, DISTS, FID and KID by torchmetrics, with backbones from files that the user names.

Nothing is ever downloaded: networks are built empty, in torchvision's layout, and filled from the file. The small
linear heads of LPIPS and the weights of DISTS come inside torchmetrics.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tools import cpu_wheels

TORCHVISION_NAMES = {"alex": "alexnet", "vgg": "vgg16"}
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000


class BackboneError(ValueError):
    """A backbone that cannot be used; the message names the file and the way out."""


def prepare_libraries() -> None:
    """Make torchmetrics importable; BackboneError if the packages are missing."""
    cpu_wheels.install()  # torchmetrics imports torchvision, which needs help beside a CPU build of torch
    try:
        import torchmetrics.functional.image  # noqa: F401
        import torchvision  # noqa: F401
    except ModuleNotFoundError as error:
        raise BackboneError(f"{error}; the paper's metrics need: pip install torchmetrics torchvision") from None


def load_lpips(net: str, path: Path) -> nn.Module:
    """LPIPS (Zhang et al. 2018, v0.1): pictures [N, 3, H, W] in [-1, 1], twice -> [N, 1, 1, 1].

    net: "alex" or "vgg". path: torchvision's alexnet or vgg16 (.pth or .safetensors; the classifier may be missing).
    """
    prepare_libraries()
    from torchmetrics.functional.image import lpips

    with patch.object(lpips, "_get_tv_model_features", lambda name, pretrained: _empty_features(name)):
        network = lpips._LPIPS(pretrained=True, net=net, pnet_rand=True)
    return _fill(network, TORCHVISION_NAMES[net], path)


def load_dists(path: Path) -> nn.Module:
    """DISTS (Ding et al. 2020): pictures [N, 3, H, W] in [0, 1], twice -> [N]. path: torchvision's vgg16."""
    prepare_libraries()
    from torchmetrics.functional.image import dists

    with patch.object(dists, "vgg16", lambda weights: SimpleNamespace(features=_empty_features("vgg16"))):
        network = dists.DISTSNetwork()
    return _fill(network, "vgg16", path)


def _empty_features(name: str) -> nn.Module:
    """The convolutions of a torchvision network; neither downloaded nor initialised."""
    import torchvision

    with torch.device("meta"):
        features = getattr(torchvision.models, name)(weights=None).features
    return features.to_empty(device="cpu")


def _fill(network: nn.Module, name: str, path: Path) -> nn.Module:
    """Put a torchvision state dict into a network whose slices keep the indices of torchvision's `features`."""
    tensors, filled = read_tensors(path), {}
    for key in network.state_dict():
        place = re.fullmatch(r"(?:net\.)?(?:slice|stage)\d+\.(\d+)\.(weight|bias)", key)
        if place:
            wanted = f"features.{place[1]}.{place[2]}"
            if wanted not in tensors:
                raise BackboneError(f"'{path}' lacks '{wanted}': it is not torchvision's {name}; name that file.")
            filled[key] = tensors[wanted]
    try:
        network.load_state_dict(filled, strict=False)
    except RuntimeError as error:
        raise BackboneError(f"'{path}' is not torchvision's {name}: {str(error).splitlines()[-1].strip()}") from None
    return network.eval().requires_grad_(False)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A state dict from .safetensors or from torch.save, on the CPU, read without running code in it."""
    if not path.is_file():
        raise BackboneError(f"There is no backbone file '{path}'; check the path. Nothing is downloaded.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpicklers raise anything for a file that is something else
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BackboneError(f"'{path}' cannot be read as a state dict ({reason}); save one with torch.save.") from None


def load_inception(path: Path) -> nn.Module:
    """FID's Inception v3: uint8 pictures [N, 3, H, W] -> [N, 2048], with TensorFlow 1's bilinear resizing.

    path: torch-fidelity's (= pytorch-fid's origin) state dict `weights-inception-2015-12-05-6726825d.pth`.
    """
    tensors = read_tensors(path)
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as source
    except ModuleNotFoundError:
        raise BackboneError("FID needs: pip install --no-deps torch-fidelity") from None
    # Its constructor reads the file with pickle's full powers; it is given the tensors that were read without them.
    with patch.object(source.torch, "load", lambda *_, **__: tensors):
        try:
            network = source.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path))
        except RuntimeError:
            raise BackboneError(f"'{path}' is not torch-fidelity's Inception v3 state dict; name that file.") from None
    return _First(network).eval()


class _First(nn.Module):
    """The only output of a network that returns a tuple."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[0]


class _Given(nn.Module):
    """Stands where torchmetrics wants a network: the features are there already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """FID's distance between the Gaussians of two sets of features [N, D] and [M, D]. NaN with fewer than two each.

    Biased upwards for few samples, strongly so below D: compare only equal N.
    """
    if min(len(real), len(generated)) < 2:
        return float("nan")
    prepare_libraries()
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(_Given(real.shape[1]))
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return metric.compute().item()


def kernel_distance(real: Tensor, generated: Tensor, seed: int = 0) -> float:
    """KID (Binkowski et al. 2018), unbiased: mean over 100 subsets of 1000, or over all if there are fewer."""
    count = min(len(real), len(generated))
    if count < 2:
        return float("nan")
    prepare_libraries()
    from torchmetrics.image.kid import KernelInceptionDistance

    size, subsets = (KID_SUBSET_SIZE, KID_SUBSETS) if count > KID_SUBSET_SIZE else (count, 1)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "stores all features": they are there already
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(_Given(real.shape[1]), subsets=subsets, subset_size=size)
        metric.update(real, real=True)
        metric.update(generated, real=False)
        return metric.compute()[0].item()
