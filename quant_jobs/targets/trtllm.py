"""Build a TensorRT-LLM engine: the directory that its PyTorch backend loads for DeepSeek on Hopper.

    config.json                  the source's, without quantization_config
    hf_quant_config.json         how every module is quantized, and quant_cfg.json the same where
                                 the dialect is `mixed`; neither for a release as it is
    llm_args.yaml                arguments of `tensorrt_llm.LLM`, from the plan
    model-layer-00003.safetensors one per decoder layer, and model-globals.safetensors
    model.safetensors.index.json for tools; its loader reads every *.safetensors that it finds
    tokenizer files, intserve.json
    engine.json                  written last: its presence means that the engine is complete

One file is one task (`sharded.py`), on Ray or in this process. The bytes do not depend on the
number of workers, and a killed build goes on with the files that are missing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from deepseek import __version__, untrusted
from deepseek.artifact.documents import read_copied
from deepseek.artifact.engine_manifest import (
    ENGINE_FILE,
    UNQUANTIZED,
    EngineManifest,
    EnginePlan,
    RankLayout,
    TensorFile,
    read_engine_manifest,
    write_engine_manifest,
)
from deepseek.artifact.manifest import MANIFEST_FILE, LayerKey
from deepseek.artifact.reader import ArtifactReader
from deepseek.artifact.tensors import layer_file
from deepseek.config import CONFIG_FILE
from deepseek.engine.packing import Source, schemes_of
from deepseek.errors import ArtifactError, DeployError
from deepseek.files import json_bytes, sha256_file, write_atomic
from deepseek.formats import FP8_MAX
from deepseek.inventory import linears
from deepseek.outputs import check_apart, check_space, check_writable, make_directory
from deepseek.recipe import Scheme
from deepseek.source.checkpoint import CheckpointReader
from deepseek.source.index import INDEX_FILE
from deepseek.tensor_files import DTYPES, saved_bytes
from deepseek.trtllm.fields import TARGET, LayerInputScales, Mtp, TrtllmFields
from deepseek.trtllm.input_scales import runtime_input_scale
from deepseek.trtllm.layout import (
    Dialect,
    rank_weight_bytes,
    stored_layers,
    stored_schemes,
    stored_tensors,
    total_bytes,
)
from deepseek.trtllm.loadable import check_loadable
from deepseek.trtllm.quant_config import quant_config_files
from deepseek.trtllm.versions import EngineVersion
from deepseek.untrusted import UnusableFileError
from quant_jobs.algorithms.input_scales import share_input_scales
from quant_jobs.targets.sharded import BuildFolder, BuiltFile, Progress, build_files
from quant_jobs.targets.trtllm_tensors import write_file
