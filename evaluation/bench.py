"""What a guided step costs in the real ComfyUI with our patches: seconds, kernels, bytes, FLOPs, memory, waits.

    python -m evaluation.bench [--width tiny|miniature|sd15] [--views 8 16 32 64] [--side PIXELS] [--parts NAME ...]
        [--steps 5] [--against DIR] [--compile] [--peer DIR] [--count [--card GB]] [--out runs/bench.json]

Networks of random weights. Seconds are the median of the steps of a run; on a CPU they are those of the process, on one
thread, and with tiny networks and few views nearly all the host's Python, which a GPU would wait for. --against DIR
measures the patches of another checkout in the same process, run by run in turns; --compile also this one's under the
host's TorchCompileModel, --peer the authors' code, which the user brings. --count computes nothing, so that a step at
SD1.5's width in half precision is counted on any machine; the memory is then that of an 8 GB card's question: all
networks' weights and the most that tensors take at once.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import json
import pstats
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from diffportrait3d.command import run_main
from diffportrait3d.files import write_text
from training.engine.cost import SMALL, StepCounts

from .many_views import peak_bytes
from .speed.authors import AuthorsPath
from .speed.guided_step import PARTS, WIDTHS, BenchPath, Part, random_weights, weight_bytes
from .studies.command import parse_options, run_command
from .tables.report import markdown_table

REPOSITORY = Path(__file__).resolve().parents[1]
SIDES = {"tiny": 64, "miniature": 128, "sd15": 512}  # pixels
GIB = 2**30


class Bench:
    """One or two checkouts of the pack in one host, with the same weights.

    Args:
        host: booted. options: of the command.
    """

    def __init__(self, host, options: argparse.Namespace):
        self.options, self.cuda = options, torch.cuda.is_available()
        self.side = options.side or SIDES[options.width]
        config, half = WIDTHS[options.width], options.count or self.cuda
        dtype = torch.float16 if half else torch.float32
        weights = random_weights(config, dtype, filled=not options.count)
        self.weight_bytes = weight_bytes(weights)
        free = None if options.card is None else options.card * 1e9 - sum(self.weight_bytes.values())
        self.compile_node = host.nodes.NODE_CLASS_MAPPINGS["TorchCompileModel"]
        self.paths: dict[str, Any] = {}  # BenchPath, AuthorsPath
        for name, folder in checkouts(options).items():
            if name == "authors":
                self.paths[name] = AuthorsPath(folder, options.peer_python, weights, config)
                continue
            pack = host.load_pack(folder, f"bench-{name}")
            compiled = self.compiled if name == "compiled" else None
            with StepCounts(SMALL) if options.count else contextlib.nullcontext():
                self.paths[name] = BenchPath(pack, host.comfy, weights, config, options.count, free, compiled)

    def compiled(self, model):
        """A MODEL as the host's TorchCompileModel gives it."""
        return self.compile_node.execute(model, self.options.compile).args[0]

    def measure(self, part_name: str, views: int) -> dict:
        """Record of one part with one number of views, for every checkout."""
        part = PARTS[part_name]
        record: dict = {"part": part_name, "views": views, "side": self.side}
        seconds, operators = ({name: [] for name in self.paths} for _ in range(2))
        measured = part, views, self.side, self.options.steps
        for _ in range(0 if self.options.count else self.options.rounds):
            for name, path in self.paths.items():
                seconds[name] += path.step_seconds(*measured)
                if self.options.width == "tiny" and path.counted:  # all tensors of a step are kept
                    operators[name] += path.operator_seconds(*measured)
        for name, path in self.paths.items():
            record[name] = self.count(path, part, views) if path.counted else {}
            for what, times in (("seconds", seconds[name]), ("operator_seconds", operators[name])):
                if times:
                    record[name][what] = statistics.median(times)
        for name, slower in [(a, b) for a in ("compiled", "this") for b in ("this", "other", "authors") if a != b]:
            if seconds.get(name) and slower in seconds:
                pairs = zip(seconds[slower], seconds[name], strict=True)
                record[f"{slower}_by_{name}"] = statistics.median(other / own for other, own in pairs)
        return record

    def count(self, path: BenchPath, part: Part, views: int) -> dict:
        """Kernels, bytes and FLOPs of the second step by group, waits, and the peak of a run of two steps."""
        counts = StepCounts(None if self.cuda else SMALL, path.networks(), counting=False)

        def run() -> None:
            with counts:
                path.run(part, views, self.side, 3, lambda step: setattr(counts, "counting", step == 0))

        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            peak = torch.cuda.max_memory_allocated() - before
        else:
            peak = peak_bytes(run)
        found = {"kernels": counts.kernels, "bytes": counts.bytes, "flops": counts.flops}
        totals = {name: sum(values.values()) for name, values in found.items()}
        groups = {name: dict(values) for name, values in found.items()}
        return {**totals, "groups": groups, "waits": dict(counts.waits), "activation_bytes": peak}

    def shares(self, views: int) -> dict[str, dict[str, list[float]]]:
        """Seconds and function calls of a step with all parts by whose they are, by Python's profiler."""
        return {name: self._shares(path, views) for name, path in self.paths.items() if path.counted}

    def _shares(self, path: BenchPath, views: int) -> dict[str, list[float]]:
        profiler, steps = cProfile.Profile(), self.options.steps
        path.run(PARTS["all"], views, self.side, steps + 1, lambda step: step == 0 and profiler.enable())
        profiler.disable()
        return {owner: [value / steps for value in values] for owner, values in owners(profiler).items()}


def checkouts(options: argparse.Namespace) -> dict[str, Path]:
    """What is measured."""
    compiled = REPOSITORY if options.compile else None
    found = {"this": REPOSITORY, "compiled": compiled, "other": options.against, "authors": options.peer}
    return {name: folder for name, folder in found.items() if folder}


def owners(profiler: cProfile.Profile) -> dict[str, tuple[float, int]]:
    """Seconds and calls by who owns the code; what is built in counts for its callers."""
    seconds, calls = Counter[str](), Counter[str]()
    for (file, _, _), (_, count, own, _, callers) in pstats.Stats(profiler).stats.items():
        parts = [(owner(file), count, own)]
        if file == "~":
            parts = [(owner(calling), count, part) for (calling, _, _), (_, count, part, _) in callers.items()]
        for name, count, part in parts:
            seconds[name] += part
            calls[name] += count
    return {name: (seconds[name], calls[name]) for name in seconds}


def owner(file: str) -> str:
    """Whose code a file is."""
    if "site-packages" in file or file.startswith(("~", "<")):
        return "torch and Python"
    return "host" if "/comfy/" in file or "/comfy_" in file else "pack" if "/bench-" in file else "torch and Python"


def part_table(records: list[dict], name: str) -> str:
    """A row per part and number of views."""
    rows = []
    for record in records:
        found = record[name]
        seconds = (f"{found[which]:.4f}" if which in found else "-" for which in ("seconds", "operator_seconds"))
        gib, peak = found["bytes"] / GIB, found["activation_bytes"] / GIB
        numbers = f"{gib:.3f}", f"{found['flops'] / 1e12:.4f}", f"{peak:.3f}", str(sum(found["waits"].values()))
        rows.append([str(record["views"]), record["part"], *seconds, str(found["kernels"]), *numbers])
    header = ["views", "part", "s/step", "operators alone (s)", "kernels", "GiB moved", "TFLOP"]
    return markdown_table([*header, "peak of activations (GiB)", "waits"], rows)


def group_table(found: dict) -> str:
    """A row per group of operators."""
    groups = found["groups"]
    rows = [
        [group, str(count), f"{groups['bytes'][group] / GIB:.3f}", f"{groups['flops'][group] / 1e12:.4f}"]
        for group, count in sorted(groups["kernels"].items(), key=lambda item: -item[1])
    ]
    return markdown_table(["all parts", "kernels", "GiB moved", "TFLOP"], rows)


def report(results: dict) -> str:
    """The tables of all checkouts."""
    records, texts = results["records"], []
    for name in results["checkouts"]:
        if "kernels" not in records[0][name]:
            rows = [[str(each["views"]), each["part"], f"{each[name]['seconds']:.4f}"] for each in records]
            texts.append(markdown_table(["views", "part", f"{name}, s/step"], rows))
            continue
        texts.append(f"{name} ({results['checkouts'][name]}):\n\n{part_table(records, name)}")
        first = records[0][name]
        texts.append(group_table(first))
        waits = [[place, str(count)] for place, count in sorted(first["waits"].items())]
        texts.append(markdown_table(["the host waits at", "times a step"], waits))
        if name in results["shares"]:
            parts = results["shares"][name].items()
            rows = [[who, f"{seconds:.4f}", f"{calls:.0f}"] for who, (seconds, calls) in parts]
            texts.append(markdown_table(["whose Python", "s/step, profiled", "calls a step"], rows))
    rows = [
        [str(record["views"]), record["part"], key.replace("_", " "), f"{ratio:.2f}"]
        for record in records
        for key, ratio in record.items()
        if "_by_" in key
    ]
    if rows:
        texts.append(markdown_table(["views", "part", "seconds of", "median of pairs"], rows))
    weights = {kind: value / GIB for kind, value in results["weight_bytes"].items()}
    peak, total = records[0]["this"]["activation_bytes"] / GIB, sum(weights.values())
    listed = ", ".join(f"{kind} {value:.2f}" for kind, value in weights.items())
    texts.append(
        f"Memory, {records[0]['views']} views, {records[0]['part']}: weights {total:.2f} GiB ({listed}), activations "
        f"{peak:.2f} GiB, together {(total + peak) * GIB / 1e9:.2f} GB"
    )
    return "\n\n".join(texts)


def bench(options: argparse.Namespace) -> dict:
    """Measures, prints the tables and writes the JSON."""
    from tools.embedded import boot

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        cpu = not torch.cuda.is_available()
        torch.set_num_threads(1 if cpu else torch.get_num_threads())
        measured = Bench(boot(Path(folder), cpu, ["--fp16-unet"] if options.count and cpu else []), options)
        results: dict = {
            "width": options.width,
            "steps": options.steps,
            "rounds": options.rounds,
            "device": "cpu" if cpu else torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "checkouts": {name: str(folder) for name, folder in checkouts(options).items()},
            "weight_bytes": measured.weight_bytes,
            "records": [measured.measure(part, views) for views in options.views for part in options.parts],
            "shares": {} if options.count else measured.shares(options.views[0]),
        }
    print(report(results), flush=True)
    write_text(options.out, json.dumps(results, indent=1) + "\n")
    return results


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m evaluation.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--width", choices=WIDTHS, default="tiny", help="of the networks (default %(default)s)")
    parser.add_argument("--views", type=int, nargs="+", default=[8], help="default 8")
    parser.add_argument("--side", type=int, help=f"of the views in pixels; default by width: {SIDES}")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all of them")
    parser.add_argument("--steps", type=int, default=5, help="that are timed in a run (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each part (default %(default)s)")
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout of this repository")
    parser.add_argument(
        "--compile", metavar="BACKEND", nargs="?", const="inductor", help="time torch.compile, too (default %(const)s)"
    )
    parser.add_argument("--peer", type=Path, metavar="DIR", help="the authors' folder with inference.py: time it, too")
    parser.add_argument("--peer-python", default=sys.executable, help="Python that can import it (default: this one)")
    parser.add_argument("--count", action="store_true", help="compute nothing and count in half precision")
    parser.add_argument("--card", type=float, metavar="GB", help="with --count: the memory of the card (default: any)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"), help="default %(default)s")
    options = parse_options(parser, arguments, views=2, steps=1, rounds=1)
    if options.width == "sd15" and not torch.cuda.is_available() and not options.count:
        parser.error("--width sd15 takes hours on a CPU: add --count, which computes nothing")
    if options.count and (options.compile or options.peer):
        parser.error("--compile and --peer are timed, and --count computes nothing: leave one of them out")
    if options.peer and (options.parts != ["all"] or any(views % 8 for views in options.views)):
        parser.error("--peer runs all parts in groups of 8 views: add --parts all, and --views 8, 16, ...")
    return options


def main(arguments: list[str] | None = None) -> int:
    return run_command(bench, parse(arguments))


if __name__ == "__main__":
    raise SystemExit(run_main(main))
