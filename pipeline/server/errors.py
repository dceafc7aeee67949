"""Names why a request is refused: the status code, and the words of each of the protocols."""

from __future__ import annotations

from typing import Any, NamedTuple

from bertile.base.errors import BertileError, InputError, UsageError


class Kind(NamedTuple):
    """A reason: its status, Text Embeddings Inference's word, OpenAI's type and code, the label of
    its metrics, and the status where OpenAI's is another.
    """

    status: int
    word: str
    openai_type: str
    openai_code: str | None
    label: str
    openai_status: int | None = None


EMPTY = Kind(400, "Empty", "invalid_request_error", None, "validation")
MALFORMED = Kind(400, "Validation", "invalid_request_error", None, "validation")
UNAUTHORIZED = Kind(401, "Unauthorized", "invalid_request_error", "invalid_api_key", "unauthorized")
FORBIDDEN = Kind(403, "Forbidden", "invalid_request_error", "forbidden", "unauthorized")
UNKNOWN_ROUTE = Kind(404, "NotFound", "invalid_request_error", None, "not_found")
UNKNOWN_MODEL = Kind(404, "NotFound", "invalid_request_error", "model_not_found", "not_found")
WRONG_METHOD = Kind(405, "MethodNotAllowed", "invalid_request_error", None, "not_found")
TOO_SLOW = Kind(408, "Timeout", "timeout", None, "timeout")
TOO_LARGE = Kind(413, "Validation", "invalid_request_error", None, "batch_size")
TOO_MANY = Kind(413, "Validation", "invalid_request_error", None, "batch_size", 400)
WRONG_FORM = Kind(415, "Validation", "invalid_request_error", None, "validation")
INVALID = Kind(422, "Validation", "invalid_request_error", None, "validation", 400)
TOKENIZER = Kind(422, "Tokenizer", "invalid_request_error", None, "tokenization", 400)
WRONG_MODEL = Kind(424, "Backend", "invalid_request_error", None, "model_type", 400)
BACKEND = Kind(424, "Backend", "server_error", None, "inference")
OVERLOADED = Kind(429, "Overloaded", "requests", "rate_limit_exceeded", "overloaded")
CLIENT_GONE = Kind(499, "Cancelled", "cancelled", None, "dropped")
FAILED = Kind(500, "Backend", "server_error", None, "unexpected")
UNHEALTHY = Kind(503, "Unhealthy", "server_error", None, "unhealthy")
EXPIRED = Kind(504, "Timeout", "timeout", "deadline_exceeded", "dropped")


class Refusal(Exception):
    """A request that is not answered: why, in words, and after how many seconds to come again.

    `param` is the field that is wrong, where it is a single one.
    """

    def __init__(
        self, kind: Kind, message: str, *, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.kind, self.message, self.param, self.retry_after = kind, message, param, retry_after


def of_preparing(error: Exception) -> Refusal:
    """Why texts did not become tokens."""
    if isinstance(error, (InputError, UsageError)):
        return Refusal(INVALID, f"Input validation error: {error}")
    return Refusal(TOKENIZER, f"tokenizer error {_words(error)}")


def of_running(error: Exception) -> Refusal:
    """Why the model gave no answer."""
    return Refusal(BACKEND, f"Backend error: {_words(error)}")


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, BertileError) else f"{type(error).__name__}: {error}"


def of_tei(refusal: Refusal) -> dict[str, Any]:
    """The body of an error as Text Embeddings Inference has it."""
    return {"error": refusal.message, "error_type": refusal.kind.word}


def of_openai(refusal: Refusal) -> dict[str, Any]:
    """The body of an error as OpenAI has it."""
    kind = refusal.kind
    return {
        "error": {
            "message": refusal.message,
            "type": kind.openai_type,
            "param": refusal.param,
            "code": kind.openai_code,
        }
    }


def of_cohere(refusal: Refusal) -> dict[str, Any]:
    """The body of an error as Cohere has it."""
    return {"message": refusal.message}


def of_kserve(refusal: Refusal) -> dict[str, Any]:
    """The body of an error as KServe's second protocol has it."""
    return {"error": refusal.message}
