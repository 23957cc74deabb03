"""Load a quantized checkpoint with transformers alone, and write down what the model says.

    python run_transformers.py CHECKPOINT PROMPTS OUTPUT

PROMPTS and OUTPUT are safetensors files: `text` int64 [T] and `prompts` int64 [P, L] in, `logits`
f32 [T, V] of the text and `greedy` int64 [P, G] out. Runs in an environment of its own; nothing of
IntServe is there.
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

NUM_GREEDY = 32


@torch.no_grad()
def main(checkpoint: str, prompts: str, output: str) -> None:
    given = load_file(prompts)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        quantization_config=CompressedTensorsConfig(dequantize=True),
        dtype=torch.float32,
    ).eval()
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
    logits_TV = model(given["text"][None]).logits[0].float()
    greedy_PG = whole[:, prompts_PL.shape[1] :]
    save_file({"logits": logits_TV.contiguous(), "greedy": greedy_PG.contiguous()}, output)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
