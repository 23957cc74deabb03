"""Options of `python -m quant_jobs` that more than one command has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
EngineOption = Annotated[Path, typer.Option("--engine", help="Engine directory made by `build`.")]
DeviceOption = Annotated[
    Literal["cpu", "cuda"],
    typer.Option(help="What workers compute on; cuda: one GPU each. Decides bytes of the output."),
]
CpusOption = Annotated[
    int,
    typer.Option(
        min=1,
        help="CPUs of Ray that each worker reserves; it computes on one thread all the same. More "
        "of them: fewer workers on a node, more memory for each.",
    ),
]
TargetOption = Annotated[str, typer.Option(help="embedded, trtllm, vllm, sglang or transformers.")]
TpOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="GPUs that share one engine [1; trtllm, vllm, sglang: those of --hardware]."
    ),
]
EpOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="trtllm: groups that the routed experts are divided over; inside a group each "
        "expert is cut over tp / ep GPUs [tp: whole experts]. vllm: "
        "tp, or 1 for experts that all GPUs share.",
    ),
]
KVOption = Annotated[
    Literal["bf16", "fp8", "int8"] | None,
    typer.Option(help="KV format; without it, the recipe's. int8 is embedded's alone."),
]
DialectOption = Annotated[
    str | None,
    typer.Option(
        help="trtllm: everything but the experts as the source stores it (mixed, the default), "
        "or in BF16 (single: 16 GB more of DeepSeek-V3, and no MIXED_PRECISION). sglang: w4afp8, "
        "w8a8_int8, blockwise_int8 or compressed-tensors [the one that fits]."
    ),
]
EngineVersionOption = Annotated[
    str | None,
    typer.Option(
        help="Version of the target that will load it [trtllm 1.2.1, vllm 0.32.0, sglang 0.5.23, "
        "transformers 5.23.0]."
    ),
]
MtpOption = Annotated[
    bool,
    typer.Option(
        "--mtp",
        help="Keep the MTP layers (trtllm, vllm; sglang of a source); they are left out otherwise.",
    ),
]
ContextOption = Annotated[
    int | None, typer.Option(help="trtllm, vllm, sglang: longest request in tokens [what fits].")
]
ConcurrencyOption = Annotated[
    int | None, typer.Option(help="trtllm, vllm, sglang: largest batch of requests [256].")
]
HardwareOption = Annotated[str, typer.Option(help="What trtllm, vllm or sglang would run on.")]
StageOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Copy the engine to this directory of every node of the cluster that --workers use "
        "(--workers 0: of this machine), every byte verified; {node} in it is replaced by the "
        "node's id, for nodes that share a disk.",
    ),
]
EvaluationOption = Annotated[
    Path, typer.Option("--evaluation", help="Directory made by `evaluate`.")
]
