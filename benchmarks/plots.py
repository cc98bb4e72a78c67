"""Draw two pictures of a run: images/s by number of callers, and the callers' latency."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from benchmarks.workers import BASELINE, OURS  # noqa: E402

COLOURS = {BASELINE: "#8c8c8c", OURS: "#1a5fb4"}
NAMES = {BASELINE: "baseline worker", OURS: "this worker"}
PERCENTILES = {50: ("o", 1), 90: ("D", 10), 99: ("|", 100)}  # marker; fewest jobs to show it
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
}


def by_callers(points: list[dict]) -> dict[int, dict]:
    """Merge the runs with the same number of callers: the median rate, and all latencies."""
    runs: dict[int, list[dict]] = defaultdict(list)
    for point in points:
        runs[point["callers"]].append(point)
    return {
        callers: {
            "images_per_s": float(np.median([run["images_per_s"] for run in same])),
            "latencies_s": [value for run in same for value in run["latencies_s"]],
        }
        for callers, same in sorted(runs.items())
    }


def throughput(axes: Axes, results: dict) -> None:
    """Draw images/s by callers on logarithmic axes; jobs of 32 images are a single point."""
    for kind in (OURS, BASELINE):
        points = by_callers(results["curves"][kind])
        rates = [point["images_per_s"] for point in points.values()]
        axes.plot([*points], rates, "o-", color=COLOURS[kind], lw=2, label=NAMES[kind])
        axes.annotate(
            f"{rates[-1]:.3g}", ([*points][-1], rates[-1]), xytext=(8, 0),
            textcoords="offset points", va="center", color=COLOURS[kind], weight="bold",
        )  # fmt: skip
    batches = results["figures"].get("batches")
    if batches:
        label = f"{NAMES[OURS]}, jobs of 32 images"
        axes.plot(4, batches["ours"], "*", ms=14, color="#c64600", label=label)
        axes.annotate(
            f"{batches['ours']:.3g}", (4, batches["ours"]), xytext=(9, 5),
            textcoords="offset points", color="#c64600", weight="bold",
        )  # fmt: skip
    ticks = [2**n for n in range(7)]
    axes.set(xscale="log", yscale="log", xlim=(0.85, 90), xlabel="callers at once")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    rates_shown = [0.5, 1, 2, 5, 10, 20, 50, 100, 200]
    highest = axes.get_ylim()[1]
    axes.set_yticks(rates_shown, [f"{rate:g}" for rate in rates_shown])
    axes.set_ylim(0.7, highest * 1.4)
    axes.set_ylabel("images per second")
    axes.grid(axis="y", color="#e6e6e6")
    axes.legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.42))


def latencies(results: dict) -> list[tuple[str, str, list[float]]]:
    """List the rows of the second picture: load, worker, and latencies in milliseconds."""
    curves = results["curves"]
    runs = {kind: by_callers(curves[kind]) for kind in (BASELINE, OURS)}
    rows = [("idle worker,\n1 request", kind, curves[f"{kind}-lone"]) for kind in (BASELINE, OURS)]
    for callers in (8, 64):
        for kind in (BASELINE, OURS):
            # The baseline gets too few jobs to know the latency with 64 callers.
            if callers in runs[kind] and not (kind == BASELINE and callers == 64):
                rows.append((f"{callers} callers", kind, runs[kind][callers]["latencies_s"]))
    return [(what, kind, [1000 * s for s in seconds]) for what, kind, seconds in rows]


def latency(axes: Axes, results: dict) -> None:
    """Draw the percentiles of each row on a logarithmic scale."""
    at, labels, before = 0.0, [], None
    for what, kind, values in latencies(results):
        at += 1 if what == before else 1.6
        labels.append((at, f"{what}" if what != before else ""))
        known = {
            p: np.percentile(values, p) for p, (_, n) in PERCENTILES.items() if len(values) >= n
        }
        axes.plot([*known.values()], [at] * len(known), "-", color=COLOURS[kind], lw=2)
        for p, value in known.items():
            marker = PERCENTILES[p][0]
            fill = "white" if p != 50 else COLOURS[kind]
            axes.plot(
                value, at, marker, ms=8 if p == 50 else 7, color=COLOURS[kind], mfc=fill, mew=2
            )
        axes.annotate(
            f"{known[50]:,.0f} ms", (known[50], at), xytext=(0, 8), textcoords="offset points",
            ha="center", color=COLOURS[kind], fontsize=9,
        )  # fmt: skip
        before = what
    axes.set_yticks([where for where, _ in labels], [text for _, text in labels])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(at + 0.8, 0.7)
    axes.set(xscale="log", xlabel="from sending a job to its reply, milliseconds")
    low, high = axes.get_xlim()
    axes.set_xlim(low / 1.15, high * 1.15)
    ticks = [t for t in (20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000)]
    axes.set_xticks([t for t in ticks if low / 1.15 <= t <= high * 1.15])
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda t, _: f"{t:,.0f}"))
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.grid(axis="x", color="#e6e6e6")
    for kind in (BASELINE, OURS):
        axes.plot([], [], "-", lw=4, color=COLOURS[kind], label=NAMES[kind])
    for p, (marker, _) in PERCENTILES.items():
        fill = "white" if p != 50 else "#444444"
        axes.plot([], [], marker, color="#444444", mfc=fill, mew=2, ls="", label=f"p{p}")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))


def draw(results: dict, path: Path) -> list[Path]:  # the pictures, beside the results in `path`
    """Draw both pictures."""
    about = results["machine"]
    where = f"{about['cpu']}, {about['cores']} cores, torch {about['torch']}, {results['date']}"
    pictures = []
    titles = {
        throughput: "One-image jobs through the platform's production loop",
        latency: "Latency of callers, production loop",
    }
    with plt.rc_context(STYLE):
        for paint, title in titles.items():
            figure, axes = plt.subplots(figsize=(7.6, 4.2))
            paint(axes, results)
            axes.set_title(title, pad=20)
            axes.text(
                0, 1.02, where, transform=axes.transAxes, fontsize=8.5, color="#666666", va="bottom"
            )
            picture = path.with_name(f"{path.stem}-{paint.__name__}.png")
            figure.savefig(picture)
            plt.close(figure)
            pictures.append(picture)
    return pictures
