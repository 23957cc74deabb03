"""The whole released DeepSeek-V3, as headers without data: every count is the published one."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from math import ceil
from pathlib import Path

import pytest
from support.release import (
    CONFIGS,
    ELEMENTS_OF,
    FILE_BYTES,
    INDEX_FILE,
    INDEX_TOTAL_SIZE,
    NUM_ELEMENTS,
    NUM_SHARDS,
    NUM_TENSORS,
    SHARD_GIB,
    TENSOR_BYTES,
    V3,
    shards,
    write_release,
)
from typer.testing import CliRunner

from cluster.__main__ import app as cluster_app
from deepseek.inventory import count_parameters
from deepseek.models import DEEPSEEK_V3
from deepseek.source.checkpoint import CheckpointReader, expected_source
from deepseek.source.origin import read_source_config
from quant_jobs.__main__ import app as jobs_app

pytestmark = pytest.mark.heavy

MTP_BYTES = sum(
    tensor.num_bytes
    for _, tensors in shards()
    for tensor in tensors
    if tensor.name.startswith("model.layers.61.")
)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("release")
    write_release(directory)
    yield directory
    shutil.rmtree(directory)  # 163 files that claim to be large


def test_the_description_of_the_release_adds_up_to_what_is_published() -> None:
    files = list(shards())
    tensors = list(chain.from_iterable(tensors for _, tensors in files))
    elements: Counter[str] = Counter()
    for tensor in tensors:
        elements[tensor.dtype] += tensor.elements
    assert len(files) == NUM_SHARDS
    assert files[0][0] == "model-00001-of-000163.safetensors"
    assert len({tensor.name for tensor in tensors}) == len(tensors) == NUM_TENSORS
    assert elements == ELEMENTS_OF
    assert elements.total() == NUM_ELEMENTS
    assert sum(tensor.num_bytes for tensor in tensors) == TENSOR_BYTES
    assert INDEX_TOTAL_SIZE == 2 * NUM_ELEMENTS


def test_the_description_has_the_published_size_of_every_file(release: Path) -> None:
    sizes = [path.stat().st_size for path in sorted(release.glob("*.safetensors"))]
    for number, size in enumerate(sizes, start=1):
        assert ceil(size / 2**30 * 10) / 10 == SHARD_GIB.get(number, 4.1), number
    assert abs(sum(sizes) - FILE_BYTES) < 163 * 64  # the order of names in the headers


def test_the_inventory_of_the_config_is_the_release_and_nothing_else() -> None:
    names = {"F8_E4M3": "float8_e4m3fn", "F32": "float32", "BF16": "bfloat16"}
    expected = expected_source(DEEPSEEK_V3)
    stored = {tensor.name: tensor for _, tensors in shards() for tensor in tensors}
    assert expected.keys() == stored.keys()
    for name, (shape, dtypes) in expected.items():
        assert stored[name].shape == shape, name
        assert names[stored[name].dtype] in {str(d).removeprefix("torch.") for d in dtypes}, name
    assert count_parameters(DEEPSEEK_V3) == 671_026_419_200


def test_the_reader_opens_it_and_finds_every_byte_in_its_layer(release: Path) -> None:
    reader = CheckpointReader(release)
    assert reader.config == DEEPSEEK_V3
    assert len(reader.stored_bytes) == NUM_TENSORS
    layers = [reader.num_bytes(layer) for layer in range(reader.config.num_layers_with_mtp)]
    assert layers[61] == MTP_BYTES
    assert len(set(layers[3:61])) == 1, "MoE layers are alike"
    assert sum(layers) + reader.num_bytes("globals") == TENSOR_BYTES == reader.total_bytes
    assert reader.file_bytes == sum(path.stat().st_size for path in release.glob("*.safetensors"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_release_of_the_family_is_planned_as_the_model_itself(
    release: Path, name: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    shutil.copy(release / INDEX_FILE, tmp_path)
    assert read_source_config(tmp_path) == DEEPSEEK_V3


def run_plan(model: str) -> str:
    arguments = ["plan", "--model", model, "--recipe", "int4", "--hardware", "8xH800-80GB"]
    ended = CliRunner().invoke(cluster_app, [*arguments, "--json"])
    assert ended.exit_code == 0, ended.output
    return json.dumps(json.loads(ended.stdout) | {"model": ""}, sort_keys=True)


def test_plan_of_the_files_is_plan_of_the_built_in_shapes(release: Path) -> None:
    assert run_plan(str(release)) == run_plan("deepseek-v3")


def test_estimate_reads_the_same_model(release: Path) -> None:
    command = ["estimate", "--nodes", "2", "--recipe", "int4", "--json", "--model"]
    of_files, built_in = (
        json.loads(CliRunner().invoke(jobs_app, [*command, model]).stdout)
        for model in (str(release), "deepseek-v3")
    )
    assert of_files | {"model": ""} == built_in | {"model": ""}


def test_the_whole_model_cast_to_bf16_without_its_mtp_layer_is_read_as_that(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_release(tmp_path, V3, bf16=True, mtp=False)
    reader = CheckpointReader(tmp_path)
    shutil.rmtree(tmp_path)
    assert reader.config.weight_block_size is None
    assert reader.config.num_layers_with_mtp == 61
    # The router's bias of 58 layers keeps 4 bytes.
    assert reader.total_bytes == 2 * 671_026_419_200 + 2 * 58 * 256
    assert [record.levelname for record in caplog.records if record.levelno > 20] == ["WARNING"] * 2
