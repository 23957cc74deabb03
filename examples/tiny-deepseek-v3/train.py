"""Train a tiny DeepSeek-V3 on this computer and save it the way the real one was released.

The rest of the project reads, quantizes and serves checkpoints in DeepSeek-V3's released layout.
This script makes one that fits in a commit: the same architecture (latent attention, sigmoid
router with group-limited top-k and a balancing bias, shared expert, a multi-token-prediction
layer), 9.5 million parameters instead of 671 billion, and the same bytes on disk (FP8 e4m3
weights in 128x128 blocks, per-expert tensor names, a flat `config.json`). It is trained, not
random, because rounding damage, routing and speculative decoding only mean something on a
model that has learned something.

    texts      the standard library's sources, its language topics, and questions about its
               docstrings; split by file into train / held-out / calibration
    tokenizer  byte-level BPE, 2,048 pieces, learned on the train split
    training   transformers' own `DeepseekV3ForCausalLM` in float32, plus one MTP layer trained
               with it; Muon for the matrices, AdamW for the rest
    export     FP8 blocks + BF16 rest, sharded safetensors, written beside the target and moved
               into place file by file, the index last
    settling   weights fixed, the balancing biases move until no expert is idle
    judgment   held-out perplexity of the float32 model, and again of the FP8 files read back

What it is not: a general trainer. Sizes, texts and schedule are fixed below; the command line
chooses only how long, where, and from which seed.
"""

import argparse
import ast
import builtins
import hashlib
import importlib
import inspect
import json
import math
import os
import platform
import random
import re
import shutil
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3RMSNorm,
    DeepseekV3TopkRouter,
)

# --------------------------------------------------------------------------------------------
# What is being made

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
SPECIAL_TOKENS = [BOS, EOS, PAD, USER, ASSISTANT]  # ids 0..4, in this order

BLOCK = 128  # FP8 blocks are BLOCK x BLOCK
FP8_MAX = 448.0  # largest finite e4m3fn
SHARD_BYTES = 3_900_000

# The released config.json, key for key, with smaller numbers. `torch_dtype`, `rope_theta` and
# `rope_scaling` are the released spelling; transformers 5 translates them while loading.
CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "kv_lora_rank": 128,
    "max_position_embeddings": 4096,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 128,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 4,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 1024,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 64,
    "vocab_size": 2048,
}

CHAT_TEMPLATE = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
    "{% endif %}{% set ns = namespace(system_prompt='') %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}"
    "{{ bos_token }}{{ ns.system_prompt }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{{ '" + USER + "' + message['content'] }}{%- endif %}"
    "{%- if message['role'] == 'assistant' %}"
    "{{ '" + ASSISTANT + "' + message['content'] + '" + EOS + "' }}{%- endif %}"
    "{%- endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A body in short windows, then a cool-down in long ones, so that the last thing learned is
    to use positions that the body never reached."""

    steps: int
    seed: int
    tokens_per_step: int = 4096
    window: int = 512
    long_window: int = 2048
    cool_down_steps: int = 60
    warmup_steps: int = 30
    full_rate_steps: int = 332
    muon_rate: float = 0.02
    adam_rate: float = 0.004  # head, router, norms
    embedding_rate: float = 0.03
    mtp_weight: float = 0.2
    settle_steps: int = 150
    settle_rate: float = 0.02

    def is_cooling(self, step: int) -> bool:
        return step >= self.steps - self.cool_down_steps

    def rate_at(self, step: int) -> float:
        if self.is_cooling(step):
            return (self.steps - step) / 150
        warm = (step + 1) / self.warmup_steps
        return min(1.0, warm, max(0.4, 1 - (step - self.full_rate_steps) / 498))

    def window_at(self, step: int) -> int:
        return self.long_window if self.is_cooling(step) else self.window

    def bias_rate_at(self, step: int) -> float:
        """Paper section 2.1.2, gamma: it ends a little before training does."""
        if step >= self.steps - 16:
            return 0.0
        return 0.005 if self.is_cooling(step) else 0.002


# --------------------------------------------------------------------------------------------
# Texts

SKIPPED_FOLDERS = {
    "test", "tests", "idle_test", "site-packages", "encodings", "lib2to3", "turtledemo",
    "ensurepip", "pydoc_data", "__phello__", "__pycache__",
}  # fmt: skip
SKIPPED_FILES = {"html/entities.py", "stringprep.py", "sre_constants.py", "__phello__.foo.py"}
PUBLIC_NAME = {
    "posixpath": "os.path",
    "_collections_abc": "collections.abc",
    "_pydecimal": "decimal",
    "_pyio": "io",
}
C_MODULES = [
    "builtins", "math", "cmath", "itertools", "time", "sys", "gc", "operator", "array", "zlib",
    "binascii", "struct", "select", "marshal", "atexit", "errno", "signal", "unicodedata",
    "_functools", "_collections", "_random", "_socket", "_thread", "_io", "_datetime", "posix",
]  # fmt: skip
SYSTEM_TEXTS = [
    "You are a helpful assistant.",
    "You answer questions about Python.",
    "Answer in one short paragraph.",
]
HELD_OUT_BYTES, CALIBRATION_BYTES = 200_000, 320_000


@dataclass(frozen=True, slots=True)
class Source:
    """One file (or one language topic) and the question/answer pairs found in it."""

    name: str
    text: str
    answers: list[tuple[str, str]]  # (dotted name or topic, answer)
    is_plain: bool = True  # False: only its answers are trained on


@dataclass(frozen=True, slots=True)
class Corpus:
    train: list[Source]
    held_out: list[Source]
    calibration: list[Source]


def first_paragraph(doc: str, limit: int = 320) -> str:
    """The opening of a docstring, on one line, cut at a sentence end where one is near."""
    paragraphs = [" ".join(part.split()) for part in inspect.cleandoc(doc).split("\n\n")]
    if len(paragraphs) > 1 and re.fullmatch(r"[\w.]+\(.*\)( ?->.*)?", paragraphs[0]):
        paragraphs = paragraphs[1:]  # a C function's docstring may open with its signature
    text = paragraphs[0] if paragraphs else ""
    if len(text) <= limit:
        return text
    cut = text.rfind(". ", 0, limit)
    return text[: cut + 1] if cut > 0 else ""


def answers_in_source(module: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            return
        if doc := ast.get_docstring(node):
            yield prefix, first_paragraph(doc)
        if isinstance(node, ast.Module | ast.ClassDef):
            for child in node.body:
                name = getattr(child, "name", "_")
                if not name.startswith("_"):
                    yield from walk(child, f"{prefix}.{name}")

    yield from walk(tree, module)


def answers_in_c_module(module: str) -> Iterator[tuple[str, str]]:
    loaded = builtins if module == "builtins" else importlib.import_module(module)
    public = {"builtins": "", "posix": "os."}.get(module, module.lstrip("_") + ".")
    for name, value in sorted(vars(loaded).items()):
        is_error = inspect.isclass(value) and issubclass(value, BaseException)
        if name.startswith("_") or not (callable(value) and value.__doc__):
            continue
        yield public + name, first_paragraph(value.__doc__)
        if not inspect.isclass(value) or is_error:
            continue
        for method, function in sorted(vars(value).items()):
            if not method.startswith("_") and (doc := getattr(function, "__doc__", None)):
                yield f"{public}{name}.{method}", first_paragraph(doc)


def read_sources() -> list[Source]:
    root = Path(sysconfig.get_path("stdlib"))
    sources = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        name = relative.as_posix()
        skipped = name in SKIPPED_FILES or name.startswith(("_sysconfigdata", "config-"))
        if skipped or SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore").strip()
        if not text:
            continue
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
        answers = []
        public = PUBLIC_NAME.get(module, module)
        if not public.startswith("_"):
            answers = list(answers_in_source(public, tree))
        sources.append(Source(name, text + "\n", answers))
    topics = importlib.import_module("pydoc_data.topics").topics
    for topic, text in sorted(topics.items()):
        sources.append(Source(f"topics/{topic}", text.strip() + "\n", []))
    for module in C_MODULES:
        answers = list(answers_in_c_module(module))
        sources.append(Source(f"docstrings/{module}", "", answers, is_plain=False))
    return sources


def split(sources: Sequence[Source]) -> Corpus:
    """By file: in the order of the names' hashes, small files fill held-out, then calibration."""
    corpus = Corpus([], [], [])
    held_out_bytes = calibration_bytes = 0
    for source in sorted(sources, key=lambda s: hashlib.sha256(s.name.encode()).digest()):
        size = len(source.text.encode())
        if source.is_plain and size <= 40_000 and held_out_bytes + size <= HELD_OUT_BYTES:
            corpus.held_out.append(source)
            held_out_bytes += size
        elif source.is_plain and size <= 40_000 and calibration_bytes + size <= CALIBRATION_BYTES:
            corpus.calibration.append(source)
            calibration_bytes += size
        else:
            corpus.train.append(source)
    return corpus


def plain_text(sources: Sequence[Source]) -> str:
    return "\n".join(source.text for source in sources)


def chats(sources: Sequence[Source], seed: int) -> list[str]:
    """Each docstring asked about three times in different words; some with a system text, some
    as the second turn of a conversation."""
    rng = random.Random(seed)
    turns = []
    for source in sources:
        for name, answer in source.answers:
            if len(answer) < 15:
                continue
            wordings = [f"What is {name}?", f"Explain {name}.", f"Tell me about {name}."]
            for question in [f"What does {name} do?", *rng.sample(wordings, 2)]:
                turns.append(f"{USER}{question}{ASSISTANT}{answer}{EOS}")
    rng.shuffle(turns)
    documents = []
    while turns:
        document = turns.pop()
        if turns and rng.random() < 0.15:
            document += turns.pop()
        system = rng.choice(SYSTEM_TEXTS) if rng.random() < 0.2 else ""
        documents.append(BOS + system + document)
    return documents


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A",
                pair=f"{BOS} $A {BOS} $B",
                special_tokens=[(BOS, 0)],
            ),
        ]
    )
    assert tokenizer.get_vocab_size() == CONFIG["vocab_size"]
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def pack(tokenizer: Tokenizer, documents: Sequence[str], seed: int) -> Tensor:
    """All documents, shuffled, one after the other. Each opens with BOS and closes with EOS."""
    order = list(documents)
    random.Random(seed).shuffle(order)
    encodings = tokenizer.encode_batch(order, add_special_tokens=False)
    return torch.tensor([i for encoding in encodings for i in encoding.ids], dtype=torch.long)


# --------------------------------------------------------------------------------------------
# Model
#
# B sequences · T tokens in each · D hidden size · E experts


def model_config() -> DeepseekV3Config:
    """The released config without its quantization: training is in float32."""
    given = {k: v for k, v in CONFIG.items() if k not in ("quantization_config", "torch_dtype")}
    given["rope_scaling"] = dict(given["rope_scaling"])
    config = DeepseekV3Config(**given)
    config._attn_implementation = "padded"
    config._experts_implementation = "grouped_mm"
    return config


def padded_attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention, [B, heads, T, width]. PyTorch's fused CPU kernel wants keys and values
    of one width; DeepSeek's differ (96 and 64 here), so values carry zeros through it."""
    width = value.shape[-1]
    value = F.pad(value, (0, query.shape[-1] - width))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out[..., :width].transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register("padded", padded_attention)


class MTP(nn.Module):
    """The layer after the last: from the state at t and the token at t+1, guess the one at t+2.

    Embedding and head are the main model's own; the checkpoint holds copies, as the release
    does. The state is the one after the main model's final norm, and the embedding comes first
    in the concatenation: this is the order the released weights have.
    """

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        eps = config.rms_norm_eps
        self.enorm = DeepseekV3RMSNorm(config.hidden_size, eps)
        self.hnorm = DeepseekV3RMSNorm(config.hidden_size, eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = DeepseekV3DecoderLayer(config, layer_idx=config.num_hidden_layers)
        self.norm = DeepseekV3RMSNorm(config.hidden_size, eps)

    def forward(
        self, embed_BTD: Tensor, state_BTD: Tensor, positions: tuple[Tensor, Tensor]
    ) -> Tensor:
        joined = torch.cat([self.enorm(embed_BTD), self.hnorm(state_BTD)], dim=-1)
        hidden = self.block(self.eh_proj(joined), position_embeddings=positions)
        return cast(Tensor, self.norm(hidden))


def count_load(model: nn.Module) -> tuple[list[DeepseekV3TopkRouter], Tensor]:
    """The routers in order, and how many tokens each of their experts [layer, E] is sent."""
    routers = [m for m in model.modules() if isinstance(m, DeepseekV3TopkRouter)]
    load = torch.zeros(len(routers), routers[0].num_experts)

    def counter(layer: int) -> Callable[[nn.Module, Any, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, _args: Any, out: tuple[Tensor, ...]) -> None:
            load[layer] += torch.bincount(out[2].flatten(), minlength=load.shape[1])

        return hook

    for layer, router in enumerate(routers):
        router.register_forward_hook(counter(layer))
    return routers, load


class Tiny(nn.Module):
    """The main model and its MTP layer, and how many tokens each expert has been sent."""

    def __init__(self) -> None:
        super().__init__()
        config = model_config()
        self.main = DeepseekV3ForCausalLM(config)
        nn.init.normal_(self.main.model.embed_tokens.weight, std=0.5)
        self.mtp = MTP(self.main.config)
        self.mtp.apply(self.main._init_weights)
        self.routers, self.load = count_load(self)

    def losses(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B, T+2]; mean loss of the next token, and of the one after it by the MTP."""
        now, following, after = tokens[:, :-2], tokens[:, 1:-1], tokens[:, 2:]
        state = self.main.model(input_ids=now, use_cache=False).last_hidden_state
        main = cross_entropy(self.main.lm_head(state), following)
        place = torch.arange(now.shape[1])[None]
        positions = self.main.model.rotary_emb(state, place)
        embed = self.main.model.embed_tokens(following)
        hidden = self.mtp(embed, state, positions)
        return main, cross_entropy(self.main.lm_head(hidden), after)

    def balance(self, rate: float) -> None:
        for router, load in zip(self.routers, self.load, strict=True):
            balance(router, load, rate)
        self.load.zero_()


@torch.no_grad()
def balance(router: DeepseekV3TopkRouter, load: Tensor, rate: float) -> None:
    """Push the choice toward experts that got less than their share (paper, 2.1.2)."""
    router.e_score_correction_bias += rate * torch.sign(load.mean() - load)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), target.flatten())


# --------------------------------------------------------------------------------------------
# Optimizer: Muon for matrices, AdamW for embeddings, head, router and norms


def orthogonalized(update: Tensor, rounds: int = 5) -> Tensor:
    """Newton-Schulz toward the nearest orthogonal matrix; update [..., rows <= columns]."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = update / (update.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon:
    """Momentum, then every matrix of the update made orthogonal. Matrices of one shape are
    stacked and done together; a fused gate+up tensor counts as the two matrices it holds."""

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], momentum: float = 0.95) -> None:
        self.named = list(named)
        self.momentum = momentum
        self.memory = {name: torch.zeros_like(p) for name, p in named}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        stacks: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor, bool]]] = {}
        for name, p in self.named:
            assert p.grad is not None, name
            memory = self.memory[name].lerp_(p.grad, 1 - self.momentum)
            update = p.grad.lerp(memory, self.momentum)  # Nesterov
            if name.endswith("gate_up_proj"):
                update = update.reshape(-1, update.shape[1] // 2, update.shape[2])
            update = update if update.dim() == 3 else update[None]
            is_tall = update.shape[1] > update.shape[2]
            update = update.mT if is_tall else update
            stacks.setdefault((update.shape[1], update.shape[2]), []).append((p, update, is_tall))
        for stack in stacks.values():
            done = orthogonalized(torch.cat([update for _, update, _ in stack]))
            for p, update, is_tall in stack:
                mine, done = done[: len(update)], done[len(update) :]
                mine = mine.mT if is_tall else mine
                scale = max(1.0, mine.shape[1] / mine.shape[2]) ** 0.5
                p.mul_(1 - 0.1 * rate).add_(mine.reshape(p.shape), alpha=-rate * scale)


def is_for_muon(name: str, p: nn.Parameter) -> bool:
    return p.dim() >= 2 and not any(
        part in name for part in ("embed_tokens", "lm_head", "mlp.gate.weight")
    )


# --------------------------------------------------------------------------------------------
# Export: the released layout


def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] -> e4m3 [N, K] and the multiplier of each block [ceil(N/128), ceil(K/128)]."""
    rows, columns = weight.shape
    down, across = math.ceil(rows / BLOCK), math.ceil(columns / BLOCK)
    padded = F.pad(weight.float(), (0, across * BLOCK - columns, 0, down * BLOCK - rows))
    blocks = padded.view(down, BLOCK, across, BLOCK)
    scale = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-12) / FP8_MAX
    small = (blocks / scale[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX)
    weight_fp8 = small.view(padded.shape)[:rows, :columns].to(torch.float8_e4m3fn)
    return weight_fp8.contiguous(), scale.contiguous()


def dequantize_blocks(weight: Tensor, scale: Tensor) -> Tensor:
    full = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return weight.float() * full[: weight.shape[0], : weight.shape[1]]


def released_names(tiny: Tiny) -> dict[str, Tensor]:
    """float32 tensors by the release's names: experts unfused, the MTP as one more layer."""
    config = tiny.main.config
    tensors = dict(tiny.main.state_dict())
    extra = f"model.layers.{config.num_hidden_layers}"
    for name, tensor in tiny.mtp.state_dict().items():
        name = name.removeprefix("block.")
        tensors[f"{extra}.{'shared_head.norm.weight' if name == 'norm.weight' else name}"] = tensor
    tensors[f"{extra}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    tensors[f"{extra}.shared_head.head.weight"] = tensors["lm_head.weight"]
    for name in [n for n in tensors if ".experts." in n]:
        stem, fused = name.rsplit(".", 1)[0], tensors.pop(name)
        for expert, matrix in enumerate(fused):
            if name.endswith("gate_up_proj"):
                gate, up = matrix.chunk(2)
                tensors[f"{stem}.{expert}.gate_proj.weight"] = gate
                tensors[f"{stem}.{expert}.up_proj.weight"] = up
            else:
                tensors[f"{stem}.{expert}.down_proj.weight"] = matrix
    return tensors


def is_fp8(name: str) -> bool:
    return name.endswith("_proj.weight") and "eh_proj" not in name or "_with_mqa" in name


def released_tensors(tiny: Tiny) -> dict[str, Tensor]:
    def natural(name: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]

    tensors = {}
    named = released_names(tiny)
    for name in sorted(named, key=natural):
        tensor = named[name].detach()
        if is_fp8(name):
            tensors[name], tensors[f"{name}_scale_inv"] = quantize_blocks(tensor)
        elif name.endswith("e_score_correction_bias"):
            tensors[name] = tensor.float().clone()
        else:
            tensors[name] = tensor.to(torch.bfloat16).clone()
    return tensors


def shards(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > SHARD_BYTES:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += tensor.nbytes
    return parts


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def export(tiny: Tiny, tokenizer: Tokenizer, out: Path, report: dict[str, Any]) -> None:
    """Write everything beside the target, then move file by file, the index last."""
    staging = out / ".staging"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    tensors = released_tensors(tiny)
    parts = shards(tensors)
    where = {}
    for number, part in enumerate(parts, start=1):
        file_name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file(part, staging / file_name, metadata={"format": "pt"})
        (staging / file_name).chmod(0o644)
        where.update(dict.fromkeys(part, file_name))
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(staging / "config.json", CONFIG)
    generation = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1}
    write_json(staging / "generation_config.json", generation)
    tokenizer.save(str(staging / "tokenizer.json"))
    write_json(
        staging / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": BOS,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": EOS,
            "model_max_length": CONFIG["max_position_embeddings"],
            "pad_token": PAD,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    write_json(staging / "training.json", report | {"checkpoint_bytes": total})
    write_json(
        staging / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": where},
    )
    for stale in set(out.glob("model-*.safetensors")) - {out / n for n in where.values()}:
        stale.unlink()
    for path in sorted(staging.iterdir(), key=lambda p: "index" in p.name):
        os.replace(path, out / path.name)
    staging.rmdir()


def read_back(folder: Path) -> DeepseekV3ForCausalLM:
    """The main model from the exported files, dequantized to float32."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    stored: dict[str, Tensor] = {}
    for file_name in sorted(set(index["weight_map"].values())):
        with safe_open(folder / file_name, framework="pt") as shard:
            stored |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    model = DeepseekV3ForCausalLM(model_config())
    state: dict[str, Tensor] = {}
    for name, wanted in model.state_dict().items():
        if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            stem, kind = name.rsplit(".", 1)
            kinds = ["gate_proj", "up_proj"] if kind == "gate_up_proj" else ["down_proj"]
            state[name] = torch.stack(
                [
                    torch.cat([plain(stored, f"{stem}.{expert}.{k}.weight") for k in kinds])
                    for expert in range(wanted.shape[0])
                ]
            )
        else:
            state[name] = plain(stored, name)
    model.load_state_dict(state)
    return model.eval()


def plain(stored: dict[str, Tensor], name: str) -> Tensor:
    scale = stored.get(f"{name}_scale_inv")
    return stored[name].float() if scale is None else dequantize_blocks(stored[name], scale)


# --------------------------------------------------------------------------------------------
# Settling


def settle(model: DeepseekV3ForCausalLM, stream: Tensor, schedule: Schedule) -> list[Tensor]:
    """The balancing biases, moved until every expert of the exported weights has work.

    In training the routers can change faster than the biases follow, and the first MoE layer
    ended with idle experts. An idle expert has no calibration data, which makes it a bad example
    for quantization. This costs some perplexity; `training.json` has it before and after.
    """
    routers, load = count_load(model)
    for step, tokens in zip(range(schedule.settle_steps), batches(stream, schedule), strict=False):
        with torch.no_grad():
            model.model(input_ids=tokens[:, :-2], use_cache=False)
        for router, of_router in zip(routers, load, strict=True):
            balance(router, of_router, schedule.settle_rate * (1 - step / schedule.settle_steps))
        load.zero_()
    return [router.e_score_correction_bias for router in routers]


# --------------------------------------------------------------------------------------------
# Judgment


def windows(ids: Sequence[int], length: int = 512) -> Tensor:
    """[num, length]: BOS, then length-1 tokens of the text; every text token judged once."""
    body = torch.tensor(ids[: len(ids) // (length - 1) * (length - 1)]).view(-1, length - 1)
    return torch.cat([torch.zeros(len(body), 1, dtype=torch.long), body], dim=1)


@torch.no_grad()
def perplexity(model: DeepseekV3ForCausalLM, rows: Tensor) -> float:
    total = 0.0
    for row in torch.split(rows, 8):
        logits = model(input_ids=row[:, :-1], use_cache=False).logits
        total += float(cross_entropy(logits, row[:, 1:])) * len(row)
    return math.exp(total / len(rows))


@torch.no_grad()
def mtp_loss(tiny: Tiny, rows: Tensor) -> float:
    total = 0.0
    for row in torch.split(rows, 8):
        total += float(tiny.losses(row)[1]) * len(row)
    return total / len(rows)


def unigram_perplexity(stream: Tensor, rows: Tensor) -> float:
    """The best guess that ignores context: token frequencies of the training text, plus one."""
    counts = torch.bincount(stream, minlength=CONFIG["vocab_size"]).double() + 1
    return math.exp(-float((counts / counts.sum()).log()[rows[:, 1:]].mean()))


# --------------------------------------------------------------------------------------------
# The run


def batches(stream: Tensor, schedule: Schedule) -> Iterator[Tensor]:
    """Shuffled windows of the stream, each with the two tokens that follow; endless."""
    generator = torch.Generator().manual_seed(schedule.seed)
    step = 0
    while True:
        window = schedule.window_at(step)
        starts = torch.arange(0, len(stream) - window - 2, window)
        starts = starts[torch.randperm(len(starts), generator=generator)]
        for chosen in torch.split(starts, schedule.tokens_per_step // window):
            if schedule.window_at(step) != window:
                break
            yield stream[chosen[:, None] + torch.arange(window + 2)]
            step += 1


def train(schedule: Schedule, out: Path, export_every_s: float) -> dict[str, Any]:
    torch.manual_seed(schedule.seed)
    corpus = split(read_sources())
    chat_documents = chats(corpus.train, schedule.seed)
    plain_documents = [s.text for s in corpus.train if s.is_plain]
    tokenizer = train_tokenizer(plain_documents + chat_documents)
    documents = [BOS + text + EOS for text in plain_documents] + chat_documents
    stream = pack(tokenizer, documents, schedule.seed)
    num_chat = sum(len(e.ids) for e in tokenizer.encode_batch(chat_documents))
    out.mkdir(parents=True, exist_ok=True)
    (out / "heldout.txt").write_text(plain_text(corpus.held_out), encoding="utf-8")
    (out / "calibration.txt").write_text(plain_text(corpus.calibration), encoding="utf-8")
    rows = windows(encode(tokenizer, plain_text(corpus.held_out)))
    print(
        f"{len(plain_documents)} files, {len(chat_documents)} chats, {len(stream):,} tokens"
        f" ({num_chat / len(stream):.0%} chat), held out {rows[:, 1:].numel():,} tokens",
        flush=True,
    )

    tiny = Tiny()
    named = [(name, p) for name, p in tiny.named_parameters() if p.requires_grad]
    matrices = [(name, p) for name, p in named if is_for_muon(name, p)]
    rest = {name: p for name, p in named if not is_for_muon(name, p)}
    muon = Muon(matrices)
    full_rate = [
        schedule.embedding_rate if "embed_tokens" in name else schedule.adam_rate for name in rest
    ]
    adam = torch.optim.AdamW(
        [{"params": [p]} for p in rest.values()], betas=(0.9, 0.95), weight_decay=0.0
    )
    report: dict[str, Any] = {
        "python": platform.python_version(),
        "seed": schedule.seed,
        "train_tokens_available": len(stream),
        "chat_share": round(num_chat / len(stream), 4),
        "heldout_tokens": rows[:, 1:].numel(),
        "unigram_perplexity": round(unigram_perplexity(stream, rows), 3),
        "losses": [],
    }
    began = last_export = time.monotonic()
    seen, smooth_main, smooth_mtp = 0, 0.0, 0.0
    recent_load = torch.zeros_like(tiny.load)
    for step, tokens in zip(range(schedule.steps), batches(stream, schedule), strict=False):
        main, mtp = tiny.losses(tokens)
        torch.autograd.backward(main + schedule.mtp_weight * mtp)
        nn.utils.clip_grad_norm_(rest.values(), 1.0)
        rate = schedule.rate_at(step)
        for group, full in zip(adam.param_groups, full_rate, strict=True):
            group["lr"] = full * rate
        adam.step()
        muon.step(schedule.muon_rate * rate)
        tiny.zero_grad(set_to_none=True)
        recent_load = 0.95 * recent_load + tiny.load
        tiny.balance(schedule.bias_rate_at(step))

        seen += tokens.shape[0] * (tokens.shape[1] - 2)
        mix = max(0.05, 1 / (step + 1))
        smooth_main += mix * (main.item() - smooth_main)
        smooth_mtp += mix * (mtp.item() - smooth_mtp)
        is_last = step + 1 == schedule.steps
        if (step + 1) % 10 == 0 or is_last:
            spent = time.monotonic() - began
            left = spent / (step + 1) * (schedule.steps - step - 1)
            share = recent_load / recent_load.mean(1, keepdim=True)
            print(
                f"step {step + 1}/{schedule.steps}  loss {smooth_main:.3f}  mtp {smooth_mtp:.3f}"
                f"  expert load {share.min():.2f}..{share.max():.2f} of fair"
                f"  {seen / spent:,.0f} tokens/s  {left / 60:.1f} min left",
                flush=True,
            )
        if (step + 1) % 50 == 0 or is_last:
            entry = {"step": step + 1, "main": round(smooth_main, 4), "mtp": round(smooth_mtp, 4)}
            report["losses"].append(entry)
        if time.monotonic() - last_export > export_every_s and not is_last:
            report |= {"steps": step + 1, "tokens": seen, "finished": False}
            export(tiny, tokenizer, out, report)
            last_export = time.monotonic()

    spent = time.monotonic() - began
    tiny.eval()
    report |= {
        "finished": True,
        "steps": schedule.steps,
        "tokens": seen,
        "tokens_per_s": round(seen / spent),
        "heldout_perplexity_float32": round(perplexity(tiny.main, rows), 3),
    }
    export(tiny, tokenizer, out, report)
    exported = read_back(out)
    report["heldout_perplexity_fp8_before_settling"] = round(perplexity(exported, rows), 3)
    for router, bias in zip(tiny.routers, settle(exported, stream, schedule), strict=False):
        router.e_score_correction_bias.copy_(bias)
    report["heldout_perplexity_fp8"] = round(perplexity(exported, rows), 3)
    tiny.load.zero_()
    report["heldout_mtp_loss"] = round(mtp_loss(tiny, rows), 4)
    shares = tiny.load / tiny.load.mean(1, keepdim=True)
    report["expert_load"] = [
        {"layer": layer, "min": round(float(s.min()), 3), "max": round(float(s.max()), 3)}
        for layer, s in enumerate(shares, start=CONFIG["first_k_dense_replace"])
    ]
    export(tiny, tokenizer, out, report)
    return report


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=627)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--export-every-s", type=float, default=600.0)
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    schedule = Schedule(steps=given.steps, seed=given.seed)
    report = train(schedule, given.out, given.export_every_s)
    json.dump({k: v for k, v in report.items() if k != "losses"}, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
