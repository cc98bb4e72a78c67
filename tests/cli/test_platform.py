"""`heimdex-clip platform` as a user runs it: real workers, a caller's variables, both signals."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import requests
from local_worker import is_alive, plain_env

from heimdex_clip_worker.cli.main import main
from heimdex_clip_worker.cli.platform import lines_for_callers
from heimdex_clip_worker.emulator.server import EmulatorServer

pytestmark = pytest.mark.process

SDK = str(Path(__file__).parents[1] / "sdk_worker.py")
COMMAND = [sys.executable, "-m", "heimdex_clip_worker.cli.main", "platform"]


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_it_prints_what_a_caller_needs_and_ends_cleanly(tmp_path, number, code):
    command = [*COMMAND, "--env", "LOG_LEVEL=DEBUG", "--", sys.executable, SDK]
    env = {k: v for k, v in plain_env(tmp_path).items() if k != "EMBEDDING_HMAC_SECRET"}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            exports = {}
            for line in process.stdout:
                if match := re.fullmatch(r"export (\w+)=(\S+)\n", line):
                    exports[match[1]] = match[2]
                if "Ctrl-C" in line:
                    break
            url = f"{exports['RUNPOD_BASE_URL']}/{exports['RUNPOD_CLIP_ENDPOINT_ID']}"
            key = {"Authorization": f"Bearer {exports['RUNPOD_API_KEY']}"}
            options = {"json": {"input": {"echo": "hi"}}, "headers": key, "timeout": 60}
            with requests.Session() as http:
                http.trust_env = False
                response = http.post(f"{url}/runsync?wait=50000", **options)
            output = response.json()["output"]
            assert output["echo"] == "hi" and len(exports["EMBEDDING_HMAC_SECRET"]) == 64
            process.send_signal(number)
            remaining_lines = process.stdout.read()
            assert process.wait(15) == code
        finally:
            process.kill()
    assert "pod-1 | " in remaining_lines and not is_alive(output["pid"])


def test_a_secret_from_the_environment_is_not_printed():
    with EmulatorServer() as server:
        lines = lines_for_callers(server, None)
    assert "export EMBEDDING" not in lines and f"RUNPOD_API_KEY={server.api_key}" in lines


@pytest.mark.timeout(300)
def test_without_weights_it_ends_and_names_random_ones(tmp_path):
    env = plain_env(tmp_path, HF_HOME=str(tmp_path / "hub"), CLIP_DEVICE="cpu")
    result = subprocess.run(COMMAND, env=env, capture_output=True, text=True, timeout=280)
    assert result.returncode == 1 and result.stdout.count("Cannot start") == 1
    assert "add --seeded FOLDER" in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["--env", "x"], ["--workers", "-1"], ["--port", "70000"], ["--workers-min", "2"],
        ["--scaler", "REQUEST_COUNT", "--scaler-value", "0"], ["--idle", "-1"],
        ["--cold-start", "nan"], ["--execution", "1"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage_is_status_2(words, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["platform", *words])
    assert exit_info.value.code == 2
    assert "[ERROR]" in capsys.readouterr().err


def test_a_port_in_use_is_status_1_and_an_error_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(SystemExit) as exit_info:
            main(["platform", "--workers", "0", "--port", str(port)])
    assert exit_info.value.code == 1
    assert capsys.readouterr().err.startswith("[ERROR] The local platform failed: ")


def test_its_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["platform", "--help"])
    assert "heimdex-clip platform --workers 2" in capsys.readouterr().out
