"""GGUF files that are damaged, cut or hostile: refused by name, whatever is wrong."""

from __future__ import annotations

import os
import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from tiny_models import byte_level_vocabulary, write_gguf

from stallfree.errors import ModelError, WeightFileError
from stallfree.model import gguf_parser
from stallfree.model.gguf import GgufWeights
from stallfree.model.gguf_parser import read_header


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tiny.gguf"


def _with_counts(tensors: int, keys: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:8] + struct.pack("<QQ", tensors, keys) + data[24:]


def _replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        assert data.count(old) == 1
        return data.replace(old, new)

    return change


_EMBEDDING = b"token_embd.weight" + struct.pack("<I", 2)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda data: b"", "not a GGUF file"),
        (lambda data: b"PK\x03\x04" + data[4:], "not a GGUF file"),
        (lambda data: data[:4], "beyond the 4 bytes"),
        (lambda data: data[:4] + b"\x01\0\0\0" + data[8:], "version 1"),
        (lambda data: data[:4] + b"\0\0\0\x03" + data[8:], "big-endian"),
        (lambda data: data[:-1000], "truncated"),
        (lambda data: data[:600], "beyond"),
        (lambda data: data + bytes(4096), "the file has"),
        (_with_counts(2**63, 1), "tensors; the limit"),
        (_with_counts(1, 2**64 - 1), "metadata keys; the limit"),
        (_with_counts(0, 0), "the file has"),
        (_with_counts(200_000, 12), "not a usable GGUF file"),
        (_replaced(_EMBEDDING, _EMBEDDING[:-4] + struct.pack("<I", 2**31)), "dimensions"),
        (_replaced(_EMBEDDING, _EMBEDDING[:-4] + struct.pack("<I", 0)), "unknown type 64"),
        (
            _replaced(_EMBEDDING + struct.pack("<Q", 64), _EMBEDDING + struct.pack("<Q", 2**63)),
            "truncated",
        ),
        (
            _replaced(_EMBEDDING + struct.pack("<Q", 64), _EMBEDDING + struct.pack("<Q", 0)),
            "shape",
        ),
        (_replaced(b"blk.0.attn_q.weight", b"blk.0.attn_k.weight"), "there twice"),
        (_replaced(b"llama.block_count", b"llama.block_c\xff\xfe\xfdt"), "UTF-8"),
        (_replaced(b"llama.embedding_length", b"llama.attention.key_le"), "incomplete|missing|is"),
        (
            _replaced(
                struct.pack("<Q", 17) + b"llama.block_count",
                struct.pack("<Q", 2**63) + b"llama.block_count",
            ),
            "bytes of a name",
        ),
        (
            _replaced(
                b"llama.block_count" + struct.pack("<I", 4),
                b"llama.block_count" + struct.pack("<I", 99),
            ),
            "unknown type 99",
        ),
        (
            _replaced(
                b"llama.block_count" + struct.pack("<II", 4, 2),
                b"llama.block_count" + struct.pack("<II", 9, 9),
            ),
            "array of arrays|beyond|elements",
        ),
    ],
)
def test_corrupt_and_hostile_files(
    path: Path, change: Callable[[bytes], bytes], match: str
) -> None:
    data = write_gguf(path).read_bytes()
    path.write_bytes(change(data))
    with pytest.raises(WeightFileError, match=match) as caught:
        GgufWeights(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("alignment", [0, 3, 4, 48, 2**31])
def test_absurd_alignment(path: Path, alignment: int) -> None:
    write_gguf(path, extra={"general.alignment": 32})
    old = b"general.alignment" + struct.pack("<II", 4, 32)
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, old[:-4] + struct.pack("<I", alignment)))
    with pytest.raises(WeightFileError, match="alignment"):
        read_header(path)


def test_overlapping_tensors(path: Path) -> None:
    data = write_gguf(path).read_bytes()
    name = b"blk.0.attn_output.weight"
    at = data.index(name) + len(name) + 4 + 16 + 4  # dimensions, shape, type
    for offset in (0, 64, 7):
        path.write_bytes(data[:at] + struct.pack("<Q", offset) + data[at + 8 :])
        with pytest.raises(WeightFileError, match="misplaced"):
            read_header(path)


def test_strings_longer_than_the_file(path: Path) -> None:
    write_gguf(path, extra=byte_level_vocabulary())
    data = path.read_bytes()
    at = data.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 4
    for position, value in ((at + 4, 2**40), (at + 4, 2**64 - 1), (at + 12, 2**63)):
        path.write_bytes(data[:position] + struct.pack("<Q", value) + data[position + 8 :])
        with pytest.raises(WeightFileError):
            read_header(path)


def read_all(weights: GgufWeights) -> None:
    for name in weights.names():
        weights.tensor(name)


def test_a_file_that_is_cut_short_after_it_was_opened(path: Path) -> None:
    write_gguf(path)
    weights = GgufWeights(path)
    os.truncate(path, 1000)
    with pytest.raises(WeightFileError, match=rf"{path} has 1,000 bytes and had .* cut short"):
        read_all(weights)


@pytest.mark.parametrize("piece_bytes", [1, 7, 4096])
def test_a_header_is_read_in_pieces(
    path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    write_gguf(path, extra=byte_level_vocabulary())
    expected = read_header(path)
    monkeypatch.setattr(gguf_parser, "_PIECE_BYTES", piece_bytes)
    header = read_header(path)
    assert header.tensors == expected.tensors
    assert header.metadata.keys() == expected.metadata.keys()
    name = "tokenizer.ggml.tokens"
    assert header.strings(name) == expected.strings(name)
    assert len(header.strings(name, {3, 5})) == 2


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing.gguf"):
        with pytest.raises(WeightFileError, match="not a file"):
            GgufWeights(path)


def _mutated(data: bytes, header_bytes: int, rng: random.Random) -> bytes:
    """The file with a few bytes changed, mostly in the header, or cut, or with some bytes more."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 3, 20))):
        at = rng.randrange(header_bytes if rng.random() < 0.9 else len(data))
        match rng.randrange(5):
            case 0:
                changed[at] = rng.randrange(256)
            case 1:
                changed[at] ^= 1 << rng.randrange(8)
            case 2:
                changed[at : at + 8] = struct.pack("<Q", rng.choice((0, 2**31, 2**63, 2**64 - 1)))
            case 3:
                del changed[at : at + rng.randrange(1, 40)]
            case 4:
                changed[at:at] = rng.randbytes(rng.randrange(1, 40))
    if rng.random() < 0.2:
        del changed[rng.randrange(len(changed)) :]
    return bytes(changed)


def test_damaged_files_load_or_are_refused(path: Path) -> None:
    write_gguf(path, "qwen2", extra=byte_level_vocabulary(), kind=gguf.GGMLQuantizationType.Q8_0)
    data = path.read_bytes()
    header_bytes = len(data) - sum(info.num_bytes for info in read_header(path).tensors.values())
    rng = random.Random(2024)
    loaded = 0
    tracemalloc.start()
    started = time.monotonic()
    for _ in range(300):
        path.write_bytes(_mutated(data, header_bytes, rng))
        try:
            weights = GgufWeights(path)
            for name in weights.names():
                weights.tensor(name)
            loaded += 1
        except ModelError:
            pass
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0 < loaded < 300
    assert peak_bytes < 20 * len(data)
    assert time.monotonic() - started < 60
