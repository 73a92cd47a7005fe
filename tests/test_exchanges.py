"""What a decoder says that it exchanges with its peers is what it does exchange."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from int8_models import MODELS as INT8_MODELS
from int8_models import open_weights, save_model
from test_parity import MODELS
from thread_stages import AnyDecoder
from tiny import save_tiny_model
from transformers import AutoConfig

from stallfree.core.sampling_params import SamplingParams
from stallfree.executor.step import SampledRow, ScoredRows, Step
from stallfree.executor.torch_executor import LOGIT_ROWS, TorchExecutor
from stallfree.model.config import ModelConfig
from stallfree.model.decoder import Decoder
from stallfree.model.int8 import is_supported
from stallfree.model.int8_decoder import Int8Decoder
from stallfree.model.model_input import ModelInput, Rows
from stallfree.model.part import ModelPart, parts_of
from stallfree.model.peers import Alone, Exchange
from stallfree.model.sampler import SamplerRow
from stallfree.model.weights import SafetensorsWeights

BLOCK = 16


class Noting(Alone):
    """Notes what is exchanged; nobody else gives anything."""

    def __init__(self) -> None:
        self.noted: list[Exchange] = []

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return self._note("sum", x)

    def largest(self, x: torch.Tensor) -> torch.Tensor:
        return self._note("largest", x)

    def concat(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._note("concat", x)] * 2, dim=-1)

    def _note(self, how: str, x: torch.Tensor) -> torch.Tensor:
        self.noted.append(Exchange(how, tuple(x.shape), x.dtype, x.device))  # type: ignore[arg-type]
        return x


def step_of(rows: int, scored: Sequence[int] = (), num_sampled: int = 0) -> Step:
    """A prompt, of which some log probabilities and some samples are asked for."""
    blocks = list(range(-(-rows // BLOCK)))
    row = SamplerRow(SamplingParams(temperature=0), 0, 0, (), (), frozenset())
    return Step(
        ModelInput([1] * rows, [Rows(0, 0, rows, blocks)]),
        tuple(SampledRow(index, row, None) for index in range(num_sampled)),
        tuple(ScoredRows(str(count), 0, (1,) * count, 0) for count in scored),
    )


STEPS = [step_of(1, num_sampled=1), step_of(40), step_of(200, [2 * LOGIT_ROWS + 5, 3], 2)]


def check(decoder: AnyDecoder, peers: Noting, steps: Sequence[Step]) -> None:
    most = max(len(step.input.token_ids) for step in steps)
    executor = TorchExecutor(decoder, decoder.make_cache(-(-most // BLOCK), BLOCK))
    for step in steps:
        peers.noted.clear()
        rows = len(step.input.token_ids)
        received = None if decoder.part.is_first else decoder.new_hidden(rows).zero_()
        hidden = executor.forward(step, received)
        if decoder.part.is_last:
            executor.finish(step, hidden)
        assert peers.noted == executor.exchanges(step)
        assert len(peers.noted) >= 2 * decoder.part.num_layers


def parts(config: ModelConfig, num_stages: int) -> list[ModelPart]:
    """The second share of each stage."""
    layers = [1, config.num_layers - 1] if num_stages == 2 else [config.num_layers]
    return [stage[1] for stage in parts_of(config, layers, 2)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("num_stages", [1, 2])
def test_of_floats(tmp_path: Path, name: str, num_stages: int) -> None:
    save_tiny_model(tmp_path, name.split()[0], vocab_size=321, **MODELS[name])
    config = ModelConfig.from_hf(AutoConfig.from_pretrained(tmp_path).to_dict())
    for part in parts(config, num_stages):
        peers = Noting()
        weights = SafetensorsWeights(tmp_path)
        decoder = Decoder(config, weights, max_positions=256, part=part, peers=peers)
        check(decoder, peers, STEPS)


@pytest.mark.skipif(not is_supported(), reason="no int8 kernels on this CPU")
@pytest.mark.parametrize("num_stages", [1, 2])
def test_of_int8(tmp_path: Path, num_stages: int) -> None:
    """In batches of several slices too."""
    name = next(name for name in INT8_MODELS if name != "heads of 128")
    config, weights = open_weights(save_model(tmp_path, name))
    for part in parts(config, num_stages):
        peers = Noting()
        decoder = Int8Decoder(
            config, weights, max_positions=4096, threads=1, part=part, peers=peers
        )
        check(decoder, peers, [*STEPS, step_of(2100)])
