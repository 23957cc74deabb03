"""What a job computes on, and how a GPU is made to give the same bytes every time.

The device is part of what an output is made of, like the recipe: a GPU adds in another order, so a
layer from there beside layers from here would be bytes that no run repeats. An output is bound to
its device (`quantize.Job.fingerprint`); going on with another one is refused.

On `cuda` any number of workers is to write the same bytes, as on `cpu`, where all GPUs are of one
model: kernels are chosen by it. That they are is not checked. Ray shows each worker one GPU, its
own, so the device of every worker is plain `cuda`; without Ray it is the first that torch sees.

No GPU has run this yet. Tests hold it against a stand-in for one, which knows where each tensor is
and nothing of CUDA's kernels (`tests/support/elsewhere.py`); those marked `gpu` wait for a GPU.
"""

from __future__ import annotations

import os
from typing import Literal

from deepseek.errors import DeployError

Device = Literal["cpu", "cuda"]

#: cuBLAS picks kernels by the memory that it may use; with this setting, of the two that NVIDIA
#: documents as deterministic, it picks the same ones every time.
_CUBLAS_WORKSPACE = ":4096:8"


def check_gpus(*, on_ray: bool) -> None:
    """See that there is a GPU: on the Ray that is connected, or in this machine.

    Raises:
        DeployError: there is none.
    """
    if on_ray:
        import ray

        found, lacking = ray.cluster_resources().get("GPU", 0), "this Ray has none"
    else:
        import torch

        found, lacking = torch.cuda.device_count(), "PyTorch finds none on this machine"
    if not found:
        raise DeployError(
            f"--device cuda needs a GPU for each worker, and {lacking}; add one, or choose "
            "--device cpu"
        )


def make_repeatable(device: Device) -> None:
    """Have this process compute the same on its device every time; before its first product.

    The other half, `use_one_thread`, is for both devices: without deterministic algorithms
    CUDA adds the rows of experts (`index_add_`) in any order.

    Raises:
        DeployError: PyTorch cannot use the GPU that this process was given.
    """
    if device == "cpu":
        return
    import torch

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = _CUBLAS_WORKSPACE
    torch.set_float32_matmul_precision("highest")  # no TF32, whatever was set before
    try:
        torch.zeros(1, device=device)
    except (AssertionError, RuntimeError) as error:  # a build without CUDA, or a broken driver
        raise DeployError(
            f"PyTorch cannot use the GPU of a worker ({str(error).splitlines()[0]}); install its "
            "CUDA build and a driver for it on every node, or choose --device cpu"
        ) from error


def use_one_thread() -> None:
    """Make this process's results independent of thread counts and of random choices."""
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
