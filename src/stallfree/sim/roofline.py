"""Step times of a device and model that are not here, from operations and bytes.

Each part of a layer takes as long as its arithmetic or its memory traffic, whichever is longer, at
a share of the device's peaks: `Efficiency`. The defaults are what devices do, without what the
processor adds: they were set by hand until prefills of 512 to 16,384 tokens of Yi-34B on two A100
were within 15 % of the Sarathi-Serve artifact's (`benchmarks/paper` shows both). Its decodes take
two to five times as long as these defaults say, which `launch_s` and `sequence_s` account for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stallfree.core.batch import Batch
from stallfree.core.step_time import chunk_context
from stallfree.errors import ConfigError
from stallfree.sim.data import Device, ModelShape


@dataclass(frozen=True, slots=True)
class Efficiency:
    """What programs reach of a device's peaks, and what they spend beside it.

    Attributes:
        matmul: of the peak arithmetic rate, in linear layers.
        attention: the same in the attention of a chunk of a prompt.
        memory: of the peak memory bandwidth.
        link: of the peak bandwidth between devices.
        tile_tokens: rows that matrix kernels round up to.
        layer_s: of launching a layer's kernels and its small operators, for any batch.
        small_passes: of a layer's small operators (norms, rotations, activations) over memory, for
            each token, in vectors of the hidden size; they are not split among devices.
        launch_s: of the processor to launch the kernels of a layer, which takes at least that. The
            artifact's smallest batches show 0.78 ms; the paper's experiments on capacity do not.
        sequence_s: of the processor for each request of an iteration, which the devices wait for.
            The artifact's decode batches show about 1 ms, and again the others do not.
    """

    matmul: float = 0.72
    attention: float = 0.45
    memory: float = 0.8
    link: float = 0.7
    tile_tokens: int = 128
    layer_s: float = 20e-6
    small_passes: float = 55.0
    launch_s: float = 0.0
    sequence_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Work:
    """What a batch asks of a layer: rows, products of queries and keys, and contexts to read."""

    num_tokens: int
    num_sampled: int
    num_sequences: int
    prefill_products: int
    context_read: int


class Roofline:
    """Times of the stages of a model that is split over devices.

    Args:
        device: all of them.
        model: what is split.
        tensor_parallel: devices of a stage, in one node.
        pipeline_parallel: stages.
        efficiency: see there.
        is_one_node: whether all devices are in one node. Otherwise each stage has one of its own,
            and a single stage is spread over two, so that its devices add up over the network.

    Raises:
        ConfigError: there are more stages than layers, or the heads cannot be shared evenly.
    """

    def __init__(
        self,
        device: Device,
        model: ModelShape,
        tensor_parallel: int = 1,
        pipeline_parallel: int = 1,
        efficiency: Efficiency | None = None,
        *,
        is_one_node: bool = True,
    ) -> None:
        if pipeline_parallel > model.layers:
            raise ConfigError(
                f"pipeline_parallel_size is {pipeline_parallel}; "
                f"{model.name} has {model.layers} layers"
            )
        if model.heads % tensor_parallel:
            raise ConfigError(
                f"tensor_parallel_size is {tensor_parallel}; {model.name} has {model.heads} heads, "
                "which it must divide"
            )
        self.device, self.model = device, model
        self.tensor_parallel = tensor_parallel
        self.num_stages = pipeline_parallel
        self.efficiency = efficiency or Efficiency()
        self._is_one_node = is_one_node
        layers, more = divmod(model.layers, pipeline_parallel)
        self._layers = [layers + (stage < more) for stage in range(pipeline_parallel)]

    @property
    def num_devices(self) -> int:
        """Of a replica."""
        return self.tensor_parallel * self.num_stages

    @property
    def kv_cache_tokens(self) -> int:
        """Tokens whose KV fits beside the weights in nine tenths of all devices' memory.

        Of the stage that has the most layers; where there are fewer KV heads than devices, each of
        these has a copy of one.
        """
        model, layers = self.model, max(self._layers)
        weights = layers * (model.attention_parameters + model.mlp_parameters)
        weights += model.vocab * model.hidden * (1 if self.num_stages > 1 else 2)
        free = 0.9 * self.tensor_parallel * self.device.memory_bytes
        free -= weights * model.bytes_per_parameter
        copies = max(1.0, self.tensor_parallel / model.kv_heads)
        return max(0, int(free / (model.kv_bytes_per_token * copies * layers / model.layers)))

    def seconds(self, batch: Batch) -> Sequence[float]:
        """Time of each stage, with what it sends to the next."""
        work = self._work(batch)
        layer_s = self._layer_s(work)
        times = [layers * layer_s for layers in self._layers]
        times[-1] += self._output_s(work)
        times[0] += self.efficiency.sequence_s * work.num_sequences
        for stage in range(self.num_stages - 1):
            times[stage] += self._send_s(work)
        return times

    def _work(self, batch: Batch) -> _Work:
        products = context_read = 0
        for chunk in batch.chunks:
            window = self.model.sliding_window or chunk.stop
            context_read += min(chunk.stop, window + chunk.num_tokens - 1)
            if not chunk.is_decode:
                whole = min(max(0, window - chunk.start), chunk.num_tokens)
                products += chunk_context(chunk.start, whole) + (chunk.num_tokens - whole) * window
        return _Work(
            batch.num_tokens, len(batch.sampling), len(batch.chunks), products, context_read
        )

    def _layer_s(self, work: _Work) -> float:
        model, own = self.model, self.efficiency
        parameters = model.attention_parameters + model.mlp_parameters
        linear_s = self._linear_s(parameters, work.num_tokens)
        operations = 4 * model.heads * model.head_dim * work.prefill_products
        rate = self.tensor_parallel * self.device.flops_per_s * own.attention
        copies = max(1.0, self.tensor_parallel / model.kv_heads)
        read = work.context_read * copies * model.kv_bytes_per_token / model.layers
        attention_s = max(operations / rate, read / self._bytes_per_s)
        reductions = 1 if model.parallel_attention else 2
        passed = own.small_passes * work.num_tokens * model.hidden * model.bytes_per_parameter
        small_s = own.layer_s + passed / (self.device.memory_bytes_per_s * own.memory)
        reduce_s = reductions * self._reduce_s(work.num_tokens)
        return max(own.launch_s, linear_s + attention_s + reduce_s + small_s)

    def _linear_s(self, parameters: int, num_tokens: int) -> float:
        rows = -(-num_tokens // self.efficiency.tile_tokens) * self.efficiency.tile_tokens
        rate = self.tensor_parallel * self.device.flops_per_s * self.efficiency.matmul
        arithmetic_s = 2 * parameters * rows / rate
        return max(arithmetic_s, parameters * self.model.bytes_per_parameter / self._bytes_per_s)

    @property
    def _bytes_per_s(self) -> float:
        """What the devices of a stage read together."""
        peak = self.tensor_parallel * self.device.memory_bytes_per_s
        return peak * self.efficiency.memory

    def _reduce_s(self, num_tokens: int) -> float:
        """Adding up the parts of all devices of a stage: a ring, 2 (n - 1) steps, as in NCCL."""
        devices = self.tensor_parallel
        if devices == 1:
            return 0.0
        moved = num_tokens * self.model.hidden * self.model.bytes_per_parameter
        moved *= 2 * (devices - 1) / devices
        device = self.device
        over_network = 2 if self.num_stages == 1 and not self._is_one_node else 0
        within = 2 * (devices - 1) - over_network
        latency_s = device.base_latency_s
        latency_s += within * device.link_step_s + over_network * device.network_step_s
        rate = device.network_bytes_per_s if over_network else device.bytes_per_s_among(devices)
        return moved / (rate * self.efficiency.link) + latency_s

    def _output_s(self, work: _Work) -> float:
        return self._linear_s(self.model.vocab * self.model.hidden, work.num_sampled or 1)

    def _send_s(self, work: _Work) -> float:
        moved = work.num_tokens * self.model.hidden * self.model.bytes_per_parameter
        device = self.device
        rate, step_s = device.network_bytes_per_s, device.network_step_s
        if self._is_one_node:
            rate, step_s = device.link_bytes_per_s, device.link_step_s
        return moved / (rate * self.efficiency.link) + device.base_latency_s + step_s
