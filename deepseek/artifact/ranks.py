"""The ranks of an engine, for targets that divide routed experts over any number of groups."""

from __future__ import annotations

from deepseek.artifact.engine_manifest import RankLayout
from deepseek.errors import DeployError


def require_ranks(tp: int, ep: int) -> RankLayout:
    """The ranks of `--tp` and `--ep`.

    Raises:
        DeployError: one is not positive, or ep does not divide tp.
    """
    if tp < 1 or ep < 1:
        raise DeployError(f"--tp {tp} --ep {ep}: both must be at least 1")
    if tp % ep:
        below = max(n for n in range(1, min(tp, ep) + 1) if tp % n == 0)
        raise DeployError(
            f"--ep {ep} does not divide --tp {tp}: the experts are divided among ep groups of "
            f"equally many ranks; use --ep {below}"
        )
    return RankLayout(tp=tp, ep=ep)
