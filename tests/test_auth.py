"""Authentication in other languages: published vectors, other tools, and unexpected values."""

from __future__ import annotations

import hashlib
import hmac
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heimdex_clip_worker import auth
from heimdex_clip_worker.errors import AuthFailed

ROOT = Path(__file__).parent.parent
VECTORS = json.loads((ROOT / "test_vectors.json").read_text(encoding="ascii"))
WORKER = VECTORS["worker"]
KEYRING = auth.Keyring(**WORKER)
NOW = 1_764_000_000


def named(section: str) -> Any:
    """Parametrize over a section of the vectors."""
    return pytest.mark.parametrize("vector", VECTORS[section], ids=lambda vector: vector["name"])


def needs(tool: str) -> Any:
    """Skip if a command is missing."""
    return pytest.mark.skipif(not shutil.which(tool), reason=f"needs the command {tool}")


def run(*command: str, stdin: str = "", **variables: str) -> str:
    """Run a command and return its output."""
    env = {"PATH": "/usr/local/bin:/usr/bin:/bin", **variables}
    done = subprocess.run(command, input=stdin.encode(), env=env, capture_output=True, check=True)
    return done.stdout.decode()


# A second implementation, written only from the description in the notebook.


def second_canonical(value: Any, level: int = 0) -> str:
    """Write `value` in the canonical form; raise ValueError if it has none."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and abs(value) < 2**53:
        return str(value)
    if isinstance(value, str) and not re.search("[\ud800-\udfff]", value):
        escapes = {
            '"': '\\"',
            "\\": "\\\\",
            "\b": "\\b",
            "\t": "\\t",
            "\n": "\\n",
            "\f": "\\f",
            "\r": "\\r",
        }
        written = (escapes.get(c, c if c >= " " else f"\\u{ord(c):04x}") for c in value)
        return '"' + "".join(written) + '"'
    if isinstance(value, (list, dict)) and level < 8:
        if isinstance(value, list):
            return "[" + ",".join(second_canonical(item, level + 1) for item in value) + "]"
        if all(key.isascii() for key in value):
            pairs = sorted(value.items())
            return (
                "{"
                + ",".join(
                    f"{second_canonical(k)}:{second_canonical(v, level + 1)}" for k, v in pairs
                )
                + "}"
            )
    raise ValueError("no canonical form")


def second_mac(secret: str, message: str) -> str:
    """Compute the HMAC-SHA256 in hex."""
    return hmac.new(secret.encode(), message.encode(), hashlib.sha256).hexdigest()


def second_message_v2(
    job: dict[str, Any], audience: str, kid: str, ts: int, exp: int, nonce: str
) -> str:
    """Write the seven lines of version 2."""
    body = second_canonical({name: value for name, value in job.items() if name != "auth"})
    digest = hashlib.sha256(body.encode()).hexdigest()
    return "\n".join(["CLIPW-HMAC-SHA256-V2", audience, kid, f"{ts}", f"{exp}", nonce, digest])


def second_verdict(job: dict[str, Any], now: int) -> str:
    """Decide how a worker ends an ordinary job."""
    auth = job.get("auth", {})
    ts, exp = auth.get("ts"), auth.get("exp")
    if type(ts) is int and set(auth) == {"ts", "sig"}:
        if set(job) - {"image_url", "request_id", "normalize", "model", "auth"}:
            return "AUTH_FAILED"
        if auth["sig"] != second_mac(WORKER["v1_secret"], f"{job['image_url']}|{ts}"):
            return "AUTH_FAILED"
        return "OK" if abs(now - ts) <= 120 else "AUTH_EXPIRED"
    if auth.get("v") == 2 and auth["kid"] in WORKER["keys"]:
        message = second_message_v2(job, WORKER["audience"], auth["kid"], ts, exp, auth["nonce"])
        if auth["sig"] == second_mac(WORKER["keys"][auth["kid"]], message) and exp - ts <= 3600:
            return "OK" if ts - 60 <= now <= exp else "AUTH_EXPIRED"
    return "AUTH_FAILED"


# The published vectors.


def test_the_published_vectors_are_those_of_the_code():
    spec = importlib.util.spec_from_file_location(
        "make_test_vectors", ROOT / "tools/make_test_vectors.py"
    )
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert (ROOT / "test_vectors.json").read_text(encoding="ascii") == tool.render()


@named("canonical")
def test_a_value_has_its_canonical_form(vector):
    assert auth.canonical(vector["value"]).decode() == vector["canonical"]
    assert second_canonical(vector["value"]) == vector["canonical"]
    assert hashlib.sha256(vector["canonical"].encode()).hexdigest() == vector["sha256"]


@named("not_canonical")
def test_a_value_without_canonical_form_is_refused(vector):
    with pytest.raises(auth.Unsignable):
        auth.canonical(json.loads(vector["json"]))


@named("v1")
def test_a_version_1_signature_agrees(vector):
    assert second_mac(vector["secret"], vector["message"]) == vector["auth"]["sig"]
    assert vector["message"] == f"{vector['image_url']}|{vector['ts']}"


@named("v2")
def test_a_version_2_signature_agrees(vector):
    claims = {name: vector[name] for name in ("audience", "kid", "ts", "exp", "nonce")}
    assert second_message_v2(vector["input"], **claims) == vector["message"]
    assert second_mac(vector["secret"], vector["message"]) == vector["auth"]["sig"]
    job = {**vector["input"], "auth": vector["auth"]}
    assert auth.verify(job, keyring=KEYRING, now=NOW) == auth.Credential(2, vector["kid"])


@named("verify")
def test_both_implementations_give_the_verdict(vector):
    assert second_verdict(vector["input"], vector["now"]) == vector["verdict"]
    assert verdict(vector["input"], vector["now"]) == vector["verdict"]


# Other tools.


@needs("openssl")
@named("v1")
def test_openssl_agrees_on_v1(vector):
    line = 'printf \'%s\' "$URL|$TS" | openssl dgst -sha256 -hmac "$SECRET"'
    variables = {"URL": vector["image_url"], "TS": str(vector["ts"]), "SECRET": vector["secret"]}
    assert run("sh", "-c", line, **variables).split()[-1] == vector["auth"]["sig"]


@needs("openssl")
@named("v2")
def test_openssl_agrees_on_v2(vector):
    line = 'openssl dgst -sha256 -hmac "$SECRET"'
    printed = run("sh", "-c", line, stdin=vector["message"], SECRET=vector["secret"])
    assert printed.split()[-1] == vector["auth"]["sig"]


@needs("jq")
@named("v2")
def test_jq_writes_the_canonical_job(vector):
    printed = run(
        "jq", "-cjS", "del(.auth)", stdin=json.dumps({**vector["input"], "auth": vector["auth"]})
    )
    assert hashlib.sha256(printed.encode()).hexdigest() == vector["input_sha256"]


@needs("node")
def test_the_javascript_of_the_notebook_writes_the_canonical_form():
    cells = json.loads((ROOT / "nbs/02_auth.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    source = re.search(r"```js\n(.*?)```", text, flags=re.DOTALL)[1]
    program = (
        source + "process.stdout.write(JSON.stringify(JSON.parse(process.argv[1]).map(canonical)))"
    )
    values = [vector["value"] for vector in VECTORS["canonical"]]
    written = json.loads(run("node", "-e", program, json.dumps(values)))
    assert written == [vector["canonical"] for vector in VECTORS["canonical"]]


# Unexpected values.


def verdict(job: Any, now: float = NOW) -> str:
    """Verify a job; anything but a verdict fails the test."""
    try:
        credential = auth.verify(job, keyring=KEYRING, now=now)
    except AuthFailed as error:
        assert str(error) == "Authentication failed"
        assert error.code in ("AUTH_FAILED", "AUTH_EXPIRED")
        secrets = [WORKER["v1_secret"], *WORKER["keys"].values()]
        assert not any(secret in error.detail for secret in secrets)
        assert not re.search(r"[0-9a-f]{64}", error.detail)
        error.detail.encode()
        return error.code
    assert type(credential) is auth.Credential
    return "OK"


class Hostile(str):
    """Text whose methods raise."""

    def encode(self, *args: Any) -> bytes:
        raise OSError("not today")

    __str__ = __len__ = __format__ = __hash__ = encode


def nested(levels: int, make: Any) -> Any:
    """Nest `levels` containers."""
    value = make(0)
    for _ in range(levels):
        value = make(value)
    return value


ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)
ODD = [
    *(True, False, None, -1, 0, 1, 2, NOW, NOW + 900, 2**53, 10**400, 10**5000),
    *(math.nan, 1e400, -0.0, 2.0, 1j, Decimal(1)),
    *((), {1}, b"a" * 64, bytearray(b"a"), Hostile("a" * 64), object(), ..., int),
    *(ENDLESS, nested(100_000, lambda value: [value]), nested(100_000, lambda value: {"a": value})),
]
TEXT = st.text(st.characters() | st.sampled_from("\ud800\udfff\0\n|é０"), max_size=80)
LEAVES = (
    st.integers(0, len(ODD) - 1).map(lambda place: ODD[place])  # some have no repr
    | st.integers()
    | st.floats()
    | TEXT
    | st.text("0123456789abcdef", min_size=64, max_size=64)
    | st.binary(max_size=64)
)
KEYS = TEXT | st.integers() | st.none() | st.booleans() | st.binary(max_size=4) | st.just(math.nan)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)
FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "500")),  # fewer in `make check`
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
HONEST = {
    1: next(v for v in VECTORS["verify"] if v["name"] == "version 1")["input"],
    2: next(v for v in VECTORS["verify"] if v["name"] == "version 2")["input"],
}


@FUZZ
@given(job=VALUES | st.fixed_dictionaries({"image_url": VALUES, "auth": VALUES}))
def test_any_value_is_refused(job):
    assert verdict(job) == "AUTH_FAILED"


@FUZZ
@given(data=st.data(), version=st.sampled_from([1, 2]), value=VALUES)
def test_an_honest_job_with_one_other_value_is_refused(data, version, value):
    honest = HONEST[version]
    name = data.draw(st.sampled_from(["image_url", *honest["auth"]]))
    if name == "image_url":
        job = {**honest, "image_url": value}
    else:
        job = {**honest, "auth": {**honest["auth"], name: value}}
    same = type(value) is type(honest["auth"].get(name, honest["image_url"])) and job == honest
    assert verdict(job) == ("OK" if same else "AUTH_FAILED")


@FUZZ
@given(job=st.dictionaries(KEYS, VALUES, max_size=4), version=st.sampled_from([1, 2]))
def test_an_additional_field_is_refused(job, version):
    allowed = {"request_id", "normalize", "model"} if version == 1 else set()
    job = {k: v for k, v in job.items() if k not in ("auth", "image_url", *allowed)}
    assert verdict({**job, **HONEST[version]}) == ("AUTH_FAILED" if job else "OK")


@FUZZ
@given(value=VALUES)
def test_two_implementations_agree_on_the_canonical_form(value):
    try:
        written = auth.canonical(value).decode()
    except auth.Unsignable:
        return
    assert written == second_canonical(value)
    assert json.loads(written) == value


ASCII = st.text(st.characters(max_codepoint=127), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ASCII, inner, max_size=4),
    max_leaves=20,
)


@FUZZ
@given(job=st.dictionaries(ASCII, JSON), late=st.integers(-60, 900))
def test_what_can_be_signed_is_accepted_after_its_way_as_json(job, late):
    claims = {"kid": "2026-11", "ts": NOW, "exp": NOW + 900, "nonce": auth.new_nonce()}
    try:
        signed = auth.sign_v2(
            job, secret=WORKER["keys"]["2026-11"], audience=WORKER["audience"], **claims
        )
    except auth.Unsignable as error:
        assert "nested deeper" in str(error)
        return
    arrived = json.loads(json.dumps({**job, "auth": signed}))
    assert verdict(arrived, NOW + late) == "OK"


@pytest.mark.parametrize("now", [math.nan, math.inf, -math.inf])
def test_a_clock_without_a_number_accepts_nothing(now):
    assert [verdict(HONEST[1], now), verdict(HONEST[2], now)] == ["AUTH_EXPIRED"] * 2


@pytest.mark.parametrize("version", [1, 2, "unknown kid"])
def test_signatures_are_compared_in_constant_time(version, monkeypatch):
    calls = []
    monkeypatch.setattr(
        auth.hmac, "compare_digest", lambda *both: calls.append(both) or both[0] == both[1]
    )
    job = HONEST[1 if version == 1 else 2]
    kid = {"kid": "2020-01"} if version == "unknown kid" else {}
    code = verdict({**job, "auth": {**job["auth"], **kid}})
    assert code == ("AUTH_FAILED" if kid else "OK")
    assert [(type(mac), len(mac), type(sig)) for mac, sig in calls] == [
        (bytes, 64, bytes)
    ]


def test_a_huge_job_is_refused_before_it_is_copied():
    class Huge(dict):
        def __len__(self):
            return 10**9

        def items(self):
            raise AssertionError("copied")

    with pytest.raises(auth.Unsignable):
        auth.message_v2(Huge(), kid="k", audience="a", ts=1, exp=2, nonce="n" * 16)
