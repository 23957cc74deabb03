"""Which OpenTelemetry settings go to replicas, and the file that holds the secret ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepseek.errors import ConfigError
from serve_app.telemetry.tracing import Telemetry
from serve_app.telemetry.travel import HEADERS_FILE, read_headers, traveling_variables

SECRET = "s3cr3t-v4lue"
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


def headers_file(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "headers"
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    "secret",
    [
        {"OTEL_EXPORTER_OTLP_HEADERS": f"authorization=Bearer%20{SECRET}"},
        {"OTEL_EXPORTER_OTLP_TRACES_HEADERS": f"x-key={SECRET}"},
        {ENDPOINT: f"https://user:{SECRET}@collector.example.com"},
        {ENDPOINT: f"https://{SECRET}@collector.example.com"},
        {ENDPOINT: f"https://collector.example.com/?api-key={SECRET}"},
        {ENDPOINT: f"http://[{SECRET}"},
        {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"https://u:{SECRET}@collector.example.com"},
        {"OTEL_EXPORTER_OTLP_CLIENT_KEY": f"/keys/{SECRET}.pem"},
        {"OTEL_PYTHON_SOMETHING_NEW": SECRET},
    ],
)
def test_what_may_hold_a_secret_stays_behind_and_is_named_without_its_value(
    secret: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    travel = traveling_variables(environ={"OTEL_SERVICE_NAME": "x", **secret})
    assert travel == {"OTEL_SERVICE_NAME": "x"}
    (record,) = caplog.records
    assert next(iter(secret)) in record.getMessage()
    assert "otlp_headers_file" in record.getMessage()
    assert SECRET not in record.getMessage()


def test_workers_that_inherit_the_environment_are_no_reason_to_warn(
    caplog: pytest.LogCaptureFixture,
) -> None:
    environ = {"OTEL_EXPORTER_OTLP_HEADERS": f"x={SECRET}", "OTEL_SERVICE_NAME": ""}
    assert traveling_variables(inherited=True, environ=environ) == {}
    assert caplog.records == []


def test_harmless_settings_and_the_path_of_the_headers_travel(tmp_path: Path) -> None:
    harmless = {
        ENDPOINT: "http://collector.example.com:4318",
        "OTEL_TRACES_SAMPLER": "traceidratio",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    given = harmless | {HEADERS_FILE: "/etc/other", "PATH": "/bin"}
    assert traveling_variables(environ=given) == harmless | {HEADERS_FILE: "/etc/other"}
    travel = traveling_variables(tmp_path / "headers", environ=given)
    assert travel[HEADERS_FILE] == str(tmp_path / "headers"), "the setting wins"


def test_the_file_has_one_header_a_line(tmp_path: Path) -> None:
    text = f"# the collector's key\n\nAuthorization = Bearer {SECRET}==\nx-tenant=a,b\n"
    environ = {HEADERS_FILE: str(headers_file(tmp_path, text))}
    assert read_headers(environ) == {"authorization": f"Bearer {SECRET}==", "x-tenant": "a,b"}
    assert read_headers({}) is None


@pytest.mark.parametrize(
    ("text", "mode", "told"),
    [
        (f"x={SECRET}", 0o644, "everybody can read the headers of OTLP in {path}; chmod 600"),
        (f"fine=1\n{SECRET}", 0o600, "line 2 of {path} is no name=value"),
        (f"na me={SECRET}", 0o600, "line 1 of {path} is no name=value"),
        (f"x={SECRET}\x07", 0o600, "line 1 of {path} is no name=value"),
        (f"x={SECRET}é", 0o600, "line 1 of {path} is no name=value"),
        (None, 0o600, "{path} "),
    ],
)
def test_an_unusable_file_is_one_sentence_that_tells_nothing_of_it(
    text: str | None, mode: int, told: str, tmp_path: Path
) -> None:
    path = tmp_path / "headers" if text is None else headers_file(tmp_path, text, mode)
    environ = {HEADERS_FILE: str(path), ENDPOINT: "http://127.0.0.1:9"}
    with pytest.raises(ConfigError) as caught:
        Telemetry.from_environment(environ)
    assert told.format(path=path) in str(caught.value)
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_group_may_read_the_file_as_it_may_a_mounted_secret(tmp_path: Path) -> None:
    path = headers_file(tmp_path, f"x={SECRET}\n", 0o440)
    assert read_headers({HEADERS_FILE: str(path)}) == {"x": SECRET}
