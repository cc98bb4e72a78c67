"""The check of a GPU: on a CPU in its short form, and what becomes of a part that goes wrong."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from benchmarks import gpu, gpu_check, gpu_report
from benchmarks.gpu_check import PARTS, Check, Part
from heimdex_clip_worker.settings import Settings

pytestmark = [pytest.mark.model, pytest.mark.process]

ROOT = Path(__file__).resolve().parents[2]
NEEDS_A_GPU = {"out-of-memory"}


@pytest.mark.timeout(520)  # 45 s on a quiet machine
def test_the_short_form_runs_to_its_end_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_check", str(tmp_path), "--device", "cpu"]
    command += ["--short", "--seconds", "2000"]  # the limits are for a machine that is not busy
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    [path] = tmp_path.glob("*.json")
    results = json.loads(path.read_text(encoding="utf-8"))
    skipped = {name for name, part in results["parts"].items() if part["status"] == "skipped"}
    assert done.returncode == 0, done.stdout + (tmp_path / "check.log").read_text()[-3000:]
    assert results["parts"].keys() == PARTS.keys() and skipped >= NEEDS_A_GPU
    assert skipped <= NEEDS_A_GPU | {"watchdog"}
    page = path.with_suffix(".md").read_text(encoding="utf-8")
    assert [part.title for part in PARTS.values() if f"## {part.title}\n" not in page] == []
    assert len([*tmp_path.iterdir()]) <= 8 and not [*tmp_path.glob("*.part")]
    values = {name: part["values"] for name, part in results["parts"].items()}
    assert [test["name"] for test in values["tests"]["tests"]]  # `-m gpu` finds them
    assert {row["scheme"] for row in values["end-to-end"]["loads"]} == {"http", "https"}
    assert [way["way"] for way in values["gpu-path"]["ways"]] == ["all"]
    assert values["options"]["options"][0]["option"] == "graphs off"  # benchmarks.cuda_worker
    assert values["start"]["starts"][0]["steps"].keys() >= {"import", "load", "warm-up", "fit"}


# --- a part that goes wrong -------------------------------------------------------


def raises(found: gpu.Found) -> None:
    found.keep(before=1)
    raise ValueError("as planned")


def hangs(found: gpu.Found) -> None:
    child = subprocess.Popen(["sleep", "60"], start_new_session=True)  # as a worker is started
    found.keep(child=child.pid)
    time.sleep(60)


def dies(found: gpu.Found) -> None:
    os._exit(9)


def disagrees(found: gpu.Found) -> None:
    found.expect(False, "1 > 0 allowed")
    found.keep(after=2)


def skips(found: gpu.Found) -> None:
    raise gpu.Skipped("not here")


def succeeds(found: gpu.Found) -> None:
    found.row("rows", device=found.device, short=found.is_short)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Run these functions as parts; return the results on disk."""

    def run(*functions, total_s: float = 600.0) -> dict:
        limits = {hangs: 3}
        parts = {f.__name__: Part(f.__name__, limits.get(f, 60), f) for f in functions}
        monkeypatch.setattr(gpu_check, "PARTS", parts)
        monkeypatch.setattr(gpu_check, "TOTAL_S", 600.0)
        monkeypatch.setattr(gpu_report, "SECTIONS", dict.fromkeys(parts, gpu_report.facts))
        check = Check(tmp_path, "cpu", True)
        is_good = check.run(parts, total_s)
        results = json.loads(check.path.read_text(encoding="utf-8"))
        assert is_good == all(part["status"] != "failed" for part in results["parts"].values())
        return results["parts"]

    return run


def test_a_part_that_goes_wrong_does_not_stop_the_others(run, capsys) -> None:
    parts = run(raises, dies, disagrees, skips, succeeds)
    assert {name: part["status"] for name, part in parts.items()} == {
        "raises": "failed", "dies": "failed", "disagrees": "failed", "skips": "skipped",
        "succeeds": "done",
    }  # fmt: skip
    assert "ValueError: as planned" in parts["raises"]["error"]
    assert parts["raises"]["values"] == {"before": 1}
    assert parts["dies"]["error"] == "the process ended with 9"
    assert parts["disagrees"]["problems"] == ["1 > 0 allowed"]
    assert parts["disagrees"]["values"] == {"after": 2}
    assert parts["skips"]["reason"] == "not here"
    assert parts["succeeds"]["values"] == {"rows": [{"device": "cpu", "short": True}]}
    assert "1 > 0 allowed" in capsys.readouterr().out


def test_a_part_that_hangs_is_ended_with_the_workers_that_it_started(run, tmp_path) -> None:
    parts = run(hangs, succeeds)
    assert "not finished after 3 s" in parts["hangs"]["error"]
    assert 3 <= parts["hangs"]["seconds"] < 30 and parts["succeeds"]["status"] == "done"
    child = parts["hangs"]["values"]["child"]
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert "in hangs" in (tmp_path / "check.log").read_text()  # where it was


def test_a_result_is_on_disk_before_its_part_has_ended(tmp_path: Path) -> None:
    seen: list[dict] = []
    part = Part("hangs", 60, hangs)
    gpu_check.run_part(part, "cpu", True, 3.0, tmp_path / "log", seen.append)
    assert seen and seen[0]["status"] == "running" and "child" in seen[0]["values"]


def test_the_outcome_of_a_test_is_kept_before_the_next_one_ends(tmp_path, monkeypatch) -> None:
    text = "import os, pytest\ndef test_one(): pass\n@pytest.mark.parametrize('n', ['a b'])\n"
    text += "def test_two(n): assert 0\ndef test_three(): os._exit(3)\n"
    (tmp_path / "test_some.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    found = gpu.Found(tmp_path / "found.json", "cpu", False)
    command = [sys.executable, "-u", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-vv"]
    assert gpu.keep_lines(found, [*command, "test_some.py"]) == 3
    kept = json.loads(found.path.read_text(encoding="utf-8"))["values"]["tests"]
    assert kept == [
        {"name": "test_some.py::test_one", "outcome": "passed"},
        {"name": "test_some.py::test_two[a b]", "outcome": "failed"},
    ]


def test_a_part_without_time_is_skipped(run) -> None:
    parts = run(succeeds, total_s=5.0)
    assert (parts["succeeds"]["status"], parts["succeeds"]["reason"]) == ("skipped", "no time left")


def test_the_limits_fit_into_a_command_of_ten_minutes() -> None:
    assert gpu_check.TOTAL_S <= 570 and all(p.limit_s < 200 for p in PARTS.values())
    assert PARTS.keys() == gpu_report.SECTIONS.keys()


# --- the rest -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "visible", "left"),
    [("cuda:1", "", "1"), ("cuda:1", "4,GPU-7", "GPU-7"), ("cuda:2", "4,5", "-1"),
     ("cuda", "4,5", "4,5"), ("cpu", "", "")],
)  # fmt: skip
def test_a_gpu_that_is_named_is_made_the_only_one(monkeypatch, device, visible, left) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert gpu_check.hide_other_gpus(device) == device.partition(":")[0]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == left


def test_a_cell_that_only_another_machine_runs_can_be_compiled(request) -> None:
    explain = request.config.pluginmanager.getplugin(str(ROOT / "conftest.py")).ExplainAsserts
    count = 0
    for path in sorted(ROOT.glob("nbs/*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if re.match(r"#\| (gpu|weights|live)\b", source):
                shell = SimpleNamespace(source=source, names=[f"{path.name}::{cell['id']}"])
                tree = ast.fix_missing_locations(explain(shell).visit(ast.parse(source)))
                compile(tree, path.name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
                count += 1
    assert count > 0


def test_each_option_is_one_that_the_worker_accepts() -> None:
    secret = {"EMBEDDING_HMAC_SECRET": "0123456789abcdef-of-a-test"}
    options = gpu.options()
    assert len({option.name for option in options}) == len(options) > 8
    for option in options:
        if option.env.keys() <= gpu.known_variables():
            Settings.from_env(secret | option.env)  # raises
    assert options[0].env == options[-1].env == {}


def test_a_data_sheet_is_found_by_the_name_of_the_card() -> None:
    assert gpu.data_sheet_peak("NVIDIA H100 80GB HBM3", torch.float16) == 989e12
    assert gpu.data_sheet_peak("NVIDIA H100 PCIe", torch.float32) == 51e12
    assert gpu.data_sheet_peak("NVIDIA H100 NVL", torch.bfloat16) == 835e12
    assert gpu.data_sheet_peak("NVIDIA A100-SXM4-80GB", torch.float16) == 312e12
    assert gpu.data_sheet_peak("NVIDIA L40S", torch.float16) == 362e12
    assert gpu.data_sheet_peak("NVIDIA GeForce RTX 4090", torch.float32) == 82.6e12
    assert gpu.data_sheet_peak("NVIDIA L4", torch.bfloat16) == 121e12
    assert gpu.data_sheet_peak("NVIDIA B999", torch.float16) is None


def test_the_steps_of_a_start_are_read_from_the_log() -> None:
    line = (
        "[INFO] Fit to serve after 2.50s (import 1.00s, warm-up 0.50s): no golden, fp16 on cuda\n"
    )
    assert gpu.steps_of(line) == {"import": 1.0, "warm-up": 0.5, "fit": 2.5}
    assert gpu.steps_of("") == {}


def test_page_and_pictures_need_only_the_results(tmp_path: Path, monkeypatch, capsys) -> None:
    cpu_ms = dict.fromkeys(gpu_report.PARTS, 0.5)
    load = {"worker": "ours", "photos": "mix", "scheme": "http", "images": 1, "callers": 2,
            "images_per_s": 20.0, "cpu_ms": cpu_ms, "callers_cpu_ms": 0.2}  # fmt: skip
    row = {"precision": "fp32", "batch": 1, "images_per_s": 10.0, "on_device_images_per_s": 12.0,
           "share_of_gemm": 0.5, "share_of_peak": None, "vram_mb": None}  # fmt: skip
    decoding = {"photos": "mix", "one_thread_ms": 8.0, "threads": 16,
                "all_threads_images_per_s": 500.0}  # fmt: skip
    parts = {
        "encoding": {"title": "c", "status": "done", "values": {"encoding": [row]}},
        "end-to-end": {"title": "e", "status": "failed", "error": "Trace\nValueError: x",
                       "values": {"loads": [load, load | {"worker": "plain"}]}},
        "out-of-memory": {"title": "h", "status": "failed", "error": "not finished",
                          "values": {"starved": {"images": 128, "failed": 0}}},
        "cpu-time": {"title": "i", "status": "done", "values": {"decoding": [decoding]}},
    }  # fmt: skip
    results = {"machine": {}, "date": "2026-01-01", "form": "whole", "seconds": 9.0, "parts": parts}
    results["note"] = "Two runs, merged."
    path = tmp_path / "card-2026-01-01.json"
    path.write_text(json.dumps(results), encoding="utf-8")
    assert gpu_check.main([str(path), "--report"]) == 0
    made = ["card-2026-01-01-encoding.png", "card-2026-01-01-end-to-end.png"]
    assert sorted(file.name for file in tmp_path.glob("*.png")) == made
    page = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "**failed**: ValueError: x" in page and "| fp32" in page
    assert page.count("not finished") == 1 and "- starved: images 128, failed 0" in page
    assert "Two runs, merged." in page and "4.0 " in page.partition("times one thread")[2]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert gpu_report.write_all(results, path) == [path.with_suffix(".md")]
    assert "matplotlib is missing here" in capsys.readouterr().out


def test_the_benchmark_imports_open_clip_only_to_compare_with_it() -> None:
    modules = [p.stem for p in (ROOT / "benchmarks").glob("*.py")]
    others = [m for m in modules if m not in ("__init__", "baseline_worker", "good_worker", "turn")]
    code = "import importlib, sys; sys.path.insert(0, '.')\n"
    code += f"for name in {others}: importlib.import_module('benchmarks.' + name)\n"
    code += "print('open_clip' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_the_encoder_is_measured_without_open_clip_once_there_is_an_artifact() -> None:
    from benchmarks import kernels

    kernels.load(precision="fp32")  # writes it
    code = "import sys; sys.modules['open_clip'] = None\n"
    code += "from benchmarks import kernels; print(kernels.load(precision='fp32').dim)"
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.stdout == "512\n", done.stderr
