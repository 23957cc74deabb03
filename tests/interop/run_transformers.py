"""Load quantized checkpoints with transformers alone, and write down what became of every tensor
and what the model says.

    python run_transformers.py INPUTS OUTPUT CHECKPOINT...

INPUTS is a safetensors file with `text` int64 [B, T] and `prompts` int64 [P, L]. Into the folder
OUTPUT go `found.json` (for each checkpoint the number of parameters, the tensors that nothing read
and the parameters that nothing filled, or why transformers refused it) and for the n-th checkpoint
`n.safetensors`: `logits` f32 [B, T, V] and `greedy` int64 [P, G], computed in FP32. A checkpoint's
`from_pretrained.json`, if it has one, says how it is loaded; if in BF16, `served` are the logits in
BF16.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

NUM_GREEDY = 32


class Reports(logging.Handler):
    """Keeps what transformers logs about a checkpoint: its reasons are only there."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage() + "\n"

    def reasons(self) -> str:
        """Every distinct exception of the report's CONVERSION entries."""
        names = ("Error: ", "Exception: ")
        return "; ".join(
            dict.fromkeys(
                line.strip()
                for line in self.text.splitlines()
                if not line[:1].isspace() and any(name in line for name in names)
            )
        )


REPORTS = Reports()


def arguments(checkpoint: Path) -> dict[str, Any]:
    """What the directory says of how it is loaded; an artifact is dequantized to FP32."""
    said = checkpoint / "from_pretrained.json"
    if said.exists():
        return dict(json.loads(said.read_text(encoding="utf-8")))
    dequantize = CompressedTensorsConfig(dequantize=True)
    return {"quantization_config": dequantize, "dtype": torch.float32}


@torch.no_grad()
def execute(checkpoint: Path, given: dict[str, Tensor], answers: Path) -> dict[str, Any]:
    model, info = AutoModelForCausalLM.from_pretrained(
        checkpoint, output_loading_info=True, **arguments(checkpoint)
    )
    model.eval()
    said = {}
    if model.dtype == torch.bfloat16:
        said["served"] = model(given["text"]).logits.float()
        model.float()
    prompts_PL = given["prompts"]
    whole = model.generate(
        prompts_PL,
        attention_mask=torch.ones_like(prompts_PL),
        max_new_tokens=NUM_GREEDY,
        min_new_tokens=NUM_GREEDY,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    said |= {"logits": model(given["text"]).logits, "greedy": whole[:, prompts_PL.shape[1] :]}
    save_file({name: tensor.contiguous() for name, tensor in said.items()}, answers)
    return {
        "parameters": len(list(model.parameters())),
        "unread": sorted(info["unexpected_keys"]),
        "wrong": sorted({*info["missing_keys"], *map(str, info["mismatched_keys"])}),
    }


def execute_or_refuse(checkpoint: Path, given: dict[str, Tensor], answers: Path) -> dict[str, Any]:
    REPORTS.text = ""
    try:
        return execute(checkpoint, given, answers)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        return {"refused": f"{said} {REPORTS.reasons()}".strip()[:600]}


def main(inputs: str, output: Path, checkpoints: list[Path]) -> None:
    given = load_file(inputs)
    logging.getLogger("transformers").addHandler(REPORTS)
    found = {
        str(checkpoint): execute_or_refuse(checkpoint, given, output / f"{n}.safetensors")
        for n, checkpoint in enumerate(checkpoints)
    }
    (output / "found.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]), [Path(word) for word in sys.argv[3:]])
