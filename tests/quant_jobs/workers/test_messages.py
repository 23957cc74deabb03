"""Messages between driver and workers: tensors arrive bit for bit, in host memory."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from support.elsewhere import Elsewhere
from torch import Tensor

from quant_jobs.algorithms.folding import Smoothing
from quant_jobs.calibration.forward import Routed
from quant_jobs.workers.messages import SolveSummary, _flatten, _restore, in_block_order, to_device

DTYPES = [
    *(torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32, torch.float64),
    *(torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool),
]
SHAPES = [(), (0,), (3, 0, 2), (1,), (5, 7), (2, 3, 4)]


def values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor whose bytes cover all 8-bit values, so that -0.0 and NaN occur."""
    size = torch.Size(shape).numel() * dtype.itemsize
    if dtype == torch.bool:
        return (torch.arange(size) % 3 == 0).view(shape)
    return (torch.arange(size) * 37 % 256).to(torch.uint8).view(dtype).view(shape)


def hop(tensor: Tensor) -> Tensor:
    """Send a tensor as Ray does: pickle protocol 5 with out-of-band, read-only buffers."""
    buffers: list[pickle.PickleBuffer] = []
    sent = pickle.dumps(_flatten(tensor), protocol=5, buffer_callback=buffers.append)
    return _restore(pickle.loads(sent, buffers=[bytes(buffer) for buffer in buffers]))


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_of_any_type_and_shape_survives_to_the_bit(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    sent = values(shape, dtype)
    got = hop(sent)
    assert got.dtype == dtype
    assert got.shape == sent.shape
    assert bytes_of(got) == bytes_of(sent)


def test_views_arrive_as_what_they_show() -> None:
    whole = torch.arange(24.0).view(4, 6)
    for view in (whole.T, whole[:, ::2], whole[1], whole[2:, 3:].T, whole[0, 0]):
        assert torch.equal(hop(view), view)
    learned = torch.ones(2, requires_grad=True)
    assert not hop(learned).requires_grad


def test_a_contiguous_tensor_is_not_copied_on_either_side() -> None:
    tensor = torch.arange(6.0)
    flat, dtype, shape = _flatten(tensor)
    assert flat.ctypes.data == tensor.data_ptr()
    got = _restore((flat, dtype, shape))
    assert got.data_ptr() == tensor.data_ptr()
    flat = np.frombuffer(flat.tobytes(), dtype=np.uint8)
    assert not flat.flags.writeable  # the object store's memory; no warning is let through
    assert torch.equal(_restore((flat, dtype, shape)), tensor)


def test_blocks_of_several_workers_come_in_their_order() -> None:
    shares = [{5: "f", 0: "a"}, {}, {2: "c", 1: "b"}]
    expected = [(0, "a"), (1, "b"), (2, "c"), (5, "f")]
    assert list(in_block_order(iter(shares))) == expected
    assert list(in_block_order(iter(reversed(shares)))) == expected
    assert list(in_block_order(iter([]))) == []


def test_a_block_held_twice_is_our_bug() -> None:
    routed = Routed(torch.zeros(1, 2))
    with pytest.raises(AssertionError, match="two workers held the same block"):
        list(in_block_order(iter([{0: routed, 3: routed}, {3: routed}])))


def test_what_is_made_elsewhere_arrives_in_host_memory() -> None:
    with Elsewhere():
        sent = torch.arange(6.0, dtype=torch.bfloat16).view(2, 3).to("cuda").T
        assert sent.is_cuda
        got = hop(sent)
        assert type(got) is Tensor
        assert torch.equal(got, torch.arange(6.0, dtype=torch.bfloat16).view(2, 3).T)


def test_a_message_is_moved_with_all_that_is_in_it() -> None:
    with Elsewhere():
        there, here = torch.device("cuda"), torch.device("cpu")
        smoothing = Smoothing({"a.weight": torch.ones(2)}, {})
        sent = {
            3: (Routed(torch.ones(2)), [SolveSummary({"a": 0.5}, smoothing=smoothing)], None, "a")
        }
        routed, (summary,), *rest = to_device(sent, there)[3]
        assert routed.z.is_cuda
        assert summary.smoothing.columns["a.weight"].is_cuda
        assert (summary.errors, rest) == ({"a": 0.5}, [None, "a"])
        assert to_device(to_device(sent, there), here)[3][0].z.device == here
    assert to_device(sent, here)[3][0].z is sent[3][0].z
