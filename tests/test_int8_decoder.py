"""The compiled int8 forward pass: right, and the same to the last bit in any batch."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_demo_parity import PROMPTS
from tiny import save_tiny_model

from stallfree import LLM, SamplingParams
from stallfree.core.blocks import BlockPool
from stallfree.core.budget import StaticBudget
from stallfree.core.policies import POLICIES
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler, SchedulerConfig
from stallfree.executor.torch_executor import TorchExecutor
from stallfree.kernels import layers
from stallfree.kernels.int8_matmul import LEVELS, PANEL, corrections_of, pack, padded
from stallfree.model.config import ModelConfig
from stallfree.model.decoder import Decoder
from stallfree.model.int8 import is_supported
from stallfree.model.int8_cache import HeldWeights, int8_weights
from stallfree.model.int8_decoder import Int8Decoder
from stallfree.model.model_input import ModelInput, Rows
from stallfree.model.weight_reader import SCALES
from stallfree.model.weights import SafetensorsWeights, WeightSource, read_json

pytestmark = pytest.mark.skipif(not is_supported(), reason="no int8 kernels on this CPU")

BLOCK = 16
UNBOUNDED = 10_000
VOCABULARY = 320
MODELS = {  # name: architecture and what differs from the tiny model's shape
    "one head a key": ("llama", {"num_key_value_heads": 4}),
    "heads of 20": ("qwen3", {"head_dim": 20}),
    "heads of 128": ("llama", {"head_dim": 128, "num_hidden_layers": 1}),
    "groups of 7": ("qwen2", {"num_attention_heads": 14, "hidden_size": 112}),
    "groups of 8": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 1}),
    "odd sizes": ("llama", {"hidden_size": 72, "intermediate_size": 100, "head_dim": 18}),
    "sliding window": ("mistral", {"sliding_window": 40}),
}


def open_weights(folder: Path) -> tuple[ModelConfig, WeightSource]:
    config = ModelConfig.from_hf(read_json(folder / "config.json"))
    return config, int8_weights(folder, SafetensorsWeights(folder))


def make_decoder(folder: Path, threads: int = 2, dtype: str = "float16") -> Int8Decoder:
    config, weights = open_weights(folder)
    kv_dtype: torch.dtype = getattr(torch, dtype)
    return Int8Decoder(config, weights, max_positions=4096, threads=threads, kv_dtype=kv_dtype)


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, shape = MODELS[request.param]
    return save_tiny_model(
        tmp_path_factory.mktemp("model"),
        architecture,
        vocab_size=VOCABULARY,
        initializer_range=0.2,
        **shape,
    )


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, shape = MODELS["groups of 7"]
    return save_tiny_model(
        tmp_path_factory.mktemp("model"),
        architecture,
        vocab_size=VOCABULARY,
        initializer_range=0.2,
        **shape,
    )


def make_tokens(count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCABULARY) for _ in range(count)]


def make_blocks(count: int, seed: int = 0) -> list[int]:
    """Scattered blocks for `count` tokens."""
    needed = -(-count // BLOCK)
    return random.Random(seed).sample(range(2 * needed), needed)


def run(decoder: Decoder | Int8Decoder, tokens: Sequence[int], cuts: Sequence[int]) -> torch.Tensor:
    """Logits (T, V) of a prompt run in chunks that end at `cuts`."""
    blocks = make_blocks(len(tokens))
    cache = decoder.make_cache(2 * len(blocks), BLOCK)
    logits = []
    for start, stop in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        batch = ModelInput(tokens[start:stop], [Rows(0, start, stop, blocks)])
        with torch.inference_mode():
            hidden = decoder.forward(batch, cache)  # type: ignore[arg-type]
            logits.append(decoder.logits(hidden).clone())
    return torch.cat(logits)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 20),
    inputs=st.integers(1, 200),
    outputs=st.integers(1, 150),
    seed=st.integers(0, 1000),
    worst=st.booleans(),
)
def test_products_are_exact(rows: int, inputs: int, outputs: int, seed: int, worst: bool) -> None:
    """Against 64-bit sums of what the kernel must have rounded its rows to."""
    rng = np.random.default_rng(seed)
    width = padded(inputs, PANEL)
    hidden = torch.zeros((rows, width)).numpy()
    weight = torch.zeros((padded(outputs, PANEL), inputs), dtype=torch.int8)
    if worst:
        hidden[:, :inputs] = rng.choice([-1.0, 1.0], (rows, inputs))
        weight[:outputs] = torch.from_numpy(rng.choice([-127, 127], (outputs, inputs)))
    else:
        hidden[:, :inputs] = rng.standard_normal((rows, inputs))
        weight[:outputs] = torch.from_numpy(rng.integers(-127, 128, (outputs, inputs)))
    packed = torch.empty((len(weight) // PANEL, width * PANEL), dtype=torch.int8)
    pack(weight, width, packed)
    ones = np.ones(len(weight), dtype=np.float32)
    head = layers.Product(packed.numpy(), ones, corrections_of(2, packed.numpy()), ones[:0])
    shape = layers.Shape(inputs, width, 1, 1, 16, 16, np.float32(0), np.float32(1))
    out = np.empty((rows, len(weight)), dtype=np.float32)
    norm = np.ones(width, dtype=np.float32)
    layers.run_logits(2, hidden, norm, head, shape, out, make_scratch(rows, width))

    normed = hidden / np.sqrt((hidden**2).sum(axis=1, keepdims=True) / np.float32(inputs))
    most = np.abs(normed).max(axis=1, keepdims=True)
    levels = normed * (np.float32(LEVELS) / most)
    sums = np.rint(levels).astype(np.int64)[:, :inputs] @ weight.numpy().astype(np.int64).T
    nearly_half = np.abs(np.abs(levels - np.trunc(levels)) - 0.5).min(axis=1) < 1e-3
    steps = out / (most / LEVELS)
    slack = np.where(nearly_half, 127.0, 0.0)[:, None]  # one activation may round either way
    assert (np.abs(steps - sums) <= slack + 1e-5 * np.abs(sums) + 0.05).all()
    assert not out[:, outputs:].any()


def make_scratch(rows: int, width: int) -> layers.Scratch:
    """As much as `run_logits` needs."""
    nothing = np.zeros((2, 1), dtype=np.float32)
    flat = nothing[0]
    return layers.Scratch(
        hidden=flat,
        activations=torch.zeros(padded(rows, 6) * width, dtype=torch.uint8).numpy(),
        scales=np.zeros(padded(rows, 6), dtype=np.float32),
        wide=flat,
        queries=flat,
        attended=flat,
        part=flat,
        part_sums=flat,
        part_tops=flat,
        counter=np.zeros(1, dtype=np.int64),
        barrier=np.zeros(16, dtype=np.int64),
        thread_sums=torch.zeros((2, 6 * PANEL), dtype=torch.int32).numpy(),
        thread_row=torch.zeros((2, width)).numpy(),
        thread_queries=nothing,
        thread_out=nothing,
        thread_total=nothing,
        thread_stats=np.zeros((2, 1, 1), dtype=np.float32),
        thread_weights=nothing,
        thread_scores=nothing,
        thread_places=np.zeros((2, 1), dtype=np.int64),
    )


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_it_computes_what_the_float_decoder_does(folder: Path, dtype: str) -> None:
    """With the same rounded weights; what is left is the rounding of activations."""
    config, weights = open_weights(folder)
    floats = {}
    for name in weights.names():
        if not name.endswith(SCALES):
            tensor = weights.tensor(name)
            is_int8 = tensor.dtype == torch.int8
            floats[name] = tensor * weights.tensor(name + SCALES)[:, None] if is_int8 else tensor
    reference = Decoder(config, HeldWeights(floats), max_positions=4096)
    tokens = make_tokens(300)
    expected = run(reference, tokens, [100])
    actual = run(make_decoder(folder, dtype=dtype), tokens, [100])
    errors = (actual - expected).norm(dim=1) / expected.norm(dim=1)
    # Of vectors of random weights: a misplaced head, key or column gives errors near 1.
    assert errors.median() < 0.06
    assert errors[-100:].mean() < 0.12


CUTS = ([1], [16, 17], [128], [1023, 1024, 1025], [1500, 2047, 2049], [700])


def test_logits_are_the_same_bits_however_a_prompt_is_cut(folder: Path) -> None:
    """Over the borders of blocks, stretches (128 keys) and splits (1,024 keys)."""
    decoder = make_decoder(folder)
    tokens = make_tokens(2100)
    whole = run(decoder, tokens, [])
    for cuts in CUTS:
        assert torch.equal(run(decoder, tokens, cuts), whole), cuts
    by_ones = run(decoder, tokens, [*range(2040, 2100)])  # each a decode of three splits
    assert torch.equal(by_ones, whole)


def test_logits_are_the_same_bits_with_any_number_of_threads(grouped: Path) -> None:
    tokens = make_tokens(1100)
    first, *others = (
        run(make_decoder(grouped, threads), tokens, [1090, 1099]) for threads in (1, 2, 3)
    )
    for other in others:
        assert torch.equal(first, other)


def test_logits_are_the_same_bits_beside_other_requests(grouped: Path) -> None:
    decoder = make_decoder(grouped)
    lengths = [5, 40, 17, 1300, 1, 129]
    alone = [run(decoder, make_tokens(n, n), [n - 1] if n > 1 else [])[-1] for n in lengths]
    cache = decoder.make_cache(200, BLOCK)
    blocks = iter(random.Random(1).sample(range(200), 200))
    tables = [[next(blocks) for _ in range(-(-n // BLOCK))] for n in lengths]
    for stops in ([n - 1 for n in lengths], lengths):
        token_ids: list[int] = []
        chunks = []
        for n, stop, table in zip(lengths, stops, tables, strict=True):
            start = stop - 1 if stop == n else 0
            if stop > start:
                chunks.append(Rows(len(token_ids), start, stop, table))
                token_ids += make_tokens(n, n)[start:stop]
        hidden = decoder.forward(ModelInput(token_ids, chunks), cache)
    together = decoder.logits(hidden)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


def serve(
    decoder: Int8Decoder, prompts: Sequence[Sequence[int]], policy: str, budget: int, blocks: int
) -> list[list[int]]:
    """Greedy answers of 8 tokens to prompts that run together."""
    scheduler = Scheduler(
        SchedulerConfig(policy, max_num_seqs=16, max_model_len=1600),
        BlockPool(blocks, BLOCK),
        StaticBudget(budget),
    )
    executor = TorchExecutor(decoder, decoder.make_cache(blocks, BLOCK))
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    requests = [Request(str(i), list(p), params, max_tokens=8) for i, p in enumerate(prompts)]
    for request in requests:
        scheduler.add(request)
    while (batch := scheduler.schedule()) is not None:
        output = executor.execute(batch)
        scheduler.complete(batch, [sample.token_id for sample in output.samples])
    scheduler.check_integrity()
    return [request.output_token_ids for request in requests]


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    policy=st.sampled_from(sorted(POLICIES)),
    budget=st.sampled_from([1, 5, 17, 64, 300]),
    lengths=st.lists(st.sampled_from([1, 3, 16, 50, 200, 1050]), min_size=2, max_size=6),
    blocks=st.sampled_from([101, 400]),
)
def test_greedy_tokens_do_not_depend_on_what_else_runs(
    grouped: Path, policy: str, budget: int, lengths: list[int], blocks: int
) -> None:
    decoder = make_decoder(grouped)
    prompts = [make_tokens(length, seed) for seed, length in enumerate(lengths)]
    budget = budget if POLICIES[policy].keeps_budget else UNBOUNDED
    alone = [serve(decoder, [prompt], "hybrid_only", UNBOUNDED, 101)[0] for prompt in prompts]
    assert serve(decoder, prompts, policy, budget, blocks) == alone


@pytest.mark.model
@pytest.mark.slow
def test_the_demo_answers_the_same_in_any_batch() -> None:
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    answers = []
    for scheduler, budget, requests in (
        ("hybrid_only", None, 1),
        ("sarathi", 17, 20),
        ("vllm", None, 7),
    ):
        llm = LLM(
            scheduler=scheduler,
            token_budget=budget,
            max_num_seqs=requests,
            dtype="int8",
            kv_cache_memory_bytes=1 << 28,
        )
        outputs = llm.generate(PROMPTS, params, use_progress_bar=False)
        answers.append([output.outputs[0].token_ids for output in outputs])
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.slow
def test_the_kernels_of_older_processors_are_right_too(grouped: Path, tmp_path: Path) -> None:
    """AVX2 without VNNI: other instructions, 7-bit activations; compiled here, run here."""
    wanted = ("avx2", "fma", "f16c", "avx", "sse4.2", "sse4.1", "ssse3", "sse3", "sse2", "popcnt")
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": ",".join(f"+{feature}" for feature in wanted),
        "STALLFREE_CACHE": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).parent),
    }
    code = (
        "import sys, pathlib, torch, test_int8_decoder as t\n"
        "from stallfree.kernels.int8_matmul import LEVELS\n"
        "assert LEVELS == 63\n"
        "t.test_products_are_exact()\n"
        "d = t.make_decoder(pathlib.Path(sys.argv[1]))\n"
        "tokens = t.make_tokens(1100)\n"
        "whole = t.run(d, tokens, [])\n"
        "assert torch.equal(t.run(d, tokens, [3, 200, 1098]), whole)\n"
        "torch.save(whole, sys.argv[2])\n"
    )
    made = tmp_path / "logits.pt"
    subprocess.run(
        [sys.executable, "-c", code, str(grouped), str(made)], env=environment, check=True
    )
    ours = run(make_decoder(grouped), make_tokens(1100), [])
    theirs = torch.load(made)
    errors = (ours - theirs).norm(dim=1) / ours.norm(dim=1)
    assert errors.median() < 0.2  # 7-bit activations; near 1 if anything is misplaced
