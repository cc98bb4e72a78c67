"""What can be said about the image without building it; `make image-test` builds it."""

from __future__ import annotations

import fnmatch
import re
import shlex
import subprocess
from configparser import ConfigParser
from functools import cache
from pathlib import Path

import pytest
from test_house import own_imports
from test_package import LOCKS, PYTHONS, pins

from heimdex_clip_worker.settings import VARIABLES, Settings, gpu_variables

pytestmark = pytest.mark.image

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "heimdex_clip_worker"


@cache
def instructions() -> list[tuple[str, str, str]]:  # (stage, INSTRUCTION, the rest)
    """Return the Dockerfile's instructions with the stage that each is in."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    found, stage = [], ""
    for line in filter(None, map(str.strip, text.replace("\\\n", " ").splitlines())):
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            stage = rest.split(" AS ")[1] if " AS " in rest else "the image"
        found.append((stage, word, " ".join(rest.split())))
    return found


def said(stage: str, word: str) -> list[str]:
    """Return the instructions of one kind in one stage."""
    return [rest for where, kind, rest in instructions() if (where, kind) == (stage, word)]


def copied(stage: str) -> list[str]:
    """Return what a stage copies out of the build's context."""
    lines = [rest.split() for rest in said(stage, "COPY") if not rest.startswith("--from")]
    return [source for line in lines for source in line[:-1]]


def environment() -> dict[str, str]:
    """Return the variables that the image sets, with the arguments at their defaults."""
    defaults = dict(rest.split("=") for rest in said("", "ARG"))
    pairs = [p.split("=", 1) for line in said("the image", "ENV") for p in shlex.split(line)]
    return {k: defaults.get(v.lstrip("$"), v) for k, v in pairs}


def let_in(path: str) -> bool:
    """Tell whether .dockerignore lets a path into the context: the last rule that fits decides."""
    allowed = True
    for rule in (ROOT / ".dockerignore").read_text().splitlines():
        if rule and not rule.startswith("#"):
            pattern = rule.lstrip("!")
            parts = path.split("/")
            above = ["/".join(parts[: n + 1]) for n in range(len(parts))]
            if any(fnmatch.fnmatch(p, pattern.removeprefix("**/")) for p in [*above, parts[-1]]):
                allowed = rule.startswith("!")
    return allowed


STAGES = ("packages", "checkpoint", "weights", "worker")


def test_what_the_build_copies_is_there_and_let_in() -> None:
    sources = [source for stage in STAGES for source in copied(stage)]
    assert len(sources) > 10
    assert [s for s in sources if not (ROOT / s).exists() or not let_in(s)] == []


@pytest.mark.parametrize("path", [".env", ".git/config", "tests/seeded.py", "nbs/x.ipynb", ".venv"])
def test_nothing_else_is_let_in(path: str) -> None:
    assert not let_in(path)


SECRETS = ["caller.env", ".env", ".env.local", "prod.env", "weights/caller.env", "weights/.env"]
SECRETS += ["heimdex_clip_worker/x.env", "heimdex_clip_worker/model/.env.production"]


@pytest.mark.parametrize("path", SECRETS)
def test_files_of_variables_reach_neither_the_image_nor_git(path: str) -> None:
    assert not let_in(path)
    ignored = ["git", "check-ignore", "--quiet", "--no-index", path]
    assert subprocess.run(ignored, cwd=ROOT, timeout=10).returncode == 0


def closure(module: str) -> set[str]:
    """Return a module of the package and all that it imports of it."""
    found, todo = set(), {module}
    while todo:
        name = todo.pop()
        found.add(name)
        todo |= own_imports(PACKAGE / f"{name.replace('.', '/')}.py") - found
    return found


@pytest.mark.parametrize(
    ("module", "stages"),
    [("model.weights", ["checkpoint"]), ("model.artifact", ["checkpoint", "weights"])],
)
def test_the_stages_that_bake_have_the_modules_they_need(module, stages) -> None:
    sources = [ROOT / source for stage in stages for source in copied(stage)]
    files = {path for source in sources for path in (source, *source.rglob("*.py"))}
    assert {path for path in files if path.suffix == ".py"} >= {
        PACKAGE / f"{name.replace('.', '/')}.py" for name in closure(module)
    }
    assert not [path for path in files if path.name in ("handler.py", "client.py", "settings.py")]


def test_the_layers_come_in_the_order_in_which_they_change() -> None:
    sources = [rest.split()[0] for rest in said("the image", "COPY")]
    assert sources == ["--from=runtime", "--from=weights", "--from=worker"]
    assert [c for c in copied("packages") if c != "requirements.txt"] == []


def test_the_base_is_a_slim_python_of_a_pinned_version() -> None:
    (base,) = [rest for rest in said("", "ARG") if rest.startswith("BASE_IMAGE=")]
    digest = r"@sha256:[0-9a-f]{64}"
    version = re.fullmatch(rf"BASE_IMAGE=python:(3\.\d+)\.\d+-slim-[a-z]+{digest}", base)
    assert version and version[1] in PYTHONS


def test_no_other_image_is_taken_from_a_registry() -> None:
    stages = {stage for stage, word, _ in instructions() if word == "FROM"}
    bases = [rest.split()[0] for _, word, rest in instructions() if word == "FROM"]
    assert set(bases) - stages == {"${BASE_IMAGE}"}


def test_the_build_pins_the_weights_in_both_stages_that_read_them() -> None:
    (load,) = [rest for rest in said("checkpoint", "RUN") if "model.weights" in rest]
    assert "load_pinned(*sys.argv[1:])" in load and load.endswith('"$CLIP_SHA256"')
    (bake,) = said("weights", "RUN")
    assert bake.endswith('--sha256 "$CLIP_SHA256"')
    assert "CLIP_SHA256=" in said("", "ARG")
    assert "CLIP_SHA256" in said("checkpoint", "ARG") and "CLIP_SHA256" in said("weights", "ARG")


def test_the_arguments_and_variables_are_the_workers_own() -> None:
    ours = {k: v for k, v in environment().items() if k.startswith("CLIP_")}
    variables = {variable.name: variable for variable in VARIABLES.values()}
    assert ours.keys() <= variables.keys()
    defaults = {"CLIP_MODEL_NAME", "CLIP_PRETRAINED", "CLIP_ACTIVATION"}
    assert {k: ours[k] for k in defaults} == {k: variables[k].default for k in defaults}


def test_the_image_asks_for_a_driver_of_nvidia() -> None:
    env = environment()
    assert env["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert env["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    assert gpu_variables(env) == []  # the image alone does not make a host one with a GPU


def test_a_worker_needs_a_secret_beside_what_the_image_says() -> None:
    env = environment()
    assert not [name for name in env if re.search("SECRET|KEY|TOKEN", name)]
    secret = "of-these-tests-4f1c9be27d03a856"
    settings = Settings.from_env({**env, "EMBEDDING_HMAC_SECRET": secret})
    assert settings.artifact_dir == "/opt/clip" and env["HF_HUB_OFFLINE"] == "1"


def test_the_image_runs_the_handler_as_somebody_without_privileges() -> None:
    assert said("the image", "USER") == ["worker"] and said("the image", "RUN") == []
    assert said("the image", "CMD") == ['["python", "-u", "-m", "heimdex_clip_worker.handler"]']
    assert (PACKAGE / "handler.py").is_file()


def test_what_is_left_out_is_in_the_lock_and_imported_by_nobody_here() -> None:
    (line,) = [rest for rest in said("runtime", "RUN") if "pip uninstall" in rest]
    names = line.split(" && ")[0].split("--yes ")[1].split()
    locked = {pin.name.lower() for pin in pins(LOCKS["worker"])} | {"pip"}
    assert {"triton", "cuda-bindings"} <= set(names) <= locked
    imported = re.compile(r"^\s*(import|from) (triton|cuda|pip|setuptools)\b", re.MULTILINE)
    assert [p.name for p in PACKAGE.rglob("*.py") if imported.search(p.read_text())] == []


def test_bytecode_is_hashed_and_never_checked() -> None:
    lines = [rest for _, word, rest in instructions() if word == "RUN" and "compileall" in rest]
    assert len(lines) == 3
    assert all("--invalidation-mode unchecked-hash" in line for line in lines)


def test_the_package_in_the_image_is_the_one_of_the_checkout() -> None:
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    assert PACKAGE.name == config["DEFAULT"]["lib_name"]
    assert "/build" in said("worker", "RUN")[0] and "heimdex_clip_worker" in copied("worker")
