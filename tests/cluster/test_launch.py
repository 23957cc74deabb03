"""cluster.yaml against Ray's own schema, the manifests against what KubeRay requires."""

from __future__ import annotations

import re
import resource
import shlex
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from cluster.engine_verdict import hardware_of
from serve_app import haproxy_wrapper
from serve_app.config import ServeConfig
from serve_app.haproxy_wrapper import METRICS_HOST
from serve_app.proxy_environment import max_connections
from serve_app.proxy_guard import CALLBACK, CALLBACK_VARIABLE
from serve_app.sections import RequestsSection

pytestmark = pytest.mark.ray

MANIFESTS = ("raycluster.yaml", "rayjob-quantize.yaml", "rayservice.yaml")
POLICY = "networkpolicy.yaml"
WRAPPER = Path(haproxy_wrapper.__file__)


@pytest.fixture(scope="module")
def launcher(root: Path) -> dict[str, Any]:
    return yaml.safe_load((root / "cluster.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def manifests(root: Path) -> dict[str, dict[str, Any]]:
    folder = root / "cluster" / "manifests"
    assert {path.name for path in folder.iterdir()} == {*MANIFESTS, POLICY}
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


def test_nodes_with_gpus_say_which_so_that_pools_can_ask_for_them(
    launcher: dict[str, Any], manifests: dict[str, dict[str, Any]], root: Path
) -> None:
    example = yaml.safe_load((root / "examples/serve/trtllm.yaml").read_text(encoding="utf-8"))
    (application,) = example["applications"]
    wanted = {tuple(pool["labels"].items()) for pool in application["args"]["pools"].values()}
    ((label,),) = wanted
    assert f"--labels={'='.join(label)}" in launcher["worker_start_ray_commands"][-1]
    workers = cluster_spec(manifests["raycluster.yaml"])["workerGroupSpecs"]
    assert workers[0]["rayStartParams"]["labels"] == "=".join(label)
    assert hardware_of(dict([label])) is not None, "a plan knows these GPUs"


def source(root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Source ray-env.sh as the launcher's commands do; what they would run next is `env`."""
    script = f". {shlex.quote(str(root / 'cluster' / 'ray-env.sh'))} && env"
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """A user with a token, as HOME and RAY_TMPDIR say."""
    token = tmp_path / ".intserve" / "ray-token"
    token.parent.mkdir()
    token.touch(0o600)
    token.write_text("t" * 64)
    return {"HOME": str(tmp_path), "RAY_TMPDIR": str(tmp_path / "ray")}


def test_the_shared_environment_turns_on_serves_production_modes(
    root: Path, home: dict[str, str]
) -> None:
    done = source(root, **home, RAY_SERVE_THROUGHPUT_OPTIMIZED="0")
    assert done.returncode == 0, done.stderr
    out = done.stdout.splitlines()
    assert "RAY_SERVE_ENABLE_HA_PROXY=1" in out
    assert "RAY_USAGE_STATS_ENABLED=0" in out
    assert "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS=1" in out, "else a hang keeps its GPUs"
    assert f"{CALLBACK_VARIABLE}={CALLBACK}" in out, "else nothing guards Serve's proxies"
    assert "RAY_SERVE_THROUGHPUT_OPTIMIZED=0" in out, "a value that is set must win"
    wrapper = f"{home['HOME']}/intserve/serve_app/{WRAPPER.name}"
    assert f"RAY_SERVE_HAPROXY_BINARY_PATH={wrapper}" in out, "else HAProxy's ports are open"
    assert any(line.startswith(f"PATH={home['HOME']}/intserve/.venv/bin:") for line in out)


def test_haproxys_sockets_are_private_and_streams_outlive_its_restarts(
    root: Path, home: dict[str, str]
) -> None:
    done = source(root, **home)
    found = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    for name in ("CONFIG_FILE_LOC", "SOCKET_PATH", "METRICS_SOCKET_PATH", "SERVER_STATE_FILE"):
        assert Path(found[f"RAY_SERVE_HAPROXY_{name}"]).parent == Path(home["RAY_TMPDIR"])
    assert found["RAY_SERVE_HAPROXY_SERVER_STATE_BASE"] == home["RAY_TMPDIR"]
    longest_s = RequestsSection().timeout_s
    assert float(found["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) > longest_s
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert int(found["RAY_SERVE_HAPROXY_MAXCONN"]) == max_connections(files)


def test_no_ray_starts_without_token_authentication(root: Path, home: dict[str, str]) -> None:
    token = Path(home["HOME"]) / ".intserve" / "ray-token"
    assert source(root, **home).returncode == 0
    refused = {
        "starts Ray without authentication": {"RAY_AUTH_MODE": "disabled"},
        "no Ray token in /absent": {"RAY_AUTH_TOKEN_PATH": "/absent"},
        "is not a folder of this user": {"RAY_TMPDIR": str(token)},
    }
    for told, setting in refused.items():
        done = source(root, **home | setting)
        assert (done.returncode, done.stdout) == (1, ""), told
        assert done.stderr.startswith("error: ")
        assert told in done.stderr
        assert done.stderr.count("\n") == 1
    token.chmod(0o644)
    assert "chmod 600" in source(root, **home).stderr
    token.write_text("")
    assert "no Ray token in" in source(root, **home).stderr


def test_every_node_gets_token_mode_its_token_and_a_folder_of_its_own(
    root: Path, home: dict[str, str], launcher: dict[str, Any]
) -> None:
    out = source(root, **home).stdout.splitlines()
    path = f"{home['HOME']}/.intserve/ray-token"
    assert {"RAY_AUTH_MODE=token", f"RAY_AUTH_TOKEN_PATH={path}"} <= set(out)
    assert stat.S_IMODE(Path(home["RAY_TMPDIR"]).stat().st_mode) == 0o700
    # The launcher brings the token to where the environment looks for it.
    assert launcher["file_mounts"]["~/.intserve/ray-token"] == "~/.intserve/ray-token"


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
        for entry in container["env"]:
            assert isinstance(entry.get("value", ""), str)
            assert ("value" in entry) != ("valueFrom" in entry)
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
    assert config.ingress.replicas >= 2
    assert not config.pool.gate.allow_ungated


def test_every_container_wants_the_token_of_a_secret_and_has_an_image_that_stays(
    manifests: dict[str, Any],
) -> None:
    for manifest in manifests.values():
        spec = cluster_spec(manifest)
        assert spec["authOptions"] == {"mode": "token", "secretName": "intserve-ray-token"}
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            (container,) = group["template"]["spec"]["containers"]
            env = {entry["name"]: entry for entry in container["env"]}
            assert env["RAY_AUTH_MODE"]["value"] == "token"
            assert env["RAY_AUTH_TOKEN"]["valueFrom"] == {
                "secretKeyRef": {"name": "intserve-ray-token", "key": "auth_token"}
            }
            if "RAY_SERVE_ENABLE_HA_PROXY" in env:
                assert env[CALLBACK_VARIABLE]["value"] == CALLBACK
                wrapper = f"{container['workingDir']}/serve_app/{WRAPPER.name}"
                assert env["RAY_SERVE_HAPROXY_BINARY_PATH"]["value"] == wrapper
                assert METRICS_HOST not in env
            tag = container["image"].rpartition("/")[2].partition(":")[2]
            assert tag not in ("", "latest")


def test_the_service_reads_its_keys_from_a_mounted_secret(manifests: dict[str, Any]) -> None:
    manifest = manifests["rayservice.yaml"]
    raw = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    args = raw["applications"][0]["args"]
    assert "inline" not in args["keys"], "the dashboard shows arguments"
    spec = cluster_spec(manifest)
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        mounts = {m["name"]: m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
        assert args["keys"]["file"].startswith(f"{mounts['keys']}/")
        secret = next(v["secret"] for v in pod["volumes"] if v["name"] == "keys")
        assert secret["defaultMode"] & 0o007 == 0


def test_pods_can_be_reached_by_each_other_and_by_named_others_on_named_ports(
    root: Path, manifests: dict[str, Any]
) -> None:
    path = root / "cluster" / "manifests" / POLICY
    policy = yaml.safe_load(path.read_text(encoding="utf-8"))["spec"]
    label = policy["podSelector"]["matchLabels"]
    for manifest in manifests.values():
        spec = cluster_spec(manifest)
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            assert label.items() <= group["template"]["metadata"]["labels"].items()
    each_other, *others = policy["ingress"]
    assert each_other == {"from": [{"podSelector": {"matchLabels": label}}]}
    for rule in others:
        assert rule["from"], "an empty list is everybody"
        assert all(rule["from"])
        assert rule["ports"]
    reached = {port["port"] for rule in others for port in rule["ports"]}
    assert reached == {8000, 8265, 8080, 44217, 44227, 9101}


def test_every_port_of_cluster_yaml_and_the_manifests_is_in_the_list_of_ports(
    root: Path, launcher: dict[str, Any], manifests: dict[str, Any]
) -> None:
    page = (root / "docs" / "security.md").read_text(encoding="utf-8")
    table = page[page.index("## Ports") :].partition("\n## ")[0]
    listed = {int(port) for port in re.findall(r"^\| `(\d+)`", table, re.MULTILINE)}
    ranges = re.findall(r"^\| `(\d+)-(\d+)`", table, re.MULTILINE)
    listed |= {int(port) for pair in ranges for port in pair}
    started = " ".join(launcher["head_start_ray_commands"] + launcher["worker_start_ray_commands"])
    used = {int(port) for port in re.findall(r"-port=(\d+)", started)}
    for manifest in manifests.values():
        spec = cluster_spec(manifest)
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            ports = group["template"]["spec"]["containers"][0].get("ports", [])
            used |= {port["containerPort"] for port in ports}
    policy = (root / "cluster" / "manifests" / POLICY).read_text(encoding="utf-8")
    used |= {int(port) for port in re.findall(r"port: (\d+)", policy)}
    assert used
    assert used <= listed, sorted(used - listed)


def test_the_list_of_ports_has_serves_own_numbers(root: Path) -> None:
    from ray.serve._private import constants

    table = (root / "docs" / "security.md").read_text(encoding="utf-8")
    http = "RAY_SERVE_DIRECT_INGRESS_{}_HTTP_PORT"
    low, high = (getattr(constants, http.format(end)) for end in ("MIN", "MAX"))
    assert f"`{low}-{high}`" in table
    for name in ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT",
                 "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT", "DEFAULT_HTTP_PORT"):  # fmt: skip
        assert f"`{getattr(constants, name)}`" in table, name


def test_every_port_of_a_node_is_fixed_and_none_collides(launcher: dict[str, Any]) -> None:
    from ray.scripts.scripts import start

    wanted = {option for parameter in start.params for option in parameter.opts
              if option.endswith("-port")}  # fmt: skip
    head, worker = (
        dict(re.findall(r"(--[a-z-]*port)=(\d+)", launcher[where][-1]))
        for where in ("head_start_ray_commands", "worker_start_ray_commands")
    )
    only_head = {"--port", "--dashboard-port", "--ray-client-server-port"}
    assert head.keys() == wanted
    assert worker.keys() == wanted - only_head
    assert len(set(head.values())) == len(head)
    assert worker.items() <= head.items()
    low, high = int(head["--min-worker-port"]), int(head["--max-worker-port"])
    single = {int(port) for name, port in head.items() if "worker-port" not in name}
    assert not any(low <= port <= high for port in single)
