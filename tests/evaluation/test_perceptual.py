"""SSIM, LPIPS, DISTS, FID and KID equal the libraries' own with the same backbone weights; nothing is downloaded."""

import socket
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from evaluation.metrics import images as image_metrics
from evaluation.metrics import perceptual
from evaluation.metrics.perceptual import BackboneError

CLOSE = {"rel": 1e-5, "abs": 1e-5}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Whoever asks for a network connection fails the test."""

    def refuse(*_):
        raise AssertionError("something wanted to connect")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


def pictures(count: int = 2, side: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.interpolate(torch.rand(count, 3, 8, 8, generator=generator), side, mode="bicubic")
    truth = truth.clamp(0, 1)
    return (truth + 0.1 * torch.randn(truth.shape, generator=generator)).clamp(0, 1), truth


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """Random AlexNet and VGG16 in torchvision's layout, as files and as modules."""
    import torchvision

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("backbones")
    with torch.device("meta"):  # the classifier is large and not needed
        alexnet = torchvision.models.alexnet().features
    alexnet = alexnet.to_empty(device="cpu")
    for parameter in alexnet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    vgg16 = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"], batch_norm=False)
    found = {}
    for name, features in (("alexnet", alexnet), ("vgg16", vgg16)):
        tensors = {f"features.{k}": v for k, v in features.state_dict().items()}
        found[name] = SimpleNamespace(path=folder / f"{name}.pth", features=features)
        torch.save(tensors, found[name].path)
    save_file({f"features.{k}": v for k, v in alexnet.state_dict().items()}, folder / "alexnet.safetensors")
    return found


def test_ssim_and_psnr_are_the_library_s():
    """Of torchmetrics' map we count what Wang et al. count: windows that lie wholly inside the picture."""
    from torchmetrics.functional.image import structural_similarity_index_measure
    from torchmetrics.image import PeakSignalNoiseRatio

    images, truth = pictures()
    whole = structural_similarity_index_measure(images, truth, data_range=1.0, return_full_image=True)[1]
    inside = whole[..., 5:-5, 5:-5].mean((1, 2, 3))
    assert image_metrics.ssim(images, truth).tolist() == pytest.approx(inside.tolist(), **CLOSE)
    psnr = PeakSignalNoiseRatio(data_range=1.0, reduction="none", dim=(1, 2, 3))
    assert image_metrics.psnr(images, truth).tolist() == pytest.approx(psnr(images, truth).tolist(), **CLOSE)


@pytest.mark.parametrize(("net", "name"), [("alex", "alexnet"), ("vgg", "vgg16")])
def test_lpips_is_the_library_s(backbones, monkeypatch, net, name):
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity, lpips

    images, truth = pictures()
    ours = perceptual.load_lpips(net, backbones[name].path)(images * 2 - 1, truth * 2 - 1).reshape(-1)
    monkeypatch.setattr(lpips, "_get_tv_model_features", lambda *_: deepcopy(backbones[name].features))
    theirs = learned_perceptual_image_patch_similarity(images, truth, net_type=net, normalize=True, reduction="none")
    assert ours.tolist() == pytest.approx(theirs.tolist(), **CLOSE) and (ours > 1e-3).all()


def test_lpips_is_the_authors(backbones, monkeypatch):
    """The `lpips` package of the metric's authors, as a second witness."""
    authors = pytest.importorskip("lpips")
    images, truth = pictures()
    ours = perceptual.load_lpips("alex", backbones["alexnet"].path.with_suffix(".safetensors"))
    features = SimpleNamespace(features=deepcopy(backbones["alexnet"].features))
    monkeypatch.setattr(authors.pretrained_networks.tv, "alexnet", lambda **_: features)
    theirs = authors.LPIPS(net="alex", pnet_rand=True, verbose=False)
    pair = images * 2 - 1, truth * 2 - 1
    assert ours(*pair).reshape(-1).tolist() == pytest.approx(theirs(*pair).reshape(-1).tolist(), **CLOSE)


def test_dists_is_the_library_s(backbones, monkeypatch):
    from torchmetrics.functional.image import deep_image_structure_and_texture_similarity, dists

    images, truth = pictures()
    ours = perceptual.load_dists(backbones["vgg16"].path)(images, truth)
    features = SimpleNamespace(features=deepcopy(backbones["vgg16"].features))
    monkeypatch.setattr(dists, "vgg16", lambda **_: features)
    theirs = deep_image_structure_and_texture_similarity(images, truth)
    assert ours.tolist() == pytest.approx(theirs.tolist(), **CLOSE) and (ours > 1e-3).all()


def test_fid_and_kid_are_the_library_s():
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    class Network(torch.nn.Module):
        num_features = 8

        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv2d(3, 8, 5, stride=3)

        def forward(self, images):
            return self.layer(images).mean((2, 3)).double()

    torch.manual_seed(0)
    network = Network().requires_grad_(False)
    images, truth = pictures(count=40, side=16)
    fid, kid = FrechetInceptionDistance(network), KernelInceptionDistance(network, subsets=1, subset_size=40)
    for metric in (fid, kid):
        metric.update(truth, real=True)
        metric.update(images, real=False)
    ours = perceptual.frechet_distance(network(truth), network(images))
    assert ours == pytest.approx(fid.compute().item(), **CLOSE) and ours > 1e-5
    ours = perceptual.kernel_distance(network(truth), network(images))
    assert ours == pytest.approx(kid.compute()[0].item(), **CLOSE)


def test_frechet_distance_of_known_gaussians():
    scipy = pytest.importorskip("scipy.linalg")
    generator = torch.Generator().manual_seed(0)
    real, made = torch.randn(2, 50, 4, generator=generator, dtype=torch.float64)
    made = made * 1.5 + 1
    root = scipy.sqrtm((torch.cov(real.T) @ torch.cov(made.T)).numpy()).real.trace()
    expected = (real.mean(0) - made.mean(0)).square().sum() + torch.cov(real.T).trace() + torch.cov(made.T).trace()
    assert perceptual.frechet_distance(real, made) == pytest.approx(expected.item() - 2 * root, **CLOSE)
    assert str(perceptual.frechet_distance(real[:1], made)) == "nan"


def test_inception_is_the_library_s(tmp_path, monkeypatch):
    source = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.manual_seed(0)
    with monkeypatch.context() as context:
        context.setattr(source.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        context.setattr(source.torch, "load", lambda *_, **__: None)
        library = source.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], "random")
    torch.save(library.state_dict(), tmp_path / "inception.pth")
    images = (pictures()[0] * 255).byte()
    ours = perceptual.load_inception(tmp_path / "inception.pth")
    with torch.inference_mode():
        expected, found = library(images)[0], ours(images)[0]
    assert found.shape == (2, 2048) and found.flatten().tolist() == pytest.approx(expected.flatten().tolist(), **CLOSE)


def test_wrong_files_are_named(tmp_path, backbones):
    with pytest.raises(BackboneError, match="Nothing is downloaded"):
        perceptual.load_lpips("alex", tmp_path / "nothing.pth")
    with pytest.raises(BackboneError, match="not torchvision's vgg16"):
        perceptual.load_dists(backbones["alexnet"].path)
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(BackboneError, match="text.pth"):
        perceptual.load_lpips("vgg", tmp_path / "text.pth")
    with pytest.raises(BackboneError, match="Inception v3"):
        perceptual.load_inception(backbones["alexnet"].path)
