"""Time of one linear in each weight format on this CPU, and its ratio to the memory's floor.

    python bench/linear_formats.py [--threads 2] [--repeats 15]

The formats:

    int8 w8a8     per-token quantization, `torch._int_mm`, rescaling
    int8 fp32mm   the same values, the codes multiplied in float32: for CPUs without integer dots
    int8 w8a16    weight-only, `_weight_int8pack_mm`, bfloat16 activations
    int4 g128     weight-only, `_weight_int4pack_mm_for_cpu`, bfloat16 activations
    bf16, fp32    `F.linear`

Per call it prints the median time, the error against float32, and two ratios:

    x floor   time / (bytes that must move / memory bandwidth); 1.0 is as fast as memory allows
    x fp32    float32's time / this time; above 1 is faster than not quantizing

The bandwidth is measured in the same run (the better of a read and a copy) unless it is given.
Weights rotate over a pool larger than the last-level cache, because in a model the weight of a
linear is not in the cache when its turn comes. The formats take turns in every repetition, so a
slow phase of the machine affects all of them. This measures torch's kernels and the Python around
them, not the engine.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from deepseek.formats import quantize_int4, quantize_int8, quantize_tokens_int8, stored_bytes
from deepseek.recipe import Scheme

SHAPES = ((2048, 2048), (7168, 2048))  # [out, in]: an attention projection, an expert's down_proj
TOKENS = (1, 4, 16, 64, 256)
MIB = 1 << 20

Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Format:
    """One way to run a linear: `prepare` binds a float32 weight [N, K] to a callable on x[M, K]."""

    name: str
    activation_dtype: torch.dtype
    weight_bytes: Callable[[int, int], int]
    prepare: Callable[[Tensor], Linear]


def prepare_float(dtype: torch.dtype) -> Callable[[Tensor], Linear]:
    def prepare(weight: Tensor) -> Linear:
        # Copy also what needs no conversion: every member of the pool must have its own memory.
        stored = weight.to(dtype, copy=True)
        return lambda x: F.linear(x, stored)

    return prepare


def prepare_int8(weight: Tensor) -> Linear:
    codes, scale = quantize_int8(weight)
    codes_KN, scale_1N = codes.T, scale.T.contiguous()

    def linear(x: Tensor) -> Tensor:
        tokens, token_scale = quantize_tokens_int8(x)
        return torch._int_mm(tokens, codes_KN).float().mul_(token_scale).mul_(scale_1N)

    return linear


def prepare_int8_in_float32(weight: Tensor) -> Linear:
    codes, scale = quantize_int8(weight)
    scale_1N = scale.T.contiguous()

    def linear(x: Tensor) -> Tensor:
        tokens, token_scale = quantize_tokens_int8(x)
        return F.linear(tokens.float(), codes.float()).mul_(token_scale).mul_(scale_1N)

    return linear


def prepare_int8_weight_only(weight: Tensor) -> Linear:
    codes, scale = quantize_int8(weight)
    scale_N = scale.flatten().bfloat16()
    return lambda x: torch._weight_int8pack_mm(x, codes, scale_N)


def prepare_int4(group_size: int) -> Callable[[Tensor], Linear]:
    def prepare(weight: Tensor) -> Linear:
        codes, scale, _ = quantize_int4(weight, group_size)
        # The kernel wants values 0..15 and computes (value - 8) * scale + zero, with a float zero.
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int() + 8, 1)
        scale_GN2 = torch.stack((scale.T, torch.zeros_like(scale.T)), dim=-1).contiguous()
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, packed, group_size, scale_GN2
        )

    return prepare


def formats(group_size: int) -> dict[str, Format]:
    bf16, fp32 = torch.bfloat16, torch.float32
    int4 = Scheme(weights="int4", group_size=group_size)
    int8_bytes = partial(stored_bytes, Scheme(weights="int8"))
    return {
        kind.name: kind
        for kind in (
            Format("int8 w8a8", fp32, int8_bytes, prepare_int8),
            Format("int8 fp32mm", fp32, int8_bytes, prepare_int8_in_float32),
            Format("int8 w8a16", bf16, int8_bytes, prepare_int8_weight_only),
            Format(
                f"int4 g{group_size}", bf16, partial(stored_bytes, int4), prepare_int4(group_size)
            ),
            Format(
                "bf16", bf16, partial(stored_bytes, Scheme(weights="bf16")), prepare_float(bf16)
            ),
            Format("fp32", fp32, lambda n, k: 4 * n * k, prepare_float(fp32)),
        )
    }


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def memory_bandwidth(repeats: int, pool_bytes: int) -> float:
    """Bytes per second: the better of a read (sum) and a copy (counted as read and write)."""
    source = torch.ones(pool_bytes // 4)
    target = torch.empty_like(source)
    target.copy_(source)  # touches the pages
    read = statistics.median(seconds(source.sum) for _ in range(repeats))
    copy = statistics.median(seconds(lambda: target.copy_(source)) for _ in range(repeats))
    return max(pool_bytes / read, 2 * pool_bytes / copy)


def measure(
    pools: dict[str, list[Linear]], inputs: dict[str, Tensor], repeats: int
) -> dict[str, list[float]]:
    """Seconds of `repeats` calls of each format, the formats and the weights taking turns."""
    times: dict[str, list[float]] = {name: [] for name in pools}
    for name, pool in pools.items():
        pool[-1](inputs[name])  # warms up the code, not the weight that comes first
    for repeat in range(repeats):
        for name, pool in pools.items():
            linear, x = pool[repeat % len(pool)], inputs[name]
            times[name].append(seconds(partial(linear, x)))
    return times


def bench_shape(
    shape: tuple[int, int], arguments: argparse.Namespace, bytes_per_second: float
) -> None:
    num_outputs, num_inputs = shape
    kinds = list(formats(arguments.group_size).values())
    kinds = [kind for kind in kinds if kind.name not in arguments.skip]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) * num_inputs**-0.5
    pool_bytes = arguments.pool_mib * MIB
    pools = {
        # At least 2, so that no call finds the weight of the call before it.
        kind.name: [
            kind.prepare(weight) for _ in range(max(2, pool_bytes // kind.weight_bytes(*shape)))
        ]
        for kind in kinds
    }
    print(f"\n[{num_outputs}, {num_inputs}] (out, in)")
    print(
        f"{'tokens':>6} {'format':<11} {'median us':>10} {'min us':>9} {'max us':>9} "
        f"{'GB/s':>6} {'Gop/s':>7} {'x floor':>8} {'x fp32':>7} {'error':>8}"
    )
    for num_tokens in arguments.tokens:
        x = torch.randn((num_tokens, num_inputs), generator=generator)
        inputs = {kind.name: x.to(kind.activation_dtype) for kind in kinds}
        times = measure(pools, inputs, arguments.repeats)
        exact = F.linear(x, weight)
        fp32 = statistics.median(times["fp32"])
        for kind in kinds:
            median = statistics.median(times[kind.name])
            activations = num_tokens * (num_inputs + num_outputs) * kind.activation_dtype.itemsize
            moved = kind.weight_bytes(*shape) + activations
            error = (pools[kind.name][0](inputs[kind.name]).float() - exact).norm() / exact.norm()
            print(
                f"{num_tokens:>6} {kind.name:<11} {median * 1e6:>10.0f} "
                f"{min(times[kind.name]) * 1e6:>9.0f} {max(times[kind.name]) * 1e6:>9.0f} "
                f"{moved / median / 1e9:>6.1f} "
                f"{2 * num_tokens * num_outputs * num_inputs / median / 1e9:>7.0f} "
                f"{median * bytes_per_second / moved:>8.2f} {fp32 / median:>7.2f} {error:>8.1e}"
            )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=15, help="timed calls per format and size")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--group-size", type=int, default=128, choices=(32, 64, 128))
    parser.add_argument(
        "--skip", nargs="+", default=[], metavar="FORMAT", help="formats to leave out, e.g. bf16"
    )
    parser.add_argument("--pool-mib", type=int, default=320, help="weights per format, together")
    parser.add_argument("--bandwidth", type=float, help="GB/s of the floor; default: measured")
    arguments = parser.parse_args()
    known = formats(arguments.group_size).keys() - {"fp32"}  # the others are compared with it
    if unknown := set(arguments.skip) - known:
        parser.error(f"--skip {sorted(unknown)[0]!r}: choose from {', '.join(sorted(known))}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    load = os.getloadavg()[0]
    print(
        f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, "
        f"{arguments.threads} threads, torch {torch.__version__}, load average {load:.1f}, "
        f"median of {arguments.repeats}"
    )
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        print("note: no AVX512; without VNNI, `torch._int_mm` is slower than float32")
    if load > 0.5:
        print("note: other work is running; times and the bandwidth will vary")
    if arguments.bandwidth:
        bytes_per_second = arguments.bandwidth * 1e9
        print(f"floor: {arguments.bandwidth:.1f} GB/s, as given")
    else:
        bytes_per_second = memory_bandwidth(arguments.repeats, arguments.pool_mib * MIB)
        print(f"floor: {bytes_per_second / 1e9:.1f} GB/s, measured in this run")
    with torch.inference_mode():
        for shape in SHAPES:
            bench_shape(shape, arguments, bytes_per_second)


if __name__ == "__main__":
    main()
