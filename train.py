"""Train, evaluate, describe or time an image classifier whose layers keep only part of their input.

python train.py --cfg configs/digits/vit_tiny_fastminkx0.9.yaml [--mode train|eval|info|time] [--resume] [KEY VALUE ...]
"""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

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


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the flags and KEY VALUE overrides, which may be in any order."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--cfg", metavar="FILE", required=True, help="config, a .yaml file")
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
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
