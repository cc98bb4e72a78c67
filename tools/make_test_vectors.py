"""Write test_vectors.json: signatures that a signer in any language must agree with.

    python -m tools.make_test_vectors            writes the file at the top of the repository
    python -m tools.make_test_vectors --check    checks whether it is up to date (1: it is not)

Its content never depends on the clock or on chance. The secrets are examples.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from heimdex_clip_worker import auth
from heimdex_clip_worker.errors import AuthFailed

PATH = Path(__file__).parent.parent / "test_vectors.json"
NOW = 1_764_000_000
URL = "https://abc.supabase.co/storage/v1/object/sign/scenes/1.jpg?token=eyJhbGciOi&width=224"
V1_SECRET = "example-secret-of-version-one"
KEYS = {"2026-11": "example-secret-of-november", "2026-08": "пример-ключа-августа-0"}
AUDIENCE = "heimdex-clip"
NONCE = "q3Zx0mB2bq6yq1Y4mYw2Zw8c"
KEYRING = auth.Keyring(V1_SECRET, KEYS, audience=AUDIENCE, window_s=120, max_lifetime_s=3600)

ABOUT = (
    "Signatures of heimdex-clip-worker. The secrets are examples. "
    "canonical: the one form of a value as text, and the SHA-256 of its UTF-8. "
    "not_canonical: JSON texts whose value must be refused. "
    "v1, v2: HMAC-SHA256 of message with secret, both in UTF-8, is auth.sig. "
    "verify: whole jobs, and how a worker set up as in worker answers when its clock shows now."
)

CANONICAL: dict[str, Any] = {
    "empty": {},
    "keys are sorted": {"b": 1, "a": 2, "B": 3, "_": 4, "aa": 5, "1": 6, "10": 7, "2": 8, "": 9},
    "literals and nesting": {"list": [True, False, None, [], {}], "object": {"z": {"y": {"x": 0}}}},
    "integers": [0, -1, 2**53 - 1, -(2**53) + 1],
    "what must be escaped": '"\\\b\t\n\f\r\u0000\u0001\u001f',
    "what must not be escaped": "/<>&'\u007f\u0080\u2028\u2029\ufeff",
    "beyond ASCII": {"text": "é e\u0301 장면 😀 \uffff"},
    "a key that needs escapes": {'"\n': "\\u00e9"},
    "eight levels": [[[[[[[[]]]]]]]],
}

# JSON texts, because some parsers would change the values while reading this file.
NOT_CANONICAL = {
    "a fraction": '{"x":0.5}',
    "a whole number written as a float": '{"x":1.0}',
    "an exponent": '{"x":1e2}',
    "2^53": '{"x":9007199254740992}',
    "-2^53": '{"x":-9007199254740992}',
    "a lone high surrogate": '{"x":"\\ud800"}',
    "a lone low surrogate": '{"x":"\\udc00a"}',
    "surrogates in the wrong order": '{"x":"\\udc00\\ud800"}',
    "a key that is not ASCII": '{"é":1}',
    "nine levels": "[[[[[[[[[]]]]]]]]]",
    "4097 values": "[" + ",".join("0" * 4096) + "]",
}

V1 = {
    "an ordinary image": (URL, NOW),
    "a URL with a bar": ("https://abc.supabase.co/a.jpg?x=1|2", NOW),
    "a URL beyond ASCII": ("https://abc.supabase.co/장면.jpg", NOW),
    "the largest time": ("https://abc.supabase.co/a.jpg", 2**53 - 1),
}

V2: dict[str, tuple[str, dict[str, Any]]] = {
    "an ordinary image": (
        "2026-11",
        {"image_url": URL, "request_id": "scene-1", "normalize": True},
    ),
    "the URL alone, older key beyond ASCII": ("2026-08", {"image_url": URL}),
    "with the secret of version 1": ("v1", {"image_url": URL, "request_id": "장면 😀"}),
    "many images": (
        "2026-11",
        {
            "images": [
                {"image_url": URL, "request_id": f"{i}", "normalize": i % 2 == 0} for i in range(3)
            ],
            "request_id": "batch-7",
        },
    ),
    "an empty job": ("2026-11", {}),
}


def verdict(job_input: Any, now: int) -> str:
    """Verify a job: "OK", or the code of the error."""
    try:
        auth.verify(job_input, keyring=KEYRING, now=now)
    except AuthFailed as error:
        return error.code
    return "OK"


def v1_vector(name: str, url: str, ts: int) -> dict[str, Any]:
    """Make one version 1 signature with all its inputs."""
    message = auth.message_v1(url, ts).decode()
    signed = auth.sign(url, secret=V1_SECRET, ts=ts)
    return {
        "name": name,
        "image_url": url,
        "ts": ts,
        "secret": V1_SECRET,
        "message": message,
        "auth": signed,
    }


def v2_vector(name: str, kid: str, job: dict[str, Any]) -> dict[str, Any]:
    """Make one version 2 signature with all its inputs."""
    claims = {"kid": kid, "audience": AUDIENCE, "ts": NOW, "exp": NOW + 900, "nonce": NONCE}
    secret = KEYRING.secret(kid)
    return {
        "name": name,
        "input": job,
        **claims,
        "secret": secret,
        "input_sha256": hashlib.sha256(auth.canonical(job)).hexdigest(),
        "message": auth.message_v2(job, **claims).decode(),
        "auth": auth.sign_v2(job, secret=secret, **claims),
    }


def verify_vectors() -> list[dict[str, Any]]:
    """Make whole jobs with the worker's clock and its verdict; most are refused."""
    v1_auth = auth.sign(URL, secret=V1_SECRET, ts=NOW)
    one = {"image_url": URL, "auth": v1_auth}
    claims = {
        "secret": KEYS["2026-11"],
        "kid": "2026-11",
        "audience": AUDIENCE,
        "nonce": NONCE,
        "ts": NOW,
    }
    two = {"image_url": URL, "auth": auth.sign_v2({"image_url": URL}, exp=NOW + 900, **claims)}
    v2_auth = two["auth"]
    day = auth.sign_v2({"image_url": URL}, exp=NOW + 86_400, **claims)
    abroad = auth.sign_v2({"image_url": URL}, exp=NOW + 900, **{**claims, "audience": "other"})
    rows: list[tuple[str, Any, int]] = [
        ("version 1", one, NOW),
        (
            "version 1, its other fields are not signed",
            {**one, "request_id": "a", "normalize": False},
            NOW,
        ),
        ("version 1, 120 s later", one, NOW + 120),
        ("version 1, 121 s later", one, NOW + 121),
        ("version 1, 121 s early", one, NOW - 121),
        ("version 1, another URL", {**one, "image_url": URL + "&x"}, NOW),
        ("version 1, upper case", {**one, "auth": {**v1_auth, "sig": v1_auth["sig"].upper()}}, NOW),
        ("version 1, ts as text", {**one, "auth": {**v1_auth, "ts": str(NOW)}}, NOW),
        ("version 1, ts is true", {**one, "auth": {**v1_auth, "ts": True}}, NOW),
        ("version 1, one key too many", {**one, "auth": {**v1_auth, "v": 1}}, NOW),
        ("version 1, a field it does not cover", {**one, "images": []}, NOW),
        ("version 2", two, NOW),
        ("version 2, at its last second", two, NOW + 900),
        ("version 2, a second too late", two, NOW + 901),
        ("version 2, 60 s early", two, NOW - 60),
        ("version 2, 61 s early", two, NOW - 61),
        ("version 2, a field added", {**two, "normalize": True}, NOW),
        ("version 2, exp changed", {**two, "auth": {**v2_auth, "exp": NOW + 901}}, NOW),
        ("version 2, another key's name", {**two, "auth": {**v2_auth, "kid": "2026-08"}}, NOW),
        ("version 2, an unknown key's name", {**two, "auth": {**v2_auth, "kid": "2020-01"}}, NOW),
        ("version 2, v as text", {**two, "auth": {**v2_auth, "v": "2"}}, NOW),
        ("version 2, another audience", {**two, "auth": abroad}, NOW),
        ("version 2, good for a day", {**two, "auth": day}, NOW),
        ("no auth", {"image_url": URL}, NOW),
    ]
    return [
        {"name": n, "input": job, "now": now, "verdict": verdict(job, now)} for n, job, now in rows
    ]


def make() -> dict[str, Any]:
    """Make the content of the file."""
    return {
        "about": ABOUT,
        "worker": {
            "v1_secret": V1_SECRET,
            "keys": KEYS,
            "audience": AUDIENCE,
            "window_s": KEYRING.window_s,
            "max_lifetime_s": KEYRING.max_lifetime_s,
        },
        "canonical": [
            {
                "name": name,
                "value": value,
                "canonical": auth.canonical(value).decode(),
                "sha256": hashlib.sha256(auth.canonical(value)).hexdigest(),
            }
            for name, value in CANONICAL.items()
        ],
        "not_canonical": [{"name": name, "json": text} for name, text in NOT_CANONICAL.items()],
        "v1": [v1_vector(name, *row) for name, row in V1.items()],
        "v2": [v2_vector(name, *row) for name, row in V2.items()],
        "verify": verify_vectors(),
    }


def render() -> str:
    """Write the content as text: ASCII only, so that no editor changes a character."""
    return json.dumps(make(), indent=1) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Write or check the file; return the exit status."""
    parser = argparse.ArgumentParser(description="Write test_vectors.json.")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if out of date"
    )
    if parser.parse_args(arguments).check:
        current = PATH.exists() and PATH.read_text(encoding="ascii") == render()
        print(f"{PATH.name} is {'up to date' if current else 'out of date: make it again'}")
        return 0 if current else 1
    PATH.write_text(render(), encoding="ascii")
    print(f"wrote {PATH.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
