"""What the worker finds out about its host: CPUs, from planted files, and GPUs."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from heimdex_clip_worker import handler
from heimdex_clip_worker.errors import InferenceFailed, ModelError
from heimdex_clip_worker.model import image
from heimdex_clip_worker.serving import process

pytestmark = pytest.mark.model

V1 = "sys/fs/cgroup/cpu,cpuacct"
OF_V1 = "31 23 0:28 {root} {at} rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
OF_V2 = "31 23 0:28 {root} {at} rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n"


def v1(folder: str, quota: str, period: str = "100000") -> dict[str, str]:
    """Write the two files of a group of version 1."""
    texts = {"cpu.cfs_quota_us": quota, "cpu.cfs_period_us": period}
    return {f"{folder}/{name}": f"{text}\n" for name, text in texts.items()}


def v2(folder: str, text: str) -> dict[str, str]:
    """Write the file of a group of version 2."""
    return {f"{folder}/cpu.max": f"{text}\n"}


def own(cgroup: str, mounts: str = "") -> dict[str, str]:
    """Write what the kernel says about this process."""
    return {"proc/self/cgroup": cgroup, "proc/self/mountinfo": mounts}


NESTED = {
    **own("0::/pod/box\n", OF_V2.format(root="/", at="/sys/fs/cgroup")),
    **v2("sys/fs/cgroup/pod/box", "max 100000"),
}
HOSTS = {  # files, RUNPOD_CPU_COUNT, CPUs
    "nothing-is-known": ({}, "", 96),
    "v1-as-usual": (v1(V1, "765000"), "", 7),  # a published A40
    "v1-other-folder": (v1("sys/fs/cgroup/cpu", "765000"), "", 7),
    "v1-no-quota": (v1(V1, "-1"), "", 96),
    "v1-less-than-one": (v1(V1, "50000"), "", 1),
    "v1-other-period": (v1(V1, "200000", "50000"), "", 4),
    "v1-no-period": (v1(V1, "200000", "0"), "", 96),
    "v1-garbage": (v1(V1, "a lot"), "", 96),
    "v1-bytes": (v1(V1, "\x00\xff"), "", 96),
    "v1-path-of-the-host": (
        {
            **own("4:cpu,cpuacct:/docker/5b1\n", OF_V1.format(root="/docker/5b1", at=f"/{V1}")),
            **v1(V1, "300000"),
        },
        "", 3,
    ),
    "v1-own-group": (
        {
            **own("4:cpuacct,cpu:/docker/5b1\n", OF_V1.format(root="/", at="/cg/cpu")),
            **v1("cg/cpu/docker/5b1", "300000"), **v1("cg/cpu", "-1"),
        },
        "", 3,
    ),
    "v1-group-above": (
        {
            **own("4:cpu:/kubepods/pod7/box\n", OF_V1.format(root="/", at="/cg/cpu")),
            **v1("cg/cpu/kubepods/pod7", "400000"), **v1("cg/cpu/kubepods/pod7/box", "900000"),
        },
        "", 4,
    ),
    "v1-of-another-group": (
        {
            **own("4:cpu:/a\n", OF_V1.format(root="/", at="/cg/cpu")),
            **v1("cg/cpu/b", "100000"), **v1("cg/cpu/a", "500000"),
        },
        "", 5,
    ),
    "v2": (v2("sys/fs/cgroup", "765000 100000"), "", 7),
    "v2-no-quota": (v2("sys/fs/cgroup", "max 100000"), "", 96),
    "v2-garbage": (v2("sys/fs/cgroup", "7.5 1 x"), "", 96),
    "v2-empty": (v2("sys/fs/cgroup", ""), "", 96),
    "v2-zero": (v2("sys/fs/cgroup", "0 0"), "", 96),
    "v2-nested": ({**NESTED, **v2("sys/fs/cgroup/pod", "250000 100000")}, "", 2),
    "v2-outside-the-namespace": (
        {
            **own("0::/../../x\n", OF_V2.format(root="/", at="/cg")),
            **v2("cg", "600000 100000"),
        },
        "", 6,
    ),
    "both-versions": (v1(V1, "500000") | v2("sys/fs/cgroup", "300000 100000"), "", 3),
    "proc-is-garbage": (own("x\n::\n0\n\x00", "31 23\n - \n1 - cgroup2\n\x00"), "", 96),
    "relative-paths": (own("0::pod\n4:cpu:\n", OF_V2.format(root="?", at="cg")), "", 96),
    "runpod-says-so": ({}, "12", 12),
    "runpod-says-more": (v1(V1, "765000"), "16", 7),
    "runpod-says-less": (v1(V1, "765000"), "4.9", 4),
    "runpod-says-nonsense": ({}, "many", 96),
    "runpod-says-none": ({}, "0", 96),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTS)
def test_the_least_of_all_limits_counts(tmp_path: Path, monkeypatch, name: str) -> None:
    files, told, expected = HOSTS[name]
    for path, text in files.items():
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode("latin-1"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(96), raising=False)
    assert process.usable_cpus(tmp_path, {"RUNPOD_CPU_COUNT": told}) == expected


def test_an_affinity_is_a_limit(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert process.usable_cpus(tmp_path, {"RUNPOD_CPU_COUNT": "9"}) == 2


TORCH = """
import torch
torch.set_num_threads(5)
from heimdex_clip_worker.serving import process
process.tune()
print(torch.get_num_threads())
"""


@pytest.mark.parametrize(("told", "expected"), [("1", "1"), ("64", "cpus"), ("", "cpus")])
def test_torch_has_no_more_threads_than_there_are_cpus(told: str, expected: str) -> None:
    env = {**os.environ, "RUNPOD_CPU_COUNT": told}
    run = [sys.executable, "-c", TORCH]
    done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=60, check=True)
    cpus = str(min(5, process.usable_cpus(env={})))
    assert done.stdout.strip() == {"cpus": cpus}.get(expected, expected)


@pytest.mark.parametrize(
    ("count", "device", "told"),
    [(1, "cuda", False), (0, "cpu", False), (4, "cuda:1", True), (1, "cpu", True)],
)
def test_the_log_says_which_gpus_are_idle(monkeypatch, caplog, count, device, told) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    embedder = SimpleNamespace(model_name="m", pretrained="p", activation="gelu", device=device)
    worker = SimpleNamespace(pipeline=SimpleNamespace(embedder=embedder))
    monkeypatch.setattr(handler, "build", lambda settings, children: worker)
    caplog.set_level(logging.INFO, "heimdex_clip_worker")
    monkeypatch.setattr(logging.getLogger("heimdex_clip_worker"), "propagate", True)
    handler._load(SimpleNamespace(model_name="m", pretrained="p"))
    lines = [r.getMessage() for r in caplog.records if "GPUs visible" in r.getMessage()]
    expected = f"GPUs visible here: {count}. A worker uses {device} alone"
    assert [line.partition(";")[0] for line in lines] == [expected] * told


def test_a_device_that_fails_at_the_start_is_told_in_one_line(monkeypatch) -> None:
    def build(settings: object, children: object) -> None:
        raise InferenceFailed(detail="RuntimeError: CUDA error: out of memory")

    monkeypatch.setattr(handler, "build", build)
    with pytest.raises(ModelError) as caught:
        handler._load(SimpleNamespace(model_name="m", pretrained="p", device="cuda"))
    cause = "RuntimeError: CUDA error: out of memory"
    line = f"CLIP_DEVICE='cuda': the model does not run here ({cause}): take another host"
    assert str(caught.value) == line


def test_a_device_file_is_a_sign_of_a_gpu(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidiactl").touch()
    signs = process.gpu_signs(tmp_path, {"NVIDIA_VISIBLE_DEVICES": "all"})
    assert signs == ["/dev/nvidiactl"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    [line] = image.gpu_problems("auto", signs)
    assert "(/dev/nvidiactl) that torch cannot use" in line and "\n" not in line
    assert image.gpu_problems("cpu", signs) == image.gpu_problems("auto", []) == []
