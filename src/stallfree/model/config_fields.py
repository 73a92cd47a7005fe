"""Reading single values of a model's configuration, which may hold anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stallfree.errors import WeightFileError

# What no model of today comes near; beyond it a file is broken or hostile.
MAX_LAYERS = MAX_EXPERTS = 10_000
MAX_SIZE = 2**24
MAX_CONTEXT = 2**31


def integer(config: Mapping[str, Any], name: str, highest: int, default: int | None = None) -> int:
    """A whole number from 1 to `highest`.

    Raises:
        WeightFileError: it is missing without a default, or is no such number.
    """
    value = config.get(name)
    if value is None:
        value = default
    if type(value) is not int or not 1 <= value <= highest:
        raise WeightFileError(
            f"{name} in the model's configuration is {value!r:.80}; it must be a whole number "
            f"from 1 to {highest}"
        )
    return value


def number(
    config: Mapping[str, Any], name: str, above: float, highest: float, default: float | None = None
) -> float:
    """A number above `above` and at most `highest`.

    Raises:
        WeightFileError: it is missing without a default, or is no such number.
    """
    value = config.get(name)
    if value is None:
        value = default
    if isinstance(value, int | float) and not isinstance(value, bool) and above < value <= highest:
        return float(value)
    raise WeightFileError(
        f"{name} in the model's configuration is {value!r:.80}; it must be a number above "
        f"{above} and at most {highest:g}"
    )


def given(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that say something."""
    return {name: value for name, value in config.items() if value is not None}
