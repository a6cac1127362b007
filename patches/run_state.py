"""What lives only as long as one sampling run, and where in a batch the host has put which condition.

Settings are constant and are in a `RunPatch`, which is shared by every clone of a MODEL. Whatever changes
during a run is in a state object of its own, placed in the run's transformer options and taken out again,
also after an exception, so that no run can see another one's tensors.
"""

from __future__ import annotations

import logging

from comfy.context_windows import IndexListContextHandler
from comfy.patcher_extension import WrappersMP

COMPILE_KEY = "torch.compile"  # under which comfy_api.torch_helpers keeps the compiled model's wrapper


def unused_key(model, prefix: str) -> str:
    """A key no other patch on `model` uses, so that several patches of one kind can be applied in a row."""
    number = 0
    while f"{prefix}.{number}" in model.additional_models:
        number += 1
    return f"{prefix}.{number}"


def chunk_size(batch: int, transformer_options: dict) -> int:
    """Rows that belong to one condition: the host lays conditions out one after the other, in any order."""
    return batch // len(transformer_options["cond_or_uncond"])


def views_per_call(views: int, model_options: dict) -> int:
    """Rows of one condition in a UNet call: all `views`, or a window of them if the run has context windows."""
    handler = model_options.get("context_handler")
    windows = isinstance(handler, IndexListContextHandler) and handler.dim == 0
    return min(views, handler.context_length) if windows else views


def refuse_several_gpus(model, label: str) -> None:
    """Raises ValueError if the host would spread a run over several GPUs: a run's state belongs to one."""
    if model.get_additional_models_with_key("multigpu"):
        raise ValueError(f"{label} works on one GPU only; take MultiGPU CFG Split off this MODEL.")


def skip_compilation(transformer_options: dict) -> None:
    """Takes torch.compile out of a run's options: compiled code would not notice what changes at every step."""
    wrappers = transformer_options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
    if wrappers.pop(COMPILE_KEY, None):
        logging.warning(
            "torch.compile is skipped: compiled code would not notice that portrait and views change at every step; "
            "this run is as without it."
        )


class SigmaRange:
    """The part of the schedule in which a patch acts, given in percent of the steps as ComfyUI counts them."""

    def __init__(self, start_percent: float = 0.0, end_percent: float = 1.0):
        if not 0.0 <= start_percent <= end_percent <= 1.0:
            raise ValueError(
                f"start_percent {start_percent} and end_percent {end_percent} must satisfy 0 <= start <= end <= 1"
            )
        self.percent = (start_percent, end_percent)

    def limits(self, model_sampling) -> tuple[float, float]:
        """(highest, lowest) sigma inside the range."""
        start, end = self.percent
        return float(model_sampling.percent_to_sigma(start)), float(model_sampling.percent_to_sigma(end))


class RunState:
    """Base of all run states: the network, how many views there are, and which conditions are positive.

    An object and not a dict on purpose: the host copies dicts inside transformer options at every step, and
    a cache kept in one would be lost.
    """

    def __init__(self, guider, key: str, views: int):
        self.views = views
        self.network = guider.model_patcher.get_additional_models_with_key(key)[0].model
        self._positive = {cond["uuid"] for cond in guider.conds.get("positive", ()) if "uuid" in cond}

    def positive_chunks(self, transformer_options: dict) -> list[bool]:
        """For every chunk of the batch: is it a positive condition?"""
        uuids = transformer_options.get("uuids")
        if uuids is not None and self._positive:
            return [uuid in self._positive for uuid in uuids]
        return [index == 0 for index in transformer_options["cond_or_uncond"]]


class RunPatch:
    """A patch with a state per run and an object per UNet call, both in transformer options for as long as they live.

    Subclasses say what these are (`begin`, `begin_call`), and add hooks of their own that look at them.
    """

    label = "This patch"

    def __init__(self, key: str):
        self.key, self.call_key = key, f"{key}.call"

    def __deepcopy__(self, memo):
        return self  # constant settings: hosts that deep-copy model options must not copy networks with them

    def attach(self, model, network_patcher) -> None:
        """Register on `model` (already a clone) the network to load and the life of the run state."""
        model.set_additional_models(self.key, [network_patcher])
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, self.key, self._outer_sample)
        model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, self.key, self._prepare_sampling)
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, self.key, self._wrap_unet)

    def begin(self, guider, noise) -> RunState:
        """Make the state of a run. `noise` [N, C, h, w] has the shape of the views' latents."""
        return RunState(guider, self.key, noise.shape[0])

    def begin_call(self, run: RunState, unet, x, timesteps, context, options: dict) -> object | None:
        """What the hooks need in one call of the UNet with these arguments; None: nothing, the patch does not act."""
        raise NotImplementedError

    def extra_rows(self, run: RunState, model_options: dict) -> int:
        """How many rows of the batch more than the host expects a run takes in memory."""
        raise NotImplementedError

    def state(self, transformer_options: dict) -> RunState:
        try:
            return transformer_options[self.key]
        except KeyError:
            raise RuntimeError(
                f"{self.label} was called outside of a sampling run; sample through a ComfyUI guider "
                "(KSampler, SamplerCustomAdvanced or View-Consistency Sampler)"
            ) from None

    def _outer_sample(self, executor, noise, *args, **kwargs):
        refuse_several_gpus(executor.class_obj.model_patcher, self.label)
        options = executor.class_obj.model_options["transformer_options"]
        skip_compilation(options)
        options[self.key] = self.begin(executor.class_obj, noise)
        try:
            return executor(noise, *args, **kwargs)
        finally:
            options.pop(self.key, None)

    def _prepare_sampling(self, executor, model, noise_shape, *args, **kwargs):
        options = kwargs["model_options"]
        rows = self.extra_rows(self.state(options["transformer_options"]), options)
        return executor(model, [noise_shape[0] + rows, *noise_shape[1:]], *args, **kwargs)

    def _wrap_unet(
        self, executor, x, timesteps=None, context=None, y=None, control=None, transformer_options=None, *args, **kwargs
    ):
        run = self.state(transformer_options)
        call = self.begin_call(run, executor.class_obj, x, timesteps, context, transformer_options)
        transformer_options[self.call_key] = call
        try:
            return executor(x, timesteps, context, y, control, transformer_options, *args, **kwargs)
        finally:
            transformer_options.pop(self.call_key, None)
