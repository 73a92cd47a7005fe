"""How layers and matrices are split over processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stallfree.errors import ConfigError
from stallfree.model.config import ModelConfig
from stallfree.model.layer_weights import embedding, layer_weights, weight_shapes
from stallfree.model.part import balanced_layers, parts_of
from stallfree.model.weight_reader import WeightReader
from stallfree.model.weights import HeldWeights

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 301,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "attention_bias": True,
}


def config(**fields: Any) -> ModelConfig:
    return ModelConfig.from_hf({**SHAPE, **fields})


def weights_of(shape: ModelConfig) -> HeldWeights:
    made = torch.Generator().manual_seed(0)
    return HeldWeights(
        {name: torch.randn(size, generator=made) for name, size in weight_shapes(shape).items()}
    )


def test_stages_cover_all_layers_in_order() -> None:
    parts = [stage[0] for stage in parts_of(config(), [3, 1, 4])]
    assert [layer for part in parts for layer in part.layers] == list(range(8))
    assert [part.is_first for part in parts] == [True, False, False]
    assert [part.is_last for part in parts] == [False, False, True]


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5, 8])
def test_every_stage_has_a_layer_and_the_output_layer_counts(num_stages: int) -> None:
    plain = balanced_layers(config(), num_stages, rows=64, sampled_rows=1)
    assert sum(plain) == 8
    assert min(plain) >= 1
    heavy = balanced_layers(config(vocab_size=100_000), num_stages, rows=8, sampled_rows=8)
    assert sum(heavy) == 8
    assert min(heavy) >= 1
    assert heavy[-1] == 1 if num_stages > 1 else 8


def test_stages_take_equal_times() -> None:
    # a layer has 64 * (2 * 10 * 8 + 3 * 96) values, the output layer here as many as two of them
    own = config(vocab_size=2 * (2 * 10 * 8 + 3 * 96))
    assert balanced_layers(own, 2, rows=32, sampled_rows=32) == [5, 3]


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_shares_make_up_the_whole(tp_size: int, tied: bool) -> None:
    own = config(tie_word_embeddings=tied)
    weights = weights_of(own)
    readers = [WeightReader(own, weights, part) for part in parts_of(own, [8], tp_size)[0]]
    layer = layer_weights(own, 3)
    x = torch.randn(5, 64)

    def outputs(name: str) -> list[torch.Tensor]:
        projection = getattr(layer, name)
        return [x @ each.weight(projection).T + each.bias(projection) for each in readers]

    whole = x @ weights.tensor(f"{layer.q.name}.weight").T + weights.tensor(f"{layer.q.name}.bias")
    assert torch.allclose(torch.cat(outputs("q"), dim=-1), whole, atol=1e-5)
    keys = x @ weights.tensor(f"{layer.k.name}.weight").T + weights.tensor(f"{layer.k.name}.bias")
    copies = tp_size // 2  # of each of two key heads
    expected = torch.cat([half for half in keys.chunk(2, dim=-1) for _ in range(copies)], dim=-1)
    assert torch.allclose(torch.cat(outputs("k"), dim=-1), expected, atol=1e-5)

    inner = x @ weights.tensor(f"{layer.output.name}.weight").T
    inner += weights.tensor(f"{layer.output.name}.bias")
    parts = x.chunk(tp_size, dim=-1)
    summed = sum(
        part @ each.weight(layer.output).T + each.bias(layer.output)
        for part, each in zip(parts, readers, strict=True)
    )
    assert torch.allclose(torch.as_tensor(summed), inner, atol=1e-5)

    table = torch.cat([each.weight(embedding(own)) for each in readers])
    assert torch.equal(table[:301], weights.tensor("model.embed_tokens.weight"))
    assert not table[301:].any()


def test_a_parameter_is_counted_once() -> None:
    own = config(tie_word_embeddings=True)
    weights = weights_of(own)
    total = sum(weights.tensor(name).numel() for name in weights.names())
    counted = 0
    for stage in parts_of(own, [5, 3], 2):
        for part in stage:
            reader = WeightReader(own, weights, part)
            for name, size in weight_shapes(own).items():
                table = name == "model.embed_tokens.weight"
                if part.owns(name, own) or table or (part.is_last and name == "model.norm.weight"):
                    reader.floats(name, size)
            reader.finish()
            counted += reader.num_parameters
    assert counted == total


@pytest.mark.parametrize(
    ("fields", "tp_size", "reason"),
    [
        ({}, 3, "8 query heads"),
        ({"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96}, 2, "3 key heads"),
        ({"intermediate_size": 97}, 2, "an MLP of 97"),
    ],
)
def test_what_does_not_divide_is_refused(fields: dict[str, Any], tp_size: int, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"tensor_parallel_size is {tp_size}.*{reason}"):
        parts_of(config(**fields), [8], tp_size)
