"""Which part of a model a process holds: some of its layers, and a share of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from stallfree.errors import ConfigError
from stallfree.model.config import ModelConfig
from stallfree.model.layer_weights import Projection, Split

_LEAST_ROWS = 4


@dataclass(frozen=True, slots=True)
class ModelPart:
    """A stage of a pipeline, or a share of it.

    Attributes:
        first_layer, num_layers: consecutive layers.
        is_first: it turns token ids into hidden states.
        is_last: it turns hidden states into logits.
        tp_rank: which share of the stage's matrices it has.
        tp_size: of so many.
    """

    first_layer: int
    num_layers: int
    is_first: bool = True
    is_last: bool = True
    tp_rank: int = 0
    tp_size: int = 1

    @property
    def layers(self) -> range:
        """Indices of its layers in the whole model."""
        return range(self.first_layer, self.first_layer + self.num_layers)

    def local(self, config: ModelConfig) -> ModelConfig:
        """The shape of this part, as if it were a model."""
        return replace(
            config,
            num_layers=self.num_layers,
            sliding_windows=config.sliding_windows[self.first_layer : self.layers.stop],
            num_heads=config.num_heads // self.tp_size,
            num_kv_heads=max(1, config.num_kv_heads // self.tp_size),
            intermediate_size=config.intermediate_size // self.tp_size,
        )

    def rows(self, projection: Projection, config: ModelConfig) -> slice:
        """Which outputs of a matrix of the whole model it has."""
        match projection.split:
            case Split.OUTPUTS:
                return self._share(projection.outputs // self.tp_size)
            case Split.KEYS if config.num_kv_heads < self.tp_size:
                head = self.tp_rank * config.num_kv_heads // self.tp_size
                return slice(head * config.head_dim, (head + 1) * config.head_dim)
            case Split.KEYS:
                return self._share(projection.outputs // self.tp_size)
            case Split.VOCABULARY:
                return self._share(-(-projection.outputs // self.tp_size))
        return slice(None)

    def columns(self, projection: Projection) -> slice:
        """Which of its inputs."""
        if projection.split is Split.INPUTS:
            return self._share(projection.inputs // self.tp_size)
        return slice(None)

    def _share(self, size: int) -> slice:
        return slice(self.tp_rank * size, (self.tp_rank + 1) * size)

    def owns(self, name: str, config: ModelConfig) -> bool:
        """Whether a weight of this name would be wrong to leave out: nobody else looks at it."""
        if self.is_first and self.is_last:
            return True
        prefixes = (config.names.layer.format(layer=layer) for layer in self.layers)
        return any(name.startswith(f"{prefix}.") for prefix in prefixes)


def whole(config: ModelConfig) -> ModelPart:
    """All of a model."""
    return ModelPart(0, config.num_layers)


def parts_of(
    config: ModelConfig, num_layers: Sequence[int], tp_size: int = 1
) -> list[list[ModelPart]]:
    """The parts of a model whose stages have so many layers each: by stage, then by share.

    Raises:
        ConfigError: its matrices cannot be shared by so many processes.
    """
    _check_shares(config, tp_size)
    last = len(num_layers) - 1
    return [
        [
            ModelPart(sum(num_layers[:stage]), count, stage == 0, stage == last, rank, tp_size)
            for rank in range(tp_size)
        ]
        for stage, count in enumerate(num_layers)
    ]


def _check_shares(config: ModelConfig, tp_size: int) -> None:
    keys = config.num_kv_heads
    reason = None
    if config.num_heads % tp_size:
        reason = f"{config.num_heads} query heads"
    elif keys % tp_size and tp_size % keys:
        reason = f"{keys} key heads, which neither divide it nor can be divided by it"
    elif config.intermediate_size % tp_size:
        reason = f"an MLP of {config.intermediate_size}"
    if reason is not None:
        raise ConfigError(f"tensor_parallel_size is {tp_size}; the model has {reason}")


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
