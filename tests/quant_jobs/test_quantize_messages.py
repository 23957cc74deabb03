"""What crosses the actor hop arrives as it left."""

from __future__ import annotations

import pickle

import torch

from deepseek.manifest import Fallback
from quant_jobs.messages import Solved


def test_a_share_of_a_layer_survives_the_hop_in_every_type() -> None:
    values = torch.arange(-8, 8).view(4, 4)
    dtypes = (torch.float8_e4m3fn, torch.int8, torch.bfloat16, torch.float32, torch.int64)
    sent = Solved(
        tensors={str(dtype): values.to(dtype) for dtype in dtypes},
        errors={"model.layers.1.mlp.up_proj": 0.25},
        fallbacks=(Fallback(kind="unseen_expert", layer=1, module="m", count=2),),
        source_sha256="ab",
    )
    got = pickle.loads(pickle.dumps(sent))
    assert list(got.tensors) == list(sent.tensors)
    for name, tensor in sent.tensors.items():
        assert got.tensors[name].dtype == tensor.dtype
        assert torch.equal(got.tensors[name].float(), tensor.float())
    assert (got.errors, got.fallbacks, got.source_sha256) == (
        sent.errors,
        sent.fallbacks,
        sent.source_sha256,
    )
