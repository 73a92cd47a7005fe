"""Parts of every architecture's decoder, together, against the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_parity import BLOCK_SIZE, MAX_MODEL_LEN, MODELS
from thread_stages import Stage
from tiny import save_tiny_model
from transformers import AutoConfig

from stallfree.model.config import ModelConfig
from stallfree.model.decoder import Decoder
from stallfree.model.model_input import ModelInput, Rows
from stallfree.model.part import parts_of
from stallfree.model.weights import SafetensorsWeights

CHUNKS = [(0, 16), (16, 17), (17, 40), *((n, n + 1) for n in range(40, 48))]
BLOCKS = list(range(MAX_MODEL_LEN // BLOCK_SIZE))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("shares", "num_stages"), [(2, 1), (4, 1), (1, 2), (2, 2)])
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
    parts = parts_of(config, layers, shares)
    stages = [Stage(make, of_stage, len(BLOCKS), BLOCK_SIZE) for of_stage in parts]
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
