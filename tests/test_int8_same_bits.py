"""The compiled int8 forward pass gives the same to the last bit in any batch."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from int8_models import BLOCK, MODELS, make_decoder, make_tokens, run, save_model
from test_demo_parity import PROMPTS

from stallfree import LLM, SamplingParams
from stallfree.core.blocks import BlockPool
from stallfree.core.budget import StaticBudget
from stallfree.core.policies import POLICIES
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler, SchedulerConfig
from stallfree.executor.torch_executor import TorchExecutor
from stallfree.model.int8 import is_supported
from stallfree.model.int8_decoder import Int8Decoder
from stallfree.model.model_input import ModelInput, Rows

pytestmark = pytest.mark.skipif(not is_supported(), reason="no int8 kernels on this CPU")

UNBOUNDED = 10_000
CUTS = ([1], [16, 17], [128], [1023, 1024, 1025], [1500, 2047, 2049], [700])
NUM_TOKENS = 24
BLOCKS_OF_ONE = 68  # hold the longest prompt and its answer: 1,050 + 24 tokens


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "groups of 7")


class Mixed:
    """A decoder, and the logits and the greedy answers of prompts that ran alone."""

    def __init__(self, folder: Path) -> None:
        self.decoder = make_decoder(folder)
        self._alone = make_decoder(folder, threads=1)
        self._logits: dict[tuple[int, int], torch.Tensor] = {}
        self._answers: dict[tuple[int, int], list[int]] = {}

    def alone(self, length: int, seed: int) -> torch.Tensor:
        if (length, seed) not in self._logits:
            self._logits[length, seed] = run(self._alone, make_tokens(length, seed), [])
        return self._logits[length, seed]

    def answer_alone(self, length: int, seed: int) -> list[int]:
        if (length, seed) not in self._answers:
            (request,) = serve(self.decoder, [make_tokens(length, seed)])
            self._answers[length, seed] = request.output_token_ids
        return self._answers[length, seed]


@pytest.fixture(scope="module")
def mixed(grouped: Path) -> Mixed:
    return Mixed(grouped)


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
    for seed, ((length, _), answer) in enumerate(zip(prompts, answers(together), strict=True)):
        assert len(answer) == NUM_TOKENS
        assert answer == mixed.answer_alone(length, seed)


@pytest.mark.parametrize("budget", [17, 64, 300])
@pytest.mark.parametrize("policy", ["sarathi", "hybrid_only", "vllm", "simple_chunking"])
def test_greedy_tokens_survive_preemption(mixed: Mixed, policy: str, budget: int) -> None:
    lengths = [90, 95, 110, 125, 30, 290]
    prompts = [make_tokens(length, seed) for seed, length in enumerate(lengths)]
    requests = serve(mixed.decoder, prompts, policy, budget, blocks=20)
    assert sum(request.num_preemptions for request in requests) > 0
    alone = [mixed.answer_alone(length, seed) for seed, length in enumerate(lengths)]
    assert answers(requests) == alone
    assert len({token for answer in alone for token in answer}) > 20


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
