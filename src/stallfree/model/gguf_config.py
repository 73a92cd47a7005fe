"""What the metadata of a GGUF file says of the model, as a `config.json` would say it.

To add an architecture, give it a line in `ARCHITECTURES`. Weights are not read here, save the
small table of rope frequency factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stallfree.errors import UnsupportedModelError, WeightFileError
from stallfree.model.gguf_header import GgufHeader, TensorInfo

_MAX_SIZE = 1 << 31  # of any dimension that the metadata states
_CONTROL_TOKEN = 3
# The file names one token that ends an answer, or two, where models know several.
_END_TOKENS = frozenset(
    (
        "</s>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<end_of_turn>",
    )
)


Words = dict[str, Any]  # a configuration, as Hugging Face has it


@dataclass(frozen=True, slots=True)
class Architecture:
    """What the name of an architecture implies.

    Attributes:
        hf_name: its class in Hugging Face configurations.
        permuted: rows of q and k are stored in another order: within each head, the first half
            interleaved with the second.
        norms_hold: what was added to the weights of norms when they were stored.
        names: what parts of a layer are called in Hugging Face models, where it differs from Llama.
        adapt: changes the configuration to what is said in other words.
    """

    hf_name: str
    permuted: bool = False
    norms_hold: float = 0.0
    names: Mapping[str, str] = field(default_factory=dict)
    adapt: Callable[[GgufHeader, Words], None] | None = None


def _windowed_or_mixed(header: GgufHeader, words: Words) -> None:
    """Mistral and Mixtral are written as llama."""
    if words["sliding_window"]:
        words |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    experts = header.get("llama.expert_count", int)
    if experts:
        stacked = header.tensors.get("blk.0.ffn_gate_exps.weight")
        if stacked is None or len(stacked.shape) != 3 or stacked.shape[0] != experts:
            raise WeightFileError(
                f"{header.path}: llama.expert_count is {experts}, but blk.0.ffn_gate_exps.weight "
                f"has the shape {stacked and stacked.shape}"
            )
        words |= {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_local_experts": experts,
            "num_experts_per_tok": _count(header, "llama.expert_used_count"),
        }


def _gemma3(header: GgufHeader, words: Words) -> None:
    """The file leaves out what is the same in all sizes but the largest.

    That one, of 62 layers, scales queries by its hidden size over its heads (as llama.cpp does).
    """
    is_largest = words["num_hidden_layers"] == 62
    by_hidden = words["hidden_size"] // words["num_attention_heads"]
    words |= {
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": by_hidden if is_largest else words["head_dim"],
        "sliding_window_pattern": _count(header, "gemma3.attention.sliding_window_pattern", 6),
        "rope_local_base_freq": _positive(header, "gemma3.rope.freq_base_swa", 10_000.0),
        "final_logit_softcapping": header.get("gemma3.final_logit_softcapping", float),
    }


ARCHITECTURES = {
    # Yi, Mistral and Mixtral are written as llama.
    "llama": Architecture("LlamaForCausalLM", permuted=True, adapt=_windowed_or_mixed),
    "qwen2": Architecture("Qwen2ForCausalLM"),
    "qwen3": Architecture("Qwen3ForCausalLM"),
    "gemma3": Architecture(
        "Gemma3ForCausalLM",
        norms_hold=1.0,
        names={
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        adapt=_gemma3,
    ),
}


def architecture_of(header: GgufHeader) -> Architecture:
    """The architecture of a file.

    Raises:
        UnsupportedModelError: it is not implemented; the message names it and those that are.
        WeightFileError: the file does not say.
    """
    name = _prefix(header)
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"the GGUF architecture {name!r:.80} is not supported; "
            f"these are: {', '.join(ARCHITECTURES)}"
        )
    if (header.get("split.count", int) or 1) > 1:
        raise UnsupportedModelError(
            f"{header.path} is one of several pieces; merge them with llama-gguf-split --merge"
        )
    experts = header.get(f"{name}.expert_count", int)
    if experts and name != "llama":
        raise UnsupportedModelError(f"{header.path} is a mixture of experts: not supported")
    return ARCHITECTURES[name]


def read_config(header: GgufHeader) -> dict[str, Any]:
    """The configuration of a file whose architecture is supported.

    Raises:
        WeightFileError: a value is missing or makes no sense.
        UnsupportedModelError: it asks for a feature that is not implemented.
    """
    architecture, prefix = architecture_of(header), _prefix(header)
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise WeightFileError(f"{header.path} is incomplete: token_embd.weight is missing")
    num_layers = _count(header, f"{prefix}.block_count")
    if num_layers > len(header.tensors):
        raise WeightFileError(
            f"{header.path} claims {num_layers:,} layers and has {len(header.tensors)} tensors"
        )
    num_heads = _count(header, f"{prefix}.attention.head_count")
    context = _count(header, f"{prefix}.context_length")
    window = header.get(f"{prefix}.attention.sliding_window", int)
    head_dim = _head_dim(header, prefix, num_heads)
    words: Words = {
        "architectures": [architecture.hf_name],
        "model_type": prefix,
        "vocab_size": embedding.shape[0],
        "hidden_size": _count(header, f"{prefix}.embedding_length"),
        "intermediate_size": _count(header, f"{prefix}.feed_forward_length"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": _count(header, f"{prefix}.attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "rms_norm_eps": _positive(header, f"{prefix}.attention.layer_norm_rms_epsilon"),
        "rope_theta": _positive(header, f"{prefix}.rope.freq_base", 10_000.0),
        "rope_scaling": _rope_scaling(header, prefix, context, head_dim),
        "max_position_embeddings": context,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "sliding_window": window or None,
        "use_sliding_window": bool(window),
        "hidden_act": "silu",
    }
    if architecture.adapt is not None:
        architecture.adapt(header, words)
    return words


def end_token_ids(header: GgufHeader) -> frozenset[int]:
    """The tokens that end an answer: those the file names, and control tokens known to.

    Raises:
        WeightFileError: the vocabulary cannot be read.
    """
    ids = {
        token_id
        for key in ("eos", "eot", "eom")
        if (token_id := header.get(f"tokenizer.ggml.{key}_token_id", int)) is not None
    }
    kinds = header.integers("tokenizer.ggml.token_type")
    controls = np.flatnonzero(kinds == _CONTROL_TOKEN).tolist()
    texts = header.strings("tokenizer.ggml.tokens", frozenset(controls))
    named = zip(controls, texts, strict=False)  # there may be more types than tokens
    return frozenset(ids.union(token_id for token_id, text in named if text in _END_TOKENS))


def _prefix(header: GgufHeader) -> str:
    name = header.get("general.architecture", str)
    if name is None:
        raise WeightFileError(f"{header.path} does not say its general.architecture")
    return name


def _count(header: GgufHeader, key: str, default: int | None = None) -> int:
    value = header.get(key, int)
    if value is None:
        value = default
    if value is None or not 1 <= value < _MAX_SIZE:
        raise WeightFileError(
            f"{header.path}: {key} is {value}; it must be from 1 to {_MAX_SIZE - 1:,}"
        )
    return value


def _positive(header: GgufHeader, key: str, default: float | None = None) -> float:
    value = header.get(key, float)
    if value is None:
        value = default
    if value is None or value <= 0.0:
        raise WeightFileError(f"{header.path}: {key} is {value}; it must be above 0")
    return value


def _head_dim(header: GgufHeader, prefix: str, num_heads: int) -> int:
    hidden_size = _count(header, f"{prefix}.embedding_length")
    head_dim = _count(header, f"{prefix}.attention.key_length", max(1, hidden_size // num_heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        other = _count(header, f"{prefix}.{key}", head_dim)
        if other != head_dim:
            raise UnsupportedModelError(
                f"{header.path}: {prefix}.{key} is {other}, and only the size of a head, "
                f"{head_dim}, is supported"
            )
    return head_dim


def _rope_scaling(
    header: GgufHeader, prefix: str, context: int, head_dim: int
) -> dict[str, Any] | None:
    kind = header.get(f"{prefix}.rope.scaling.type", str) or "none"
    factors = header.tensors.get("rope_freqs.weight")
    if factors is not None and kind == "none":
        return {"rope_type": "freq_factors", "factors": _factors(header, factors, head_dim)}
    legacy = header.get(f"{prefix}.rope.scale_linear", float)
    if kind == "none" and legacy is not None and legacy != 1.0:
        return {
            "rope_type": "linear",
            "factor": _positive(header, f"{prefix}.rope.scale_linear"),
        }
    if kind == "none":
        return None
    if kind not in ("linear", "yarn") or factors is not None:
        also = " with rope_freqs.weight" if factors is not None else ""
        raise UnsupportedModelError(
            f"{header.path}: rope scaling {kind!r:.40}{also} is not supported; "
            "these are: none, linear, yarn"
        )
    factor = _positive(header, f"{prefix}.rope.scaling.factor")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    return _yarn(header, f"{prefix}.rope.scaling", factor, context)


def _yarn(header: GgufHeader, prefix: str, factor: float, context: int) -> dict[str, Any]:
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": _count(
            header, f"{prefix}.original_context_length", context
        ),
    }
    for key in ("beta_fast", "beta_slow"):
        value = header.get(f"{prefix}.yarn_{key}", float)
        if value is not None:
            scaling[key] = value
    multiplier = header.get(f"{prefix}.attn_factor", float)
    if multiplier is not None:  # on top of the usual one, where Hugging Face replaces it
        scaling["attention_factor"] = multiplier * (0.1 * math.log(max(factor, 1.0)) + 1.0)
    return scaling


def _factors(header: GgufHeader, info: TensorInfo, head_dim: int) -> list[float]:
    """What the rope frequencies are divided by, one for each pair of a head's dimensions."""
    if info.kind.name != "F32" or info.shape != (head_dim // 2,):
        raise WeightFileError(
            f"{header.path}: {info.name} is {info.kind.name} of the shape {info.shape}; "
            f"F32 of ({head_dim // 2},) is needed"
        )
    factors = header.data(info).view("<f4")
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise WeightFileError(f"{header.path}: {info.name} has values that are not above 0")
    return [float(factor) for factor in factors]
