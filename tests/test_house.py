"""The rules of the house, checked on the source: who may import whom, and that tests are tests."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support.rooms import GROUND, HALL, arrows, circles

#: package -> what it may never import (design: one direction of imports).
FORBIDDEN = {
    "deepseek": {"cluster", "quant_jobs", "serve_app", "ray", "fastapi", "opentelemetry"},
    "cluster": {"quant_jobs", "serve_app"},
    "quant_jobs": {"serve_app"},
    "serve_app": {"quant_jobs"},
}


#: package -> room -> the rooms that it may import; `ground` (files that import no room) is open to
#: all, and the hall may import every room. What is not here, no room may do.
ROOMS: dict[str, dict[str, set[str]]] = {
    "deepseek": {
        "formats": set(),
        "source": {"formats"},
        "artifact": {"formats", "source"},
        "engine": {"artifact", "formats", "source"},
        "trtllm": {"artifact", "formats", "source"},
        "hf": {"artifact", "formats", "source"},
        "fused_loader": {"artifact", "formats", "source"},
        "sglang": {"artifact", "formats", "fused_loader", "source"},
        "vllm": {"artifact", "formats", "fused_loader", "source"},
    },
    "cluster": {"rows": set()},
    "quant_jobs": {
        "algorithms": set(),
        "calibration": {"algorithms"},
        "workers": {"algorithms", "calibration"},
        "evaluation": set(),
        "reports": {"algorithms", "evaluation"},
        "targets": {"algorithms"},
        "cost": {"algorithms", "calibration"},
        "job": {"algorithms", "calibration", "reports", "workers"},
    },
    "serve_app": {
        "autoscaling": {"routing"},
        "engines": set(),
        "routing": {"engines"},
        "telemetry": {"engines"},
        "openai": {"engines", "routing", "telemetry"},
        "replica": {"engines", "routing", "telemetry"},
    },
}


def imported_modules(source: Path) -> set[str]:
    """Top-level names that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_one_way(package: str, root: Path) -> None:
    sources = sorted((root / package).rglob("*.py"))
    assert sources
    for source in sources:
        wrong = imported_modules(source) & FORBIDDEN[package]
        assert not wrong, f"{source.relative_to(root)} imports {sorted(wrong)}"


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_import_each_other_one_way(package: str, root: Path) -> None:
    found = arrows(root, package)
    folders = {path.parent.name for path in (root / package).glob("*/__init__.py")}
    assert folders == ROOMS[package].keys(), "a new room says here whom it imports"
    assert not circles(found)
    for (here, there), names in found.items():
        allowed = here == HALL or there == GROUND or there in ROOMS[package][here]
        assert allowed, f"{here} may not import {there}: {names[0]}"


#: What a worker's process has besides its own folder: it runs in an engine's environment.
WORKER_HAS = {*sys.stdlib_module_names, "msgspec"}
#: A backend's file -> the engine that it imports.
BACKENDS = {"trtllm.py": {"tensorrt_llm"}, "vllm.py": {"vllm"}}


def test_a_worker_imports_the_standard_library_msgspec_and_its_own_folder(root: Path) -> None:
    sources = sorted((root / "serve_app/engines/worker").glob("*.py"))
    assert sources
    for source in sources:
        allowed = WORKER_HAS | BACKENDS.get(source.name, set())
        wrong = imported_modules(source) - allowed
        assert not wrong, f"{source.relative_to(root)} imports {sorted(wrong)}"
        far = [
            node.module
            for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom) and node.level > 1
        ]
        assert not far, f"{source.relative_to(root)} imports {far} from outside its folder"


def test_only_a_worker_imports_an_engine_of_others(root: Path) -> None:
    engines = {name for names in BACKENDS.values() for name in names}
    for package in FORBIDDEN:
        for source in sorted((root / package).rglob("*.py")):
            if source.parent.name != "worker":
                wrong = imported_modules(source) & engines
                assert not wrong, f"{source.relative_to(root)} imports {sorted(wrong)}"


def test_a_circle_of_rooms_is_seen_and_so_is_a_file_of_the_hall(tmp_path: Path) -> None:
    for name, text in {
        "config.py": "import json\n",
        "app.py": "from house.a.x import f\nfrom house import config\n",
        "run.py": "def main():\n    from house import app\n",
        "a/x.py": "from house.b.y import g\nfrom house.config import C\n",
        "b/y.py": "def late():\n    from house.a import x\n",
    }.items():
        path = tmp_path / "house" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = arrows(tmp_path, "house")
    assert found.keys() == {
        *((HALL, "a"), (HALL, GROUND)),
        *(("a", "b"), ("b", "a"), ("a", GROUND)),
    }
    assert circles(found) == [("a", "b")]


def test_cluster_reads_no_tensor_values(root: Path) -> None:
    for source in sorted((root / "cluster").rglob("*.py")):
        wrong = imported_modules(source) & {"safetensors", "numpy"}
        assert not wrong, f"{source.relative_to(root)} imports {sorted(wrong)}"


def test_an_installed_package_has_every_room(root: Path) -> None:
    """A package that is listed is installed with everything below it; a folder of modules without
    `__init__.py` would be imported as a namespace, here and not elsewhere."""
    listed = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(listed["tool"]["scikit-build"]["wheel"]["packages"]) == FORBIDDEN.keys()
    for package in FORBIDDEN:
        for source in (root / package).rglob("*.py"):
            assert (source.parent / "__init__.py").exists(), source.relative_to(root)


def test_every_test_file_holds_a_test(root: Path) -> None:
    for source in sorted((root / "tests").rglob("test_*.py")):
        tree = ast.parse(source.read_text(encoding="utf-8"))
        functions = (ast.FunctionDef, ast.AsyncFunctionDef)
        tests = [n for n in ast.walk(tree) if isinstance(n, functions) and n.name[:5] == "test_"]
        machines = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id[:4] == "Test"]
        assert tests or machines, f"{source.relative_to(root)} collects nothing"


def test_files_that_prose_names_exist(root: Path) -> None:
    """In docs, comments and strings: `folder/name.py` is the end of some file's path. Sources that
    the matrix's rows and the rooms of targets quote are other projects' files."""
    quoting = {root / "docs/deployability.md", *(root / "cluster/rows").glob("*.py")}
    for room in ("trtllm", "vllm", "sglang", "hf"):
        quoting |= set((root / "deepseek" / room).glob("*.py"))
    folders = [*FORBIDDEN, "bench", "docs", "examples", "tests"]
    paths = [path for folder in folders for path in (root / folder).rglob("*.py")]
    endings = {f"/{path.relative_to(root).as_posix()}" for path in paths}
    other = ("tests", "examples")  # which name files that they make, and the standard library's
    pages = [path for path in paths if path.relative_to(root).parts[0] not in other]
    pages += [*root.glob("*.md"), *(root / "docs").rglob("*.md")]
    for page in set(pages) - quoting:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"(?<![\w./])(?:[\w-]+/)*[a-z_]\w*\.py\b", text):
            known = any(ending.endswith(f"/{name}") for ending in endings)
            assert known, f"{page.relative_to(root)} names {name}, which is not there"


def test_nothing_unpickles_or_runs_remote_code(root: Path) -> None:
    banned = ("import pickle", "torch.load(", "trust_remote_code=True", "cloudpickle.load")
    for package in FORBIDDEN:
        for source in sorted((root / package).rglob("*.py")):
            text = source.read_text(encoding="utf-8")
            found = [word for word in banned if word in text]
            assert not found, f"{source.relative_to(root)} uses {found}"


def test_every_module_says_what_it_is(root: Path) -> None:
    for package in FORBIDDEN:
        for source in sorted((root / package).rglob("*.py")):
            text = source.read_text(encoding="utf-8")
            if text.strip():
                assert ast.get_docstring(ast.parse(text)), f"{source.relative_to(root)}: docstring"


def module_names(source: Path) -> set[str]:
    """Full names of the modules that a file may import, also inside functions; of
    `from a import b` both `a` and `a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


#: Of Ray: exceptions, and names of what they are about.
STARTS_NO_RAY = (
    "ray.cloudpickle",
    "ray.exceptions",
    "ray.serve.autoscaling_policy",
    "ray.serve.config",
    "ray.serve.exceptions",
    "ray.serve._private.build_app",
    "ray.serve._private.common",
    "ray.serve._private.config",
    "ray.serve._private.haproxy",
)


def uses_ray(source: Path, root: Path) -> bool:
    """Whether a test file reaches Ray by what it imports, or asks for the shared Serve instance.

    Support modules are followed. Of our own packages only what starts a Ray or workers on one
    counts: most of the others import Ray too, when asked to."""
    names = module_names(source)
    if any(
        name.partition(".")[0] == "ray" and not name.startswith(STARTS_NO_RAY) for name in names
    ):
        return True
    if names & {"cluster.connect", "quant_jobs.workers.pool", "serve_app.local"}:
        return True
    support = root / "tests"
    files = [support / f"{name.replace('.', '/')}.py" for name in names if name[:8] == "support."]
    if any(uses_ray(file, root) for file in files if file.exists()):
        return True
    return "serve_url:" in source.read_text(encoding="utf-8")


def test_a_test_file_that_uses_ray_says_so(root: Path) -> None:
    """So that `make quick`, which leaves out what is marked `ray`, never starts one. This file
    itself only looks at what happens without the marker."""
    sources = sorted((root / "tests").rglob("test_*.py"))
    reaching = [path for path in sources if uses_ray(path, root) and path != Path(__file__)]
    assert len(reaching) > 5
    for source in reaching:
        marked = "pytest.mark.ray" in source.read_text(encoding="utf-8")
        assert marked, f"{source.relative_to(root)} uses Ray and marks no test as `ray`"


def test_a_test_without_the_marker_cannot_connect_to_a_ray() -> None:
    """In a process of its own: this one may hold the Serve instance of other tests."""
    program = "from cluster.connect import connect; connect(num_cpus=1)"
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert "DeployError: no Ray answers at 'this test is not marked ray'" in ended.stderr


def test_benches_and_tests_share_their_helpers_without_editing_the_path(root: Path) -> None:
    assert (root / "bench" / "support").resolve() == root / "tests" / "support"
    for folder in ("bench", "tests"):
        for source in sorted((root / folder).rglob("*.py")):
            edits = [
                node
                for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
                if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path"
            ]
            assert not edits, f"{source.relative_to(root)} edits sys.path"
