"""The workflows: nothing unpinned, no readable secret, no missing target."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from local_worker import plain_env

from heimdex_clip_worker.errors import ModelError
from heimdex_clip_worker.settings import _DEPLOYMENT, VARIABLES

ROOT = Path(__file__).resolve().parents[2]
PATHS = sorted((ROOT / ".github" / "workflows").iterdir())
WORKFLOWS = {path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in PATHS}
NOTEBOOK = ROOT / "nbs" / "20_smoke_test.ipynb"


def steps() -> list[tuple[str, dict[str, Any]]]:
    """List every step with the name of its workflow."""
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
    """Read what starts a workflow; YAML reads the key `on` as true."""
    return WORKFLOWS[name][True]


def code(step: dict[str, Any]) -> list[list[str]]:
    """Split a step's commands into words, with continued lines joined."""
    text = step.get("run", "").replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.strip()]


def test_there_are_five_workflows():
    assert set(WORKFLOWS) == {"test.yml", "smoke.yml", "image.yml", "base.yml", "docs.yml"}


@each_workflow
def test_a_workflow_starts_only_on_its_events(name):
    expected = {
        "test.yml": {"push", "pull_request"},
        "smoke.yml": {"schedule", "workflow_dispatch"},
        "image.yml": {"push"},
        "base.yml": {"schedule", "workflow_dispatch"},
        "docs.yml": {"push", "workflow_dispatch"},
    }
    assert set(triggers(name)) == expected[name]  # so no pull_request_target, no workflow_run
    assert set(WORKFLOWS["image.yml"][True]["push"]) == {"tags"}


@each_workflow
def test_a_workflow_has_the_fewest_permissions(name):
    workflow = WORKFLOWS[name]
    assert workflow["permissions"] == {"contents": "read"}
    signing = {"id-token": "write", "attestations": "write"}
    more = {
        "image.yml": {"contents": "read", "packages": "write", **signing},
        "base.yml": {"contents": "write", "pull-requests": "write"},
        "docs.yml": {"contents": "write"},  # the branch of the published site
    }
    assert [job.get("permissions") for job in workflow["jobs"].values()] == [more.get(name)]


@each_workflow
def test_a_workflow_has_a_time_limit(name):
    jobs = WORKFLOWS[name]["jobs"].values()
    assert all(0 < job["timeout-minutes"] <= 90 for job in jobs)
    assert "concurrency" in WORKFLOWS[name]


@each_workflow
def test_a_workflow_names_its_runner(name):
    assert {job["runs-on"] for job in WORKFLOWS[name]["jobs"].values()} == {"ubuntu-24.04"}


@each_step
def test_an_action_is_pinned_by_its_commit_and_names_its_version(name, step):
    if "uses" not in step:
        return
    assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"])
    text = (ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8")
    assert re.search(re.escape(step["uses"]) + r" # v\d+\.\d+\.\d+$", text, re.MULTILINE)


def test_an_action_has_one_version():
    used = {step["uses"] for _, step in STEPS if "uses" in step}
    assert len({use.split("@")[0] for use in used}) == len(used)


@each_step
def test_no_credentials_stay_in_the_checkout(name, step):
    if step.get("uses", "").startswith("actions/checkout@"):
        assert step["with"] == {"persist-credentials": False}


@each_step
def test_no_expression_is_pasted_into_a_script(name, step):
    assert "${{" not in step.get("run", "")  # text from outside would be run


@each_workflow
def test_secrets_are_in_the_environment_of_single_steps_only(name):
    for job in WORKFLOWS[name]["jobs"].values():
        for step in job["steps"]:
            env = step.get("env", {})
            secret = {k for k, v in env.items() if "secrets." in str(v)}
            assert all(re.fullmatch(r"\$\{\{ secrets\.\w+ \}\}", env[k]) for k in secret)
            assert not secret or "run" in step  # never passed to an action
    text = json.dumps({k: v for k, v in WORKFLOWS[name].items() if k != "jobs"})
    outside = [{**job, "steps": []} for job in WORKFLOWS[name]["jobs"].values()]
    rest = [{**s, "env": {}} for j in WORKFLOWS[name]["jobs"].values() for s in j["steps"]]
    assert "secrets" not in text + json.dumps(outside) + json.dumps(rest)


@each_step
def test_a_secret_is_not_printed(name, step):
    secret = {k for k, v in step.get("env", {}).items() if "secrets." in str(v)}
    assert not (secret and re.search(r"set -\w*[xv]|\bprintenv\b|\bexport -p\b", step["run"]))
    for line in step.get("run", "").replace("\\\n", " ").splitlines():
        if any(re.search(rf"\$\{{?{k}\b", line) for k in secret):
            assert re.match(r"printf '%s' \"\$\w+\" \| docker login .*--password-stdin$", line)


@each_step
def test_a_script_is_valid(name, step):
    if "run" in step:
        checked = subprocess.run(["bash", "-n"], input=step["run"], text=True, timeout=10)
        assert checked.returncode == 0


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w./-]+):", makefile, re.MULTILINE))
    used = {word for _, step in STEPS for words in code(step) if words[0] == "make"
            for word in words[1:] if "=" not in word}  # fmt: skip
    assert {"test"} <= used <= targets


def papermill() -> tuple[dict[str, Any], list[str]]:
    """Find the step that runs the smoke test, and its words."""
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
    names = {words[i + 1] for i, word in enumerate(words) if word in ("-p", "-r")}
    assert {"endpoint_id", "n", "timeout_s", "storage"} <= names <= known
    assert words[1] == NOTEBOOK.relative_to(ROOT).as_posix()


def test_an_endpoint_id_stays_text():
    _, words = papermill()
    assert words[words.index("endpoint_id") - 1] == "-r"  # papermill reads -p 1e5 as a number


def test_the_notebook_is_kept_even_after_a_failure():
    _, words = papermill()
    [keep] = [s for _, s in STEPS if s.get("uses", "").startswith("actions/upload-artifact@")]
    kept = keep["with"]["path"].split()
    assert keep["if"] == "always()" and kept[0] == words[2]
    assert kept[1:] == [f"{words[words.index('pictures') + 1]}/"]  # the plots


def test_the_smoke_test_gets_its_variables():
    step, _ = papermill()
    known = {v.name for v in [*VARIABLES.values(), *_DEPLOYMENT.values()]}
    known |= {"SUPABASE_URL", "SUPABASE_BUCKET", "SUPABASE_SERVICE_ROLE_KEY"}
    parameters = {"ENDPOINT_ID", "N", "TIMEOUT_S"}
    assert step["env"].keys() - parameters <= known
    needed = {
        "RUNPOD_API_KEY", "EMBEDDING_HMAC_SECRET", "EMBEDDING_HMAC_KEYS", "AUTH_AUDIENCE",
        "SUPABASE_URL", "SUPABASE_BUCKET", "SUPABASE_SERVICE_ROLE_KEY",
    }  # fmt: skip
    assert needed <= step["env"].keys()
    hidden = {name for name in needed if re.search(r"SECRET|KEY", name)}
    for name in needed:
        store = "secrets" if name in hidden else "vars"
        assert step["env"][name] == f"${{{{ {store}.{name} }}}}"


def golden_step() -> dict[str, Any]:
    """Find the step that makes golden vectors."""
    [step] = [step for _, step in STEPS if "tools/golden.py" in step.get("run", "")]
    return step


def test_golden_vectors_are_kept_from_run_to_run():
    [cache] = [step for _, step in STEPS if step.get("uses", "").startswith("actions/cache@")]
    assert cache["with"]["path"] == "golden.json"
    assert golden_step()["if"] == f"steps.{cache['id']}.outputs.cache-hit != 'true'"
    key = cache["with"]["key"]
    for pattern in re.findall(r"'([^']+)'", key):  # what the vectors depend on
        assert list(ROOT.glob(pattern)), pattern
    package = ("heimdex_clip_worker/model/*.py", "heimdex_clip_worker/photos/*")
    assert all(f"'{path}'" in key for path in ("tools/golden.py", *package))


@pytest.mark.parametrize(
    ("status", "passes", "variable"), [(0, True, ""), (3, True, "GOLDEN=skip\n"), (1, False, "")]
)
def test_an_outage_of_the_model_hub_is_no_alarm(tmp_path, status, passes, variable):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    path = fake_commands(tmp_path / ".venv" / "bin", python=f"exit {status}")
    files = {name: str(tmp_path / name) for name in ("GITHUB_ENV", "GITHUB_STEP_SUMMARY")}
    for file in files.values():
        Path(file).touch()
    done = run_step(golden_step(), tmp_path, PATH=path, **files)
    assert (done.returncode == 0) is passes, done.stderr
    assert Path(files["GITHUB_ENV"]).read_text() == variable
    summary = Path(files["GITHUB_STEP_SUMMARY"]).read_text()
    assert bool(re.match(r"FAILED: .+ \.\.\. .+\n$", summary)) is not passes


@pytest.mark.model
def test_a_hub_that_does_not_answer_has_a_status_of_its_own(tmp_path, monkeypatch, capsys):
    golden = importlib.import_module("golden")
    file, error = str(tmp_path / "golden.json"), "CLIP_PRETRAINED='x' has another sha256"
    monkeypatch.setattr(golden, "golden", raising(ModelError(error)))
    assert golden.main([file]) == 1
    monkeypatch.undo()
    down, nothing = raising(OSError("down")), lambda *args: None
    monkeypatch.setattr("heimdex_clip_worker.model.weights._download", down)
    monkeypatch.setattr("heimdex_clip_worker.model.weights._cached_weights", nothing)
    assert golden.main([file]) == 3
    assert "https://huggingface.co" in capsys.readouterr().err and not Path(file).exists()


def raising(error: Exception) -> Callable[..., None]:
    """Make a function that raises an error."""

    def fail(*args: object, **options: object) -> None:
        raise error

    return fail


def test_its_note_says_that_schedules_can_stop():
    text = (ROOT / ".github" / "workflows" / "smoke.yml").read_text(encoding="utf-8")
    note = text.partition("name: smoke")[0]
    assert "60 days" in note and "schedules" in note


def image_steps() -> dict[str, dict[str, Any]]:  # by name, in their order
    """List the named steps of the image's workflow."""
    return {step["name"]: step for name, step in STEPS if name == "image.yml" and "name" in step}


def test_an_image_is_started_verified_and_scanned_before_it_is_pushed():
    names = list(image_steps())
    start = next(name for name in names if name.startswith("Start it"))
    verify = next(name for name in names if name.startswith("Verify"))
    order = [names.index(name) for name in ("Build", start, verify, "Scan", "Push")]
    assert order == sorted(order)
    scan = image_steps()["Scan"]
    assert scan["with"]["fail-build"] == "true" and scan["with"]["grype-version"][0] == "v"


def test_a_pushed_image_is_signed_with_a_provenance_and_an_sbom():
    steps, names = image_steps(), list(image_steps())
    after = ["Push", "Sign", "Attest the provenance", "Attest the SBOM", "Log out"]
    assert names[names.index("Push") :] == after
    assert [words[1] for words in code(steps["Sign"])] == ["sign", "verify"]
    assert all("$NAME@$DIGEST" in words for words in code(steps["Sign"]))  # never by a tag
    subject = {"subject-name": "${{ env.NAME }}", "subject-digest": "${{ env.DIGEST }}"}
    for name in ("Attest the provenance", "Attest the SBOM"):
        step = steps[name]
        assert step["uses"].startswith("actions/attest@")
        assert subject.items() <= step["with"].items()
        assert step["with"]["push-to-registry"] == "true"
    [sbom] = [step for step in steps.values() if "sbom-action" in step.get("uses", "")]
    assert sbom["with"]["image"] == "${{ env.IMAGE }}" and sbom["with"]["syft-version"][0] == "v"
    assert steps["Attest the SBOM"]["with"]["sbom-path"] == sbom["with"]["output-file"]
    assert not any("continue-on-error" in step for step in steps.values())


def fake_commands(folder: Path, **scripts: str) -> str:
    """Write commands that a step finds instead of the real ones; return the PATH."""
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


def run_step(step: dict[str, Any], folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a step's script as a runner does."""
    options = {"cwd": folder, "env": env, "capture_output": True, "text": True, "timeout": 20}
    return subprocess.run(["bash", "-e", "-c", step["run"]], **options)


CHECKS = ("this machine", "weights in use", "published values")


@pytest.mark.skipif(not shutil.which("jq"), reason="needs jq")
@pytest.mark.parametrize(
    ("said", "passes"),
    [
        (["OK", "OK", "OK"], True),
        (["OK", "OK", "skipped"], False),  # the photograph or the weights are others
        (["OK", "skipped", "OK"], False),
        (["OK", "OK", "FAILED"], False),
        (["OK", "OK"], False),
        ([], False),
    ],
)
def test_an_image_whose_vectors_are_not_verified_is_not_pushed(tmp_path, said, passes):
    checks = [{"name": name, "status": status} for name, status in zip(CHECKS, said, strict=False)]
    answer = json.dumps({"ok": "FAILED" not in said, "checks": checks})
    [step] = [step for name, step in image_steps().items() if name.startswith("Verify")]
    docker = f"printf '%s\\n' '{answer}'; exit {int('FAILED' in said)}"
    path = fake_commands(tmp_path, docker=docker)
    done = run_step(step, tmp_path, PATH=path, IMAGE="image")
    assert (done.returncode == 0) is passes, done.stdout + done.stderr


def test_the_verified_vectors_are_those_of_a_photograph_known_by_its_digest(tmp_path):
    [verify] = [step for name, step in image_steps().items() if name.startswith("Verify")]
    [words] = [words for words in code(verify) if words[0] == "docker"]
    photo = words[words.index("--image") + 1]
    assert words[words.index("heimdex-clip") + 1] == "verify" and "--json" in words
    assert words[words.index("--network") + 1] == "none"
    assert f"$PWD/photograph.jpg:{photo}:ro" in words
    [fetch] = [step for name, step in image_steps().items() if name.startswith("Fetch")]
    path = fake_commands(tmp_path, curl='while [ "$1" != --output ]; do shift; done; echo x > "$2"')
    right = "73cb3858a687a8494ca3323053016282f3dad39d42cf62ca4e79dda2aac7d9ac"  # of "x\n"
    assert run_step(fetch, tmp_path, PATH=path, SHA256=right).returncode == 0
    assert run_step(fetch, tmp_path, PATH=path, **fetch["env"]).returncode == 1


BASE = [step for name, step in STEPS if name == "base.yml" and "run" in step]


@pytest.mark.parametrize("newest", ["3.11.14", "3.11.15"])
def test_a_newer_base_is_proposed_by_its_digest(tmp_path, newest):
    digest, log = "ab" * 32, tmp_path / "docker.log"
    docker = f"""echo "$@" >> {log}
case "$*" in
*Config.Env*) printf 'PATH=/bin\nPYTHON_VERSION={newest}\nLANG=C.UTF-8\n';;
*RepoDigests*) echo python@sha256:{digest};;
esac"""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    (tmp_path / "Dockerfile").write_text(text, encoding="utf-8")
    env = {"PATH": fake_commands(tmp_path, docker=docker), "GITHUB_ENV": str(tmp_path / "env")}
    done = run_step(BASE[0], tmp_path, **env)
    assert done.returncode == 0, done.stderr
    assert log.read_text().splitlines()[0] == "pull --quiet python:3.11-slim-bookworm"
    image = f"python:{newest}-slim-bookworm@sha256:{digest}"
    changed = (tmp_path / "Dockerfile").read_text(encoding="utf-8")
    assert changed.splitlines()[5:7] == [f"ARG BASE_IMAGE={image}", ""]
    assert [a for a, b in zip(changed.splitlines(), text.splitlines(), strict=True) if a != b] == [
        f"ARG BASE_IMAGE={image}"
    ]
    assert (tmp_path / "env").read_text() == f"BASE={image}\n"


def test_a_base_without_a_version_or_a_digest_is_not_proposed(tmp_path):
    (tmp_path / "Dockerfile").write_text((ROOT / "Dockerfile").read_text(encoding="utf-8"))
    env = {"PATH": fake_commands(tmp_path, docker="true"), "GITHUB_ENV": str(tmp_path / "env")}
    assert run_step(BASE[0], tmp_path, **env).returncode != 0
    assert (tmp_path / "Dockerfile").read_text() == (ROOT / "Dockerfile").read_text()


@pytest.mark.parametrize(
    ("changed", "known", "last"),
    [(0, 0, "diff --quiet"), (1, 0, "ls-remote"), (1, 2, "push origin base-abc")],
)
def test_one_pull_request_is_opened_for_one_base(tmp_path, changed, known, last):
    git = f"""echo "git $@" >> {tmp_path}/log
case "$1" in diff) exit {changed};; ls-remote) exit {known};; esac"""
    path = fake_commands(tmp_path, git=git, gh=f'echo "gh $@" >> {tmp_path}/log')
    done = run_step(BASE[1], tmp_path, PATH=path, BASE="python:3.11.15-slim-bookworm@sha256:abc")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line for line in lines if line.startswith("git")][-1].startswith(f"git {last}")
    assert any(line.startswith("gh pr create") for line in lines) is (known == 2)


def test_newer_actions_are_proposed():
    text = (ROOT / ".github" / "dependabot.yml").read_text(encoding="utf-8")
    [update] = yaml.safe_load(text)["updates"]
    assert update["package-ecosystem"] == "github-actions" and update["directory"] == "/"


def test_the_tag_must_equal_the_version(tmp_path):
    [check] = [step for _, step in STEPS if "settings.ini" in step.get("name", "")]
    version = re.search(r"^version = (.+)$", (ROOT / "settings.ini").read_text(), re.MULTILINE)[1]
    env = {"PATH": "/usr/bin:/bin", "GITHUB_REPOSITORY": "Heimdex/Heimdex-CLIP-Worker"}
    for tag, status in {f"v{version}": 0, "v9.9.9": 1}.items():
        own = {**env, "GITHUB_REF_NAME": tag, "GITHUB_ENV": str(tmp_path / tag)}
        run = ["bash", "-e", "-c", check["run"]]
        done = subprocess.run(run, cwd=ROOT, env=own, capture_output=True, text=True, timeout=10)
        assert done.returncode == status, done.stderr
    written = (tmp_path / f"v{version}").read_text()
    assert written == f"IMAGE=ghcr.io/heimdex/heimdex-clip-worker:{version}\n"


@pytest.mark.model
@pytest.mark.process
@pytest.mark.parametrize("switch, status", [("on", 0), ("off", 1)])
def test_the_image_is_started_with_a_job_that_can_fail(tmp_path, switch, status):
    [words] = [words for _, step in STEPS for words in code(step) if "--test_input" in words]
    job = words[words.index("--test_input") :]
    env = {"EMBEDDING_HMAC_SECRET": "of-these-tests-4f1c9be27d03a856", "CLIP_SELFTEST": switch}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "fake_worker.py"), *job],
        env=plain_env(tmp_path, **env), cwd=tmp_path, capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
