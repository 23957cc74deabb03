"""Where engine replicas go: GPUs, nodes with a label, and whether there is room before any starts.

A replica of an engine with GPUs reserves them as a placement group: one bundle with all of them on
one node (STRICT_PACK), or one bundle for each of several whole nodes. The replica's own actor holds
the GPUs of the first bundle, because Ray takes CUDA_VISIBLE_DEVICES from an actor without any, and
the engine's process inherits it.

`Reserved` needs no cluster, and `check_room` a table of its nodes. What is not of the service is in
`cluster/`: the layout of bundles (bundles.py), the table (node_table.py), what is short
(reservation.py), the plan (engine_verdict.py).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.bundles import Placement, engine_placement
from cluster.hardware import GPUS_PER_NODE
from cluster.reservation import Demand, Holder, NodeRoom, shortage
from deepseek.artifact.built_engine import BuiltEngine, read_engine
from deepseek.artifact.engine_manifest import EngineManifest, read_engine_manifest
from deepseek.errors import ConfigError, DeployError
from deepseek.trtllm.fields import TrtllmFields
from deepseek.trtllm.llm_args import LLM_ARGS_FILE, llm_args_of
from deepseek.vllm.launch import LAUNCH_FILE, launch_of
from serve_app.config import ServeConfig
from serve_app.engine_sections import (
    EngineSection,
    RemoteOptions,
    TrtllmOptions,
    VllmOptions,
)
from serve_app.routing.candidates import engine_deployment
from serve_app.sections import PoolSection

log = logging.getLogger("ray.serve")


def check_python(name: str, engine: EngineSection) -> None:
    """Raises ConfigError unless the Python of an engine's own environment can be started here."""
    if isinstance(engine, TrtllmOptions | VllmOptions) and not os.access(engine.python, os.X_OK):
        raise ConfigError(
            f"pools.{name}.engine.python: {engine.python} is no program here; make the engine's "
            f"environment with `make engine-env TARGET={engine.kind}`, which prints its Python"
        )


@dataclass(frozen=True, slots=True)
class Reserved:
    """What Ray reserves for each replica of a pool: `gpus` of them on nodes that have `labels`."""

    gpus: int
    cpus: float
    labels: Mapping[str, str]

    @property
    def placement(self) -> Placement | None:
        """The bundles of one replica; None for one without GPUs, which is an actor alone."""
        if not self.gpus:
            return None
        made = engine_placement(self.gpus, cpus_per_node=self.cpus)
        bundles = tuple({k: v for k, v in bundle.items() if v} for bundle in made.bundles)
        return Placement(bundles, made.strategy)

    @property
    def num_nodes(self) -> int:
        """Nodes of one replica."""
        return max(1, self.gpus // GPUS_PER_NODE)

    def deployment_options(self, actor_options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a Serve deployment; `actor_options` are those without GPUs."""
        actor = dict(actor_options)
        placement = self.placement
        if placement is None:
            if self.labels:
                actor["label_selector"] = dict(self.labels)
            return {"ray_actor_options": actor}
        actor["num_gpus"] = placement.bundles[0]["GPU"]
        options: dict[str, Any] = {
            "ray_actor_options": actor,
            "placement_group_bundles": [dict(bundle) for bundle in placement.bundles],
            "placement_group_strategy": placement.strategy,
        }
        if self.labels:
            options["placement_group_bundle_label_selector"] = [
                dict(self.labels) for _ in placement.bundles
            ]
        return options


def reserved(name: str, pool: PoolSection) -> Reserved:
    """What is reserved for each replica of a pool. Of an engine on GPUs its directory is read.

    Raises:
        ArtifactError: the directory is no engine.
        DeployError: the number of GPUs is not that of the engine's ranks, or no replica can have
            so many.
    """
    gpus = pool.gpus or 0
    if isinstance(pool.engine, TrtllmOptions | VllmOptions):
        gpus = _ranks(name, pool, pool.engine)
    if gpus > GPUS_PER_NODE and gpus % GPUS_PER_NODE:
        raise DeployError(
            f"pools.{name}: {gpus} GPUs are neither part of one node of {GPUS_PER_NODE} nor whole "
            "nodes; correct gpus, or the ranks of the engine"
        )
    if gpus > GPUS_PER_NODE and pool.staged is not None:
        raise DeployError(
            f"pools.{name}.engine.staged is for replicas on one node, and these have "
            f"{gpus // GPUS_PER_NODE}; remove it"
        )
    return Reserved(gpus, pool.cpus, dict(pool.labels))


def _ranks(name: str, pool: PoolSection, options: RemoteOptions) -> int:
    """GPUs of one replica of an engine that has a rank on each."""
    manifest = read_engine_manifest(options.directory)
    if isinstance(options, TrtllmOptions):
        ranks = manifest.ranks.tp
        if ranks > GPUS_PER_NODE:
            raise DeployError(_over_nodes(name, options.directory, manifest))
    else:
        ranks = tensor_ranks(options, manifest) * options.pipeline_parallel_size
    without = pool.gpus == 0 or (isinstance(options, VllmOptions) and options.cpu)
    if without:
        if pool.gpus:
            raise DeployError(
                f"pools.{name}.gpus is {pool.gpus}, and engine.cpu says that its environment is "
                "vLLM's build for CPUs; remove one of them"
            )
        return 0
    if pool.gpus is not None and pool.gpus != ranks:
        raise DeployError(
            f"pools.{name}.gpus is {pool.gpus}, and the engine in {options.directory} has {ranks} "
            f"ranks, each on a GPU of its own; remove gpus, or build for {pool.gpus}"
        )
    return ranks


def tensor_ranks(options: VllmOptions, manifest: EngineManifest) -> int:
    """Ranks that share each layer: as configured, else as built."""
    return options.tensor_parallel_size or manifest.ranks.tp


def _over_nodes(name: str, directory: Path, manifest: EngineManifest) -> str:
    weights = sum(manifest.plan.rank_weight_bytes)
    return (
        f"pools.{name}.engine: {directory} was built for {manifest.ranks.tp} ranks, and a replica "
        f"of TensorRT-LLM runs on one node of at most {GPUS_PER_NODE} GPUs: its ranks talk by MPI, "
        "which is not carried over nodes here. The cost: no recipe that one node cannot hold, as "
        f"INT8 on 8 x 80 GB (this one has {weights / 1e9:.0f} GB of weights). Build a recipe of "
        f"INT4 experts with --tp {GPUS_PER_NODE}, take nodes with more memory (8 x 141 GB), or "
        "build for vllm, whose replicas may have several nodes"
    )


def demands(config: ServeConfig, needs: Mapping[str, Reserved]) -> list[Demand]:
    """What the pools reserve together when the service starts. Pools without GPUs wait for nothing
    but their labels, and share CPUs as before."""
    found = []
    for name, pool in config.pools.items():
        placement = needs[name].placement
        if placement is None and needs[name].labels:
            bundle = {"CPU": pool.cpus} if pool.cpus else {}
            placement = Placement((bundle,), "STRICT_PACK")
        if placement is not None:
            found.append(Demand(name, pool.replicas, placement, needs[name].labels))
    return found


def check_room(config: ServeConfig, nodes: Sequence[NodeRoom], holders: Sequence[Holder]) -> None:
    """Check that every pool's engine fits the nodes of its labels, as the plan says, and that its
    replicas find room there now. Reads the directories of engines on GPUs. Logs what it cannot
    check.

    Raises:
        ArtifactError, DeployError: the sentence names the pool, the label, and who holds what.
    """
    needs = {name: reserved(name, pool) for name, pool in config.pools.items()}
    wanted = demands(config, needs)
    if not wanted:
        return
    for name, pool in config.pools.items():
        if needs[name].gpus and isinstance(pool.engine, TrtllmOptions | VllmOptions):
            _check_plan(name, pool.engine, needs[name], nodes)
    sentence = shortage(wanted, nodes, holders)
    if sentence is not None:
        raise DeployError(sentence)
    _warn_of_growth(config, needs, nodes)


def check_this_cluster(config: ServeConfig) -> None:
    """`check_room` on the cluster that this process is connected to, if it is. What replicas of
    these pools hold counts as free: they are replaced by those that are asked for.

    Raises:
        ArtifactError, DeployError: as `check_room`.
    """
    import ray

    if not ray.is_initialized():
        return
    from cluster.node_table import read_holders, read_nodes, replica_of

    own = {engine_deployment(name) for name in config.pools}
    holders = read_holders()
    ours = [holder for holder in holders if replica_of(holder) in own]
    others = [holder for holder in holders if replica_of(holder) not in own]
    check_room(config, [released(node, ours) for node in read_nodes()], others)


def released(node: NodeRoom, holders: Sequence[Holder]) -> NodeRoom:
    """The node with what these hold there as free, too."""
    free = dict(node.free)
    for holder in holders:
        if holder.node_id == node.node_id:
            for kind, amount in holder.resources.items():
                free[kind] = min(free.get(kind, 0.0) + amount, node.total.get(kind, 0.0))
    return replace(node, free=free)


def _warn_of_growth(
    config: ServeConfig, needs: Mapping[str, Reserved], nodes: Sequence[NodeRoom]
) -> None:
    """Say so where a pool may grow beyond what there is: it grows as far as it can, and an update
    that must start a replica first waits for ever."""
    empty = [replace(node, free=node.total) for node in nodes]
    for demand in demands(config, needs):
        pool = config.pools[demand.pool]
        surge = -(-demand.replicas * pool.surge_percent // 100)
        for what, replicas in (
            ("as many replicas as autoscaling.max_replicas", pool.most_replicas),
            ("an update with this surge_percent would not end", demand.replicas + surge),
        ):
            if replicas > demand.replicas:
                grown = replace(demand, replicas=replicas)
                if (sentence := shortage([grown], empty, ())) is not None:
                    log.warning("%s: %s", what, sentence)


def _check_plan(
    name: str, options: RemoteOptions, need: Reserved, nodes: Sequence[NodeRoom]
) -> None:
    """Check the engine against the plan of every kind of node that a replica may get."""
    from cluster.engine_verdict import hardware_of, plan_engine, verdict  # brings torch

    there = [node for node in nodes if node.has(need.labels) and node.total.get("GPU")]
    kinds = {hardware.name: hardware for n in there if (hardware := hardware_of(n.labels))}
    if not kinds:
        log.warning(
            "pool %s: no node says what GPUs it has, so that the plan's verdict is not checked; "
            "start Ray with `--labels=hardware=NAME`, and give the pool that label",
            name,
        )
        return
    engine = read_engine(options.directory)
    dialect, context = _launched(engine, options)
    tp = need.gpus
    if isinstance(options, VllmOptions):
        if options.pipeline_parallel_size > 1:
            log.warning("pool %s: no plan for pipeline stages; its memory is not checked", name)
            return
        if engine.config.num_attention_heads % tp:
            raise DeployError(
                f"pools.{name}.engine.tensor_parallel_size: "
                f"{engine.config.num_attention_heads} attention heads cannot be split over {tp} "
                "GPUs; use a divisor"
            )
    for hardware in kinds.values():
        plan = plan_engine(
            engine,
            hardware,
            tp,
            kv_cache=options.kv_cache,
            context=options.max_model_len or context,
            dialect=dialect,
        )
        where = f"pools.{name}.labels {', '.join(need.labels.values()) or 'none'}"
        if (sentence := verdict(plan, where)) is not None:
            raise DeployError(f"pool {name}: {options.directory} on {sentence}")


def _launched(engine: BuiltEngine, options: RemoteOptions) -> tuple[str | None, int | None]:
    """The dialect of a directory, and the tokens of the longest request by its launch file."""
    if isinstance(options, TrtllmOptions):
        manifest = read_engine_manifest(options.directory)
        fields = TrtllmFields.model_validate(manifest.target_fields)
        data, where = engine.documents[LLM_ARGS_FILE], str(options.directory / LLM_ARGS_FILE)
        args = llm_args_of(data, fields.engine_version, where=where)
        return (fields.dialect if fields.dialect != "released" else None), args.max_seq_len
    data = engine.documents[LAUNCH_FILE]
    return None, launch_of(data, where=str(options.directory / LAUNCH_FILE)).max_model_len
