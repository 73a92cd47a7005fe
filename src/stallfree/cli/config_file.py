"""Reading settings from a YAML file: the names of the flags, with dashes or underscores.

It knows nothing of the command that reads the file: one file may hold the settings of all.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

import yaml

from stallfree.engine.flags import Setting
from stallfree.errors import ConfigError


def read_config_file(path: Path, settings: Iterable[Setting]) -> dict[str, object]:
    """Read the file and return its values by the name of their setting.

    Raises:
        ConfigError: no such file, not YAML, not a mapping, an unknown name or a wrong type.
    """
    known = {setting.name: setting for setting in settings}
    values: dict[str, object] = {}
    for written, value in _load(path).items():
        name = str(written).replace("-", "_")
        setting = known.get(name)
        if setting is None:
            raise ConfigError(f"{path}: {written!r} is no setting{suggestion(name, known)}")
        if name in values:
            raise ConfigError(f"{path}: {written!r} is there twice")
        try:
            values[name] = setting.read(value)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
    return values


def suggestion(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'this'?`, or nothing if no known name is close."""
    close = get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _load(path: Path) -> dict[object, object]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold `name: value` lines, not {type(content).__name__}")
    return content
