"""`build --stage`: the copy beside the engine, in the command's answer and in its exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from support.chain import Chain, Ended
from support.small_engines import whole


def test_build_stages_the_engine_on_this_machine_without_ray(
    chain: Chain, command: Callable[..., Ended], tmp_path: Path
) -> None:
    words = ("build", "--checkpoint", chain.checkpoint, "--output", tmp_path / "engine")
    ended = command(*words, "--stage", tmp_path / "disk" / "copy", "--json")
    assert ended.code == 0, ended.err
    answer = json.loads(ended.out)
    (node,) = answer["stage"]["nodes"]
    assert node["copied_bytes"] == answer["bytes"]
    assert answer["stage"]["engine_digest"] == answer["engine_digest"]
    assert whole(tmp_path / "disk" / "copy") == whole(tmp_path / "engine")
    again = command(*words, "--stage", tmp_path / "disk" / "copy")
    assert again.code == 0
    assert again.out.splitlines()[-1].startswith("node ")
    assert ", 0 bytes copied and " in again.out.splitlines()[-1]


def test_a_copy_that_cannot_be_made_is_one_sentence_and_leaves_the_engine(
    chain: Chain, command: Callable[..., Ended], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("...")
    words = ("build", "--checkpoint", chain.checkpoint, "--output", tmp_path / "engine")
    ended = command(*words, "--stage", tmp_path / "mine")
    assert ended.code == 2
    last = ended.err.splitlines()[-1]
    assert last.startswith("error: 1 of 1 nodes have no copy of the engine: node ")
    assert "holds files of something else (thesis.tex) and no engine.json; choose another" in last
    assert sorted(whole(tmp_path / "mine")) == ["thesis.tex"]
    assert whole(tmp_path / "engine") == whole(chain.engine)


def test_an_impossible_place_is_refused_before_anything_is_built(
    chain: Chain, command: Callable[..., Ended], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("...")
    engine = tmp_path / "engine"
    words = ("build", "--checkpoint", chain.checkpoint, "--output", engine)
    for place, sentence in {
        tmp_path / "file": "is a file; --stage must name a directory",
        engine: "is the engine itself; choose another --stage",
        engine / "copy": "is inside the engine; choose another --stage",
    }.items():
        ended = command(*words, "--stage", place)
        assert (ended.code, ended.err.count("\n")) == (2, 1)
        assert sentence in ended.err
        assert not engine.exists()
    ended = command("build", "--check", chain.engine, "--stage", tmp_path / "copy")
    assert ended.err == "error: --check builds nothing; leave --output and --stage out\n"
