"""Which part of a model a process holds: some of its layers, and a share of each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from stallfree.model.config import ModelConfig

_LEAST_ROWS = 4
_LAYER_NAME = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class ModelPart:
    """One stage of a pipeline.

    Attributes:
        first_layer, num_layers: consecutive layers.
        is_first: it turns token ids into hidden states.
        is_last: it turns hidden states into logits.
    """

    first_layer: int
    num_layers: int
    is_first: bool = True
    is_last: bool = True

    @property
    def layers(self) -> range:
        """Indices of its layers in the whole model."""
        return range(self.first_layer, self.first_layer + self.num_layers)

    def local(self, config: ModelConfig) -> ModelConfig:
        """The shape of this part, as if it were a model."""
        windows = config.sliding_windows[self.first_layer : self.layers.stop]
        return replace(config, num_layers=self.num_layers, sliding_windows=windows)

    def owns(self, name: str) -> bool:
        """Whether a weight of this name would be wrong to leave out: nobody else looks at it."""
        if self.is_first and self.is_last:
            return True
        match = _LAYER_NAME.search(name)
        return match is not None and int(match[1]) in self.layers


def whole(config: ModelConfig) -> ModelPart:
    """All of a model."""
    return ModelPart(0, config.num_layers)


def stages(num_layers: Sequence[int]) -> list[ModelPart]:
    """The parts of a pipeline whose stages have so many layers."""
    last = len(num_layers) - 1
    return [
        ModelPart(sum(num_layers[:index]), count, is_first=index == 0, is_last=index == last)
        for index, count in enumerate(num_layers)
    ]


def balanced_layers(
    config: ModelConfig, num_stages: int, *, rows: int, sampled_rows: int
) -> list[int]:
    """How many layers each stage should have, so that all take the same time for a batch.

    Matrices are what takes time. A layer's are multiplied by every row, the output layer's by the
    rows that sample; few rows cost as much as `_LEAST_ROWS`, which is what reading a matrix costs.

    Args:
        config: of the whole model.
        num_stages: at most the layers of the model.
        rows: of a usual batch.
        sampled_rows: those of them that a token is sampled from.
    """
    layer = _matrix_values(config) * max(rows, _LEAST_ROWS)
    output = config.vocab_size * config.hidden_size * max(sampled_rows, _LEAST_ROWS)
    total = config.num_layers * layer + output
    counts: list[int] = []
    for stage in range(num_stages - 1):
        upto = round(total * (stage + 1) / num_stages / layer)
        left = config.num_layers - sum(counts) - (num_stages - 1 - stage)  # one for each later one
        counts.append(min(max(1, upto - sum(counts)), left))
    return [*counts, config.num_layers - sum(counts)]


def _matrix_values(config: ModelConfig) -> int:
    """Numbers in the matrices of one layer."""
    heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    return config.hidden_size * (heads + 3 * config.intermediate_size)
