"""An `Admission` on a clock of the test's own, and messages in few words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from deepseek.engine.options import EngineLoad
from serve_app.engines.protocol import EngineInfo, ReplicaStatus
from serve_app.routing.admission import Admission
from serve_app.routing.owner_settings import OwnerSettings
from serve_app.routing.tickets import (
    Answer,
    Ask,
    Enter,
    Grant,
    Held,
    Join,
    Leave,
    Message,
    Move,
    Refusal,
    Seen,
    Terms,
)
from serve_app.sections import AdmissionSection, RoutingSection
from serve_app.setting_types import POOL

#: The ingress of a test that needs only one.
INGRESS = "ingress-1"


def status(
    replica_id: str = "r1",
    *,
    kv: int = 1000,
    max_running: int | None = None,
    max_model_len: int | None = None,
    used: int = 0,
    request_ids: tuple[str, ...] = (),
    pool: str = POOL,
) -> ReplicaStatus:
    """A heartbeat of a replica with room for `kv` KV tokens."""
    info = EngineInfo(
        max_model_len=max_model_len or kv,
        kv_tokens_total=kv,
        recipe="none",
        artifact_digest="none",
        engine="echo",
        max_running=max_running,
    )
    load = EngineLoad(running=len(request_ids), waiting=0, kv_tokens_used=used, kv_tokens_total=kv)
    return ReplicaStatus(
        replica_id=replica_id,
        info=info,
        load=load,
        gated=True,
        request_ids=request_ids,
        pool=pool,
    )


def seen(*statuses: ReplicaStatus, age_s: float = 0.0, gone: tuple[str, ...] = ()) -> Seen:
    return Seen(statuses=tuple((item, age_s) for item in statuses), gone=gone)


def ask(
    sequence_id: str,
    tokens: int = 100,
    output: int | None = None,
    *,
    pools: tuple[str, ...] = (POOL,),
    affinity: str = "",
) -> Ask:
    """Of `tokens` KV tokens, half of them prompt unless `output` says otherwise."""
    output = tokens // 2 if output is None else output
    return Ask(
        sequence_id=sequence_id,
        prompt_tokens=tokens - output,
        output_tokens=output,
        charge=tokens,
        pools=pools,
        affinity=affinity,
    )


def enter(
    request_id: str,
    key: str | Terms = "alice",
    *,
    tokens: int = 100,
    n: int = 1,
    seconds_left: float = 600.0,
    own_deadline: bool = False,
    waited_s: float = 0.0,
    pools: tuple[str, ...] = (POOL,),
    affinity: str = "",
) -> Enter:
    """A request whose sequences are `ID-0`, `ID-1`, ..."""
    return Enter(
        request_id=request_id,
        terms=Terms(name=key) if isinstance(key, str) else key,
        asks=tuple(
            ask(f"{request_id}-{i}", tokens, pools=pools, affinity=affinity) for i in range(n)
        ),
        seconds_left=seconds_left,
        own_deadline=own_deadline,
        waited_s=waited_s,
    )


def held(entered: Enter, replica_id: str, index: int = 0) -> Held:
    """What a new owner is told of a sequence that runs."""
    return Held(
        request_id=entered.request_id,
        terms=entered.terms,
        ask=entered.asks[index],
        replica_id=replica_id,
        seconds_left=entered.seconds_left,
    )


def granted(answers: Sequence[Answer]) -> dict[str, str]:
    """Sequence -> replica of the grants."""
    return {a.sequence_id: a.replica_id for a in answers if isinstance(a, Grant)}


def refused(answers: Sequence[Answer]) -> dict[str, str]:
    """Sequence -> code of the refusals."""
    return {s: a.code for a in answers if isinstance(a, Refusal) for s in a.sequence_ids}


class Office:
    """An `Admission`, its clock, and replicas that report each second while time passes."""

    def __init__(
        self,
        *replicas: ReplicaStatus,
        places: int | dict[str, int] = 4,
        ingresses: Sequence[str] = (INGRESS,),
        slack: float = 0.2,
        more: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self.now = 1000.0
        self.places = places if isinstance(places, dict) else {POOL: places}
        self.routing = RoutingSection(affinity_slack=slack)
        self.more = more or {}
        self.settings = AdmissionSection(**settings)
        self.replicas = {item.replica_id: item for item in replicas}
        self.ingresses = list(ingresses)
        self.admission = self.new_owner()
        for ingress in self.ingresses:
            self.admission.take(ingress, [Join()])
        self.report()

    def new_owner(self) -> Admission:
        settings = OwnerSettings(
            admission=self.settings, routing=self.routing, places=self.places, **self.more
        )
        self.admission = Admission(settings, lambda: self.now)
        return self.admission

    def report(self) -> None:
        """Heartbeats of all replicas through the first ingress; the others are heard, too."""
        for index, ingress in enumerate(self.ingresses):
            beats = [seen(*self.replicas.values())] if not index else []
            self._stash(ingress, self.admission.take(ingress, beats))

    def _stash(self, ingress: str, answers: list[Answer]) -> None:
        """Answers that came with a sign of life are not lost: `say` and `later` return them."""
        self.stashed = getattr(self, "stashed", {})
        self.stashed.setdefault(ingress, []).extend(answers)

    def say(self, *messages: Message, ingress: str = INGRESS) -> list[Answer]:
        answers = self.admission.take(ingress, messages)
        return self.later(ingress) + answers

    def later(self, ingress: str = INGRESS) -> list[Answer]:
        """What has been decided since."""
        early = self.stashed.pop(ingress, [])
        return early + self.admission.answers_for(ingress)

    def enter(
        self, request_id: str, *args: Any, ingress: str = INGRESS, **more: Any
    ) -> list[Answer]:
        return self.say(enter(request_id, *args, **more), ingress=ingress)

    def leave(self, *sequence_ids: str, used: int = 0, failed: bool = False) -> list[Answer]:
        return self.say(
            *(Leave(sequence_id=i, used_tokens=used, failed=failed) for i in sequence_ids)
        )

    def move(self, sequence_id: str, lost: str, *, blame: bool = False, left: float = 60.0) -> Any:
        return self.say(Move(sequence_id=sequence_id, lost=lost, blame=blame, seconds_left=left))

    def set(self, replica_id: str, **changes: Any) -> None:
        """Change what a replica reports from now on."""
        self.replicas[replica_id] = replace(self.replicas[replica_id], **changes)

    def wait(self, seconds: float) -> None:
        """Let time pass, with a tick each 0.1 s and heartbeats each second."""
        for step in range(round(seconds * 10)):
            self.now += 0.1
            if step % 10 == 9:
                self.report()
            self.admission.tick()
