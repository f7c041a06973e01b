"""A config value: where it was given, and how it becomes a value of its key's type."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

import yaml

from dropit.training.config.keys import Key
from dropit.training.errors import ConfigError

_EXPECTED = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
_BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@dataclass(frozen=True)
class Origin:
    """Where a value was given: a line of a file, or the command line."""

    source: str
    line: int | None = None

    def at(self, node: yaml.Node) -> Origin:
        """Return the node's line, where the source has lines."""
        return self if self.line is None else Origin(self.source, node.start_mark.line + 1)

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


def convert(key: Key, node: yaml.Node, origin: Origin) -> Any:
    """Return the node's value in the type of the key's default; raises ConfigError where it has another."""
    if not isinstance(key.default, list):
        return _convert_scalar(key, node, origin)
    if isinstance(node, yaml.ScalarNode):
        parts = [part.strip() for part in node.value.split(",") if part.strip()]
        return [_convert_scalar(key, yaml.ScalarNode(node.tag, part), origin) for part in parts]
    if not isinstance(node, yaml.SequenceNode):
        raise ConfigError(f"{key.name} must be a list, got {describe_node(node)} ({origin})")
    return [_convert_scalar(key, element, origin) for element in node.value]


def _convert_scalar(key: Key, node: yaml.Node, origin: Origin) -> Any:
    kind = key.type
    if not isinstance(node, yaml.ScalarNode):
        raise ConfigError(f"{key.name} must be {_EXPECTED[kind]}, got {describe_node(node)} ({origin})")
    if node.tag == "tag:yaml.org,2002:null" and node.style is None:
        raise ConfigError(f"{key.name} has no value ({origin})")
    if kind is str:
        return _path(key, node.value, origin) if key.is_path else node.value
    try:
        if node.style is not None:  # quoted in the file: meant as a string
            raise ValueError
        return _parse(node.value, kind)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{key.name} must be {_EXPECTED[kind]}, got {node.value!r} ({origin})") from error


def _path(key: Key, text: str, origin: Origin) -> str:
    """Return a path with ~ and $NAME expanded; raises ConfigError for one that no system has."""
    expanded = os.path.expandvars(os.path.expanduser(text))  # noqa: PTH111
    if unset := re.search(r"\$(\w+|\{\w+\})", expanded):
        raise ConfigError(f"{key.name}: {unset[0]} is not set in the environment, got {text!r} ({origin})")
    try:
        if "\0" in os.fsencode(expanded).decode("latin-1"):
            raise ValueError
    except ValueError as error:  # or a character that no file name can have
        raise ConfigError(f"{key.name} must be a path, got {text!r} ({origin})") from error
    return expanded


def _parse(text: str, kind: type) -> Any:
    if kind is bool:
        if text.lower() not in _BOOLS:
            raise ValueError
        return _BOOLS[text.lower()]
    number = float(text)
    if kind is float:
        return number
    if number != int(number):  # 1e2 is an integer too
        raise ValueError
    return int(text) if text.lstrip("+-").isdigit() else int(number)


def describe_node(node: yaml.Node) -> str:
    """Return what an error says of a node: its text, or that it is a list or a mapping."""
    kind = "list" if isinstance(node, yaml.SequenceNode) else "mapping"
    return repr(node.value) if isinstance(node, yaml.ScalarNode) else f"a {kind}"
