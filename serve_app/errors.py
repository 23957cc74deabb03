"""Every failure that a client can see, and the one table that turns it into HTTP.

    ApiError                500 server_error          a bug of ours; the message tells no internals
      InvalidRequest        400 invalid_request_error a field, the JSON, or a length is wrong
      Unauthorized          401 authentication_error
      OriginNotAllowed      403 permission_error      a web page of an origin that is not configured
      ModelNotAllowed       403 permission_error      the key may not use this model
      ModelNotFound         404 not_found_error
      BodyTimeout           408 timeout_error         the body did not arrive in time
      ClientTooSlow         408 timeout_error         the answer was not read; seen only in the log
      BodyTooLarge          413 invalid_request_error
      UnsupportedMediaType  415 invalid_request_error the body is no plain application/json
      Overloaded            429 rate_limit_error      Retry-After says when to come back; the code
                                                      why: queue_full, waited_too_long, rate_limited
                                                      (per minute), too_many_requests (at a time)
        TooManyFailedKeys   429 rate_limit_error      too many wrong keys from this address
      EngineUnavailable     503 server_error          no replica can answer now; Retry-After too
        ReplicaLost         503 server_error          its replica has gone; another may go on
        Draining            503 server_error          the service is stopping; go elsewhere
        TooManyConnections  503 server_error          too many bodies are arriving at once
      DeadlineExceeded      504 timeout_error         the request's own deadline passed

An engine refuses a request for good with the ground floor's `RequestError`; a client sees it as
InvalidRequest. Errors cross the actor hop, so each must survive pickling with its attributes.
"""

from __future__ import annotations

from typing import Any

from deepseek.errors import IntServeError, RequestError

#: Headers of a refusal while the body still arrives: its rest is not waited for.
CLOSE = {"Connection": "close"}


class ApiError(IntServeError):
    """Base; `param` names the field at fault, `code` is for programs, `retry_after_s` a header."""

    status = 500
    type = "server_error"
    code: str | None = "internal_error"
    param: str | None = None
    retry_after_s: int | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        if param is not None:
            self.param = param
        if code is not None:
            self.code = code
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The JSON object that OpenAI's clients expect, for a response or an in-band event."""
        error = {
            "message": str(self),
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(self.retry_after_s)} if self.retry_after_s is not None else {}


class InvalidRequest(ApiError):
    status, type, code = 400, "invalid_request_error", "invalid_value"


class Unauthorized(ApiError):
    status, type, code = 401, "authentication_error", "invalid_api_key"

    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class OriginNotAllowed(ApiError):
    status, type, code = 403, "permission_error", "origin_not_allowed"


class ModelNotAllowed(ApiError):
    status, type, code, param = 403, "permission_error", "model_not_allowed", "model"


class ModelNotFound(ApiError):
    status, type, code, param = 404, "not_found_error", "model_not_found", "model"


class BodyTimeout(ApiError):
    status, type, code = 408, "timeout_error", "body_timeout"

    def headers(self) -> dict[str, str]:
        return CLOSE


class ClientTooSlow(ApiError):
    """Its answer has begun, so that this is its outcome and never its status."""

    status, type, code = 408, "timeout_error", "client_too_slow"


class BodyTooLarge(ApiError):
    status, type, code = 413, "invalid_request_error", "body_too_large"


class UnsupportedMediaType(ApiError):
    status, type, code = 415, "invalid_request_error", "unsupported_media_type"


class Overloaded(ApiError):
    status, type, code, retry_after_s = 429, "rate_limit_error", "overloaded", 1


class TooManyFailedKeys(Overloaded):
    code, retry_after_s = "too_many_failed_keys", 60


class EngineUnavailable(ApiError):
    status, type, code, retry_after_s = 503, "server_error", "engine_unavailable", 5


class ReplicaLost(EngineUnavailable):
    """A request has lost its replica. `blame` says that the replica failed, and did not merely
    stop."""

    def __init__(self, message: str, *, blame: bool = True, **fields: Any) -> None:
        super().__init__(message, **fields)
        self.blame = blame


class Draining(EngineUnavailable):
    code = "draining"

    def headers(self) -> dict[str, str]:
        """A connection that closes is opened again elsewhere."""
        return super().headers() | CLOSE


class TooManyConnections(EngineUnavailable):
    code = "too_many_connections"

    def headers(self) -> dict[str, str]:
        return super().headers() | CLOSE


class DeadlineExceeded(ApiError):
    status, type, code = 504, "timeout_error", "deadline_exceeded"


#: Status -> (type, code) when the framework itself refuses: no such path, wrong method.
HTTP_REASONS: dict[int, tuple[str, str]] = {
    404: ("not_found_error", "unknown_path"),
    405: ("invalid_request_error", "method_not_allowed"),
}


#: Every `code` of an error: what metrics and spans may say. tests/serve_app/test_errors.py keeps it
#: complete.
CODES = frozenset(
    {
        *("body_timeout", "body_too_large", "client_too_slow", "context_length_exceeded"),
        *("deadline_exceeded", "queue_full", "rate_limited", "too_many_requests"),
        *("waited_too_long",),
        *("draining", "engine_failed", "engine_unavailable", "internal_error", "invalid_api_key"),
        *("invalid_json", "invalid_value", "method_not_allowed", "missing_field"),
        *(
            "model_not_allowed",
            "model_not_found",
            "origin_not_allowed",
            "overloaded",
            "too_many_connections",
        ),
        *("too_many_failed_keys", "too_many_logprobs"),
        *("unknown_field", "unknown_path", "unsupported_field", "unsupported_media_type"),
    }
)


def code_label(error: ApiError) -> str:
    """The error's code as a label: one of `CODES`, or "other"."""
    return error.code if error.code is not None and error.code in CODES else "other"


def to_api_error(error: BaseException) -> ApiError:
    """The ApiError that a client sees for any exception; an unforeseen one is a bare 500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return InvalidRequest(str(error))
    if isinstance(error, TimeoutError):
        return DeadlineExceeded("the request's deadline passed before it was answered")
    return ApiError("internal error; the server's log has the details")
