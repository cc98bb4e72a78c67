"""The settings by their literal values.

The documents' tables and the hub's inputs are generated from the settings, so they follow every
change of them. Nothing here is generated: change a value here only if the documented contract is
meant to change.
"""

from __future__ import annotations

import ipaddress
import json
import re
from pathlib import Path

import pytest

from heimdex_clip_worker.errors import SettingsError
from heimdex_clip_worker.settings import (
    _DEPLOYMENT,
    _OF_THE_HUB,
    _PUBLISHED,
    CLIENT_VARIABLES,
    MIN_SECRET_BYTES,
    NEVER_ALLOWED,
    VARIABLES,
    ClientSettings,
    DeploySettings,
    Settings,
    Variable,
)

SECRET = "of-these-tests-4f1c9be27d03a856"
WORKER = {  # variable -> field, value of its default
    "EMBEDDING_HMAC_SECRET": ("hmac_secret", None),
    "EMBEDDING_HMAC_KEYS": ("hmac_keys", {}),
    "AUTH_ACCEPT_V1": ("auth_accept_v1", True),
    "AUTH_AUDIENCE": ("auth_audience", "heimdex-clip"),
    "AUTH_TIME_WINDOW_SECONDS": ("auth_time_window_s", 120),
    "AUTH_MAX_LIFETIME_SECONDS": ("auth_max_lifetime_s", 3600),
    "CLIP_MODEL_NAME": ("model_name", "ViT-B-32"),
    "CLIP_PRETRAINED": ("pretrained", "openai"),
    "CLIP_ACTIVATION": ("activation", "auto"),
    "CLIP_DEVICE": ("device", "auto"),
    "CLIP_PRECISION": ("precision", "auto"),
    "CLIP_TEXT": ("text", "lazy"),
    "CLIP_ARTIFACT_DIR": ("artifact_dir", "~/.cache/heimdex-clip"),
    "MAX_IMAGE_SIZE_BYTES": ("max_image_bytes", 10_485_760),
    "MAX_IMAGE_PIXELS": ("max_image_pixels", 50_000_000),
    "IMAGE_DOWNLOAD_TIMEOUT": ("download_timeout_s", 30.0),
    "MAX_CONNECTIONS_PER_HOST": ("max_connections_per_host", 64),
    "ALLOWED_IMAGE_HOSTS": ("allowed_image_hosts", ()),
    "ALLOWED_PRIVATE_NETWORKS": ("allowed_private_networks", ()),
    "CLIP_PREPROCESS": ("preprocess", "fast"),
    "ALLOW_HTTP": ("allow_http", True),
    "MAX_CONCURRENCY": ("max_concurrency", 64),
    "MAX_IMAGES_PER_JOB": ("max_images_per_job", 128),
    "MAX_IMAGES_IN_HAND": ("max_images_in_hand", 0),
    "MAX_BATCH_SIZE": ("max_batch_size", 256),
    "DECODE_WORKERS": ("decode_workers", 0),
    "DECODE_IN": ("decode_in", "auto"),
    "MAX_BYTES_IN_FLIGHT": ("max_bytes_in_flight", 671_088_640),
    "MODEL_TIMEOUT_S": ("model_timeout_s", 30.0),
    "CLIP_SELFTEST": ("selftest", "on"),
    "LOG_LEVEL": ("log_level", "INFO"),
    "LOG_FORMAT": ("log_format", "text"),
}
CALLER = {
    "CLIP_INFERENCE_BACKEND": ("backend", "runpod"),
    "RUNPOD_API_KEY": ("api_key", None),
    "RUNPOD_CLIP_ENDPOINT_ID": ("endpoint_id", None),
    "RUNPOD_TIMEOUT_S": ("timeout_s", 60.0),
    "RUNPOD_BASE_URL": ("base_url", "https://api.runpod.ai/v2"),
    "EMBEDDING_HMAC_SECRET": ("hmac_secret", None),
    "EMBEDDING_HMAC_KEYS": ("hmac_keys", {}),
    "AUTH_AUDIENCE": ("audience", "heimdex-clip"),
    "AUTH_MAX_LIFETIME_SECONDS": ("max_lifetime_s", 3600),
    "CLIP_MODEL_NAME": ("model_name", "ViT-B-32"),
    "CLIP_MODEL_VERSION": ("model_version", "openai-vit-b-32-v1"),
    "CLIP_SPACE_ID": ("space_id", ""),
    "SUPABASE_URL": ("supabase_url", ""),
    "SUPABASE_SERVICE_ROLE_KEY": ("supabase_key", ""),
    "SUPABASE_BUCKET": ("supabase_bucket", ""),
    "DATABASE_URL": ("database_url", ""),
}
DEPLOY = {
    "RUNPOD_API_KEY": ("api_key", ""),
    "RUNPOD_REST_URL": ("rest_url", "https://api.runpod.io/v2"),
    "CLIP_WORKER_IMAGE": ("image", ""),
}
HIDDEN = {
    "EMBEDDING_HMAC_SECRET", "EMBEDDING_HMAC_KEYS", "RUNPOD_API_KEY",
    "SUPABASE_SERVICE_ROLE_KEY", "DATABASE_URL",
}  # fmt: skip
RANGES = {  # variable -> smallest and largest number accepted, and the nearest ones refused
    "AUTH_TIME_WINDOW_SECONDS": ("1", "86400", "0", "86401"),
    "AUTH_MAX_LIFETIME_SECONDS": ("1", "604800", "0", "604801"),
    "MAX_IMAGE_SIZE_BYTES": ("1", "1073741824", "0", "1073741825"),
    "MAX_IMAGE_PIXELS": ("1", "268435456", "0", "268435457"),
    "IMAGE_DOWNLOAD_TIMEOUT": ("0.1", "300", "0.09", "300.1"),
    "MAX_CONNECTIONS_PER_HOST": ("1", "1024", "0", "1025"),
    "MAX_CONCURRENCY": ("1", "300", "0", "301"),
    "MAX_IMAGES_PER_JOB": ("1", "512", "0", "513"),
    "MAX_IMAGES_IN_HAND": ("0", "1000000", "-1", "1000001"),
    "MAX_BATCH_SIZE": ("1", "1024", "0", "1025"),
    "DECODE_WORKERS": ("0", "256", "-1", "257"),
    "MAX_BYTES_IN_FLIGHT": ("1", "68719476736", "0", "68719476737"),
    "MODEL_TIMEOUT_S": ("1", "600", "0.9", "600.1"),
    "RUNPOD_TIMEOUT_S": ("0.1", "3600", "0.09", "3600.1"),
}
WORDS = {
    "CLIP_ACTIVATION": ["auto", "gelu", "quickgelu"],
    "CLIP_PRECISION": ["auto", "fp32", "fp16", "bf16"],
    "CLIP_TEXT": ["lazy", "eager", "off"],
    "CLIP_PREPROCESS": ["fast", "exact"],
    "CLIP_SELFTEST": ["on", "off"],
    "DECODE_IN": ["auto", "processes", "threads"],
    "LOG_LEVEL": ["DEBUG", "INFO", "WARNING", "ERROR"],
    "LOG_FORMAT": ["text", "json"],
    "CLIP_INFERENCE_BACKEND": ["runpod", "local", "off"],
}
KEY = "k9" * 8
VALUES = [  # variable, text, value
    ("AUTH_ACCEPT_V1", "False", False),
    ("AUTH_ACCEPT_V1", "0", False),
    ("AUTH_ACCEPT_V1", "no", False),
    ("ALLOW_HTTP", "YES", True),
    ("ALLOW_HTTP", "1", True),
    ("EMBEDDING_HMAC_SECRET", KEY, KEY),
    ("EMBEDDING_HMAC_SECRET", "парольпа", "парольпа"),  # 16 bytes
    ("EMBEDDING_HMAC_KEYS", f"b:{KEY}, a:{KEY}:x", {"b": KEY, "a": f"{KEY}:x"}),
    ("EMBEDDING_HMAC_KEYS", " , ", {}),
    ("AUTH_AUDIENCE", "a" * 128, "a" * 128),
    ("CLIP_DEVICE", "cuda:15", "cuda:15"),
    ("CLIP_ARTIFACT_DIR", "/opt/my clip", "/opt/my clip"),
    ("ALLOWED_IMAGE_HOSTS", "A.example, *.supabase.co,", ("a.example", "*.supabase.co")),
    (
        "ALLOWED_PRIVATE_NETWORKS", "10.1.0.0/16, 127.0.0.1",
        (ipaddress.IPv4Network("10.1.0.0/16"), ipaddress.IPv4Network("127.0.0.1/32")),
    ),
    ("RUNPOD_BASE_URL", "http://127.0.0.1:8000/v2/", "http://127.0.0.1:8000/v2"),
    ("RUNPOD_REST_URL", "https://host/v2", "https://host/v2"),
    ("CLIP_MODEL_VERSION", "v" * 200, "v" * 200),
    ("SUPABASE_URL", "https://abc.supabase.co/", "https://abc.supabase.co"),
    ("RUNPOD_API_KEY", "k" * 256, "k" * 256),
]  # fmt: skip
REFUSED = [
    ("AUTH_ACCEPT_V1", "maybe"), ("AUTH_ACCEPT_V1", ""), ("AUTH_ACCEPT_V1", "off"),
    ("EMBEDDING_HMAC_SECRET", "k" * 15), ("EMBEDDING_HMAC_SECRET", "парольп1"),
    ("EMBEDDING_HMAC_SECRET", f" {KEY}"),
    ("EMBEDDING_HMAC_SECRET", f"{KEY}\n"), ("EMBEDDING_HMAC_SECRET", " " * 20),
    ("EMBEDDING_HMAC_KEYS", KEY), ("EMBEDDING_HMAC_KEYS", f"v1:{KEY}"),
    ("EMBEDDING_HMAC_KEYS", f"a:{KEY},a:{KEY}"), ("EMBEDDING_HMAC_KEYS", f"a b:{KEY}"),
    ("EMBEDDING_HMAC_KEYS", "a:short"), ("EMBEDDING_HMAC_KEYS", f"{'a' * 65}:{KEY}"),
    ("EMBEDDING_HMAC_SECRET", "k" * 32), ("EMBEDDING_HMAC_SECRET", "change_me_change_me"),
    ("EMBEDDING_HMAC_SECRET", "your-secret-of-32-bytes"),
    ("EMBEDDING_HMAC_SECRET", "an-Example-of-16-bytes"),
    ("EMBEDDING_HMAC_KEYS", "a:<your own secret>"),
    ("EMBEDDING_HMAC_KEYS", f"b:{KEY},a:{'x' * 16}"),
    ("AUTH_AUDIENCE", ""), ("AUTH_AUDIENCE", "a b"), ("AUTH_AUDIENCE", "a" * 129),
    ("AUTH_TIME_WINDOW_SECONDS", "1.5"), ("AUTH_TIME_WINDOW_SECONDS", "nan"),
    ("IMAGE_DOWNLOAD_TIMEOUT", "nan"), ("IMAGE_DOWNLOAD_TIMEOUT", "inf"),
    ("MAX_IMAGE_PIXELS", "1e6"), ("MAX_IMAGE_PIXELS", ""),
    ("CLIP_MODEL_NAME", ""), ("CLIP_PRETRAINED", " "), ("CLIP_ARTIFACT_DIR", ""),
    ("CLIP_DEVICE", "gpu"), ("CLIP_DEVICE", "cuda:"), ("CLIP_DEVICE", "cuda:100"),
    ("ALLOWED_IMAGE_HOSTS", "https://a.example"), ("ALLOWED_IMAGE_HOSTS", "*"),
    ("ALLOWED_IMAGE_HOSTS", "a.*.example"), ("ALLOWED_IMAGE_HOSTS", "-a.example"),
    ("ALLOWED_PRIVATE_NETWORKS", "10.1.0.1/16"), ("ALLOWED_PRIVATE_NETWORKS", "::1/128"),
    ("ALLOWED_PRIVATE_NETWORKS", "0.0.0.0/0"), ("ALLOWED_PRIVATE_NETWORKS", "169.254.169.254/32"),
    ("ALLOWED_PRIVATE_NETWORKS", "168.63.129.16"),
    ("RUNPOD_BASE_URL", "http://host/v2"), ("RUNPOD_BASE_URL", "https://user@host/v2"),
    ("RUNPOD_BASE_URL", "https://host/v2?x=1"), ("RUNPOD_BASE_URL", ""),
    ("RUNPOD_REST_URL", "http://10.0.0.1/v2"), ("SUPABASE_URL", "http://abc.supabase.co"),
    ("RUNPOD_CLIP_ENDPOINT_ID", "a/b"), ("RUNPOD_CLIP_ENDPOINT_ID", ""),
    ("CLIP_MODEL_VERSION", ""), ("CLIP_SPACE_ID", "a b"), ("SUPABASE_BUCKET", "b" * 101),
    ("SUPABASE_SERVICE_ROLE_KEY", "a b"), ("CLIP_WORKER_IMAGE", "a b"),
]  # fmt: skip
ALL: dict[str, Variable] = {
    v.name: v for v in [*_DEPLOYMENT.values(), *CLIENT_VARIABLES.values(), *VARIABLES.values()]
}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [(VARIABLES, WORKER), (CLIENT_VARIABLES, CALLER), (_DEPLOYMENT, DEPLOY)],
    ids=["worker", "caller", "deploy"],
)
def test_the_variables_have_these_names_and_defaults(variables, expected) -> None:
    found = {
        variable.name: (key, None if variable.default is None else variable.parse(variable.default))
        for key, variable in variables.items()
    }
    assert found == expected


def test_the_defaults_become_the_settings() -> None:
    worker = Settings.from_env({"EMBEDDING_HMAC_SECRET": SECRET})
    for field, value in WORKER.values():
        assert getattr(worker, field) == (SECRET if field == "hmac_secret" else value), field
    env = {"EMBEDDING_HMAC_SECRET": SECRET, "RUNPOD_API_KEY": "k" * 8}
    caller = ClientSettings.from_env(env | {"RUNPOD_CLIP_ENDPOINT_ID": "e"})
    given = {"hmac_secret": SECRET, "api_key": "k" * 8, "endpoint_id": "e"}
    for field, value in CALLER.values():
        assert getattr(caller, field) == given.get(field, value), field
    deploy = DeploySettings.from_env({})
    assert all(getattr(deploy, field) == value for field, value in DEPLOY.values())


def test_secrets_are_hidden_and_nothing_else_is() -> None:
    assert {name for name, variable in ALL.items() if variable.hidden} == HIDDEN
    hidden = {v.name for group in (VARIABLES, CLIENT_VARIABLES, _DEPLOYMENT)
              for v in group.values() if v.hidden}  # fmt: skip
    assert hidden == HIDDEN


@pytest.mark.parametrize("name", RANGES)
def test_a_number_is_accepted_within_its_range_alone(name: str) -> None:
    low, high, below, above = RANGES[name]
    parse = ALL[name].parse
    assert (parse(low), parse(high)) == (float(low), float(high))
    for text in (below, above, "", "x"):
        with pytest.raises(ValueError, match="must be a"):
            parse(text)


def test_every_number_has_its_range_here() -> None:
    assert {name for name, variable in ALL.items() if hasattr(variable.parse, "low")} == set(RANGES)


@pytest.mark.parametrize("name", WORDS)
def test_a_choice_is_one_of_these_words(name: str) -> None:
    parse = ALL[name].parse
    assert [parse(word) for word in WORDS[name]] == WORDS[name]
    assert [parse(word.swapcase()) for word in WORDS[name]] == WORDS[name]
    assert list(parse.allowed) == WORDS[name]
    for text in ("", "other", WORDS[name][0] + "s"):
        with pytest.raises(ValueError, match="must be one of"):
            parse(text)


def test_every_choice_has_its_words_here() -> None:
    found = {name for name, variable in ALL.items() if hasattr(variable.parse, "allowed")}
    assert found == set(WORDS)


@pytest.mark.parametrize(("name", "text", "value"), VALUES)
def test_a_text_is_read_as_this_value(name: str, text: str, value: object) -> None:
    assert ALL[name].parse(text) == value


@pytest.mark.parametrize(("name", "text"), REFUSED)
def test_a_text_is_refused(name: str, text: str) -> None:
    with pytest.raises(ValueError):
        ALL[name].parse(text)


EMPTY = {name: "" for name in ALL}
NEEDED = {"EMBEDDING_HMAC_SECRET": SECRET, "RUNPOD_API_KEY": "k" * 8}
NEEDED["RUNPOD_CLIP_ENDPOINT_ID"] = "e"


@pytest.mark.parametrize("name", ALL)
def test_an_empty_variable_is_absent(name: str) -> None:
    """An unset secret of a workflow, and an empty field of a form, arrive as an empty text."""
    rest = {key: value for key, value in NEEDED.items() if key != name}
    for settings in (Settings, ClientSettings, DeploySettings):
        assert read(settings, {**rest, name: ""}) == read(settings, rest)


def read(settings: type, env: dict[str, str]) -> object:
    """Read settings, or the problems that they have."""
    try:
        return settings.from_env(env)
    except SettingsError as error:
        return error.problems


def test_all_variables_can_be_empty_at_once() -> None:
    for settings in (Settings, ClientSettings, DeploySettings):
        assert read(settings, EMPTY | NEEDED) == read(settings, NEEDED)
        assert read(settings, EMPTY) == read(settings, {})


def test_an_empty_secret_is_a_missing_one() -> None:
    keys = {"EMBEDDING_HMAC_KEYS": f"a:{SECRET}", "EMBEDDING_HMAC_SECRET": ""}
    assert ClientSettings.from_env({**NEEDED, **keys}).hmac_secret is None
    assert Settings.from_env({**keys, "AUTH_ACCEPT_V1": "false"}).hmac_keys == {"a": SECRET}
    [problem] = read(Settings, keys)
    assert problem.startswith("EMBEDDING_HMAC_SECRET is missing")


def test_the_limits_that_no_setting_can_move() -> None:
    assert MIN_SECRET_BYTES == 16
    assert [str(network) for network in NEVER_ALLOWED] == ["169.254.0.0/16", "168.63.129.16/32"]


@pytest.mark.parametrize(
    ("env", "missing"),
    [
        ({}, "EMBEDDING_HMAC_SECRET"),
        ({"EMBEDDING_HMAC_KEYS": f"a:{SECRET}"}, "EMBEDDING_HMAC_SECRET"),
        ({"AUTH_ACCEPT_V1": "true", "EMBEDDING_HMAC_KEYS": f"a:{SECRET}"}, "EMBEDDING_HMAC_SECRET"),
        ({"AUTH_ACCEPT_V1": "false"}, "EMBEDDING_HMAC_KEYS"),
        ({"AUTH_ACCEPT_V1": "false", "EMBEDDING_HMAC_SECRET": SECRET}, "EMBEDDING_HMAC_KEYS"),
        (
            {"AUTH_ACCEPT_V1": "0", "EMBEDDING_HMAC_SECRET": SECRET, "EMBEDDING_HMAC_KEYS": ","},
            "EMBEDDING_HMAC_KEYS",
        ),
        ({"AUTH_ACCEPT_V1": "no", "EMBEDDING_HMAC_KEYS": f"a:{SECRET}"}, None),
        ({"EMBEDDING_HMAC_SECRET": SECRET}, None),
        ({"EMBEDDING_HMAC_SECRET": SECRET, "EMBEDDING_HMAC_KEYS": f"a:{SECRET}"}, None),
    ],
)
def test_a_worker_without_a_key_that_a_caller_can_use_is_refused(env, missing) -> None:
    if missing is None:
        Settings.from_env(env)
        return
    with pytest.raises(SettingsError) as caught:
        Settings.from_env(env)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{missing} is missing") and SECRET not in problem


TEMPLATES = [
    "{{ RUNPOD_SECRET_clip }}", "{{RUNPOD_SECRET_clip}}", "{{  runpod_secret_CLIP }}",
    "{{ secrets.CLIP_SECRET }}", "${CLIP_SECRET}", "${CLIP_SECRET:-no}", "$CLIP_SECRET_OF_OURS",
    "$(openssl rand -hex 32)", "<your-secret-of-32-bytes>", "[your-secret-of-32-bytes]",
    "%CLIP_SECRET_OF_OURS%", "RUNPOD_SECRET_clip", "rpa_LOCAL0123456789...",
]  # fmt: skip


@pytest.mark.parametrize("text", TEMPLATES, ids=lambda text: re.sub(r"\W+", "-", text))
def test_a_template_that_was_not_filled_in_is_refused_by_name(text: str) -> None:
    both = (Settings, ClientSettings)
    for name, value, kinds in (
        ("EMBEDDING_HMAC_SECRET", text, both),
        ("EMBEDDING_HMAC_KEYS", f"b:{KEY}, a:{text}", both),
        ("AUTH_AUDIENCE", text, both),
        ("RUNPOD_API_KEY", text, (ClientSettings, DeploySettings)),
    ):
        for settings in kinds:
            [problem] = read(settings, NEEDED | {name: value})
            assert re.match(rf"{name}\b.*(did not replace|was never replaced)", problem), problem


def test_a_name_of_runpods_is_told_and_nothing_else_that_is_in_braces() -> None:
    [problem] = read(Settings, {"EMBEDDING_HMAC_SECRET": "{{ RUNPOD_SECRET_clip-1 }}"})
    assert "{{ RUNPOD_SECRET_clip-1 }}" in problem
    for text in (f"{{{{ {KEY} }}}}", f"${{a{KEY}}}", f"<{KEY}>", f"{KEY}..."):
        [problem] = read(Settings, {"EMBEDDING_HMAC_SECRET": text})
        assert KEY not in problem and "placeholder" in problem


@pytest.mark.parametrize("text", ["$uper-Trouper-1980", "$uperTrouperOf1980", "a$TROUPERS_OF_80"])
def test_a_password_with_a_dollar_is_no_template(text: str) -> None:
    assert read(Settings, {"EMBEDDING_HMAC_SECRET": text}).hmac_secret == text


@pytest.mark.parametrize("text", [*sorted(_PUBLISHED), _OF_THE_HUB])
def test_a_published_secret_is_refused_and_not_repeated(text: str) -> None:
    for env in (
        {"EMBEDDING_HMAC_SECRET": text},
        {"EMBEDDING_HMAC_SECRET": SECRET, "EMBEDDING_HMAC_KEYS": f"b:{KEY},a:{text}"},
    ):
        for settings in (Settings, ClientSettings):
            [problem] = read(settings, NEEDED | env)
            assert re.search("documents show|is public", problem) and text not in problem


ROOT = Path(__file__).resolve().parents[2]
LITERALS = [  # where a document can show a secret
    r"EMBEDDING_HMAC_\w+[\"']?\s*[=:,]+\s*f?[\"']?([^\s\"',)`]+)",
    r"\b(?:secret|SECRET|OLD|NEW|KEY\w*) = [\"']([^\"']+)",
    r"(?:_secret|parse_keys)\(f?[\"']([^\"']+)",
    r"EMBEDDING_HMAC_\w+\",\s*\"value\": \"([^\"]+)",
    r"\"\w*secret\": \"([^\"]+)",
]


def shown_secrets() -> dict[str, str]:
    """Collect what documents show as a secret, with the document that shows it."""
    files = [ROOT / "README.md", ROOT / "test_vectors.json", *(ROOT / "docs").rglob("*.md")]
    files += [*(ROOT / ".runpod").glob("*.json"), *(ROOT / ".github").rglob("*.yml")]
    texts = {path.name: path.read_text(encoding="utf-8") for path in files}
    vectors = json.loads(texts["test_vectors.json"])
    texts["test_vectors.json"] = json.dumps(vectors, ensure_ascii=False)
    for path in (ROOT / "nbs").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        texts[path.name] = "\n".join("".join(cell["source"]) for cell in cells)
    return {
        part.rpartition(":")[2].strip(): name
        for name, text in texts.items()
        for pattern in LITERALS
        for match in re.findall(pattern, text)
        for part in match.split(",")
        if not re.fullmatch(r"[A-Z_]+", part)  # a variable's name
    }


def test_no_document_shows_a_secret_that_would_be_accepted() -> None:
    shown = shown_secrets()
    assert _OF_THE_HUB in shown and "example-secret-of-version-one" in shown  # it finds them
    accepted = {}
    for text, name in shown.items():
        try:
            accepted[ALL["EMBEDDING_HMAC_SECRET"].parse(text)] = name
        except ValueError:
            continue
    assert accepted == {_OF_THE_HUB: "tests.json"}  # see `_check_hub_secret`


def test_the_documents_keep_files_of_secrets_from_other_users() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    writing = [block for block in blocks if re.search(r"> *\S+\.env\b", block)]
    assert len(writing) == 2  # README and Deploy
    for block in writing:
        assert "umask 077" in block.partition(".env")[0]
