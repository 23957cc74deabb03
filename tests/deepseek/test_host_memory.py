"""The memory of this process is the machine's, or its container's where that is less."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepseek.host_memory import available_memory_bytes, host_memory_bytes


@pytest.mark.parametrize(
    ("text", "limit"),
    [("1048576\n", 1 << 20), ("max\n", None), ("", None), ("-1", None), ("\xff", None)],
)
def test_a_containers_limit_counts_where_it_is_a_number(
    tmp_path: Path, text: str, limit: int | None
) -> None:
    machine = host_memory_bytes(())
    assert machine > 1 << 28
    (tmp_path / "limit").write_text(text, encoding="latin-1")
    limits = (str(tmp_path / "absent"), str(tmp_path / "limit"))
    assert host_memory_bytes(limits) == (limit or machine)


def test_a_limit_above_the_machines_memory_is_none(tmp_path: Path) -> None:
    (tmp_path / "limit").write_text("9223372036854771712\n")
    assert host_memory_bytes((str(tmp_path / "limit"),)) == host_memory_bytes(())


MEMINFO = "MemTotal:       24684000 kB\nMemFree:  100 kB\nMemAvailable:   20000 kB\n"
V2, V1 = "sys/fs/cgroup/", "sys/fs/cgroup/memory/"


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, 20000 * 1024),
        ({V2 + "memory.max": "max", V2 + "memory.current": "7"}, 20000 * 1024),
        ({V2 + "memory.max": "1000", V2 + "memory.current": "700"}, 300),
        (
            {
                V2 + "memory.max": "1000",
                V2 + "memory.current": "700",
                V2 + "memory.stat": "anon 90\nfile 600\nfile_mapped 5\n",
            },
            900,
        ),
        ({V2 + "memory.max": "1000", V2 + "memory.current": "1200"}, 0),
        (
            {
                V1 + "memory.limit_in_bytes": "1000",
                V1 + "memory.usage_in_bytes": "800",
                V1 + "memory.stat": "cache 1\ntotal_cache 250\n",
            },
            450,
        ),
    ],
)
def test_what_is_available_is_what_the_container_has_left(
    tmp_path: Path, files: dict[str, str], available: int
) -> None:
    for name, text in ({"proc/meminfo": MEMINFO} | files).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_memory_bytes(str(tmp_path)) == available


def test_some_of_this_machines_memory_is_available() -> None:
    assert 1 << 26 < available_memory_bytes() <= host_memory_bytes(())
