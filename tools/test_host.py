"""Run the tests of the nodes in another ComfyUI, with the packages and the frontend that it asks for.

    python tools/test_host.py /home/me/ComfyUI
    python tools/test_host.py 0.30.0 -k windows

Its packages go into `.cache/hosts/VERSION`. The last line is a row for the table in docs/hosts.md.

Standard library only: runs before anything is installed.
"""

from __future__ import annotations

import datetime
import os
import re
import subprocess
import sys
from pathlib import Path

from host import PACK, PINNED_HOST, PINNED_VERSION, ToolError, fetch, installed_host


def host_folder(name: str) -> Path:
    """The folder of a ComfyUI, or of the pinned version, which is fetched where it is missing.

    Raises:
        ToolError: neither; or see `fetch`.
    """
    if name == PINNED_VERSION:
        if not PINNED_HOST.exists():
            fetch(PINNED_HOST)
        return PINNED_HOST
    if not Path(name).is_dir():
        raise ToolError(
            f"HOST={name!r} is no folder and not the pinned version {PINNED_VERSION}; name the folder of main.py."
        )
    return installed_host({"COMFYUI_PATH": name})


def main() -> int:
    name, *arguments = sys.argv[1:] or [PINNED_VERSION]
    try:
        host = host_folder(name)
    except ToolError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    version = re.search(r'__version__ = "(.+)"', (host / "comfyui_version.py").read_text(encoding="utf-8"))[1]
    venv = PACK / ".cache/hosts" / version
    environment = {**os.environ, "COMFYUI_PATH": str(host), "VENV": str(venv)}
    if subprocess.run([sys.executable, PACK / "tools/bootstrap.py"], env=environment).returncode:
        return 1
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    command = [python, "-m", "pytest", "-q", "tests/host", *arguments]
    tests = subprocess.run(command, cwd=PACK, env=environment, stdout=subprocess.PIPE, text=True)
    print(tests.stdout, end="")
    print(f"| {version} | {datetime.date.today()} | {tests.stdout.strip().splitlines()[-1].strip('= ')} |")
    return tests.returncode


if __name__ == "__main__":
    sys.exit(main())
