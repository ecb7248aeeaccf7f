"""Reading recipes: files, built-in names, and ``key=value`` on top."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from anabranch.errors import ConfigurationError, UnknownName
from anabranch.training.options import parse_options
from anabranch.training.recipe import TEMPLATES, Recipe

BUILT_IN = Path(__file__).parent / "recipes"


def load_recipe(source: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Defaults < the file (or built-in recipe of this name) < ``overrides``.

    An override is ``train.lr=1e-4``, ``data.0.limit=200``, ``adapter=full``: a key's path and a
    YAML value. Paths in a file start at its folder, paths in overrides at the current one.

    Raises :class:`ConfigurationError` with one line per mistake.
    """
    path = find_recipe(source)
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from error
    values = _absolute(parse_yaml(text, str(path)), path.parent.absolute())
    for override in overrides:
        values = with_override(values, override)
    return parse_options(Recipe, _absolute(values, Path.cwd()))


def find_recipe(source: str | Path) -> Path:
    """The file of a recipe: a path, or the name of a built-in one."""
    path = Path(source)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise ConfigurationError(f"there is no recipe file {path}")
    built_in = {file.stem: file for file in sorted(BUILT_IN.glob("*.yaml"))}
    if str(source) not in built_in:
        raise UnknownName("recipe", str(source), built_in)
    return built_in[str(source)]


def built_in_recipes() -> dict[str, str]:
    """Name -> what it does, of the recipes that come with the package."""
    return {
        file.stem: str(parse_yaml(file.read_text("utf-8"), file.name).get("about", "")).strip()
        for file in sorted(BUILT_IN.glob("*.yaml"))
    }


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """A YAML mapping as plain values; duplicate keys are refused and ``1e-4`` is a number."""
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{where} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigurationError(f"{where} must hold keys with values, such as recipe: my-run")
    return values


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Plain values as YAML, in the order given."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=100)


def difference(old: Any, new: Any, path: str = "") -> list[str]:
    """Lines ``train.lr: 0.0001 -> 0.0003``, one for each key that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in [*old, *(key for key in new if key not in old)]
            for line in difference(
                old.get(key, _ABSENT), new.get(key, _ABSENT), f"{path}.{key}" if path else str(key)
            )
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for i, (a, b) in pairs for line in difference(a, b, f"{path}.{i}")]
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]


class _Absent:
    def __repr__(self) -> str:
        return "(absent)"


_ABSENT = _Absent()


class _Loader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2, and no key may come twice.

    So ``on`` and ``no`` are texts, and ``1e-4`` is a number.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float | bool) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is there twice", key_node.start_mark
                )
            if isinstance(key, str | int | float | bool):
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def with_override(values: Any, override: str) -> dict[str, Any]:
    """The same values with one ``key.path=value`` (in YAML) put in."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigurationError(f"{override!r} is not key=value, such as train.lr=1e-4")
    value = parse_yaml(f"value: {text}", override)["value"]
    changed: dict[str, Any] = _set(values, key.strip().split("."), value, key.strip())
    return changed


def _set(container: Any, path: list[str], value: Any, key: str) -> Any:
    """A copy of ``container`` with ``value`` at ``path``; a number counts into a list."""
    head, rest = path[0], path[1:]
    if isinstance(container, list):
        if not head.isdecimal() or int(head) >= len(container):
            raise ConfigurationError(
                f"{key}: {head!r} is not the position of an entry; the list has {len(container)}, "
                f"counted from 0"
            )
        changed = list(container)
        index = int(head)
        changed[index] = _set(container[index], rest, value, key) if rest else value
        return changed
    if isinstance(container, str) and rest == []:
        # ``adapter: lora`` is short for ``adapter: {method: lora}``.
        short = "method" if key.split(".")[0] == "adapter" else "name"
        container = {short: container}
    if container is not None and not isinstance(container, dict):
        raise ConfigurationError(f"{key}: {container!r} is a value and has no key {head!r}")
    inside = dict(container or {})
    inside[head] = _set(inside.get(head), rest, value, key) if rest else value
    return inside


def _absolute(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Let relative paths start at ``folder``; what is malformed is left to be refused."""
    values = dict(values)
    template = values.get("template")
    if isinstance(template, str) and template not in TEMPLATES and template.endswith(".jinja"):
        values["template"] = str(folder / template)
    base = values.get("base")
    if isinstance(base, str) and base.startswith(("./", "../")):
        values["base"] = str(folder / base)
    if isinstance(values.get("data"), list):
        values["data"] = [
            {**data, "path": str(folder / Path(data["path"]).expanduser())}
            if isinstance(data, dict) and isinstance(data.get("path"), str)
            else data
            for data in values["data"]
        ]
    return values
