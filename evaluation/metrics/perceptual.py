"""LPIPS, DISTS, FID and KID by their libraries, with backbones from files that the user names.

Nothing is ever downloaded: networks are built with random weights and filled from the file. The small linear heads of
LPIPS come inside lpips, the weights of DISTS inside torchmetrics.
"""

from __future__ import annotations

import importlib
import inspect
import io
import re
import warnings
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from diffportrait3d.weights.checkpoints import open_checkpoint
from diffportrait3d.weights.files import CheckpointError

TORCHVISION_NAMES = {"alex": "alexnet", "vgg": "vgg16"}
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000


class BackboneError(ValueError):
    """A backbone that cannot be used; the message names the file and the way out."""


def check_libraries(*names: str) -> None:
    """Raises BackboneError unless these libraries of the paper's metrics can be imported."""
    try:
        for name in names:
            importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise BackboneError(f"{error}; the paper's metrics need: pip install {' '.join(names)}") from None
    except RuntimeError as error:  # torchvision built for another torch: "operator torchvision::nms does not exist"
        raise BackboneError(
            f"torchvision does not fit the installed torch {torch.__version__} ({error}); install both from one index."
        ) from None


def load_lpips(net: str, path: Path) -> nn.Module:
    """LPIPS (Zhang et al. 2018, v0.1): images [N, 3, H, W] in [-1, 1], twice -> [N, 1, 1, 1].

    net: "alex" or "vgg". path: torchvision's alexnet or vgg16 (.pth or .safetensors; the classifier may be missing).
    """
    check_libraries("lpips")
    from lpips import LPIPS

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # lpips uses a deprecated argument of torchvision
        network = LPIPS(net=net, pnet_rand=True, verbose=False)
    return _fill(network, TORCHVISION_NAMES[net], path)


def load_dists(path: Path) -> nn.Module:
    """DISTS (Ding et al. 2020): images [N, 3, H, W] in [0, 1], twice -> [N]. path: torchvision's vgg16."""
    check_libraries("torchmetrics", "torchvision")
    from torchmetrics.functional.image.dists import DISTSNetwork, L2pooling
    from torchvision.models.vgg import cfgs, make_layers

    class Dists(DISTSNetwork):
        """Of torchmetrics, but for a constructor that downloads VGG-16."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            features, self.chns = make_layers(cfgs["D"]), [3, 64, 128, 256, 512, 512]
            for number, (first, end) in enumerate(pairwise((0, 4, 9, 16, 23, 30)), start=1):
                layers = OrderedDict((str(index), features[index]) for index in range(first, end))
                if first:
                    layers[str(first)] = L2pooling(channels=self.chns[number - 1])  # in place of VGG's max pooling
                self.add_module(f"stage{number}", nn.Sequential(layers))
            self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, -1, 1, 1))
            self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, -1, 1, 1))
            weights = Path(inspect.getfile(DISTSNetwork)).parent / "dists_models" / "weights.pt"
            self.alpha, self.beta = (nn.Parameter(torch.load(weights)[name]) for name in ("alpha", "beta"))

    return _fill(Dists(), "vgg16", path)


def _fill(network: nn.Module, name: str, path: Path) -> nn.Module:
    """Put a torchvision state dict into a network whose slices keep the indices of torchvision's `features`."""
    tensors, filled = read_tensors(path), {}
    for key in network.state_dict():
        layer = re.fullmatch(r"(?:net\.)?(?:slice|stage)\d+\.(\d+)\.(weight|bias)", key)
        if layer:
            wanted = f"features.{layer[1]}.{layer[2]}"
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
    try:
        source = open_checkpoint(path)
    except CheckpointError as error:
        raise BackboneError(f"{error} Nothing is downloaded.") from None
    return {name: source.get(name) for name in source.shapes}


def load_inception(path: Path) -> nn.Module:
    """FID's Inception v3: uint8 images [N, 3, H, W] -> ([N, 2048],), with TensorFlow 1's bilinear resizing.

    path: torch-fidelity's (= pytorch-fid's origin) state dict `weights-inception-2015-12-05-6726825d.pth`.
    """
    tensors, copy = read_tensors(path), io.BytesIO()
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ModuleNotFoundError:
        raise BackboneError("FID needs: pip install --no-deps torch-fidelity") from None
    torch.save(tensors, copy)  # its constructor would run code in the file: it is given tensors alone
    copy.seek(0)
    try:
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], copy).eval()
    except RuntimeError:
        raise BackboneError(f"'{path}' is not torch-fidelity's Inception v3 state dict; name that file.") from None


class _Features(nn.Identity):
    """In place of the network that torchmetrics expects: it is given features in place of images."""

    def __init__(self, count: int):
        super().__init__()
        self.num_features = count


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """FID's distance between the Gaussians of two sets of features [N, D] and [M, D]. NaN with fewer than two each.

    Biased upwards for few samples, strongly so below D: compare only equal N.
    """
    if min(len(real), len(generated)) < 2:
        return float("nan")
    check_libraries("torchmetrics")
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(_Features(real.shape[1]))
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return metric.compute().item()


def kernel_distance(real: Tensor, generated: Tensor, seed: int = 0) -> float:
    """KID (Binkowski et al. 2018), unbiased: mean over 100 subsets of 1000, or over all if there are fewer."""
    count = min(len(real), len(generated))
    if count < 2:
        return float("nan")
    check_libraries("torchmetrics")
    from torchmetrics.image.kid import KernelInceptionDistance

    size, subsets = (KID_SUBSET_SIZE, KID_SUBSETS) if count > KID_SUBSET_SIZE else (count, 1)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "stores all features": they are computed already
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(_Features(real.shape[1]), subsets=subsets, subset_size=size)
        metric.update(real, real=True)
        metric.update(generated, real=False)
        return metric.compute()[0].item()
