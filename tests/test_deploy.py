"""Deployments against a server that holds requests to what RunPod's REST API documents."""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys

import pytest
from rest_api import CREATE, KEY, Refusal, RestApi, check

from heimdex_clip_worker import deploy
from heimdex_clip_worker.deploy import LEFT_OUT, POOLS, configuration, create_body
from heimdex_clip_worker.settings import VARIABLES

IMAGE = "registry.example/heimdex-clip-worker:0.1.0"
SECRET = "a-secret-for-deployments-of-32-b"
VARIABLE = "EMBEDDING_HMAC_SECRET"


@pytest.fixture
def api(monkeypatch):
    """Serve the API, and let this process's environment lead to it with a key and no secret."""
    for variable in VARIABLES.values():
        monkeypatch.delenv(variable.name, raising=False)
    monkeypatch.delenv("CLIP_WORKER_IMAGE", raising=False)
    monkeypatch.setattr(deploy.Api, "pauses_s", (0.0, 0.0, 0.0))
    with RestApi() as server:
        monkeypatch.setenv("RUNPOD_API_KEY", KEY)
        monkeypatch.setenv("RUNPOD_REST_URL", server.url)
        server.waits = []
        init = deploy.Api.__init__
        record = {"wait": server.waits.append, "timeout_s": (5, 5)}
        monkeypatch.setattr(deploy.Api, "__init__", lambda self, at: init(self, at, **record))
        yield server


@pytest.fixture
def command(api, capsys):
    """Run a command line; return its status, stdout and stderr."""

    def call(*words, add=deploy.add_arguments, do=deploy.run):
        parser = argparse.ArgumentParser()
        add(parser)
        status = do(parser.parse_args(words))
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def undeploy(command):
    """Run an `undeploy` command line."""
    return lambda *words: command(
        *words, add=deploy.add_undeploy_arguments, do=deploy.run_undeploy
    )


def exported(out: str) -> dict[str, str]:
    """Return the variables that a shell has after reading `out`."""
    script = f"set -eu\n{out}\nenv -0"
    done = subprocess.run(
        ["sh", "-c", script], capture_output=True, text=True, check=True, timeout=10,
        env={"PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    return dict(pair.split("=", 1) for pair in done.stdout.split("\0") if pair)


# The stand-in refuses what the API refuses


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
def test_the_stand_in_refuses(change):
    body = create_body("heimdex-clip", configuration(IMAGE), {VARIABLE: SECRET})
    check(body, CREATE, {})
    with pytest.raises(Refusal):
        check({**body, **change}, CREATE, {})


# Create


def test_a_first_run_creates_the_endpoint(api, command):
    status, out, err = command("--image", IMAGE, "--env", "LOG_LEVEL=DEBUG")

    [(method, path, body)] = api.changes()
    assert (status, method, path) == (0, "POST", "/v2/serverless")
    assert body["image"] == IMAGE and body["name"] == "heimdex-clip" and body["type"] == "QUEUE"
    assert body["workers"] == {"min": 0, "max": 3, "idleTimeout": 30}
    assert (body["timeout"], body["flashboot"]) == (60_000, "FLASHBOOT")
    assert body["gpu"]["pools"] == list(POOLS) and body["gpu"]["excludedTypes"] == list(LEFT_OUT)
    assert body["gpu"]["minCudaVersion"] == "12.8"
    assert body["env"].keys() == {"LOG_LEVEL", VARIABLE} and len(body["env"][VARIABLE]) == 64


@pytest.mark.parametrize(
    "words, pools, left_out",
    [
        (["--gpu-pools", "ADA_24"], ["ADA_24"], []),
        (["--gpu-pools", "ADA_48_PRO, AMPERE_80"], ["ADA_48_PRO", "AMPERE_80"], list(LEFT_OUT)),
        (["--gpu-exclude", ""], list(POOLS), []),
        (["--gpu-exclude", "NVIDIA L40"], list(POOLS), ["NVIDIA L40"]),
    ],
)
def test_other_gpus(api, command, words, pools, left_out):
    assert command("--image", IMAGE, *words)[0] == 0
    gpu = api.changes()[0][2]["gpu"]
    assert (gpu["pools"], gpu.get("excludedTypes", [])) == (pools, left_out)


def test_a_secret_made_here_is_shown_once_and_is_the_workers(api, command):
    _, out, err = command("--image", IMAGE)

    [endpoint] = api.endpoints.values()
    there = exported(out)
    assert there[VARIABLE] == endpoint["env"][VARIABLE]
    assert there["RUNPOD_CLIP_ENDPOINT_ID"] == endpoint["id"]
    assert there[VARIABLE] not in err and out.count(there[VARIABLE]) == 1
    _, out, err = command("--image", IMAGE)
    assert there[VARIABLE] not in out + err


def test_a_secret_from_the_environment_is_sent_and_not_shown(api, command, monkeypatch):
    monkeypatch.setenv(VARIABLE, SECRET)
    status, out, err = command("--image", IMAGE)

    [endpoint] = api.endpoints.values()
    assert (status, endpoint["env"]) == (0, {VARIABLE: SECRET})
    assert SECRET not in out + err and KEY not in out + err


# Again


def test_a_second_run_updates(api, command):
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


def test_variables_set_elsewhere_stay_until_they_are_removed(api, command):
    api.add("heimdex-clip", env={VARIABLE: SECRET, "ALLOW_HTTP": "false", "TEAM": "search"})
    command("--image", IMAGE, "--env", "LOG_LEVEL=DEBUG", "--unset-env", "ALLOW_HTTP")

    [endpoint] = api.endpoints.values()
    assert endpoint["env"] == {VARIABLE: SECRET, "TEAM": "search", "LOG_LEVEL": "DEBUG"}


def test_an_exact_set_of_cuda_versions_gives_way_to_the_floor(api, command):
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


def test_two_of_that_name_are_a_question(api, command):
    ids = [api.add("heimdex-clip", env={VARIABLE: SECRET}) for _ in range(2)]
    status, _, err = command("--image", IMAGE)
    assert (status, api.changes()) == (1, []) and all(i in err for i in ids)

    assert command("--image", IMAGE, "--endpoint-id", ids[1])[0] == 0
    assert [path for _, path, _ in api.changes()] == [f"/v2/serverless/{ids[1]}"]
    assert command("--image", IMAGE, "--endpoint-id", "another")[0] == 1


@pytest.mark.parametrize("fields", [{"type": "LOAD_BALANCER"}, {"gpu": None}, {"env": None}])
def test_what_an_update_cannot_change_is_refused(api, command, fields):
    api.add("heimdex-clip", **{"env": {VARIABLE: SECRET}, **fields})
    status, _, err = command("--image", IMAGE)

    assert (status, api.changes()) == (1, []) and "[ERROR]" in err


# Failures in the middle


@pytest.mark.parametrize("how", ["lost", "503"])
def test_a_create_that_may_have_happened_makes_no_second_endpoint(api, command, how):
    api.faults = [("POST", how)]
    status, out, _ = command("--image", IMAGE)

    [endpoint] = api.endpoints.values()
    assert status == 0
    assert exported(out)[VARIABLE] == endpoint["env"][VARIABLE]


def test_a_create_that_ended_without_an_answer_is_updated_by_the_next_run(api, command):
    api.faults = [("POST", "lost")]
    original = deploy.find
    calls = []

    def broken(*args):
        calls.append(args)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deploy, "find", broken)
        status, out, err = command("--image", IMAGE)
    assert (status, out) == (130, "") and "again" in err and len(api.endpoints) == 1

    status, out, _ = command("--image", IMAGE)
    assert status == 0 and len(api.endpoints) == 1
    assert VARIABLE not in exported(out)  # kept: a secret never changes by itself


@pytest.mark.parametrize("method", ["GET", "PATCH"])
@pytest.mark.parametrize("how", ["lost", "500", "502", "503", "429"])
def test_what_can_be_repeated_is(api, command, method, how):
    api.add("heimdex-clip", env={VARIABLE: SECRET})
    api.faults = [(method, how)] * 3
    assert command("--image", IMAGE)[0] == 0


def test_a_limited_rate_is_waited_for(api, command):
    api.faults = [("POST", "429")]
    assert command("--image", IMAGE)[0] == 0
    assert api.waits == [2]


def test_patience_ends(api, command):
    api.faults = [("GET", "503")] * 9
    status, out, err = command("--image", IMAGE)
    assert (status, out, len(api.requests)) == (1, "", 4) and "HTTP 503" in err


@pytest.mark.parametrize(
    "status, help",
    [
        ("400", "limit"), ("401", "RUNPOD_API_KEY"), ("402", "credit"), ("403", "write"),
        ("404", "version 2"), ("422", "values"),
    ],
)  # fmt: skip
def test_a_refusal_says_what_helps_and_hides_what_the_platform_quotes(
    api, command, monkeypatch, status, help
):
    monkeypatch.setenv(VARIABLE, SECRET)
    api.faults = [("POST", status)]
    code, out, err = command("--image", IMAGE)

    assert (code, out, len(api.changes())) == (1, "", 1)
    assert f"HTTP {status}" in err and help in err and "something went wrong" in err
    assert SECRET not in err and KEY not in err and "(hidden)" in err


def test_a_secret_made_here_is_not_quoted_either(api, command):
    api.faults = [("POST", "400")]
    _, out, err = command("--image", IMAGE)
    made = api.changes()[0][2]["env"][VARIABLE]
    assert made not in out + err


def test_the_limit_of_workers_is_named(api, command):
    status, _, err = command("--image", IMAGE, "--workers-max", "11")
    assert status == 1 and "Max workers across all endpoints is 10" in err


def test_a_wrong_key_ends_it_at_the_first_request(api, command, monkeypatch):
    monkeypatch.setenv("RUNPOD_API_KEY", "rpa_another")
    status, _, err = command("--image", IMAGE)
    assert (status, len(api.requests)) == (1, 1) and "rpa_another" not in err


def test_a_netrc_does_not_replace_the_key(api, command, monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login someone password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    assert command("--image", IMAGE)[0] == 0
    assert {head["Authorization"] for head in api.heads} == {f"Bearer {KEY}"}


def test_nobody_there(api, command, monkeypatch):
    monkeypatch.setenv("RUNPOD_REST_URL", "http://127.0.0.1:1/v2")
    status, _, err = command("--image", IMAGE)
    assert status == 1 and "ConnectionError" in err and KEY not in err


# Nothing is sent that was not checked


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
        ("EMBEDDING_HMAC_KEYS", "v1:" + SECRET),
    ],
)
def test_a_wrong_environment_sends_nothing(api, command, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    status, _, err = command("--image", IMAGE)
    assert (status, api.requests) == (2, []) and name in err
    assert "evil" not in err or name == "RUNPOD_REST_URL"


def test_a_variable_there_that_no_worker_starts_with_is_named_before_the_update(api, command):
    api.add("heimdex-clip", env={VARIABLE: SECRET, "MAX_BATCH_SIZE": "many"})
    status, _, err = command("--image", IMAGE)
    assert (status, api.changes()) == (2, []) and "MAX_BATCH_SIZE" in err


@pytest.mark.parametrize("number", ["-1", "1.5", "1e3", "", "3601", "٣"])
def test_numbers_are_held_to_their_bounds(command, number):
    with pytest.raises(SystemExit) as ended:
        command("--image", IMAGE, f"--idle={number}")
    assert ended.value.code == 2


def test_a_dry_run_sends_nothing_and_needs_no_key(api, command, undeploy, monkeypatch):
    monkeypatch.setenv(VARIABLE, SECRET)
    with_key = command("--image", IMAGE, "--dry-run")
    monkeypatch.delenv("RUNPOD_API_KEY")
    status, out, err = command("--image", IMAGE, "--dry-run")

    assert (status, err, api.requests) == (0, "", []) and with_key[1] == out
    assert SECRET not in out and KEY not in out
    assert undeploy("--dry-run")[0] == 0 and api.requests == []


def test_a_dry_run_prints_what_a_run_sends(api, command):
    _, out, _ = command("--image", IMAGE, "--env", "LOG_LEVEL=DEBUG", "--dry-run")
    command("--image", IMAGE, "--env", "LOG_LEVEL=DEBUG")
    [(_, _, sent)] = api.changes()

    printed, _ = json.JSONDecoder().raw_decode(out, out.index("{", out.index("POST ")))
    assert printed == {**sent, "env": {**sent["env"], VARIABLE: "(hidden)"}}


# Undeploy


def test_undeploy_deletes_the_endpoint_once(api, command, undeploy):
    command("--image", IMAGE)
    assert undeploy("--yes")[0] == 0 and api.endpoints == {}
    status, _, err = undeploy("--yes")
    assert status == 0 and "no endpoint" in err


def test_undeploy_asks_a_person(api, undeploy):
    api.add("heimdex-clip")
    status, _, err = undeploy()  # pytest's stdin is no terminal
    assert (status, api.changes()) == (2, []) and "--yes" in err


@pytest.mark.parametrize("answer, left", [("y\n", 0), ("\n", 1), ("n\n", 1), ("", 1)])
def test_undeploy_does_what_the_person_says(api, undeploy, monkeypatch, answer, left):
    class Terminal:
        isatty = staticmethod(lambda: True)
        readline = staticmethod(lambda: answer)

    monkeypatch.setattr(sys, "stdin", Terminal())
    api.add("heimdex-clip")
    status, _, _ = undeploy()
    assert (len(api.endpoints), status) == (left, left)


@pytest.mark.parametrize("how", ["lost", "503", "404"])
def test_an_undeploy_cut_short_comes_to_its_end(api, undeploy, how):
    api.add("heimdex-clip")
    api.faults = [("DELETE", how)]
    assert undeploy("--yes")[0] == 0
    assert len(api.endpoints) == (how == "404")


def test_it_is_light():
    code = (
        "import sys, heimdex_clip_worker.deploy;"
        "print([m for m in ('torch', 'runpod', 'aiohttp', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
