"""Which room imports which: the arrows of the house, read from the source.

    python tests/support/rooms.py                   # the arrows between the rooms of every package
    python tests/support/rooms.py quant_jobs        # of one package, with the files behind them

A room is a folder of a package. Of the files beside the folders, those that import no room are the
package's ground, on which its rooms stand; the others are its hall. Imports inside functions count
too.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

HALL, GROUND = "hall", "ground"
PACKAGES = ("deepseek", "cluster", "quant_jobs", "serve_app")

#: Arrow -> the files it is made of: (from room, to room) -> "importing file -> imported module".
Arrows = dict[tuple[str, str], list[str]]


def arrows(root: Path, package: str) -> Arrows:
    """Every import from one room of a package to another."""
    folder = root / package
    found: Arrows = {}
    ground = ground_of(root, package)
    for source in sorted(folder.rglob("*.py")):
        here = room_of(source.relative_to(folder), ground)
        for module in imported(source, package):
            there = room_of(_path_of(root, module).relative_to(folder), ground)
            if there != here:
                name = f"{source.relative_to(root)} -> {module}"
                found.setdefault((here, there), []).append(name)
    return found


def circles(found: Arrows) -> list[tuple[str, ...]]:
    """Rooms that import themselves by way of others; each circle once, from its first room."""
    targets: dict[str, set[str]] = {}
    for here, there in found:
        targets.setdefault(here, set()).add(there)
    closed: set[tuple[str, ...]] = set()

    def walk(path: tuple[str, ...]) -> None:
        for there in targets.get(path[-1], ()):
            if there == path[0]:
                closed.add(path)
            elif there > path[0] and there not in path:
                walk((*path, there))

    for room in targets:
        walk((room,))
    return sorted(closed)


def imported(source: Path, package: str) -> list[str]:
    """Modules of the package that a file imports, as written."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if node.module == package:
                names += [f"{package}.{alias.name}" for alias in node.names]
            else:
                names.append(node.module)
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return [name for name in names if name.partition(".")[0] == package]


def room_of(path: Path, ground: set[str]) -> str:
    """Room of a file, by its path below the package."""
    if len(path.parts) > 1:
        return path.parts[0]
    return GROUND if path.name in ground else HALL


def ground_of(root: Path, package: str) -> set[str]:
    """The files beside the package's folders that import no room, nor a file that does."""
    folder = root / package
    needs: dict[str, set[Path]] = {
        path.name: {
            _path_of(root, module).relative_to(folder) for module in imported(path, package)
        }
        for path in folder.glob("*.py")
    }
    # An extension module has a stub and imports nothing.
    needs |= {path.with_suffix(".py").name: set() for path in folder.glob("*.pyi")}
    ground = set(needs)
    while above := {
        name
        for name in ground
        if any(len(path.parts) > 1 or path.name not in ground for path in needs[name])
    }:
        ground -= above
    return ground


def _path_of(root: Path, module: str) -> Path:
    """The file of a module, or of the package that it is."""
    path = root.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def main(root: Path, packages: list[str]) -> None:
    for package in packages or PACKAGES:
        found = arrows(root, package)
        files = len(list((root / package).rglob("*.py")))
        count = sum(map(len, found.values()))
        print(f"{package}: {files} files, {len(found)} arrows between rooms ({count} imports), "
              f"{len(circles(found))} circles")  # fmt: skip
        for (here, there), names in sorted(found.items()):
            print(f"  {here:12} -> {there:12} {len(names):3} imports")
            for name in names if packages else ():
                print(f"      {name}")


if __name__ == "__main__":
    main(Path(__file__).resolve().parents[2], sys.argv[1:])
