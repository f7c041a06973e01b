"""The errors that a user reads in one line, each with its exit code, and the suggestions in them."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable

from lightning_utilities.core.rank_zero import rank_zero_only


class UserError(Exception):
    """An error that the user can fix: the message names what is wrong and what would be right."""

    exit_code = 1


class ConfigError(UserError):
    """A config file, a key or an argument is wrong."""

    exit_code = 2


class SetupError(UserError):
    """The machine lacks something that the run needs: data, weights, devices, a place to write."""


@rank_zero_only
def warn(line: str) -> None:
    """Print a warning to the user, in the first of several processes."""
    print(f"train.py: warning: {line}", file=sys.stderr)


def describe(error: BaseException) -> str:
    """Return an error that is not ours in one line: its type and the beginning of what it says."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'...' * (len(text) > 200)}" if text else type(error).__name__


def suggest(name: str, valid: Iterable[str], count: int = 1) -> str:
    """Return '; did you mean ...?' with the nearest of the valid names, ignoring case; empty if none is near."""
    by_lower = {other.lower(): other for other in valid}
    near = difflib.get_close_matches(name.lower(), by_lower, n=count)
    return f"; did you mean {', '.join(by_lower[other] for other in near)}?" if near else ""
