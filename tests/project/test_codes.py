"""The codes of the contract by their literal values; the documents' table follows the code."""

from __future__ import annotations

import pytest

from heimdex_clip_worker.errors import CALLER_CODES, SourceHttp, error_table, to_reply

CODES = {  # code -> retryable, the public message without a reason
    "INVALID_REQUEST": (False, "Invalid request"),
    "AUTH_FAILED": (False, "Authentication failed"),
    "AUTH_EXPIRED": (False, "Authentication failed"),
    "INVALID_URL": (False, "Image download failed: Invalid URL"),
    "URL_NOT_ALLOWED": (False, "Image download failed: URL not allowed"),
    "DNS_FAILED": (True, "Image download failed: Host name could not be resolved"),
    "CONNECT_FAILED": (True, "Image download failed: Connection failed"),
    "TLS_ERROR": (False, "Image download failed: TLS handshake failed"),
    "FETCH_TIMEOUT": (True, "Image download failed: Timeout"),
    "FETCH_FAILED": (True, "Image download failed: Transfer failed"),
    "TOO_MANY_REDIRECTS": (False, "Image download failed: Too many redirects"),
    "BAD_RESPONSE": (False, "Image download failed: Malformed response"),
    "IMAGE_TOO_LARGE": (False, "Image download failed: Image too large"),
    "HEADERS_TOO_LARGE": (False, "Image download failed: Response header too large"),
    "UNSUPPORTED_ENCODING": (False, "Image download failed: Unsupported content encoding"),
    "UNSUPPORTED_FORMAT": (False, "Image download failed: Unsupported image format"),
    "IMAGE_LIMITS": (False, "Image download failed: Image exceeds limits"),
    "DECODE_FAILED": (False, "Image download failed: Image could not be decoded"),
    "INFERENCE_FAILED": (True, "Inference failed"),
    "INTERNAL": (True, "Internal error"),
}
RETRYABLE = {  # of the client's own codes
    "OFF": False, "CLOSED": False, "WORKER_EXTRA_MISSING": False, "API_KEY_REFUSED": False,
    "ENDPOINT_NOT_FOUND": False, "SPACE_CHANGED": False, "WRONG_MODEL": False,
    "UNREACHABLE": True, "RATE_LIMITED": True, "PLATFORM_ERROR": True, "PLATFORM_ANSWER": True,
    "REQUEST_REFUSED": False, "TIMEOUT": True, "JOB_TIMED_OUT": True, "JOB_EXPIRED": True,
    "JOB_CANCELLED": True, "JOB_FAILED": True, "NO_OUTPUT": True, "BAD_ANSWER": False,
    "MINT_FAILED": True, "ABANDONED": True,
}  # fmt: skip


@pytest.mark.parametrize("code", CODES)
def test_a_code_has_this_message_and_this_promise(code: str) -> None:
    retryable, message = CODES[code]
    expected = {"error": message, "code": code, "retryable": retryable, "request_id": "r"}
    assert to_reply(error_table()[code](), "r") == expected


@pytest.mark.parametrize(
    ("status", "retryable"),
    [(s, True) for s in (408, 425, 429, 500, 599)] + [(s, False) for s in (400, 404, 499, 600)],
)
def test_a_status_of_an_image_server_is_worth_a_retry_or_not(status: int, retryable: bool) -> None:
    reply = to_reply(SourceHttp(status), "r")
    assert (reply["code"], reply["retryable"]) == ("SOURCE_HTTP", retryable)
    assert reply["error"] == f"Image download failed: HTTP {status}"


def test_the_clients_codes_promise_this() -> None:
    assert {code: CALLER_CODES[code][0] for code in RETRYABLE} == RETRYABLE


def test_no_other_code_is_missing_here() -> None:
    assert set(error_table()) == {*CODES, "SOURCE_HTTP"}
    assert set(CALLER_CODES) == set(RETRYABLE)
