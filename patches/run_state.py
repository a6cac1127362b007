"""What lives only as long as one sampling run, and where in a batch the host has put which condition.

Settings are constant and are in a `RunPatch`, which is shared by every clone of a MODEL. Whatever changes
during a run is in a state object of its own, placed in the run's transformer options and taken out again,
also after an exception, so that no run can see another one's tensors.
"""

from __future__ import annotations

from collections.abc import Callable

from comfy.context_windows import IndexListContextHandler
from comfy.patcher_extension import WrappersMP
from torch import Tensor

# Free memory that both sides of guidance need in one call, in what the host estimates for F alone (`memory_required`):
# all networks take 1.66 of it at SD1.5's width (evaluation.bench), with the host's own reserve of a half.
SHARED_NEEDS = 2.5


def views_per_call(views: int, model_options: dict) -> int:
    """Rows of one condition in a UNet call: all `views`, or a window of them if the run has context windows."""
    handler = model_options.get("context_handler")
    windows = isinstance(handler, IndexListContextHandler) and handler.dim == 0
    return min(views, handler.context_length) if windows else views


class SigmaRange:
    """The part of the schedule in which a patch acts, given in percent of the steps as ComfyUI counts them."""

    def __init__(self, start_percent: float = 0.0, end_percent: float = 1.0):
        if not 0.0 <= start_percent <= end_percent <= 1.0:
            raise ValueError(
                f"start_percent {start_percent} and end_percent {end_percent} must satisfy 0 <= start <= end <= 1"
            )
        self.percent = (start_percent, end_percent)

    @property
    def whole(self) -> bool:
        return self.percent == (0.0, 1.0)

    def test(self, model_sampling) -> Callable[[Tensor], bool]:
        """Says of a step's sigma [N] whether it is inside the range; a whole one reads nothing from the device."""
        if self.whole:
            return lambda sigma: True
        highest, lowest = (float(model_sampling.percent_to_sigma(percent)) for percent in self.percent)
        return lambda sigma: lowest <= float(sigma.flatten()[0]) <= highest


class RunState:
    """Base of all run states: the network, how many views there are, and which conditions are positive.

    An object and not a dict on purpose: the host copies dicts inside transformer options at every step, and
    a cache kept in one would be lost.
    """

    def __init__(self, guider, key: str, views: int):
        self.views = views
        check_stock_controls(guider.conds, views)
        self.without_control = share_control(guider.conds)
        self.positive: list[bool] = []  # for every chunk of the UNet call: is it a positive condition?
        self.evaluating = False  # all UNet calls meanwhile are of one step
        self.network = guider.model_patcher.get_additional_models_with_key(key)[0].model
        self._positive_uuids = {cond["uuid"] for cond in guider.conds.get("positive", ()) if "uuid" in cond}

    def fitting(self, model, conds: list[list[dict] | None], x: Tensor) -> list[list[dict] | None]:
        """The conditions of an evaluation of BaseModel `model` on latents x [V, 4, h, w]. Where memory is short, the
        negative ones go without the ControlNet that they were given, and so into a call of their own."""
        needed = SHARED_NEEDS * model.memory_required([2 * x.shape[0], *x.shape[1:]])
        if not self.without_control or needed < model.current_patcher.get_free_memory(x.device):
            return conds
        return [side and [self._own_control(cond) for cond in side] for side in conds]

    def _own_control(self, cond: dict) -> dict:
        return {**cond, "control": None} if cond["uuid"] in self.without_control else cond

    def begin_evaluation(self, sigma: Tensor) -> None:
        """A step at noise level `sigma` [N] begins: subclasses drop what belongs to the one before."""

    def begin_unet_call(self, transformer_options: dict) -> None:
        """Notes what a call depends on besides tensors, before it: a compiled UNet must not look for it.

        Where a guider leaves the host's wrappers out, every call is an evaluation of its own.
        """
        if not self.evaluating:
            self.begin_evaluation(transformer_options["sigmas"])
        uuids = transformer_options.get("uuids")
        if uuids is not None and self._positive_uuids:
            self.positive = [uuid in self._positive_uuids for uuid in uuids]
        else:
            self.positive = [index == 0 for index in transformer_options["cond_or_uncond"]]


def check_condition_count(images: int, views: int, node: str) -> None:
    """Raises ValueError unless there is one condition image per view, or one for all."""
    if images not in (1, views):
        raise ValueError(
            f"{node} got {images} condition images for {views} views; give one per view, in the order of the latents "
            "(Render Camera Conditions makes them from the same cameras), or a single one."
        )


def check_stock_controls(conds: dict[str, list[dict]], views: int) -> None:
    """`check_condition_count` for view ControlNets that the host's own node has applied: it would repeat or leave out
    images without a word."""
    for cond in (cond for side in conds.values() for cond in side or ()):
        control = cond.get("control")
        while control is not None:
            images = getattr(control, "cond_hint_original", None)
            if images is not None and getattr(getattr(control, "control_model", None), "reads_cameras", False):
                check_condition_count(len(images), views, "Apply ControlNet")
            control = control.previous_controlnet


def share_control(conds: dict[str, list[dict]]) -> frozenset:
    """Gives a run's negative conditions the positive's View ControlNet, so that one UNet call can serve both sides.

    The host batches conditions with one ControlNet only. Ours leaves the negative ones out (`chunks_without_control`),
    so that the numbers stay, and half as many kernels are larger. Where memory is short, see `RunState.fitting`.

    Args:
        conds: of a run, changed where all positive conditions have one ControlNet of ours and no negative one has any.

    Returns:
        uuids of the conditions that were given it
    """
    positive, negative = conds.get("positive", ()), conds.get("negative", ())
    control = positive[0].get("control") if positive else None
    alone = getattr(control, "leaves_conditions_out", False) and control.previous_controlnet is None
    if not alone or any(cond.get("control") is not control for cond in positive):
        return frozenset()
    if any(cond.get("control") is not None for cond in negative):
        return frozenset()
    for cond in negative:
        cond["control"] = control
    return frozenset(cond["uuid"] for cond in negative)


def chunks_without_control(transformer_options: dict) -> list[bool]:
    """For every chunk of the batch: did only `share_control` give it its ControlNet?"""
    runs = [state for state in transformer_options.values() if isinstance(state, RunState)]
    shared = frozenset().union(*(run.without_control for run in runs))
    uuids = transformer_options.get("uuids") or [None] * len(transformer_options["cond_or_uncond"])
    return [uuid in shared for uuid in uuids]


class RunPatch:
    """A patch with a state per run and an object per UNet call, both in transformer options for as long as they live.

    Subclasses say what these are (`begin`, `begin_call`), and add hooks of their own that look at them. Inside of the
    UNet they look at nothing else: a compiled graph is chosen by what is in the state.
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
        model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, self.key, self._predict_noise)
        model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, self.key, self._calc_cond_batch)
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, self.key, self._apply_model)
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
        if executor.class_obj.model_patcher.get_additional_models_with_key("multigpu"):  # a run's state belongs to one
            raise ValueError(f"{self.label} works on one GPU only; take MultiGPU CFG Split off this MODEL.")
        options = executor.class_obj.model_options["transformer_options"]
        options[self.key] = self.begin(executor.class_obj, noise)
        try:
            return executor(noise, *args, **kwargs)
        finally:
            options.pop(self.key, None)

    def _prepare_sampling(self, executor, model, noise_shape, *args, **kwargs):
        options = kwargs["model_options"]
        rows = self.extra_rows(self.state(options["transformer_options"]), options)
        return executor(model, [noise_shape[0] + rows, *noise_shape[1:]], *args, **kwargs)

    def _predict_noise(self, executor, x, timestep, model_options, *args, **kwargs):
        run = self.state(model_options["transformer_options"])
        run.begin_evaluation(timestep)
        run.evaluating = True
        try:
            return executor(x, timestep, model_options, *args, **kwargs)
        finally:
            run.evaluating = False

    def _calc_cond_batch(self, executor, model, conds, x_in, timestep, model_options, *args, **kwargs):
        conds = self.state(model_options["transformer_options"]).fitting(model, conds, x_in)
        return executor(model, conds, x_in, timestep, model_options, *args, **kwargs)

    def _apply_model(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, *args, **kwargs
    ):
        """Also gives the UNet the state as an argument: the host's TorchCompileModel does not look at transformer
        options when it chooses a compiled graph."""
        run = self.state(transformer_options)
        run.begin_unet_call(transformer_options)
        kwargs[self.key] = run
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, *args, **kwargs)

    def _wrap_unet(
        self, executor, x, timesteps=None, context=None, y=None, control=None, transformer_options=None, *args, **kwargs
    ):
        run = kwargs.pop(self.key, None) or self.state(transformer_options)
        call = self.begin_call(run, executor.class_obj, x, timesteps, context, transformer_options)
        transformer_options[self.call_key] = call
        try:
            return executor(x, timesteps, context, y, control, transformer_options, *args, **kwargs)
        finally:
            transformer_options.pop(self.call_key, None)
