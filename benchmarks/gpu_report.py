"""The page and the pictures of `tools/gpu_check.sh`, from its results alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.cpu import PARTS
from benchmarks.figures import aligned, number

Results = dict[str, Any]


def cell(value: Any) -> str:
    """Write a value as a cell of a table."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if 0 < abs(value) < 0.01:
            return f"{value:.1e}" if abs(value) < 0.001 else f"{value:.3f}"
        return number(value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {cell(part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(cell(part) for part in value)
    return str(value)


def percent(value: float | None) -> str:
    """Write a share."""
    return "" if value is None else f"{value:.0%}"


def rows_table(head: list[str], rows: Iterable[Iterable[Any]]) -> str:
    """Write rows as a Markdown table; nothing if there are none."""
    lines = [[cell(value) for value in row] for row in rows]
    return aligned([head, *lines]) if lines else ""


def why(result: Results) -> list[str]:
    """List why a part has failed or was skipped, in short lines."""
    lines = [problem.partition("\n")[0] for problem in result.get("problems", [])]
    if result.get("error"):
        lines.append(result["error"].strip().splitlines()[-1])
    if result.get("reason"):
        lines.append(result["reason"])
    return lines


# --- the parts ------------------------------------------------------------------


def setup(values: Results) -> str:
    """Write the driver and the versions."""
    about = {**values.get("driver", {}), **values.get("versions", {})}
    about |= {
        f"{name[:-2]} made, s": value for name, value in values.items() if name.endswith("_s")
    }
    return facts(about)


def tests(values: Results) -> str:
    """Write the outcome of each test."""
    rows = [(t["name"], t["outcome"], t.get("seconds")) for t in values.get("tests", [])]
    return rows_table(["test", "outcome", "s"], rows)


def vectors(values: Results) -> str:
    """Write the drift of each precision: 1 - cosine."""
    rows = [
        (r["worker"], r["precision"], r["quality"], r["photos"], r["texts"], r.get("allowed"))
        for r in values.get("drift", [])
    ]
    head = ["worker", "precision", "preprocessing", "photographs", "texts", "allowed"]
    served = [(r["precision"], r["drift"], r["allowed"]) for r in values.get("as_served", [])]
    return "\n\n".join([
        "1 - cosine to open_clip in float32 on the same device. open_clip here, to its own vectors "
        f"in the package: {cell(values.get('open_clip_from_package'))}.",
        rows_table(head, rows),
        rows_table(["precision", "golden vectors at the start", "allowed"], served),
    ])  # fmt: skip


def encoding(values: Results) -> str:
    """Write the encoder's rates."""
    head = ["precision", "batch", "images/s", "on the device alone", "of GEMM", "of the data sheet"]
    rows = [
        (r["precision"], r["batch"], r["images_per_s"], r["on_device_images_per_s"],
         percent(r["share_of_gemm"]), percent(r["share_of_peak"]), r["vram_mb"])
        for r in values.get("encoding", [])
    ]  # fmt: skip
    return rows_table([*head, "VRAM, MB"], rows)


def gpu_path(values: Results) -> str:
    """Write the encoder's rate in each way to run batches, and its ratio to the first."""
    rows = values.get("ways", [])
    sizes = [*rows[0]["images_per_s"]] if rows else []
    head = ["", "1 - cosine", "warm-up, s", "VRAM, MB"]
    head += [f"batch {size}, images/s" for size in sizes] + [f"{size}, ratio" for size in sizes]
    return rows_table(head, [
        (r["way"], r["drift"], r["warm_up_s"], r["vram_mb"],
         *(r["images_per_s"][size] for size in sizes),
         *(f"{r['images_per_s'][size] / rows[0]['images_per_s'][size]:.2f}" for size in sizes))
        for r in rows
    ])  # fmt: skip


def loads(rows: list[Results]) -> str:
    """Write runs of workers under load, with CPU time by thread."""
    head = ["worker", "photographs", "scheme", "in a job", "callers", "images/s"]
    head += ["cores busy"] + [f"{name}, ms" for name in PARTS] + ["callers, ms"]
    return rows_table(head, [
        (r["worker"], r["photos"], r["scheme"], r["images"], r["callers"], r["images_per_s"],
         f"{r['images_per_s'] * sum(r['cpu_ms'].values()) / 1000:.1f}",
         *(r["cpu_ms"][name] for name in PARTS), r["callers_cpu_ms"])
        for r in rows
    ])  # fmt: skip


def end_to_end(values: Results) -> str:
    """Write the rates of both workers."""
    text = loads(values.get("loads", []))
    if "compared" in values:
        least = values["compared"]["least_cosine_to_baseline"].get("ours")
        text += f"\n\nAll vectors compared; least cosine to the baseline {least}."
    return text


def starts(values: Results) -> str:
    """Write the starts, with their steps."""
    rows = [
        (r["worker"], r["artifact"], r["seconds"],
         ", ".join(f"{name} {s:g}" for name, s in r["steps"].items()))
        for r in values.get("starts", [])
    ]  # fmt: skip
    return rows_table(["worker", "artifact on disk", "s to the first reply", "steps, s"], rows)


def memory(values: Results) -> str:
    """Write the memory of host and device."""
    head = ["worker", "RSS idle, MB", "RSS at most, MB", "VRAM idle, MB", "VRAM after load, MB"]
    return rows_table(head, [
        (r["worker"], r["idle_mb"], r["peak_mb"], r["idle_vram_mb"], r["vram_mb"])
        for r in values.get("memory", [])
    ])  # fmt: skip


def facts(values: Results) -> str:
    """Write values that are no table."""
    return "\n".join(f"- {name}: {cell(value)}" for name, value in values.items())


def options(values: Results) -> str:
    """Write the rate of each option, and its ratio to the default."""
    rows = values.get("options", [])
    first = next((r["images_per_s"] for r in rows if "images_per_s" in r), {})
    kinds = [*first]
    head = ["option", "start, s"] + [f"{kind}, images/s" for kind in kinds]
    head += [f"{kind}, ratio" for kind in kinds]
    lines = []
    for row in rows:
        rates = row.get("images_per_s")
        if rates is None:
            lines.append([row["option"], row["reason"], *[""] * (2 * len(kinds))])
            continue
        ratios = [f"{rates[kind] / first[kind]:.2f}" for kind in kinds]
        lines.append([row["option"], row["start_s"], *(rates[kind] for kind in kinds), *ratios])
    return rows_table(head, lines)


def cpu_time(values: Results) -> str:
    """Write how decoding grows with threads, CPU time by thread, and the ceilings."""
    decoding = [
        (r["photos"], r["one_thread_ms"], r["threads"], r["all_threads_images_per_s"],
         f"{r['all_threads_images_per_s'] * r['one_thread_ms'] / 1000:.1f}")
        for r in values.get("decoding", [])
    ]  # fmt: skip
    head = ["photographs", "decoding, ms of one thread", "threads", "all of them, images/s"]
    head += ["times one thread"]
    ceilings = [
        (r["photos"], r["images"], r["images_per_s"], r["loop_ceiling"], r["decode_ceiling"])
        for r in values.get("cpu", [])
    ]
    other = ["photographs", "in a job", "images/s", "ceiling of a loop"]
    other += ["decoding, if every core decoded"]
    return "\n\n".join([
        rows_table(head, decoding), loads(values.get("cpu", [])), rows_table(other, ceilings)
    ])  # fmt: skip


SECTIONS: dict[str, Callable[[Results], str]] = {
    "setup": setup,
    "tests": tests,
    "vectors": vectors,
    "encoding": encoding,
    "gpu-path": gpu_path,
    "end-to-end": end_to_end,
    "start": starts,
    "memory": memory,
    "watchdog": facts,
    "out-of-memory": facts,
    "cpu-time": cpu_time,
    "options": options,
}


def page(results: Results) -> str:
    """Write the page."""
    about = results["machine"]
    name = about.get("gpu") or about.get("cpu") or "an unknown machine"
    lines = [f"# GPU check: {name}", ""]
    if about:
        lines += [
            f"{results['date']}, {about['cpu']}, {about['cores']} cores, {about['memory_gib']} GiB,"
            f" Python {about['python']}, torch {about['torch']}; {results['form']} form,"
            f" {results['seconds']:.0f} s.", "",
        ]  # fmt: skip
    if results.get("note"):
        lines += [results["note"], ""]
    rows = [(p["title"], p["status"], p.get("seconds")) for p in results["parts"].values()]
    lines += [rows_table(["part", "result", "s"], rows), ""]
    for name, part in results["parts"].items():
        body = SECTIONS[name](part.get("values", {}))
        problems = [f"**{part['status']}**: {line}" for line in why(part)]
        texts = [f"## {part['title']}", *problems, body]
        lines += [line for text in texts if text for line in (text, "")]
        if "\n" in part.get("error", "").strip():
            lines += ["```", part["error"].strip(), "```", ""]
    return "\n".join(lines)


def write_page(results: Results, path: Path) -> Path:
    """Write the page beside the results."""
    file = path.with_suffix(".md")
    file.write_text(page(results), encoding="utf-8")
    return file


# --- the pictures ---------------------------------------------------------------


def values_of(results: Results, name: str) -> Results:
    """Get what a part has kept."""
    return results["parts"].get(name, {}).get("values", {})


def draw_encoding(axes: Any, results: Results) -> None:
    """Draw the encoder's rate by batch and precision."""
    rows = values_of(results, "encoding")["encoding"]
    for precision in dict.fromkeys(row["precision"] for row in rows):
        mine = [row for row in rows if row["precision"] == precision]
        batches = [row["batch"] for row in mine]
        [line] = axes.plot(batches, [r["images_per_s"] for r in mine], "o-", label=precision)
        alone = [row["on_device_images_per_s"] for row in mine]
        axes.plot(batches, alone, ":", color=line.get_color())
    axes.plot([], [], ":", color="black", label="on the device alone")
    axes.set(xscale="log", yscale="log", xlabel="images in a batch", ylabel="images per second")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    low, high = axes.get_ylim()
    ticks = [n * 10**power for power in range(7) for n in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis="y", color="#e0e0e0", lw=0.8)
    axes.legend(frameon=False)


def draw_loads(axes: Any, results: Results) -> None:
    """Draw the workers' rates by load, and what all decoding threads reach beside them."""
    from benchmarks.plots import COLOURS, NAMES
    from benchmarks.workers import BASELINE

    loads = values_of(results, "end-to-end")["loads"]
    kinds = dict.fromkeys(row["photos"] for row in loads)
    rows = [row for kind in kinds for row in loads if row["photos"] == kind]
    rates = [row["images_per_s"] for row in rows]
    axes.barh(range(len(rows)), rates, color=[COLOURS[row["worker"]] for row in rows])
    for at, rate in enumerate(rates):
        axes.annotate(f" {rate:,.0f}", (rate, at), va="center", fontsize=8)
    names = [
        f"{r['photos']}, {r['scheme'].upper()}, {r['images']} in a job"
        + (" (baseline)" if r["worker"] == BASELINE else "")
        for r in rows
    ]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.invert_yaxis()
    workers = [NAMES[name] for name in dict.fromkeys(row["worker"] for row in rows)]
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlabel=f"images per second of {' and '.join(workers)}")
    decoding = values_of(results, "cpu-time").get("decoding", [])
    most = max([*rates, *(row["all_threads_images_per_s"] for row in decoding)])
    axes.set_xlim(0, 1.1 * most)
    for row in decoding:
        places = [at for at, load in enumerate(rows) if load["photos"] == row["photos"]]
        if not places:
            continue
        rate, ends = row["all_threads_images_per_s"], (places[0] - 0.5, places[-1] + 0.5)
        axes.plot([rate, rate], ends, ":", color="black", lw=1.2)
        is_far = rate > 0.5 * most
        shortest = min(places, key=rates.__getitem__)  # its bar leaves room for words
        axes.annotate(
            f"{row['threads']} threads that only decode: {rate:,.0f}", (rate, shortest),
            xytext=(-6 if is_far else 6, 0), textcoords="offset points", fontsize=8,
            ha="right" if is_far else "left", va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )  # fmt: skip


def draw(results: Results, path: Path) -> list[Path]:
    """Draw the pictures for which there are results; raise ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from benchmarks.plots import STYLE

    drawn = []
    pictures = {
        "encoding": (draw_encoding, "encoding", "The encoder alone"),
        "end-to-end": (draw_loads, "loads", "End to end, production loop"),
    }
    with plt.rc_context(STYLE):
        for name, (paint, table, title) in pictures.items():
            if not values_of(results, name).get(table):
                continue
            figure, axes = plt.subplots(figsize=(7.6, 4.2))
            paint(axes, results)
            axes.set_title(f"{title}: {results['machine'].get('gpu') or 'CPU'}, {results['date']}")
            picture = path.with_name(f"{path.stem}-{name}.png")
            figure.savefig(picture)
            plt.close(figure)
            drawn.append(picture)
    return drawn


def write_all(results: Results, path: Path) -> list[Path]:
    """Write page and pictures beside the results; say so if there can be no pictures."""
    files = [write_page(results, path)]
    try:
        files += draw(results, path)
    except ImportError:
        print(f"no pictures: matplotlib is missing here; elsewhere: python -m benchmarks.gpu_check "
              f"--report {path.name}")  # fmt: skip
    return files
