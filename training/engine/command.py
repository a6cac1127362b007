"""The command line that all stages share: `--config FILE --set section.key=value ... [--plan]`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence

import yaml

from diffportrait3d.command import INTERRUPTED, run_main
from diffportrait3d.files import WriteError

from .config import ConfigError, load_config, settings_help
from .loop import Interrupted, run_stage
from .plan import describe, make_plan
from .stage import Stage


def stage_command(stage: type[Stage]) -> int:
    """The exit status of a stage's script; Ctrl-C and a full disk end it with one line."""
    return run_main(lambda: stage_main(stage))


def stage_main(stage: type[Stage], argv: Sequence[str] | None = None) -> int:
    """Trains or plans a stage and returns the exit status."""
    parser = _parser(stage)
    arguments = parser.parse_args(argv)
    try:
        config = load_config(stage.config_class, arguments.config, arguments.overrides)
    except (ConfigError, yaml.YAMLError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    if arguments.plan:
        return exit_status(lambda: print(describe(make_plan(stage, config, arguments.resolution, arguments.processes))))
    return exit_status(lambda: print(json.dumps(run_stage(stage.build, config), indent=1)))


def exit_status(work: Callable[[], None]) -> int:
    """Of a command that does `work`; user errors and a stopped run are printed as one line."""
    try:
        work()
    except Interrupted as stop:
        print(stop, flush=True)
        return INTERRUPTED
    except (FileNotFoundError, ValueError, FloatingPointError, WriteError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def _parser(stage: type[Stage]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m training.{stage.name}",
        description=sys.modules[stage.__module__].__doc__,
        epilog="settings (key=default):\n" + "\n".join(settings_help(stage.config_class)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", help="YAML file, e.g. training/configs/cpu/base.yaml")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="overrides",
        help="override single values, e.g. loop.steps=100 data.root=DIR")  # fmt: skip
    add("--plan", action="store_true", help="print parameters, memory and FLOPs of a step, and stop")
    add("--resolution", type=int, metavar="PIXELS", help="with --plan: of images that do not exist yet")
    add("--processes", type=int, default=1, metavar="N", help="with --plan: that divide the batch")
    return parser
