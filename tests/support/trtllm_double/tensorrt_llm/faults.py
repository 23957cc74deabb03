"""What goes wrong with the double, by switch.

A fault is a key of the JSON object in TRTLLM_DOUBLE_FAULTS or, while the process runs, of the file
that TRTLLM_DOUBLE_CONTROL names, which wins. The numbers are issues of NVIDIA/TensorRT-LLM unless
another project is named.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """All switches, with what happens where none is set."""

    # The constructor.
    #: `hang`: it never returns (MPI spawn raises in a thread: dynamo #15060). `later`: it waits for
    #: the switch to change, as a very slow load would.
    construct: Literal["ok", "hang", "later"] = "ok"
    #: Seconds that loading takes, shared out over the rank's files.
    load_s: float = 0.0
    #: This rank ends with status 1 before it is ready (#17578), and the constructor waits for it.
    die_before_ready: int | None = None
    #: ... or notices, as some versions do: "Executor worker died during initialization".
    notices_early_death: bool = False
    #: The constructor runs out of memory where free_gpu_memory_fraction is larger (#3486).
    oom_above_fraction: float | None = None
    #: The constructor binds this TCP port, unless MASTER_PORT names another (#9780, #10035).
    fixed_port: int | None = None
    #: Ranks lead sessions of their own, are no children of the process, and outlive it (#16404).
    orphan_ranks: bool = False

    # Death and hang of an engine that was ready.
    #: `_fatal_error` is set, health is False, every stream raises this (#18663).
    fatal_error: str | None = None
    #: What a killed rank does to the engine: it hangs and says that it is well (#16338), or it is
    #: noticed as `fatal_error` is.
    rank_death: Literal["hang", "fatal"] = "hang"
    #: `_check_health()` blocks.
    health_hangs: bool = False
    #: No step is made, with `_check_health()` True ("No free slots", #9628).
    tokens_stop: bool = False
    #: A prompt that does not fit hangs the engine (#4441) instead of failing alone.
    too_long_hangs: bool = False
    #: Seconds that a step takes at least.
    step_s: float = 0.0

    # Requests.
    #: Requests whose prompt begins with this token fail with RequestError.
    request_error_token: int | None = None
    #: Streams end with finish_reason None (#10824).
    finish_reason_none: bool = False
    #: So many tokens more than max_tokens are generated (#10824).
    tokens_too_many: int = 0
    #: Every stream begins with an item without outputs.
    empty_outputs: bool = False
    #: A prompt of one token without cache salt kills a rank (a comment in dynamo's worker).
    unsalted_canary_crash: bool = False
    #: Aborting a request that wants logprobs ends the engine (#10810).
    cancel_logprobs_crash: bool = False
    #: With host_cache_size, requests get tokens of each other (#8813).
    mixed_up_with_host_cache: bool = False
    #: Logprobs as list[dict[int, Logprob]], or as list[float].
    logprobs_form: Literal["dict", "float"] = "dict"
    #: Whether token_ids holds the end_id that ended the text; versions may differ.
    end_id_in_output: bool = True

    # Statistics (aibrix #2004, #6364).
    #: All fields, some, an empty iteration, or an error.
    stats: Literal["full", "partial", "empty", "absent"] = "full"
    #: dict or JSON text; None: text in 1.2.1, dict in 1.3.
    stats_form: Literal["dict", "str"] | None = None
    #: What an idle read does; None: QueueEmpty in 1.2.1, TimeoutError in 1.3.
    stats_idle: Literal["timeout", "queue_empty", "end"] | None = None

    #: shutdown() never returns (#16312), or ends in SIGABRT (#13076).
    shutdown: Literal["ok", "hang", "sigabrt"] = "ok"


_NAMES = frozenset(field.name for field in dataclasses.fields(Faults))
_FIRST = os.environ.get("TRTLLM_DOUBLE_FAULTS", "{}")
_CONTROL = os.environ.get("TRTLLM_DOUBLE_CONTROL")
_seen: tuple[Any, Faults] | None = None


def current() -> Faults:
    """The faults that are switched on now. Cheap while the control file stays as it is.

    Raises:
        ValueError: an unknown fault.
    """
    global _seen
    stamp: Any = None
    if _CONTROL is not None:
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(_CONTROL)
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
    if _seen is None or _seen[0] != stamp:
        given = json.loads(_FIRST)
        if _CONTROL is not None and stamp is not None:
            with open(_CONTROL, encoding="utf-8") as file:
                given |= json.load(file)
        if unknown := given.keys() - _NAMES:
            raise ValueError(f"no faults of the double: {sorted(unknown)}")
        _seen = (stamp, Faults(**given))
    return _seen[1]
