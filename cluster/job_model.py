"""What quantizing a whole model takes on nodes of eight GPUs, on paper: seconds and bytes.

No GPU was at hand: this is arithmetic, and every number that goes into it stands in `inputs()` with
its source. It follows the schedule of `quant_jobs/worker.py`, which a reader may hold it against:

    read      experts by their owners, each byte once in the cluster; the trunk by one worker
    forward A attention over a worker's own blocks; gate and up of its own experts (Gram matrices)
    solve     units: 32 groups of experts, the attention's inputs, the shared or dense MLP
    forward B the same through the quantized layer, down and the combination included
    exchange  what enters the MLP to every worker, experts' rows back to the owners of the tokens
    boundary  the activations, float32, to storage: what a killed job resumes from
    write     one worker writes the layer's file

Reading the next layer and writing the last one run beside the compute of the layer in hand, and
share the storage's bandwidth: a layer takes max(read + write, compute), where compute is the sum of
the rest. The slowest worker counts. Two sets of rates: `peak_rates`, everything at the hardware's
peak and no overhead (no schedule of this kind is faster), and `expected_rates`, with fractions of
peak that were measured on a CPU, published, or assumed.

T tokens · S tokens of one block · W workers (one per GPU) · E experts · D hidden · I intermediate
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

from cluster.hardware import GPUS, GPUS_PER_NODE
from deepseek.config import ModelConfig
from deepseek.errors import DeployError
from deepseek.formats import stored_bytes
from deepseek.inventory import Group, TensorSpec, global_tensors, layer_tensors, linears
from deepseek.recipe import Recipe, Scheme

#: As MoE-Quant calibrates: 512 sequences of 4096 tokens.
CALIBRATION_TOKENS, BLOCK_TOKENS = 512 * 4096, 4096
GPU = GPUS["H800-80GB"]

#: Restated from `quant_jobs` (which this package may not import); a test holds them equal.
EXPERT_GROUPS = 32
SAMPLE_TOKENS = 256
AWQ_CANDIDATES = 20

_PIECES = Path(__file__).with_name("pieces.json")
_MIB = 1 << 20
_F32 = 4


@dataclass(frozen=True, slots=True)
class Input:
    """One number that the model believes, and why."""

    name: str
    value: float
    unit: str
    source: Literal["measured", "published", "assumed"]
    where: str


@lru_cache
def pieces() -> dict[str, Any]:
    """What `bench/pieces.py --save` measured and counted, with date and machine."""
    found: dict[str, Any] = json.loads(_PIECES.read_text(encoding="utf-8"))
    return found


@lru_cache
def inputs() -> dict[str, Input]:
    """Every number besides shapes and counted work, by name."""
    found = pieces()
    fraction, rate = found["fractions"], found["rates"]
    here = "bench/pieces.py, CPU"
    sheet = "NVIDIA data sheet H100 SXM; the H800 differs in NVLink and FP64 only"
    carried = f"{here}: carried to the GPU, a hypothesis"
    return {
        one.name: one
        for one in (
            Input("float32 peak", 67e12, "FLOP/s per GPU", "published", sheet),
            Input("HBM", GPU.memory_bandwidth, "B/s per GPU", "published", "cluster/hardware.py"),
            Input("PCIe peak", 64e9, "B/s per GPU", "published", "Gen5 x16, one direction"),
            Input("PCIe", 50e9, "B/s per GPU", "assumed", "what large pinned copies reach"),
            Input("fabric peak", 8 * 50e9, "B/s per node", "published", "8 x 400 Gb/s IB"),
            Input("fabric", 5.6e9, "B/s per node", "published", "Ray over TCP: ray#42632, 45 Gb/s"),
            Input("object store", 32e9, "B/s per node", "published", "Ray, many puts: ray#39127"),
            Input("matmul", 0.7, "of peak", "assumed", "large float32 GEMM, cuBLAS"),
            Input("Gram", fraction["gram"], "of matmul", "measured", carried),
            Input("factor", fraction["factor"], "of matmul", "measured", carried),
            Input("elementwise", fraction["elementwise"], "of HBM", "measured", carried),
            Input("launch", 5e-6, "s per kernel", "assumed", "without CUDA graphs; 5 to 20 us"),
            Input("read digest", rate["digest"] * 1e9, "B/s per worker", "measured", here),
            Input("write digest", rate["hash for saving"] * 1e9, "B/s", "measured", here),
            Input("Ray call", rate["ray call us"] * 1e-6, "s", "measured", here),
            Input("imbalance", 1.25, "busiest / mean", "assumed", "routed tokens of a worker"),
            Input("start", 60.0, "s", "assumed", "Ray, imports, CUDA contexts, opening shards"),
        )
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """FLOP/s and bytes/s of one GPU unless said; seconds for `launch`, `call` and `start`."""

    matmul: float
    gram: float
    factor: float
    elementwise: float
    pcie: float
    put: float  # into the node's object store, one worker
    fabric: float  # of one node
    storage: float  # of one node, reads and writes together
    read_digest: float  # one worker
    write_digest: float  # one worker
    launch: float
    call: float
    start: float
    imbalance: float


def peak_rates(storage: float) -> Rates:
    """The hardware's peaks, no overheads."""
    value = {name: one.value for name, one in inputs().items()}
    return Rates(
        matmul=value["float32 peak"],
        gram=value["float32 peak"],
        factor=value["float32 peak"],
        elementwise=value["HBM"],
        pcie=value["PCIe peak"],
        put=math.inf,
        fabric=value["fabric peak"],
        storage=storage,
        read_digest=math.inf,
        write_digest=math.inf,
        launch=0.0,
        call=0.0,
        start=0.0,
        imbalance=1.0,
    )


def expected_rates(storage: float) -> Rates:
    """Peaks times the fractions of `inputs()`, and overheads."""
    value = {name: one.value for name, one in inputs().items()}
    matmul = value["float32 peak"] * value["matmul"]
    return Rates(
        matmul=matmul,
        gram=matmul * value["Gram"],
        factor=matmul * value["factor"],
        elementwise=value["HBM"] * value["elementwise"],
        pcie=value["PCIe"],
        put=value["object store"] / GPUS_PER_NODE,
        fabric=value["fabric"],
        storage=storage,
        read_digest=value["read digest"],
        write_digest=value["write digest"],
        launch=value["launch"],
        call=value["Ray call"],
        start=value["start"],
        imbalance=value["imbalance"],
    )


@dataclass(frozen=True, kw_only=True)
class Job:
    """One quantize job. `batch` is how many experts GPTQ solves at once (0: its whole group);
    `boundary_bytes` is the size of an activation on storage."""

    config: ModelConfig
    recipe: Recipe
    nodes: int
    tokens: int = CALIBRATION_TOKENS
    batch: int = 0
    boundary_bytes: int = _F32

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise DeployError(f"--nodes {self.nodes}: at least one node is needed")
        if self.tokens < BLOCK_TOKENS:
            raise DeployError(
                f"--tokens {self.tokens}: give at least one block of {BLOCK_TOKENS} tokens"
            )

    @property
    def workers(self) -> int:
        return self.nodes * GPUS_PER_NODE

    @cached_property
    def schemes(self) -> dict[str, Scheme]:
        return self.recipe.resolve(self.config)

    @property
    def sees_all(self) -> bool:
        """Whether every expert is measured on every token."""
        return self.recipe.expert_coverage.policy == "all"

    @property
    def groups_per_worker(self) -> int:
        """Expert groups of the busiest worker; beyond 32 workers no one has less than one."""
        return math.ceil(EXPERT_GROUPS / self.workers)

    @property
    def experts_per_group(self) -> int:
        return math.ceil(self.config.n_routed_experts / EXPERT_GROUPS)

    @property
    def activation_bytes(self) -> int:
        """Of all tokens at one layer boundary, float32."""
        return self.tokens * self.config.hidden_size * _F32

    @property
    def wave_tokens(self) -> int:
        """Tokens whose expert outputs are under way at once: a block of each worker."""
        return min(self.workers * BLOCK_TOKENS, self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTime:
    """Seconds of one decoder layer by phase."""

    read: float
    forward_a: float
    gram: float
    solve: float
    forward_b: float
    exchange: float
    boundary: float
    calls: float
    write: float

    @property
    def storage(self) -> float:
        """Beside the compute."""
        return self.read + self.write

    @property
    def compute(self) -> float:
        return sum(getattr(self, name) for name in COMPUTE)

    @property
    def seconds(self) -> float:
        return max(self.storage, self.compute)


#: Phases that follow each other.
COMPUTE = ("forward_a", "gram", "solve", "forward_b", "exchange", "boundary", "calls")
PHASES = tuple(field.name for field in fields(LayerTime))


@dataclass(frozen=True, slots=True)
class JobTime:
    """Seconds of a whole job. `carried`: embeddings, head and MTP layer, read and written as they
    are; `exposed`: the first layer's read and the last one's write, which nothing hides."""

    layers: tuple[LayerTime, ...]
    start: float
    carried: float

    @property
    def exposed(self) -> float:
        return self.layers[0].read + self.layers[-1].write

    @property
    def total(self) -> float:
        return self.start + self.carried + self.exposed + sum(one.seconds for one in self.layers)

    def phase(self, name: str) -> float:
        return sum(getattr(one, name) for one in self.layers)

    @property
    def bound(self) -> str:
        """What most of the time goes to: storage, or the longest phase of the compute."""
        if sum(one.storage > one.compute for one in self.layers) * 2 > len(self.layers):
            return "storage: " + ("read" if self.phase("read") > self.phase("write") else "write")
        return max(COMPUTE, key=self.phase)


def job_time(job: Job, rates: Rates) -> JobTime:
    """Seconds of a job, layer by layer."""
    dense = _layer_time(job, rates, 0)
    first_moe = job.config.first_k_dense_replace
    moe = _layer_time(job, rates, first_moe)
    layers = tuple(
        moe if job.config.is_moe(layer) else dense for layer in range(job.config.num_hidden_layers)
    )
    carried = 2 * _source_bytes(job.config, untouched(job.config)) / rates.storage
    return JobTime(layers, rates.start, carried)


def _layer_time(job: Job, rates: Rates, layer: int) -> LayerTime:
    config, workers, tokens = job.config, job.workers, job.tokens
    mine = tokens / workers
    numel = group_numel(config, layer)
    is_moe = config.is_moe(layer)
    # Rows that the busiest worker's experts see, routed and for statistics.
    share = job.groups_per_worker / EXPERT_GROUPS if is_moe else 0.0
    routed = tokens * config.num_experts_per_tok * share * rates.imbalance
    measured = tokens * config.n_routed_experts * share if job.sees_all else routed
    per_expert = numel["routed_experts"] / max(config.n_routed_experts, 1)
    trunk_mlp = numel["shared_experts"] + numel["dense_mlp"]

    attention = mine * (2 * (numel["attention"] + numel["router"]) + _scores(config))
    dequantized = _elementwise("dequantize_fp8", numel["routed_experts"] * share, rates)
    # Each linear of the trunk is restored for every block that passes.
    restored = _elementwise("dequantize_fp8", numel["attention"], rates) * mine / BLOCK_TOKENS
    # Gate and up (two thirds) are also run by the trunk MLP's owner, over all tokens.
    gate_up = 2 * 2 / 3 * (measured * per_expert + tokens * trunk_mlp)
    down = 2 * (routed * per_expert + mine * trunk_mlp)

    waves = math.ceil(tokens / job.wave_tokens)
    quantized = _elementwise("decompress_int4", numel["routed_experts"] * share, rates)
    return LayerTime(
        read=_read_seconds(job, rates, layer),
        forward_a=(attention + gate_up) / rates.matmul + restored + dequantized,
        gram=_gram_flops(job, layer, measured) / rates.gram,
        solve=_solve_seconds(job, rates, layer),
        forward_b=(attention + down) / rates.matmul + restored + quantized * waves,
        exchange=_exchange_seconds(job, rates, layer, routed),
        boundary=_boundary_seconds(job, rates),
        calls=_CALLS_PER_WAVE * waves * rates.call,
        write=_write_seconds(job, rates, layer) if layer < config.num_hidden_layers else 0.0,
    )


#: Rounds of calls that the driver waits for: attend, observe, reattend, run_experts, combine.
_CALLS_PER_WAVE = 5


def _scores(config: ModelConfig) -> int:
    """FLOPs of attention's two products for one token: half a block of keys on average."""
    widths = config.qk_head_dim + config.v_head_dim
    return 2 * config.num_attention_heads * widths * BLOCK_TOKENS // 2


def _gram_flops(job: Job, layer: int, measured: float) -> float:
    """Of the busiest worker: its experts' Gram matrices, and the largest unit of the trunk."""
    config, d_model = job.config, job.config.hidden_size
    flops = 0.0
    if _is_gptq(job, layer, "routed_experts"):
        # Where all experts see all tokens they share one matrix, which each worker makes.
        flops += 2 * (job.tokens if job.sees_all else measured) * d_model**2
        flops += 2 * measured * config.moe_intermediate_size**2
    trunk = [
        sum(2 * job.tokens * width**2 for width in unit_widths(unit))
        for unit in trunk_units(config, layer)
        if any(job.schemes[spec.module].algorithm == "gptq" for spec in unit)
    ]
    return flops + max(trunk, default=0)


def _solve_seconds(job: Job, rates: Rates, layer: int) -> float:
    """Of the busiest worker: its groups of experts, and the largest unit of the trunk."""
    config = job.config
    trunk = [_unit_seconds(job, rates, unit, batch=1) for unit in trunk_units(config, layer)]
    if not config.is_moe(layer):
        return max(trunk)
    expert = [spec for spec in linears(config, layer) if spec.expert == 0]
    batch = min(job.batch or job.experts_per_group, job.experts_per_group)
    group = _unit_seconds(job, rates, expert, batch=batch, experts=job.experts_per_group)
    if job.sees_all and _is_gptq(job, layer, "routed_experts"):
        # gate's and up's factor is the layer's: one per worker in place of one per expert.
        factor = _factor_flops(config.hidden_size) / rates.factor
        group -= factor * job.experts_per_group
        return group * job.groups_per_worker + factor + max(trunk)
    return group * job.groups_per_worker + max(trunk)


def _unit_seconds(
    job: Job, rates: Rates, specs: list[TensorSpec], *, batch: int, experts: int = 1
) -> float:
    """Solve the linears of one unit: `experts` of them alike, `batch` at a time in GPTQ."""
    seconds = 0.0
    algorithms = {job.schemes[spec.module].algorithm for spec in specs}
    if "gptq" in algorithms:
        widths = unit_widths(specs)
        seconds += experts * sum(_factor_flops(width) for width in widths) / rates.factor
    for spec in specs:
        scheme, numel = job.schemes[spec.module], spec.numel * experts
        if not scheme.is_quantized:
            continue
        outputs, width = spec.shape
        error = 4 * SAMPLE_TOKENS * numel / rates.matmul
        seconds += error + _elementwise("dequantize_fp8", numel, rates)
        seconds += _elementwise(f"compress_int{scheme.bits}", numel, rates)
        if scheme.algorithm == "awq":
            seconds += AWQ_CANDIDATES * _elementwise("awq_candidate", numel, rates)
            seconds += _elementwise("awq_clip", numel, rates)
        elif scheme.algorithm == "gptq":
            one = pieces()["work"]["gptq"]
            launches = one["launches"] / one["columns"] * width * math.ceil(experts / batch)
            work = one["bytes"] / one["weights"] * numel / rates.elementwise
            work += outputs * experts * width**2 / rates.matmul
            seconds += max(launches * rates.launch, work)  # launching runs ahead of computing
    return seconds


def _factor_flops(width: int) -> float:
    """Cholesky, inverse, Cholesky of one matrix: K^3 / 3 + 2 K^3 / 3 + K^3 / 3."""
    return 4 / 3 * width**3


def _elementwise(name: str, numel: float, rates: Rates) -> float:
    """Seconds of a counted piece on so many weights."""
    one = pieces()["work"][name]
    per_weight = one["bytes"] / rates.elementwise + one["flops"] / rates.matmul
    return float(per_weight / one["weights"] * numel)


def _exchange_seconds(job: Job, rates: Rates, layer: int, routed: float) -> float:
    """Copies between GPU and object store and across nodes, both passes, one after the other."""
    config, row = job.config, job.config.hidden_size * _F32
    mine, remote = job.tokens / job.workers, (job.nodes - 1) / job.nodes
    whole, rows_back = job.tokens * row, job.tokens * config.num_experts_per_tok * row
    puts = mine * row  # z, pass A; every worker takes all of it to its GPU
    pcie = puts + whole * _takes(job, layer)
    fabric = whole * remote
    attention = [s for s in linears(config, layer) if s.group == "attention"]
    if any(job.schemes[spec.module].algorithm == "gptq" for spec in attention):
        widths = [width for u in trunk_units(config, layer)[:-1] for width in unit_widths(u)]
        puts += mine * sum(widths) * _F32
        pcie += (mine * sum(widths) + job.tokens * max(widths)) * _F32
        fabric += job.tokens * max(widths) * _F32 * remote
    if config.is_moe(layer):
        puts += mine * row + routed * row
        pcie += mine * row + whole + routed * row + rows_back / job.workers
        fabric += whole * remote + rows_back / job.nodes * remote
    return puts / rates.put + pcie / rates.pcie + fabric / rates.fabric


def _takes(job: Job, layer: int) -> int:
    """How often pass A brings what entered the MLP to a GPU: to solve, and before it to find the
    scale that the layer shares (SmoothQuant: once; AWQ: to weigh and to compare candidates)."""
    algorithms = {job.schemes[s.module].algorithm for s in linears(job.config, layer)}
    return 1 + (2 if "awq" in algorithms else 1 if "smoothquant" in algorithms else 0)


def _read_seconds(job: Job, rates: Rates, layer: int) -> float:
    """The trunk's reader: its share of the experts too. Digests follow in the same thread."""
    experts, trunk = layer_source_bytes(job.config, layer)
    own = experts * job.groups_per_worker / EXPERT_GROUPS + trunk
    return (experts / job.nodes + trunk) / rates.storage + own / rates.read_digest


def _write_seconds(job: Job, rates: Rates, layer: int) -> float:
    """One worker writes the layer, digesting as it goes."""
    size = layer_output_bytes(job, layer)
    return size / rates.storage + size / rates.write_digest


def _boundary_seconds(job: Job, rates: Rates) -> float:
    """Every worker writes its own blocks; those of a node share its storage."""
    size = job.tokens * job.config.hidden_size * job.boundary_bytes / job.nodes
    return size / rates.storage + size / GPUS_PER_NODE / rates.write_digest


# --- memory ---


@dataclass(frozen=True, slots=True)
class Use:
    """One thing held at the peak: bytes of one node's host memory and of one GPU."""

    name: str
    host: int = 0
    gpu: int = 0


def memory_use(job: Job) -> list[Use]:
    """Where memory is fullest: the host in pass B of a MoE layer, a GPU while it solves one."""
    config, layer = job.config, job.config.first_k_dense_replace
    experts, trunk = layer_source_bytes(config, layer)
    numel = group_numel(config, layer)
    per_expert = numel["routed_experts"] // config.n_routed_experts
    own = job.activation_bytes // job.nodes
    group = job.experts_per_group
    widths = unit_widths([s for s in linears(config, layer) if s.expert == 0])
    gram = sum(width**2 for width in widths) * _F32
    trunk_gram = max(
        (
            sum(width**2 for width in unit_widths(unit)) * _F32
            for unit in trunk_units(config, layer)
            if any(job.schemes[spec.module].algorithm == "gptq" for spec in unit)
        ),
        default=0,
    )
    grams = group * gram if _is_gptq(job, layer, "routed_experts") else 0
    rows = job.wave_tokens * config.num_experts_per_tok * config.hidden_size * _F32
    heads = config.num_attention_heads * BLOCK_TOKENS**2 * _F32
    return [
        Use("stored bytes of two layers", 2 * experts // job.nodes + 2 * trunk),
        Use("packed layers: in hand, being written", 2 * layer_output_bytes(job, layer)),
        Use("activations into and out of the layer", 2 * own),
        Use("residual stream after attention (one wave)", own * job.wave_tokens // job.tokens),
        Use("what enters the MLP, all blocks", job.activation_bytes, job.activation_bytes),
        Use("expert outputs of one wave, both ends", 2 * rows // job.nodes),
        Use("one group of experts, float32", 0, group * per_expert * _F32),
        # A stack of factors and one damped copy exist beside the Gram matrices.
        Use("Gram matrices and factors", 0, max(2 * grams + gram, 3 * trunk_gram)),
        Use("attention scores of one block, unfused", 0, 2 * heads),
        Use("CUDA context and allocator", 0, int(GPU.memory_bytes * (1 - GPU.usable_fraction))),
    ]


def peak_bytes(uses: Iterable[Use]) -> tuple[int, int]:
    """(host of one node, one GPU). On a GPU, scores are gone before a group is solved."""
    uses = list(uses)
    host = sum(use.host for use in uses)
    scores = sum(use.gpu for use in uses if use.name.startswith("attention scores"))
    solving = [use for use in uses if use.name.startswith(("one group", "Gram"))]
    rest = sum(use.gpu for use in uses) - scores - sum(use.gpu for use in solving)
    return host, rest + max(scores, sum(use.gpu for use in solving))


def largest_calibration(job: Job, host_bytes: float) -> int:
    """Tokens, in whole blocks, with which a node stays within `host_bytes`; 0 where none do."""
    blocks = 0
    step = 1 << 12
    while step:
        tried = (blocks + step) * BLOCK_TOKENS
        one = Job(config=job.config, recipe=job.recipe, nodes=job.nodes, tokens=tried)
        if peak_bytes(memory_use(one))[0] <= host_bytes:
            blocks += step
        else:
            step //= 2
    return blocks * BLOCK_TOKENS


# --- shapes ---


def group_numel(config: ModelConfig, layer: int) -> Mapping[Group, int]:
    """Values of one layer by group; 0 for a group that it lacks."""
    found: dict[Group, int] = {
        "attention": 0,
        "routed_experts": 0,
        "shared_experts": 0,
        "dense_mlp": 0,
        "router": 0,
        "norms": 0,
    }
    for spec in layer_tensors(config, layer):
        found[spec.group] += spec.numel
    return found


def trunk_units(config: ModelConfig, layer: int) -> list[list[TensorSpec]]:
    """What one worker each solves of the trunk: linears that share an input; the MLP comes last."""
    trunk = [spec for spec in linears(config, layer) if spec.expert is None]
    roles = (("q_a_proj", "kv_a_proj_with_mqa"), ("q_b_proj",), ("kv_b_proj",), ("o_proj",))
    units = [[spec for spec in trunk if spec.role in some] for some in roles]
    return [*units, [spec for spec in trunk if spec.group != "attention"]]


def unit_widths(specs: Iterable[TensorSpec]) -> list[int]:
    """Widths of the distinct inputs of a unit: gate and up share one."""
    return sorted({spec.shape[1] for spec in specs})


def layer_source_bytes(config: ModelConfig, layer: int) -> tuple[int, int]:
    """Stored bytes of a source layer: routed experts, and the trunk."""
    specs = list(layer_tensors(config, layer))
    experts = _source_bytes(config, (spec for spec in specs if spec.expert is not None))
    return experts, _source_bytes(config, (spec for spec in specs if spec.expert is None))


def layer_output_bytes(job: Job, layer: int) -> int:
    """Bytes of a quantized layer."""
    return sum(
        stored_bytes(job.schemes[spec.module], spec.shape[0], spec.shape[1])
        if spec.kind == "linear"
        else _high_bytes(spec)
        for spec in layer_tensors(job.config, layer)
    )


def untouched(config: ModelConfig) -> list[TensorSpec]:
    """What is carried through as it is: embeddings, final norm, head, MTP layers."""
    mtp = range(config.num_hidden_layers, config.num_layers_with_mtp)
    return [*global_tensors(config), *(s for layer in mtp for s in layer_tensors(config, layer))]


def source_bytes(config: ModelConfig) -> int:
    """Bytes of the whole source checkpoint."""
    layers = sum(sum(layer_source_bytes(config, n)) for n in range(config.num_hidden_layers))
    return layers + _source_bytes(config, untouched(config))


def _source_bytes(config: ModelConfig, specs: Iterable[TensorSpec]) -> int:
    native = Scheme(weights="fp8-block" if config.weight_block_size else "bf16")
    return sum(
        stored_bytes(native, spec.shape[0], spec.shape[1])
        if spec.kind == "linear"
        else _high_bytes(spec)
        for spec in specs
    )


def _high_bytes(spec: TensorSpec) -> int:
    return spec.numel * (_F32 if spec.kind == "float32" else 2)


def _is_gptq(job: Job, layer: int, group: Group) -> bool:
    return any(
        job.schemes[spec.module].algorithm == "gptq"
        for spec in linears(job.config, layer)
        if spec.group == group
    )
