"""Start ComfyUI's main.py with CPU builds of torch tolerated: `python tools/run_host.py COMFYUI [options]`."""

from __future__ import annotations

import os
import runpy
import sys

import cpu_wheels  # beside this file; nothing of the repository's root may be importable in the host's process


def main() -> None:
    cpu_wheels.install()
    comfy = os.path.abspath(sys.argv[1])
    sys.argv = [os.path.join(comfy, "main.py"), *sys.argv[2:]]
    os.chdir(comfy)
    sys.path[0] = comfy
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
