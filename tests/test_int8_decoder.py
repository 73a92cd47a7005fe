"""The compiled int8 forward pass is right: near floats in every shape, never silently wrong."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from int8_models import (
    MODELS,
    STOPS,
    attention_errors,
    make_decoder,
    make_tokens,
    open_weights,
    relative_errors,
    run,
    save_model,
)
from safetensors.torch import load_file, save_file
from tiny import save_tiny_model

from stallfree import LLM, SamplingParams
from stallfree.kernels.int8_matmul import LEVELS
from stallfree.model.decoder import Decoder
from stallfree.model.int8 import is_supported
from stallfree.model.int8_cache import HeldWeights
from stallfree.model.linear import Linear
from stallfree.model.weight_reader import SCALES

pytestmark = pytest.mark.skipif(not is_supported(), reason="no int8 kernels on this CPU")


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), request.param)


def open_floats(folder: Path) -> Decoder:
    """The float decoder, of what the rounded weights stand for."""
    config, weights = open_weights(folder)
    floats = {}
    for name in weights.names():
        if not name.endswith(SCALES):
            tensor = weights.tensor(name)
            is_int8 = tensor.dtype == torch.int8
            floats[name] = tensor * weights.tensor(name + SCALES)[:, None] if is_int8 else tensor
    return Decoder(config, HeldWeights(floats), max_positions=4096)


def test_it_is_near_the_float_decoder(folder: Path) -> None:
    """With the same rounded weights; what is left is the rounding of activations and keys."""
    tokens = make_tokens(300)
    expected = run(open_floats(folder), tokens, [100])
    errors = relative_errors(run(make_decoder(folder), tokens, [100]), expected)
    assert errors.median() < 0.1
    assert errors.max() < 0.3


def rounding_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    def multiply(x: torch.Tensor) -> torch.Tensor:
        top = x.amax(dim=-1, keepdim=True).clamp_min(0)
        reach = top + (-x.amin(dim=-1, keepdim=True)).clamp_min(0)
        return F.linear((x * (LEVELS / reach)).round() * (reach / LEVELS), weight, bias)

    return multiply


def test_it_is_the_float_decoder_with_rounded_activations(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some values lie so near the middle of two levels that they are rounded the other way.

    What follows from such a value differs by a few percent, and the longer the context, the more
    does; the rest agrees to float32.
    """
    monkeypatch.setattr("stallfree.model.decoder.make_linear", rounding_linear)
    reference, decoder = open_floats(folder), make_decoder(folder, dtype="float32")
    ends = []
    for seed in range(20):
        tokens = make_tokens(6, seed)
        ends.append(relative_errors(run(decoder, tokens, [4]), run(reference, tokens, []))[-1])
    assert torch.stack(ends).median() < 3e-6
    tokens = make_tokens(300)
    errors = relative_errors(run(decoder, tokens, [100]), run(reference, tokens, []))
    assert errors.mean() < 0.03


@pytest.mark.parametrize("block_size", [16, 48])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_attention_is_right_to_float32(folder: Path, dtype: str, block_size: int) -> None:
    """Over the borders of stretches and splits; a key missed or seen twice is 1 / stop.

    A weight near the middle of two numbers of bfloat16 may be rounded the other way: by 1/256.
    """
    decoder = make_decoder(folder, dtype=dtype)
    errors = attention_errors(decoder, make_tokens(2100), block_size, STOPS)
    rounded = 0.5 if dtype == "bfloat16" else 0.0
    for stop, error in zip(STOPS, errors, strict=True):
        assert error < 1e-5 + rounded / stop


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "lm_head.weight",
    ],
)
def test_weights_that_are_no_numbers_give_no_answer(tmp_path: Path, name: str, bad: float) -> None:
    """A request that meets one fails; one beside it that does not meet it is answered."""
    folder = save_tiny_model(tmp_path, "llama", initializer_range=0.2)
    expected = generate(folder, {"good": [300, 301, 302]})["good"]
    weights = load_file(folder / "model.safetensors")
    weights[name].view(len(weights[name]), -1)[7, 0] = bad
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    made = generate(folder, {"bad": [300, 7, 301], "good": [300, 301, 302]})
    refused = ["the model gave logits that are not finite numbers"]
    assert made["bad"] == refused
    assert made["good"] == (expected if name == "model.embed_tokens.weight" else refused)


@pytest.mark.parametrize("kv_cache_dtype", ["bfloat16", "float32"])
def test_biases_that_are_no_numbers_give_no_answer(tmp_path: Path, kv_cache_dtype: str) -> None:
    folder = save_tiny_model(tmp_path, "qwen2", initializer_range=0.2)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.v_proj.bias"][3] = math.inf
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    made = generate(folder, {"bad": [300, 301, 302]}, kv_cache_dtype)
    assert made["bad"] == ["the model gave logits that are not finite numbers"]


def generate(
    folder: Path, prompts: dict[str, list[int]], kv_cache_dtype: str = "auto"
) -> dict[str, list[int | str]]:
    """The tokens of each, in one batch, and what went wrong."""
    engine = LLM(str(folder), kv_cache_memory_bytes=1 << 20, kv_cache_dtype=kv_cache_dtype).engine
    for name, prompt in prompts.items():
        engine.add(name, prompt, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    made: dict[str, list[int | str]] = {name: [] for name in prompts}
    while engine.has_requests:
        for delta in engine.step():
            made[delta.request_id] += (
                [*delta.token_ids] if delta.error is None else [str(delta.error)]
            )
    return made
