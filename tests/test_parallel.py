"""Parts of every architecture's decoder, together, against the whole."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_parity import BLOCK_SIZE, MAX_MODEL_LEN, MODELS
from tiny import save_tiny_model
from transformers import AutoConfig

from stallfree.model.config import ModelConfig
from stallfree.model.decoder import Decoder
from stallfree.model.model_input import ModelInput, Rows
from stallfree.model.part import parts_of
from stallfree.model.weights import SafetensorsWeights

CHUNKS = [(0, 16), (16, 17), (17, 40), *((n, n + 1) for n in range(40, 48))]
BLOCKS = list(range(MAX_MODEL_LEN // BLOCK_SIZE))


class ThreadPeers:
    """Peers that are threads of one process.

    Args:
        given: where each puts what it gives, by its share.
        barrier: of as many threads.
    """

    def __init__(self, rank: int, given: list[torch.Tensor], barrier: threading.Barrier) -> None:
        self._rank, self._given, self._barrier = rank, given, barrier

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return self._exchange(x, lambda parts: torch.stack(parts).sum(dim=0))

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
    """The shares of one stage, each with its KV cache, run in threads."""

    def __init__(self, make: Callable[..., Decoder], parts: list) -> None:  # type: ignore[type-arg]
        given = [torch.empty(0)] * len(parts)
        barrier = threading.Barrier(len(parts))
        self.decoders = [
            make(part=part, peers=ThreadPeers(rank, given, barrier))
            for rank, part in enumerate(parts)
        ]
        self.caches = [each.make_cache(len(BLOCKS), BLOCK_SIZE) for each in self.decoders]

    def run(self, batch: ModelInput, hidden: torch.Tensor | None) -> list[torch.Tensor]:
        """What each share gives: hidden states, or logits of the last row."""
        results: list[torch.Tensor] = [torch.empty(0)] * len(self.decoders)

        def one(rank: int) -> None:
            with torch.inference_mode():
                decoder = self.decoders[rank]
                result = decoder.forward(batch, self.caches[rank], hidden)
                results[rank] = decoder.logits(result[-1:]) if decoder.part.is_last else result

        threads = [threading.Thread(target=one, args=(r,)) for r in range(len(self.decoders))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("shares", "num_stages"), [(2, 1), (1, 2), (2, 2)])
def test_parts_give_what_the_whole_gives(
    tmp_path: Path, name: str, shares: int, num_stages: int
) -> None:
    save_tiny_model(
        tmp_path, name.split()[0], vocab_size=321, initializer_range=0.2, **MODELS[name]
    )
    config = ModelConfig.from_hf(AutoConfig.from_pretrained(tmp_path).to_dict())

    def make(**own: object) -> Decoder:
        weights = SafetensorsWeights(tmp_path)
        return Decoder(config, weights, max_positions=MAX_MODEL_LEN, **own)  # type: ignore[arg-type]

    whole = make()
    cache = whole.make_cache(len(BLOCKS), BLOCK_SIZE)
    layers = [1, config.num_layers - 1] if num_stages == 2 else [config.num_layers]
    stages = [Stage(make, parts) for parts in parts_of(config, layers, shares)]
    counted = sum(each.num_parameters for stage in stages for each in stage.decoders)
    assert counted == whole.num_parameters
    tokens = torch.randint(0, 321, (CHUNKS[-1][1],), generator=torch.Generator().manual_seed(1))
    for start, stop in CHUNKS:
        batch = ModelInput(tokens[start:stop].tolist(), [Rows(0, start, stop, BLOCKS)])
        with torch.inference_mode():
            expected = whole.logits(whole.forward(batch, cache)[-1:])
        hidden = None
        for stage in stages:
            results = stage.run(batch, hidden)
            hidden = results[0]
            assert all(torch.equal(hidden, each) for each in results)
        assert hidden is not None
        assert (hidden - expected).abs().max() < 1e-4
        assert hidden.argmax() == expected.argmax()
