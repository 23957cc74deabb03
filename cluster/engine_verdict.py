"""The plan's verdict on a built engine and the machines of a label: does it load and fit there?

`build` was told a kind of machine; where the engine is then served, a node's label says what is
really there.
"""

from __future__ import annotations

from collections.abc import Mapping

from cluster.built_bytes import RELEASE
from cluster.hardware import GPUS, Hardware, Machines, parse_device
from cluster.plan import DEFAULT_CONTEXT, Plan, make_plan
from deepseek.artifact.built_engine import BuiltEngine
from deepseek.errors import DeployError
from deepseek.recipe import Recipe

#: Labels of a node that name its GPUs: what `cluster.yaml` sets, and what Ray finds by itself.
LABELS = ("hardware", "ray.io/accelerator-type")


def hardware_of(labels: Mapping[str, str]) -> Hardware | None:
    """The GPUs that a node's labels name, None where they name none that is known. Ray's own label
    has no memory (`H100`), and counts where it can mean one card alone."""
    for label in LABELS:
        name = labels.get(label)
        if name is None:
            continue
        try:
            return parse_device(name)[0]
        except DeployError:
            alike = [gpu for gpu in GPUS.values() if gpu.name.partition("-")[0] == name.upper()]
            if len(alike) == 1:
                return alike[0]
    return None


def plan_engine(
    engine: BuiltEngine,
    hardware: Hardware,
    ranks: int,
    *,
    kv_cache: str | None = None,
    context: int | None = None,
    dialect: str | None = None,
) -> Plan:
    """The plan of one replica of a built engine on `ranks` GPUs of this hardware, for one request
    of `context` tokens. `kv_cache` None: as built.

    Raises:
        DeployError: no such plan: the ranks cannot share the model, or the context is too long.
    """
    recipe = RELEASE if engine.manifest is None else engine.manifest.recipe
    recipe = Recipe.model_validate(recipe.model_dump() | {"kv_cache": kv_cache or engine.kv_cache})
    return make_plan(
        engine.config,
        recipe,
        Machines(hardware, ranks),
        target=engine.target,
        context=min(context or DEFAULT_CONTEXT, engine.config.max_position_embeddings),
        dialect=dialect,
    )


def verdict(plan: Plan, where: str) -> str | None:
    """Why the engine cannot be served on the machines of its plan, in one sentence; None where it
    can. `where` says which nodes those are."""
    machines = plan.machines
    if plan.refusals:
        return f"{machines.label} ({where}): {plan.refusals[0].sentence()}"
    if plan.fits:
        return None
    used = plan.footprint
    needed = used.weights_per_gpu + used.workspace_per_gpu + used.kv_bytes(plan.context)
    usable = machines.hardware.usable_bytes
    fit = plan.smallest_fit
    remedy = (
        f"{fit.hardware} would hold it" if fit is not None else "no number of these GPUs holds it"
    )
    return (
        f"{machines.label} ({where}): one request of {plan.context} tokens needs "
        f"{needed / 1e9:.1f} GB of each GPU, {used.weights_per_gpu / 1e9:.1f} GB of them weights, "
        f"and {usable / 1e9:.1f} GB can be used; {remedy}: lower max_model_len, choose other nodes "
        "(labels), or build a smaller recipe"
    )
