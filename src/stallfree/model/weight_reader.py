"""Reading the weights that a configuration says there are."""

from __future__ import annotations

import math

import torch

from stallfree.errors import WeightFileError
from stallfree.model.config import ModelConfig
from stallfree.model.cut import Cut
from stallfree.model.layer_weights import Projection, Split, fused_outputs
from stallfree.model.part import ModelPart
from stallfree.model.weights import WeightSource

SCALES = ".scales"  # added to the name of an int8 tensor, names the scales of its rows
_RECOMPUTED = ".rotary_emb.inv_freq"  # old files keep it; it follows from the configuration


class WeightReader:
    """Reads weights one by one, checks their shapes, and knows which were never asked for.

    Args:
        config: of the whole model.
        weights: of the whole model.
        part: that is read; what belongs elsewhere may be left unread.

    Attributes:
        num_parameters: numbers read so far, scales aside. What several parts of a model read is
            counted in one of them.
    """

    def __init__(self, config: ModelConfig, weights: WeightSource, part: ModelPart) -> None:
        self._config = config
        self._part = part
        self._weights = weights
        self._read_names: set[str] = set()
        self.num_parameters = 0

    def weight(self, projection: Projection) -> torch.Tensor:
        """The part's share of the matrix (outputs, inputs) of a projection, of floats.

        Raises:
            WeightFileError: there is none, or it has another shape or type.
        """
        return self._floats_of(projection, f"{projection.name}.weight", (projection.inputs,))

    def bias(self, projection: Projection, *, of_sums: bool = False) -> torch.Tensor:
        """The part's share of the bias (outputs,) of a projection that has one.

        Args:
            projection: whose bias.
            of_sums: where the inputs are split, each share gets the bias, which it adds to the sums
                of all; otherwise one gets it, which adds it to its part of them.

        Raises:
            WeightFileError: as above.
        """
        share = self._floats_of(projection, f"{projection.name}.bias", ())
        if projection.split is Split.INPUTS and self._part.tp_rank > 0 and not of_sums:
            return torch.zeros_like(share)
        return share

    def floats(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A weight of floats.

        Raises:
            WeightFileError: as above.
        """
        return _checked_floats(name, self._read(name, shape))

    def int8(self, projection: Projection) -> tuple[torch.Tensor, torch.Tensor]:
        """The part's share of a matrix in int8, and the scales float32 (outputs,) of its outputs.

        Raises:
            WeightFileError: as above.
        """
        name = f"{projection.name}.weight"
        values = self._share(projection, name, (projection.outputs, projection.inputs))
        if values.dtype != torch.int8:
            raise WeightFileError(f"weight {name} is of type {values.dtype}, not int8")
        return values, self._share(projection, name + SCALES, (projection.outputs,))

    def finish(self) -> None:
        """Refuse weights that the architecture has no place for: answers would be wrong.

        An output layer may be there although the embedding serves as one.
        """
        if self._config.tie_embeddings:
            head = f"{self._config.names.head}.weight"
            self._read_names |= {head, head + SCALES}
        ignored = self._config.names.ignored
        unread = sorted(
            name
            for name in self._weights.names() - self._read_names
            if self._part.owns(name, self._config)
            and not name.endswith(_RECOMPUTED)
            and not name.startswith(ignored)
        )
        if unread:
            raise WeightFileError(
                f"{self._config.architecture} as configured has no weight {unread[0]} "
                f"(nor {len(unread) - 1} others that are in the files)"
            )

    def _floats_of(
        self, projection: Projection, name: str, inputs: tuple[int, ...]
    ) -> torch.Tensor:
        """The part's share of the floats of a projection, whose outputs have `inputs` each."""
        if projection.part is None:
            share = self._share(projection, name, (projection.outputs, *inputs))
            return _checked_floats(name, share)
        config = self._config
        fused = self.floats(name, (fused_outputs(config), *inputs))
        queries = config.num_heads // config.num_kv_heads
        grouped = fused.unflatten(0, (config.num_kv_heads, queries + 2, config.head_dim))
        heads = {"q": slice(queries), "k": slice(-2, -1), "v": slice(-1, None)}
        whole = grouped[:, heads[projection.part]].flatten(0, 2)
        return self._cut(projection).of(whole) if self._part.tp_size > 1 else whole

    def _share(self, projection: Projection, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The part's share of a matrix, or of what each of its outputs has one of."""
        if self._part.tp_size == 1:
            return self._read(name, shape)
        share = self._read(name, shape, self._cut(projection))
        if projection.split is Split.VOCABULARY:
            rows = self._part.rows(projection, self._config)
            missing = rows.stop - rows.start - len(share)
            return torch.cat([share, share.new_zeros((missing, *share.shape[1:]))])
        return share

    def _cut(self, projection: Projection) -> Cut:
        rows = self._part.rows(projection, self._config)
        return Cut(rows, self._part.columns(projection))

    def _read(self, name: str, shape: tuple[int, ...], cut: Cut | None = None) -> torch.Tensor:
        """A weight that must have `shape`, or a part of it."""
        found = self._weights.shape(name)
        if found != shape:
            raise WeightFileError(
                f"weight {name} has shape {found}; the configuration says {shape}"
            )
        if name not in self._read_names:  # a fused one is read for each of its parts
            self._read_names.add(name)
            self.num_parameters += math.prod(shape) if self._counts(name) else 0
        return self._weights.tensor(name, cut)

    def _counts(self, name: str) -> bool:
        """Whether this is the part of the model in which a weight is counted."""
        is_table = name == f"{self._config.names.embedding}.weight"
        is_scale = name.endswith(SCALES)
        return self._part.tp_rank == 0 and not is_scale and (self._part.is_first or not is_table)


def _checked_floats(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point():
        raise WeightFileError(f"weight {name} is of type {tensor.dtype}, which is not a float")
    return tensor
