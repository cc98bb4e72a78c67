"""Write the generated parts of docs/: `make export` writes them, and a test holds them equal.

A generated part stands between two comments, so that the page also reads well without the site:

    <!-- generated: worker-variables -->
    ...
    <!-- end -->
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, is_typeddict

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DOCS = ROOT / "docs"
PUBLIC = ("client", "auth", "contract", "errors", "settings", "handler")
LONGEST_DEFAULT = 40  # characters; a longer one is shown as ...
BLOCK = re.compile(r"(<!-- generated: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head: str, rows: list[str]) -> str:
    """Write a table in Markdown; `head` and the rows are cells joined by ` | `."""
    rule = " | ".join("---" for _ in head.split(" | "))
    return "\n".join(f"| {row} |" for row in [head, rule, *rows])


def variables(name: str) -> str:
    """Write the table of the variables that settings.NAME declares."""
    from heimdex_clip_worker import settings

    return settings.environment_table(getattr(settings, name))


def error_codes() -> str:
    """Write the table of the worker's codes."""
    from heimdex_clip_worker.errors import error_table

    rows = []
    for code, cls in error_table().items():
        retry = "408, 425, 429, 5xx" if code == "SOURCE_HTTP" else "yes" if cls.retryable else "no"
        rows.append(f"`{code}` | {retry} | `{cls.message}`")
    return table("code | retryable | error", rows)


def caller_codes() -> str:
    """Write the table of the caller's codes."""
    from heimdex_clip_worker.errors import CALLER_CODES

    rows = [f"`{c}` | {'yes' if r else 'no'} | {what}" for c, (r, what) in CALLER_CODES.items()]
    return table("code | retryable | what happened", rows)


def exit_statuses() -> str:
    """Write the table of the command's exit statuses."""
    from heimdex_clip_worker.cli.main import _STATUSES

    rows = [f"{int(s)} | {w.replace('|', chr(92) + '|')}" for s, w in _STATUSES.items()]
    return table("exit status | meaning", rows)


def option_row(action: argparse.Action) -> str:
    """Write one option as a row: its names, its values and default, its help."""
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.dest.upper()}`"
    values = ""
    if action.nargs != 0:
        metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
        values = ", ".join(map(str, action.choices)) if action.choices else metavar
    default = action.default
    hidden = default in (None, False, "", [], argparse.SUPPRESS) or isinstance(default, Path)
    text = (action.help or "") % {**vars(action), "prog": "heimdex-clip"}
    cells = [names, values, "" if hidden else f"`{default}`", text]
    return " | ".join(cell.replace("\n", " ").replace("|", "\\|") for cell in cells)


def command_line() -> str:
    """Write a section for each command, from its parser."""
    from heimdex_clip_worker.cli import main

    parts = []
    for command in main._COMMANDS.values():
        parser = main._parser_of(command)
        actions = [a for a in parser._actions if a.help != argparse.SUPPRESS and a.dest != "help"]
        parts.append(f"## `{command.name}`\n\n{parser.description}")
        examples = "\n".join(f"heimdex-clip {example}" for example in command.examples)
        parts.append(f"```sh\n{examples}\n```")
        if actions:
            head = "option | value | default | meaning"
            parts.append(table(head, [option_row(action) for action in actions]))
    return "\n\n".join(parts)


def public_members(module: Any) -> Iterator[tuple[str, Any]]:
    """Yield name and object of what a module exports and defines itself."""
    for name in module.__all__:
        member = getattr(module, name)
        if callable(member) and getattr(member, "__module__", "") == module.__name__:
            yield name, member


def signature(name: str, function: Any) -> str:
    """Write a function's signature, a parameter a line if it is long, with its comments."""
    from fastcore.docments import docments

    parsed = inspect.signature(function)
    comments = docments(function, returns=True) or {}
    lines, star = [], False
    for key, parameter in parsed.parameters.items():
        if key in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            lines, star = [*lines, "    *,"], True
        comment = comments.get(key)
        if len(repr(parameter.default)) > LONGEST_DEFAULT:
            parameter = parameter.replace(default=...)
        text = str(parameter).replace("'", "").replace("Ellipsis", "...")
        lines.append(f"    {text}," + (f"  # {comment}" if comment else ""))
    returns = parsed.return_annotation
    arrow = "" if returns is inspect.Signature.empty else f" -> {str(returns).strip(chr(39))}"
    end = f"  # {comments['return']}" if comments.get("return") else ""
    body = "\n" + "\n".join(lines) + "\n" if lines else ""
    return f"{name}({body}){arrow}{end}"


def describe_class(name: str, cls: type) -> Iterator[str]:
    """Yield the blocks of a class: its docstring, its fields, and its public methods."""
    yield f"### `{name}`\n\n{inspect.cleandoc(cls.__doc__ or '')}"
    if is_typeddict(cls):
        yield f"```python\n{inspect.getsource(cls).strip()}\n```"
        return
    for key, member in vars(cls).items():
        function = getattr(member, "__func__", member)
        if key.startswith("_") or not inspect.isfunction(function):
            continue
        text = inspect.cleandoc(function.__doc__ or "")
        yield f"```python\n{signature(f'{name}.{key}', function)}\n```\n\n{text}"


def python_api() -> str:
    """Write the public modules: their functions and classes with signature and docstring."""
    parts = []
    for name in PUBLIC:
        module = importlib.import_module(f"heimdex_clip_worker.{name}")
        parts.append(f"## `{name}`\n\n{module.__doc__}")
        for key, member in public_members(module):
            if inspect.isclass(member):
                parts += describe_class(key, member)
            else:
                text = inspect.cleandoc(member.__doc__ or "")
                parts.append(f"### `{key}`\n\n```python\n{signature(key, member)}\n```\n\n{text}")
    return "\n\n".join(parts)


def guards() -> str:
    """Write the table of the guards, as the chapter on guards has it."""
    notebook = json.loads((ROOT / "nbs" / "06a_guards.ipynb").read_text(encoding="utf-8"))
    texts = ["".join(cell["source"]) for cell in notebook["cells"]]
    tables = [re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE) for text in texts]
    return "\n".join(part.strip() for found in tables for part in found)


def newest_figures() -> str:
    """Write the table of the newest benchmark on a CPU."""
    from benchmarks.figures import table_of

    files = (ROOT / "benchmarks" / "results").glob("*cores-*.json")
    results = json.loads(max(files, key=lambda path: path.name[-15:]).read_text(encoding="utf-8"))
    machine = results["machine"]
    head = f"{machine['cpu']}, {machine['cores']} cores, {results['date']}:"
    return f"{head}\n\n{table_of(results)}"


def vectors() -> str:
    """Write the table of what test_vectors.json holds."""
    data = json.loads((ROOT / "test_vectors.json").read_text(encoding="utf-8"))
    about = {
        "canonical": "a value, its canonical form, and the SHA-256 of that",
        "not_canonical": "JSON texts that must be refused",
        "v1": "a URL, a time, the message, and the signature of version 1",
        "v2": "an input, the message, and the signature of version 2",
        "verify": "a whole job, the worker's clock, and the worker's reply",
    }
    rows = [f"`{key}` | {len(data[key])} | {words}" for key, words in about.items()]
    return table("list | entries | each has", rows)


GENERATED: dict[str, Callable[[], str]] = {
    "worker-variables": partial(variables, "VARIABLES"),
    "caller-variables": partial(variables, "CLIENT_VARIABLES"),
    "deployment-variables": partial(variables, "_DEPLOYMENT"),
    "error-codes": error_codes,
    "caller-codes": caller_codes,
    "exit-statuses": exit_statuses,
    "command-line": command_line,
    "python-api": python_api,
    "guards": guards,
    "newest-figures": newest_figures,
    "test-vectors": vectors,
}


def fill(text: str) -> str:
    """Write the generated parts of a page anew."""
    return BLOCK.sub(lambda m: f"{m[1]}\n{GENERATED[m[2]]().strip()}\n\n{m[3]}", text)


def main() -> None:
    """Write every page that has a generated part."""
    for path in sorted(DOCS.rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        new = fill(text)
        if new != text:
            path.write_text(new, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
