"""Weights in int8, from the files of a model to the arrays that the kernels read."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from stallfree.errors import UnsupportedModelError
from stallfree.kernels import shapes
from stallfree.kernels.int8_matmul import MAX_INPUTS, PANEL, column_sums_of, pack, padded
from stallfree.kernels.ir import LANES
from stallfree.model.config import ModelConfig
from stallfree.model.layer_weights import NormWeights, Projection, layer_weights
from stallfree.model.part import ModelPart
from stallfree.model.weight_reader import WeightReader

HALF = PANEL // 2  # outputs of the gate in a panel, beside as many of up


class Int8Loader:
    """Weights from a reader to the arrays of the kernels.

    Args:
        config: of the whole model.
        part: that is loaded.
        reader: of that part.
        threads: that help.

    Raises:
        UnsupportedModelError: a matrix is so wide that sums might not fit in 32 bits.
    """

    def __init__(
        self, config: ModelConfig, part: ModelPart, reader: WeightReader, threads: int
    ) -> None:
        self._config, self._part, self._reader = config, part, reader
        self._threads = threads
        self._width = padded(config.hidden_size, PANEL)
        self.num_bytes = 0
        heads = config.num_heads * config.head_dim
        inputs = max(self._width, padded(heads, LANES), padded(config.intermediate_size, HALF))
        if inputs > MAX_INPUTS:
            raise UnsupportedModelError(
                f"a matrix has {inputs:,} inputs; int8 sums of more than {MAX_INPUTS:,} are not "
                "exact: use --dtype float32"
            )

    def single(self, matrix: Projection) -> shapes.Product:
        """The embedding or the output layer."""
        values, scales = self._reader.int8(matrix)
        made = self._empty(1, len(values), self._width, has_bias=False)
        self._put(made, 0, values, scales)
        return shapes.Product(*(array[0] for array in made))

    def nothing(self) -> shapes.Product:
        """In place of an embedding or an output layer that another stage has."""
        made = self._empty(1, 0, self._width, has_bias=False)
        return shapes.Product(*(array[0] for array in made))

    def norm(self, norm: NormWeights | None, *, of_heads: bool = False) -> np.ndarray:
        """What a norm multiplies by, float32: (padded hidden,), or (D,); (0,) without a norm."""
        if norm is None:
            return np.empty(0, dtype=np.float32)
        weight = self._reader.floats(f"{norm.name}.weight", (norm.size,)).float()
        weight = weight + 1 if self._config.norm == "rms + 1" else weight
        self.num_bytes += weight.nbytes
        return np.asarray(weight if of_heads else _pad(weight, self._width))

    def all_layers(self, on_layer: Callable[[int], None] | None) -> shapes.Layers:
        """The layers of the part; `on_layer` is called with the index of each in the model."""
        config = self._part.local(self._config)
        heads = config.num_heads * config.head_dim
        kv_heads = 2 * config.num_kv_heads * config.head_dim
        inner, count = padded(config.intermediate_size, HALF), config.num_layers
        qkv = self._empty(count, heads + kv_heads, self._width, config.qkv_bias)
        output = self._empty(count, config.hidden_size, padded(heads, LANES), config.output_bias)
        gate_up = self._empty(count, 2 * inner, self._width, config.mlp_bias)
        down = self._empty(count, config.hidden_size, inner, config.mlp_bias)
        norms: dict[str, list[np.ndarray]] = {}
        for layer, index in enumerate(self._part.layers):
            weights = layer_weights(self._config, index)
            mlp = weights.mlps[0]
            for name in ("input_norm", "mlp_norm", "post_attention_norm", "post_mlp_norm"):
                norms.setdefault(name, []).append(self.norm(getattr(weights, name)))
            for name in ("q_norm", "k_norm"):
                norms.setdefault(name, []).append(self.norm(getattr(weights, name), of_heads=True))
            self._fill(qkv, layer, [weights.q, weights.k, weights.v])
            self._fill(output, layer, [weights.output])
            self._fill(gate_up, layer, mlp.projections[:-1], _interleave)
            self._fill(down, layer, [mlp.down])
            if on_layer is not None:
                on_layer(index)
        return shapes.Layers(
            **{name: np.stack(of_layers) for name, of_layers in norms.items()},
            qkv=qkv,
            output=output,
            gate_up=gate_up,
            down=down,
            windows=np.array([window or 0 for window in config.sliding_windows], dtype=np.int64),
            ropes=np.array([config.rope_number(layer) for layer in range(count)], dtype=np.int64),
        )

    def _empty(self, count: int, outputs: int, inputs: int, has_bias: bool) -> shapes.Product:
        outputs = padded(outputs, PANEL)
        weights = torch.empty((count, outputs // PANEL, inputs * PANEL), dtype=torch.int8)
        self.num_bytes += weights.nbytes + count * outputs * 8
        return shapes.Product(
            weights=weights.numpy(),
            scales=np.zeros((count, outputs), dtype=np.float32),
            column_sums=np.zeros((count, outputs), dtype=np.int32),
            bias=np.zeros((count, outputs if has_bias else 0), dtype=np.float32),
        )

    def _fill(
        self,
        product: shapes.Product,
        layer: int,
        projections: list[Projection],
        arrange: Callable[[list[torch.Tensor]], torch.Tensor] = torch.cat,
    ) -> None:
        """Read the projections of one layer's product; `arrange` makes one tensor of theirs."""
        read = [self._reader.int8(each) for each in projections]
        bias = None
        if projections[0].has_bias:
            biases = [self._reader.bias(each, of_sums=True) for each in projections]
            bias = arrange([each.float() for each in biases])
        values, scales = (arrange([each[i] for each in read]) for i in (0, 1))
        self._put(product, layer, values, scales, bias)

    def _put(
        self,
        product: shapes.Product,
        layer: int,
        values: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> None:
        out = torch.from_numpy(product.weights[layer])
        values = _pad(values, product.scales.shape[1])
        pack(values, out.shape[1] // PANEL, out)
        product.scales[layer, : len(scales)] = scales.numpy()
        product.column_sums[layer] = column_sums_of(self._threads, product.weights[layer])
        if bias is not None:
            product.bias[layer, : len(bias)] = bias.numpy()


def _pad(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """`tensor` with zeros after its end, up to `size` along the first dimension."""
    if len(tensor) == size:
        return tensor
    return torch.cat([tensor, tensor.new_zeros((size - len(tensor), *tensor.shape[1:]))])


def _interleave(gate_and_up: list[torch.Tensor]) -> torch.Tensor:
    """32 outputs of the gate, the same 32 of up, and so on."""
    size = padded(len(gate_and_up[0]), HALF)
    stacks = [_pad(each, size).unflatten(0, (-1, HALF)) for each in gate_and_up]
    return torch.stack(stacks, dim=1).flatten(0, 2)
