"""YAML files to frozen, validated configs.

Each config class stands beside what it configures and derives from `Config`. YAML holds values only: nothing in a file
is ever imported or executed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from invdyn.errors import ConfigError


class Config(BaseModel):
    """A frozen config: unknown keys are errors, values are checked on construction."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    def replace(self, **changes: Any) -> Self:
        """Return a validated copy with the given fields changed.

        Raises:
            ConfigError: when a changed value is not valid.
        """
        values = {name: getattr(self, name) for name in self.model_fields_set}
        return validate(type(self), {**values, **changes}, where="the given values")


AnyConfig = TypeVar("AnyConfig", bound=Config)


class TextFile(Protocol):
    """A file on a disk or elsewhere."""

    def read_text(self, encoding: str) -> str:
        """Return its content."""


def read_yaml(path: str | TextFile) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping.

    Raises:
        ConfigError: when the file is missing, is not YAML, or holds something other than a mapping.
    """
    if isinstance(path, str):
        path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"config file not found: {path}{_suggest_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file cannot be read: {path}: {error}") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigError(f"{path} is not valid YAML: {place}{problem}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path} must hold a mapping of names to values, got {type(values).__name__}")
    return values


def load_config(schema: type[AnyConfig], path: str | Path, overrides: Iterable[str] = ()) -> AnyConfig:
    """Load a YAML file as `schema`, with `key.path=value` overrides applied first.

    Raises:
        ConfigError: naming the file, the key, and the nearest known key where a key is unknown.
    """
    return validate(schema, apply_overrides(read_yaml(path), overrides), where=str(path))


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return `values` with each `key.path=value` set; the value is parsed as YAML.

    Raises:
        ConfigError: when an override has no `=`, or goes through something that is not a mapping.

    Example:
        >>> apply_overrides({"collect": {"seed": 0}}, ["collect.seed=7", "down_dims=[8, 8]"])
        {'collect': {'seed': 7}, 'down_dims': [8, 8]}
    """
    result = dict(values)
    for override in overrides:
        key, equals, text = override.partition("=")
        path = [part.strip() for part in key.split(".")]
        if not equals or not all(path):
            raise ConfigError(f"--set takes key.path=value, got {override!r}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"--set {key}: the value is not valid YAML: {text!r}") from None
        node = result
        for part in path[:-1]:
            child = node.get(part)
            if child is not None and not isinstance(child, Mapping):
                raise ConfigError(f"--set {key}: {part!r} holds {child!r}, not a mapping")
            node[part] = dict(child or {})
            node = node[part]
        node[path[-1]] = value
    return result


def validate(schema: type[AnyConfig], values: Mapping[str, Any], where: str) -> AnyConfig:
    """Build `schema` from plain values.

    Raises:
        ConfigError: one line with the first problem found, and how many more there are.
    """
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        problems = error.errors()
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigError(f"{where}: {_describe(schema, problems[0])}{more}") from None


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint naming the known name nearest to `name`, or all known names when none is near.

    Example:
        >>> nearest("val_ration", ["val_ratio", "name"])
        "did you mean 'val_ratio'?"
    """
    known = sorted(known)
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {matches[0]!r}?" if matches else f"known names: {', '.join(known)}"


def _describe(schema: type[Config], problem: ErrorDetails) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}; {nearest(location[-1], _fields_at(schema, location[:-1]))}"
    if problem["type"] == "missing":
        return f"required key {key!r} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {message}, got {_short(problem['input'])}" if key else message


def _short(value: Any, limit: int = 80) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _fields_at(schema: type[Config], location: Sequence[str]) -> list[str]:
    """Names, as YAML has them, of the fields of the config class that a key path leads to."""
    current: list[type[Config]] = [schema]
    for part in location:
        fields = [field.annotation for c in current for name, field in _yaml_fields(c) if name == part]
        if fields:
            current = [c for annotation in fields for c in _config_classes(annotation)]
    return [name for c in current for name, _ in _yaml_fields(c)]


def _yaml_fields(schema: type[Config]) -> list[tuple[str, FieldInfo]]:
    return [(field.alias or name, field) for name, field in schema.model_fields.items()]


def _config_classes(annotation: Any) -> list[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _config_classes(argument)]


def _suggest_file(path: TextFile) -> str:
    if not isinstance(path, Path):
        return ""
    names = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    matches = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"; did you mean {path.parent / matches[0]}?" if matches else ""
