"""How the fields of a settings dataclass appear on the command line and in a configuration file.

A field is annotated with a `Flag`; `settings_of` gives the fields of a class with theirs. Nothing
here knows which settings there are.
"""

from __future__ import annotations

import math
import re
import stat
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from stallfree.errors import ConfigError

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s)?", re.IGNORECASE)
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?b)?|b)?", re.IGNORECASE)
_TYPE_WORDS: dict[type, str] = {
    bool: "true or false",
    str: "text",
    int: "a whole number",
    float: "a number",
    Path: "a path",
    tuple: "a list of texts",
}


@dataclass(frozen=True, slots=True)
class Flag:
    """How a field appears on the command line and in the configuration file.

    Attributes:
        help: what it does, for `--help`.
        metavar: what stands for the value in `--help`: the unit, where there is one.
        name: its name, if that is not the field's.
        unset: what leaving it out means, for a field that is None by default.
        parse: reads the value from text; raises ConfigError.
        variable: the environment variable that sets it too.
        positional: whether the command line takes it without a flag.
        panel: the heading under which `--help` lists it.
    """

    help: str
    metavar: str
    name: str | None = None
    unset: str = ""
    parse: Callable[[str], object] | None = None
    variable: str | None = None
    positional: bool = False
    panel: str = "Engine"


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of a settings class, as its annotation describes it.

    Attributes:
        field: the field's name.
        name: the name in a configuration file; with dashes, on the command line.
        type: the type of a value that is not None; `tuple` stands for a tuple of texts.
        optional: whether it may be None.
        default: the field's default.
        secret: whether the value must not be shown.
        flag: see `Flag`.
    """

    field: str
    name: str
    type: type
    optional: bool
    default: Any
    secret: bool
    flag: Flag

    @property
    def option(self) -> str:
        """The flag as typed, `--max-num-seqs`."""
        return "--" + self.name.replace("_", "-")

    def read(self, value: object) -> object:
        """Turn a value as a command line or a YAML file holds it into one of the field's type.

        Raises:
            ConfigError: it is not of that type.
        """
        if isinstance(value, str):
            if self.flag.parse:
                value = self._parse(self.flag.parse, value)
            elif self.type is Path:
                value = Path(value)
            elif self.type is tuple:
                value = (value,)
        if isinstance(value, list):
            value = tuple(value)
        self.check(value)
        return value

    def _parse(self, parse: Callable[[str], object], text: str) -> object:
        try:
            return parse(text)
        except ConfigError as error:
            raise ConfigError(f"{self.name}: {error}") from error

    def check(self, value: object) -> None:
        """Check that a value has the field's type.

        Raises:
            ConfigError: it has not; names the field, and the value unless that is secret.
        """
        if value is None and self.optional:
            return
        expected = (int, float) if self.type is float else self.type
        good = isinstance(value, expected) and isinstance(value, bool) == (self.type is bool)
        if isinstance(value, tuple):
            good = good and all(isinstance(item, str) for item in value)
        if not good:
            shown = "of the wrong type" if self.secret else repr(value)
            raise ConfigError(f"{self.field} is {shown}; it must be {_TYPE_WORDS[self.type]}")


def settings_of(settings_class: type) -> tuple[Setting, ...]:
    """The settings of a dataclass whose fields are annotated with a `Flag`, in order."""
    hints = get_type_hints(settings_class, include_extras=True)
    found = []
    for item in fields(settings_class):
        hint = hints[item.name]
        assert get_origin(hint) is Annotated, f"{item.name} has no Flag"
        annotation, flag = get_args(hint)
        is_union = NoneType in get_args(annotation)
        kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
        kind = kinds[0] if is_union else annotation
        assert item.default is not MISSING, f"{item.name} has no default"
        found.append(
            Setting(
                field=item.name,
                name=flag.name or item.name,
                type=get_origin(kind) or kind,
                optional=is_union,
                default=item.default,
                secret=not item.repr,
                flag=flag,
            )
        )
    return tuple(found)


def check_types(settings: object) -> None:
    """Check that the value of each field has the field's type.

    Raises:
        ConfigError: one has not.
    """
    for setting in settings_of(type(settings)):
        setting.check(getattr(settings, setting.field))


def parse_bytes(text: str) -> int:
    """Read an amount of memory: `2GiB`, `512MiB`, `1.5GB`, `2G` (as GiB) or plain bytes.

    Raises:
        ConfigError: it is none of these.
    """
    match = _BYTES.fullmatch(text.strip())
    if not match:
        raise ConfigError(
            f"{text!r} is not an amount of memory; write it as 2GiB, 512MiB, 1.5GB or plain bytes"
        )
    number, prefix, suffix = match.groups()
    base = 1000 if (suffix or "").lower() == "b" else 1024
    exponent = "kmgt".index(prefix.lower()) + 1 if prefix else 0
    return int(float(number) * base**exponent)


def parse_duration(text: str) -> float:
    """Read a time in seconds: `200ms`, `0.2s`, or a plain number of seconds.

    Raises:
        ConfigError: it is none of these.
    """
    match = _DURATION.fullmatch(text.strip())
    if not match:
        raise ConfigError(f"{text!r} is not a time; write it as 200ms or 0.2s")
    number, unit = match.groups()
    return float(number) / (1000 if (unit or "").lower() == "ms" else 1)


def written(value: object, parse: Callable[[str], object] | None) -> object:
    """A value as a user would write it for `parse` to read: with a unit, where it has one."""
    if parse is parse_duration and isinstance(value, int | float):
        return f"{value:g}s" if value >= 1 or not value else f"{value * 1000:g}ms"
    if parse is parse_bytes and isinstance(value, int):
        for exponent, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
            if value and value % (1 << exponent) == 0:
                return f"{value >> exponent}{unit}"
    return value


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ConfigError if a value is not one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")


def check_file(name: str, path: Path | None) -> None:
    """Raise ConfigError if a path is given and is not that of a regular file; says why."""
    if path is None:
        return
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        reason = "there is no such file"
    except OSError as error:
        reason = f"it cannot be read: {error.strerror}"
    else:
        if stat.S_ISREG(mode):
            return
        reason = "it is a folder" if stat.S_ISDIR(mode) else "it is not a regular file"
    raise ConfigError(f"{name} is {path}; {reason}")


def check_range(name: str, value: float | None, low: float, high: float | None = None) -> None:
    """Raise ConfigError if a value is given and below `low`, above `high` or not finite."""
    if value is None:
        return
    finite = isinstance(value, int) or math.isfinite(value)
    if not finite or value < low or (high is not None and value > high):
        limit = f"finite and at least {low}" if not finite else f"at least {low}"
        limit += "" if high is None else f" and at most {high}"
        raise ConfigError(f"{name} is {value}; it must be {limit}")
