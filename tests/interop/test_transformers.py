"""transformers loads an artifact of ours by itself and says what the embedded engine says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.engines import make_artifact, make_engine, request, run, tokens
from support.environments import run_in
from transformers import AutoTokenizer

from deepseek.engine.engine import LLMEngine
from deepseek.engine.options import EngineOptions

pytestmark = pytest.mark.interop

#: Recipes whose artifacts transformers decompresses. It has no experts with INT8 activations.
RECIPES = ("int8-weight-only", "int8-experts", "int4", "int4-all")
NUM_TOKENS, NUM_PROMPTS, PROMPT_TOKENS = 384, 8, 48
#: Largest median and mean KL in nats per token, largest relative error of the logits, as in
#: `test_oracle.py`: transformers computes in FP32, our kernels take BF16 activations.
MAX_MEDIAN_KL, MAX_MEAN_KL, MAX_REL_ERR = 1e-4, 5e-3, 0.03
#: Greedy continuations of 32 tokens that may leave the other's path, of 8: one near tie.
MAX_DIFFERENT = 1


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("recipe", RECIPES)
def test_transformers_runs_an_artifact_of_ours_as_the_engine_does(
    recipe: str, tiny_model: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    held_out = (tiny_model / "heldout.txt").read_text(encoding="utf-8")[:12_000]
    ids = torch.tensor(tokenizer(held_out)["input_ids"])
    text_T = ids[:NUM_TOKENS].clone()
    prompts_PL = ids[NUM_TOKENS:][: NUM_PROMPTS * PROMPT_TOKENS].view(NUM_PROMPTS, -1).clone()
    artifact = make_artifact(tiny_model, recipe, tmp_path)
    save_file({"text": text_T, "prompts": prompts_PL}, tmp_path / "in.safetensors")
    output = tmp_path / "out.safetensors"
    run_in("transformers", "run_transformers.py", artifact, tmp_path / "in.safetensors", output)
    theirs = load_file(output)

    engine = LLMEngine.load(
        make_engine(tiny_model, recipe, tmp_path), EngineOptions(kv_cache="bf16")
    )
    source, other = theirs["logits"].log_softmax(-1), engine.score(text_T).log_softmax(-1)
    kl_T = (source.exp() * (source - other)).sum(-1)
    error = (engine.score(text_T) - theirs["logits"]).norm() / theirs["logits"].norm()
    measured = f"median KL {kl_T.median():.2e}, mean KL {kl_T.mean():.2e}, error {error:.4f}"
    assert kl_T.median() < MAX_MEDIAN_KL, measured
    assert kl_T.mean() < MAX_MEAN_KL, measured
    assert error < MAX_REL_ERR, measured

    num_greedy = theirs["greedy"].shape[1]
    outputs = run(
        engine,
        [request(str(n), row.tolist(), num_greedy) for n, row in enumerate(prompts_PL)],
    )
    ours = [tokens(outputs[str(n)]) for n in range(NUM_PROMPTS)]
    different = [n for n, row in enumerate(theirs["greedy"].tolist()) if row != ours[n]]
    assert len(different) <= MAX_DIFFERENT, f"prompts {different} go on otherwise; {measured}"
