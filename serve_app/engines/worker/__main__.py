"""Starts a worker: `python -P .../worker/__main__.py DESCRIPTOR REPLICA`.

DESCRIPTOR is an inherited Unix socket, REPLICA the pid of the process that started this one. This
file makes a package of its folder, because nothing of the project can be imported here. An engine's
own launcher may import it again in its processes, under another name: then it does nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys

PACKAGE = "intserve_worker"


def make_package() -> None:
    """Let the files beside this one be imported as `intserve_worker.NAME`."""
    folder = os.path.dirname(os.path.abspath(__file__))
    spec = importlib.util.spec_from_file_location(
        PACKAGE, os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
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
