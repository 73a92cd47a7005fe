"""What a simulation knows of a device and of a model: numbers from TOML files.

The files beside this module say where each number is from. Nothing here knows how long anything
takes.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from stallfree.errors import ConfigError

_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True, slots=True)
class Device:
    """An accelerator and what joins it to others; rates are peaks, which no program reaches.

    Attributes:
        name: the name of its file.
        flops_per_s: of dense 16-bit matrix products; a multiplication and an addition are two.
        memory_bytes_per_s: of its own memory.
        memory_bytes: size of that.
        link_bytes_per_s: to any other device of its node, in one direction.
        base_latency_s: of an operation between devices, however little it moves.
        link_step_s: what each step from device to device in a node adds to that.
        network_bytes_per_s: to a device of another node, in one direction.
        network_step_s: what a step to another node adds.
        pair_bytes_per_s: to the one device that a bridge joins it with, in one direction; None if
            no link is faster than `link_bytes_per_s`.
    """

    name: str
    flops_per_s: float
    memory_bytes_per_s: float
    memory_bytes: int
    link_bytes_per_s: float
    base_latency_s: float
    link_step_s: float
    network_bytes_per_s: float
    network_step_s: float
    pair_bytes_per_s: float | None = None

    def bytes_per_s_among(self, devices: int) -> float:
        """The slowest link that so many devices of a node need, in one direction."""
        return (
            self.pair_bytes_per_s
            if devices <= 2 and self.pair_bytes_per_s
            else self.link_bytes_per_s
        )


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a decoder that its speed depends on.

    Attributes:
        name: the name of its file.
        layers, hidden, intermediate, heads, kv_heads, head_dim, vocab: as in its configuration.
        mlp_matrices: 3 in a gated MLP, 2 in a plain one.
        bytes_per_parameter: also those of a number in the KV cache.
        max_context: tokens that it was made for.
        sliding_window: tokens that a token attends to; None for all.
        parallel_attention: whether attention and MLP of a layer read the same input, so that
            devices add up their parts once a layer, not twice.
        tied_embeddings: whether one matrix serves at both ends.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    mlp_matrices: int
    bytes_per_parameter: float
    max_context: int
    sliding_window: int | None = None
    parallel_attention: bool = False
    tied_embeddings: bool = False

    @property
    def attention_parameters(self) -> int:
        """Weights of the four projections of a layer."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)

    @property
    def mlp_parameters(self) -> int:
        """Weights of the MLP of a layer."""
        return self.mlp_matrices * self.hidden * self.intermediate

    @property
    def num_parameters(self) -> int:
        """All weights but those of norms and biases, which are a thousandth at most."""
        embeddings = self.vocab * self.hidden * (1 if self.tied_embeddings else 2)
        return embeddings + self.layers * (self.attention_parameters + self.mlp_parameters)

    @property
    def kv_bytes_per_token(self) -> float:
        """What a token takes in the KV cache, in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.bytes_per_parameter


def load_device(name_or_path: str) -> Device:
    """Read a device by its name, or from a file of one's own (a path that ends in `.toml`).

    Raises:
        ConfigError: it is not known, cannot be read, or has a wrong, unknown or missing key.
    """
    return Device(**_read(Device, "devices", name_or_path))


def load_model_shape(name_or_path: str) -> ModelShape:
    """Read the shape of a model by its name, or from a file (a path that ends in `.toml`).

    Raises:
        ConfigError: see `load_device`.
    """
    values = _read(ModelShape, "models", name_or_path)
    shape = ModelShape(**values)
    if shape.heads % shape.kv_heads:
        raise ConfigError(
            f"{name_or_path}: heads is {shape.heads}; "
            f"it must be a multiple of kv_heads, {shape.kv_heads}"
        )
    if shape.mlp_matrices not in (2, 3):
        raise ConfigError(
            f"{name_or_path}: mlp_matrices is {shape.mlp_matrices}; it must be 2 or 3"
        )
    return shape


def known_names(kind: str) -> list[str]:
    """Names of the files that come with the package, of `devices` or `models`."""
    return sorted(path.stem for path in Path(__file__).with_name(kind).glob("*.toml"))


def _read(shape: type, kind: str, name_or_path: str) -> dict[str, Any]:
    """The checked values of a file."""
    path = Path(name_or_path)
    if path.suffix != ".toml":
        if name_or_path not in (known := known_names(kind)):
            raise ConfigError(
                f"{name_or_path!r} is none of the {kind} {', '.join(known)}, "
                "nor a path that ends in .toml"
            )
        path = Path(__file__).with_name(kind) / f"{name_or_path}.toml"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    hints = get_type_hints(shape)
    if unknown := content.keys() - hints.keys():
        raise ConfigError(
            f"{path}: {', '.join(sorted(unknown))} is none of the keys {', '.join(hints)}"
        )
    needed = {each.name for each in fields(shape) if each.default is MISSING}
    if missing := needed - content.keys():
        raise ConfigError(f"{path}: {', '.join(sorted(missing))} is missing")
    return {key: _checked(f"{path}: {key}", value, hints[key]) for key, value in content.items()}


def _checked(what: str, value: object, hint: Any) -> object:
    """A value of the type that its field has; numbers are above 0."""
    kind = next(iter(get_args(hint)), hint)
    expected = (int, float) if kind is float else kind
    if not isinstance(value, expected) or isinstance(value, bool) != (kind is bool):
        raise ConfigError(f"{what} is {value!r}; it must be {_WORDS[kind]}")
    if isinstance(value, int | float) and kind is not bool and not 0 < value < math.inf:
        raise ConfigError(f"{what} is {value}; it must be finite and above 0")
    return value
