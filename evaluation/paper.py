"""The paper's tables for anything that generates portraits: metrics of generated views beside the paper's figures.

    python -m evaluation.paper VIEWS [VIEWS ...] --out runs/paper --sizes 256 512 --backgrounds with without
        [--alexnet FILE] [--vgg16 FILE] [--inception FILE] [--identity FILE] [--pose FILE] [--device cuda]

VIEWS are folders of `evaluation.generate`, or of any program that writes their layout (docs/evaluation.md). Backbones
are files that you name; their sha256 goes into the JSON and nothing is downloaded. A metric whose backbone is missing
is left out; numbers by the miniature's own networks have names that begin with "mini". Intervals are 95 % bootstraps
over identities.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from diffportrait3d.command import run_main
from diffportrait3d.files import write_text
from diffportrait3d.portraits.detector import INSTALL
from training.dataset.images import DataError

from .metrics.faces import FACE_METRICS, OTHERS, face_metrics, load_face_networks
from .metrics.networks import SET_METRICS, MetricNetworks
from .studies.command import WEIGHTS, add_faces, run_command
from .subjects.dataset import resize
from .subjects.view_folders import Views, identities, read_header, read_views
from .tables.bootstrap import Interval, bootstrap_mean
from .tables.paper_plots import save_plots
from .tables.paper_tables import Measured, setting_table
from .tables.report import image_rows, save_png, stack_pages
from .tables.results_log import write_json
from .tables.summary import as_dicts

FILES = {
    "alexnet": "torchvision's AlexNet: LPIPS (alex)",
    "vgg16": "torchvision's VGG16: LPIPS (vgg) and DISTS",
    "inception": "torch-fidelity's Inception v3: FID and KID",
    "identity": "TorchScript face embedding: [N, 3, 112, 112] in [-1, 1] -> [N, D]: ID",
    "pose": "TorchScript head angles: [N, 3, 224, 224] in [0, 1] -> pitch, yaw, roll in radians: POSE",
}
PAGE_SIDE = 128
BASELINES = {"ground_truth": "dlib: the true views", OTHERS: "dlib: true views of other people"}


def prepare(views: Views, size: int, background: str) -> tuple[Tensor, Tensor, Tensor]:
    """Generated, truth [V, 3, S, S] and reference [1, 3, S, S] at a size; without background it becomes white.

    A generated view without a mask of its own is cut out by the truth's. The reference keeps its background: only ID
    reads it.

    Raises:
        DataError: there are no masks.
    """
    generated, truth = views.generated, views.truth
    if background == "without":
        if views.mask is None:
            raise DataError(
                f"'{views.id}' has no NN_mask.png, which --backgrounds without needs; write masks or leave it out."
            )
        own = views.mask if views.generated_mask is None else views.generated_mask
        generated, truth = generated * own + 1 - own, truth * views.mask + 1 - views.mask
    return resize(generated, size), resize(truth, size), resize(views.reference, size)


def measure(folder: Path, size: int, background: str, networks: MetricNetworks) -> Measured:
    header = read_header(folder)
    result = Measured(str(folder), header["task"], header["reference"], size, background)
    columns: dict[str, list[float]] = {}
    sets: dict[str, list[tuple[Tensor, Tensor]]] = {}
    people: list[dict] = []
    for views in map(read_views, tqdm(identities(folder), desc=result.title, unit="id")):
        generated, truth, reference = prepare(views, size, background)
        for name, values in networks.per_view(generated, truth, reference).items():
            columns.setdefault(name, []).append(values.nanmean().item())
        if dlib := networks.faces:
            rows = {"generated": dlib.embeddings(generated), "ground_truth": dlib.embeddings(truth)}
            people.append({"reference": dlib.embeddings(reference)[0], "rows": rows})
        made, real = networks.features(generated), networks.features(truth)
        for prefix in made:
            sets.setdefault(prefix, []).append((real[prefix], made[prefix]))
        result.native = views.generated.shape[-1]
        result.images += len(generated)
        result.identities += 1
        if background == "without":
            result.mask = "truth's for both" if views.generated_mask is None else "each its own"
    result.intervals = {name: bootstrap_mean(values) for name, values in columns.items()}
    if people:
        found = face_metrics(people)
        result.intervals |= _face_intervals(found, "generated")
        result.baselines = {title: _face_intervals(found, row) for row, title in BASELINES.items()}
    for prefix, pairs in sets.items():
        real, made = map(torch.cat, zip(*pairs, strict=True))
        for name, distance in SET_METRICS.items():
            value = distance(real, made)
            result.intervals[prefix + name] = Interval(value, value, value, result.images)
    return result


def _face_intervals(found: list[dict], row: str) -> dict[str, Interval]:
    """Over people, of the metrics that exist."""
    intervals = {name: bootstrap_mean([metrics[row][name] for metrics in found]) for name in FACE_METRICS}
    return {name: interval for name, interval in intervals.items() if interval.count}


def document(results: list[Measured], networks: MetricNetworks) -> str:
    missing = [f"--{name} ({FILES[name]})" for name in FILES if name not in networks.sha256]
    if networks.faces is None:
        missing.append(f"dlib's networks ({INSTALL})")
    parts = [
        "# Beside the paper's tables",
        "Mean [95 % bootstrap interval over identities]. The paper's figures are for its own data and weights: "
        "comparable only for the same data, size and N. FID is biased for few images: never compare different N.",
        *(setting_table(result) for result in results),
        "Backbones: " + (", ".join(f"{k} `{v[:12]}`" for k, v in networks.sha256.items()) or "none") + ".",
    ]
    if missing:
        parts.append("Not measured for want of: " + "; ".join(missing) + ".")
    return "\n\n".join(parts) + "\n"


def save_pages(folders: list[Path], count: int, out: Path) -> None:
    """Reference, truth and generated views of the first identities of every folder, in one PNG."""
    pages = []
    for number, folder in enumerate(folders):
        header = read_header(folder)
        for index, views in enumerate(map(read_views, identities(folder)[:count])):
            rows = [
                (f"{header['task']}, {header['reference']} reference", resize(views.reference, PAGE_SIDE)),
                ("ground truth", resize(views.truth, PAGE_SIDE)),
                ("generated", resize(views.generated, PAGE_SIDE)),
            ]
            pages.append(out.with_suffix(".pages") / f"{number:02d}_{index:03d}.png")
            save_png(image_rows(rows), pages[-1])
    if pages:
        stack_pages(pages, out)


def run(options: argparse.Namespace) -> list[Measured]:
    """Measure every setting; write paper.json, paper.md, plots.png and pictures.png into --out."""
    files = {name: path for name in FILES if (path := getattr(options, name))}
    for folder in options.views:
        read_header(folder)  # before any network is loaded
    networks = MetricNetworks(files, options.miniature, options.device, load_face_networks(options.faces))
    settings = [(f, s, b) for f in options.views for s in options.sizes for b in options.backgrounds]
    results = [measure(*setting, networks) for setting in settings]
    text = document(results, networks)
    print(text)
    out = options.out
    write_text(out / "paper.md", text)
    found = [
        asdict(r)
        | as_dicts({"intervals": r.intervals})
        | {"views": read_header(folder), "baselines": as_dicts(r.baselines)}
        for (folder, _, _), r in zip(settings, results, strict=True)
    ]
    write_json(out / "paper.json", {"backbones_sha256": networks.sha256, "settings": found})
    save_plots(results, out / "plots.png")
    save_pages(options.views, options.pictures, out / "pictures.png")
    print(f"wrote {out}/paper.json, paper.md, plots.png and pictures.png")
    return results


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evaluation.paper", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("views", type=Path, nargs="+", help="folders of generated views")
    add("--out", type=Path, default=Path("runs/paper"), help="folder of the results")
    add("--sizes", type=int, nargs="+", default=[256, 512], help="pixels (default 256 512)")
    add("--backgrounds", nargs="+", choices=("with", "without"), default=["with"])
    for name, text in FILES.items():
        add(f"--{name}", type=Path, metavar="FILE", help=text)
    add(
        "--miniature",
        type=Path,
        help="weights folder whose networks measure, too, under names with 'mini'; without any backbone: "
        "weights/miniature",
    )
    add_faces(parser)
    add("--pictures", type=int, default=4, help="identities of every folder in pictures.png")
    add("--device", default="cpu", help="where the backbones run")
    options = parser.parse_args(arguments)
    if not options.miniature and not any(getattr(options, name) for name in FILES):
        options.miniature = WEIGHTS
    if any(size < 32 or size % 8 for size in options.sizes):
        parser.error(f"--sizes must be multiples of 8 from 32 on, got {' '.join(map(str, options.sizes))}")
    return run_command(run, options)


if __name__ == "__main__":
    raise SystemExit(run_main(main))
