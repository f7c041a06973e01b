"""Read files that torch.save or safetensors wrote, verified, without running code in them."""

from __future__ import annotations

import pickle
import zipfile
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dropit.training.errors import ConfigError, SetupError, suggest

_SUFFIXES = {".safetensors", ".pth", ".pt", ".ckpt"}
_DIRECTORY = 0x10  # MS-DOS's attribute, in a zip file
_DAMAGED = "cut short or damaged"
_OTHER_FORMAT = "not a file of weights, or one that holds more than tensors and plain values"


def read_file(path: Path, key: str) -> Any:
    """Return the content of a file, on the CPU; no code in it is run.

    ``key``: the config key that named the file. Raises ConfigError if there is no such file, SetupError if it is
    damaged, is something else, or holds more than tensors and plain values.
    """
    _check_exists(path, key)
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise SetupError(f"{key} {path}: cannot be read: {error.strerror}") from error
    if what := _not_weights(head):
        raise SetupError(f"{key} {path}: {what}")
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return _read_safetensors(path, key)
    is_zip = head.startswith(b"PK")
    if is_zip and (what := find_damage(path)):
        raise SetupError(f"{key} {path}: {what}")
    return _read_pickle(path, key, is_zip=is_zip)


def find_damage(path: Path) -> str:
    """Return how a zip file, as torch.save writes it, is damaged; empty if it is whole.

    Verifies the CRC-32 of each tensor, which torch.load does not, and that none is marked as a directory, which
    torch.load does not read: it returns uninitialized memory. No other bit of the file changes what is read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            is_whole = archive.testzip() is None and not any(
                member.external_attr & _DIRECTORY for member in archive.infolist()
            )
    except Exception:  # a damaged header can raise nearly anything
        return _DAMAGED
    return "" if is_whole else "damaged, its checksum does not match"


def nearest_file(path: Path) -> str:
    """Return '; did you mean ...?' with the file beside ``path`` whose name is nearest; empty if none is near."""
    try:
        return suggest(path.name, (other.name for other in path.parent.iterdir()))
    except OSError:
        return ""


def shorten(names: Iterable[str]) -> str:
    """Return the first names, and how many more there are."""
    first, *rest = names
    return f"{', '.join([first, *rest[:2]])} and {len(rest) - 2} more" if len(rest) > 3 else ", ".join([first, *rest])


def _check_exists(path: Path, key: str) -> None:
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.suffix in _SUFFIXES)
        raise ConfigError(f"{key} {path}: a directory, not a file{'; it holds ' + shorten(files) if files else ''}")
    if not path.is_file():
        raise ConfigError(f"{key} {path}: no such file{nearest_file(path)}")


def _not_weights(head: bytes) -> str:
    """Return what a file with this beginning is instead; empty if it may be weights."""
    start = head.lstrip().lower()
    if not start:
        return "the file is empty"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself; `git lfs pull` fetches it"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not weights; download the file itself"
    return ""


def _read_safetensors(path: Path, key: str) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise SetupError(f"{key} {path}: needs safetensors: pip install safetensors") from error
    try:
        return dict(load_file(path))
    except Exception as error:  # a damaged file can raise nearly anything
        raise SetupError(f"{key} {path}: cut short or damaged, or no safetensors file") from error


def _read_pickle(path: Path, key: str, *, is_zip: bool) -> Any:
    # Training scripts keep their arguments beside the weights; a Namespace is a bag of them.
    with torch.serialization.safe_globals([Namespace]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            # The format before zip files says this of any file that is not one.
            what = f"refused, it holds {_code_in(path)}, and only tensors and plain values are read"
            raise SetupError(f"{key} {path}: {what if is_zip else _OTHER_FORMAT}") from error
        except Exception as error:  # as above
            raise SetupError(f"{key} {path}: {_DAMAGED if is_zip else _OTHER_FORMAT}") from error


def _code_in(path: Path) -> str:
    """Return the names of the functions and classes in a zip file that weights_only refuses."""
    try:
        return shorten(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))) or "code"
    except (ValueError, pickle.UnpicklingError):  # none, or in another version of the pickle protocol
        return "code"
