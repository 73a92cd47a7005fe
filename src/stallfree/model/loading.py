"""A decoder from its weights: which of the two it is, and what it computes in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from filelock import FileLock, Timeout

from stallfree.cache import cache_folder
from stallfree.errors import ModelError
from stallfree.model.config import ModelConfig
from stallfree.model.decoder import Decoder
from stallfree.model.part import ModelPart
from stallfree.model.peers import Peers
from stallfree.model.weights import WeightSource

if TYPE_CHECKING:  # its compiler is slow to import, and processes that compute in floats need none
    from stallfree.model.int8_decoder import Int8Decoder

_COMPILE_TIMEOUT_S = 900.0


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """What a model computes in.

    Attributes:
        dtype: of activations, and of weights unless `int8`.
        kv_dtype: of the KV cache.
    """

    int8: bool
    dtype: torch.dtype
    kv_dtype: torch.dtype

    @property
    def name(self) -> str:
        """For people."""
        return "int8" if self.int8 else str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class Computation:
    """How a decoder runs.

    Attributes:
        device: as PyTorch names it.
        threads: of the CPU.
        max_positions: longest context in tokens.
    """

    arithmetic: Arithmetic
    device: str
    threads: int
    max_positions: int


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a model, or a part of it, consists of and takes: numbers and bytes."""

    num_parameters: int
    weight_bytes: int
    kv_bytes_per_token: int

    @classmethod
    def of(cls, decoder: Decoder | Int8Decoder) -> Footprint:
        """That of a decoder."""
        return cls(decoder.num_parameters, decoder.weight_bytes, decoder.kv_bytes_per_token)


def load_decoder(
    config: ModelConfig,
    weights: WeightSource,
    computation: Computation,
    part: ModelPart | None = None,
    peers: Peers | None = None,
    on_layer: Callable[[int], None] | None = None,
) -> Decoder | Int8Decoder:
    """Load a model, or a part of it.

    Args:
        config: of the whole model.
        weights: of the whole model; for int8, those of `int8_cache`.
        computation: how it runs.
        part: None for all.
        peers: that have the other shares of its layers.
        on_layer: called with the index of each layer once it is loaded, for progress.

    Raises:
        ModelError: see `Decoder` and `Int8Decoder`.
    """
    arithmetic = computation.arithmetic
    if not arithmetic.int8:
        return Decoder(
            config,
            weights,
            max_positions=computation.max_positions,
            dtype=arithmetic.dtype,
            device=computation.device,
            part=part,
            peers=peers,
            on_layer=on_layer,
        )
    from stallfree.model.int8_decoder import Int8Decoder

    return Int8Decoder(
        config,
        weights,
        max_positions=computation.max_positions,
        threads=computation.threads,
        kv_dtype=arithmetic.kv_dtype,
        part=part,
        peers=peers,
        on_layer=on_layer,
    )


def compile_kernels(decoder: Decoder | Int8Decoder) -> None:
    """Make the machine code that a decoder needs, if it needs any.

    It is kept on disk, so of processes that start together one compiles and the others wait.
    """
    if isinstance(decoder, Decoder):
        return
    with ExitStack() as stack:
        with suppress(OSError, NotImplementedError, ModelError, Timeout):  # each for itself then
            folder = cache_folder()
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(folder / "kernels.lock", timeout=_COMPILE_TIMEOUT_S))
        decoder.compile()
