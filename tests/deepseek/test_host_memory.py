"""The memory of this process is the machine's, or its container's where that is less."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepseek.host_memory import host_memory_bytes


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
