"""JupyterLab on this machine, for tests that use a notebook in a browser."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import requests
import smoke
from browser import PROGRAM, Browser
from local_worker import free_port

__all__ = ["BUTTON", "FIND", "PANEL", "PROGRAM", "Browser", "lab", "notebook_in_browser"]

# JavaScript for elements of the exploration notebook.
FIND = "document.querySelector('input[placeholder^=\"a text\"]')"
PANEL = f"{FIND}.closest('.widget-vbox')"
BUTTON = "[...document.querySelectorAll('button')].find(e=>e.innerText.trim().startsWith('{}'))"

SETTINGS = {  # no question about news, and the theme of the browser
    "apputils-extension/notification.jupyterlab-settings":
        '{"fetchNews": "false", "checkForUpdates": false}',
    "apputils-extension/themes.jupyterlab-settings": '{"adaptive-theme": true}',
}  # fmt: skip


@contextlib.contextmanager
def lab(home: Path, *, options: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Run JupyterLab with the checkout's notebooks; yield its address and its token."""
    port, token = free_port(), secrets.token_hex(16)
    env = smoke.caller_env(home, OMP_NUM_THREADS="1", JUPYTER_CONFIG_DIR=str(home / "jupyter"))
    env |= {"JUPYTER_DATA_DIR": str(home / "jupyter-data"), "JUPYTER_TOKEN": token}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1"]
    command += [f"--port={port}", "--ServerApp.port_retries=0", "--allow-root", *options]
    settings = home / "jupyter/lab/user-settings/@jupyterlab"
    for name, text in SETTINGS.items():
        (settings / name).parent.mkdir(parents=True, exist_ok=True)
        (settings / name).write_text(text)
    with open(home / "lab.log", "w") as log:
        process = subprocess.Popen(command, env=env, cwd=smoke.ROOT, stdout=log, stderr=log,
                                   start_new_session=True)  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{url}/api?token={token}", timeout=5).ok:
                    break
            assert process.poll() is None and time.monotonic() < deadline, (
                (home / "lab.log").read_text()[-2000:]
            )
            time.sleep(0.2)
        yield url, token
    finally:
        with contextlib.suppress(requests.RequestException):
            requests.post(f"{url}/api/shutdown?token={token}", timeout=10)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait(10)


def make_lab_option() -> str:
    """Read the option with which `make lab` starts JupyterLab."""
    text = (smoke.ROOT / "Makefile").read_text(encoding="utf-8")
    match = re.search(r"^\t@\$\(BIN\)/jupyter lab (\S+) \$\(ARGS\)$", text, re.MULTILINE)
    assert match, "no recipe of `make lab`"
    return match[1]


@contextlib.contextmanager
def notebook_in_browser(
    notebook: Path, folder: Path, *, dark: bool = False
) -> Iterator[tuple[Browser, Path]]:
    """Open a copy of a notebook as `make lab` does and run it; yield browser and folder."""
    home, work = folder / "home", folder / "work"
    stored = smoke.CACHE / "home" / ".cache" / "heimdex-clip"  # the serving artifact
    for one in (stored, home / ".cache", work / "nbs"):
        one.mkdir(parents=True, exist_ok=True)
    (home / ".cache" / "heimdex-clip").symlink_to(stored)
    content = json.loads(notebook.read_text(encoding="utf-8"))
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = []
        if cell["id"] == "parameters":
            cell["source"] += [f"\npretrained = {str(smoke.checkpoint())!r}"]
    (work / "nbs" / notebook.name).write_text(json.dumps(content), encoding="utf-8")
    options = (make_lab_option(), f"--ServerApp.root_dir={work}")
    with lab(home, options=options) as (url, token), Browser(dark=dark) as tab:
        tab.open(f"{url}/?token={token}")  # the notebook is where this leads
        tab.wait("!!document.querySelector('.jp-Notebook .jp-Cell')", 90)
        run_all(tab)
        yield tab, work / "nbs"


def run_all(tab: Browser) -> None:
    """Choose Run All Cells in the menu, and wait until the last one is done."""
    all_ = "[...document.querySelectorAll('.lm-{}-item')]"
    item = all_ + ".find(e=>e.innerText.trim().startsWith('{}'))"
    tab.click("document.querySelector('.jp-Notebook .jp-Cell')")
    tab.wait("/Idle/.test(document.querySelector('#jp-main-statusbar')?.innerText)", 90)
    tab.click(item.format("MenuBar", "Run"))
    tab.wait("!!" + item.format("Menu", "Run All Cells"))
    tab.click(item.format("Menu", "Run All Cells"))
    tab.wait("document.querySelectorAll('.jp-Notebook iframe').length == 1", 200)
    tab.wait("document.body.innerText.includes('pictures/s together')", 100)
