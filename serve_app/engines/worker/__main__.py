"""Starts a worker: `python .../worker/__main__.py DESCRIPTOR REPLICA`.

DESCRIPTOR is an inherited Unix socket, REPLICA the pid of the process that started this one. This
file makes a package of its folder, because nothing of the project can be imported here. An engine's
own launcher may run it again in its processes, under another name: then it only takes the folder
off the path, where Python has put it, because `vllm.py` here is not vLLM.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys

PACKAGE = "intserve_worker"
FOLDER = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or os.curdir) != FOLDER]


def make_package() -> None:
    """Let the files beside this one be imported as `intserve_worker.NAME`."""
    spec = importlib.util.spec_from_file_location(
        PACKAGE, os.path.join(FOLDER, "__init__.py"), submodule_search_locations=[FOLDER]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = package
    spec.loader.exec_module(package)


def main(descriptor: int, replica: int) -> None:
    make_package()
    importlib.import_module(f"{PACKAGE}.guardian").fork_guarded(replica, close=descriptor)
    importlib.import_module(f"{PACKAGE}.loop").run(descriptor)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
