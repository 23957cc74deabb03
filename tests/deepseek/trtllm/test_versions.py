"""Versions are known by name, with what is wrong with the others and how each argument is known."""

from __future__ import annotations

import typing
from collections.abc import Iterator

import pytest
from pydantic import BaseModel

from deepseek.errors import DeployError
from deepseek.trtllm.llm_schema import LlmArgs
from deepseek.trtllm.versions import EVIDENCE, VERSIONS, known_arguments, require_version


def test_the_two_versions_are_taken_by_name() -> None:
    assert [require_version(name) for name in VERSIONS] == ["1.2.1", "1.3.0rc29"]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("1.2.0", "TensorRT-LLM 1.2.0 is not known to us; use --engine-version 1.2.1 or 1.3.0rc29"),
        ("1.3.0rc30", "TensorRT-LLM 1.3.0rc30 is not known to us; use --engine-version 1.2.1 or"),
        ("", "TensorRT-LLM  is not known to us"),
        ("v1.2.1", "TensorRT-LLM v1.2.1 is not known to us"),
        ("\x1b[2J", r"TensorRT-LLM '\x1b[2J' is not known to us"),
        (
            "1.2.0rc1",
            "is not built for: with host KV offload it answers with tokens of other prompts",
        ),
        ("1.3.0rc5", "is not built for: it aborts on the mixed-precision config of this target"),
        ("1.3.0rc25", "is not built for: it aborts on the mixed-precision config of this target"),
        ("1.3.0rc20", "is not built for: DeepSeek-V3 hangs in its warm-up; use --engine-version"),
        ("1.3.0rc27", "is not built for: its image has an Open MPI that cannot spawn ranks"),
    ],
)
def test_another_version_is_refused_with_what_is_known_of_it(name: str, sentence: str) -> None:
    with pytest.raises(DeployError) as caught:
        require_version(name)
    assert sentence in str(caught.value)


def schema_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for part in typing.get_args(field.annotation):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from schema_paths(part, f"{prefix}{name}.")


def test_every_argument_of_the_schema_has_its_source_and_no_other() -> None:
    paths = list(schema_paths(LlmArgs))
    assert set(paths) == EVIDENCE.keys()
    assert len(set(paths)) == len(paths)


def test_an_argument_has_a_source_that_there_is_in_at_least_one_version() -> None:
    for path, letters in EVIDENCE.items():
        assert letters["1.2.1"] in ("A", "-"), path
        assert letters["1.3.0rc29"] in ("D", "S", "L", "-"), path
        assert set(letters.values()) != {"-"}, path
        parent = path.rpartition(".")[0]
        for version in VERSIONS:  # a part of what is not there is not there either
            assert not parent or letters[version] == "-" or EVIDENCE[parent][version] != "-", path


def test_what_only_one_version_has_is_known_of_that_one() -> None:
    old, new = (known_arguments(version) for version in VERSIONS)
    assert "sampler_type" in old - new
    assert "kv_cache_config.use_kv_cache_manager_v2" in new - old
    assert "kv_cache_config.tokens_per_block" in old & new
    assert "quant_config" not in old | new
