"""Send a server random prompts: it must not crash, not hang, and say clearly what is wrong with each.

    python -m tools.fuzz
    python -m tools.fuzz --prompts 100 --seed 1

Each prompt is a small turntable in which some things are wrong by chance: values out of range or of another type (typed
in, or over a wire, where the host does not look), wires from other outputs, inputs and nodes left out, nodes of this
pack added. Every 100 prompts, and in the end, the whole turntable has to run. What became of a prompt:

- runs, or refused: by the host's checks or those of a node;
- failed: a node raised an error on purpose, the last line of its traceback is a `raise`;
- host: an error without such words in which nothing of this pack took part;
- unclear: any other error. There must be none.

Narrow networks, CPU.
"""

from __future__ import annotations

import collections
import json
import random
import sys
import time
from collections.abc import Iterable, Iterator

from tools.client import Client
from tools.host import PACK_NAME, ToolError
from tools.tiny_server import Node, prompts_command, small_turntable, tiny_server

OURS = "DP3D_"
QUEUED = 8  # prompts in the server's queue
SHOWN = 20  # different errors that are printed
CHECKED = 100  # every so many prompts the whole turntable has to run
# Numbers inside of their range are drawn up to these, so that a prompt is small: it has to end, whatever it says.
SMALL = {"views": 5, "steps": 2, "resolution": 96, "width": 128, "height": 128, "loops": 2, "start_points": 300}
SMALL |= {"batch_size": 4, "length": 4, "fps": 30, "end_at_step": 4, "gap": 16, "columns": 6}
SHORT = {"preset": ("custom", "fast")}  # of the others a run has 50 steps and more
TEXTS = ("", " ", "../../etc/passwd", "/etc/passwd", "..\\..\\x", "a\x00b", "\u2028%s{}", "0:0:0; 5", "9" * 400, "nan")
NUMBERS = (0, -1, 1, 2**31, 2**63, -(2**70), 1e308, float("nan"), float("inf"), 0.5, 10**6)
OTHERS = (None, True, [], {}, ["1"], [["1", 0]], ["1", 99], ["gone", 0], {"samples": 1}, "text")
# An input that no node has. The host does not check it: a wire there from a node that does not exist ends the thread in
# which the host runs prompts, whatever packs are installed, so that none is drawn.
UNKNOWN = "no_such_input"
STOCK = {  # nodes of the host that bring values over wires, with inputs to be drawn
    "PrimitiveInt": {"value": (0, -5, 3, 10**9)},
    "PrimitiveFloat": {"value": (0.0, -1.5, 0.5, 1e18)},
    "PrimitiveString": {"value": TEXTS},
    "PrimitiveBoolean": {"value": (True, False)},
    "EmptyImage": {"width": (8, 33, 64), "height": (8, 64), "batch_size": (1, 3), "color": (0, 255)},
    "EmptyLatentImage": {"width": (16, 64), "height": (64, 128), "batch_size": (1, 2, 3)},
    "SolidMask": {"value": (0.0, 1.0), "width": (8, 64), "height": (64,)},
    "RandomNoise": {"noise_seed": (0, 7)},
}
FAILED_CHECKS = ("exception_during_validation", "exception_during_inner_validation")


class Fuzzer:
    """Random prompts from the server's own descriptions of the nodes."""

    def __init__(self, nodes: dict[str, dict], seed: int):
        self.chance = random.Random(seed)
        self.nodes = {name: node for name, node in nodes.items() if name.startswith(OURS) or name in STOCK}
        self.types = nodes  # of every node, for the outputs of the turntable

    def prompt(self) -> dict:
        prompt = small_turntable()
        for _ in range(self.chance.choice([1, 1, 2, 3, 5])):
            spoil = self.chance.choice([self.value, self.value, self.wire, self.over_a_wire, self.leave_out, self.add])
            spoil(prompt)
        for node in prompt.values():  # a wire from nowhere into an input that no node has ends the host's thread
            wire = node["inputs"].get(UNKNOWN)
            if isinstance(wire, list) and wire[0] not in prompt:
                del node["inputs"][UNKNOWN]
        return prompt

    def value(self, prompt: dict) -> None:
        node = self._node(prompt)
        name = self._input(node)
        odd = (*NUMBERS, *TEXTS) if name == UNKNOWN else (*NUMBERS, *TEXTS, *OTHERS)
        node["inputs"][name] = self.chance.choice((self._fitting(node, name), self.chance.choice(odd)))

    def wire(self, prompt: dict) -> None:
        """A wire from any output of the prompt to any input."""
        node = self._node(prompt)
        source = self.chance.choice(list(prompt))
        slots = len(self.types[prompt[source]["class_type"]]["output"])
        node["inputs"][self._input(node)] = [source, self.chance.randrange(slots or 1)]

    def over_a_wire(self, prompt: dict) -> None:
        """A value that comes by a wire, of the type of the input where there is such a node."""
        node, kind = self._node(prompt), self.chance.choice(list(STOCK))
        fitting, place = self._inputs_for(node, kind), f"new{len(prompt)}"
        drawn = {name: self.chance.choice(values) for name, values in STOCK[kind].items()}
        prompt[place] = {"class_type": kind, "inputs": drawn}
        node["inputs"][self.chance.choice(fitting) if fitting else self._input(node)] = [place, 0]

    def leave_out(self, prompt: dict) -> None:
        node = self._node(prompt)
        if self.chance.random() < 0.8 and node["inputs"]:
            del node["inputs"][self.chance.choice(list(node["inputs"]))]
        elif len(prompt) > 2:
            del prompt[self.chance.choice(list(prompt))]

    def add(self, prompt: dict) -> None:
        """A node of this pack with fitting values and wires, before an output that is there."""
        kind = self.chance.choice([name for name in self.nodes if name.startswith(OURS)])
        node = {"class_type": kind, "inputs": {}}
        required = self.types[kind]["input"].get("required", {})
        for name, spec in self._inputs(node).items():
            if name in required or self.chance.random() < 0.5:
                node["inputs"][name] = self._wire_of(prompt, spec[0]) or self._fitting(node, name)
        place = f"new{len(prompt)}"
        prompt[place] = node
        if not self.types[kind].get("output_node"):
            shown = {"class_type": "PreviewAny", "inputs": {"source": [place, 0]}}
            prompt[f"{place} shown"] = shown
            target = self._node(prompt)
            if fitting := self._inputs_for(target, kind):
                name = self.chance.choice(fitting)
                target["inputs"][name] = [place, self.types[kind]["output"].index(self._inputs(target)[name][0])]

    def _node(self, prompt: dict) -> dict:
        return self.chance.choice([node for node in prompt.values() if node["class_type"] in self.nodes])

    def _inputs(self, node: dict) -> dict[str, list]:
        """[type, options] by name."""
        groups = self.types[node["class_type"]]["input"]
        return groups.get("required", {}) | groups.get("optional", {})

    def _input(self, node: dict) -> str:
        return self.chance.choice([*self._inputs(node), UNKNOWN])

    def _inputs_for(self, node: dict, kind: str) -> list[str]:
        """Those that take an output of a node of this class."""
        return [name for name, spec in self._inputs(node).items() if spec[0] in self.types[kind]["output"]]

    def _fitting(self, node: dict, name: str):
        """A value that the input takes, or None where it takes no widget."""
        kind, *options = self._inputs(node).get(name, ["*"])
        options = options[0] if options else {}
        if kind in ("INT", "FLOAT"):
            low = options.get("min", 0)
            high = max(low, min(options.get("max", 100), SMALL.get(name, 8)))
            number = self.chance.uniform(low if low > -1e6 else -1e6, high)
            return int(number) if kind == "INT" else number
        if kind == "BOOLEAN":
            return self.chance.random() < 0.5
        if kind == "COMBO" or isinstance(kind, list):
            names = kind if isinstance(kind, list) else options.get("options", [])
            return self.chance.choice(SHORT.get(name, names)) if names else ""
        return self.chance.choice((*TEXTS, "0:0; 10:0", "views/head")) if kind == "STRING" else None

    def _wire_of(self, prompt: dict, kind: str) -> list | None:
        """An output of this type in the prompt."""
        found = [
            [place, slot]
            for place, node in prompt.items()
            for slot, given in enumerate(self.types[node["class_type"]]["output"])
            if given == kind
        ]
        return self.chance.choice(found) if found else None


def verdict(client: Client, submitted: tuple[int, dict]) -> tuple[str, str]:
    """(what became of a prompt, what was said) by the server's answer to it; see the top of this file.

    Raises:
        ToolError: see `Client`.
    """
    status, answer = submitted
    if status != 200:
        nodes = (answer.get("node_errors") or {}).values()
        failures = [error for node in nodes for error in node["errors"] if error["type"] in FAILED_CHECKS]
        if failures:
            return _blame(str(failures)), json.dumps(failures)[:1000]
        clear = status == 400 and isinstance(answer.get("error"), dict)
        return "refused" if clear else "unclear", json.dumps(answer)[:1000]
    ended = client.wait(answer["prompt_id"])["status"]
    if ended["status_str"] == "success":
        return "runs", ""
    error = dict(ended["messages"])["execution_error"]
    said = f"{error['node_type']}: {error['exception_type']}: {error['exception_message'].strip()}"
    last = [line.strip() for line in "".join(error["traceback"][-1:]).splitlines()]
    if any(line.startswith("raise ") for line in last) and error["exception_message"].strip():
        return "failed", said
    return _blame("".join(error["traceback"])), f"{said} at {last}"


def _blame(traceback: str) -> str:
    return "unclear" if PACK_NAME in traceback else "host"


def verdicts(client: Client, prompts: Iterable[dict]) -> Iterator[tuple[str, str]]:
    """The verdict on every prompt, in order, while the server always has some more to do.

    Raises:
        ToolError: with the prompts that were in the queue, the first of which was run.
    """
    waiting = collections.deque()
    try:
        for prompt in prompts:
            waiting.append((json.dumps(prompt), client.submit(prompt)))
            if len(waiting) > QUEUED:
                yield verdict(client, waiting[0][1])
                waiting.popleft()
        while waiting:
            yield verdict(client, waiting[0][1])
            waiting.popleft()
    except ToolError as error:
        raise ToolError("\n".join([str(error), *(text for text, _ in waiting)])) from error


def fuzz(prompts: int, seed: int) -> str:
    """Runs it all; returns what is wrong, "" if nothing is."""
    counts, said, begun = collections.Counter(), set(), time.monotonic()
    with tiny_server() as client:
        fuzzer = Fuzzer(client.node_info(), seed)
        for first in range(1, prompts + 1, CHECKED):
            number = min(first + CHECKED - 1, prompts)  # of the last one before the whole turntable
            good = small_turntable()
            good[Node.NOISE]["inputs"]["seed"] = number
            drawn = [fuzzer.prompt() for _ in range(first, number + 1)]
            *found, (turntable, problem) = verdicts(client, [*drawn, good])
            for place, (kind, message) in enumerate(found, start=first):
                counts[kind] += 1
                if kind == "unclear" and message not in said:
                    said.add(message)
                    if len(said) <= SHOWN:
                        print(f"prompt {place}, unclear: {message}", flush=True)
            if turntable != "runs":
                return f"after prompt {number} the turntable no longer runs: {problem}"
            if number % 500 == 0 or number == prompts:
                print(f"{number} prompts, {time.monotonic() - begun:.0f} s: {dict(counts)}", flush=True)
    return f"{counts['unclear']} errors without clear words, {len(said)} different" if counts["unclear"] else ""


if __name__ == "__main__":
    sys.exit(prompts_command(__doc__, "fuzz", 10_000, fuzz, "Every prompt ran or was told why not."))
