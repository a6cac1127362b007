"""View control (paper section 3.3): a ControlNet whose hint is another person's portrait at the wanted camera.

It is the host's own ControlNet, so strength, percent range, other ControlNets before or after it and the host's
memory management apply. Added are the hint's range [-1, 1], the choice of the rows that belong to the views of the
call, which the host's class would take from the front of the batch whatever window of views is denoised, and residuals
at the size of the features where another patch resizes them, where the host would leave them out.

Load View ControlNet gives the host's own class, with the hint's range, and the View ControlNet node what is here: other
packs (Advanced-ControlNet) know a ControlNet by its exact type.
"""

from __future__ import annotations

from pathlib import Path

import comfy.controlnet
import comfy.model_management as model_management
import torch
from torch import Tensor

from ..diffportrait3d.networks import UNetConfig
from ..diffportrait3d.weights.files import read_network
from ..host.compatibility import check_control_heads, check_control_width
from ..host.images import as_images, check_images, resize_images
from ..host.loading import build_control_model, set_trained_side
from .feature_sizes import fit_residuals
from .run_state import SigmaRange, check_condition_count, chunks_without_control


def to_hint_range(images: Tensor) -> Tensor:
    """[V, C, H, W] in [0, 1], grey, RGB or RGBA -> [V, 3, H, W] in [-1, 1], what F_cam was trained on."""
    return as_images(images.movedim(1, -1), "View ControlNet: image")[..., :3].movedim(-1, 1) * 2.0 - 1.0


class ViewControlNet(comfy.controlnet.ControlNet):
    """CONTROL_NET with one hint per view.

    sub_idxs, full_latent_length: the views of a call and of the run, as AnimateDiff-Evolved sets them on a ControlNet
        for its own context windows; it refuses one without them.
    """

    sub_idxs: list[int] | None = None
    full_latent_length: int | None = None
    leaves_conditions_out = True  # see `run_state.share_control`
    _resized: Tensor | None = None  # hints of the last call
    _serves: tuple | None = None  # the window's views, height and width that _resized was made for

    def get_control(self, x_noisy: Tensor, t: Tensor, cond: dict, batched_number: int, transformer_options: dict):
        """Residuals of the call's rows: 0 for conditions that only share the ControlNet, None without any others."""
        left_out = chunks_without_control(transformer_options)
        if all(left_out):
            return None
        views = len(x_noisy) // batched_number  # conditions are laid out one after the other
        hints = self._hints(x_noisy, views, transformer_options)
        fit_residuals(transformer_options)
        kept = [number for number, out in enumerate(left_out) if not out]

        def rows(values):
            """Of the conditions that are not left out."""
            if len(kept) == batched_number or not isinstance(values, Tensor) or len(values) != len(x_noisy):
                return values
            return torch.cat([values.split(views)[number] for number in kept])

        # The base class takes a hint of the right size as it is.
        self.cond_hint = hints if len(kept) == 1 else hints.repeat(len(kept), 1, 1, 1)
        inputs = rows(x_noisy), rows(t), {name: rows(value) for name, value in cond.items()}
        control = super().get_control(*inputs, len(kept), transformer_options)
        if control is None or len(kept) == batched_number:
            return control
        return {part: [_with_zeros(each, left_out) for each in residuals] for part, residuals in control.items()}

    def pre_run(self, model, *args, **kwargs) -> None:
        """As the host does it, and compiled where the run's MODEL is (TorchCompileModel).

        Raises:
            ValueError: the residuals would not fit the UNet of BaseModel `model`.
        """
        network = self.control_model_wrapped.model
        check_control_width(model, network)
        settings = model.current_patcher.model_options.get("torch_compile_kwargs")
        self.control_model = torch.compile(network, **settings) if settings else network
        super().pre_run(model, *args, **kwargs)

    def _hints(self, x_noisy: Tensor, views: int, transformer_options: dict) -> Tensor:
        """Hints [V, 3, 8h, 8w] of the views in this call, in [-1, 1], on the device; kept while they serve."""
        height, width = (side * self.compression_ratio for side in x_noisy.shape[-2:])
        images, window = self.cond_hint_original, transformer_options.get("context_window")
        numbers, total = self.sub_idxs, self.full_latent_length
        if window is not None:
            numbers, total = window.index_list, window.total_frames
        elif numbers is None:
            total = views
        check_condition_count(images.shape[0], total, "View ControlNet")
        serves = None if images.shape[0] == 1 or numbers is None else tuple(numbers)
        if self._serves != (serves, height, width):
            images = images if serves is None else images[list(serves)]
            resized = resize_images(images.movedim(1, -1), height, width).movedim(-1, 1).clamp(0.0, 1.0)
            dtype = self.manual_cast_dtype or self.control_model.dtype
            self._resized = self.preprocess_image(resized).to(x_noisy.device, dtype)
            self._serves = (serves, height, width)
        return self._resized.expand(views, -1, -1, -1)

    def copy(self) -> ViewControlNet:
        copied = ViewControlNet(None, load_device=self.load_device, manual_cast_dtype=self.manual_cast_dtype)
        copied.control_model = self.control_model
        copied.control_model_wrapped = self.control_model_wrapped
        self.copy_to(copied)
        return copied

    def cleanup(self) -> None:
        self.control_model = self.control_model_wrapped.model
        self._resized = self._serves = self.sub_idxs = self.full_latent_length = None
        super().cleanup()


def _with_zeros(residual: Tensor | None, left_out: list[bool]) -> Tensor | None:
    """Residuals of some conditions [kept*V, C, h, w] with zeros for those that are left out [chunks*V, C, h, w]."""
    if residual is None:
        return None
    chunks = iter(residual.chunk(left_out.count(False)))
    zeros = residual.new_zeros(1).expand(len(residual) // left_out.count(False), *residual.shape[1:])
    return torch.cat([zeros if out else next(chunks) for out in left_out])


def build_view_controlnet(tensors: dict[str, Tensor], config: UNetConfig) -> comfy.controlnet.ControlNet:
    """CONTROL_NET from F_cam's weights: of the host's own class, with our hint range."""
    module = build_control_model(tensors, config)
    module.reads_cameras = True  # see `run_state.check_stock_controls`
    device = model_management.get_torch_device()
    cast = model_management.unet_manual_cast(module.dtype, device)
    settings = {"load_device": device, "manual_cast_dtype": cast, "preprocess_image": to_hint_range}
    return comfy.controlnet.ControlNet(module, **settings)


def load_view_controlnet(path: Path | str) -> comfy.controlnet.ControlNet:
    """CONTROL_NET from a file of kind `view_controlnet`."""
    tensors, metadata = read_network(path, "view_controlnet")
    hint_range = list(metadata.get("hint_range", [-1, 1]))
    if hint_range != [-1, 1]:
        raise ValueError(f"{path} wants hints in {hint_range}, this pack gives them in [-1, 1]; update the pack.")
    control_net = build_view_controlnet(tensors, UNetConfig.from_dict(metadata["config"]))
    set_trained_side(control_net.control_model, metadata)
    return control_net


def as_view_controlnet(control_net) -> ViewControlNet:
    """The same network with our hint range, whichever loader made the CONTROL_NET."""
    if type(control_net) is not comfy.controlnet.ControlNet:
        raise ValueError(
            f"View ControlNet needs a ControlNet of the SD1.5 kind, not {type(control_net).__name__}; use Load View "
            "ControlNet. For keyframes of Advanced-ControlNet, connect that to its Apply node in place of this one."
        )
    check_control_heads(control_net.control_model)
    converted = ViewControlNet.copy(control_net)
    converted.preprocess_image = to_hint_range
    return converted


def apply_view_controlnet(
    conditioning: list,
    control_net,
    images: Tensor,
    strength: float = 1.0,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
) -> list:
    """Positive CONDITIONING with the camera conditions; ControlNets already in it stay and are added to.

    Args:
        images: one condition image per view, IMAGE [V, H, W, 3] in [0, 1].

    Raises:
        ValueError: no images or no prompt, NaN in the images, or an invalid percent range.
    """
    check_images(images, "View ControlNet", "image")
    if not conditioning:
        raise ValueError("View ControlNet: positive holds no prompt; connect an encoded text (empty will do).")
    percent = SigmaRange(start_percent, end_percent).percent
    if strength == 0.0:
        return conditioning
    control_net = as_view_controlnet(control_net)
    made: dict = {}  # conditions that share a ControlNet still share one
    out = []
    for tokens, options in conditioning:
        previous = options.get("control")
        if previous not in made:
            made[previous] = control_net.copy().set_cond_hint(images.movedim(-1, 1), strength, percent)
            made[previous].set_previous_controlnet(previous)
        out.append([tokens, {**options, "control": made[previous], "control_apply_to_uncond": False}])
    return out
