"""Int8 layers that several processes share give what one process gives, to the last bit."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from int8_models import BLOCK, MODELS, make_blocks, make_tokens, open_weights, save_model
from safetensors.torch import load_file, save_file
from thread_stages import Stage

from stallfree.model.int8 import is_supported
from stallfree.model.int8_decoder import Int8Decoder
from stallfree.model.model_input import ModelInput, Rows
from stallfree.model.part import ModelPart, parts_of
from stallfree.model.peers import Alone, LostContactError, Peers

pytestmark = pytest.mark.skipif(not is_supported(), reason="no int8 kernels on this CPU")

LENGTHS = (1100, 60, 9)  # of sequences; contexts of more than 1,024 keys are cut in splits
BATCHES = [  # which tokens of each sequence
    [(0, 0, 300)],
    [(0, 300, 1085), (1, 0, 16)],
    [(1, 16, 41), (0, 1085, 1086), (2, 0, 1)],
    [(0, 1086, 1093), (2, 1, 6), (1, 41, 42)],
    *([(0, 1093 + n, 1094 + n), (1, 42 + n, 43 + n), (2, 6 + n, 7 + n)] for n in range(3)),
]
FOUR_HEADS = [name for name in MODELS if name != "groups of 7"]
TWO_LAYERS = [name for name in MODELS if name != "heads of 128"]
CASES = [
    *((name, 2, 1) for name in MODELS),
    *((name, 4, 1) for name in FOUR_HEADS),
    *((name, 2, 2) for name in TWO_LAYERS),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_model(tmp_path_factory.mktemp("model"), name) for name in MODELS}


def make(
    folder: Path, part: ModelPart | None = None, peers: Peers | None = None, threads: int = 1
) -> Int8Decoder:
    config, weights = open_weights(folder)
    return Int8Decoder(config, weights, max_positions=4096, threads=threads, part=part, peers=peers)


def stages_of(
    folder: Path, shares: int, num_stages: int, num_blocks: int, threads: int = 1
) -> list[Stage]:
    config, _ = open_weights(folder)
    layers = [1, config.num_layers - 1] if num_stages == 2 else [config.num_layers]
    return [
        Stage(lambda **own: make(folder, threads=threads, **own), parts, num_blocks, BLOCK)
        for parts in parts_of(config, layers, shares)
    ]


def batches(lengths: Sequence[int], cut: list[list[tuple[int, int, int]]]) -> list[ModelInput]:
    """Batches of some tokens of several sequences, whose blocks are scattered over one cache."""
    needed = [-(-length // BLOCK) for length in lengths]
    free = random.Random(0).sample(range(sum(needed)), sum(needed))
    tables = [[free.pop() for _ in range(count)] for count in needed]
    prompts = [make_tokens(length, seed) for seed, length in enumerate(lengths)]
    made = []
    for some in cut:
        token_ids: list[int] = []
        chunks = []
        for sequence, start, stop in some:
            chunks.append(Rows(len(token_ids), start, stop, tables[sequence]))
            token_ids += prompts[sequence][start:stop]
        made.append(ModelInput(token_ids, chunks))
    return made


def assert_same(folder: Path, stages: list[Stage], some: list[ModelInput], blocks: int) -> None:
    """All rows of all batches give the same logits as in one process."""
    one = make(folder)
    cache = one.make_cache(blocks, BLOCK)
    for batch in some:
        with torch.inference_mode():
            expected = one.logits(one.forward(batch, cache))
        hidden = None
        for stage in stages:
            results = stage.run(batch, hidden, slice(None))
            hidden = results[0]
            assert all(same(hidden, each) for each in results)
        assert hidden is not None
        assert same(hidden, expected)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same bits, but for those of what is not a number."""
    bits = [each.contiguous().view(torch.int32) for each in (a, b)]
    return bool(((bits[0] == bits[1]) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize(("name", "shares", "num_stages"), CASES)
def test_shares_give_the_bits_of_one_process(
    folders: dict[str, Path], name: str, shares: int, num_stages: int
) -> None:
    """In chunks of prompts, decodes, and batches of both."""
    blocks = sum(-(-length // BLOCK) for length in LENGTHS)
    stages = stages_of(folders[name], shares, num_stages, blocks)
    assert_same(folders[name], stages, batches(LENGTHS, BATCHES), blocks)


def test_batches_of_several_slices_and_threads_give_them_too(folders: dict[str, Path]) -> None:
    """Of more rows than the memory between matrices holds."""
    folder, blocks = folders["gemma"], len(make_blocks(2100))
    some = batches([2100], [[(0, 0, 2060)], [(0, 2060, 2100)]])
    assert_same(folder, stages_of(folder, 2, 1, blocks, threads=2), some, blocks)


def test_what_shares_hold_makes_up_the_model(folders: dict[str, Path]) -> None:
    folder = folders["gemma"]
    one, (stage,) = make(folder), stages_of(folder, 2, 1, 1)
    assert sum(each.num_parameters for each in stage.decoders) == one.num_parameters
    for share in stage.decoders:
        assert isinstance(share, Int8Decoder)
        assert 0.5 * one.weight_bytes < share.weight_bytes < 0.6 * one.weight_bytes
        assert share.kv_bytes_per_token == one.kv_bytes_per_token // 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_in_one_share_gives_none_in_any(tmp_path: Path, bad: float) -> None:
    """A token's row has it from the embedding, and all rows from one of the heads."""
    folder = save_model(tmp_path, "groups of 7")
    blocks = sum(-(-length // BLOCK) for length in LENGTHS)
    some = batches(LENGTHS, [[(0, 0, 40), (1, 0, 9)], [(0, 40, 41), (1, 9, 10)]])
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][some[0].token_ids[3], 0] = bad
    save_file(weights, file, {"format": "pt"})
    assert_same(folder, stages_of(folder, 2, 1, blocks), some, blocks)
    weights["model.layers.0.self_attn.v_proj.bias"][-1] = bad
    save_file(weights, file, {"format": "pt"})
    stages = stages_of(folder, 2, 1, blocks)
    assert_same(folder, stages, some, blocks)
    assert stages[0].run(some[0], None)[0].isnan().all()


class Unreachable(Alone):
    """Peers that do not answer after some calls."""

    def __init__(self, num_answers: int) -> None:
        self._left = num_answers

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        self._left -= 1
        if self._left < 0:
            raise LostContactError("nobody is there")
        return x


@pytest.mark.parametrize("num_answers", [0, 3])
def test_peers_that_are_lost_amid_the_layers_are_told_of(
    folders: dict[str, Path], num_answers: int
) -> None:
    folder = folders["groups of 7"]
    config, _ = open_weights(folder)
    part = parts_of(config, [config.num_layers], 2)[0][0]
    decoder = make(folder, part, Unreachable(num_answers), threads=2)
    cache = decoder.make_cache(1, BLOCK)
    batch = ModelInput([1, 2, 3], [Rows(0, 0, 3, [0])])
    for _ in range(2):
        with pytest.raises(LostContactError, match="nobody is there"):
            decoder.forward(batch, cache)


def test_kernels_are_made_without_the_peers(folders: dict[str, Path]) -> None:
    """They may be waiting for what is made."""
    config, _ = open_weights(folders["gemma"])
    part = parts_of(config, [config.num_layers], 2)[0][1]
    make(folders["gemma"], part, Unreachable(0)).compile()
