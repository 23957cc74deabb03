"""Make SGLang importable on a CPU with few packages: three modules that it imports and never asks
here are empty shells, and its own parallel groups and arguments are those of one process. To be
imported before SGLang."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import tempfile
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

#: Imported by SGLang for tool calls, images and GGUF files.
SHELLS = ("IPython", "gguf", "torchvision")
#: Compute capability that its choice of schemes is told: a Hopper.
CAPABILITY = (9, 0)


class Shell(types.ModuleType):
    """A module of whatever is asked of it."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{self.__name__}.{name}")


class Shells(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the shells, and the modules below them."""

    def find_spec(self, name: str, *_: object) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in SHELLS:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return Shell(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """A shell has no code."""


def install() -> None:
    """transformers decides first what it has, without the shells."""
    import transformers.utils.import_utils as available

    for name in ("is_torchvision_available", "is_gguf_available"):
        getattr(available, name)()
    sys.meta_path.append(Shells())


def start(checkpoint: Path, quantization: str | None) -> Any:
    """The arguments that SGLang's own parser makes of `launch_server --model-path CHECKPOINT`, with
    `--quantization` where one is given and `--config CHECKPOINT/sglang.yaml` where there is one;
    on the first call, its groups of one process too."""
    import torch
    from sglang.srt.distributed import parallel_state
    from sglang.srt.runtime_context import _derived_widths, get_parallel
    from sglang.srt.server_args import prepare_server_args, set_global_server_args_for_scheduler

    words = ["--model-path", str(checkpoint), "--device", "cpu", "--skip-tokenizer-init"]
    if quantization:
        words += ["--quantization", quantization]
    if (checkpoint / "sglang.yaml").exists():
        words += ["--config", str(checkpoint / "sglang.yaml")]
    args = prepare_server_args(words)
    set_global_server_args_for_scheduler(args)
    if not torch.distributed.is_initialized():
        ranks = {name: 0 for name in _derived_widths() if name.endswith("_rank")}
        get_parallel().override_permanently(**ranks)
        rendezvous = f"file://{tempfile.mkdtemp()}/rendezvous"
        parallel_state.init_distributed_environment(1, 0, rendezvous, 0, "gloo")
        parallel_state.initialize_model_parallel(backend="gloo")
    patch("torch.cuda.get_device_capability", lambda *_: CAPABILITY).start()
    # One tensor after the other: of several reasons to refuse a checkpoint always the same first.
    loader = "sglang.srt.models.deepseek_common.deepseek_weight_loader"
    patch(f"{loader}.should_async_load", lambda _: False).start()
    return args


install()
