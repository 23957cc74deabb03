"""Weights in huge pages: the same values, and where they lie."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deepseek.engine import huge_pages
from deepseek.engine.batch import Span, make_batch
from deepseek.engine.kv_cache import LatentCache
from deepseek.engine.linear import Kernels
from deepseek.engine.opening import make_model
from deepseek.engine.packing import pack_tensors, schemes_of
from deepseek.source.checkpoint import CheckpointReader

needs_huge_pages = pytest.mark.skipif(
    not huge_pages.are_offered(), reason="this kernel offers no huge pages"
)
SHAPES = [(3000, 1000), (7,), (), (0, 5), (1, 1 << 20), (33, 65)]
DTYPES = [torch.uint8, torch.int8, torch.bfloat16, torch.float32, torch.float8_e4m3fn]


SIZE = 1 << 30
#: Bytes resident with SIZE bytes of tensors before they are moved, at most meanwhile, and after.
MOVING = f"""
import threading, time, torch
from deepseek.engine.huge_pages import move
from deepseek.engine.process import keep_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

keep_freed_memory()
tensors = {{str(i): torch.ones({SIZE} >> 8, dtype=torch.uint8) for i in range(256)}}
before = peak = resident()
done = threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, resident())
        time.sleep(0.001)

watching = threading.Thread(target=watch)
watching.start()
moved = move(tensors)
done.set()
watching.join()
print(before, peak, resident())
"""


def made() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{dtype}.{shape}": (torch.rand(shape, generator=generator) * 100).to(dtype)
        for dtype in DTYPES
        for shape in SHAPES
    }


def huge_bytes(tensor: torch.Tensor) -> int:
    """Bytes in huge pages of the mapping that holds the tensor, as the kernel tells."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(head[1], 16) <= tensor.data_ptr() < int(head[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("the tensor is in no mapping")


@needs_huge_pages
def test_what_is_moved_keeps_its_values_and_begins_at_cache_lines() -> None:
    given, expected = made(), made()
    moved = huge_pages.move(given, worth=0)
    assert given == {}
    assert list(moved) == list(expected)
    for name, tensor in moved.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape)
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0 or not tensor.numel()
        assert torch.equal(bits(tensor), bits(expected[name]))
    total = sum(tensor.nbytes for tensor in moved.values())
    largest = max(moved.values(), key=lambda tensor: tensor.nbytes)
    assert huge_bytes(largest) > total / 2  # what memory is fragmented for, the kernel gives small


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.dim() else tensor


@needs_huge_pages
def test_moving_what_lies_in_memory_takes_no_second_copy_of_it() -> None:
    run = subprocess.run([sys.executable, "-c", MOVING], capture_output=True, text=True, check=True)
    before, peak, after = map(int, run.stdout.split())
    assert before > SIZE
    assert peak < before + SIZE * 3 // 4
    assert after < before + SIZE // 4


@pytest.mark.parametrize("why", ["never", "no such file", "memory", "small"])
def test_they_stay_where_they_are_where_it_cannot_be_or_is_not_worth_it(
    why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    setting = tmp_path / "enabled"
    if why != "no such file":
        setting.write_text(
            "always madvise [never]\n" if why == "never" else "always [madvise] never"
        )
    given = made()
    before = dict(given)
    total = sum(tensor.nbytes for tensor in given.values())
    free = total if why == "memory" else 100 * total
    with caplog.at_level(logging.INFO):
        found = huge_pages.move(
            given,
            worth=2 * total if why == "small" else 0,
            setting=setting,
            available_bytes=lambda: free,
        )
    assert found.keys() == before.keys()
    assert all(found[name] is before[name] for name in before)
    assert ("more than half" in caplog.text) == (why == "memory")
    assert (str(setting) in caplog.text) == (why in ("never", "no such file"))
    assert (caplog.text == "") == (why == "small")


@needs_huge_pages
@pytest.mark.heavy
def test_a_model_computes_the_same_from_there(tiny_model: Path) -> None:
    pytest.importorskip("deepseek._native", reason="the extension was not built")
    source = CheckpointReader(tiny_model)
    schemes = schemes_of(source)
    tensors = pack_tensors(source)
    kernels = replace(Kernels.detect(batch_invariant=False), isa="any")
    here = make_model(source.config, schemes, dict(tensors), kernels)
    there = make_model(source.config, schemes, huge_pages.move(tensors, worth=0), kernels)
    batch = make_batch([Span(list(range(5, 25)), 0, [1, 2])], 16)
    hidden = [
        model.forward(batch, LatentCache(source.config, "bf16", 4, 16)) for model in (here, there)
    ]
    assert torch.equal(*hidden)
    assert torch.equal(here.logits(hidden[0]), there.logits(hidden[0]))
