"""The metrics of `evaluation.paper` that the given backbone files allow.

With a backbone file, a metric has the paper's name. Without one it is missing; what the miniature's own networks say
instead always begins with "mini", so that the numbers cannot be confused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffportrait3d.cameras.labels import yaw_pitch
from diffportrait3d.files import file_hash
from diffportrait3d.weights.files import load_network

from . import perceptual
from .faces import FACE_METRICS, FaceNetworks
from .images import mini_lpips, psnr, ssim
from .metric import Metric
from .perceptual import BackboneError
from .pose import angle_between, load_pose_regressor

PAPER_METRICS: Mapping[str, Metric] = {
    "lpips_alex": Metric("LPIPS (alex)", 3, paper="lpips"),
    "lpips_vgg": Metric("LPIPS (vgg)", 3, paper="lpips"),
    "ssim": Metric("SSIM", 3, more_is_better=True, paper="ssim"),
    "psnr": Metric("PSNR (dB)", 2, more_is_better=True),
    "dists": Metric("DISTS", 3, paper="dists"),
    "id_reference": Metric("ID, reference", 3, more_is_better=True, paper="id"),
    "id_truth": Metric("ID, truth", 3, more_is_better=True, paper="id"),
    "id_failures": Metric("ID failures", 3),
    "pose_mse": Metric("POSE, MSE (rad^2)", 4, paper="pose"),
    "pose_norm": Metric("POSE, norm (rad)", 4, paper="pose"),
    "pose_norm_degrees": Metric("POSE, norm (deg)", 2),
    "pose_failures": Metric("POSE failures", 3),
    "fid": Metric("FID", 2, paper="fid"),
    "kid": Metric("KID", 4),
    "mini_lpips": Metric("mini-LPIPS", 4),
    "mini_pose": Metric("mini-POSE (deg)", 2),
    "mini_pose_mse": Metric("mini-POSE, MSE (rad^2)", 4),
    "mini_fid": Metric("mini-FID", 4),
    "mini_kid": Metric("mini-KID", 4),
} | FACE_METRICS
SET_METRICS = {"fid": perceptual.frechet_distance, "kid": perceptual.kernel_distance}
IDENTITY_SIDE, POSE_SIDE = 112, 224  # what ArcFace and Deep3DFaceRecon take


class MetricNetworks:
    """The networks whose files are given.

    Args:
        files: name -> path, of "alexnet", "vgg16", "inception", "identity", "pose". Identity and pose are TorchScript:
            images [N, 3, 112, 112] in [-1, 1] -> embeddings [N, D]; images [N, 3, 224, 224] in [0, 1] -> pitch,
            yaw, roll [N, 3] in radians. A row that is not finite says "no face found".
        miniature: a weights folder whose networks measure, too, or None.
        faces: dlib's networks, or None.
    """

    def __init__(
        self,
        files: dict[str, Path],
        miniature: Path | None = None,
        device: str = "cpu",
        faces: FaceNetworks | None = None,
    ):
        self.device, self.sha256 = device, {name: _sha256(path) for name, path in files.items()}
        self.networks: dict[str, nn.Module] = {}
        if "alexnet" in files:
            self.networks["lpips_alex"] = perceptual.load_lpips("alex", files["alexnet"])
        if "vgg16" in files:
            self.networks["lpips_vgg"] = perceptual.load_lpips("vgg", files["vgg16"])
            self.networks["dists"] = perceptual.load_dists(files["vgg16"])
        if "inception" in files:
            self.networks["inception"] = perceptual.load_inception(files["inception"])
        for name in {"identity", "pose"} & files.keys():
            self.networks[name] = _torchscript(files[name])
        if miniature:
            autoencoder, regressor = miniature / "autoencoder.safetensors", miniature / "pose_regressor.safetensors"
            self.networks["autoencoder"] = load_network(autoencoder, expect="autoencoder")[0]
            self.networks["regressor"] = load_pose_regressor(regressor)
            self.sha256 |= {f"mini_{path.stem}": _sha256(path) for path in (autoencoder, regressor)}
        self.faces = faces
        if faces:
            self.sha256 |= {f"dlib_{name}": value for name, value in faces.sha256.items()}
        self.networks = {name: network.to(device) for name, network in self.networks.items()}

    @torch.inference_mode()
    def per_view(self, generated: Tensor, truth: Tensor, reference: Tensor) -> dict[str, Tensor]:
        """Every metric of single views: [V] each. Images [V, 3, H, W] (reference [1, 3, H, W]) in [0, 1]."""
        generated, truth, reference = (images.to(self.device) for images in (generated, truth, reference))
        found = {"ssim": ssim(generated, truth), "psnr": psnr(generated, truth)}
        for name in ("lpips_alex", "lpips_vgg"):
            if name in self.networks:
                found[name] = self.networks[name](generated * 2 - 1, truth * 2 - 1).reshape(-1)
        if "dists" in self.networks:
            found["dists"] = self.networks["dists"](generated, truth).reshape(-1)
        if "identity" in self.networks:
            found |= self._identity(generated, truth, reference)
        if "pose" in self.networks:
            found |= self._pose(generated, truth)
        if "autoencoder" in self.networks:
            found["mini_lpips"] = mini_lpips(generated, truth, self.networks["autoencoder"])
        if "regressor" in self.networks:
            found |= self._mini_pose(generated, truth)
        return {name: values.float().cpu() for name, values in found.items()}

    def _identity(self, generated: Tensor, truth: Tensor, reference: Tensor) -> dict[str, Tensor]:
        """Cosines of embeddings to the reference (section 4.2) and to the truth (supplement A.2.1)."""
        made, real, first = (self._embed(images) for images in (generated, truth, reference))
        return {
            "id_reference": (made * first).sum(-1),
            "id_truth": (made * real).sum(-1),
            "id_failures": made.isnan().any(-1).float(),
        }

    def _embed(self, images: Tensor) -> Tensor:
        embedding = self.networks["identity"](_resized(images, IDENTITY_SIDE) * 2 - 1)
        return F.normalize(_finite_or_nan(embedding), dim=-1)

    def _pose(self, generated: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """Error of the angles estimated on the view against those on the truth (supplement A.2.2)."""
        made, real = (
            _finite_or_nan(self.networks["pose"](_resized(images, POSE_SIDE))) for images in (generated, truth)
        )
        error = made - real
        return {
            "pose_mse": error.square().mean(-1),
            "pose_norm": error.norm(dim=-1),
            "pose_norm_degrees": torch.rad2deg(error.norm(dim=-1)),
            "pose_failures": made.isnan().any(-1).float(),
        }

    def _mini_pose(self, generated: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """The same by the miniature's regressor, which reads two angles: its squares are means over two."""
        made, real = (self.networks["regressor"].predict(images * 2 - 1) for images in (generated, truth))
        pairs = zip(yaw_pitch(made), yaw_pitch(real), strict=True)
        squares = torch.stack([torch.deg2rad(a - b).square() for a, b in pairs])
        return {"mini_pose": angle_between(made, real), "mini_pose_mse": squares.mean(0)}

    @torch.inference_mode()
    def features(self, images: Tensor) -> dict[str, Tensor]:
        """What distances between sets are computed of, [N, D] per prefix of the metrics ("" or "mini_")."""
        images, found = images.to(self.device), {}
        if "inception" in self.networks:
            found[""] = self.networks["inception"]((images * 255).round().to(torch.uint8))[0].cpu()
        if "autoencoder" in self.networks:
            levels = self.networks["autoencoder"].encoder.features(images * 2 - 1)
            found["mini_"] = torch.cat([F.normalize(level.mean((2, 3)), dim=1) for level in levels], dim=1).cpu()
        return found


def _finite_or_nan(rows: Tensor) -> Tensor:
    """A row with anything that is not finite becomes all NaN."""
    return torch.where(rows.isfinite().all(-1, keepdim=True), rows, torch.full_like(rows, torch.nan))


def _resized(images: Tensor, side: int) -> Tensor:
    return F.interpolate(images, size=(side, side), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def _sha256(path: Path) -> str:
    if not path.is_file():
        raise BackboneError(f"There is no file '{path}'; check the path. Nothing is downloaded.")
    return file_hash(path)


def _torchscript(path: Path) -> nn.Module:
    try:
        return torch.jit.load(str(path), map_location="cpu").eval()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise BackboneError(f"'{path}' is not a TorchScript file ({reason}); save one with torch.jit.save.") from None
