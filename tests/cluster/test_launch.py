"""cluster.yaml against Ray's own schema, the manifests against what KubeRay requires."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from serve_app.config import ServeConfig

pytestmark = pytest.mark.ray

MANIFESTS = ("raycluster.yaml", "rayjob-quantize.yaml", "rayservice.yaml")


@pytest.fixture(scope="module")
def launcher(root: Path) -> dict[str, Any]:
    return yaml.safe_load((root / "cluster.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def manifests(root: Path) -> dict[str, dict[str, Any]]:
    folder = root / "cluster" / "manifests"
    assert {path.name for path in folder.iterdir()} == set(MANIFESTS)
    return {n: yaml.safe_load((folder / n).read_text(encoding="utf-8")) for n in MANIFESTS}


def cluster_spec(manifest: dict[str, Any]) -> dict[str, Any]:
    keys = {"RayCluster": None, "RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
    key = keys[manifest["kind"]]
    return manifest["spec"][key] if key else manifest["spec"]


def test_rays_own_schema_accepts_cluster_yaml(launcher: dict[str, Any]) -> None:
    prepared = prepare_config(launcher)
    validate_config(prepared)
    workers = prepared["provider"]["worker_ips"]
    assert prepared["max_workers"] == len(workers) == launcher["min_workers"]


def test_rays_schema_refuses_a_misspelled_key(launcher: dict[str, Any]) -> None:
    """Else the test above would prove nothing."""
    import jsonschema

    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(prepare_config(launcher | {"max_worker": 2}))


def test_every_start_command_parses_and_uses_the_shared_environment(
    launcher: dict[str, Any],
) -> None:
    for where in ("head_start_ray_commands", "worker_start_ray_commands"):
        for line in launcher[where]:
            assert line.startswith(". ~/intserve/cluster/ray-env.sh && ")
            subprocess.run(["bash", "-n", "-c", line], check=True)
    start = launcher["worker_start_ray_commands"][-1]
    assert "--address=$RAY_HEAD_IP:6379" in start
    assert "--head" in launcher["head_start_ray_commands"][-1]


def test_ray_start_knows_every_option_in_cluster_yaml(launcher: dict[str, Any]) -> None:
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    for where in ("head_start_ray_commands", "worker_start_ray_commands"):
        words = shlex.split(launcher[where][-1].partition("ray start")[2])
        assert words
        assert {word.partition("=")[0] for word in words} <= known


def test_the_shared_environment_turns_on_serves_production_modes(root: Path) -> None:
    script = f". {shlex.quote(str(root / 'cluster' / 'ray-env.sh'))} && env"
    out = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        env={"HOME": "/home/ray", "PATH": "/usr/bin:/bin", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "0"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert "RAY_SERVE_ENABLE_HA_PROXY=1" in out
    assert "RAY_USAGE_STATS_ENABLED=0" in out
    assert "RAY_SERVE_THROUGHPUT_OPTIMIZED=0" in out, "a value that is set must win"
    assert any(line.startswith("PATH=/home/ray/intserve/.venv/bin:") for line in out)


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_have_kuberays_structure(name: str, manifests: dict[str, Any]) -> None:
    manifest = manifests[name]
    assert manifest["apiVersion"] == "ray.io/v1"
    assert manifest["metadata"].keys() & {"name", "generateName"}
    spec = cluster_spec(manifest)
    assert spec["rayVersion"] == ray.__version__
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert all(isinstance(entry["value"], str) for entry in container["env"])
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert limits.get("nvidia.com/gpu", "0") == group["rayStartParams"].get("num-gpus", "0")


def test_the_head_takes_no_gpu_anywhere(manifests: dict[str, Any]) -> None:
    for manifest in manifests.values():
        head = cluster_spec(manifest)["headGroupSpec"]
        assert head["rayStartParams"]["num-gpus"] == "0"


def test_the_job_runs_a_command_that_exists(manifests: dict[str, Any]) -> None:
    from typer.main import get_command

    from quant_jobs.__main__ import app

    words = shlex.split(manifests["rayjob-quantize.yaml"]["spec"]["entrypoint"])
    assert words[:4] == ["python", "-m", "quant_jobs", "quantize"]
    quantize = get_command(app).commands["quantize"]
    known = {option for parameter in quantize.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_the_service_deploys_our_application(manifests: dict[str, Any]) -> None:
    raw = yaml.safe_load(manifests["rayservice.yaml"]["spec"]["serveConfigV2"])
    (application,) = ServeDeploySchema.model_validate(raw).applications
    assert application.import_path == "serve_app.app:build"
    config = ServeConfig.model_validate(application.args)
    assert config.ingress_replicas >= 2
    assert not config.allow_ungated
