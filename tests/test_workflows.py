"""What GitHub runs: nothing unpinned, no secret where it could be read, no missing target."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from local_worker import plain_env

from heimdex_clip_worker.settings import DEPLOYMENT, VARIABLES

ROOT = Path(__file__).resolve().parent.parent
PATHS = sorted((ROOT / ".github" / "workflows").iterdir())
WORKFLOWS = {path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in PATHS}
NOTEBOOK = ROOT / "nbs" / "20_smoke_test.ipynb"


def steps() -> list[tuple[str, dict[str, Any]]]:
    """Return every step with the name of its workflow."""
    return [
        (name, step)
        for name, workflow in WORKFLOWS.items()
        for job in workflow["jobs"].values()
        for step in job["steps"]
    ]


STEPS = steps()
IDS = [f"{name}-{step.get('name', step.get('uses', ''))}"[:60] for name, step in STEPS]
each_step = pytest.mark.parametrize("name, step", STEPS, ids=IDS)
each_workflow = pytest.mark.parametrize("name", WORKFLOWS)


def triggers(name: str) -> Any:
    """Return what starts a workflow; YAML reads the key `on` as true."""
    return WORKFLOWS[name][True]


def code(step: dict[str, Any]) -> list[list[str]]:
    """Return a step's commands as words, with continued lines joined."""
    text = step.get("run", "").replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.strip()]


def test_there_are_three():
    assert set(WORKFLOWS) == {"test.yml", "smoke.yml", "image.yml"}


@each_workflow
def test_what_starts_it(name):
    expected = {
        "test.yml": {"push", "pull_request"},
        "smoke.yml": {"schedule", "workflow_dispatch"},
        "image.yml": {"push"},
    }
    assert set(triggers(name)) == expected[name]  # so no pull_request_target, no workflow_run
    assert set(WORKFLOWS["image.yml"][True]["push"]) == {"tags"}


@each_workflow
def test_it_may_do_no_more_than_it_must(name):
    workflow = WORKFLOWS[name]
    assert workflow["permissions"] == {"contents": "read"}
    more = {"contents": "read", "packages": "write"} if name == "image.yml" else None
    assert [job.get("permissions") for job in workflow["jobs"].values()] == [more]


@each_workflow
def test_it_ends(name):
    jobs = WORKFLOWS[name]["jobs"].values()
    assert all(0 < job["timeout-minutes"] <= 90 for job in jobs)
    assert "concurrency" in WORKFLOWS[name]


@each_workflow
def test_its_runner_is_named(name):
    assert {job["runs-on"] for job in WORKFLOWS[name]["jobs"].values()} == {"ubuntu-24.04"}


@each_step
def test_an_action_is_pinned_by_its_commit_and_says_its_version(name, step):
    if "uses" not in step:
        return
    assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"])
    text = (ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8")
    assert re.search(re.escape(step["uses"]) + r" # v\d+\.\d+\.\d+$", text, re.MULTILINE)


def test_one_version_of_an_action():
    used = {step["uses"] for _, step in STEPS if "uses" in step}
    assert len({use.split("@")[0] for use in used}) == len(used)


@each_step
def test_no_credentials_stay_in_the_checkout(name, step):
    if step.get("uses", "").startswith("actions/checkout@"):
        assert step["with"] == {"persist-credentials": False}


@each_step
def test_no_expression_is_pasted_into_a_script(name, step):
    assert "${{" not in step.get("run", "")  # what somebody typed would be run


@each_workflow
def test_secrets_are_in_the_environment_of_one_step_alone(name):
    for job in WORKFLOWS[name]["jobs"].values():
        for step in job["steps"]:
            given = step.get("env", {})
            secret = {k for k, v in given.items() if "secrets." in str(v)}
            assert all(re.fullmatch(r"\$\{\{ secrets\.\w+ \}\}", given[k]) for k in secret)
            assert not secret or "run" in step  # not in the hands of somebody else's action
    text = json.dumps({k: v for k, v in WORKFLOWS[name].items() if k != "jobs"})
    outside = [{**job, "steps": []} for job in WORKFLOWS[name]["jobs"].values()]
    rest = [{**s, "env": {}} for j in WORKFLOWS[name]["jobs"].values() for s in j["steps"]]
    assert "secrets" not in text + json.dumps(outside) + json.dumps(rest)


@each_step
def test_a_secret_is_not_said_aloud(name, step):
    secret = {k for k, v in step.get("env", {}).items() if "secrets." in str(v)}
    assert not (secret and re.search(r"set -\w*[xv]|\bprintenv\b|\bexport -p\b", step["run"]))
    for line in step.get("run", "").replace("\\\n", " ").splitlines():
        if any(re.search(rf"\$\{{?{k}\b", line) for k in secret):
            assert re.match(r"printf '%s' \"\$\w+\" \| docker login .*--password-stdin$", line)


@each_step
def test_a_script_is_one(name, step):
    if "run" in step:
        checked = subprocess.run(["bash", "-n"], input=step["run"], text=True, timeout=10)
        assert checked.returncode == 0


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w./-]+):", makefile, re.MULTILINE))
    used = {word for _, step in STEPS for words in code(step) if words[0] == "make"
            for word in words[1:]}  # fmt: skip
    assert {"test"} <= used <= targets


def papermill() -> tuple[dict[str, Any], list[str]]:
    """Return the step that runs the smoke test, and its words."""
    [(step, words)] = [
        (step, words)
        for name, step in STEPS
        if name == "smoke.yml"
        for words in code(step)
        if words[0].endswith("papermill")
    ]
    return step, words


@pytest.mark.skipif(not NOTEBOOK.exists(), reason="there is no smoke test to run")
def test_the_smoke_tests_parameters_exist():
    _, words = papermill()
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    [cell] = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    nodes = ast.parse("".join(cell["source"])).body
    known = {n.targets[0].id for n in nodes if isinstance(n, ast.Assign)}
    given = {words[i + 1] for i, word in enumerate(words) if word in ("-p", "-r")}
    assert {"endpoint_id", "n", "timeout_s", "storage"} <= given <= known
    assert words[1] == NOTEBOOK.relative_to(ROOT).as_posix()


def test_an_id_stays_text():
    _, words = papermill()
    assert words[words.index("endpoint_id") - 1] == "-r"  # papermill reads -p 1e5 as a number


def test_the_notebook_is_kept_whatever_happens():
    _, words = papermill()
    [keep] = [s for _, s in STEPS if s.get("uses", "").startswith("actions/upload-artifact@")]
    assert keep["if"] == "always()" and keep["with"]["path"] == words[2]


def test_the_smoke_test_gets_the_variables_that_it_reads():
    step, _ = papermill()
    known = {v.name for v in [*VARIABLES.values(), *DEPLOYMENT.values()]}
    known |= {"SUPABASE_URL", "SUPABASE_BUCKET", "SUPABASE_SERVICE_ROLE_KEY"}
    parameters = {"ENDPOINT_ID", "N", "TIMEOUT_S"}
    assert step["env"].keys() - parameters <= known
    needed = {"RUNPOD_API_KEY", "EMBEDDING_HMAC_SECRET", "SUPABASE_SERVICE_ROLE_KEY"}
    assert needed <= step["env"].keys()


def test_an_image_is_started_and_scanned_before_it_is_pushed():
    names = [step.get("name") for name, step in STEPS if name == "image.yml"]
    start = next(name for name in names if name and name.startswith("Start it"))
    order = [names.index(name) for name in ("Build", start, "Scan", "Push")]
    assert order == sorted(order)
    [scan] = [step for _, step in STEPS if step.get("name") == "Scan"]
    assert scan["with"]["fail-build"] == "true" and scan["with"]["grype-version"][0] == "v"


def test_the_tag_is_held_to_the_version(tmp_path):
    [check] = [step for _, step in STEPS if "settings.ini" in step.get("name", "")]
    version = re.search(r"^version = (.+)$", (ROOT / "settings.ini").read_text(), re.MULTILINE)[1]
    env = {"PATH": "/usr/bin:/bin", "GITHUB_REPOSITORY": "Heimdex/Heimdex-CLIP-Worker"}
    for tag, status in {f"v{version}": 0, "v9.9.9": 1}.items():
        said = {**env, "GITHUB_REF_NAME": tag, "GITHUB_ENV": str(tmp_path / tag)}
        run = ["bash", "-e", "-c", check["run"]]
        done = subprocess.run(run, cwd=ROOT, env=said, capture_output=True, text=True, timeout=10)
        assert done.returncode == status, done.stderr
    written = (tmp_path / f"v{version}").read_text()
    assert written == f"IMAGE=ghcr.io/heimdex/heimdex-clip-worker:{version}\n"


@pytest.mark.parametrize("switch, status", [("on", 0), ("off", 1)])
def test_the_image_is_started_with_a_job_that_tells(tmp_path, switch, status):
    [words] = [words for _, step in STEPS for words in code(step) if "--test_input" in words]
    job = words[words.index("--test_input") :]
    said = {"EMBEDDING_HMAC_SECRET": "an-example-secret-of-32-bytes-ok", "CLIP_SELFTEST": switch}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "fake_worker.py"), *job],
        env=plain_env(tmp_path, **said), cwd=tmp_path, capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
