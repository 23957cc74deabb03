"""Estimates what quantizing a whole model takes: seconds, bytes and memory.

Arithmetic, no measurement: `work.py` and `layer.py` count the work of the schedule, `rates.py` has
the rates and where each comes from. The schedule of a layer (`quant_jobs/job/layer_steps.py`):

    attend -> wait until the layer before is written -> solve -> carry
    meanwhile: the next layer is read; this layer is written once it is solved, and its boundary
    (the activations that the next layer starts from) as it is carried

so a layer takes max(read, storage, solve + max(attend + carry, write + boundary)). A head that is
quantized comes behind the last layer, which is then carried through; nothing hides its parts.
Within a step the slowest worker counts, and the parts of its work are added up: products,
elementwise kernels, launches, copies. That is pessimistic where a GPU overlaps them, which the code
does not ask it to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from quant_jobs.cost.head import head_memory, head_steps
from quant_jobs.cost.layer import LayerWork, num_grams
from quant_jobs.cost.rates import GPU, Rates
from quant_jobs.cost.shapes import (
    F32,
    counted_inputs,
    globals_output_bytes,
    globals_source_bytes,
    layer_linears,
    layer_output_bytes,
    layer_source_bytes,
    layer_units,
    mtp_bytes,
    source_bytes,
)
from quant_jobs.cost.work import Job, Section, Step

#: In the order of the table.
PHASES = (
    *("read", "forward A", "statistics", "solve", "forward B", "exchange", "calls"),
    *("boundary", "write"),
)
#: Phases that follow each other; the others run meanwhile.
COMPUTE = PHASES[1:-2]
SECTIONS: tuple[Section, ...] = ("attend", "solve", "carry")


@dataclass(frozen=True, slots=True)
class LayerTime:
    """Seconds of one decoder layer by phase and, without `read` and `write`, by section."""

    phases: dict[str, float]
    sections: dict[str, float]
    storage: float  # of one node's bytes, reads and writes together

    @property
    def seconds(self) -> float:
        files = self.phases["write"] + self.phases["boundary"]
        around = max(self.sections["attend"] + self.sections["carry"], files)
        return max(self.phases["read"], self.storage, self.sections["solve"] + around)


@dataclass(frozen=True, slots=True)
class JobTime:
    """Seconds of a whole job.

    `carried` is the copying of embeddings, head and MTP layer, which the driver does while the
    workers start. `head` are the phases of a quantized head, and with it of what is written beside
    it (the embeddings); empty where it is copied. `exposed` is the first layer's read and the
    last one's write: nothing hides them, nor `head`.
    """

    layers: tuple[LayerTime, ...]
    start: float
    carried: float
    head: dict[str, float]

    @property
    def exposed(self) -> float:
        return self.layers[0].phases["read"] + self.layers[-1].phases["write"]

    @property
    def total(self) -> float:
        layers = sum(layer.seconds for layer in self.layers)
        return max(self.start, self.carried) + self.exposed + layers + sum(self.head.values())

    def phase(self, name: str) -> float:
        """Seconds of one phase in all layers and of the head, hidden or not."""
        return sum(layer.phases[name] for layer in self.layers) + self.head.get(name, 0.0)

    @property
    def limit(self) -> str:
        """Phase that most of the time goes to: reading or writing where they hide the rest, else
        the longest phase of the compute."""
        storage_bound = [
            layer for layer in self.layers if layer.seconds > 1.001 * sum(layer.sections.values())
        ]
        if len(storage_bound) * 2 > len(self.layers):
            return max(("read", "boundary", "write"), key=self.phase)
        return max(COMPUTE, key=self.phase)


def job_time(job: Job, rates: Rates) -> JobTime:
    """Seconds of a job. Equal layers are counted once; the last one is carried through for a head
    that is quantized only."""
    kinds: dict[object, LayerTime] = {}
    layers = []
    last = job.config.num_hidden_layers - 1
    for layer in range(last + 1):
        linears = layer_linears(job.config, layer)
        kind = layer == last, tuple((spec.shape, job.scheme(spec)) for spec, _ in linears)
        if kind not in kinds:
            kinds[kind] = layer_time(job, rates, layer)
        layers.append(kinds[kind])
    size = mtp_bytes(job.config) + (0 if job.head else globals_source_bytes(job.config))
    carried = size * (2 / rates.storage + 1 / rates.read_digest + 1 / rates.write_digest)
    return JobTime(tuple(layers), rates.start, carried, head_time(job, rates))


def head_time(job: Job, rates: Rates) -> dict[str, float]:
    """Seconds of a quantized head by phase, one after the other; empty where it is copied."""
    if job.head is None:
        return {}
    phases = dict.fromkeys(PHASES, 0.0)
    for step in head_steps(job):
        for name, seconds in _step_seconds(step, rates).items():
            phases[name] += seconds
    read = globals_source_bytes(job.config)
    written = globals_output_bytes(job.config, job.head)
    phases["read"] = read * (1 / rates.storage + 1 / rates.read_digest)
    phases["write"] = written * (1 / rates.storage + 1 / rates.write_digest)
    return phases


def layer_time(job: Job, rates: Rates, layer: int) -> LayerTime:
    """Seconds of one layer."""
    phases = dict.fromkeys(PHASES, 0.0)
    sections: dict[str, float] = dict.fromkeys(SECTIONS, 0.0)
    work = LayerWork(job, layer)
    for step in work.steps():
        for name, seconds in _step_seconds(step, rates).items():
            phases[name] += seconds
            sections[step.section] += seconds
    if job.is_carried(layer):
        phases["boundary"] = _boundary_seconds(job, rates)
    phases["read"], phases["write"] = (
        _read_seconds(job, rates, layer),
        _write_seconds(job, rates, layer),
    )
    return LayerTime(phases, sections, _storage_bytes(job, layer) / rates.storage)


def _step_seconds(step: Step, rates: Rates) -> dict[str, float]:
    """Seconds of all repeats: the busiest worker's by phase, the network's, and the calls'."""
    busiest: dict[str, float] = {}
    for worker in step.workers:
        phases: dict[str, float] = {"exchange": 0.0}
        for phase, load in worker.items():
            phases[phase] = rates.compute(load)
            phases["exchange"] += rates.copies(load)
        if sum(phases.values()) >= sum(busiest.values()):
            busiest = phases
    busiest["exchange"] += step.fabric / rates.network
    busiest["calls"] = step.rounds * rates.call
    return {name: seconds * step.repeat for name, seconds in busiest.items()}


def _read_seconds(job: Job, rates: Rates, layer: int) -> float:
    """Seconds of the worker that reads the trunk and its share of the experts; the same thread
    digests them."""
    experts, trunk = layer_source_bytes(job.config, layer)
    own = trunk
    if experts:
        shares = LayerWork(job, layer).shares
        owned = max(sum(len(unit.experts) for unit in share) for share in shares)
        own += experts * owned // job.config.n_routed_experts
    return (experts / job.nodes + trunk) / rates.storage + own / rates.read_digest


def _write_seconds(job: Job, rates: Rates, layer: int) -> float:
    """Seconds of the one worker that writes the layer and digests it; what was solved on other
    nodes comes over the network."""
    size = layer_output_bytes(job.config, job.scheme, layer)
    return size * (1 / rates.storage + 1 / rates.write_digest + job.remote / rates.network)


def _boundary_bytes(job: Job) -> float:
    """Bytes of one boundary that one node writes."""
    return job.activation_bytes / job.nodes


def _boundary_seconds(job: Job, rates: Rates) -> float:
    """Every worker writes its own blocks; those of a node share its storage."""
    size = _boundary_bytes(job)
    # `save_blocks` takes each block's digest once more than `save_tensors` does.
    digest = 1 / rates.write_digest + 1 / rates.read_digest
    return size / rates.storage + size / job.per_node * digest


def _storage_bytes(job: Job, layer: int) -> float:
    """Bytes through the storage of the node that reads the trunk or writes the layer."""
    experts, trunk = layer_source_bytes(job.config, layer)
    written = layer_output_bytes(job.config, job.scheme, layer)
    return experts / job.nodes + trunk + written + _boundary_bytes(job)


def bytes_read(job: Job) -> int:
    """Bytes that the whole cluster reads from storage: every stored byte once."""
    return source_bytes(job.config)


def bytes_written(job: Job) -> tuple[int, int]:
    """(the artifact's tensors, all boundaries), without the headers of their files."""
    layers = range(job.config.num_hidden_layers)
    tensors = sum(layer_output_bytes(job.config, job.scheme, n) for n in layers)
    outside = mtp_bytes(job.config) + globals_output_bytes(job.config, job.head)
    stored = job.tokens // job.block_tokens * job.block_tokens * job.config.hidden_size * F32
    return tensors + outside, stored * sum(map(job.is_carried, layers))


# --- memory ---

_HEAD = "the head in float32, twice, and what lies beside it"


@dataclass(frozen=True, slots=True)
class Use:
    """Memory of one purpose, in bytes: in the processes of one node (`host`), in its object store,
    and on one GPU, where each is fullest."""

    name: str
    host: int = 0
    store: int = 0
    gpu: int = 0


def memory_use(job: Job) -> list[Use]:
    """Memory of the first MoE layer (the last layer where none is): of the host while blocks are
    carried through it, of a GPU while it is solved."""
    config = job.config
    layer = min(config.first_k_dense_replace, config.num_hidden_layers - 1)
    experts, trunk = layer_source_bytes(config, layer)
    out = layer_output_bytes(config, job.scheme, layer)
    own = job.activation_bytes // job.nodes
    waves = min(2 * job.waves[0][0] * job.block_tokens, job.tokens)  # two are under way at a time
    rows = waves * config.num_experts_per_tok * job.row
    group = max(layer_units(config, layer), key=lambda unit: unit.numel)
    grams = _gram_bytes(job, layer)
    heads = config.num_attention_heads * job.block_tokens**2 * F32
    reserved = int(GPU.memory_bytes * (1 - GPU.usable_fraction))
    head = [] if job.head is None else [Use(_HEAD, head_memory(job)[0], 0, head_memory(job)[1])]
    return [
        Use("source of two layers, as stored", 2 * experts // job.nodes, 2 * trunk, trunk),
        Use("packed layer in hand, and the one being written", out // job.nodes, 2 * out),
        Use("activations into and out of the layer", 2 * own),
        Use("what enters the MLP, all blocks", 0, job.activation_bytes, job.activation_bytes),
        Use("expert rows of two waves", rows // job.nodes, rows // job.nodes),
        # GPTQ stacks weights, and moves them where `act_order` asks for that.
        Use("float32 weights of one unit, and GPTQ's copy", 0, 0, 2 * group.numel * F32),
        # A factor takes the place of its matrix; one more is in work at a time.
        Use("Gram matrices of one unit, and one in work", 0, 0, 2 * grams),
        Use("attention scores of one block, if unfused", 0, 0, 2 * heads),
        Use("CUDA context and fragmentation", 0, 0, reserved),
        *head,
    ]


def _gram_bytes(job: Job, layer: int) -> int:
    """Bytes of the float32 Gram matrices of the unit that has most."""
    sizes = [0]
    for unit in layer_units(job.config, layer):
        size = 0
        for counted in counted_inputs(unit):
            if any(job.algorithm(spec) == "gptq" for spec in counted.readers):
                size += counted.width**2 * F32 * num_grams(job, unit, counted)
        sizes.append(size)
    return max(sizes)


def peak_bytes(uses: Iterable[Use]) -> tuple[int, int, int]:
    """Peak bytes of (the processes of one node, its object store, one GPU). On a GPU, attention
    ends before the MLP's inputs are brought there to solve. The head comes when no layer is there;
    of what processes hold, the activations stay."""
    uses = list(uses)
    head = next((use for use in uses if use.name == _HEAD), Use(_HEAD))
    scores = sum(use.gpu for use in uses if use.name.startswith("attention scores"))
    reserved = sum(use.gpu for use in uses if use.name.startswith("CUDA"))
    activations = sum(use.host for use in uses if use.name.startswith("activations"))
    host = sum(use.host for use in uses) - head.host
    gpu = sum(use.gpu for use in uses) - scores - head.gpu
    stored = sum(use.store for use in uses)
    return (
        max(host, activations + head.host),
        stored,
        max(gpu, scores + reserved, head.gpu + reserved),
    )


def largest_calibration(job: Job) -> int:
    """Tokens, in whole blocks, with which a GPU's memory is not exceeded; 0 where none are."""
    blocks, step = 0, 1 << 14
    while step:
        tried = replace(job, tokens=(blocks + step) * job.block_tokens)
        if peak_bytes(memory_use(tried))[2] <= GPU.memory_bytes:
            blocks += step
        else:
            step //= 2
    return blocks * job.block_tokens
