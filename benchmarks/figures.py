"""The figures, their goals, and how they are shown and kept."""

from __future__ import annotations

import json
import platform
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import psutil

from heimdex_clip_worker.batch import usable_cpus


@dataclass(frozen=True)
class Goal:
    """What a figure is measured in, and what its ratio has to be."""

    title: str
    unit: str
    limit: float | None = None  # of the ratio; None: shown without a goal
    at_least: bool = True  # else at most
    against: str = "plain"

    def met(self, ratio: float) -> bool | None:
        """Tell whether a ratio is good enough; None when there is no goal."""
        if self.limit is None:
            return None
        return ratio >= self.limit if self.at_least else ratio <= self.limit

    def wanted(self) -> str:
        """Return the goal as the table shows it."""
        if self.limit is None:
            return ""
        sign = "≥" if self.at_least else "≤"
        if self.against == "GEMM":
            return f"{sign} {self.limit:.0%}"
        return f"{sign} {self.limit:g}x"


GOALS = {
    "singles": Goal("one-image jobs, 64 callers", "images/s", 25),
    "batches": Goal("jobs of 32 images, 4 callers", "images/s", 35),
    "singles-100ms": Goal("the first, origin answers after 100 ms", "images/s", 25),
    "batches-100ms": Goal("the second, origin answers after 100 ms", "images/s", 35),
    "fast-0ms": Goal("fast-accelerator stand-in, local server", "images/s", 6),
    "fast-50ms": Goal("the same, origin answers after 50 ms", "images/s", 18),
    "fast-floats": Goal("fast-accelerator stand-in, vectors as floats", "images/s"),
    "lone": Goal("p50 of a lone request, idle worker", "s", 1, at_least=False),
    "start": Goal("process start to first answer", "s", 0.35, at_least=False),
    "memory": Goal("peak RSS under load, images only", "MB", 0.6, at_least=False),
    "encode": Goal("encode at batch 32, share of GEMM", "GFLOP/s", 0.7, against="GEMM"),
    "preprocess-1080p": Goal("preprocessing, 1080p", "images/s", 3, against="open_clip"),
    "preprocess-12mp": Goal("preprocessing, 12 MP", "images/s", 4, against="open_clip"),
    "json": Goal("JSON of 32 vectors, base64", "bytes", 0.3, at_least=False, against="floats"),
}


@dataclass
class Figure:
    """A figure's rounds, as they were measured in turn."""

    name: str
    other: list[float] = field(default_factory=list)  # plain, or what the goal is against
    ours: list[float] = field(default_factory=list)
    note: str = ""  # how it was counted
    by: str = "median"  # of the rounds; "max" for memory

    def add(self, other: float, ours: float) -> None:
        """Add a round."""
        self.other.append(other)
        self.ours.append(ours)

    @property
    def goal(self) -> Goal:
        """Return what is wanted of this figure."""
        return GOALS[self.name]

    def middle(self, rounds: list[float]) -> float:
        """Return the one number that stands for the rounds."""
        return max(rounds) if self.by == "max" else median(rounds)

    @property
    def ratio(self) -> float:
        """Return ours in terms of the other."""
        return self.middle(self.ours) / self.middle(self.other)

    def as_json(self) -> dict:
        """Return all of it, for the results file."""
        goal = {key: value for key, value in asdict(self.goal).items() if key != "title"}
        return {
            "title": self.goal.title,
            "other": self.middle(self.other),
            "ours": self.middle(self.ours),
            "ratio": self.ratio,
            "goal": goal,
            "met": self.goal.met(self.ratio),
            "by": self.by,
            "rounds": {"other": self.other, "ours": self.ours},
            "note": self.note,
        }


def number(value: float) -> str:
    """Return a number with three digits that matter."""
    if value >= 1000:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f}"


def table(figures: list[Figure]) -> str:
    """Return the figures as a Markdown table, which is also what a terminal shows."""
    head = ["figure", "unit", "against", "this worker", "ratio", "goal", "met"]
    rows = []
    for figure in figures:
        goal, ratio = figure.goal, figure.ratio
        shown = f"{ratio:.0%}" if goal.against == "GEMM" else f"{number(ratio)}x"
        other = f"{goal.against} {number(figure.middle(figure.other))}"
        met = {True: "yes", False: "NO", None: ""}[goal.met(ratio)]
        ours = number(figure.middle(figure.ours))
        rows.append([goal.title, goal.unit, other, ours, shown, goal.wanted(), met])
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in lines
    )


def table_of(results: dict) -> str:
    """Return the table of results that were written before."""
    figures = []
    for name, told in results["figures"].items():
        rounds = told["rounds"]
        figures.append(Figure(name, rounds["other"], rounds["ours"], told["note"], told["by"]))
    return table(figures)


def cpu_name() -> str:
    """Return the model of this machine's CPU."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", info.read_text(), re.M) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def machine() -> dict:
    """Return what the figures depend on; nothing that tells whose machine it is."""
    import torch

    found = {
        "cpu": cpu_name(),
        "cores": usable_cpus(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def file_stem(where: dict) -> str:
    """Return the name under which results of this machine and day are kept."""
    words = where.get("gpu") or f"{where['cpu']} {where['cores']} cores"
    slug = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
    return f"{slug}-{time.strftime('%Y-%m-%d')}"


def write(path: Path, results: dict) -> None:
    """Write results as JSON, floats cut to what they are worth."""

    def rounded(value: object) -> object:
        if isinstance(value, float):
            return float(f"{value:.6g}")
        if isinstance(value, dict):
            return {key: rounded(item) for key, item in value.items()}
        return [rounded(item) for item in value] if isinstance(value, list) else value

    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rounded(results), indent=1, ensure_ascii=False)
    # Lists of numbers on one line each: the file is also read by people.
    text = re.sub(r"\[\s+([^\[\]{}\"]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    path.write_text(text + "\n", encoding="utf-8")
