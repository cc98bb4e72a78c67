"""`heimdex-clip deploy` and `undeploy` against a stand-in for RunPod's REST API."""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from functools import partial

import pytest
from rest_api import CREATE, KEY, Refusal, RestApi, check

from heimdex_clip_worker.cli import deploy
from heimdex_clip_worker.cli.deploy import _EXCLUDED_GPUS, _GPU_POOLS, configuration
from heimdex_clip_worker.settings import VARIABLES

pytestmark = pytest.mark.server

IMAGE = "registry.example/heimdex-clip-worker:0.1.0"
SECRET = "a-secret-for-deployments-of-32-b"
VARIABLE = "EMBEDDING_HMAC_SECRET"


@pytest.fixture
def api(monkeypatch):
    """Serve the API; this process's environment leads to it, with a key and no secret."""
    for variable in VARIABLES.values():
        monkeypatch.delenv(variable.name, raising=False)
    monkeypatch.delenv("CLIP_WORKER_IMAGE", raising=False)
    with RestApi() as server:
        monkeypatch.setenv("RUNPOD_API_KEY", KEY)
        monkeypatch.setenv("RUNPOD_REST_URL", server.url)
        server.pauses = []
        options = {"wait": server.pauses.append, "timeout_s": (5, 5)}
        monkeypatch.setattr(deploy, "Api", partial(deploy.Api, **options))
        yield server


@pytest.fixture
def command(api, capsys):
    """Run a command line; return its status, stdout and stderr."""

    def run_command(*words, add=deploy.add_arguments, run=deploy.run):
        parser = argparse.ArgumentParser()
        add(parser)
        status = run(parser.parse_args(words))
        return status, *capsys.readouterr()

    return run_command


@pytest.fixture
def undeploy(command):
    """Run an `undeploy` command line."""
    functions = {"add": deploy.add_undeploy_arguments, "run": deploy.run_undeploy}
    return lambda *words: command(*words, **functions)


def exported(out: str) -> dict[str, str]:
    """Let a shell read `out`; return its variables."""
    script = f"set -eu\n{out}\nenv -0"
    result = subprocess.run(
        ["sh", "-c", script], capture_output=True, text=True, check=True, timeout=10,
        env={"PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    return dict(pair.split("=", 1) for pair in result.stdout.split("\0") if pair)


# --- the stand-in refuses what the API refuses --------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"templateId": ""},
        {"workersMax": 3},
        {"imageName": IMAGE},
        {"flashboot": True},
        {"type": "GPU"},
        {"scaling": {"type": "QUEUE_DELAY"}},
        {"scaling": {"type": "REQUEST_COUNT", "requestCount": 4}},
        {"workers": {"min": 0, "max": 3, "idleTimeout": 0}},
        {"gpu": {"pools": ["ADA_24"], "gpuTypeIds": ["NVIDIA L40S"]}},
        {"gpu": {"pools": ["NVIDIA GeForce RTX 4090"]}},
        {"gpu": {"pools": ["ADA_24"], "excludedTypes": ["NVIDIA L40"]}},
        {"gpu": {"pools": ["ADA_24"], "minCudaVersion": "12.8", "allowedCudaVersions": ["12.8"]}},
        {"env": {"LOG_LEVEL": 1}},
    ],
    ids=json.dumps,
)
def test_the_stand_in_refuses_what_the_api_refuses(change):
    own = {"name": "heimdex-clip", "type": "QUEUE", "env": {VARIABLE: SECRET}}
    body = {**configuration(IMAGE), **own}
    check(body, CREATE, {})
    with pytest.raises(Refusal):
        check({**body, **change}, CREATE, {})


# --- create -------------------------------------------------------------------


def test_a_first_run_creates_the_endpoint(api, command):
    status, out, err = command("--image", IMAGE, "--env", "LOG_LEVEL=DEBUG")

    [(method, path, body)] = api.changes()
    assert (status, method, path) == (0, "POST", "/v2/serverless")
    assert body["image"] == IMAGE and body["name"] == "heimdex-clip" and body["type"] == "QUEUE"
    assert body["workers"] == {"min": 0, "max": 3, "idleTimeout": 30}
    assert (body["timeout"], body["flashboot"]) == (300_000, "FLASHBOOT")
    assert body["scaling"] == {"type": "QUEUE_DELAY", "queueDelay": 4} and body["disk"] == 20
    assert {key: body[key] for key in configuration(IMAGE)} == configuration(IMAGE)
    assert body["gpu"]["pools"] == list(_GPU_POOLS)
    assert body["gpu"]["excludedTypes"] == list(_EXCLUDED_GPUS)
    assert body["gpu"]["minCudaVersion"] == "12.8"
    assert body["env"].keys() == {"LOG_LEVEL", VARIABLE, "CLIP_DEVICE"}
    assert len(body["env"][VARIABLE]) == 64 and body["env"]["CLIP_DEVICE"] == "cuda"


@pytest.mark.parametrize(
    "words, pools, excluded",
    [
        (["--gpu-pools", "ADA_24"], ["ADA_24"], []),
        (["--gpu-pools", "ADA_48_PRO, AMPERE_80"], ["ADA_48_PRO", "AMPERE_80"], [*_EXCLUDED_GPUS]),
        (["--gpu-exclude", ""], list(_GPU_POOLS), []),
        (["--gpu-exclude", "NVIDIA L40"], list(_GPU_POOLS), ["NVIDIA L40"]),
    ],
)
def test_other_gpus_can_be_chosen(api, command, words, pools, excluded):
    assert command("--image", IMAGE, *words)[0] == 0
    gpu = api.changes()[0][2]["gpu"]
    assert (gpu["pools"], gpu.get("excludedTypes", [])) == (pools, excluded)


@pytest.mark.parametrize(
    "words, scaling, idle_s",
    [
        (["--queue-delay", "9"], {"type": "QUEUE_DELAY", "queueDelay": 9}, 30),
        (["--scaler-value", "9", "--idle", "7"], {"type": "QUEUE_DELAY", "queueDelay": 9}, 7),
        (["--scaler", "REQUEST_COUNT"], {"type": "REQUEST_COUNT", "requestCount": 4}, None),
        (
            ["--scaler", "REQUEST_COUNT", "--scaler-value", "64"],
            {"type": "REQUEST_COUNT", "requestCount": 64}, None,
        ),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else None,
)  # fmt: skip
@pytest.mark.parametrize("known", [False, True], ids=["create", "update"])
def test_a_scaler_can_be_chosen(api, command, words, scaling, idle_s, known):
    """The API refuses an idle timeout beside REQUEST_COUNT, and so does the stand-in."""
    if known:
        workers = {"min": 0, "max": 1, "idleTimeout": 5}
        api.add("heimdex-clip", env={VARIABLE: SECRET}, workers=workers)
    assert command("--image", IMAGE, *words)[0] == 0
    body = api.changes()[0][2]
    assert (body["scaling"], body["workers"].get("idleTimeout")) == (scaling, idle_s)


def test_a_new_secret_is_printed_once_and_is_the_workers(api, command):
    _, out, err = command("--image", IMAGE)

    [endpoint] = api.endpoints.values()
    variables = exported(out)
    secret = variables[VARIABLE]
    assert secret == endpoint["env"][VARIABLE]
    assert variables["RUNPOD_CLIP_ENDPOINT_ID"] == endpoint["id"]
    assert secret not in err and out.count(secret) == 1
    _, out, err = command("--image", IMAGE)
    assert secret not in out + err


def test_a_secret_from_the_environment_is_sent_and_not_printed(api, command, monkeypatch):
    monkeypatch.setenv(VARIABLE, SECRET)
    status, out, err = command("--image", IMAGE)

    [endpoint] = api.endpoints.values()
    assert (status, endpoint["env"]) == (0, {VARIABLE: SECRET, "CLIP_DEVICE": "cuda"})
    assert SECRET not in out + err and KEY not in out + err


# --- update -------------------------------------------------------------------


def test_a_second_run_updates_the_endpoint(api, command):
    command("--image", IMAGE)
    [before] = copy.deepcopy(list(api.endpoints.values()))
    status, _, err = command("--image", IMAGE.replace("0.1.0", "0.2.0"), "--workers-max", "5")

    [after] = api.endpoints.values()
    assert status == 0 and "Updated" in err
    assert [method for method, _, _ in api.changes()] == ["POST", "PATCH"]
    assert (after["id"], after["env"]) == (before["id"], before["env"])
    assert (after["image"][-5:], after["workers"]["max"]) == ("0.2.0", 5)


def test_the_same_run_twice_leaves_the_same_endpoint(api, command):
    command("--image", IMAGE)
    before = copy.deepcopy(api.endpoints)
    command("--image", IMAGE)

    assert api.endpoints == before


def test_variables_set_in_the_console_stay_until_they_are_removed(api, command):
    api.add("heimdex-clip", env={VARIABLE: SECRET, "ALLOW_HTTP": "false", "TEAM": "search"})
    command("--image", IMAGE, "--env", "LOG_LEVEL=DEBUG", "--unset-env", "ALLOW_HTTP")

    [endpoint] = api.endpoints.values()
    own = {VARIABLE: SECRET, "TEAM": "search"}
    assert endpoint["env"] == {**own, "LOG_LEVEL": "DEBUG", "CLIP_DEVICE": "cuda"}


@pytest.mark.parametrize(
    "own, words, device",
    [
        ({}, [], "cuda"),
        ({"CLIP_DEVICE": "auto"}, [], "auto"),
        ({"CLIP_DEVICE": "auto"}, ["--env", "CLIP_DEVICE=cuda:0"], "cuda:0"),
        ({"CLIP_DEVICE": "auto"}, ["--unset-env", "CLIP_DEVICE"], None),
    ],
)
def test_a_gpu_is_required_unless_somebody_chose_otherwise(api, command, own, words, device):
    api.add("heimdex-clip", env={VARIABLE: SECRET, **own})
    assert command("--image", IMAGE, *words)[0] == 0
    [endpoint] = api.endpoints.values()
    assert endpoint["env"].get("CLIP_DEVICE") == device


def test_an_endpoint_with_several_gpus_for_a_worker_gets_one(api, command):
    gpu = {"pools": ["ADA_24"], "count": 4, "allowedCudaVersions": []}
    api.add("heimdex-clip", env={VARIABLE: SECRET}, gpu=gpu)
    status, _, err = command("--image", IMAGE)
    [endpoint] = api.endpoints.values()
    assert (status, endpoint["gpu"]["count"]) == (0, 1)
    assert "had 4 GPUs per worker" in err


@pytest.mark.parametrize("existing", [True, False], ids=["update", "create"])
def test_several_gpus_for_a_worker_are_not_accepted(api, command, monkeypatch, existing):
    if existing:
        api.add("heimdex-clip", env={VARIABLE: SECRET})

    def keep_two(method, path, body):
        status, reply = RestApi.do(api, method, path, body)
        if method in ("POST", "PATCH"):
            reply = {**reply, "gpu": {**reply["gpu"], "count": 2}}
        return status, reply

    monkeypatch.setattr(api, "do", keep_two)
    status, out, err = command("--image", IMAGE)
    assert (status, out) == (1, "") and "has 2 GPUs per worker" in err
    assert all(body["gpu"]["count"] == 1 for _, _, body in api.changes())


def test_a_secret_that_runpod_inserts_is_kept_and_not_checked(api, command):
    own = {VARIABLE: "{{ RUNPOD_SECRET_clip }}", "EMBEDDING_HMAC_KEYS": "{{RUNPOD_SECRET_keys}}"}
    api.add("heimdex-clip", env={**own, "MAX_BATCH_SIZE": "{{ RUNPOD_SECRET_batch-1.b }}"})
    status, _, err = command("--image", IMAGE)
    [endpoint] = api.endpoints.values()
    assert status == 0 and endpoint["env"].items() >= own.items(), err


def test_an_exact_set_of_cuda_versions_is_replaced_by_the_lower_bound(api, command):
    api.add("heimdex-clip", env={VARIABLE: SECRET})
    command("--image", IMAGE)

    [endpoint] = api.endpoints.values()
    assert endpoint["gpu"]["allowedCudaVersions"] == []
    assert endpoint["gpu"]["minCudaVersion"] == "12.8"


def test_endpoints_of_other_names_are_not_touched(api, command, undeploy):
    for name in ["heimdex-clip-staging", "heimdex", "Heimdex-Clip", "x heimdex-clip"]:
        api.add(name, env={VARIABLE: SECRET})
    before = copy.deepcopy(api.endpoints)
    assert command("--image", IMAGE)[0] == 0
    assert undeploy("--yes")[0] == 0

    assert api.endpoints == before
    assert [method for method, _, _ in api.changes()] == ["POST", "DELETE"]


def test_of_two_endpoints_with_that_name_one_must_be_chosen(api, command):
    ids = [api.add("heimdex-clip", env={VARIABLE: SECRET}) for _ in range(2)]
    status, _, err = command("--image", IMAGE)
    assert (status, api.changes()) == (1, []) and all(i in err for i in ids)

    assert command("--image", IMAGE, "--endpoint-id", ids[1])[0] == 0
    assert [path for _, path, _ in api.changes()] == [f"/v2/serverless/{ids[1]}"]
    assert command("--image", IMAGE, "--endpoint-id", "another")[0] == 1


@pytest.mark.parametrize("fields", [{"type": "LOAD_BALANCER"}, {"gpu": None}, {"env": None}])
def test_an_endpoint_that_an_update_cannot_change_is_refused(api, command, fields):
    api.add("heimdex-clip", **{"env": {VARIABLE: SECRET}, **fields})
    status, _, err = command("--image", IMAGE)

    assert (status, api.changes()) == (1, []) and "[ERROR]" in err


# --- failures -----------------------------------------------------------------


@pytest.mark.parametrize("fault", ["lost", "503"])
def test_a_create_with_an_unknown_outcome_makes_no_second_endpoint(api, command, fault):
    api.faults = [("POST", fault)]
    status, out, _ = command("--image", IMAGE)

    [endpoint] = api.endpoints.values()
    assert status == 0
    assert exported(out)[VARIABLE] == endpoint["env"][VARIABLE]


def test_a_create_that_fails_each_time_ends_with_the_platforms_error(api, command):
    api.faults = [("POST", "503")] * 9
    status, out, err = command("--image", IMAGE)
    assert (status, out, len(api.changes())) == (1, "", 3) and "HTTP 503" in err
    assert api.pauses == [5.0, 5.0]  # in which the endpoint may appear in the list


def test_an_interrupted_create_is_completed_by_the_next_run(api, command):
    api.faults = [("POST", "lost")]
    original = deploy.find_endpoint
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deploy, "find_endpoint", interrupted)
        status, out, err = command("--image", IMAGE)
    assert (status, out) == (130, "") and "again" in err and len(api.endpoints) == 1

    status, out, _ = command("--image", IMAGE)
    assert status == 0 and len(api.endpoints) == 1
    assert VARIABLE not in exported(out)  # kept: a secret never changes by itself


@pytest.mark.parametrize("method", ["GET", "PATCH"])
@pytest.mark.parametrize("fault", ["lost", "500", "502", "503", "429"])
def test_safe_requests_are_repeated(api, command, method, fault):
    api.add("heimdex-clip", env={VARIABLE: SECRET})
    api.faults = [(method, fault)] * 3
    assert command("--image", IMAGE)[0] == 0


def test_a_rate_limit_is_waited_for(api, command):
    api.faults = [("POST", "429")]
    assert command("--image", IMAGE)[0] == 0
    assert api.pauses == [2]


def test_a_request_is_sent_four_times_at_most(api, command):
    api.faults = [("GET", "503")] * 9
    status, out, err = command("--image", IMAGE)
    assert (status, out, len(api.requests)) == (1, "", 4) and "HTTP 503" in err
    assert api.pauses == [1, 3, 9]


@pytest.mark.parametrize(
    "status, advice",
    [
        ("400", "limit"), ("401", "RUNPOD_API_KEY"), ("402", "credit"), ("403", "write"),
        ("404", "version 2"), ("422", "values"),
    ],
)  # fmt: skip
def test_an_error_has_advice_and_no_secret_that_the_platform_quotes(
    api, command, monkeypatch, status, advice
):
    monkeypatch.setenv(VARIABLE, SECRET)
    api.faults = [("POST", status)]
    code, out, err = command("--image", IMAGE)

    assert (code, out, len(api.changes())) == (1, "", 1)
    assert f"HTTP {status}" in err and advice in err and "something went wrong" in err
    assert SECRET not in err and KEY not in err and "(hidden)" in err


def test_an_error_does_not_quote_a_new_secret(api, command):
    api.faults = [("POST", "400")]
    _, out, err = command("--image", IMAGE)
    new_secret = api.changes()[0][2]["env"][VARIABLE]
    assert new_secret not in out + err


def test_the_accounts_limit_of_workers_is_reported(api, command):
    status, _, err = command("--image", IMAGE, "--workers-max", "11")
    assert status == 1 and "Max workers across all endpoints is 10" in err


def test_a_wrong_key_ends_the_run_at_the_first_request(api, command, monkeypatch):
    monkeypatch.setenv("RUNPOD_API_KEY", "rpa_another")
    status, _, err = command("--image", IMAGE)
    assert (status, len(api.requests)) == (1, 1) and "rpa_another" not in err


def test_a_netrc_does_not_replace_the_key(api, command, monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login someone password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    assert command("--image", IMAGE)[0] == 0
    assert {headers["Authorization"] for headers in api.headers} == {f"Bearer {KEY}"}


def test_an_unreachable_api_is_reported(api, command, monkeypatch):
    monkeypatch.setenv("RUNPOD_REST_URL", "http://127.0.0.1:1/v2")
    status, _, err = command("--image", IMAGE)
    assert status == 1 and "ConnectionError" in err and KEY not in err


# --- nothing is sent before everything is checked ------------------------------


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--image", "worker:latest"],
        ["--image", "worker"],
        ["--image", IMAGE, "--env", "LOG_LEVEL=loud"],
        ["--image", IMAGE, "--env", "LOGLEVEL=INFO"],
        ["--image", IMAGE, "--env", f"{VARIABLE}={SECRET}"],
        ["--image", IMAGE, "--env", "LOG_LEVEL=INFO", "--unset-env", "LOG_LEVEL"],
        ["--image", IMAGE, "--workers-min", "4"],
        ["--image", IMAGE, "--gpu-pools", ","],
        ["--image", IMAGE, "--scaler", "REQUEST_COUNT", "--idle", "30"],
        ["--image", IMAGE, "--scaler", "REQUEST_COUNT", "--queue-delay", "4"],
        ["--image", IMAGE, "--scaler-value", "4", "--queue-delay", "4"],
    ],
    ids=lambda words: " ".join(words)[-40:] or "no-image",
)
def test_wrong_usage_sends_nothing(api, command, words):
    status, out, err = command(*words)
    assert (status, out, api.requests) == (2, "", []) and err.startswith("[ERROR] ")
    assert SECRET not in err


@pytest.mark.parametrize(
    "name, value",
    [
        ("RUNPOD_API_KEY", ""),
        ("RUNPOD_API_KEY", "two words"),
        ("RUNPOD_API_KEY", "rpa_x\nHost: evil.example"),
        ("RUNPOD_REST_URL", "http://api.runpod.io/v2"),
        ("RUNPOD_REST_URL", "https://api.runpod.io@evil.example/v2"),
        (VARIABLE, "short"),
        (VARIABLE, "{{ RUNPOD_SECRET_clip }}"),
        (VARIABLE, "an-example-secret-of-32-bytes-ok"),
        ("EMBEDDING_HMAC_KEYS", "2026-11:{{ RUNPOD_SECRET_clip }}"),
        ("RUNPOD_API_KEY", "{{RUNPOD_SECRET_api}}"),
        ("RUNPOD_API_KEY", "<your-api-key>"),
        ("EMBEDDING_HMAC_KEYS", "v1:" + SECRET),
    ],
)
def test_a_wrong_environment_sends_nothing(api, command, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    status, _, err = command("--image", IMAGE)
    assert (status, api.requests) == (2, []) and name in err
    assert "evil" not in err or name == "RUNPOD_REST_URL"


V2_ONLY = ["--image", IMAGE, "--env", "AUTH_ACCEPT_V1=false"]
KEYS = "EMBEDDING_HMAC_KEYS"


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_worker_that_no_caller_could_use_is_not_deployed(api, command, monkeypatch, more):
    monkeypatch.setenv(VARIABLE, SECRET)
    status, out, err = command(*V2_ONLY, *more)
    assert (status, out, api.requests) == (2, "", [])
    assert err.startswith(f"[ERROR] {KEYS} is missing: AUTH_ACCEPT_V1=false refuses")


def test_no_secret_is_made_that_a_worker_would_refuse(api, command):
    status, out, err = command(*V2_ONLY)
    assert (status, out, api.changes()) == (2, "", []) and KEYS in err


def test_an_endpoint_with_the_secret_alone_keeps_accepting_version_1(api, command):
    api.add("heimdex-clip", env={VARIABLE: SECRET})
    status, _, err = command(*V2_ONLY)
    assert (status, api.changes()) == (2, []) and KEYS in err


def test_an_endpoint_loses_its_last_usable_key_by_no_update(api, command):
    api.add("heimdex-clip", env={VARIABLE: SECRET, KEYS: f"a:{SECRET}", "AUTH_ACCEPT_V1": "false"})
    status, _, err = command("--image", IMAGE, "--unset-env", KEYS)
    assert (status, api.changes()) == (2, []) and KEYS in err


@pytest.mark.parametrize("kept", [{}, {VARIABLE: SECRET}])
def test_an_endpoint_with_keys_may_stop_accepting_version_1(api, command, kept):
    api.add("heimdex-clip", env={KEYS: f"a:{SECRET}", **kept})
    status, out, _ = command(*V2_ONLY)
    [(method, _, body)] = api.changes()
    assert (status, method) == (0, "PATCH")
    expected = {KEYS: f"a:{SECRET}", "AUTH_ACCEPT_V1": "false", "CLIP_DEVICE": "cuda", **kept}
    assert body["env"] == expected
    assert f"# {KEYS}: one of those that the worker has" in out and SECRET not in out


def test_a_bad_variable_of_the_endpoint_is_reported_before_the_update(api, command):
    api.add("heimdex-clip", env={VARIABLE: SECRET, "MAX_BATCH_SIZE": "many"})
    status, _, err = command("--image", IMAGE)
    assert (status, api.changes()) == (2, []) and "MAX_BATCH_SIZE" in err


@pytest.mark.parametrize("number", ["-1", "1.5", "1e3", "", "3601", "٣"])
def test_numbers_outside_their_bounds_are_refused(command, number):
    with pytest.raises(SystemExit) as exit_info:
        command("--image", IMAGE, f"--idle={number}")
    assert exit_info.value.code == 2


def test_a_dry_run_sends_nothing_and_needs_no_key(api, command, undeploy, monkeypatch):
    monkeypatch.setenv(VARIABLE, SECRET)
    with_key = command("--image", IMAGE, "--dry-run")
    monkeypatch.delenv("RUNPOD_API_KEY")
    status, out, err = command("--image", IMAGE, "--dry-run")

    assert (status, err, api.requests) == (0, "", []) and with_key[1] == out
    assert SECRET not in out and KEY not in out
    assert undeploy("--dry-run")[0] == 0 and api.requests == []


def test_a_dry_run_prints_the_request_that_a_run_sends(api, command):
    _, out, _ = command("--image", IMAGE, "--env", "LOG_LEVEL=DEBUG", "--dry-run")
    command("--image", IMAGE, "--env", "LOG_LEVEL=DEBUG")
    [(_, _, sent)] = api.changes()

    printed, _ = json.JSONDecoder().raw_decode(out, out.index("{", out.index("POST ")))
    assert printed == {**sent, "env": {**sent["env"], VARIABLE: "(hidden)"}}


# --- undeploy -----------------------------------------------------------------


def test_undeploy_deletes_the_endpoint_once(api, command, undeploy):
    command("--image", IMAGE)
    assert undeploy("--yes")[0] == 0 and api.endpoints == {}
    status, _, err = undeploy("--yes")
    assert status == 0 and "no endpoint" in err


def test_undeploy_without_a_terminal_needs_yes(api, undeploy):
    api.add("heimdex-clip")
    status, _, err = undeploy()  # pytest's stdin is not a terminal
    assert (status, api.changes()) == (2, []) and "--yes" in err


@pytest.mark.parametrize("answer, count", [("y\n", 0), ("\n", 1), ("n\n", 1), ("", 1)])
def test_undeploy_deletes_only_after_a_yes(api, undeploy, monkeypatch, answer, count):
    class Terminal:
        isatty = staticmethod(lambda: True)
        readline = staticmethod(lambda: answer)

    monkeypatch.setattr(sys, "stdin", Terminal())
    api.add("heimdex-clip")
    status, _, _ = undeploy()
    assert (len(api.endpoints), status) == (count, count)


@pytest.mark.parametrize("fault", ["lost", "503", "404"])
def test_an_undeploy_whose_response_is_lost_succeeds(api, undeploy, fault):
    api.add("heimdex-clip")
    api.faults = [("DELETE", fault)]
    assert undeploy("--yes")[0] == 0
    assert len(api.endpoints) == (fault == "404")


def test_the_module_loads_no_heavy_library():
    code = (
        "import sys, heimdex_clip_worker.cli.deploy;"
        "print([m for m in ('torch', 'runpod', 'aiohttp', 'PIL') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stderr
