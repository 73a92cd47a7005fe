"""The compiled int8 forward pass: right, and the same to the last bit in any batch."""

from __future__ import annotations

import itertools
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_demo_parity import PROMPTS
from tiny import save_tiny_model

from stallfree import LLM, SamplingParams
from stallfree.core.blocks import BlockPool
from stallfree.core.budget import StaticBudget
from stallfree.core.policies import POLICIES
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler, SchedulerConfig
from stallfree.executor.torch_executor import TorchExecutor
from stallfree.kernels.int8_matmul import LEVELS, padded
from stallfree.kernels.ir import LANES
from stallfree.model.config import ModelConfig
from stallfree.model.decoder import Decoder
from stallfree.model.int8 import is_supported
from stallfree.model.int8_cache import HeldWeights, int8_weights
from stallfree.model.int8_decoder import Int8Decoder
from stallfree.model.linear import Linear
from stallfree.model.model_input import ModelInput, Rows
from stallfree.model.weight_reader import SCALES
from stallfree.model.weights import SafetensorsWeights, WeightSource, read_json

pytestmark = pytest.mark.skipif(not is_supported(), reason="no int8 kernels on this CPU")

BLOCK = 16
UNBOUNDED = 10_000
VOCABULARY = 320
MODELS = {  # name: architecture and what differs from the tiny model's shape
    "one head a key": ("llama", {"num_key_value_heads": 4}),
    "heads of 8": ("llama", {"head_dim": 8}),
    "heads of 20": ("qwen3", {"head_dim": 20}),
    "heads of 80": ("llama", {"head_dim": 80}),
    "heads of 128": ("llama", {"head_dim": 128, "num_hidden_layers": 1}),
    "groups of 4, biases": (
        "llama",
        {
            "num_attention_heads": 8,
            "head_dim": 64,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "groups of 7": ("qwen2", {"num_attention_heads": 14, "hidden_size": 112}),
    "groups of 8": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 1}),
    "odd sizes": ("llama", {"hidden_size": 72, "intermediate_size": 100, "head_dim": 18}),
    "sliding window": ("mistral", {"sliding_window": 40}),
    "window in one layer": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 150, "max_window_layers": 1},
    ),
}


def save_model(folder: Path, name: str) -> Path:
    """Save one of `MODELS`; transformers makes all norms ones and all biases zeros: not so here."""
    architecture, shape = MODELS[name]
    save_tiny_model(folder, architecture, vocab_size=VOCABULARY, initializer_range=0.2, **shape)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for weight in weights.values():
        if weight.dim() == 1:
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def open_weights(folder: Path) -> tuple[ModelConfig, WeightSource]:
    config = ModelConfig.from_hf(read_json(folder / "config.json"))
    return config, int8_weights(folder, SafetensorsWeights(folder))


def make_decoder(folder: Path, threads: int = 2, dtype: str = "float16") -> Int8Decoder:
    config, weights = open_weights(folder)
    kv_dtype: torch.dtype = getattr(torch, dtype)
    return Int8Decoder(config, weights, max_positions=4096, threads=threads, kv_dtype=kv_dtype)


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "groups of 7")


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


def relative_errors(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Of each row, against its length; a misplaced head, key or column gives errors near 1."""
    return (actual - expected).norm(dim=1) / expected.norm(dim=1)


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


def attention_errors(
    decoder: Int8Decoder, tokens: Sequence[int], block_size: int, stops: Sequence[int]
) -> Iterator[float]:
    """What is wrong with the last layer's attention in each of the chunks that end at `stops`.

    From the kernels' own queries, keys and values, in float64. Memory that holds no keys or values
    yet is NaN: it must not count.
    """
    config, num_blocks = decoder.config, -(-len(tokens) // block_size)
    heads, kv_heads, depth = config.num_heads, config.num_kv_heads, config.head_dim
    blocks = random.Random(0).sample(range(2 * num_blocks), num_blocks)
    cache = decoder.make_cache(2 * num_blocks, block_size)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    for start, stop in itertools.pairwise([0, *stops]):
        chunk = Rows(0, start, stop, blocks)
        count = len(decoder.forward(ModelInput(tokens[start:stop], [chunk]), cache))
        rows = torch.linspace(0, count - 1, min(count, 50)).long()
        scratch = decoder._scratch
        queries = torch.from_numpy(scratch.queries)[: count * heads * depth].double()
        queries = queries.view(count, kv_heads, -1, depth)[rows]
        attended = torch.from_numpy(scratch.attended).view(-1, padded(heads * depth, LANES))
        groups, lanes = (chunk.slots(block_size) // LANES, chunk.slots(block_size) % LANES)
        keys = cache.keys[-1].double().view(-1, kv_heads, depth, LANES)[groups, :, :, lanes]
        values = cache.values[-1].double().view(-1, kv_heads, LANES, padded(depth, LANES))
        values = values[groups, :, lanes, :depth]
        scores = torch.einsum("tkgd,skd->kgts", queries, keys) * math.log(2)  # of powers of 2
        places, at = torch.arange(stop), (start + rows)[:, None]
        seen = (places <= at) & (places > at - (config.sliding_windows[-1] or stop))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
        expected = torch.einsum("kgts,skd->tkgd", weights, values).flatten(1)
        error = (attended[rows, : heads * depth] - expected).abs().max() / values.abs().max()
        yield float(error)


STOPS = [1, 5, 16, 133, 1000, 1030, 2047, 2048, 2049, 2050, 2100]


@pytest.mark.parametrize("block_size", [16, 48])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_attention_is_right_to_float32(folder: Path, dtype: str, block_size: int) -> None:
    """Over the borders of stretches and splits; a key missed or seen twice is 1/2,100."""
    decoder = make_decoder(folder, dtype=dtype)
    errors = list(attention_errors(decoder, make_tokens(2100), block_size, STOPS))
    assert len(errors) == len(STOPS)
    assert max(errors) < 1e-5


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


def test_logits_are_the_same_bits_whatever_ran_before(grouped: Path) -> None:
    """Scratch memory grows with rows and splits, and holds what earlier batches left."""
    used = make_decoder(grouped)
    lengths: dict[int, list[int]] = {3: [], 1100: [1099], 70: [], 2100: [2090, 2099], 2101: []}
    for length, cuts in lengths.items():
        tokens = make_tokens(length, length)
        assert torch.equal(run(used, tokens, cuts), run(make_decoder(grouped), tokens, cuts))


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.sampled_from([1, 5, 17, 40, 129, 700, 1300]), min_size=2, max_size=6),
    rng=st.randoms(use_true_random=False),
)
def test_logits_are_the_same_bits_in_any_mix_of_chunks(
    mixed: Mixed, lengths: list[int], rng: random.Random
) -> None:
    """Prompts cut anywhere, in batches that hold a chunk each of some of them, in any order."""
    decoder = mixed.decoder
    prompts = [make_tokens(length, index) for index, length in enumerate(lengths)]
    needed = [-(-length // BLOCK) for length in lengths]
    free = rng.sample(range(sum(needed)), sum(needed))
    tables = [[free.pop() for _ in range(count)] for count in needed]
    cache = decoder.make_cache(sum(needed), BLOCK)
    done = [0] * len(prompts)
    while unfinished := [i for i, length in enumerate(lengths) if done[i] < length]:
        token_ids: list[int] = []
        chunks, expected = [], []
        for i in rng.sample(unfinished, rng.randint(1, len(unfinished))):
            start = done[i]
            stop = min(lengths[i], start + rng.choice([1, 1, 2, 16, 100, 1024, 1299]))
            chunks.append(Rows(len(token_ids), start, stop, tables[i]))
            token_ids += prompts[i][start:stop]
            expected.append(mixed.alone(lengths[i], i)[start:stop])
            done[i] = stop
        logits = decoder.logits(decoder.forward(ModelInput(token_ids, chunks), cache))
        assert torch.equal(logits, torch.cat(expected))


class Mixed:
    """A decoder, and the logits of prompts that it ran alone."""

    def __init__(self, folder: Path) -> None:
        self.decoder = make_decoder(folder)
        self._alone = make_decoder(folder, threads=1)
        self._logits: dict[tuple[int, int], torch.Tensor] = {}

    def alone(self, length: int, seed: int) -> torch.Tensor:
        if (length, seed) not in self._logits:
            self._logits[length, seed] = run(self._alone, make_tokens(length, seed), [])
        return self._logits[length, seed]


@pytest.fixture(scope="module")
def mixed(grouped: Path) -> Mixed:
    return Mixed(grouped)


NUM_TOKENS = 24
BLOCKS_OF_ONE = 68  # hold the longest prompt and its answer: 1,050 + 24 tokens


def serve(
    decoder: Int8Decoder,
    prompts: Sequence[Sequence[int]],
    policy: str = "hybrid_only",
    budget: int = UNBOUNDED,
    blocks: int = BLOCKS_OF_ONE,
    arrivals: Sequence[int] = (),
) -> list[Request]:
    """Greedy answers to prompts; each arrives before the batch that `arrivals` says, or at once."""
    scheduler = Scheduler(
        SchedulerConfig(policy, max_num_seqs=16, max_model_len=blocks * BLOCK),
        BlockPool(blocks, BLOCK),
        StaticBudget(budget),
    )
    executor = TorchExecutor(decoder, decoder.make_cache(blocks, BLOCK))
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    requests = [
        Request(str(i), list(p), params, max_tokens=NUM_TOKENS) for i, p in enumerate(prompts)
    ]
    late = sorted(zip(arrivals or [0] * len(prompts), requests, strict=True), key=lambda x: x[0])
    for step in itertools.count():
        while late and late[0][0] <= step:
            scheduler.add(late.pop(0)[1])
        batch = scheduler.schedule()
        if batch is not None:
            output = executor.execute(batch)
            scheduler.complete(batch, [sample.token_id for sample in output.samples])
        elif not late:
            break
    scheduler.check_integrity()
    return requests


def answers(requests: Sequence[Request]) -> list[list[int]]:
    return [request.output_token_ids for request in requests]


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    policy=st.sampled_from(sorted(POLICIES)),
    budget=st.sampled_from([1, 5, 17, 64, 300]),
    prompts=st.lists(
        st.tuples(st.sampled_from([1, 3, 16, 50, 200, 1020, 1050]), st.integers(0, 30)),
        min_size=2,
        max_size=6,
    ),
    blocks=st.sampled_from([BLOCKS_OF_ONE, 2 * BLOCKS_OF_ONE, 400]),
)
def test_greedy_tokens_do_not_depend_on_what_else_runs(
    mixed: Mixed, policy: str, budget: int, prompts: list[tuple[int, int]], blocks: int
) -> None:
    tokens = [make_tokens(length, seed) for seed, (length, _) in enumerate(prompts)]
    arrivals = [arrival for _, arrival in prompts]
    budget = budget if POLICIES[policy].keeps_budget else UNBOUNDED
    together = serve(mixed.decoder, tokens, policy, budget, blocks, arrivals)
    for prompt, answer in zip(tokens, answers(together), strict=True):
        assert len(answer) == NUM_TOKENS
        assert answers(serve(mixed.decoder, [prompt])) == [answer]


@pytest.mark.parametrize("budget", [17, 64, 300])
@pytest.mark.parametrize("policy", ["sarathi", "hybrid_only", "vllm", "simple_chunking"])
def test_greedy_tokens_survive_preemption(mixed: Mixed, policy: str, budget: int) -> None:
    prompts = [make_tokens(length, seed) for seed, length in enumerate([90, 95, 110, 125, 30, 290])]
    requests = serve(mixed.decoder, prompts, policy, budget, blocks=20)
    assert sum(request.num_preemptions for request in requests) > 0
    alone = [serve(mixed.decoder, [prompt])[0] for prompt in prompts]
    assert answers(requests) == answers(alone)
    assert len({token for answer in answers(alone) for token in answer}) > 20


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


@pytest.mark.parametrize("kv_cache_dtype", ["float16", "float32"])
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
            made[delta.request_id] += [*delta.token_ids] if delta.error is None else [delta.error]
    return made


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
    """AVX2 without VNNI: other instructions, 7-bit weights; compiled here, run here."""
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
        "import test_kernels as k\n"
        "assert k.WEIGHT_LEVELS == 63\n"
        "k.test_sums_of_products_are_exact()\n"
        "k.test_the_largest_sums_are_exact(255, 0, -63)\n"
        "k.test_rows_are_normed_and_rounded_to_the_nearest_level()\n"
        "d = t.make_decoder(pathlib.Path(sys.argv[1]))\n"
        "errors = t.attention_errors(d, t.make_tokens(2100), 16, t.STOPS)\n"
        "assert max(errors) < 1e-5\n"
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
    assert errors.median() < 0.2  # near 1 if anything is misplaced
