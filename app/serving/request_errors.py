"""What is said of requests that cannot be answered, in OpenAI's shape."""

from __future__ import annotations

import json
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.responses import Response

from app.serving.job import Failed
from gill_errors import InputError
from pipeline.talking.answers import ContextLengthError

CLIENT_LEFT = 499
"""Nobody reads it; it is for the metrics (nginx's number)."""


class RequestError(InputError):
    """A request that cannot be served as it is: the status, the reason, the field at fault, and a
    word for programs."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.param, self.status, self.code, self.headers = param, status, code, headers or {}
        super().__init__(message)


class Error(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is none."""

    error: Error


class Json(Response):
    """JSON in ASCII: no text of a client, however broken, cannot be sent back."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body as ASCII bytes, escapes for all else."""
        return json.dumps(content).encode()


def error_body(error: RequestError) -> dict[str, Any]:
    """`ErrorBody` as plain data."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    usual = "invalid_request_error" if error.status < 500 else "server_error"
    kind = kinds.get(error.status, usual)
    about = Error(message=str(error), type=kind, param=error.param, code=error.code)
    return ErrorBody(error=about).model_dump()


def error_response(error: RequestError) -> Response:
    """The error as a response."""
    return Json(error_body(error), status_code=error.status, headers=error.headers)


def busy(retry_after: int) -> RequestError:
    """There is no place for the request now."""
    return RequestError(
        f"too many requests: try again in {retry_after} s",
        status=429,
        code="rate_limit_exceeded",
        headers={"Retry-After": str(retry_after)},
    )


def refuse_broken(text: str, param: str) -> None:
    """Raise RequestError for half a surrogate pair: JSON can spell it, no tokenizer can read it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text is not Unicode: {error.reason}", param=param, code="invalid_value"
        ) from None


def failure(failed: Failed) -> RequestError:
    """An answer that came to nothing."""
    match failed.stop:
        case "refused":
            too_long = isinstance(failed.error, ContextLengthError)
            code = "context_length_exceeded" if too_long else None
            return RequestError(failed.reason, param="messages" if too_long else None, code=code)
        case "left":
            return RequestError(failed.reason, status=CLIENT_LEFT)
        case "late":
            return RequestError(failed.reason, status=504, code="timeout")
        case "broken":
            return RequestError(failed.reason, status=500)


def invalid(error: RequestValidationError) -> RequestError:
    """What is wrong with a body that is not what its model says."""
    # Of the alternatives of a field the one that got far.
    first = max(error.errors(), key=lambda one: len(one["loc"]))
    if first["type"] == "json_invalid":
        return RequestError(f"the body is not JSON: {first['ctx']['error']}", code="invalid_json")
    place = ".".join(str(step) for step in first["loc"][1:]) or "the body"
    codes = {
        "missing": "missing_required_parameter",
        "literal_error": "unsupported_value",
        "none_required": "unsupported_value",
        "union_tag_invalid": "unsupported_value",
        "extra_forbidden": "unknown_parameter",
    }
    code = codes.get(first["type"], "invalid_value")
    return RequestError(f"{place}: {first['msg']}", param=place, code=code)
