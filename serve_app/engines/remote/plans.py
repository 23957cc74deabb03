"""What the plans of all engines have in common: read from an engine directory, or checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepseek.artifact.built_engine import BuiltEngine
from deepseek.artifact.engine_manifest import EngineManifest
from deepseek.engine.detokenizer import engine_tokenizer
from deepseek.errors import DeployError
from deepseek.stop_tokens import FILE as GENERATION_FILE
from deepseek.stop_tokens import merge_stop_tokens
from serve_app.engine_sections import RemoteOptions
from serve_app.engines.remote.launch import Plan


def plan_for(
    options: RemoteOptions, engine: EngineManifest, built: BuiltEngine, **own: Any
) -> Plan:
    """The plan of a directory that has been checked; `own` are the fields that its target's file
    decides on.

    Raises:
        ArtifactError, ConfigError: its tokenizer or its end tokens cannot be read.
    """
    directory = options.directory
    return Plan(
        directory=directory,
        engine=engine.target,
        recipe=engine.recipe,
        artifact_digest=engine.artifact_digest,
        engine_digest=engine.digest,
        kv_cache=options.kv_cache or engine.kv_cache,
        weight_bytes=engine.num_bytes,
        vocab_size=built.config.vocab_size,
        end_token_ids=merge_stop_tokens(
            built.documents.get(GENERATION_FILE), directory / GENERATION_FILE, built.config
        ),
        tokenizer=engine_tokenizer(directory, built.documents),
        **own,
    )


def context_of(options: RemoteOptions, most: int, path: Path) -> int:
    """Tokens of the longest request: as configured, else the `most` that the file `path` has.

    Raises:
        DeployError: more are configured.
    """
    if options.max_model_len is None:
        return most
    if options.max_model_len > most:
        raise DeployError(
            f"max_model_len {options.max_model_len} exceeds the {most} tokens of {path}; lower it, "
            f"or build with --context {options.max_model_len}"
        )
    return options.max_model_len
