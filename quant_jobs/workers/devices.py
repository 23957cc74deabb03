"""The device that a job computes on, and the settings that make its results repeatable.

The device is one of the inputs of a job, like the recipe: a GPU adds in another order than a CPU,
so an output with layers from both could not be reproduced. The job's fingerprint (`job/job.py`)
includes the device; resuming on another one is refused.

On `cuda`, as on `cpu`, any number of workers must write the same bytes, provided that all GPUs are
of one model, which decides the kernels. This is not checked. Ray shows each worker only its own
GPU, so the device of every worker is plain `cuda`; without Ray it is the first that torch sees.

docs/benchmarks.md says on which GPU this has run. Most tests use a stand-in that tracks where each
tensor is and knows no CUDA kernels (`tests/support/elsewhere.py`); tests marked `gpu` need a GPU.
"""

from __future__ import annotations

import os
from typing import Literal

from deepseek.errors import DeployError, first_line

Device = Literal["cpu", "cuda"]

#: cuBLAS chooses kernels by its workspace size. NVIDIA documents this setting as one of two that
#: make the choice deterministic.
_CUBLAS_WORKSPACE = ":4096:8"


def check_gpus(*, on_ray: bool) -> None:
    """Check that there is a GPU: on the connected Ray cluster, or in this machine.

    Raises:
        DeployError: there is none.
    """
    if on_ray:
        import ray

        num_gpus, lacking = ray.cluster_resources().get("GPU", 0), "this Ray has none"
    else:
        import torch

        num_gpus, lacking = torch.cuda.device_count(), "PyTorch finds none on this machine"
    if not num_gpus:
        raise DeployError(
            f"--device cuda needs a GPU for each worker, and {lacking}; add one, or choose "
            "--device cpu"
        )


def make_repeatable(device: Device) -> None:
    """Make this process's results on its device repeatable. Call it before the first product.

    `use_one_thread`, which both devices need too, turns deterministic algorithms on: without them
    CUDA adds expert outputs (`index_add_`) in any order.

    Raises:
        DeployError: PyTorch cannot use the GPU assigned to this process.
    """
    if device == "cpu":
        return
    import torch

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = _CUBLAS_WORKSPACE
    torch.set_float32_matmul_precision("highest")  # no TF32
    try:
        torch.zeros(1, device=device)
    except (AssertionError, RuntimeError) as error:  # a build without CUDA, or a broken driver
        raise DeployError(
            f"PyTorch cannot use the GPU of a worker ({first_line(error)}); install its "
            "CUDA build and a driver for it on every node, or choose --device cpu"
        ) from error


def use_one_thread() -> None:
    """Make this process's results independent of the thread count and of nondeterministic
    kernels."""
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
