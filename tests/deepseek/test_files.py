"""Files appear whole or not at all, with the same bytes for the same content."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from deepseek.files import sha256_file, write_atomic
from deepseek.tensor_files import DTYPES, DamagedFileError, read_header, save_tensors, tensor_digest


def example() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, dtype in DTYPES.items():
        tensors[f"x.{name}"] = torch.randint(0, 2, (3, 5), generator=generator).to(dtype)
    tensors["empty"] = torch.empty(0, 4)
    tensors["scalar"] = torch.tensor(7, dtype=torch.int64)
    tensors["strided"] = torch.randn(8, 6, generator=generator).T[::2]
    return tensors


def test_the_reference_library_reads_back_what_we_write(tmp_path: Path) -> None:
    tensors = example()
    save_tensors(tmp_path / "a.safetensors", tensors, {"format": "pt", "by": "us"})
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(tensors)
        assert file.metadata() == {"format": "pt", "by": "us"}
        for name, tensor in tensors.items():
            read = file.get_tensor(name)
            assert read.dtype == tensor.dtype, name
            assert tensor_digest(read) == tensor_digest(tensor), name


def test_we_read_the_header_of_what_the_reference_library_writes(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in example().items()}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "a.safetensors")
    assert header.metadata == {"format": "pt"}
    assert {n: (e.shape, e.dtype) for n, e in header.tensors.items()} == {
        n: (tuple(t.shape), t.dtype) for n, t in tensors.items()
    }
    content = (tmp_path / "a.safetensors").read_bytes()
    for name, tensor in tensors.items():
        entry = header.tensors[name]
        stored = content[entry.begin : entry.end]
        assert stored == bytes(tensor.reshape(-1).view(torch.uint8).tolist()), name


def test_equal_tensors_give_equal_bytes_in_any_order_and_stride(tmp_path: Path) -> None:
    tensors = example()
    names = list(tensors)
    random.Random(0).shuffle(names)
    shuffled = {name: tensors[name].clone() for name in names}
    first = save_tensors(tmp_path / "one", tensors, {"a": "1", "b": "2"})
    second = save_tensors(tmp_path / "two", shuffled, {"b": "2", "a": "1"})
    assert first == second
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_the_digests_returned_are_those_of_the_file_written(tmp_path: Path) -> None:
    tensors = example()
    saved = save_tensors(tmp_path / "a", tensors)
    assert saved.sha256 == sha256_file(tmp_path / "a")
    assert saved.num_bytes == (tmp_path / "a").stat().st_size
    assert saved.header_sha256 == read_header(tmp_path / "a").sha256
    assert saved.tensors == {name: tensor_digest(tensors[name]) for name in sorted(tensors)}


@pytest.mark.parametrize("extra", range(8))
def test_tensors_start_at_a_multiple_of_64_bytes_or_of_their_item_size(
    extra: int, tmp_path: Path
) -> None:
    """Whatever the length of the header, which `extra` varies."""
    metadata = {"x": "y" * (8 * extra)}
    save_tensors(tmp_path / "a", example() | {"lines": torch.ones(3, 64).bfloat16()}, metadata)
    entries = read_header(tmp_path / "a").tensors
    for name, entry in entries.items():
        assert entry.begin % entry.dtype.itemsize == 0, name
        assert entry.begin % 64 == 0 or entry.num_bytes % 64, name
    assert entries["lines"].num_bytes % 64 == 0


def test_a_tensor_digest_sees_type_shape_and_values_but_not_strides() -> None:
    x = torch.arange(6, dtype=torch.int32).reshape(2, 3)
    assert tensor_digest(x) == tensor_digest(x.T.contiguous().T)
    assert tensor_digest(x) != tensor_digest(x.reshape(3, 2))
    assert tensor_digest(x) != tensor_digest(x.view(torch.float32))
    assert tensor_digest(x) != tensor_digest(x + 1)


class FailsHalfway(Mapping[str, torch.Tensor]):
    """Tensors whose second one cannot be had once writing has begun (a dying disk, say)."""

    def __init__(self) -> None:
        self.reads = 0

    def __iter__(self) -> Iterator[str]:
        return iter(("a", "b"))

    def __len__(self) -> int:
        return 2

    def __getitem__(self, name: str) -> torch.Tensor:
        self.reads += 1
        if self.reads > 3:  # two for the header, one written
            raise OSError("I/O error")
        return torch.ones(4)


def test_a_write_that_fails_halfway_leaves_the_old_file_and_no_scraps(tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    write_atomic(path, b"old")
    with pytest.raises(OSError, match="I/O error"):
        save_tensors(path, FailsHalfway())
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["layer.safetensors"]


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save_tensors(path, {"x": torch.arange(10.0), "y": torch.arange(3)})
    whole = path.read_bytes()
    for length in [0, 3, 8, 9, 60, len(whole) - 80, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedFileError):
            read_header(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(DamagedFileError, match="appended"):
        read_header(path)
    path.write_bytes(whole)
    assert set(read_header(path).tensors) == {"x", "y"}


def raw_file(path: Path, header: str, data: bytes) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]})


@pytest.mark.parametrize(
    ("header", "num_bytes", "message"),
    [
        (f'{{"a": {entry("F32", [2], 0, 8)}, "b": {entry("F32", [2], 4, 12)}}}', 12, "overlap"),
        (f'{{"a": {entry("F32", [2], 0, 8)}, "b": {entry("F32", [2], 12, 20)}}}', 20, "gap"),
        (f'{{"a": {entry("F32", [1], 0, 4)}, "a": {entry("F32", [1], 4, 8)}}}', 8, "twice"),
        (
            f'{{"a": {entry("F4", [8], 0, 4)}}}',
            4,
            "type F4, which is not supported",
        ),
        (f'{{"a": {entry("F32", [3], 0, 8)}}}', 8, "tensor a has 8 bytes"),
        (f'{{"a": {entry("F32", [-1, -2], 0, 8)}}}', 8, "tensor a"),
        ('{"a": {"dtype": "F32"}}', 8, "not a safetensors file"),
        ('["a"]', 0, "not a safetensors file"),
        ("{'a'}", 0, "not a safetensors file"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(
    tmp_path: Path, header: str, num_bytes: int, message: str
) -> None:
    with pytest.raises(DamagedFileError, match=message):
        read_header(raw_file(tmp_path / "a", header, bytes(num_bytes)))
