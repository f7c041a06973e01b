"""Train, evaluate, describe or time an image classifier whose layers keep only part of their input.

python train.py --cfg configs/digits/vit_tiny_fastminkx0.9.yaml [--mode train|eval|info|time] [--resume] [KEY VALUE ...]
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import Any, NoReturn


def _quit(signum: int, frame: Any) -> NoReturn:
    """End at Ctrl-C with one line, wherever this process is but in training, which has something to save first."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        os.write(2, b"train.py: stopped by SIGINT\n")
    os._exit(128 + signum)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, _quit)  # before the imports, which take seconds

from dropit.training.errors import ConfigError, UserError
from dropit.training.run.evaluate import evaluate
from dropit.training.run.info import info
from dropit.training.run.timing import time
from dropit.training.run.train import train

MODES = {"train": train, "eval": evaluate, "info": info, "time": time}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises its errors, so that they are one line."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise ConfigError(f"{message} (see train.py --help)")


class Once(argparse.Action):
    """Stores a value; an option that is given twice is an error."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Store it."""
        if getattr(namespace, self.dest) is not None:
            raise ConfigError(f"{option_string} is given twice: {getattr(namespace, self.dest)} and {values}")
        setattr(namespace, self.dest, values)


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the flags and KEY VALUE overrides, which may be in any order."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--cfg", metavar="FILE", required=True, action=Once, help="config, a .yaml file")
    parser.add_argument("--mode", choices=tuple(MODES), default="train", help="default: train")
    parser.add_argument("--resume", action="store_true", help="go on from CKPT, or from this config's newest run")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="config keys, as SOLVER.LR 0.1")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str]) -> int:
    """Run the mode and return the exit code."""
    debug = "--debug" in argv
    try:
        args = parse(argv)
        MODES[args.mode](args.cfg, args.overrides, resume=args.resume)
    except UserError as error:
        if debug:
            raise
        print(f"train.py: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        if debug:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains once more at its end
        print("train.py: standard output was closed, which this writes to", file=sys.stderr)
        return 1
    except OSError as error:
        if debug or not error.filename:
            raise
        print(f"train.py: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
