"""Reading the weights that a configuration says there are."""

from __future__ import annotations

import torch

from stallfree.errors import WeightFileError
from stallfree.model.config import ModelConfig
from stallfree.model.layer_weights import Projection, fused_outputs
from stallfree.model.weights import WeightSource

SCALES = ".scales"  # added to the name of an int8 tensor, names the scales of its rows
_RECOMPUTED = ".rotary_emb.inv_freq"  # old files keep it; it follows from the configuration


class WeightReader:
    """Reads weights one by one, checks their shapes, and knows which were never asked for.

    Attributes:
        num_parameters: numbers read so far, scales aside.
    """

    def __init__(self, config: ModelConfig, weights: WeightSource) -> None:
        self._config = config
        self._weights = weights
        self._unread = set(weights.names())
        self.num_parameters = 0

    def weight(self, projection: Projection) -> torch.Tensor:
        """The matrix (outputs, inputs) of a projection, of floats.

        Raises:
            WeightFileError: there is none, or it has another shape or type.
        """
        return self._rows(projection, f"{projection.name}.weight", (projection.inputs,))

    def bias(self, projection: Projection) -> torch.Tensor:
        """The bias (outputs,) of a projection that has one.

        Raises:
            WeightFileError: as above.
        """
        return self._rows(projection, f"{projection.name}.bias", ())

    def floats(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A weight of floats.

        Raises:
            WeightFileError: as above.
        """
        tensor = self._read(name, shape)
        if not tensor.is_floating_point():
            raise WeightFileError(f"weight {name} is of type {tensor.dtype}, which is not a float")
        return tensor

    def int8(self, name: str, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """A weight in int8, and the scales float32 (out,) of its rows.

        Raises:
            WeightFileError: as above.
        """
        values = self._read(name, shape)
        if values.dtype != torch.int8:
            raise WeightFileError(f"weight {name} is of type {values.dtype}, not int8")
        scales = self._weights.tensor(name + SCALES)
        self._unread.discard(name + SCALES)
        return values, _checked(name + SCALES, scales, shape[:1])

    def finish(self, *, unused: str | None = None) -> None:
        """Refuse weights that the architecture has no place for: answers would be wrong.

        Args:
            unused: a weight that may be there although nothing asks for it.
        """
        if unused is not None:
            self._unread -= {unused, unused + SCALES}
        ignored = self._config.names.ignored
        unread = sorted(
            name
            for name in self._unread
            if not name.endswith(_RECOMPUTED) and not name.startswith(ignored)
        )
        if unread:
            raise WeightFileError(
                f"{self._config.architecture} as configured has no weight {unread[0]} "
                f"(nor {len(unread) - 1} others that are in the files)"
            )

    def _rows(self, projection: Projection, name: str, inputs: tuple[int, ...]) -> torch.Tensor:
        """The rows of a projection in the tensor that holds it."""
        if projection.part is None:
            return self.floats(name, (projection.outputs, *inputs))
        config = self._config
        fused = self.floats(name, (fused_outputs(config), *inputs))
        queries = config.num_heads // config.num_kv_heads
        grouped = fused.unflatten(0, (config.num_kv_heads, queries + 2, config.head_dim))
        heads = {"q": slice(queries), "k": slice(-2, -1), "v": slice(-1, None)}
        return grouped[:, heads[projection.part]].flatten(0, 2)

    def _read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = _checked(name, self._weights.tensor(name), shape)
        if name in self._unread:  # a fused one is read for each of its parts
            self._unread.remove(name)
            self.num_parameters += tensor.numel()
        return tensor


def _checked(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if tuple(tensor.shape) != shape:
        raise WeightFileError(
            f"weight {name} has shape {tuple(tensor.shape)}; the configuration says {shape}"
        )
    return tensor
