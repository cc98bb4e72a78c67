"""The figures and their goals; show them as a table, and write them as results."""

from __future__ import annotations

import json
import platform
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import psutil

from heimdex_clip_worker.serving.process import usable_cpus


@dataclass(frozen=True)
class Goal:
    """The unit of a figure, and the goal for its ratio, or for this worker's own number."""

    title: str
    unit: str
    limit: float | None = None  # of the ratio; None: shown without a goal
    at_least: bool = True  # else at most
    against: str = "baseline"
    own: bool = False  # True: the limit is for this worker's number, not for the ratio
    photos: str = ""  # "mix" or "thumbnails": the bound of what the worker gets is known

    def met(self, value: float) -> bool | None:
        """True if a ratio, or this worker's number, meets the goal; None if there is no goal."""
        if self.limit is None:
            return None
        return value >= self.limit if self.at_least else value <= self.limit

    def wanted(self) -> str:
        """Write the goal as the table shows it."""
        if self.limit is None:
            return ""
        sign = "≥" if self.at_least else "≤"
        if self.against == "GEMM":
            return f"{sign} {self.limit:.0%}"
        if self.own:
            return f"{sign} {self.limit:g}"
        return f"{sign} {self.limit:g}x"


MIX, THUMBNAILS = "mix", "thumbnails"
GOALS = {
    "singles": Goal("one-image jobs, 64 callers", "images/s", 25, photos=MIX),
    "batches": Goal("jobs of 32 images, 4 callers", "images/s", 35, photos=MIX),
    "singles-100ms": Goal("the first, image server waits 100 ms", "images/s", 25, photos=MIX),
    "batches-100ms": Goal("the second, image server waits 100 ms", "images/s", 35, photos=MIX),
    "https-mix": Goal("HTTPS, jobs of 32", "images/s", photos=MIX),
    "https-thumbs": Goal("HTTPS, jobs of 32 thumbnails", "images/s", photos=THUMBNAILS),
    "https-mix-20ms": Goal("HTTPS 20 ms away, jobs of 32", "images/s", photos=MIX),
    "https-thumbs-20ms": Goal(
        "HTTPS 20 ms away, jobs of 32 thumbnails", "images/s", photos=THUMBNAILS
    ),
    "https-singles": Goal("HTTPS, one-image jobs, 64 callers", "images/s", photos=MIX),
    "good-singles": Goal("HTTPS, one-image jobs", "images/s", against="good worker", photos=MIX),
    "good-thumbs": Goal(
        "HTTPS, one-image jobs, thumbnails", "images/s", against="good worker", photos=THUMBNAILS
    ),
    "https-lone": Goal(
        "HTTPS 20 ms away, lone request", "round trips", 1.3, at_least=False, own=True
    ),
    "https-connections": Goal(
        "HTTPS, jobs of 32: connections", "per image", 0.1, at_least=False, own=True
    ),
    "https-answering": Goal(
        "HTTPS, jobs of 32: CPU of the loop that answers", "ms/image", 0.6,
        at_least=False, against="", own=True,
    ),
    "https-fetching": Goal(
        "HTTPS, jobs of 32: CPU of fetching", "ms/image", 0.6,
        at_least=False, against="", own=True,
    ),
    "https-ceiling": Goal("one worker's ceiling, jobs of 32", "images/s", against=""),
    "https-ceiling-thumbs": Goal(
        "one worker's ceiling, jobs of 32 thumbnails", "images/s", against=""
    ),
    "fast-0ms": Goal("fast-accelerator stand-in, local server", "images/s", 6),
    "fast-50ms": Goal("the same, image server waits 50 ms", "images/s", 18),
    "fast-floats": Goal("fast-accelerator stand-in, vectors as floats", "images/s"),
    "lone": Goal("p50 of a lone request, idle worker", "s", 1, at_least=False),
    "start": Goal("process start to first reply", "s", 0.35, at_least=False),
    "memory": Goal("peak RSS under load, images only", "MB", 0.6, at_least=False),
    "encode": Goal("encode at batch 32, share of GEMM", "GFLOP/s", 0.7, against="GEMM"),
    "preprocess-1080p": Goal("preprocessing, 1080p", "images/s", 3, against="open_clip"),
    "preprocess-12mp": Goal("preprocessing, 12 MP", "images/s", 4, against="open_clip"),
    "json": Goal("JSON of 32 vectors, base64", "bytes", 0.3, at_least=False, against="floats"),
}  # fmt: skip


@dataclass
class Figure:
    """A figure, with its rounds as they were measured in turn."""

    name: str
    other: list[float] = field(default_factory=list)  # the baseline, or what the goal names
    ours: list[float] = field(default_factory=list)
    note: str = ""  # how it was measured
    by: str = "median"  # of the rounds; "max" for memory
    bound: float | None = None  # of both workers, in the figure's unit; None: not known

    def add(self, other: float | None, ours: float) -> None:
        """Add a round; None where there is nothing to compare with."""
        if other is not None:
            self.other.append(other)
        self.ours.append(ours)

    @property
    def goal(self) -> Goal:
        """The goal of this figure."""
        return GOALS[self.name]

    def middle(self, rounds: list[float]) -> float | None:
        """Reduce the rounds to one number; None if there are none."""
        if not rounds:
            return None
        return max(rounds) if self.by == "max" else median(rounds)

    @property
    def ratio(self) -> float | None:
        """This worker's number divided by the other; None if there is no other."""
        other = self.middle(self.other)
        return self.middle(self.ours) / other if other else None

    @property
    def met(self) -> bool | None:
        """True if the goal is met; None if there is no goal."""
        return self.goal.met(self.middle(self.ours) if self.goal.own else self.ratio)

    def share(self, rounds: list[float]) -> float | None:
        """Compute the share of the bound; None if it is not known."""
        return self.middle(rounds) / self.bound if self.bound and rounds else None

    def as_json(self) -> dict:
        """Convert the figure for the results file."""
        goal = {key: value for key, value in asdict(self.goal).items() if key != "title"}
        return {
            "title": self.goal.title,
            "other": self.middle(self.other),
            "ours": self.middle(self.ours),
            "ratio": self.ratio,
            "goal": goal,
            "met": self.met,
            "by": self.by,
            "rounds": {"other": self.other, "ours": self.ours},
            "note": self.note,
            "bound": self.bound,
            "shares": {"other": self.share(self.other), "ours": self.share(self.ours)},
        }

    def cells(self) -> list[str]:
        """Write the figure as a row of the table, its share of the bound last."""
        goal, ratio, other = self.goal, self.ratio, self.middle(self.other)
        shown = "" if ratio is None else f"{number(ratio)}x"
        return [
            goal.title,
            goal.unit,
            "" if other is None else f"{goal.against} {number(other)}",
            number(self.middle(self.ours)),
            f"{ratio:.0%}" if goal.against == "GEMM" else shown,
            goal.wanted(),
            {True: "yes", False: "NO", None: ""}[self.met],
            f"{self.share(self.ours):.0%}" if self.bound else "",
        ]


def number(value: float) -> str:
    """Write a number with three significant digits."""
    if value >= 1000:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f}"


def aligned(lines: list[list[str]]) -> str:
    """Write lines, the head first, as a Markdown table that is also readable on a terminal."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def table(figures: list[Figure]) -> str:
    """Write the figures as a table; it tells the shares of the bound if one of them is known."""
    head = ["figure", "unit", "against", "this worker", "ratio", "goal", "met", "of the bound"]
    lines = [head, *(figure.cells() for figure in figures)]
    if not any(figure.bound for figure in figures):
        lines = [line[:-1] for line in lines]
    return aligned(lines)


def table_of(results: dict) -> str:
    """Write the table of results that were kept."""
    figures = []
    for name, kept in results["figures"].items():
        rounds = kept["rounds"]
        same = (name, rounds["other"], rounds["ours"], kept["note"], kept["by"])
        figures.append(Figure(*same, bound=kept.get("bound")))
    return table(figures)


def cpu_name() -> str:
    """Look up the model of this machine's CPU."""
    info = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*: (.+)$", info.read_text(), re.M) if info.exists() else None
    return match[1].strip() if match else platform.processor() or platform.machine()


def machine() -> dict:
    """Describe what the figures depend on, and nothing that identifies the machine."""
    import torch

    about = {
        "cpu": cpu_name(),
        "cores": usable_cpus(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        about |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return about


def file_stem(where: dict) -> str:
    """Name the results of this machine and day."""
    words = where.get("gpu") or f"{where['cpu']} {where['cores']} cores"
    slug = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
    return f"{slug}-{time.strftime('%Y-%m-%d')}"


def write(path: Path, results: dict) -> None:
    """Write results as JSON, with six significant digits."""

    def rounded(value: object) -> object:
        if isinstance(value, float):
            return float(f"{value:.6g}")
        if isinstance(value, dict):
            return {key: rounded(item) for key, item in value.items()}
        return [rounded(item) for item in value] if isinstance(value, list) else value

    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rounded(results), indent=1, ensure_ascii=False)
    # Each list of numbers on one line, because people read the file too.
    text = re.sub(r"\[\s+([^\[\]{}\"]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    path.write_text(text + "\n", encoding="utf-8")
