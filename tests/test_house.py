"""Documents, notebooks and code say the same thing, and data flows one way."""

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
import readme
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "heimdex_clip_worker"
NOTEBOOKS = sorted((ROOT / "nbs").glob("[!_]*.ipynb"))
MODULES = sorted(path for path in PACKAGE.glob("*.py") if not path.name.startswith("_"))
README = ROOT / "README.md"

# Which modules of the package a module may import.
MAY_IMPORT = {
    "errors": set(),
    "settings": {"errors"},
    "auth": {"errors"},
    "download": {"errors"},
    "contract": {"errors"},
    "avif": {"errors"},
    "decode": {"errors", "avif"},
    "preprocess": {"errors"},
    "weights": {"errors"},
    "tower": {"errors"},
    "artifact": {"errors", "decode", "weights", "tower", "preprocess"},
    "embed": {"errors", "decode", "weights", "tower", "artifact", "preprocess"},
    "text": {"errors", "weights", "tower", "artifact", "embed"},
    "bake": {"errors", "weights", "tower", "artifact", "embed", "text"},
    "batch": {"errors", "download", "decode", "preprocess", "embed"},
    "selftest": {"errors", "contract", "artifact", "embed", "batch"},
    "handler": {
        "errors", "settings", "auth", "contract", "download", "decode", "weights", "artifact",
        "embed", "text", "batch", "selftest",
    },
    "jobs": set(),
    "processes": set(),
    "endpoint": {"errors", "auth", "settings"},
    "client": {"errors", "auth", "contract", "settings", "endpoint", "local"},
    "rows": set(),
    "tables": {"rows"},
    "postgres": {"rows"},
    "storage": {"rows"},
    "backfill": {
        "errors", "settings", "client", "contract", "rows", "tables", "postgres", "storage",
    },
    "deploy": {"errors", "settings"},
}  # fmt: skip
# These may import anything, the heavy things inside functions.
COMMANDS = {"demo", "platform", "local", "cli", "console", "request", "vectors", "embedding"}
COMMANDS |= {"search", "golden", "verify"}
BUILT = {"errors", "settings", "auth", "download", "decode", "weights", "embed", "handler", "demo"}
BUILT |= {"jobs", "processes", "platform"}
HEAVY = {"torch", "torchvision", "open_clip", "runpod", "aiohttp", "PIL"}
MAY_NOT_IMPORT = {
    "download": {"torch", "torchvision", "open_clip", "requests", "runpod"},
    "decode": {"torch", "torchvision", "open_clip", "requests", "runpod", "aiohttp"},
    "contract": HEAVY,
    "avif": HEAVY,
    "preprocess": {"torchvision", "requests", "aiohttp", "runpod"},
    "weights": {"requests", "aiohttp", "runpod"},
    "tower": {"torchvision", "requests", "aiohttp", "runpod"},
    "artifact": {"torchvision", "requests", "aiohttp", "runpod"},
    "text": {"requests", "aiohttp", "runpod"},
    "bake": {"torchvision", "requests", "aiohttp", "runpod"},
    "embed": {"requests", "aiohttp", "runpod"},
    "selftest": {"requests", "aiohttp", "runpod"},
    "endpoint": HEAVY,
    "client": HEAVY,
    "tables": HEAVY,
    "postgres": HEAVY,
    "storage": HEAVY,
    "backfill": HEAVY,
    "deploy": HEAVY,
}
STANDARD_LIBRARY_ONLY = {"errors", "auth", "contract", "settings", "avif", "rows"}
STANDARD_LIBRARY_ONLY |= {"jobs", "processes"}
DEVELOPMENT_ONLY = {"fastcore", "execnb", "IPython", "nbdev", "pytest", "papermill", "nbformat"}
DISTRIBUTION = {  # where the names differ
    "PIL": "pillow",
    "open_clip": "open-clip-torch",
    "huggingface_hub": "huggingface-hub",
    "httpx": "storage3",  # whose errors it raises
}

# The contract's words, of the request and of the replies.
REQUEST = ["image_url", "images", "text", "texts", "request_id", "normalize", "model"]
REQUEST += ["encoding_format", "auth", "ts", "sig"]
SUCCESS = ["embedding", "dim", "pretrained", "space_id", "normalized", "timings", "truncated"]
MANY = ["results", "count", "failed"]
TIMINGS = ["download_ms", "decode_ms", "queue_ms", "inference_ms", "total_ms"]
WIRE = REQUEST + SUCCESS + MANY + TIMINGS + ["error", "code", "retryable"]


def name_of(path: Path) -> str:
    """Return a test's name for `path`."""
    return path.stem


@cache
def config() -> dict[str, str]:
    """Return settings.ini."""
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


@cache
def code_cells(path: Path) -> list[tuple[str, str]]:
    """Return id and source of the code cells of a notebook."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [(c["id"], "".join(c["source"])) for c in cells if c["cell_type"] == "code"]


def exported_module(path: Path) -> str | None:
    """Return the module that the notebook at `path` writes, if it writes one."""
    text = "\n".join(source for _, source in code_cells(path))
    found = re.search(r"^#\|\s*default_exp\s+(\w+)", text, re.MULTILINE)
    return found[1] if found else None


def imports(path: Path) -> list[tuple[str, str, str]]:
    """Return (module, name, where) for each import: where is the function it stands in, or ""."""
    found: list[tuple[str, str, str]] = []

    def visit(node: ast.AST, where: str) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            where = where or node.name
        if isinstance(node, ast.Import):
            found.extend((alias.name, "", where) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [PACKAGE.name if node.level else "", node.module or ""]))
            found.extend((base, alias.name, where) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child, where)

    visit(ast.parse(path.read_text(encoding="utf-8")), "")
    return found


def own_imports(path: Path) -> set[str]:
    """Return the modules of this package that the module at `path` imports."""
    found = set()
    for module, name, _ in imports(path):
        top, _, rest = module.partition(".")
        if top == PACKAGE.name and (rest or name) != "__version__":
            found.add((rest or name).split(".")[0])
    return found - {""}


def other_imports(path: Path) -> set[str]:
    """Return the top-level packages, standard library aside, that the module imports."""
    tops = {module.split(".")[0] for module, _, _ in imports(path)}
    return tops - set(sys.stdlib_module_names) - {PACKAGE.name, "__future__"}


# Notebooks and what is written from them


def test_every_module_is_written_from_a_notebook() -> None:
    assert {m.stem for m in MODULES} == {exported_module(n) for n in NOTEBOOKS} - {None}
    assert {m.stem for m in MODULES} >= BUILT


def test_the_package_is_what_the_notebooks_export(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".*"))
    shutil.copy(ROOT / "settings.ini", tmp_path)
    code = "import nbdev; nbdev.nbdev_export()"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)
    fresh = {path.name: path.read_text("utf-8") for path in (tmp_path / PACKAGE.name).glob("*.py")}
    there = {path.name: path.read_text("utf-8") for path in PACKAGE.glob("*.py")}
    differ = {n for n in fresh.keys() | there.keys() if fresh.get(n) != there.get(n)}
    assert not differ - {"_modidx.py"}, "run `make export`"


def test_the_readme_is_the_index_notebook() -> None:
    assert README.read_text(encoding="utf-8") == readme.render(), "run `make readme`"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_is_committed_clean(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text == notebooks.cleaned(text), "run `make export`"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_cell_ids_are_words(path: Path) -> None:
    ids = [cell["id"] for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    assert len(ids) == len(set(ids))
    word = re.compile(r"(?![0-9a-f]{8}$)[a-z0-9]+(-[a-z0-9]+)*")
    assert [i for i in ids if not word.fullmatch(i) or len(i) > 64] == []


@pytest.mark.parametrize("path", [n for n in NOTEBOOKS if exported_module(n)], ids=name_of)
def test_a_notebook_has_the_shape_of_the_house(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    assert sources[0].startswith("#| default_exp ")
    assert re.match(r"# .+\n\n> .+\n\n\S", sources[1])
    assert sources[-2].strip() == "## Export -"
    assert sources[-1].startswith("#| hide\n") and "nbdev_export()" in sources[-1]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_an_exported_cell_fits_a_screen(path: Path) -> None:
    exported = [(i, s) for i, s in code_cells(path) if re.match(r"#\|\s*export", s)]
    assert [i for i, source in exported if len(source.splitlines()[1:]) > 40] == []


def test_ruff_is_content() -> None:
    ruff = [sys.executable, "-m", "ruff", "check", "--output-format", "concise", "."]
    done = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


# Data flows one way


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_only_what_comes_before_it(path: Path) -> None:
    if path.stem in COMMANDS:
        assert "handler" not in {n for m, n, where in imports(path) if not where}
        return
    assert path.stem in MAY_IMPORT, "add the module to the table"
    assert own_imports(path) <= MAY_IMPORT[path.stem]


def test_the_client_starts_the_worker_in_this_process_only_when_asked() -> None:
    places = {where for m, n, where in imports(PACKAGE / "client.py") if "local" in (n, m[-5:])}
    assert places == {"open_backend"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_keeps_to_its_libraries(path: Path) -> None:
    used = other_imports(path)
    assert not used & (DEVELOPMENT_ONLY | MAY_NOT_IMPORT.get(path.stem, set()))
    assert not (path.stem in STANDARD_LIBRARY_ONLY and used)
    assert "*" not in {name for _, name, _ in imports(path)}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_what_a_module_imports_is_declared(path: Path) -> None:
    keys = ("requirements", "worker_requirements", "backfill_requirements")
    lines = "\n".join(config()[key] for key in keys).splitlines()
    declared = {Requirement(line).name.lower().replace("_", "-") for line in lines if line}
    assert {DISTRIBUTION.get(name, name) for name in other_imports(path)} <= declared


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_runpod_is_imported_only_where_the_worker_starts(path: Path) -> None:
    places = {where for module, _, where in imports(path) if module.split(".")[0] == "runpod"}
    assert places <= ({"import_sdk", "main", "serve"} if path.stem == "handler" else set())


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_settings_reads_the_environment(path: Path) -> None:
    words = {"environ", "environb", "getenv", "putenv"}
    tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    used = {n.attr for n in tree if isinstance(n, ast.Attribute)} & words
    used |= {name for module, name, _ in imports(path) if module == "os"} & words
    assert not used or path.stem == "settings"


def test_light_modules_stay_light() -> None:
    modules = ", ".join(f"{PACKAGE.name}.{name}" for name in ("errors", "auth", "settings"))
    heavy = sorted(HEAVY | DEVELOPMENT_ONLY | {"requests"})
    code = f"import sys, {modules}; print([m for m in {heavy} if m in sys.modules])"
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


# The README forgets nothing


def test_the_readme_names_every_environment_variable() -> None:
    from heimdex_clip_worker.settings import CLIENT_VARIABLES, VARIABLES

    names = {variable.name for variable in [*VARIABLES.values(), *CLIENT_VARIABLES.values()]}
    assert {"EMBEDDING_HMAC_SECRET", "CLIP_PRETRAINED", "RUNPOD_API_KEY"} <= names
    text = README.read_text(encoding="utf-8")
    assert sorted(name for name in names if f"`{name}`" not in text) == []


def test_the_readme_names_every_command() -> None:
    from heimdex_clip_worker.cli import COMMANDS, STATUSES

    text = README.read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"`{name}`" not in text] == []
    assert [status for status in STATUSES if f"| {status} |" not in text] == []


def test_the_readme_names_every_error_code() -> None:
    from heimdex_clip_worker.errors import CALLER_CODES, error_table

    text = README.read_text(encoding="utf-8")
    assert [code for code in [*error_table(), *CALLER_CODES] if f"`{code}`" not in text] == []


def test_the_readme_names_every_field_on_the_wire() -> None:
    text = README.read_text(encoding="utf-8")
    assert [field for field in WIRE if not re.search(rf"[`\"]{field}[`\"]", text)] == []


def test_the_fields_on_the_wire_are_the_codes_own() -> None:
    said: set[str] = set()
    for path in MODULES:
        tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        said |= {n.value for n in tree if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        said |= {n.arg for n in tree if isinstance(n, ast.keyword) and n.arg}
    assert [field for field in WIRE if field not in said] == []


def test_every_make_target_in_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = set(re.findall(r"(?:^|`)make ([a-z-]+)", README.read_text(encoding="utf-8"), re.M))
    assert {"demo", "test"} <= used <= targets
