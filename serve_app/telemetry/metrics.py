"""Prometheus metrics: one table of names, frozen by a test, joined over all ingresses.

Histograms follow OpenTelemetry's GenAI server metrics, with Prometheus' underscores for dots. Their
bounds go beyond the advised ones, which end before a long prompt has been prefilled. Each ingress
counts its own requests (request.py), but a scrape reaches only one of them and must report all:
`render` joins the snapshots of all ingresses under an `ingress` label and adds the gauges of every
engine replica and of the owner of admission. openai/operations.py serves the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from serve_app.engines.protocol import LoadingReplica, ReplicaStatus

_DURATION = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75)
_LONG = (160.0, 320.0, 640.0, 1280.0)

_BY_MODEL = ("gen_ai_operation_name", "gen_ai_request_model")

#: name -> (kind, labels, histogram bounds or None, help)
REQUEST_METRICS: dict[str, tuple[str, tuple[str, ...], tuple[float, ...] | None, str]] = {
    "gen_ai_server_request_duration_seconds": (
        "histogram",
        (*_BY_MODEL, "error_type"),
        (*_DURATION, *_LONG),
        "Time from the request's arrival to its last byte.",
    ),
    "gen_ai_server_time_to_first_token_seconds": (
        "histogram",
        (*_BY_MODEL, "pool"),
        (*_TTFT, 20.0, 40.0, 80.0, *_LONG),
        "Time from the request's arrival to its first token, at the ingress.",
    ),
    "gen_ai_server_time_per_output_token_seconds": (
        "histogram",
        (*_BY_MODEL, "pool"),
        (*_PER_TOKEN, 1.0, 2.5, 5.0, 10.0),
        "Mean time between the tokens of one choice after its first, in the engine.",
    ),
    "intserve_requests_total": (
        "counter",
        ("gen_ai_operation_name", "outcome"),
        None,
        "Requests by outcome: ok, an error code, or disconnected.",
    ),
    "intserve_admission_queue_seconds": (
        "histogram",
        ("pool",),
        (*_TTFT, 20.0, 40.0, 80.0, *_LONG),
        "Time that a sequence waited for its first place in an engine.",
    ),
    "intserve_resumes_total": (
        "counter",
        ("outcome",),
        None,
        "Sequences that lost their replica: resumed, no_replica, exhausted, late, excluded.",
    ),
    "intserve_access_log_dropped_total": (
        "counter",
        (),
        None,
        "Lines that the access log has lost: a full disk, or a writer that does not keep up.",
    ),
    "intserve_unread_bytes": ("gauge", (), None, "Answers that wait for their clients, in bytes."),
    "intserve_refused_keys_total": (
        "counter",
        ("reason",),
        None,
        "Requests refused for their API key: missing, wrong, or limited after too many wrong ones.",
    ),
    "intserve_key_reload_failed": (
        "gauge",
        (),
        None,
        "1 while the file of API keys cannot be used and the keys of before stay in force.",
    ),
    "intserve_tokens_total": ("counter", ("kind",), None, "Tokens: input, cached_input, output."),
    "intserve_requests_in_flight": ("gauge", (), None, "Requests between arrival and last byte."),
    "intserve_admission_exchanges_total": (
        "counter",
        (),
        None,
        "Exchanges with the owner of admission.",
    ),
    "intserve_admission_messages_total": (
        "counter",
        (),
        None,
        "Messages to the owner of admission; several go in one exchange.",
    ),
    "intserve_admission_joins_total": (
        "counter",
        (),
        None,
        "Times that the ingress told an owner all that it holds: once at its start, and whenever "
        "the owner had died or an answer was lost.",
    ),
    "intserve_admission_hung_owners_total": (
        "counter",
        (),
        None,
        "Owners of admission that this ingress has ended because they answered nobody.",
    ),
}

_OF_REPLICA = ("replica", "pool")

#: name -> (labels, help); of every engine replica, read when a scrape asks. Of its counters, which
#: end in `_total`, those of a replica that is replaced begin anew.
ENGINE_METRICS: dict[str, tuple[tuple[str, ...], str]] = {
    "intserve_engine_requests_running": (_OF_REPLICA, "Requests in the engine's batch."),
    "intserve_engine_requests_waiting": (_OF_REPLICA, "Requests waiting inside the engine."),
    "intserve_engine_kv_tokens_used": (_OF_REPLICA, "Tokens whose KV is held."),
    "intserve_engine_kv_tokens_capacity": (_OF_REPLICA, "Tokens whose KV could be held."),
    "intserve_engine_kv_bytes_per_token": (_OF_REPLICA, "Bytes of one token's KV, all layers."),
    "intserve_engine_kv_tokens_cached": (
        _OF_REPLICA,
        "Tokens whose KV no request uses, kept for prompts that begin alike; they count as free.",
    ),
    "intserve_engine_prompt_tokens_total": (
        (*_OF_REPLICA, "source"),
        "Prompt tokens of the requests that have started: computed, or found in the prefix cache.",
    ),
    "intserve_engine_info": (
        (*_OF_REPLICA, "engine", "recipe", "artifact_digest", "kv_cache", "gated", "emulated"),
        "What is served, always 1; gated is false when the accuracy gate was overridden, emulated "
        "true when it judged an emulation of the engine's target.",
    ),
}

OF_LOADING = (*_OF_REPLICA, "phase")
#: name -> help; of every engine replica that does not serve yet, with these labels. What is not
#: known is not shown.
LOADING_METRICS: dict[str, str] = {
    "intserve_loading_seconds": "Seconds since the replica began to load.",
    "intserve_loading_done_bytes": "Bytes of this phase that are done.",
    "intserve_loading_expected_bytes": "Bytes of this phase in all.",
    "intserve_loading_eta_seconds": "Seconds that are left of this phase.",
}

#: name -> (labels, help); of the owner of admission, read when a scrape asks. One label value per
#: band or replica: keys are as many as a user makes.
ADMISSION_METRICS: dict[str, tuple[tuple[str, ...], str]] = {
    "intserve_admission_queued_sequences": (
        ("priority",),
        "Sequences that wait for a place, by the priority band of their keys.",
    ),
    "intserve_admission_queued_kv_tokens": (
        ("priority",),
        "KV tokens that those ask for.",
    ),
    "intserve_admission_oldest_wait_seconds": ((), "Time that the longest waiting one has waited."),
    "intserve_admission_drain_tokens_per_second": (
        (),
        "KV tokens that become free per second, as measured while requests wait.",
    ),
    "intserve_breaker_open": (
        ("replica",),
        "Whether an engine replica is avoided because it fails: 1, 0.5 while it is tried again.",
    ),
}


#: name after `intserve_pool_` -> help; of the owner of admission, too, by pool.
POOL_METRICS: dict[str, str] = {
    "replicas_ready": "Engine replicas that may get requests.",
    "waiting_sequences": "Sequences that wait for a place and belong to this pool.",
    "waiting_kv_tokens": "KV tokens that those ask for.",
    "oldest_wait_seconds": "Time that the longest waiting one has waited.",
    "running_sequences": "Sequences that have a place in it.",
    "kv_share": "Part of its KV that is taken.",
    "places_share": "Part of its places that is taken.",
    "ttft_p90_seconds": "Time to the first token of nine of ten requests of the last 45 seconds.",
    "itl_p90_seconds": "Time between tokens of nine of ten requests of the last 45 seconds.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionGauges:
    """What the owner of admission says of itself. `sequences` and `kv_tokens` wait, by priority;
    `breakers` are 0, 0.5 or 1 by replica; `drain_tokens_per_s` is None until it was measured.
    `pools` has the values of POOL_METRICS by pool; None is not shown."""

    sequences: Mapping[int, int]
    kv_tokens: Mapping[int, int]
    oldest_wait_s: float
    drain_tokens_per_s: float | None
    breakers: Mapping[str, float]
    pools: Mapping[str, Mapping[str, float | None]]


class RequestMetrics:
    """The metrics of one ingress process."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._metrics: dict[str, Counter | Gauge | Histogram] = {}
        for name, (kind, labels, bounds, text) in REQUEST_METRICS.items():
            if kind == "histogram":
                assert bounds is not None
                self._metrics[name] = Histogram(
                    name, text, labels, registry=self.registry, buckets=bounds
                )
            else:
                metric_class = Counter if kind == "counter" else Gauge
                self._metrics[name] = metric_class(name, text, labels, registry=self.registry)

    def observe(self, name: str, seconds: float, *labels: str) -> None:
        metric = self._metrics[name]
        assert isinstance(metric, Histogram)
        (metric.labels(*labels) if labels else metric).observe(seconds)

    def count(self, name: str, amount: float, *labels: str) -> None:
        metric = self._metrics[name]
        assert isinstance(metric, Counter)
        (metric.labels(*labels) if labels else metric).inc(amount)

    def set(self, name: str, value: float) -> None:
        metric = self._metrics[name]
        assert isinstance(metric, Gauge)
        metric.set(value)

    def in_flight(self, change: int) -> None:
        metric = self._metrics["intserve_requests_in_flight"]
        assert isinstance(metric, Gauge)
        metric.inc(change)

    def measure(self, name: str, read: Callable[[], float]) -> None:
        """Read the gauge `name` from here on each time that it is asked for."""
        metric = self._metrics[name]
        assert isinstance(metric, Gauge)
        metric.set_function(read)

    def snapshot(self) -> str:
        """This process's metrics as Prometheus text."""
        return generate_latest(self.registry).decode()


class _JoinedCollector(Collector):
    """The samples of all ingresses, labeled, and the gauges of all engine replicas."""

    def __init__(
        self,
        snapshots: Mapping[str, str],
        replicas: Iterable[ReplicaStatus],
        admission: AdmissionGauges | None,
        loading: Iterable[LoadingReplica],
    ) -> None:
        self._snapshots = snapshots
        self._replicas = replicas
        self._admission = admission
        self._loading = loading

    def collect(self) -> Iterator[Metric]:
        joined: dict[str, Metric] = {}
        for ingress, text in self._snapshots.items():
            for family in text_string_to_metric_families(text):
                target = joined.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    labels = {**sample.labels, "ingress": ingress}
                    target.add_sample(sample.name, labels, sample.value)
        yield from joined.values()
        yield from _engine_families(self._replicas)
        yield from _loading_families(self._loading)
        if self._admission is not None:
            yield from _admission_families(self._admission)


def _engine_families(replicas: Iterable[ReplicaStatus]) -> Iterator[Metric]:
    families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {
        name: (CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily)(
            name, text, labels=labels
        )
        for name, (labels, text) in ENGINE_METRICS.items()
    }
    for status in replicas:
        load, info = status.load, status.info
        values: dict[str, float | None] = {
            "requests_running": load.running,
            "requests_waiting": load.waiting,
            "kv_tokens_used": load.kv_tokens_used,
            "kv_tokens_capacity": load.kv_tokens_total,
            "kv_tokens_cached": load.kv_tokens_cached,
            "kv_bytes_per_token": info.kv_bytes_per_token,
        }
        labels = [status.replica_id, status.pool]
        for name, value in values.items():
            if value is not None:
                families[f"intserve_engine_{name}"].add_metric(labels, value)
        prompt_tokens = families["intserve_engine_prompt_tokens_total"]
        prompt_tokens.add_metric([*labels, "computed"], load.computed_prompt_tokens)
        prompt_tokens.add_metric([*labels, "cache"], load.cached_prompt_tokens)
        families["intserve_engine_info"].add_metric(
            [
                *labels,
                info.engine,
                info.recipe,
                info.artifact_digest,
                info.kv_cache or "none",
                str(status.gated).lower(),
                str(status.emulated).lower(),
            ],
            1,
        )
    yield from families.values()


def _loading_families(reports: Iterable[LoadingReplica]) -> Iterator[Metric]:
    families = {
        name: GaugeMetricFamily(name, text, labels=OF_LOADING)
        for name, text in LOADING_METRICS.items()
    }
    for report in reports:
        progress, known = report.progress, report.progress.total_bytes > 0
        values: dict[str, float | None] = {
            "seconds": report.elapsed_s,
            "done_bytes": progress.done_bytes if known else None,
            "expected_bytes": progress.total_bytes if known else None,
            "eta_seconds": report.eta_s,
        }
        for name, value in values.items():
            if value is not None:
                labels = [report.replica_id, report.pool, progress.phase]
                families[f"intserve_loading_{name}"].add_metric(labels, value)
    yield from families.values()


def _admission_families(gauges: AdmissionGauges) -> Iterator[Metric]:
    values: dict[str, Mapping[Any, float] | float | None] = {
        "intserve_admission_queued_sequences": gauges.sequences,
        "intserve_admission_queued_kv_tokens": gauges.kv_tokens,
        "intserve_admission_oldest_wait_seconds": gauges.oldest_wait_s,
        "intserve_admission_drain_tokens_per_second": gauges.drain_tokens_per_s,
        "intserve_breaker_open": gauges.breakers,
    }
    for name, (labels, text) in ADMISSION_METRICS.items():
        family, value = GaugeMetricFamily(name, text, labels=labels), values[name]
        if isinstance(value, Mapping):
            for label, number in value.items():
                family.add_metric([str(label)], number)
        elif value is not None:
            family.add_metric([], value)
        yield family
    for name, text in POOL_METRICS.items():
        family = GaugeMetricFamily(f"intserve_pool_{name}", text, labels=("pool",))
        for pool, of_pool in gauges.pools.items():
            if (figure := of_pool[name]) is not None:
                family.add_metric([pool], figure)
        yield family


def render(
    snapshots: Mapping[str, str],
    replicas: Iterable[ReplicaStatus],
    admission: AdmissionGauges | None = None,
    loading: Iterable[LoadingReplica] = (),
) -> bytes:
    """The Prometheus text of all ingresses (id -> snapshot), of all engine replicas, those that
    load apart, and of the owner of admission, None where there is none or it does not answer."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_JoinedCollector(snapshots, list(replicas), admission, list(loading)))
    return generate_latest(registry)
