"""One quantization job of `bench/peers.py`, in a process of its own: ours or a peer's.

    PYTHON bench/peer_jobs.py SPEC.json

SPEC.json gives the `tool`, its `method`, and all paths. The seconds of importing, loading,
quantizing and saving are written to the path in `answer`. The peer's own Python runs this file too,
so only `run_ours` imports anything of this repository. All three tools quantize the same linears,
the routed experts, to symmetric INT4 in groups of 128, on the same token ids, and write the
checkpoint that their users would get.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

GROUP_SIZE = 128
EXPERTS = r"re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$"


class Clock:
    """Seconds of each phase, in the order in which the phases end."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name] = now - self._last
        self._last = now


def run_ours(spec: dict[str, Any], clock: Clock) -> None:
    """The steps of `run_quantize`, with Ray and the workers' libraries counted as imports. Loading
    and saving are part of quantizing: layers stream."""
    from deepseek.recipe import parse_recipe
    from quant_jobs.job.driver import Driver
    from quant_jobs.job.folder import JobFolder
    from quant_jobs.job.job import plan_job
    from quant_jobs.quantize import start_workers

    recipe = parse_recipe(spec["recipe"], where="bench/peers.py")
    output = Path(spec["output"])
    with start_workers(spec["threads"] if spec["on_ray"] else 0) as pool:
        if spec["on_ray"]:
            pool.each(lambda worker, _: worker.ready.remote())
        clock.lap("import")
        job = plan_job(Path(spec["source"]), recipe, Path(spec["calibration"]), output)
        with JobFolder(output, job.fingerprint) as folder:
            Driver(job, folder, pool, lambda _: None).run()
        clock.lap("quantize")


def run_llmcompressor(spec: dict[str, Any], clock: Clock) -> None:
    """GPTQ W4A16 by llm-compressor's sequential pipeline, on experts that it un-fuses itself."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import linearize_moe
    from llmcompressor.modifiers.gptq import GPTQModifier
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(spec["threads"])
    clock.lap("import")
    # Its loader that never fuses (`load_quantizable_moe`) imports torchvision, which has no build
    # for CPU-only torch on PyPI. This un-fuses afterwards, one layer at a time.
    model = linearize_moe(AutoModelForCausalLM.from_pretrained(spec["bf16"], dtype=torch.bfloat16))
    ids_BT = load_file(spec["tokens"])["ids"]
    rows = {"input_ids": ids_BT.tolist(), "attention_mask": torch.ones_like(ids_BT).tolist()}
    clock.lap("load")
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": GROUP_SIZE,
    }
    recipe = GPTQModifier(
        config_groups={"experts": {"targets": [EXPERTS], "weights": weights}},
        actorder="static" if spec["act_order"] else None,
        dampening_frac=0.01,
    )
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=recipe,
        max_seq_length=ids_BT.shape[1],
        num_calibration_samples=len(ids_BT),
        shuffle_calibration_samples=False,
        moe_calibrate_all_experts=spec["coverage"] == "all",
        sequential_targets=["DeepseekV3DecoderLayer"],
    )
    clock.lap("quantize")
    model.save_pretrained(spec["output"], save_compressed=True)
    clock.lap("save")


def run_modelopt(spec: dict[str, Any], clock: Clock) -> None:
    """AWQ by nvidia-modelopt, on experts that are un-fused here, because it skips fused experts."""
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(spec["threads"])
    clock.lap("import")
    model = AutoModelForCausalLM.from_pretrained(spec["bf16"], dtype=torch.bfloat16)
    unfuse(model)
    ids_BT = load_file(spec["tokens"])["ids"]
    clock.lap("load")

    def calibrate(model: Any) -> None:
        with torch.no_grad():
            for ids_T in ids_BT:
                model(ids_T[None], use_cache=False)

    int4 = {"num_bits": 4, "block_sizes": {-1: GROUP_SIZE, "type": "static"}}
    config = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*mlp.experts.*weight_quantizer", "cfg": int4, "enable": True},
        ],
        "algorithm": {"method": spec["method"]},
    }
    mtq.quantize(model, config, calibrate)
    clock.lap("quantize")
    with torch.inference_mode():
        export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=spec["output"])
    clock.lap("save")


def unfuse(model: Any) -> None:
    """Replace the fused experts of every layer, in place and one layer at a time, by one nn.Module
    of three nn.Linear per expert; the same function with the same order of sums."""
    import torch
    from torch import nn

    class Expert(nn.Module):
        def __init__(self, gate: Any, up: Any, down: Any) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = linear(gate), linear(up)
            self.down_proj = linear(down)

        def forward(self, x: Any) -> Any:
            return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    class Experts(nn.ModuleList):
        def forward(self, x_TD: Any, chosen_TK: Any, weight_TK: Any) -> Any:
            total_TD = torch.zeros_like(x_TD)
            for number, expert in enumerate(self):
                token, choice = (chosen_TK == number).nonzero(as_tuple=True)
                if len(token):
                    y = expert(x_TD[token]) * weight_TK[token, choice, None]
                    total_TD.index_add_(0, token, y.to(total_TD.dtype))
            return total_TD

    def linear(weight: Any) -> Any:
        module = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
        module.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        return module

    for layer in model.model.layers:
        fused = getattr(layer.mlp, "experts", None)
        if fused is None:
            continue
        pairs = [gate_up.chunk(2) for gate_up in fused.gate_up_proj]
        downs = list(fused.down_proj)
        experts = [Expert(*pair, down) for pair, down in zip(pairs, downs, strict=True)]
        layer.mlp.experts = Experts(experts)
        del fused, pairs, downs


RUN = {"ours": run_ours, "llm-compressor": run_llmcompressor, "modelopt": run_modelopt}


def main() -> None:
    clock = Clock()
    spec = json.loads(Path(sys.argv[1]).read_text())
    os.environ["OMP_NUM_THREADS"] = "1" if spec["tool"] == "ours" else str(spec["threads"])
    RUN[spec["tool"]](spec, clock)
    Path(spec["answer"]).write_text(json.dumps(clock.seconds))


if __name__ == "__main__":
    main()
