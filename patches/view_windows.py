"""More views than the cross-view attention can hold: the host's context windows, placed elsewhere at every step.

The host calls a context handler around every evaluation of the conditions, whatever sampler asks for it. Each window
is a UNet call of its own with its rows of latents, conditions, masks and hints, so memory does not grow with the
number of views, and where windows overlap their predictions are averaged.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.utils
from comfy.context_windows import ContextFuseMethod, ContextSchedule, IndexListContextHandler
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..diffportrait3d.views import view_windows, window_weights
from .view_controlnet import ViewControlNet

EASY_CACHE = "easycache"  # under which the host's EasyCache keeps its wrappers


class ViewWindows(IndexListContextHandler):
    """The windows of one run; made when it begins and dropped with it."""

    def __init__(self, size: int, overlap: int, closed: bool):
        super().__init__(
            context_schedule=ContextSchedule("views", _windows_of_step),
            fuse_method=ContextFuseMethod("views", lambda length, **kwargs: window_weights(length)),
            context_length=size,
            context_overlap=overlap,
            closed_loop=closed,
            causal_window_fix=False,
        )
        self._window, self._controls = None, {}
        self._bar = comfy.utils.ProgressBar(1)

    def should_use_context(self, model, conds, x_in: Tensor, *args, **kwargs) -> bool:
        return x_in.shape[0] > self.context_length

    def get_resized_cond(self, cond_in, x_in: Tensor, window, *args, **kwargs):
        """The conditions of a window; ControlNets of the host get the hints of its views, too."""
        if window is not self._window:
            self._window, self._controls = window, {}
        conditions = super().get_resized_cond(cond_in, x_in, window, *args, **kwargs)
        for condition in conditions or ():
            if condition.get("control") is not None:
                condition["control"] = self._control(condition["control"], window, x_in.shape[0])
        return conditions

    def evaluate_context_windows(self, calc, model, x_in, conds, timestep, windows, options, *args, **kwargs):
        """As the host does it; then the progress bar moves on by a part of a step."""
        call = (calc, model, x_in, conds, timestep, windows, options, *args)
        with quiet_windows():
            results = super().evaluate_context_windows(*call, **kwargs)
        steps = len(options["transformer_options"]["sample_sigmas"]) - 1
        done = (windows[-1][0] + 1) / kwargs["total_windows"]
        self._bar.update_absolute(min(self._step + done, steps), steps)
        return results

    def _control(self, control, window, views: int):
        """`control` with the hints of the window, itself if it has no hint per view; equal for all conditions."""
        if control not in self._controls:
            self._controls[control] = _control_of_window(control, window, views)
        return self._controls[control]


@contextmanager
def quiet_windows() -> Iterator[None]:
    """Keeps the host's line per window and step out of the log while the block runs, in this thread alone."""
    thread = threading.get_ident()

    def others(record: logging.LogRecord) -> bool:
        return record.thread != thread or not str(record.msg).startswith("Context window ")

    logger = logging.getLogger()  # the one that the host writes to
    logger.addFilter(others)
    try:
        yield
    finally:
        logger.removeFilter(others)


def _windows_of_step(views: int, handler: ViewWindows, model_options: dict) -> list[list[int]]:
    return view_windows(views, handler.context_length, handler.context_overlap, handler.closed_loop, handler._step)


def _control_of_window(control, window, views: int):
    """A chain of ControlNets for the views of a window. Those of the host would give every window the first hints."""
    previous = control.previous_controlnet
    windowed = None if previous is None else _control_of_window(previous, window, views)
    sliced = not isinstance(control, ViewControlNet) and _per_view(control.cond_hint_original, views)
    if not sliced and windowed is previous:
        return control
    part = copy.copy(control)  # shares the network and what the run has prepared
    part.previous_controlnet, part.cond_hint = windowed, None
    if sliced:
        part.cond_hint_original = window.get_tensor(control.cond_hint_original, dim=0)
        part.extra_concat_orig = [
            window.get_tensor(extra, dim=0) if _per_view(extra, views) else extra for extra in control.extra_concat_orig
        ]
    return part


def _per_view(hint: Tensor | None, views: int) -> bool:
    return hint is not None and hint.shape[0] == views


def skip_self_attention_guidance(model_options: dict) -> None:
    """Takes the host's Self-Attention Guidance out of a run's options: it sees the attention of the last window only
    and would blur the wrong places of all others."""
    functions = model_options.get("sampler_post_cfg_function", [])
    others = [function for function in functions if not _of_guidance(function)]
    if len(others) == len(functions):
        return
    model_options["sampler_post_cfg_function"] = others
    replaced = model_options["transformer_options"].get("patches_replace", {})
    replaced["attn1"] = {place: f for place, f in replaced.get("attn1", {}).items() if not _of_guidance(f)}
    logging.warning(
        "Self-Attention Guidance is skipped: the views are denoised in windows, and it knows the attention of one "
        "window only; make window_size the number of views to use both."
    )


def warn_of_easy_cache(model_options: dict) -> None:
    """One warning if the host's EasyCache is on a MODEL whose views are denoised in windows."""
    wrappers = model_options["transformer_options"].get("wrappers", {})
    if EASY_CACHE in wrappers.get(WrappersMP.CALC_COND_BATCH, {}):
        logging.warning(
            "EasyCache does not fit windows of views: it compares each with the one before, not the last step, and "
            "saves nothing or spoils views; use LazyCache, or make window_size the number of views."
        )


def _of_guidance(function) -> bool:
    return getattr(function, "__qualname__", "").startswith("SelfAttentionGuidance.")
