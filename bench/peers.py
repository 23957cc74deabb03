"""Beside llm-compressor (GPTQ) and nvidia-modelopt (AWQ): wall time, peak memory and mean KL.

    python bench/peers.py --peer-python /tmp/peers/bin/python [--model DIR] [--save FILE]

All tools quantize the routed experts of the same checkpoint to symmetric INT4 in groups of 128, on
the same token ids, each in a process of its own (`peer_jobs.py`), one after the other. Peers
compute with `--threads` threads; ours with one (`--workers 0`: no Ray, as peers have none), or, in
the rows that say so, on a Ray of its own with as many workers of one thread each. Peers cannot read
the FP8 release; they get a BF16 copy, whose making is not counted. modelopt runs in this
environment, its experts un-fused by hand; llm-compressor needs another version of transformers, and
so an environment of its own:

    python -m venv /tmp/peers
    echo torch==2.13.0 > /tmp/constraints.txt
    /tmp/peers/bin/pip install -c /tmp/constraints.txt torch==2.13.0 llmcompressor==0.14.0.1

The KL compares the checkpoint that each tool wrote, unpacked to float32 and run by transformers in
float32, with the dequantized source, run likewise. For AWQ the comparison is not exact: modelopt
keeps a scale per linear that the engine must apply to its inputs; ours folds all of its scales.

"job" is loading, quantizing and saving; "whole" is the process with its imports, and its Ray. On
a busy machine read the CPU seconds, which count all processes of the job. Memory is that of all
processes of the job (ours with Ray's), sampled five times a second, or less often where it is many
gigabytes, so that sampling costs 5 % of a core at most: "resident" is the sum of proportional set
sizes; "of it anonymous" leaves out the pages of files (mapped weights and libraries, which the
kernel may drop).

On a random checkpoint memory shows more (its KL says nothing about a trained model):

    python -m quant_jobs synthesize --output runs/wide --layers 4 --experts 16 --hidden 2048 \\
        --intermediate 4096 --moe-intermediate 1024 --heads 16 --vocab 1024
    python bench/peers.py --model runs/wide --peer-python ... --threads 1 --blocks 8 \\
        --heldout-blocks 4 --only 'gptq, topk$|awq, topk$|awq_lite'
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import torch
import typer
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import safe_open
from torch import Tensor

from deepseek.artifact.documents import COPIED_FILES
from deepseek.artifact.reader import ArtifactReader
from deepseek.artifact.tensors import pop_linear
from deepseek.cli import make_app, run
from deepseek.formats import decompress
from deepseek.inventory import linears
from deepseek.source.checkpoint import CheckpointReader
from deepseek.tensor_files import save_tensors
from quant_jobs.calibration.token_blocks import TokenBlocks, load_token_blocks
from quant_jobs.evaluation.metrics import Interval, compare_logits, estimate

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "tiny-deepseek-v3"
JOBS = ROOT / "bench" / "peer_jobs.py"

#: Set in the environment of a job to identify all of its processes, Ray's daemons included.
MARK = "INTSERVE_BENCH_JOB"
#: Least time between two samples, and the wait as a multiple of the time that a sample took. For a
#: sample the kernel walks all pages, which takes a tenth of a second per few gigabytes.
SAMPLE_S = 0.2
SAMPLE_REST = 20
BLOCK_TOKENS = 512

app = make_app(__doc__ or "")


@dataclass(frozen=True, slots=True)
class Contender:
    """One job. `method` is the tool's own name of the algorithm. `on_ray` runs ours on a Ray of its
    own, with as many workers as there are threads, instead of in one process, as peers run."""

    tool: str
    method: str
    coverage: str = "topk"
    act_order: bool = False
    on_ray: bool = False

    @property
    def name(self) -> str:
        order = ", act order" if self.act_order else ""
        where = ", on Ray" if self.on_ray else ""
        return f"{self.method}, {self.coverage}{order}{where}"


#: Rows to compare stand together, ours first. llm-compressor's own defaults are all experts on all
#: tokens, and activation order.
CONTENDERS = (
    Contender("ours", "max"),
    Contender("ours", "gptq"),
    Contender("ours", "gptq", on_ray=True),
    Contender("llm-compressor", "gptq"),
    Contender("ours", "gptq", "all", True),
    Contender("llm-compressor", "gptq", "all", True),
    Contender("ours", "awq"),
    Contender("ours", "awq", on_ray=True),
    Contender("modelopt", "awq_lite"),
    Contender("modelopt", "awq_full"),
)


@dataclass(frozen=True, slots=True)
class Result:
    """What one job took. `seconds` are the job's own, `whole_s` is its process; memory in bytes.

    `kl` is in nats per token, None where the job failed; `error` is then the last line of its log.
    """

    contender: Contender
    seconds: dict[str, float]
    whole_s: float
    cpu_s: float
    resident: int
    anonymous: int
    output_bytes: int
    kl: Interval | None = None
    top1: float = 0.0
    error: str = ""

    @property
    def job_s(self) -> float:
        return sum(value for name, value in self.seconds.items() if name != "import")


@app.command()
def main(
    peer_python: Annotated[
        Path | None, typer.Option(help="Python with llm-compressor; without it, modelopt only.")
    ] = None,
    model: Annotated[Path, typer.Option(help="Source checkpoint.")] = MODEL,
    calibration: Annotated[Path, typer.Option()] = MODEL / "calibration.txt",
    heldout: Annotated[Path, typer.Option()] = MODEL / "heldout.txt",
    blocks: Annotated[int, typer.Option(min=1, help="Calibration blocks of 512 tokens.")] = 32,
    heldout_blocks: Annotated[int, typer.Option(min=2)] = 24,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    only: Annotated[
        str, typer.Option(help="Regular expression: jobs whose tool and method hold it.")
    ] = "",
    save: Annotated[Path | None, typer.Option(help="Write the results as JSON here.")] = None,
) -> None:
    """See the module's docstring."""
    pythons = {"ours": Path(sys.executable), "modelopt": Path(sys.executable)}
    if peer_python is not None:
        pythons["llm-compressor"] = peer_python.absolute()
    source = CheckpointReader(model)
    calibration_blocks = load_token_blocks(calibration, model, blocks, BLOCK_TOKENS)
    judge = Judge(source, load_token_blocks(heldout, model, heldout_blocks, BLOCK_TOKENS))
    results = []
    with tempfile.TemporaryDirectory(prefix="peers-") as name:
        folder = Path(name)
        begun = time.monotonic()
        num_bytes = write_bf16(source, folder / "bf16")
        typer.echo(
            f"{num_bytes / 1e6:.0f} MB in BF16 (written in {time.monotonic() - begun:.0f} s, not "
            f"counted); {calibration_blocks.num_tokens} calibration tokens, {threads} threads.\n"
        )
        save_tensors(folder / "tokens.safetensors", {"ids": calibration_blocks.ids})
        for contender in CONTENDERS:
            is_requested = re.search(only, f"{contender.tool} {contender.name}")
            if contender.tool not in pythons or not is_requested:
                continue
            spec = specify(contender, folder, model, calibration, calibration_blocks, threads)
            result = compete(contender, spec, pythons[contender.tool], folder)
            if not result.error:
                kl, top1 = judge.score(contender.tool, folder / "output")
                result = replace(result, kl=kl, top1=top1)
            results.append(result)
            sys.stderr.write(f"done: {contender.tool} {contender.name} in {result.whole_s:.0f} s\n")
            shutil.rmtree(folder / "output", ignore_errors=True)
    report(results)
    if save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
        save.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")


# --- the jobs ---


def write_bf16(source: CheckpointReader, directory: Path) -> int:
    """Write the source as a BF16 checkpoint, without MTP layers, which peers do not load; return
    its size in bytes."""
    directory.mkdir()
    config = source.config
    weight_map: dict[str, str] = {}
    total = 0
    for layer in ("globals", *range(config.num_hidden_layers)):
        stored = source.read_globals() if layer == "globals" else source.read_layer(layer)
        tensors = {}
        for name, tensor in stored.items():
            is_float32 = tensor.data.dtype == torch.float32  # the router's bias
            tensors[name] = tensor.dequantize().to(torch.float32 if is_float32 else torch.bfloat16)
        file = f"model-{layer}.safetensors"
        total += save_tensors(directory / file, tensors, {"format": "pt"}).num_bytes
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    raw = json.loads((source.directory / "config.json").read_text())
    raw = {k: v for k, v in raw.items() if k != "quantization_config"}
    raw |= {"torch_dtype": "bfloat16", "num_nextn_predict_layers": 0}
    (directory / "config.json").write_text(json.dumps(raw))
    for name in COPIED_FILES:
        if (source.directory / name).exists():
            shutil.copy(source.directory / name, directory / name)
    return total


def specify(
    contender: Contender,
    folder: Path,
    model: Path,
    calibration: Path,
    blocks: TokenBlocks,
    threads: int,
) -> dict[str, Any]:
    """The SPEC.json of `peer_jobs.py`. Our job reads the text itself and gets the same ids."""
    spec = asdict(contender) | {
        "source": str(model.absolute()),
        "calibration": str(calibration.absolute()),
        "bf16": str(folder / "bf16"),
        "tokens": str(folder / "tokens.safetensors"),
        "output": str(folder / "output"),
        "answer": str(folder / "answer.json"),
        "threads": threads,
    }
    rule = {
        "match": "model.layers.*.mlp.experts.*",
        "weights": "int4",
        "group_size": 128,
        "algorithm": contender.method,
    }
    if contender.act_order:
        rule["act_order"] = True
    spec["recipe"] = {
        "name": "peers",
        "description": "One job of bench/peers.py.",
        "rules": [{"match": "*", "weights": "source"}, rule],
        "calibration": {"num_blocks": len(blocks.ids), "block_tokens": blocks.ids.shape[1]},
        "expert_coverage": {"policy": contender.coverage},
        "gate": {"max_perplexity_ratio": 2.0, "max_mean_kl": 1.0, "min_top1": 0.0},
    }
    return spec


def compete(contender: Contender, spec: dict[str, Any], python: Path, folder: Path) -> Result:
    """Run one job and sample its memory."""
    (folder / "spec.json").write_text(json.dumps(spec))
    mark = uuid.uuid4().hex
    environment = os.environ | {
        MARK: mark,
        "PYTHONPATH": str(ROOT),
        "RAY_worker_niceness": "0",  # as all others run; Ray's own 15 loses to whatever else runs
        "OMP_NUM_THREADS": "1" if contender.tool == "ours" else str(spec["threads"]),
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    log = folder / "log.txt"
    begun = time.monotonic()
    with log.open("w") as file, Watch(mark) as watch:
        done = subprocess.run(
            [python, JOBS, folder / "spec.json"],
            cwd=folder,
            env=environment,
            stdout=file,
            stderr=file,
            check=False,
        )
    whole_s = time.monotonic() - begun
    error = ""
    if done.returncode:
        sys.stderr.write(log.read_text()[-6000:])
        error = ([line for line in log.read_text().splitlines() if line.strip()] or ["no word"])[-1]
    answer = folder / "answer.json"
    seconds = json.loads(answer.read_text()) if not error else {}
    answer.unlink(missing_ok=True)
    output = folder / "output"
    written = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    return Result(
        contender,
        seconds,
        whole_s,
        cpu_s=watch.cpu_s,
        resident=watch.resident,
        anonymous=watch.anonymous,
        output_bytes=written,
        error=error,
    )


class Watch:
    """Samples all processes with MARK=`mark` in their environment: their peak memory in bytes, and
    the CPU seconds that they had used at the last sample."""

    def __init__(self, mark: str) -> None:
        self.resident = self.anonymous = 0
        self._cpu_s: dict[str, float] = {}
        self._mark = f"{MARK}={mark}".encode()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def cpu_s(self) -> float:
        return sum(self._cpu_s.values())

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        rest_s = SAMPLE_S
        while not self._stop.wait(rest_s):
            begun = time.monotonic()
            total = files = 0
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    if self._mark not in (folder / "environ").read_bytes():
                        continue
                    sizes = rollup(folder)
                    self._cpu_s[folder.name] = cpu_s(folder)
                except (OSError, ProcessLookupError):  # it has just ended, or is another user's
                    continue
                total += sizes.get("Pss", 0)
                files += sizes.get("Pss_File", 0)
            self.resident = max(self.resident, total)
            self.anonymous = max(self.anonymous, total - files)
            rest_s = max(SAMPLE_S, SAMPLE_REST * (time.monotonic() - begun))


def cpu_s(process: Path) -> float:
    """User and system seconds of a process, its threads included, from /proc/PID/stat."""
    fields = (process / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rollup(process: Path) -> dict[str, int]:
    """Bytes by kind, from /proc/PID/smaps_rollup; a shared page counts in equal shares."""
    sizes = {}
    for line in (process / "smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        sizes[name] = int(rest.split()[0]) * 1024
    return sizes


# --- the judge ---


class Judge:
    """Scores checkpoints with one transformers model in float32, whose weights it replaces.

    It holds the source's logits.
    """

    def __init__(self, source: CheckpointReader, heldout: TokenBlocks) -> None:
        from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

        self._config, self._ids_BT = source.config, heldout.ids
        raw = json.loads((source.directory / "config.json").read_text())
        for key in ("quantization_config", "torch_dtype", "dtype"):
            raw.pop(key, None)
        settings = DeepseekV3Config(**raw)
        settings._attn_implementation = "sdpa"
        settings._experts_implementation = "eager"
        with torch.device("meta"):
            model = DeepseekV3ForCausalLM(settings)
        self._model = model.to_empty(device="cpu").float().eval()
        self._model.model.rotary_emb = type(self._model.model.rotary_emb)(settings)
        self._put(source_weights(source))
        self._logits = [self._run(ids_T) for ids_T in self._ids_BT]

    @torch.no_grad()
    def _run(self, ids_T: Tensor) -> Tensor:
        logits: Tensor = self._model(ids_T[None], use_cache=False).logits[0]
        return logits

    @torch.no_grad()
    def _put(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Replace every weight; names are the release's."""
        config = self._config
        state = self._model.state_dict()
        missing = set(state)
        missing -= {name for name in state if name.endswith(("gate_up_proj", "down_proj"))}
        num_moe_layers = config.num_hidden_layers - config.first_k_dense_replace
        missing_experts = 3 * config.n_routed_experts * num_moe_layers
        for name, value in weights:
            before, infix, after = name.partition(".mlp.experts.")
            if not infix:
                state[name].copy_(value)
                missing.discard(name)
                continue
            number, role, _ = after.split(".")
            fused = "down_proj" if role == "down_proj" else "gate_up_proj"
            rows = state[f"{before}.mlp.experts.{fused}"][int(number)]
            half = slice(None)
            if role != "down_proj":
                half = slice(0, len(value)) if role == "gate_proj" else slice(len(value), None)
            rows[half].copy_(value)
            missing_experts -= 1
        assert not missing, f"missing {sorted(missing)[:3]}"
        assert not missing_experts, f"{missing_experts} expert weights are missing"

    def score(self, tool: str, directory: Path) -> tuple[Interval, float]:
        """Mean KL and top-1 agreement of a checkpoint that `tool` wrote."""
        if tool == "ours":
            self._put(our_weights(ArtifactReader(directory)))
        else:
            self._put(peer_weights(directory))
        scores = [
            compare_logits(logits, self._run(ids_T), ids_T)
            for logits, ids_T in zip(self._logits, self._ids_BT, strict=True)
        ]
        kl = estimate(torch.stack([score.kl for score in scores]))
        same = torch.stack([score.same_top1 for score in scores])
        return kl, float(same.double().mean())


def source_weights(source: CheckpointReader) -> Iterator[tuple[str, Tensor]]:
    """All weights by name, float32, without MTP layers."""
    for name, tensor in source.read_globals().items():
        yield name, tensor.dequantize()
    for layer in range(source.config.num_hidden_layers):
        for name, tensor in source.read_layer(layer).items():
            yield name, tensor.dequantize()


def our_weights(artifact: ArtifactReader) -> Iterator[tuple[str, Tensor]]:
    """The same of our artifact, decompressed."""
    yield from artifact.read_globals().items()
    for layer in range(artifact.config.num_hidden_layers):
        stored = artifact.read_layer(layer)
        for spec in linears(artifact.config, layer):
            scheme = artifact.schemes[spec.module]
            tensors = pop_linear(stored, spec.module, scheme)
            yield spec.name, decompress(tensors, scheme, (spec.shape[0], spec.shape[1]))
        yield from stored.items()


def peer_weights(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """The same of a checkpoint by llm-compressor (compressed-tensors, packed) or modelopt."""
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            for name in sorted(names):
                module, _, last = name.rpartition(".")
                if last == "weight_packed":
                    yield f"{module}.weight", _packed(file, module)
                elif last == "weight" and f"{module}.weight_scale" in names:
                    yield name, _modelopt(file, module, names)
                elif last not in ("weight_scale", "weight_shape", "pre_quant_scale"):
                    assert last in ("weight", "e_score_correction_bias"), name
                    yield name, file.get_tensor(name).float()


def _packed(file: Any, module: str) -> Tensor:
    """compressed-tensors' pack-quantized: codes + 8, eight per int32, lowest bits first."""
    shape = torch.Size(file.get_tensor(f"{module}.weight_shape").tolist())
    codes = unpack_from_int32(file.get_tensor(f"{module}.weight_packed"), 4, shape)
    return _scaled(codes.float(), file.get_tensor(f"{module}.weight_scale"))


def _modelopt(file: Any, module: str, names: set[str]) -> Tensor:
    """modelopt's INT4: two's complement, the even row in the low four bits of each byte. Its
    `pre_quant_scale`, a factor of the input, multiplies the columns here."""
    raw = file.get_tensor(f"{module}.weight")
    assert raw.dtype == torch.uint8, (module, raw.dtype)
    low, high = (raw & 15).to(torch.int8), (raw >> 4).to(torch.int8)
    codes = torch.stack((low, high), dim=1).flatten(0, 1).float()
    codes = torch.where(codes >= 8, codes - 16, codes)
    weight = _scaled(codes, file.get_tensor(f"{module}.weight_scale"))
    if f"{module}.pre_quant_scale" in names:
        weight = weight * file.get_tensor(f"{module}.pre_quant_scale").float()
    return weight


def _scaled(codes: Tensor, scale: Tensor) -> Tensor:
    """Multiply codes f32 [N, K] by scales [N, K/g]."""
    grouped = codes.view(len(codes), scale.shape[1], -1)
    return (grouped * scale.float()[..., None]).flatten(1)


# --- the report ---


def report(results: list[Result]) -> None:
    """Print the table."""
    typer.echo(
        "| tool | method, coverage | job s | import s | whole s | whole, CPU s | peak resident MB "
        "| of it anonymous MB | written MB | mean KL | top-1 |"
    )
    typer.echo("|---|---|" + "---:|" * 9)
    for result in results:
        quality = f"failed: {result.error[:120]} |"
        if (kl := result.kl) is not None:
            quality = f"{kl.value:.5f} [{kl.low:.5f}, {kl.high:.5f}] | {result.top1:.2%}"
        typer.echo(
            f"| {result.contender.tool} | {result.contender.name} | {result.job_s:.1f} "
            f"| {result.seconds.get('import', 0):.1f} | {result.whole_s:.1f} | {result.cpu_s:.0f} "
            f"| {result.resident / 1e6:.0f} | {result.anonymous / 1e6:.0f} "
            f"| {result.output_bytes / 1e6:.1f} | {quality} |"
        )


if __name__ == "__main__":
    run(app)
