"""The header by which a client says how long it wants to wait: X-Request-Deadline."""

from __future__ import annotations

import pytest
from starlette.datastructures import Headers
from support.configs import make_config
from support.serving import LocalEngines, client_of, make_service

from serve_app.config import EchoOptions
from serve_app.engines.echo import EchoEngine
from serve_app.errors import InvalidRequest
from serve_app.openai.own_deadline import own_deadline_s
from serve_app.openai.service import Service
from serve_app.openai.tokenizer import ByteTokenizer
from serve_app.routing.admission_client import OpenAdmission
from serve_app.routing.tickets import Enter
from serve_app.telemetry.tracing import Telemetry

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
NAME = "X-Request-Deadline"


@pytest.mark.parametrize(("text", "seconds"), [("1", 1.0), (" 0.25\t", 0.25), ("007.50", 7.5)])
def test_a_deadline_is_a_decimal_number_of_seconds(text: str, seconds: float) -> None:
    assert own_deadline_s(Headers({NAME: text})) == seconds
    assert own_deadline_s(Headers({})) is None


@pytest.mark.parametrize(
    "text",
    ["", "0", "0.0", "-1", "+1", "1e3", "inf", "nan", "1,5", "0x10", "1s", ".5", "5.", "٣", "1 2"]
    + ["9" * 400, "0." + "0" * 400 + "1"],
)
async def test_a_wrong_deadline_is_a_400_that_names_the_header(text: str) -> None:
    headers = [(b"x-request-deadline", text.encode())]
    async with client_of(make_service()) as client:
        answer = await client.post(TEXT, json={"model": "echo", "prompt": "x"}, headers=headers)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (NAME, "invalid_value")
    assert error["message"] == (
        "the header X-Request-Deadline is no single positive number of seconds, such as 12.5; "
        "correct or remove it"
    )


def test_several_deadlines_are_refused() -> None:
    raw = [(NAME.lower().encode(), b"1"), (NAME.lower().encode(), b"2")]
    with pytest.raises(InvalidRequest):
        own_deadline_s(Headers(raw=raw))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", [TEXT, CHAT])
async def test_an_answer_that_is_not_there_in_time_is_a_504(path: str, stream: bool) -> None:
    service = make_service(echo=EchoOptions(ttft_s=600.0))
    prompt = {"prompt": "x"} if path == TEXT else {"messages": [{"role": "user", "content": "x"}]}
    body = {"model": "echo", "stream": stream, **prompt}
    async with client_of(service) as client:
        answer = await client.post(path, json=body, headers={NAME: "0.05"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")


class Noted(OpenAdmission):
    def __init__(self) -> None:
        self.visits: list[Enter] = []

    async def enter(self, visit: Enter) -> None:
        self.visits.append(visit)


@pytest.mark.parametrize(
    ("headers", "own", "at_most"),
    [({}, False, 60.0), ({NAME: "5"}, True, 5.0), ({NAME: "3600"}, True, 60.0)],
)
async def test_the_owner_of_admission_learns_whose_deadline_it_is(
    headers: dict[str, str], own: bool, at_most: float
) -> None:
    """One beyond the service's own limit is cut to that."""
    admission = Noted()
    config = make_config(echo=EchoOptions(), timeout_s=60.0)
    service = Service(
        config,
        ByteTokenizer(),
        LocalEngines(EchoEngine(EchoOptions())),
        Telemetry(None),
        admission=admission,
    )
    async with client_of(service) as client:
        body = {"model": "echo", "prompt": "x"}
        assert (await client.post(TEXT, json=body, headers=headers)).status_code == 200
    (visit,) = admission.visits
    assert visit.own_deadline is own
    assert at_most - 5.0 < visit.seconds_left <= at_most


async def test_a_web_page_may_send_the_header_and_read_when_to_come_back() -> None:
    service = make_service(allowed_origins=("https://chat.example",))
    headers = {
        "origin": "https://chat.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-request-deadline",
    }
    async with client_of(service) as client:
        asked = await client.options(TEXT, headers=headers)
        body = {"model": "echo", "prompt": "x"}
        told = await client.post(TEXT, json=body, headers={"origin": "https://chat.example"})
    assert "x-request-deadline" in asked.headers["access-control-allow-headers"]
    assert "Retry-After" in told.headers["access-control-expose-headers"]
