"""Every sampler against what it must equal, in the real ComfyUI: the table of docs/composition.md.

    python -m evaluation.sampler_table

A narrow UNet with known weights, four views, four steps (eight with fast), start t=999 unless a sampler of the host
is compared with ours. A number is the relative difference to what the line of its column says.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffportrait3d.diffusion import Schedule, ddim_sample, dpmpp_2m_sample, start_noise
from diffportrait3d.networks import UNet

from .goldens.host import LATENT_SCALE, NARROW_CONFIG, host_path, known_weights
from .tables.report import markdown_table

VIEWS, SIDE, SEED = 4, 8, 3
STEPS, FAST_STEPS, CUT = 4, 8, 2
DENOISE, DENOISE_STEPS = 0.3, 3
TOLERANCE = 1e-5

COLUMNS = {  # name -> what a cell is compared with
    "whole": "the core's sampler; for a sampler of the host, the core's last prediction of the clean latents",
    "split in two": "one run; DPM-Solver++ begins anew with a first-order step, so with the other split alike",
    "split with the host's": "euler after ours, ours after euler: one run of either; with eta, DDIM with eta 0 "
    "down to 0 as the second part; with fast, dpmpp_2m alone split alike",
    "denoise 0.3": "the first input of the UNet: the latents plus the noise of its level",
    "mask": "the input, where the mask keeps it",
    "part of a batch": "the same views of the whole batch",
}


@dataclass(frozen=True)
class Sampler:
    """A row.

    node: "ours" (View-Consistency Sampler), or the host's SamplerCustomAdvanced, SamplerCustom or KSamplerAdvanced.
    eta: of DDIM; None: DPM-Solver++(2M). host: name of a sampler of the host, in place of our SAMPLER.
    """

    node: str
    eta: float | None = None
    host: str | None = None

    @property
    def steps(self) -> int:
        return FAST_STEPS if self.eta is None else STEPS

    @property
    def title(self) -> str:
        ours = "preset fast" if self.eta is None else f"DDIM, eta {self.eta:g}"
        if self.node == "ours":
            return f"View-Consistency Sampler, {ours}"
        if self.node == "KSamplerAdvanced":
            return f"KSampler (Advanced), {self.host}, the host's schedule"
        return f"{self.node}, {f'{self.host} on the SIGMAS of {ours}' if self.host else ours}"


EULER = Sampler("SamplerCustomAdvanced", 0.0, "euler")
SAMPLERS = (
    Sampler("ours", 0.0),
    Sampler("ours", 0.5),
    Sampler("ours"),
    Sampler("SamplerCustomAdvanced", 0.0),
    Sampler("SamplerCustomAdvanced", 0.5),
    Sampler("SamplerCustomAdvanced"),
    Sampler("SamplerCustom", 0.5),
    EULER,
    Sampler("SamplerCustomAdvanced", None, "dpmpp_2m"),
    Sampler("KSamplerAdvanced", 0.0, "euler"),
)


class Bench:
    """The pack's and the host's sampling nodes around one MODEL.

    Args:
        host, pack: from tools.embedded.
    """

    def __init__(self, host, pack):
        path = host_path(pack, host.comfy, NARROW_CONFIG)
        self.nodes, self.model, self.sampling = host.nodes.NODE_CLASS_MAPPINGS, path.model, pack.patches.sampling
        self.noises = pack.patches.noise
        self.prompt = [[torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(4)), {}]]
        generator = torch.Generator().manual_seed(9)
        self.latent = {"samples": torch.randn(VIEWS, 4, SIDE, SIDE, generator=generator) / LATENT_SCALE}

    def run(
        self,
        sampler: Sampler,
        latent: dict,
        first: int = 0,
        last: int = 10000,
        noise: bool = True,
        start: str = "t=999",
        model=None,
        denoise: float = 1.0,
    ) -> Tensor:
        """Steps `first` to `last` of a row's schedule, noise that is left included [V, 4, h, w]."""
        model, steps = model or self.model, sampler.steps if denoise == 1 else DENOISE_STEPS
        if sampler.node == "ours":
            schedule = "fast" if sampler.eta is None and denoise == 1 else "custom", steps, sampler.eta or 0.0, start
            inputs = model, self.prompt, latent, self.noises.ViewNoise(SEED), 1.0, *schedule
            part = {"start_at_step": first, "end_at_step": last, "add_noise": noise, "denoise": denoise}
            [out] = self.execute("DP3D_ViewConsistencySampler", *inputs, **part, return_with_leftover_noise=True)
        elif sampler.node == "KSamplerAdvanced":
            drawn = "enable" if noise else "disable"
            inputs = model, drawn, SEED, steps, 1.0, sampler.host, "normal", self.prompt, self.prompt, latent
            [out] = self.nodes[sampler.node]().sample(*inputs, first, last, "enable", denoise=denoise)
        else:
            chosen, sigmas = self.schedule(sampler, start, round(steps / denoise))
            if denoise < 1:
                _, sigmas = self.execute("SplitSigmasDenoise", sigmas, denoise)
            out = self.custom(sampler.node, chosen, sigmas[first : last + 1], latent, noise, model)
        return out["samples"]

    def execute(self, node: str, *inputs, **named) -> tuple:
        return self.nodes[node].execute(*inputs, **named).args

    def schedule(self, sampler: Sampler, start: str, steps: int) -> tuple:
        """(SAMPLER, SIGMAS) of a row, by View-Consistency Schedule."""
        preset = "fast" if sampler.eta is None and steps == FAST_STEPS else "custom"
        inputs = self.model, preset, steps, sampler.eta or 0.0, start
        chosen, sigmas = self.execute("DP3D_ViewConsistencySchedule", *inputs)
        return self.execute("KSamplerSelect", sampler.host)[0] if sampler.host else chosen, sigmas

    def custom(self, node: str, chosen, sigmas: Tensor, latent: dict, noise: bool, model) -> dict:
        """One of the host's two nodes that take SAMPLER and SIGMAS; SamplerCustom draws the host's noise."""
        if node == "SamplerCustom":
            return self.execute(node, model, noise, SEED, 1.0, self.prompt, self.prompt, chosen, sigmas, latent)[0]
        [guider] = self.execute("CFGGuider", model, self.prompt, self.prompt, 1.0)
        drawn = self.noises.ViewNoise(SEED) if noise else self.execute("DisableNoise")[0]
        return self.execute(node, drawn, guider, chosen, sigmas, latent)[0]

    def parts(self, first: Sampler, second: Sampler, start: str = "t=999") -> Tensor:
        """Two steps by one row, the others by another one that gets no noise."""
        between = self.run(first, self.latent, last=CUT, start=start)
        return self.run(second, {"samples": between}, first=CUT, noise=False, start=start)

    def noise(self, sampler: Sampler) -> Tensor:
        """The start noise of a row [V, 4, h, w]."""
        if sampler.node in ("SamplerCustom", "KSamplerAdvanced"):
            return self.execute("RandomNoise", SEED)[0].generate_noise(self.latent)
        return self.noises.ViewNoise(SEED).generate_noise(self.latent)


def whole(bench: Bench, sampler: Sampler) -> float | str:
    if sampler.node == "KSamplerAdvanced":
        return "the host's"
    end, clean = by_core(bench, sampler)
    return difference(bench.run(sampler, bench.latent), (clean if sampler.host else end) / LATENT_SCALE)


def by_core(bench: Bench, sampler: Sampler) -> tuple[Tensor, Tensor]:
    """The same views without ComfyUI, and the last prediction of them without noise, [V, 4, h, w], scaled."""
    unet, schedule, predictions = UNet(NARROW_CONFIG), Schedule(), []
    unet.load_state_dict(known_weights(NARROW_CONFIG)["unet"])
    context = bench.prompt[0][0].expand(VIEWS, -1, -1)

    def eps(x: Tensor, t: Tensor) -> Tensor:
        return unet(x, t, context)

    def record(step: int, x: Tensor, pred_x0: Tensor) -> None:
        predictions.append(pred_x0)

    latents, noise = LATENT_SCALE * bench.latent["samples"], bench.noise(sampler)
    start = start_noise(latents, noise, schedule)
    if sampler.host and sampler.eta is None:  # the host's own start at a model's highest noise level
        start = schedule.alphas_cumprod[-1].sqrt() * latents + noise
    elif sampler.host:
        start = schedule.q_sample(latents, schedule.ddim_timesteps(STEPS)[-1], noise)
    if sampler.eta is None:
        end = dpmpp_2m_sample(eps, start, schedule, callback=record)
    else:
        fresh = bench.noises.step_noise_of([bench.noises.View(SEED, view) for view in range(VIEWS)])
        end = ddim_sample(eps, start, schedule, STEPS, sampler.eta, fresh, record)
    return end, predictions[-1]


def split(bench: Bench, sampler: Sampler) -> float:
    if sampler.eta is None:
        other = Sampler("SamplerCustomAdvanced", None, None if sampler.host else "dpmpp_2m")
        return difference(bench.parts(sampler, sampler, "schedule"), bench.parts(other, other, "schedule"))
    return difference(bench.parts(sampler, sampler), bench.run(sampler, bench.latent))


def split_with_host(bench: Bench, sampler: Sampler) -> float | str:
    if sampler.node == "KSamplerAdvanced":
        return "other levels"
    if sampler.node == "SamplerCustom":
        return "as above"
    host = replace(EULER, host="dpmpp_2m", eta=None) if sampler.eta is None else EULER
    ours = replace(sampler, host=None)
    mixed, back = bench.parts(ours, host, "schedule"), bench.parts(host, ours, "schedule")
    if sampler.eta is None:
        alone = bench.parts(host, host, "schedule")
        return max(difference(mixed, alone), difference(back, alone))
    if sampler.eta > 0:
        between = {"samples": bench.run(ours, bench.latent, last=CUT, start="schedule")}
        sigmas = bench.schedule(EULER, "schedule", STEPS)[1][CUT:]
        to_zero = bench.custom(host.node, bench.sampling.DDIMSampler(0.0), sigmas, between, False, bench.model)
        return difference(mixed, to_zero["samples"])
    whole_of_ours = bench.run(ours, bench.latent, start="schedule")
    return max(difference(mixed, bench.run(host, bench.latent)), difference(back, whole_of_ours))


def low_denoise(bench: Bench, sampler: Sampler) -> float:
    seen, model = [], bench.model.clone()

    def record(apply, arguments):
        seen.append((arguments["input"].clone(), arguments["timestep"]))
        return apply(arguments["input"], arguments["timestep"], **arguments["c"])

    model.set_model_unet_function_wrapper(record)
    bench.run(sampler, bench.latent, model=model, denoise=DENOISE)
    (x, sigmas), *_ = seen
    return difference(x, LATENT_SCALE * bench.latent["samples"] + sigmas[0] * bench.noise(sampler))


def masked(bench: Bench, sampler: Sampler) -> float:
    mask = torch.ones(VIEWS, 1, 8 * SIDE, 8 * SIDE)
    mask[1], mask[2, :, : 4 * SIDE] = 0, 0
    kept, samples = (mask[..., ::8, ::8] == 0).expand(-1, 4, -1, -1), bench.latent["samples"]
    out = bench.run(sampler, {**bench.latent, "noise_mask": mask})
    return difference(out[kept], samples[kept])


def part_of_batch(bench: Bench, sampler: Sampler) -> float:
    part = bench.nodes["LatentFromBatch"]().frombatch(bench.latent, 1, 2)[0]
    return difference(bench.run(sampler, part), bench.run(sampler, bench.latent)[1:3])


def difference(views: Tensor, expected: Tensor) -> float:
    return ((views - expected).norm() / expected.norm()).item()


MEASURES = dict(zip(COLUMNS, (whole, split, split_with_host, low_denoise, masked, part_of_batch), strict=True))


def main() -> int:
    from tools.embedded import temporary_host

    with temporary_host() as host, torch.inference_mode():
        bench = Bench(host, host.load_pack())
        rows = []
        for sampler in SAMPLERS:
            cells = [measure(bench, sampler) for measure in MEASURES.values()]
            rows.append([sampler.title, *(cell if isinstance(cell, str) else f"{cell:.0e}" for cell in cells)])
    print(markdown_table(["sampler", *COLUMNS], rows))
    print("\n" + "\n".join(f"- {name}: {meaning}." for name, meaning in COLUMNS.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
