"""The decoder against transformers, in float32, over every architecture, policy and budget."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import disturb_vectors, save_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from stallfree.core.blocks import BlockPool
from stallfree.core.budget import StaticBudget
from stallfree.core.policies import POLICIES
from stallfree.core.request import Request
from stallfree.core.sampling_params import SamplingParams
from stallfree.core.scheduler import Scheduler, SchedulerConfig
from stallfree.executor.torch_executor import TorchExecutor
from stallfree.model.config import ModelConfig
from stallfree.model.decoder import Decoder
from stallfree.model.model_input import ModelInput, Rows
from stallfree.model.weights import SafetensorsWeights

STEPS = 64
MAX_MODEL_LEN = 128
BLOCK_SIZE = 8
UNBOUNDED = 10_000


def rope(rope_type: str, theta: float = 10_000.0, **parameters: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": theta, **parameters}}


FALCON = {"num_attention_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied, biased": {
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama rope linear": rope("linear", factor=4.0),
    "llama rope dynamic": rope("dynamic", factor=2.0),
    "llama rope llama3": rope(
        "llama3",
        theta=500_000.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    ),
    "llama rope yarn": rope("yarn", factor=4.0, original_max_position_embeddings=64),
    "mistral": {"sliding_window": 20, "head_dim": 32},
    "qwen2": {},
    "qwen2 windows": {
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": {"head_dim": 32},
    "falcon one key head": FALCON,
    "falcon grouped": {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon grouped, one norm": {
        **FALCON,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 1,
        "tie_word_embeddings": False,
        "ffn_hidden_size": 96,
    },
    "falcon in sequence, biased": {
        **FALCON,
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
    },
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 32},
    "mixtral windows": {"num_local_experts": 3, "num_experts_per_tok": 3, "sliding_window": 20},
    "gemma3_text": {
        "head_dim": 32,
        "num_hidden_layers": 4,
        "sliding_window": 16,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 48,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "tie_word_embeddings": False,  # else few tokens are likely
    },
}


@dataclass
class Reference:
    """A model of transformers, and ours with the same weights."""

    model: Any
    decoder: Decoder

    def likeliest(self, tokens: Sequence[int], count: int) -> list[int]:
        """What transformers finds likeliest after all before each of the last `count` tokens."""
        with torch.inference_mode():
            logits = self.model(torch.tensor([tokens[:-1]])).logits[0, -count:]
        found: list[int] = logits.argmax(dim=-1).tolist()
        return found


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=MODELS)
def reference(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Reference:
    return load(tmp_path_factory.mktemp("model"), request.param)


def load(folder: Path, name: str, **extra: Any) -> Reference:
    save_tiny_model(
        folder, name.split()[0], vocab_size=320, initializer_range=0.2, **MODELS[name], **extra
    )
    disturb_vectors(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = ModelConfig.from_hf(AutoConfig.from_pretrained(folder).to_dict())
    decoder = Decoder(config, SafetensorsWeights(folder), max_positions=MAX_MODEL_LEN)
    assert decoder.num_parameters == model.num_parameters()
    return Reference(model, decoder)


def make_prompts(vocab_size: int) -> list[list[int]]:
    rng = random.Random(7)
    lengths = [1, 2, 3, 7, 8, 9, 15, 16, 17, 24, 31, 33, 40, 47, 55, 60]
    return [[rng.randrange(vocab_size) for _ in range(length)] for length in lengths]


def run_chunked(decoder: Decoder, tokens: Sequence[int], cuts: Sequence[int]) -> torch.Tensor:
    """Logits (T, V) of a prompt run in chunks that end at `cuts`, over scattered blocks."""
    num_blocks = -(-len(tokens) // BLOCK_SIZE)
    cache = decoder.make_cache(2 * num_blocks, BLOCK_SIZE)
    blocks = random.Random(3).sample(range(2 * num_blocks), num_blocks)
    logits = []
    for start, stop in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        batch = ModelInput(tokens[start:stop], [Rows(0, start, stop, blocks)])
        logits.append(decoder.logits(decoder.forward(batch, cache)))
    return torch.cat(logits)


@pytest.mark.parametrize("cuts", [[], [1], [32], [5, 6, 50], list(range(1, 100))])
def test_logits_match(reference: Reference, cuts: list[int]) -> None:
    tokens = [random.Random(1).randrange(320) for _ in range(100)]
    with torch.inference_mode():
        expected = reference.model(torch.tensor([tokens])).logits[0]
        actual = run_chunked(reference.decoder, tokens, cuts)
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


def serve(
    decoder: Decoder, prompts: list[list[int]], policy: str, budget: int, num_blocks: int
) -> list[Request]:
    """Run all prompts together to their ends."""
    config = SchedulerConfig(policy, max_num_seqs=16, max_model_len=MAX_MODEL_LEN)
    scheduler = Scheduler(config, BlockPool(num_blocks, BLOCK_SIZE), StaticBudget(budget))
    executor = TorchExecutor(decoder, decoder.make_cache(num_blocks, BLOCK_SIZE))
    params = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True)
    requests = [
        Request(str(index), prompt, params, max_tokens=STEPS)
        for index, prompt in enumerate(prompts)
    ]
    for request in requests:
        scheduler.add(request)
    while (batch := scheduler.schedule()) is not None:
        output = executor.execute(batch)
        scheduler.complete(batch, [sample.token_id for sample in output.samples])
    scheduler.check_integrity()
    return requests


@pytest.mark.slow
def test_greedy_tokens_match_under_every_policy_and_budget(reference: Reference) -> None:
    """Greedy by induction: each token is the likeliest one after those before it."""
    prompts = make_prompts(320)
    expected: list[list[int]] = []
    for name, policy in POLICIES.items():
        for budget in (1, 7, 64, UNBOUNDED) if policy.keeps_budget else (UNBOUNDED,):
            requests = serve(reference.decoder, prompts, name, budget, num_blocks=40)
            actual = [request.output_token_ids for request in requests]
            expected = expected or actual
            assert actual == expected, (name, budget)
            num_preemptions = sum(request.num_preemptions for request in requests)
            if not policy.reserves_context and budget >= 64:
                assert num_preemptions > 0, (name, budget)
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert reference.likeliest([*prompt, *tokens], STEPS) == tokens
    assert len({token for tokens in expected for token in tokens}) > 50


def test_dynamic_rope_is_settled_for_the_longest_context(tmp_path: Path) -> None:
    """Past the trained context, the angles are those transformers has at the longest length."""
    reference = load(tmp_path, "llama rope dynamic", max_position_embeddings=64)
    tokens = [random.Random(2).randrange(320) for _ in range(MAX_MODEL_LEN)]
    with torch.inference_mode():
        expected = reference.model(torch.tensor([tokens])).logits[0]
        actual = run_chunked(reference.decoder, tokens, [10, 100])
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_long_chunks_are_cut_into_spans(tmp_path: Path) -> None:
    reference = load(tmp_path, "mistral")
    decoder = Decoder(reference.decoder.config, SafetensorsWeights(tmp_path), max_positions=1200)
    tokens = [random.Random(2).randrange(320) for _ in range(1200)]
    with torch.inference_mode():
        expected = reference.model(torch.tensor([tokens])).logits[0]
        actual = run_chunked(decoder, tokens, [50])
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()
