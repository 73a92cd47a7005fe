"""Tiny random models, written as GGUF files, for the tests of several modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

VOCAB_SIZE, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 300, 64, 96, 2, 4, 2, 16

Arrays = Mapping[str, npt.NDArray[np.float32]]

_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
_GEMMA3_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_EXPERT_NAMES = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}
EXPERTS = 3


def state_dict(architecture: str, *, tied: bool = False, seed: int = 0) -> Arrays:
    """Random weights under the names of Hugging Face models."""
    queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB_SIZE, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    if not tied:
        shapes["lm_head.weight"] = (VOCAB_SIZE, HIDDEN)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (HIDDEN,),
            f"{prefix}.self_attn.q_proj.weight": (queries, HIDDEN),
            f"{prefix}.self_attn.k_proj.weight": (keys, HIDDEN),
            f"{prefix}.self_attn.v_proj.weight": (keys, HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": (HIDDEN, queries),
            f"{prefix}.post_attention_layernorm.weight": (HIDDEN,),
            f"{prefix}.mlp.gate_proj.weight": (INNER, HIDDEN),
            f"{prefix}.mlp.up_proj.weight": (INNER, HIDDEN),
            f"{prefix}.mlp.down_proj.weight": (HIDDEN, INNER),
        }
        if architecture == "qwen2":
            shapes[f"{prefix}.self_attn.q_proj.bias"] = (queries,)
            shapes[f"{prefix}.self_attn.k_proj.bias"] = (keys,)
            shapes[f"{prefix}.self_attn.v_proj.bias"] = (keys,)
        if architecture == "mixtral":
            shapes = {name: shape for name, shape in shapes.items() if ".mlp." not in name}
            moe = f"{prefix}.block_sparse_moe"
            shapes[f"{moe}.gate.weight"] = (EXPERTS, HIDDEN)
            for expert in range(EXPERTS):
                shapes[f"{moe}.experts.{expert}.w1.weight"] = (INNER, HIDDEN)
                shapes[f"{moe}.experts.{expert}.w2.weight"] = (HIDDEN, INNER)
                shapes[f"{moe}.experts.{expert}.w3.weight"] = (INNER, HIDDEN)
        if architecture == "gemma3":
            shapes[f"{prefix}.pre_feedforward_layernorm.weight"] = (HIDDEN,)
            shapes[f"{prefix}.post_feedforward_layernorm.weight"] = (HIDDEN,)
        if architecture in ("qwen3", "gemma3"):
            shapes[f"{prefix}.self_attn.q_norm.weight"] = (HEAD_DIM,)
            shapes[f"{prefix}.self_attn.k_norm.weight"] = (HEAD_DIM,)
    rng = np.random.default_rng(seed)
    weights = {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
    if architecture == "gemma3":  # so that 1 can be added and taken off again without rounding
        for name in weights:
            if name.endswith("norm.weight"):
                weights[name] = (np.round(weights[name] * 1024) / 1024).astype(np.float32)
    return weights


def gguf_name(name: str, architecture: str = "llama") -> str:
    """The name in a GGUF file of a weight of a Hugging Face model."""
    outside = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in outside:
        return outside[name]
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    names = {**_LAYER_NAMES, **(_GEMMA3_NAMES if architecture == "gemma3" else {})}
    return f"blk.{layer}.{names[part]}.{kind}"


def stacked(weights: Arrays) -> dict[str, npt.NDArray[np.float32]]:
    """The experts' weights as GGUF files have them: one tensor for all of a layer."""
    found: dict[str, list[npt.NDArray[np.float32]]] = {}
    for name, values in weights.items():
        if ".experts." in name:
            _, _, layer, _, _, _, part, kind = name.split(".")
            found.setdefault(f"blk.{layer}.{_EXPERT_NAMES[part]}.{kind}", []).append(values)
    return {name: np.stack(values) for name, values in found.items()}


def permuted(values: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """Reorder the rows of q or k as llama.cpp's converter does for the llama architecture."""
    halves = values.reshape(num_heads, 2, -1, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def metadata(architecture: str) -> dict[str, Any]:
    """The metadata that a GGUF file of the tiny model has."""
    return {
        f"{architecture}.block_count": LAYERS,
        f"{architecture}.context_length": 512,
        f"{architecture}.embedding_length": HIDDEN,
        f"{architecture}.feed_forward_length": INNER,
        f"{architecture}.attention.head_count": HEADS,
        f"{architecture}.attention.head_count_kv": KV_HEADS,
        f"{architecture}.attention.key_length": HEAD_DIM,
        f"{architecture}.attention.value_length": HEAD_DIM,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{architecture}.rope.dimension_count": HEAD_DIM,
        f"{architecture}.rope.freq_base": 50_000.0,
        **({"gemma3.attention.sliding_window": 8} if architecture == "gemma3" else {}),
    }


def byte_level_vocabulary() -> dict[str, Any]:
    """Metadata of a byte-level tokenizer with `VOCAB_SIZE` tokens and a chat template."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [*map(chr, visible), *(chr(256 + i) for i in range(256 - len(visible)))]
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ġw o", "Ġwo r", "Ġwor l", "Ġworl d"]
    words = [merge.replace(" ", "") for merge in merges]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    unused = [f"[PAD{i}]" for i in range(VOCAB_SIZE - 256 - len(words) - len(special))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*letters, *words, *special, *unused],
        "tokenizer.ggml.token_type": [1] * (256 + len(words)) + [3] * 3 + [5] * len(unused),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 256 + len(words),
        "tokenizer.ggml.eos_token_id": 256 + len(words) + 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
    }


def write_gguf(
    path: Path,
    architecture: str = "llama",
    *,
    weights: Arrays | None = None,
    extra: Mapping[str, Any] | None = None,
    tensors: Mapping[str, npt.NDArray[Any]] | None = None,
    without: Sequence[str] = (),
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> Path:
    """Write a GGUF file.

    Args:
        path: the file.
        architecture: llama, qwen2, qwen3 or gemma3, or any name.
        weights: under the names of Hugging Face; random ones by default.
        extra: metadata to add or replace.
        tensors: to add, under the names of GGUF.
        without: metadata and tensors to leave out.
        kind: how matrices are stored.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**metadata(architecture), **(extra or {})}.items():
        if key not in without:
            _add(writer, key, value)
    if weights is None:
        weights = state_dict(architecture)
    for name, values in weights.items():
        if architecture == "llama" and ".q_proj." in name:
            values = permuted(values, HEADS)
        elif architecture == "llama" and ".k_proj." in name:
            values = permuted(values, KV_HEADS)
        elif architecture == "gemma3" and name.endswith("norm.weight"):
            values = values + 1  # as llama.cpp's converter does
        if ".experts." not in name and gguf_name(name, architecture) not in without:
            stored = kind if values.ndim == 2 else gguf.GGMLQuantizationType.F32
            quantized = gguf.quantize(values, stored)
            writer.add_tensor(gguf_name(name, architecture), quantized, raw_dtype=stored)
    for name, values in {**stacked(weights), **(tensors or {})}.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_float32(key, value)
