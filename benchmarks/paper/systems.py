"""The systems of the Sarathi-Serve paper: models, devices, targets, and the settings of schedulers.

From section 5 and table 1 to 3 of the paper (OSDI'24). Devices are those of Azure's NC96ads v4
(A100 as PCIe cards, bridged in pairs) and a machine with eight A40.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from stallfree.bench.workloads import Recipe
from stallfree.engine.scheduling_settings import SchedulingSettings
from stallfree.sim.data import load_device, load_model_shape
from stallfree.sim.roofline import Efficiency, Roofline
from stallfree.sim.system import System

DATASETS = {"openchat_sharegpt4": 8192, "arxiv_summarization": 16384}  # with the longest request
# What the artifact's batches carry beside the devices' work; the paper's capacities do not.
ARTIFACT = Efficiency(launch_s=0.78e-3, sequence_s=1e-3)


@dataclass(frozen=True, slots=True)
class PaperSystem:
    """A row of the paper's table of models.

    Attributes:
        model, device: names of files in `stallfree.sim`.
        tensor_parallel, pipeline_parallel: how the model is split.
        strict_s, relaxed_s: targets for the P99 of the time between tokens.
        relaxed_budget: Sarathi-Serve's tokens under the relaxed target; 512 under the strict one.
        orca_batch: most requests that Orca runs at once, and FasterTransformer, which reserves the
            whole context for each as well.
        is_one_node: see `Roofline`.
    """

    model: str
    device: str
    tensor_parallel: int
    pipeline_parallel: int
    strict_s: float
    relaxed_s: float
    relaxed_budget: int = 2048
    orca_batch: int = 16
    is_one_node: bool = True

    @property
    def targets(self) -> dict[str, float]:
        """Both, by name."""
        return {"strict": self.strict_s, "relaxed": self.relaxed_s}

    def times(self, efficiency: Efficiency | None = None) -> Roofline:
        """Step times."""
        return Roofline(
            load_device(self.device),
            load_model_shape(self.model),
            self.tensor_parallel,
            self.pipeline_parallel,
            efficiency,
            is_one_node=self.is_one_node,
        )

    def system(
        self, settings: SchedulingSettings, context: int, efficiency: Efficiency | None = None
    ) -> System:
        """What is simulated."""
        times = self.times(efficiency)
        return System(lambda _: times, settings, times.kv_cache_tokens, context, tile_tokens=128)

    def schedulers(self, target: str) -> Mapping[str, SchedulingSettings]:
        """The settings that are compared under a target, by name."""
        budget = 512 if target == "strict" else self.relaxed_budget
        return {
            "sarathi": SchedulingSettings(scheduler="sarathi", token_budget=budget),
            "sarathi --tbt-slo": SchedulingSettings(tbt_slo_s=self.targets[target]),
            "vllm": SchedulingSettings(scheduler="vllm"),
            "orca": SchedulingSettings(scheduler="orca", max_num_seqs=self.orca_batch),
            "faster_transformer": SchedulingSettings(
                scheduler="faster_transformer", max_num_seqs=self.orca_batch
            ),
        }


SYSTEMS = {
    "Mistral-7B": PaperSystem("mistral-7b", "a100-80gb-pcie", 1, 1, 0.1, 0.5),
    "Yi-34B": PaperSystem("yi-34b", "a100-80gb-pcie", 2, 1, 0.2, 1.0),
    "LLaMA2-70B": PaperSystem("llama2-70b", "a40-48gb", 4, 2, 1.0, 5.0, 1536),
    "Falcon-180B": PaperSystem("falcon-180b", "a100-80gb-pcie", 4, 2, 1.0, 5.0, is_one_node=False),
}


def recipe(dataset: str, num_requests: int, seed: int) -> Recipe:
    """Requests of a dataset that arrive one a second, at random."""
    return Recipe(
        lengths=dataset,
        arrivals="poisson",
        num_requests=num_requests,
        requests_per_s=1.0,
        seed=seed,
    )
