"""Parts of a decoder that run together in threads of one process, as their processes would."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from stallfree.model.decoder import Decoder
from stallfree.model.int8_decoder import Int8Decoder
from stallfree.model.model_input import ModelInput
from stallfree.model.part import ModelPart

AnyDecoder = Decoder | Int8Decoder


class ThreadPeers:
    """Peers that are threads of one process.

    Args:
        given: where each puts what it gives, by its share.
        barrier: of as many threads.
    """

    def __init__(self, rank: int, given: list[torch.Tensor], barrier: threading.Barrier) -> None:
        self._rank, self._given, self._barrier = rank, given, barrier

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return self._exchange(x, lambda parts: torch.stack(parts).sum(dim=0, dtype=x.dtype))

    def largest(self, x: torch.Tensor) -> torch.Tensor:
        return self._exchange(x, lambda parts: torch.stack(parts).amax(dim=0))

    def concat(self, x: torch.Tensor) -> torch.Tensor:
        return self._exchange(x, lambda parts: torch.cat(parts, dim=-1))

    def _exchange(
        self, x: torch.Tensor, join: Callable[[list[torch.Tensor]], torch.Tensor]
    ) -> torch.Tensor:
        self._given[self._rank] = x
        self._barrier.wait(60)
        joined = join(self._given)
        self._barrier.wait(60)
        return joined


class Stage:
    """The shares of one stage, each with its KV cache.

    Args:
        make: makes a decoder of a part, with its peers.
        parts: of the stage.
        num_blocks, block_size: of each KV cache.
    """

    def __init__(
        self,
        make: Callable[..., AnyDecoder],
        parts: Sequence[ModelPart],
        num_blocks: int,
        block_size: int,
    ) -> None:
        given = [torch.empty(0)] * len(parts)
        self._barrier = threading.Barrier(len(parts))
        self.decoders = [
            make(part=part, peers=ThreadPeers(rank, given, self._barrier))
            for rank, part in enumerate(parts)
        ]
        self._caches = [each.make_cache(num_blocks, block_size) for each in self.decoders]

    def run(
        self, batch: ModelInput, hidden: torch.Tensor | None, rows: slice = slice(-1, None)
    ) -> list[torch.Tensor]:
        """What each share gives: hidden states, or logits of some rows."""

        def one(rank: int) -> torch.Tensor:
            decoder = self.decoders[rank]
            try:
                with torch.inference_mode():
                    result = decoder.forward(batch, self._caches[rank], hidden)  # type: ignore[arg-type]
                    return decoder.logits(result[rows]) if decoder.part.is_last else result
            except BaseException:
                self._barrier.abort()  # nobody waits for it
                raise

        with ThreadPoolExecutor(len(self.decoders)) as threads:
            return list(threads.map(one, range(len(self.decoders))))
