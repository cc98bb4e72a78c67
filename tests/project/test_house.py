"""Documents, notebooks and code agree, and the parts import only what they may."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from functools import cache
from pathlib import Path

import notebooks
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "heimdex_clip_worker"
NOTEBOOKS = sorted((ROOT / "nbs").glob("[!_]*.ipynb"))
NOT_EXPORTED = {"__init__.py", "_modidx.py"}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name not in NOT_EXPORTED)
README = ROOT / "README.md"
LINT_IMPORTS = str(Path(sys.executable).with_name("lint-imports"))

HEAVY = {"torch", "torchvision", "open_clip", "runpod", "aiohttp", "PIL"}
DEVELOPMENT_ONLY = {"fastcore", "execnb", "IPython", "nbdev", "pytest", "papermill", "nbformat"}
DISTRIBUTION = {  # by import name, where the two differ
    "PIL": "pillow",
    "open_clip": "open-clip-torch",
    "huggingface_hub": "huggingface-hub",
    "sklearn": "scikit-learn",
    "umap": "umap-learn",
    "httpx": "storage3",  # which raises its errors
}

# The fields of requests and replies.
REQUEST = ["image_url", "images", "text", "texts", "request_id", "normalize", "model"]
REQUEST += ["encoding_format", "auth", "ts", "sig"]
SUCCESS = ["embedding", "dim", "pretrained", "space_id", "normalized", "timings", "truncated"]
MANY = ["results", "count", "failed"]
TIMINGS = ["download_ms", "decode_ms", "queue_ms", "inference_ms", "total_ms"]
WIRE = REQUEST + SUCCESS + MANY + TIMINGS + ["error", "code", "retryable"]


@cache
def documents() -> str:
    """Join the README and the pages of the site."""
    paths = [README, *sorted((ROOT / "docs").rglob("*.md"))]
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


def name_of(path: Path) -> str:
    """Name a module within the package by dots, and another file by its stem."""
    if PACKAGE in path.parents:
        return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return path.stem


@cache
def config() -> dict[str, str]:
    """Read settings.ini."""
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


@cache
def code_cells(path: Path) -> list[tuple[str, str]]:
    """List id and source of a notebook's code cells."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [(c["id"], "".join(c["source"])) for c in cells if c["cell_type"] == "code"]


def exported_module(path: Path) -> str | None:
    """Read which module a notebook exports, if any."""
    text = "\n".join(source for _, source in code_cells(path))
    match = re.search(r"^#\|\s*default_exp\s+([\w.]+)", text, re.MULTILINE)
    return match[1] if match else None


def imports(path: Path) -> list[tuple[str, str, str]]:
    """List (module, name, function) for each import; "" for an import outside functions."""
    imported: list[tuple[str, str, str]] = []

    def visit(node: ast.AST, where: str) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            where = where or node.name
        if isinstance(node, ast.Import):
            imported.extend((alias.name, "", where) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            parents = [PACKAGE.name, *path.relative_to(PACKAGE).parts][: -node.level or None]
            parts = [*(parents if node.level else []), node.module]
            base = ".".join(part for part in parts if part)
            imported.extend((base, alias.name, where) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child, where)

    visit(ast.parse(path.read_text(encoding="utf-8")), "")
    return imported


def own_imports(path: Path) -> set[str]:
    """List the modules of the package that the module imports."""
    names = {name_of(module) for module in MODULES}
    own = set()
    for module, name, _ in imports(path):
        inner = module.removeprefix(PACKAGE.name).lstrip(".")
        if module.split(".")[0] == PACKAGE.name:
            own |= {inner, f"{inner}.{name}".lstrip(".")} & names
    return own


def other_imports(path: Path) -> set[str]:
    """List the packages that the module imports, without the standard library."""
    tops = {module.split(".")[0] for module, _, _ in imports(path)}
    return tops - set(sys.stdlib_module_names) - {PACKAGE.name, "__future__"}


# Notebooks and what is exported from them


def test_every_module_is_exported_from_a_notebook() -> None:
    assert {name_of(m) for m in MODULES} == {exported_module(n) for n in NOTEBOOKS} - {None}
    assert len(MODULES) > 30


def exported(package: Path) -> dict[str, str]:
    """Read each exported module of a package, by path."""
    modules = [path for path in package.rglob("*.py") if path.name not in NOT_EXPORTED]
    return {str(path.relative_to(package)): path.read_text("utf-8") for path in modules}


def test_the_package_is_what_the_notebooks_export(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".*"))
    shutil.copy(ROOT / "settings.ini", tmp_path)
    code = "import nbdev; nbdev.nbdev_export()"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)
    fresh, committed = exported(tmp_path / PACKAGE.name), exported(PACKAGE)
    assert sorted(fresh.keys() ^ committed.keys()) == [], "run `make export`"
    assert [name for name in fresh if fresh[name] != committed[name]] == [], "run `make export`"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_is_committed_clean(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text == notebooks.cleaned(text), "run `make export`"


@pytest.mark.parametrize("name", ["latencies.png", "health.svg"])
def test_a_picture_of_the_documents_is_small(name: str) -> None:
    data = (ROOT / "docs" / "images" / name).read_bytes()
    assert data.startswith((b"\x89PNG", b"<svg")) and len(data) < 100_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_cell_ids_are_words(path: Path) -> None:
    ids = [cell["id"] for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    assert len(ids) == len(set(ids))
    word = re.compile(r"(?![0-9a-f]{8}$)[a-z0-9]+(-[a-z0-9]+)*")
    assert [i for i in ids if not word.fullmatch(i) or len(i) > 64] == []


@pytest.mark.parametrize("path", [n for n in NOTEBOOKS if exported_module(n)], ids=name_of)
def test_a_notebook_has_the_usual_shape(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    assert sources[0].startswith("#| default_exp ")
    assert re.match(r"# .+\n\n> .+\n\n\S", sources[1])
    assert sources[-2].strip() == "## Export -"
    assert sources[-1].startswith("#| hide\n") and "nbdev_export()" in sources[-1]


def test_ruff_finds_nothing() -> None:
    ruff = [sys.executable, "-m", "ruff", "check", "--output-format", "concise", "."]
    done = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


# Imports


def test_the_parts_import_only_what_they_may() -> None:
    done = subprocess.run([LINT_IMPORTS], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_part_is_named_in_an_import_rule() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    rules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    named = {m for rule in rules["contracts"] for m in rule.get("source_modules", [])}
    tops = {f"{PACKAGE.name}.{name_of(module).split('.')[0]}" for module in MODULES}
    assert tops - named == set()


def test_the_client_imports_the_local_backend_only_when_it_opens_one() -> None:
    places = {where for m, n, where in imports(PACKAGE / "client.py") if "local" in (n, m[-5:])}
    assert places == {"_open_backend"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_nothing_for_development_and_no_star(path: Path) -> None:
    assert not other_imports(path) & DEVELOPMENT_ONLY
    assert "*" not in {name for _, name, _ in imports(path)}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_the_basic_modules_import_only_the_standard_library(path: Path) -> None:
    part = name_of(path).split(".")[0]
    light = {"errors", "auth", "contract", "settings", "_retry"}
    assert part not in light or not other_imports(path)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_imported_package_is_declared(path: Path) -> None:
    keys = ("requirements", "worker_requirements", "backfill_requirements")
    if name_of(path) == "ray":
        keys += ("ray_requirements",)
    if name_of(path).startswith("explore.") or name_of(path) == "cli.index":  # --plot
        keys += ("explore_requirements",)
    lines = "\n".join(config()[key] for key in keys).splitlines()
    declared = {Requirement(line).name.lower().replace("_", "-") for line in lines if line}
    declared.add("typing_extensions")  # for type checkers alone, which bring its types
    assert {DISTRIBUTION.get(name, name) for name in other_imports(path)} <= declared


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_runpod_is_imported_only_where_the_worker_starts(path: Path) -> None:
    places = {where for module, _, where in imports(path) if module.split(".")[0] == "runpod"}
    allowed = {"import_sdk", "print_sdk_help", "serve"}
    assert places <= (allowed if name_of(path) == "serving.process" else set())


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_settings_reads_the_environment(path: Path) -> None:
    names = {"environ", "environb", "getenv", "putenv"}
    tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    used = {n.attr for n in tree if isinstance(n, ast.Attribute)} & names
    used |= {name for module, name, _ in imports(path) if module == "os"} & names
    assert not used or path.stem == "settings"


def test_light_modules_stay_light() -> None:
    modules = ", ".join(f"{PACKAGE.name}.{name}" for name in ("errors", "auth", "settings"))
    heavy = sorted(HEAVY | DEVELOPMENT_ONLY | {"requests"})
    code = f"import sys, {modules}; print([m for m in {heavy} if m in sys.modules])"
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


# The documents are complete


def test_the_documents_name_every_environment_variable() -> None:
    from heimdex_clip_worker.settings import CLIENT_VARIABLES, VARIABLES

    names = {variable.name for variable in [*VARIABLES.values(), *CLIENT_VARIABLES.values()]}
    assert {"EMBEDDING_HMAC_SECRET", "CLIP_PRETRAINED", "RUNPOD_API_KEY"} <= names
    text = documents()
    assert sorted(name for name in names if f"`{name}`" not in text) == []


def test_the_documents_name_every_command() -> None:
    from heimdex_clip_worker.cli.main import _COMMANDS, _STATUSES

    text = documents()
    assert [name for name in _COMMANDS if f"`{name}`" not in text] == []
    assert [status for status in _STATUSES if f"| {status} |" not in text] == []


def test_the_documents_name_every_error_code() -> None:
    from heimdex_clip_worker.errors import CALLER_CODES, error_table

    text = documents()
    assert [code for code in [*error_table(), *CALLER_CODES] if f"`{code}`" not in text] == []


def test_the_documents_name_every_field_on_the_wire() -> None:
    text = documents()
    assert [field for field in WIRE if not re.search(rf"[`\"]{field}[`\"]", text)] == []


def test_every_field_on_the_wire_is_in_the_code() -> None:
    words: set[str] = set()
    for path in MODULES:
        tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        words |= {n.value for n in tree if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        words |= {n.arg for n in tree if isinstance(n, ast.keyword) and n.arg}
    assert [field for field in WIRE if field not in words] == []


def test_every_make_target_in_the_documents_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = set(re.findall(r"(?:^|`)make ([a-z-]+)", documents(), re.M))
    assert {"demo", "test"} <= used <= targets
