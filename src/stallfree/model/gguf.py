"""The weights of a GGUF file, under the names of Hugging Face models.

A tensor is read, and dequantized to float32, when it is asked for. Tokenizers are not
read here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch

from stallfree.errors import UnsupportedModelError, WeightFileError
from stallfree.model.config import ModelConfig
from stallfree.model.cut import Cut
from stallfree.model.gguf_config import architecture_of, end_token_ids, read_config
from stallfree.model.gguf_header import GgufHeader, TensorInfo
from stallfree.model.gguf_parser import read_header
from stallfree.model.layer_weights import weight_shapes
from stallfree.model.weights import path_marks

_CHUNK_ELEMENTS = 1 << 16  # dequantized at a time: small enough for the processor's caches

_OUTSIDE_LAYERS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYERS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "block_sparse_moe.gate",
}
_STACKED = {  # of all experts, one after the other
    "ffn_gate_exps": "block_sparse_moe.experts.{expert}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{expert}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{expert}.w2",
}
# Tables of rope: one is part of the configuration, the other follows from it.
_NOT_WEIGHTS = ("rope_freqs.weight", ".attn_rot_embd.weight")


class GgufWeights:
    """The weights of a GGUF file.

    Attributes:
        hf_config: the `config.json` that the metadata amounts to.
        end_token_ids: the tokens that end an answer.
        opened: the file, with its marks from just before it was opened.

    Raises:
        WeightFileError: the file is corrupt, truncated, hostile or incomplete.
        UnsupportedModelError: its architecture or a type of its tensors is not implemented.
    """

    def __init__(self, path: Path) -> None:
        self.opened = {path: path_marks(path)}
        header = read_header(path)
        self._header = header
        self._architecture = architecture_of(header)
        self.hf_config: Mapping[str, Any] = read_config(header)
        self.end_token_ids = end_token_ids(header)
        self._infos = _named(header, {**_IN_LAYERS, **self._architecture.names})
        _check_shapes(path, self._infos, ModelConfig.from_hf(self.hf_config))
        _check_kinds(path, {info.kind for info in self._infos.values()})

    def names(self) -> frozenset[str]:
        """All names, as Hugging Face has them."""
        return frozenset(self._infos)

    def shape(self, name: str) -> tuple[int, ...]:
        """That of a tensor.

        Raises:
            WeightFileError: there is none of that name.
        """
        return self._info(name).shape

    def tensor(self, name: str, cut: Cut | None = None) -> torch.Tensor:
        """The tensor, or a part of it, in float32.

        Of a part all columns are read, and all of a matrix whose rows are in another order.

        Raises:
            WeightFileError: there is none of that name, or it cannot be read any more.
        """
        info, heads = self._info(name), self._permuted_heads(name)
        if cut is not None and not heads and len(info.shape) == 2:
            info, cut = _some_rows(info, cut.ranges(info.shape)[0]), Cut(columns=cut.columns)
        values = dequantize(self._header.data(info), info.kind).reshape(info.shape)
        if heads:
            values = _unpermute(values, heads)
        elif name.endswith("norm.weight"):
            values -= self._architecture.norms_hold
        tensor = torch.from_numpy(values)
        return tensor if cut is None else cut.of(tensor)

    def _info(self, name: str) -> TensorInfo:
        info = self._infos.get(name)
        if info is None:
            raise WeightFileError(f"{self._header.path} has no weight {name}")
        return info

    def _permuted_heads(self, name: str) -> int:
        """How many heads a tensor has whose rows are in another order; 0 if it has none."""
        if not self._architecture.permuted:
            return 0
        keys = {".q_proj.": "num_attention_heads", ".k_proj.": "num_key_value_heads"}
        return next((self.hf_config[key] for part, key in keys.items() if part in name), 0)


def dequantize(
    data: npt.NDArray[np.uint8], kind: gguf.GGMLQuantizationType
) -> npt.NDArray[np.float32]:
    """The float32 values of whole blocks, in a new flat array.

    Works through cache-sized pieces, which is four times as fast as one call for a whole tensor.

    Raises:
        NotImplementedError: the type cannot be dequantized.
    """
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    num_blocks = data.size // block_bytes
    values = np.empty(num_blocks * block_size, np.float32)
    step = _CHUNK_ELEMENTS // block_size
    with np.errstate(all="ignore"):  # damaged scales give infinities, not warnings
        for start in range(0, num_blocks, step):
            stop = min(start + step, num_blocks)
            piece = data[start * block_bytes : stop * block_bytes].reshape(1, -1)
            values[start * block_size : stop * block_size] = gguf.dequantize(piece, kind).ravel()
    return values


def _unpermute(values: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """Give the rows of each head the order they have in Hugging Face models."""
    pairs = values.reshape(num_heads, -1, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def _named(header: GgufHeader, in_layers: Mapping[str, str]) -> dict[str, TensorInfo]:
    """The weights by their names in Hugging Face models."""
    infos = {}
    for name, info in header.tensors.items():
        if name.endswith(_NOT_WEIGHTS):
            continue
        prefix, _, inner = name.partition(".")
        layer, _, inner = inner.partition(".")
        part, _, kind = inner.partition(".")
        if name in _OUTSIDE_LAYERS:
            infos[_OUTSIDE_LAYERS[name]] = info
        elif prefix == "blk" and part in in_layers:
            infos[f"model.layers.{layer}.{in_layers[part]}.{kind}"] = info
        elif prefix == "blk" and part in _STACKED and len(info.shape) == 3:
            infos |= {
                f"model.layers.{layer}.{_STACKED[part].format(expert=expert)}.{kind}": of_expert
                for expert, of_expert in enumerate(_unstacked(info))
            }
        else:
            raise _no_use_for(header.path, info)
    return infos


def _unstacked(info: TensorInfo) -> Iterator[TensorInfo]:
    """The matrices of a tensor of three dimensions."""
    count, *shape = info.shape
    size = info.num_bytes // count
    for number in range(count):
        yield replace(info, shape=tuple(shape), offset=info.offset + number * size, num_bytes=size)


def _some_rows(info: TensorInfo, rows: range) -> TensorInfo:
    """Some rows of a matrix, each of which is a number of whole blocks."""
    size = info.num_bytes // info.shape[0]
    return replace(
        info,
        shape=(len(rows), *info.shape[1:]),
        offset=info.offset + rows.start * size,
        num_bytes=len(rows) * size,
    )


def _no_use_for(path: Path, info: TensorInfo) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{path} has the tensor {info.name!r:.100}, which this architecture has no use for here: "
        "the model has a feature that is not implemented"
    )


def _check_shapes(path: Path, infos: Mapping[str, TensorInfo], config: ModelConfig) -> None:
    expected = weight_shapes(config)
    for name, shape in expected.items():
        info = infos.get(name)
        if info is None:
            raise WeightFileError(f"{path} is incomplete: it has no tensor for {name}")
        if info.shape != shape:
            raise WeightFileError(
                f"{path}: {info.name} has the shape {info.shape}; the metadata says {shape}"
            )
    for name, info in infos.items():
        if name not in expected:
            raise _no_use_for(path, info)


def _check_kinds(path: Path, kinds: set[gguf.GGMLQuantizationType]) -> None:
    for kind in kinds:
        try:
            dequantize(np.zeros(gguf.GGML_QUANT_SIZES[kind][1], np.uint8), kind)
        except NotImplementedError:
            raise UnsupportedModelError(
                f"{path} has tensors of the type {kind.name}, which cannot be dequantized"
            ) from None
