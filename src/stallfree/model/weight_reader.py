"""Reading the weights that a configuration says there are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stallfree.errors import WeightFileError
from stallfree.model.config import ModelConfig
from stallfree.model.part import ModelPart
from stallfree.model.weights import WeightSource

SCALES = ".scales"  # added to the name of an int8 tensor, names the scales of its rows
_RECOMPUTED = ".rotary_emb.inv_freq"  # old files keep it; it follows from the configuration


@dataclass(frozen=True, slots=True)
class LayerNames:
    """What the weights of one layer are called, and their shapes (out, in), by kind."""

    qkv: dict[str, int]
    output: dict[str, int]
    gate_up: dict[str, int]
    down: dict[str, int]
    input_norm: str
    q_norm: str
    k_norm: str
    mlp_norm: str


def names_of_layer(config: ModelConfig, layer: int) -> LayerNames:
    """Names in layer `layer`; projections of the same input with the number of their outputs."""
    prefix = f"model.layers.{layer}"
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    kv_size = config.num_kv_heads * config.head_dim
    return LayerNames(
        qkv={
            f"{attention}.q_proj": config.num_heads * config.head_dim,
            f"{attention}.k_proj": kv_size,
            f"{attention}.v_proj": kv_size,
        },
        output={f"{attention}.o_proj": config.hidden_size},
        gate_up={
            f"{mlp}.gate_proj": config.intermediate_size,
            f"{mlp}.up_proj": config.intermediate_size,
        },
        down={f"{mlp}.down_proj": config.hidden_size},
        input_norm=f"{prefix}.input_layernorm.weight",
        q_norm=f"{attention}.q_norm.weight",
        k_norm=f"{attention}.k_norm.weight",
        mlp_norm=f"{prefix}.post_attention_layernorm.weight",
    )


class WeightReader:
    """Reads weights one by one, checks their shapes, and knows which were never asked for.

    Args:
        config: of the whole model.
        weights: of the whole model.
        part: that is read; what belongs elsewhere may be left unread.

    Attributes:
        num_parameters: numbers read so far, scales aside.
    """

    def __init__(self, config: ModelConfig, weights: WeightSource, part: ModelPart) -> None:
        self._architecture = config.architecture
        self._weights = weights
        self._unread = {name for name in weights.names() if part.owns(name)}
        self.num_parameters = 0

    def floats(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A weight of floats.

        Raises:
            WeightFileError: there is none, or it has another shape or type.
        """
        tensor = self._read(name, shape)
        if not tensor.is_floating_point():
            raise WeightFileError(f"weight {name} is of type {tensor.dtype}, which is not a float")
        self.num_parameters += tensor.numel()
        return tensor

    def int8(self, name: str, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """A weight in int8, and the scales float32 (out,) of its rows.

        Raises:
            WeightFileError: as above.
        """
        values = self._read(name, shape)
        if values.dtype != torch.int8:
            raise WeightFileError(f"weight {name} is of type {values.dtype}, not int8")
        self.num_parameters += values.numel()
        return values, self._read(name + SCALES, shape[:1])

    def finish(self, *, unused: str | None = None) -> None:
        """Refuse weights that the architecture has no place for: answers would be wrong.

        Args:
            unused: a weight that may be there although nothing asks for it.
        """
        if unused is not None:
            self._unread -= {unused, unused + SCALES}
        unread = sorted(name for name in self._unread if not name.endswith(_RECOMPUTED))
        if unread:
            raise WeightFileError(
                f"{self._architecture} as configured has no weight {unread[0]} "
                f"(nor {len(unread) - 1} others that are in the files)"
            )

    def _read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = self._weights.tensor(name)
        self._unread.discard(name)
        if tuple(tensor.shape) != shape:
            raise WeightFileError(
                f"weight {name} has shape {tuple(tensor.shape)}; the configuration says {shape}"
            )
        return tensor
