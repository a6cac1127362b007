"""Queue one server again and again, as a person does who tries everything: its memory has to stay, and its views.

    python -m tools.soak
    python -m tools.soak --prompts 100 --seed 1

Between two prompts change, by chance: portrait, networks (two sets), cameras, seed, strengths, ranges, windows, steps,
and which nodes are bypassed; the first 26 meet every value. Every tenth prompt is interrupted. The server's
resident memory is printed on the way. In the end the last prompts run on a fresh server, too: their latents must be
bit-identical, the memory must have stayed since prompt 50, and the host must not have warned of a memory leak. Narrow
networks, CPU.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import psutil
from safetensors.torch import load_file
from torch import Tensor

from tools.client import Client
from tools.host import ToolError
from tools.tiny_server import LOADERS, PORTRAITS, SETS, Node, prompts_command, small_turntable, tiny_server

MARKS = (50, 100, 250, 500, 1000)  # prompts after which the memory is printed
CHANGES = 2  # of the choices from one prompt to the next
# What a person changes, "NODE.input" or a word of `prompt_of`, and to what.
CHOICES: dict[str, tuple] = {
    **{f"{node_id}.name": tuple(SETS) for node_id in (Node.LOAD, *LOADERS)},
    "portrait": (None, *PORTRAITS),
    "mask": (False, True),
    "bypass": (None, None, Node.REFERENCE, Node.CAMERAS, Node.VIEWS),
    f"{Node.REFERENCE}.strength": (1.0, 0.3, 0.0),
    f"{Node.REFERENCE}.end_percent": (1.0, 0.5),
    f"{Node.CAMERAS}.strength": (1.0, 0.5, 0.0),
    f"{Node.CAMERAS}.start_percent": (0.0, 0.4),
    f"{Node.PATH}.views": (3, 2, 4),
    f"{Node.PATH}.kind": ("arc", "orbit"),
    f"{Node.CONDITIONS}.subject": (0, 1, 2),
    f"{Node.NOISE}.mode": ("paper", "shared", "random"),
    f"{Node.SAMPLER}.steps": (1, 1, 2),
    f"{Node.SAMPLER}.eta": (0.0, 0.5),
    f"{Node.SAMPLER}.cfg": (3.0, 1.0),
    f"{Node.SAMPLER}.window_size": (0, 2),
    f"{Node.SAMPLER}.overlap": (1, 0),
}
LAST = 5  # prompts that are compared with a fresh server's
INTERRUPTED = 10  # every so many
WARM, GROWTH = 50, 0.03  # after so many prompts the memory grows by less than this part
COLLECTED = 10.0  # seconds after which the host collects garbage when a prompt has ended
LEAK = "memory leak with model"


def choices_of(prompts: int, chance: random.Random) -> Iterator[dict[str, object]]:
    """What a person has chosen for every prompt: from one to the next a few values change."""
    changes = tour(chance)
    chosen = {key: values[0] for key, values in CHOICES.items()}
    for number in range(prompts):
        here = changes[number * CHANGES : (number + 1) * CHANGES]
        here = here or [(key, chance.choice(CHOICES[key])) for key in chance.sample(list(CHOICES), CHANGES)]
        chosen |= dict(here)
        yield dict(chosen)


def tour(chance: random.Random) -> list[tuple[str, object]]:
    """Every value of every choice once, in turn."""
    keys = chance.sample(list(CHOICES), len(CHOICES))
    rounds = zip_longest(*([(key, value) for value in dict.fromkeys(CHOICES[key])] for key in keys))
    return [change for one in rounds for change in one if change is not None]


def prompt_of(choices: dict[str, object]) -> dict:
    """The turntable with these choices. Bypassed nodes are left out as the editor does it: what is behind one is
    connected to what is before it."""
    prompt = small_turntable()
    prompt["portrait"] = {"class_type": "LoadImage", "inputs": {"image": choices["portrait"] or PORTRAITS[0]}}
    prompt["mask"] = {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 64, "height": 64}}
    inputs = {node_id: node["inputs"] for node_id, node in prompt.items()}
    for key, value in choices.items():
        node_id, _, name = key.partition(".")
        if name:
            inputs[node_id][name] = f"{value}/{LOADERS[node_id]}.safetensors" if node_id in LOADERS else value
    inputs[Node.REFERENCE]["image"] = inputs[Node.NOISE]["image"] = (
        ["portrait", 0] if choices["portrait"] else [Node.LOAD, 3]
    )
    if choices["mask"]:
        inputs[Node.REFERENCE]["mask"] = ["mask", 0]
    if choices["bypass"] == Node.REFERENCE:
        inputs[Node.SAMPLER]["model"] = [Node.LOAD, 0]
    elif choices["bypass"] == Node.CAMERAS:
        inputs[Node.SAMPLER]["positive"] = [Node.LOAD, 2]
    elif choices["bypass"] == Node.VIEWS:
        del inputs[Node.SAMPLER]["view_consistency"]
    return prompt


def run(client: Client, prompt: dict, interrupt_after: float | None = None) -> None:
    """Queues a prompt and waits for its end; interrupts it after so many seconds.

    Raises:
        ToolError: refused or failed; see `Client` for others
    """
    prompt_id = client.queue(prompt)
    if interrupt_after is not None:
        time.sleep(interrupt_after)
        client.post("interrupt")
    ended = client.wait(prompt_id)["status"]
    messages = dict(ended["messages"])
    if ended["status_str"] != "success" and "execution_interrupted" not in messages:
        raise ToolError(f"failed: {messages['execution_error']}")


def settled(client: Client, seed: int) -> float:
    """Megabytes after the same turntable every time: between others memory depends on what they leave loaded."""
    time.sleep(COLLECTED)
    prompt = prompt_of({key: values[0] for key, values in CHOICES.items()} | {f"{Node.NOISE}.seed": seed})
    prompt["save"]["inputs"]["filename_prefix"] = "settled"
    run(client, prompt)
    time.sleep(1.0)
    return psutil.Process(client.server.process.pid).memory_info().rss / 1e6


def last_latents(client: Client) -> list[Tensor]:
    """Latents [V, 4, h, w] of the last prompts."""
    files = sorted(Path(client.server.base_directory, "output").glob("views*.latent"))[-LAST:]
    return [load_file(file)["latent_tensor"] for file in files]


def soak(prompts: int, seed: int) -> str:
    """Runs it all; returns what is wrong, "" if nothing is."""
    chance, memory, begun = random.Random(seed), {}, time.monotonic()
    queue = [prompt_of({**chosen, f"{Node.NOISE}.seed": n}) for n, chosen in enumerate(choices_of(prompts, chance))]
    with tiny_server() as client:
        for number, prompt in enumerate(queue, start=1):
            interrupted = number % INTERRUPTED == 0 and number <= prompts - LAST
            if interrupted:
                prompt[Node.SAMPLER]["inputs"]["steps"] = 50
            run(client, prompt, chance.uniform(0.0, 0.5) if interrupted else None)
            if number in MARKS or number == prompts:
                memory[number] = settled(client, number)
                print(f"prompt {number}: {memory[number]:.0f} MB, {time.monotonic() - begun:.0f} s", flush=True)
        found, log = last_latents(client), client.server.log()
    with tiny_server() as fresh:
        for prompt in queue[-LAST:]:
            run(fresh, prompt)
        expected = last_latents(fresh)
    same = [one.equal(other) for one, other in zip(found, expected, strict=True)]
    print(f"the last {LAST} prompts on a fresh server: {sum(same)} bit-identical", flush=True)
    problems = [] if len(same) == LAST and all(same) else ["views differ from a fresh server's"]
    if LEAK in log:
        problems.append(f"the host has warned {log.count(LEAK)} times of a memory leak")
    if prompts > WARM and memory[prompts] > (1 + GROWTH) * memory[WARM]:
        problems.append(f"memory has grown from {memory[WARM]:.0f} to {memory[prompts]:.0f} MB")
    return "; ".join(problems)


if __name__ == "__main__":
    sys.exit(prompts_command(__doc__, "soak", 1000, soak, "Memory and views stay."))
