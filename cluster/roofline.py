"""How fast a replica decodes and prefills: bytes over bandwidth, operations over peak rate, and
what every layer costs besides.

    seconds of a pass = dense + experts + attention + activations + NVLink + network + fixed

Dense linears, experts and attention each take the longer of their bytes at the memory's speed and
their operations at the tensor cores' (a roofline). Activations are written and read between kernels
at the memory's speed, and what crosses GPUs is not overlapped with anything.
Every layer has a fixed cost besides (launches, norms, routing, the latency of collectives), and
every collective one more where it leaves the node. `cluster/work.py` counts bytes and operations;
the constants of `Efficiency` are fitted on published figures (`cluster/fit.py`), and
docs/roofline.md shows the errors. Nothing here ran on a GPU of ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from cluster.choice import Asked, tally_of
from cluster.deployability import require_target
from cluster.hardware import GPUS, Hardware, Machines
from cluster.matrix import Target
from cluster.memory import DENSE_GROUPS, GPU_STEP_TOKENS, Footprint
from cluster.work import Attention, Layout, Model, Part, Pass
from deepseek.config import ModelConfig
from deepseek.errors import DeployError
from deepseek.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """The constants. `memory` is the share of HBM bandwidth that a pass reads at, `decode` and
    `prefill` the shares of the tensor cores' peak in a step and in a chunk, `link` the share of
    NVLink's and the network's bandwidth; `activation_bytes` are what kernels of a layer write and
    read for one token, `layer_s` the seconds that a layer costs besides, and `hop_s` those of a
    collective that leaves the node. All but `link` are fitted. Larger shares, fewer bytes and fewer
    seconds are never slower."""

    memory: float
    decode: float
    prefill: float
    activation_bytes: float
    link: float
    layer_s: float
    hop_s: float


@dataclass(frozen=True, slots=True)
class Seconds:
    """Where the time of one pass goes."""

    dense: float
    experts: float
    attention: float
    activations: float
    nvlink: float
    network: float
    fixed: float

    @property
    def by_name(self) -> dict[str, float]:
        return {
            "dense linears": self.dense,
            "routed experts": self.experts,
            "attention": self.attention,
            "activations": self.activations,
            "NVLink": self.nvlink,
            "the network between nodes": self.network,
            "the fixed cost of layers": self.fixed,
        }

    @property
    def total(self) -> float:
        return sum(self.by_name.values())

    @property
    def limit(self) -> str:
        """What takes longest."""
        return max(self.by_name, key=self.by_name.__getitem__)


def pass_seconds(
    work: Pass, layout: Layout, hardware: Hardware, efficiency: Efficiency, compute: float
) -> Seconds:
    """The time of one pass. `compute` is the share of the tensor cores' peak that it reaches."""

    memory = hardware.memory_bandwidth * efficiency.memory

    def part(part: Part) -> float:
        computed = sum(
            number / (hardware.peak_tflops[form] * 1e12 * compute)
            for form, number in part.operations.items()
        )
        return max(part.bytes / memory, computed)

    def sent(num_bytes: float, bandwidth: float) -> float:
        return num_bytes / (bandwidth * efficiency.link) if num_bytes else 0.0

    hops = work.collectives if layout.nodes > 1 else 0
    return Seconds(
        dense=part(work.dense),
        experts=part(work.experts),
        attention=part(work.attention),
        activations=work.rows * work.layers * efficiency.activation_bytes / memory,
        nvlink=sent(work.nvlink_bytes, hardware.nvlink_bandwidth / 2),
        network=sent(work.network_bytes, hardware.network_bandwidth),
        fixed=work.layers * efficiency.layer_s + hops * efficiency.hop_s,
    )


@dataclass(frozen=True, slots=True)
class ReplicaSpeed:
    """The speed of one replica. Times are seconds; all methods are pure and cost microseconds.

    `kv_tokens` are the tokens that its KV cache holds, over all its requests; 0 when the weights
    leave no room. `chunk_tokens` is the prefill budget of one pass, over all GPUs.
    """

    layout: Layout
    hardware: Hardware
    model: Model
    efficiency: Efficiency
    kv_tokens: int
    page_tokens: int
    chunk_tokens: int

    def step(self, batch: float, context: float) -> Seconds:
        """One decoding step of `batch` sequences of `context` tokens each on average."""
        work = self.model.decode(self.layout, batch, context)
        return pass_seconds(
            work, self.layout, self.hardware, self.efficiency, self.efficiency.decode
        )

    def decode_s(self, batch: float, context: float) -> float:
        """Seconds of one step: what a running request waits for its next token while nothing is
        prefilled."""
        return self.step(batch, context).total

    def chunk(self, tokens: float, context: float) -> Seconds:
        """One chunk of `tokens` prompt tokens that see `context` tokens each on average."""
        work = self.model.prefill(self.layout, tokens, context)
        return pass_seconds(
            work, self.layout, self.hardware, self.efficiency, self.efficiency.prefill
        )

    def prefill_tokens_per_s(self, prompt: float) -> float:
        """Prompt tokens per second while only prompts of `prompt` tokens are computed: full chunks,
        into which short prompts go together. A token sees half of its prompt on average."""
        return self.chunk_tokens / self.chunk(self.chunk_tokens, prompt / 2).total

    def prefill_s(self, prompt: float) -> float:
        """Seconds of one prompt alone on an idle replica, until its first token: the whole chunks
        and the rest. With attention by sequences one GPU computes all its attention, and the
        replica takes as long as if every GPU had such a prompt."""
        share = self.layout.gpus if self.layout.attention == "dp" else 1
        left, seconds = prompt * share, 0.0
        whole, rest = divmod(left, self.chunk_tokens)
        if whole:
            seconds += whole * self.chunk(self.chunk_tokens, prompt / 2).total
        return seconds + (self.chunk(rest, prompt / 2).total if rest else 0.0)

    def tpot_s(self, batch: float, isl: float, osl: float) -> float:
        """Seconds per output token of a request in a steady state of `batch` running requests: its
        own steps, and between them the prompts of those that take the others' places, isl/osl
        tokens for each of their tokens. A running sequence has isl + osl/2 tokens on average."""
        others = max(0.0, batch - 1.0) * isl / osl
        return self.decode_s(batch, isl + osl / 2) + others / self.prefill_tokens_per_s(isl)

    def output_tokens_per_s(self, batch: float, isl: float, osl: float) -> float:
        """Output tokens per second of the whole replica in that steady state."""
        prompts = batch * isl / osl / self.prefill_tokens_per_s(isl)
        return batch / (self.decode_s(batch, isl + osl / 2) + prompts)

    def max_batch(self, isl: int, osl: int) -> int:
        """Requests of isl + osl tokens that the KV cache holds at once, in whole pages."""
        pages = -(-(isl + osl) // self.page_tokens)
        return self.kv_tokens // (pages * self.page_tokens)


def replica_speed(
    config: ModelConfig,
    recipe: Recipe,
    machines: Machines,
    *,
    target: str = "trtllm",
    attention: Attention = "tp",
    ep: int | None = None,
    chunk_tokens: int | None = None,
    efficiency: Efficiency | None = None,
) -> ReplicaSpeed:
    """The speed of one replica of `config` under `recipe` on all of `machines`.

    Whole experts on every GPU unless `ep` says into how many groups of GPUs they are spread.
    `target` decides the KV cache's layout. A pass prefills `chunk_tokens`, without it as many as
    the planner's workspace is for, in every node where attention is split by sequences.
    `efficiency` are the fitted constants without it. The first call for a model and recipe takes a
    second, later ones microseconds.

    Raises:
        DeployError: the machines have no GPU, `ep` does not divide their number, or the target is
            unknown.
        RecipeError: the recipe cannot be applied to this model.
    """
    if not machines.hardware.is_gpu:
        raise DeployError(
            f"--hardware {machines.label}: the roofline is fitted on GPUs; name one, as in "
            "8xH800-80GB"
        )
    ep = machines.count if ep is None else ep
    if not 1 <= ep <= machines.count or machines.count % ep:
        raise DeployError(
            f"{ep} groups of experts do not divide {machines.count} GPUs; use "
            f"{machines.count} (whole experts) or 1 (each cut over all)"
        )
    layout = Layout(machines.count, ep, attention)
    parallel = layout.nodes if attention == "dp" else 1
    has_fp8 = "fp8" in machines.hardware.peak_tflops
    model = _model(config, recipe, machines.count, require_target(target), has_fp8)
    return ReplicaSpeed(
        layout=layout,
        hardware=machines.hardware,
        model=model,
        efficiency=FITTED if efficiency is None else efficiency,
        kv_tokens=_kv_tokens(model.footprint, layout, machines.hardware),
        page_tokens=model.footprint.page_tokens,
        chunk_tokens=chunk_tokens or GPU_STEP_TOKENS * parallel,
    )


@lru_cache(maxsize=1024)
def _model(config: ModelConfig, recipe: Recipe, gpus: int, target: Target, has_fp8: bool) -> Model:
    machines = Machines(next(gpu for gpu in GPUS.values() if gpu.is_gpu), gpus)
    footprint = Asked(config, recipe, machines, False, None, None).footprint(target, machines)
    return Model.of(tally_of(config, recipe), footprint, has_fp8=has_fp8)


def _kv_tokens(footprint: Footprint, layout: Layout, hardware: Hardware) -> int:
    """Tokens that the replica caches. By sequences every GPU has other tokens, and whole copies of
    what is not a routed expert."""
    if layout.attention == "tp":
        return footprint.kv_tokens(hardware.usable_bytes)
    groups = {
        name: replace(group, values_per_gpu=group.values, scales_per_gpu=group.scales)
        if name in (*DENSE_GROUPS, "embeddings")
        else group
        for name, group in footprint.groups.items()
    }
    return layout.gpus * replace(footprint, groups=groups).kv_tokens(hardware.usable_bytes)


#: Share of a link's bandwidth: DeepEP reaches 726 of 900 GB/s of NVLink.
#: https://github.com/deepseek-ai/DeepEP
LINK = 0.8
#: Fitted by `python -m cluster.fit` on the figures of `cluster/published.py`; a test refits.
FITTED = Efficiency(
    memory=0.691,
    decode=0.567,
    prefill=0.78,
    activation_bytes=1.8e6,
    link=LINK,
    layer_s=96.9e-6,
    hop_s=47.2e-6,
)
