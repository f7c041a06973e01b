"""Read a config: a YAML file and the command line's overrides, checked and frozen.

load -> override -> check -> freeze. Values are read by the type of their default, never by YAML's guess.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from yacs.config import CfgNode

from dropit.training.config.check import check
from dropit.training.config.keys import KEYS, defaults
from dropit.training.config.values import Origin, convert, describe_node
from dropit.training.errors import ConfigError, suggest


def load(path: str | Path, overrides: Sequence[str] = ()) -> CfgNode:
    """Return the config of a YAML file and of KEY VALUE (or KEY=VALUE) overrides, checked and frozen.

    Raises ConfigError with one line that names the key, what was given, what would be right, and where.
    """
    cfg, origins = defaults(), dict[str, Origin]()
    _merge_file(cfg, origins, Path(path), ())
    for key, text in _pairs(overrides):
        _set(cfg, origins, key, _compose_override(key, text), Origin("command line"))
    check(cfg, origins)
    cfg.freeze()
    return cfg


def _merge_file(cfg: CfgNode, origins: dict[str, Origin], path: Path, below: tuple[Path, ...]) -> None:
    if path.resolve() in below:
        raise ConfigError(f"{path}: _BASE_ leads back to this file")
    root = _compose_file(path)
    entries = {key: (node, origin) for key, node, origin in _entries(root, Origin(str(path), 1))}
    if "_BASE_" in entries:
        node, origin = entries.pop("_BASE_")
        if not isinstance(node, yaml.ScalarNode):
            raise ConfigError(f"_BASE_ must be the path of a YAML file ({origin})")
        _merge_file(cfg, origins, path.parent / node.value, (*below, path.resolve()))
    for key, (node, origin) in entries.items():
        _set(cfg, origins, key, node, origin)


def _compose_file(path: Path) -> yaml.Node:
    if path.suffix not in {".yaml", ".yml"}:
        raise ConfigError(f"{path}: a config is a local .yaml or .yml file")
    if not path.is_file():
        raise ConfigError(f"{path}: no such file{_nearest_files(path)}")
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deep") from error
    if root is None:
        raise ConfigError(f"{path}: the file is empty")
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}:{root.start_mark.line + 1}: expected KEY: value lines")
    return root


def _nearest_files(path: Path) -> str:
    try:
        names = [other.name for other in path.parent.iterdir() if other.suffix in {".yaml", ".yml"}]
    except OSError:
        return ""
    return suggest(path.name, names)


def _entries(mapping: yaml.Node, origin: Origin) -> Iterator[tuple[str, yaml.Node, Origin]]:
    """Yield key, value and origin of each entry; a key that is given twice is an error."""
    seen: dict[str, Origin] = {}
    for key_node, node in mapping.value:
        here = origin.at(key_node)
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"a key must be a name, got {describe_node(key_node)} ({here})")
        key = key_node.value
        if key in seen:
            raise ConfigError(f"{key} is given twice ({here}, and first {seen[key]})")
        seen[key] = here
        yield key, node, here


def _pairs(tokens: Sequence[str]) -> Iterator[tuple[str, str]]:
    rest = list(tokens)
    while rest:
        key, equals, value = rest.pop(0).partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"{key} has no value (overrides are KEY VALUE pairs)")
            value = rest.pop(0)
        yield key, value


def _compose_override(key: str, text: str) -> yaml.Node:
    """Return the node that the text would be in a file; a list may come without its brackets."""
    if not text.lstrip().startswith(("[", "{")):
        return yaml.ScalarNode("tag:yaml.org,2002:str", text)
    try:
        node: yaml.Node = yaml.compose(text, Loader=yaml.SafeLoader)  # type: ignore[assignment]
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{key}: cannot read {text[:200]!r} (command line)") from error
    return node


def _set(cfg: CfgNode, origins: dict[str, Origin], key: str, node: yaml.Node, origin: Origin) -> None:
    """Set a dotted key, or every key of a section, to what the node says."""
    *sections, name = key.split(".")
    parent = cfg
    for depth, section in enumerate([*sections, name]):
        known = "".join(f"{above}." for above in sections[:depth])
        if not isinstance(parent, CfgNode) or section not in parent:
            valid = list(parent) if isinstance(parent, CfgNode) else []
            raise ConfigError(f"{known}{section}: no such key{suggest(section, valid)} ({origin})")
        if depth < len(sections):
            parent = parent[section]
    if not isinstance(parent[name], CfgNode):
        parent[name] = convert(KEYS[key], node, origin)
        origins[key] = origin
        return
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{key} is a section: expected its keys, got {describe_node(node)} ({origin})")
    for inner, value, here in _entries(node, origin):
        _set(cfg, origins, f"{key}.{inner}", value, here)
