"""Which tokens end a text: those of config.json, and those of generation_config.json beside it.

Chat models name their end of turn in generation_config.json only: Kimi-K2's config.json has
`[EOS]`, its generation_config.json `<|im_end|>`, and without the second one an answer would go on
into the next turn. Nothing else of that file is read, because sampling is a matter of the request.
Called by the engine when it is loaded.
"""

from __future__ import annotations

from pathlib import Path

from deepseek.config import ModelConfig
from deepseek.config_values import read_token_ids
from deepseek.errors import ConfigError
from deepseek.untrusted import UnusableFileError, parse_json_object, read_bytes

FILE = "generation_config.json"


def stop_token_ids(directory: Path | str, config: ModelConfig) -> frozenset[int]:
    """The end tokens of the model in a checkpoint's directory.

    Raises:
        ConfigError: generation_config.json cannot be read, or as `merge_stop_tokens`.
    """
    path = Path(directory) / FILE
    if not path.exists():
        return merge_stop_tokens(None, path, config)
    try:
        content = read_bytes(path, root=Path(directory))
    except UnusableFileError as error:
        raise ConfigError(f"{path} {error}") from error
    return merge_stop_tokens(content, path, config)


def merge_stop_tokens(content: bytes | None, path: Path, config: ModelConfig) -> frozenset[int]:
    """The end tokens of a model by its config and the `content` of its generation_config.json, None
    where it has none; `path` names that file in errors.

    Raises:
        ConfigError: the content is no JSON object, or its eos_token_id is no list of tokens of the
            model.
    """
    ids = frozenset(config.eos_token_ids)
    if content is None:
        return ids
    try:
        value = parse_json_object(content).get("eos_token_id")
    except UnusableFileError as error:
        raise ConfigError(f"{path} {error}") from error
    if value is None:
        return ids
    more = read_token_ids(value, f"{path}: eos_token_id")
    if max(more) >= config.vocab_size:
        raise ConfigError(
            f"{path}: eos_token_id {max(more)} is no token of vocab_size {config.vocab_size}"
        )
    return ids | set(more)
