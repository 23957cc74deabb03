"""Whether the native kernels compute: the extension `deepseek._native`, if it was built here.

native_model.py is the model that computes with them, deepseek/native their sources.
"""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType

import torch  # noqa: F401  # before the extension, so that both use one OpenMP runtime

from deepseek.config import ModelConfig
from deepseek.engine.options import KernelChoice
from deepseek.errors import DeployError

LOG = logging.getLogger(__name__)
_EXTENSION = "deepseek._native"


def find_isa(choice: KernelChoice, config: ModelConfig) -> str | None:
    """The instruction set of the native kernels, for an engine that is to compute with them; None
    for PyTorch's. Where "auto" has to fall back, the log says so once.

    Raises:
        DeployError: "native", and the extension was not built or does not take the model;
            INTSERVE_ISA names an instruction set that there is not.
    """
    if choice == "torch":
        return None
    found = _extension()
    problem = f"were not built here ({found})" if isinstance(found, str) else _misfit(config)
    if problem is None:
        assert isinstance(found, ModuleType)
        try:
            return str(found.isa())
        except ValueError as error:
            raise DeployError(str(error)) from error
    if choice == "native":
        raise DeployError(
            f"the native kernels {problem}: install again with a C++17 compiler, or choose kernels "
            "auto or torch"
        )
    _say_fallback(problem)
    return None


@functools.cache
def _extension() -> ModuleType | str:
    """The extension, or why there is none."""
    try:
        return importlib.import_module(_EXTENSION)
    except ImportError as error:
        return str(error)


def _misfit(config: ModelConfig) -> str | None:
    """Why the kernels do not take the model; None where they do."""
    from deepseek.engine.native_attention import takes_widths

    latent, rope = config.kv_lora_rank, config.qk_rope_head_dim
    if takes_widths(latent, rope):
        return None
    return f"do not take kv_lora_rank {latent} with qk_rope_head_dim {rope}"


@functools.cache
def _say_fallback(problem: str) -> None:
    LOG.warning(
        "the native kernels %s, so PyTorch computes: the answers are the same up to rounding, "
        "several times slower, and unquantized weights take twice the memory",
        problem,
    )
