"""The architectures that run, as data: how each differs from Llama.

A decoder layer has a few points where architectures differ; `Architecture` names them, `Names`
says what the weights are called. To add one that needs no other points, give it a line in
`ARCHITECTURES`, and an `adapt` function if its configuration speaks in words of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from stallfree.errors import UnsupportedModelError, WeightFileError
from stallfree.model.config_fields import MAX_LAYERS, MAX_SIZE, given, integer, number

Words = dict[str, Any]  # a configuration, under the names that Llama's has


@dataclass(frozen=True, slots=True)
class Names:
    """What weights are called, without the `.weight` or `.bias` at the end.

    Those of a layer follow the layer's own; `{layer}` and `{expert}` stand for numbers.

    Attributes:
        fused_qkv: q, k and v as one matrix: for each key head the query heads that it serves, then
            the key, then the value. None if they are three.
        mlp_norm: None if the MLP takes what the attention's norm gives.
        post_attention_norm, post_mlp_norm: of what is added to the hidden states; None for none.
        ignored: how the names of weights begin that are not for text.
    """

    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    layer: str = "model.layers.{layer}"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    fused_qkv: str | None = None
    output: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    router: str = "mlp.gate"
    input_norm: str = "input_layernorm"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    mlp_norm: str | None = "post_attention_layernorm"
    post_attention_norm: str | None = None
    post_mlp_norm: str | None = None
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Architecture:
    """How an architecture differs from Llama where its configuration does not say.

    Attributes:
        names: of its weights.
        qkv_bias: q, k and v have biases; None asks the configuration's `attention_bias`.
        output_bias: the attention output has one; None as above.
        qk_norm: queries and keys are normalised per head.
        windows: sliding windows are used: "always", if the configuration "asks", or "never".
        norm: a kind of `norms`: "rms", "rms + 1" or "layer".
        is_gated: the MLP multiplies what the activation gives by another projection.
        is_parallel: the MLP takes what the attention takes, not what it has been added to.
        scales_embedding: embeddings are multiplied by the root of their size.
        has_experts: each token goes through some of several MLPs, which a router chooses.
        has_window_rope: layers with a sliding window have a rotary embedding of their own, in
            `window_rope_parameters`.
        defaults: what a configuration means that does not say.
        renamed: names of fields that differ from Llama's, as Llama's name to its own.
        adapt: the last word on a configuration: settles what depends on it, and refuses.
    """

    names: Names = field(default_factory=Names)
    qkv_bias: bool | None = None
    output_bias: bool | None = None
    qk_norm: bool = False
    windows: str = "never"
    norm: str = "rms"
    is_gated: bool = True
    is_parallel: bool = False
    scales_embedding: bool = False
    has_experts: bool = False
    has_window_rope: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    adapt: Callable[[Architecture, Words], tuple[Architecture, Words]] | None = None


def describe(config: Mapping[str, Any]) -> tuple[str, Architecture, Words]:
    """The name of a configuration's architecture, what it is, and the configuration in its words.

    Raises:
        UnsupportedModelError: it is not implemented; the message names it and those that are.
        WeightFileError: a value makes no sense.
    """
    names = config.get("architectures") or config.get("model_type", "unknown")
    listed = names if isinstance(names, list) else [names]
    for name in listed:
        if isinstance(name, str) and name in ARCHITECTURES:
            break
    else:
        raise UnsupportedModelError(
            f"architecture {', '.join(map(str, listed)):.200} is not supported; "
            f"these are: {', '.join(ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[name]
    words = {**architecture.defaults, **given(config)}
    words |= {ours: words.get(theirs) for ours, theirs in architecture.renamed.items()}
    if architecture.adapt is not None:
        architecture, words = architecture.adapt(architecture, words)
    return name, architecture, words


def _falcon(falcon: Architecture, words: Words) -> tuple[Architecture, Words]:
    """Falcon 7B shares one key head and one norm; 40B and 180B group their heads, with two norms.

    Those of RefinedWeb, which came before, run in sequence and have ALiBi.
    """
    if words.get("alibi"):
        raise UnsupportedModelError(
            "the model has ALiBi position biases; of Falcon only models with rotary embeddings "
            "are supported (alibi is false in their configurations)"
        )
    heads = integer(words, "num_attention_heads", MAX_SIZE)
    is_grouped = bool(words.get("new_decoder_architecture"))
    if not is_grouped:
        words["num_key_value_heads"] = 1 if words.get("multi_query", True) else heads
    if words["intermediate_size"] is None:
        words["intermediate_size"] = 4 * integer(words, "hidden_size", MAX_SIZE)
    words["mlp_bias"] = words["attention_bias"]
    if not is_grouped and not words.get("parallel_attn", True):
        return falcon, words
    names = replace(falcon.names, mlp_norm=None)
    if is_grouped and words.get("num_ln_in_parallel_attn", 2) == 2:
        names = replace(falcon.names, input_norm="ln_attn", mlp_norm="ln_mlp")
    return replace(falcon, names=names, is_parallel=True), words


def _gemma3(gemma: Architecture, words: Words) -> tuple[Architecture, Words]:
    """Local layers have a sliding window and a rotary embedding of their own, one in six neither.

    Its longest context includes the rope scaling, which Llama's does not.
    """
    for feature in (
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "use_bidirectional_attention",
    ):
        if words.get(feature):
            raise UnsupportedModelError(
                f"{feature} is {words[feature]!r:.80} in the model's configuration; "
                "it is not supported"
            )
    if words.get("layer_types") is None:
        pattern = integer(words, "sliding_window_pattern", MAX_LAYERS, 6)
        layers = range(1, integer(words, "num_hidden_layers", MAX_LAYERS) + 1)
        words["layer_types"] = [
            "sliding_attention" if layer % pattern else "full_attention" for layer in layers
        ]
    ropes = words.pop("rope_parameters", None) or {}
    if not isinstance(ropes, Mapping):
        raise WeightFileError(f"rope_parameters is {ropes!r:.80}, not an object")
    scaled = ropes.get("full_attention") or words.get("rope_scaling") or {}
    local = {"rope_theta": words["rope_local_base_freq"], "rope_type": "default"}
    words["window_rope_parameters"] = ropes.get("sliding_attention") or local
    words["rope_scaling"] = scaled
    if isinstance(scaled, Mapping) and scaled.get("factor") is not None:
        longest = integer(words, "max_position_embeddings", 2**31)
        words["max_position_embeddings"] = int(longest / number(scaled, "factor", 0, 1e4)) or 1
    return gemma, words


def _gemma3_of_images(gemma: Architecture, words: Words) -> tuple[Architecture, Words]:
    """The text model inside one that also sees: what makes vectors of images is left out."""
    text = words.get("text_config")
    if not isinstance(text, Mapping):
        raise WeightFileError(f"text_config is {text!r:.80}, not an object")
    return _gemma3(gemma, {**gemma.defaults, **given(text)})


_MIXTRAL_NAMES = Names(
    router="block_sparse_moe.gate",
    gate="block_sparse_moe.experts.{expert}.w1",
    up="block_sparse_moe.experts.{expert}.w3",
    down="block_sparse_moe.experts.{expert}.w2",
)
_FALCON_NAMES = Names(
    embedding="transformer.word_embeddings",
    norm="transformer.ln_f",
    layer="transformer.h.{layer}",
    fused_qkv="self_attention.query_key_value",
    output="self_attention.dense",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
)
_GEMMA3_NAMES = Names(
    mlp_norm="pre_feedforward_layernorm",
    post_attention_norm="post_attention_layernorm",
    post_mlp_norm="post_feedforward_layernorm",
)
_GEMMA3 = Architecture(
    names=_GEMMA3_NAMES,
    qk_norm=True,
    windows="always",
    norm="rms + 1",
    scales_embedding=True,
    has_window_rope=True,
    defaults={
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "max_position_embeddings": 131_072,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "tie_word_embeddings": True,
    },
    renamed={"hidden_act": "hidden_activation"},
    adapt=_gemma3,
)

ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(),  # Llama 2 and 3, Yi and others that use its name
    "MistralForCausalLM": Architecture(qkv_bias=False, output_bias=False, windows="always"),
    "MixtralForCausalLM": Architecture(
        names=_MIXTRAL_NAMES,
        qkv_bias=False,
        output_bias=False,
        windows="always",
        has_experts=True,
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_key_value_heads": 8},
    ),
    "Qwen2ForCausalLM": Architecture(qkv_bias=True, output_bias=False, windows="asks"),
    "Qwen3ForCausalLM": Architecture(qk_norm=True, windows="asks"),
    "FalconForCausalLM": Architecture(
        names=_FALCON_NAMES,
        norm="layer",
        is_gated=False,
        defaults={"layer_norm_epsilon": 1e-5, "activation": "gelu", "tie_word_embeddings": True},
        renamed={
            "num_key_value_heads": "num_kv_heads",
            "intermediate_size": "ffn_hidden_size",
            "attention_bias": "bias",
            "hidden_act": "activation",
            "rms_norm_eps": "layer_norm_epsilon",
        },
        adapt=_falcon,
    ),
    "Gemma3ForCausalLM": _GEMMA3,
    "Gemma3ForConditionalGeneration": replace(
        _GEMMA3,
        names=replace(
            _GEMMA3_NAMES,
            embedding="language_model.model.embed_tokens",
            norm="language_model.model.norm",
            head="language_model.lm_head",
            layer="language_model.model.layers.{layer}",
            ignored=("vision_tower.", "multi_modal_projector."),
        ),
        adapt=_gemma3_of_images,
    ),
}
