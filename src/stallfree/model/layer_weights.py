"""The weights of a model: what they are called, their shapes, and what they are for.

Projections are kept apart by how a tensor-parallel model splits them.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from stallfree.model.config import ModelConfig


class Split(enum.Enum):
    """How the processes that share a layer split a matrix."""

    NONE = "each has all of it"
    OUTPUTS = "each has some of the outputs"
    KEYS = "each has the outputs of some key heads, of which several may have the same"
    INPUTS = "each has some of the inputs, and so a part of every sum"
    VOCABULARY = "each has some of the outputs, the last fewer"


@dataclass(frozen=True, slots=True)
class Projection:
    """A matrix (outputs, inputs), and a bias (outputs,) if it has one.

    Attributes:
        name: of both, without `.weight` or `.bias`.
        part: "q", "k" or "v" if it is that part of a fused matrix (see `Names.fused_qkv`).
    """

    name: str
    outputs: int
    inputs: int
    has_bias: bool
    split: Split
    part: str | None = None


@dataclass(frozen=True, slots=True)
class NormWeights:
    """A norm's weight, and bias if it has one, both (size,)."""

    name: str
    size: int
    has_bias: bool


@dataclass(frozen=True, slots=True)
class MlpWeights:
    """An MLP, or one expert; `gate` only if it is gated."""

    gate: Projection | None
    up: Projection
    down: Projection

    @property
    def projections(self) -> list[Projection]:
        """All of them."""
        return [p for p in (self.gate, self.up, self.down) if p is not None]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. Norms that the architecture does not have are None.

    Attributes:
        mlps: the MLP; the experts, if there is a `router`.
    """

    q: Projection
    k: Projection
    v: Projection
    output: Projection
    router: Projection | None
    mlps: tuple[MlpWeights, ...]
    input_norm: NormWeights
    q_norm: NormWeights | None
    k_norm: NormWeights | None
    mlp_norm: NormWeights | None
    post_attention_norm: NormWeights | None
    post_mlp_norm: NormWeights | None


def layer_weights(config: ModelConfig, layer: int) -> LayerWeights:
    """The weights of layer `layer`."""
    names, hidden = config.names, config.hidden_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    prefix = names.layer.format(layer=layer)

    def attention(name: str, part: str, outputs: int, split: Split) -> Projection:
        fused = names.fused_qkv
        full, part_of_it = f"{prefix}.{fused or name}", part if fused else None
        return Projection(full, outputs, hidden, config.qkv_bias, split, part_of_it)

    def norm(name: str | None, size: int = hidden) -> NormWeights | None:
        return None if name is None else _norm(config, f"{prefix}.{name}", size)

    return LayerWeights(
        q=attention(names.q, "q", queries, Split.OUTPUTS),
        k=attention(names.k, "k", keys, Split.KEYS),
        v=attention(names.v, "v", keys, Split.KEYS),
        output=Projection(
            f"{prefix}.{names.output}", hidden, queries, config.output_bias, Split.INPUTS
        ),
        router=_router(config, prefix),
        mlps=tuple(_mlp(config, prefix, expert) for expert in range(max(1, config.num_experts))),
        input_norm=_norm(config, f"{prefix}.{names.input_norm}", hidden),
        q_norm=norm(names.q_norm, config.head_dim) if config.qk_norm else None,
        k_norm=norm(names.k_norm, config.head_dim) if config.qk_norm else None,
        mlp_norm=norm(names.mlp_norm),
        post_attention_norm=norm(names.post_attention_norm),
        post_mlp_norm=norm(names.post_mlp_norm),
    )


def final_norm(config: ModelConfig) -> NormWeights:
    """The norm after all layers."""
    return _norm(config, config.names.norm, config.hidden_size)


def embedding(config: ModelConfig) -> Projection:
    """The embedding: a row for each token."""
    return _of_vocabulary(config, config.names.embedding)


def head(config: ModelConfig) -> Projection:
    """The output layer."""
    return embedding(config) if config.tie_embeddings else _of_vocabulary(config, config.names.head)


def _of_vocabulary(config: ModelConfig, name: str) -> Projection:
    return Projection(name, config.vocab_size, config.hidden_size, False, Split.VOCABULARY)


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The weights that a model must have, and no others, with their shapes."""
    table = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {f"{config.names.embedding}.weight": table}
    if not config.tie_embeddings:
        shapes[f"{config.names.head}.weight"] = table
    norms: list[NormWeights | None] = [final_norm(config)]
    projections: list[Projection | None] = []
    for index in range(config.num_layers):
        layer = layer_weights(config, index)
        norms += layer.input_norm, layer.q_norm, layer.k_norm, layer.mlp_norm
        norms += layer.post_attention_norm, layer.post_mlp_norm
        projections += layer.q, layer.k, layer.v, layer.output, layer.router
        projections += (projection for mlp in layer.mlps for projection in mlp.projections)
    for norm in norms:
        if norm is not None:
            shapes |= {f"{norm.name}.{kind}": (norm.size,) for kind in _kinds(norm.has_bias)}
    for projection in projections:
        if projection is not None:
            outputs = fused_outputs(config) if projection.part else projection.outputs
            shapes[f"{projection.name}.weight"] = (outputs, projection.inputs)
            if projection.has_bias:
                shapes[f"{projection.name}.bias"] = (outputs,)
    return shapes


def fused_outputs(config: ModelConfig) -> int:
    """Outputs of q, k and v together."""
    return (config.num_heads + 2 * config.num_kv_heads) * config.head_dim


def _kinds(has_bias: bool) -> tuple[str, ...]:
    return ("weight", "bias") if has_bias else ("weight",)


def _norm(config: ModelConfig, name: str, size: int) -> NormWeights:
    return NormWeights(name, size, has_bias=config.norm == "layer")


def _router(config: ModelConfig, prefix: str) -> Projection | None:
    if not config.num_experts:
        return None
    name = f"{prefix}.{config.names.router}"
    return Projection(name, config.num_experts, config.hidden_size, False, Split.NONE)


def _mlp(config: ModelConfig, prefix: str, expert: int) -> MlpWeights:
    names, hidden, inner = config.names, config.hidden_size, config.intermediate_size

    def projection(name: str, outputs: int, inputs: int, split: Split) -> Projection:
        full = f"{prefix}.{name.format(expert=expert)}"
        return Projection(full, outputs, inputs, config.mlp_bias, split)

    return MlpWeights(
        gate=projection(names.gate, inner, hidden, Split.OUTPUTS) if config.is_gated else None,
        up=projection(names.up, inner, hidden, Split.OUTPUTS),
        down=projection(names.down, hidden, inner, Split.INPUTS),
    )
