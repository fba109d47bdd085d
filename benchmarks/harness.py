"""Measures peers side by side, and writes what came out as a table, a CSV file and pictures.

How it measures, so that a number can be judged:

- *Interleaved.* A round visits every peer of a case once, in turn; a case has many rounds. Whatever else the machine
  does meanwhile hits all peers alike. Times are medians over rounds with the 10th and 90th percentile; ratios are
  medians of the ratios *within* a round, so that slow drift cancels (and may differ a little from the ratio of the two
  medians).
- *Warm.* Every shape of every case has run, and what compiles has compiled, before anything is timed. A visit repeats
  a short call until it lasts about a millisecond, after one call that is not timed.
- *On the CPU* the clock is the wall clock. Each call allocates its result, as in use. Fresh memory costs page faults,
  which are counted and shown per call, because for large results they may cost more than the kernel.
- *On a GPU* a call lies between two CUDA events, and 256 MB, several times any L2 cache, are overwritten before it:
  inputs come from memory, and the host is ahead of the device when the first event is reached, unless the call has very
  many launches.
- *The limit* is the time of a plain operation in the same rounds, scaled by the bytes or FLOPs it has to move or do:
  "2 x copy_" for a kernel that must read three tensors and write one. With data outside the caches, x limit = 1 is the
  best one can hope for.
- *Memory* is the peak above what the inputs hold, results included. CPU: the kernel's high-water mark of resident
  memory (VmHWM, reset through /proc/self/clear_refs) with malloc told to map every block above 64 KB separately, so
  that freed memory leaves at once; it sees everything, also what never passes torch's allocator; resolution about
  0.3 MB; Linux with glibc only. It changes malloc, so it runs after all timing. GPU: torch.cuda.max_memory_allocated.
  A work buffer that a peer keeps between calls is held before the call, and so is not in the number.

A peer that cannot run is listed with its reason. Targets are printed as met or missed; nothing here asserts a time.
"""

from __future__ import annotations

import csv
import ctypes
import datetime
import gc
import importlib.util
import math
import os
import platform
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pyface.cli.info import collect
from pyface.data.images import replacing
from pyface.errors import UserError

OURS = "pyface"  # peers whose name begins so are ours


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Attributes:
        quick: small sizes and few rounds, to see that everything runs; its numbers mean little.
        threads: each case is measured once with each of these numbers of CPU threads.
        device: "cpu" or "cuda".
        only: cases whose "group, operation, size" contains this, and no others.
        out: folder to write into.
        compare: an earlier CSV file.
    """

    quick: bool = False
    threads: tuple[int, ...] = (1,)
    device: str = "cpu"
    only: str = ""
    out: Path = Path(".")
    compare: Path | None = None


@dataclass(frozen=True)
class Peer:
    """One way to do what a case is about.

    Attributes:
        name: in tables; ours begin with "pyface".
        call: does it once; None if it cannot be done here, for the reason `why`.
        limit: (name of a peer, factor): the best possible time is factor x that peer's time.
        dtype: as shown, "fp32".
        required: it must work; an exception ends the benchmark instead of being listed.
    """

    name: str
    call: Callable[[], object] | None
    limit: tuple[str, float] | None = None
    dtype: str = "fp32"
    required: bool = False
    why: str = ""


@dataclass(frozen=True)
class Target:
    """A bar, printed beside what was measured.

    `kind` "at most": time(peer) / time(other) <= bound; "faster": time(other) / time(peer) >= bound; "excess":
    time(peer) - time(other) <= bound microseconds. It stands for runs with `threads` threads, or for any.
    """

    peer: str
    kind: str
    bound: float
    other: str
    threads: int | None = None

    def measure(self, times: dict[str, np.ndarray]) -> float:
        mine, others = times[self.peer], times[self.other]
        if self.kind == "excess":
            return float(np.median(mine - others) * 1e6)
        return float(np.median(mine / others if self.kind == "at most" else others / mine))

    def is_met(self, value: float) -> bool:
        return value >= self.bound if self.kind == "faster" else value <= self.bound

    def text(self) -> str:
        return {
            "at most": f"{self.peer} at most {self.bound:g} x {self.other}",
            "faster": f"{self.peer} at least {self.bound:g} x faster than {self.other}",
            "excess": f"{self.peer} at most {self.bound:g} us more than {self.other}",
        }[self.kind]


@dataclass(frozen=True)
class Case:
    """What is compared: one operation at one size.

    Attributes:
        group: cases of a group share a picture, one column per operation and one row per size.
        build: makes the tensors and returns the peers; called several times, so that no case's tensors outlive it.
        ratio_to: peer the others are related to in the table.
        grad: whether autograd is on.
        seconds: time to spend on its rounds.
        memory: also measure peak memory.
        host: measure the host's time even on a GPU.
    """

    group: str
    operation: str
    size: str
    build: Callable[[], list[Peer]]
    ratio_to: str = OURS
    targets: tuple[Target, ...] = ()
    grad: bool = False
    seconds: float = 3.0
    memory: bool = False
    host: bool = False

    @property
    def title(self) -> str:
        return f"{self.group}, {self.operation}, {self.size}"


# ---- clocks and memory -----------------------------------------------------------------------------------------------


def host_clock(call: Callable[[], object], repeats: int) -> float:
    """Seconds per call, by the wall clock."""
    is_cuda = torch.cuda.is_initialized()
    if is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


class CudaClock:
    """Seconds per call, by CUDA events, with cold caches."""

    def __init__(self):
        self.flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")

    def __call__(self, call: Callable[[], object], repeats: int) -> float:
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for start, end in events:
            self.flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return float(np.median([start.elapsed_time(end) for start, end in events])) / 1e3


def page_faults() -> int:
    """Pages this process was given so far (0 where the system does not tell)."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def peak_memory(call: Callable[[], object], device: str) -> int | None:
    """Bytes that a call holds at its peak above what is held before it; None where that cannot be measured."""
    if device == "cuda":
        call()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        libc = ctypes.CDLL(None)
        map_threshold = -3  # M_MMAP_THRESHOLD of mallopt(3)
        if not libc.mallopt(map_threshold, 64 * 1024):
            return None
        call()
        gc.collect()
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        call()
        return max(0, _resident("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {name} in /proc/self/status")


# ---- measuring -------------------------------------------------------------------------------------------------------


class Runner:
    """Warms all cases, then times them, then measures their memory."""

    def __init__(
        self, name: str, cases: list[Case], options: Options, progress: Callable[[str], None] = lambda _: None
    ):
        self.name, self.cases, self.options, self.progress = name, cases, options, progress
        self.broken: dict[tuple[str, str], str] = {}
        self.clock = CudaClock() if options.device == "cuda" else host_clock
        self.header = machine_header(options.device)

    def run(self) -> list[dict]:
        """The rows of the CSV file."""
        rows = []
        for threads in self.options.threads:
            torch.set_num_threads(threads)
            for case in self.cases:
                self.progress(f"warming {case.title}, {threads} threads")
                self._each(case, lambda peer: [peer.call() for _ in range(2)])
        for threads in self.options.threads:
            torch.set_num_threads(threads)
            for case in self.cases:
                self.progress(f"timing {case.title}, {threads} threads")
                rows += self._time(case, threads)
        torch.set_num_threads(max(self.options.threads))
        for case in self.cases:
            if case.memory:
                self.progress(f"memory of {case.title}")
                peaks = self._each(case, lambda peer: peak_memory(peer.call, self.options.device))
                rows += [
                    self._row(case, peer, max(self.options.threads), "memory", peak / 1e6, "MB")
                    for peer, peak in peaks
                    if peak is not None
                ]
        order = {case.title: index for index, case in enumerate(self.cases)}
        rows.sort(key=lambda row: (row["threads"], order[row["case"]]))  # stable: peers stay in their order
        return rows

    def _peers(self, case: Case) -> list[Peer]:
        torch.manual_seed(0)
        return case.build()

    def _each(self, case: Case, work: Callable[[Peer], object]) -> list[tuple[Peer, object]]:
        done = []
        with torch.set_grad_enabled(case.grad):
            for peer in self._peers(case):
                if peer.call is None or (case.title, peer.name) in self.broken:
                    continue
                try:
                    done.append((peer, work(peer)))
                except Exception as error:
                    if peer.required:
                        raise
                    lines = str(error).strip().splitlines() or [""]
                    self.broken[case.title, peer.name] = f"{type(error).__name__}: {lines[0]}"
        return done

    def _time(self, case: Case, threads: int) -> list[dict]:
        peers = self._peers(case)
        skipped = {p.name: p.why for p in peers if p.call is None}
        skipped |= {name: why for (title, name), why in self.broken.items() if title == case.title}
        running = [p for p in peers if p.name not in skipped]
        clock = host_clock if case.host else self.clock
        # As many repeats as make a visit last a millisecond, and as many rounds as fit the time.
        with torch.set_grad_enabled(case.grad):
            durations = {p.name: min(clock(p.call, 1) for _ in range(3)) for p in running}
        repeats = {name: max(1, min(10_000, math.ceil(1e-3 / max(d, 1e-8)))) for name, d in durations.items()}
        if clock is not host_clock:
            repeats = dict.fromkeys(repeats, 3 if self.options.quick else 10)
        settles = {name: clock is host_clock and d < 0.02 for name, d in durations.items()}
        one_round = sum(d * (repeats[name] + settles[name]) for name, d in durations.items())
        least, most, budget = (3, 5, 0.02) if self.options.quick else (9, 101, case.seconds)
        rounds = max(least, min(most, int(budget / one_round)))

        times = {p.name: np.empty(rounds) for p in running}
        faults = {p.name: np.zeros(rounds) for p in running}
        gc.disable()
        try:
            with torch.set_grad_enabled(case.grad):
                for i in range(rounds):
                    for peer in running:
                        if settles[peer.name]:
                            peer.call()
                        before = page_faults()
                        times[peer.name][i] = clock(peer.call, repeats[peer.name])
                        faults[peer.name][i] = (page_faults() - before) / repeats[peer.name]
        finally:
            gc.enable()
        return self._rows(case, threads, peers, skipped, times, faults)

    def _rows(self, case, threads, peers, skipped, times, faults) -> list[dict]:
        rows = []
        for peer in peers:
            if peer.name in skipped:
                rows.append(self._row(case, peer, threads, "skipped", note=skipped[peer.name]))
                continue
            t = times[peer.name]
            row = self._row(case, peer, threads, "time", *_middle(t * 1e3)[:1], "ms")
            row |= dict(zip(("p10", "p90"), _middle(t * 1e3)[1:], strict=True)) | {"rounds": len(t)}
            if case.ratio_to in times:
                row |= {"ratio_to": case.ratio_to, "ratio": float(np.median(t / times[case.ratio_to]))}
            if peer.limit and peer.limit[0] in times:
                unit, factor = peer.limit
                row |= {"limit": f"{factor:.3g} x {unit}", "limit_ratio": float(np.median(t / (factor * times[unit])))}
            rows.append(row)
            per_call = float(np.median(faults[peer.name]))
            if self.options.device == "cpu" and (case.memory or per_call >= 1):
                rows.append(self._row(case, peer, threads, "page_faults", per_call, "per call"))
        for target in case.targets:
            if target.threads in (None, threads) and {target.peer, target.other} <= times.keys():
                value = target.measure(times)
                peer = next(p for p in peers if p.name == target.peer)
                row = self._row(
                    case, peer, threads, "target", value, "us" if target.kind == "excess" else "x", target.text()
                )
                rows.append(row | {"target": target.bound, "met": "yes" if target.is_met(value) else "no"})
        return rows

    def _row(self, case, peer, threads, metric, value=None, unit="", note="") -> dict:
        row = dict.fromkeys(COLUMNS)
        row |= {
            "benchmark": self.name, "case": case.title, "group": case.group, "operation": case.operation,
            "size": case.size, "peer": peer.name, "threads": threads, "dtype": peer.dtype,
            "device": self.options.device, "metric": metric, "value": value, "unit": unit, "note": note,
            "quick": "yes" if self.options.quick else "no",
        }  # fmt: skip
        return row | self.header


HEADER = ("date", "cpu", "cores", "isa", "gpu", "system", "python", "torch", "triton", "pyface", "git", "load")
COLUMNS = (
    "benchmark", "case", "group", "operation", "size", "peer", "threads", "dtype", "device", "metric", "value", "unit",
    "p10", "p90", "rounds", "ratio_to", "ratio", "limit", "limit_ratio", "target", "met", "note", "quick", *HEADER,
)  # fmt: skip


def _middle(values: np.ndarray) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile."""
    return tuple(float(v) for v in np.percentile(values, (50, 10, 90)))


def machine_header(device: str) -> dict[str, object]:
    """What a number cannot be understood without."""
    found = collect()
    machine, versions = found["machine"], found["versions"]
    gpus = machine["gpus"]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": machine["cpu"],
        "cores": machine["cores_allowed"],
        "isa": machine["isa_in_use"] or "no CPU kernels",
        "gpu": gpus[torch.cuda.current_device()]["name"] if device == "cuda" else "",
        "system": platform.system(),
        "python": versions["python"],
        "torch": versions["torch"],
        "triton": versions["triton"] or "",
        "pyface": versions["pyface"],
        "git": _git_state(),
        # More than the threads in use means that something else was running.
        "load": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "",
    }


def _git_state() -> str:
    def git(*words: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (" with changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ---- files -----------------------------------------------------------------------------------------------------------


def write_csv(path: Path, rows: Iterable[dict]) -> None:
    """One line per result; numbers with six digits."""
    with replacing(path, overwrite=True) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def read_csv(path: Path) -> list[dict]:
    """The rows of a file that `write_csv` wrote.

    Raises:
        UserError: it cannot be read, or is another kind of file.
    """
    numbers = {"value", "p10", "p90", "ratio", "limit_ratio", "target"}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise UserError(f"{path} is not a result of this version of `pyface bench`: its columns are others")
            rows = []
            for line in reader:
                row = {k: None if v == "" else float(v) if k in numbers else v for k, v in line.items()}
                rows.append(row | {"threads": int(line["threads"]), "note": line["note"]})
            return rows
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def plot(rows: list[dict], folder: Path) -> list[Path]:
    """One picture per group and number of threads: bars of time / limit, a panel per operation and size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    written = []
    timed = [row for row in rows if row["metric"] == "time" and row["limit_ratio"] is not None]
    for group, threads in dict.fromkeys((row["group"], row["threads"]) for row in timed):
        mine = [row for row in timed if (row["group"], row["threads"]) == (group, threads)]
        operations = list(dict.fromkeys(row["operation"] for row in mine))
        sizes = list(dict.fromkeys(row["size"] for row in mine))
        cells = {}
        for row in mine:
            cells.setdefault((row["operation"], row["size"]), []).append(row)
        grid = [[(operation, size) for operation in operations] for size in sizes]
        if len(cells) <= max(len(operations), len(sizes)):  # one under the other: in a line they would be wide and flat
            grid = [[place] for place in cells]
        bars = max(len(cell) for cell in cells.values())
        figure, axes = plt.subplots(
            len(grid), len(grid[0]), squeeze=False, layout="constrained",
            figsize=(max(6.5, 4.6 * len(grid[0])), len(grid) * (0.9 + 0.24 * bars) + 0.8),
        )  # fmt: skip
        for places, row_axes in zip(grid, axes, strict=True):
            for place, axis in zip(places, row_axes, strict=True):
                _panel(axis, cells.get(place), ", ".join(place), bars)
        header = mine[0]
        where = header["gpu"] or f"{header['cpu']}, {threads} thread{'s' * (threads != 1)}"
        figure.suptitle(f"{group}: time / limit, shorter is better\n{where}, torch {header['torch']}")
        path = folder / f"{header['benchmark']}-{slug(group)}-{header['device']}-{threads}t.png"
        with replacing(path, overwrite=True) as temporary:
            figure.savefig(temporary, format="png", dpi=100)
        plt.close(figure)
        written.append(path)
    return written


def _panel(axis, rows: list[dict] | None, title: str, bars: int) -> None:
    if not rows:
        axis.set_axis_off()
        return
    values = [row["limit_ratio"] for row in rows]
    colors = ["#1b6ca8" if row["peer"].startswith(OURS) else "#b8bec5" for row in rows]
    places = range(len(rows))
    axis.barh(places, values, color=colors, height=0.72)
    # A label wider than its panel would lie over the neighbour's bars.
    axis.set_yticks(places, [textwrap.fill(row["peer"], 26) for row in rows], fontsize=8)
    axis.set_ylim(bars - 0.5, -0.5)  # bars of one thickness in all panels
    axis.axvline(1, color="#c0392b", linewidth=1)
    # The room on the right is for the numbers behind the bars.
    axis.set_xlim(0, max(*values, 1) * 1.4)
    for place, row in zip(places, rows, strict=True):
        axis.text(
            row["limit_ratio"], place, f" {row['limit_ratio']:.2f}  ({_time(row['value'])})", va="center", fontsize=7
        )
    limits = dict.fromkeys(row["limit"] for row in rows)
    axis.set_title(f"{title}  (1 = {limits.popitem()[0]})" if len(limits) == 1 else title, fontsize=9)
    axis.tick_params(axis="x", labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)


# ---- what people read ------------------------------------------------------------------------------------------------


def _time(milliseconds: float) -> str:
    if milliseconds < 0.1:
        return f"{milliseconds * 1e3:.3g} us"
    return f"{milliseconds:.3f} ms" if milliseconds < 10 else f"{milliseconds:.1f} ms"


def _range(low: float, high: float) -> str:
    a, b = _time(low), _time(high)
    return f"{a.split()[0]} - {b}" if a.split()[1] == b.split()[1] else f"{a} - {b}"


def show(rows: list[dict], console) -> None:
    """The header, one table per operation and number of threads, and the targets."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    if not rows:
        return
    header = rows[0]
    console.print(" | ".join(f"{name} {header[name]}" for name in HEADER if header[name]), highlight=False)
    if header["load"] and float(header["load"]) >= 1:
        console.print(
            f"[yellow]The machine was busy at the start (load {header['load']}): measure again on a quiet one.[/]"
        )
    for group, operation, threads in dict.fromkeys((r["group"], r["operation"], r["threads"]) for r in rows):
        mine = [r for r in rows if (r["group"], r["operation"], r["threads"]) == (group, operation, threads)]
        same_cases = [r for r in rows if (r["group"], r["operation"]) == (group, operation)]
        memories = {
            (r["size"], r["peer"]): r["value"] for r in same_cases if r["metric"] == "memory"
        }  # of the most threads
        faults = {(r["size"], r["peer"]): r["value"] for r in mine if r["metric"] == "page_faults"}
        title = f"{group}: {operation}, {threads} thread{'s' * (threads != 1)}, {header['device']}"
        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", padding=(0, 1))
        for name in ("size", "peer"):
            table.add_column(name, no_wrap=True)
        for name in (
            "median",
            "p10 - p90",
            "x limit",
            "ratio",
            *(["extra MB"] if memories else []),
            *(["faults"] if faults else []),
        ):
            table.add_column(name, justify="right", no_wrap=True)
        left_out = {}
        for size in dict.fromkeys(r["size"] for r in mine):
            shown = size
            for r in mine:
                if r["size"] != size or r["metric"] not in ("time", "skipped"):
                    continue
                name = f"[bold]{escape(r['peer'])}[/]" if r["peer"].startswith(OURS) else escape(r["peer"])
                if r["metric"] == "skipped":
                    table.add_row(shown, name, "-")
                    left_out[r["peer"]] = r["note"]
                else:
                    cells = [
                        _time(r["value"]),
                        _range(r["p10"], r["p90"]),
                        _ratio(r["limit_ratio"]),
                        _ratio(r["ratio"]),
                    ]
                    cells += [_count(memories.get((size, r["peer"])), 1)] if memories else []
                    cells += [_count(faults.get((size, r["peer"])), 0)] if faults else []
                    table.add_row(shown, name, *cells)
                shown = ""
            table.add_section()
        console.print(table)
        limits = "; ".join(dict.fromkeys(r["limit"] for r in mine if r["limit"]))
        ratio_to = next((r["ratio_to"] for r in mine if r["ratio_to"]), "")
        lines = [f"limit: {limits}" if limits else "", f"ratio: to {ratio_to}" if ratio_to else ""]
        lines += [f"{name} left out: {why}" for name, why in left_out.items()]
        console.print(*(f"  {escape(line)}" for line in lines if line), "", sep="\n", highlight=False)
    targets = [r for r in rows if r["metric"] == "target"]
    if targets:
        table = Table(title="Targets", box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", padding=(0, 1))
        for name, justify in (
            ("case", "left"),
            ("threads", "right"),
            ("target", "left"),
            ("measured", "right"),
            ("", "left"),
        ):
            table.add_column(name, justify=justify)
        for r in targets:
            met = "[green]met[/]" if r["met"] == "yes" else "[yellow]missed[/]"
            table.add_row(escape(r["case"]), str(r["threads"]), escape(r["note"]), f"{r['value']:.2f} {r['unit']}", met)
        console.print(table)


def _ratio(value: float | None) -> str:
    return _count(value, 2)


def _count(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def show_changes(old: list[dict], new: list[dict], console) -> None:
    """Every time that both runs have, with the change; bold where the two 10-90 percent ranges do not meet."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    same = ("benchmark", "case", "peer", "threads", "dtype", "device")

    def times(rows):
        return {tuple(r[k] for k in same): r for r in rows if r["metric"] == "time"}

    before, after = times(old), times(new)
    both = [key for key in after if key in before]
    if not both:
        console.print("nothing to compare: the earlier file has none of these cases")
        return
    for name in HEADER:
        if name not in ("date", "load") and str(old[0][name] or "") != str(new[0][name] or ""):
            console.print(f"{name} differs: {old[0][name]} -> {new[0][name]}", highlight=False)
    table = Table(
        title=f"Changes since {old[0]['date']}, git {old[0]['git']}", box=box.SIMPLE_HEAD, title_justify="left"
    )
    table.add_column("case")
    table.add_column("peer", no_wrap=True)
    for name in ("threads", "before", "now", "change", "x limit before", "now"):
        table.add_column(name, justify="right")
    for key in both:
        a, b = before[key], after[key]
        change = f"{(b['value'] / a['value'] - 1) * 100:+.0f} %"
        if b["p90"] < a["p10"]:
            change = f"[bold green]{change}[/]"
        elif b["p10"] > a["p90"]:
            change = f"[bold red]{change}[/]"
        table.add_row(
            escape(b["case"]), escape(b["peer"]), str(b["threads"]), _time(a["value"]), _time(b["value"]), change,
            _ratio(a["limit_ratio"]), _ratio(b["limit_ratio"]),
        )  # fmt: skip
    console.print(table)


def run(name: str, make_cases: Callable[[Options], list[Case]], options: Options) -> list[dict]:
    """Measures, prints, and writes `OUT/NAME-DEVICE.csv` and the pictures; returns the rows.

    Raises:
        UserError: no case fits `only`, the device is not there, or a file cannot be read or written.
    """
    from rich.console import Console

    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch finds no CUDA device; use --device cpu")
    earlier = read_csv(options.compare) if options.compare else None
    every = make_cases(options)
    cases = [case for case in every if options.only.lower() in case.title.lower()]
    if not cases:
        known = "; ".join(dict.fromkeys(f"{case.group}, {case.operation}" for case in every))
        raise UserError(f"no case of {name} has {options.only!r} in its name; there are: {known}")
    console, errors = Console(highlight=False), Console(stderr=True)
    if not console.is_terminal:
        console.width = 120
    threads_before = torch.get_num_threads()
    try:
        with errors.status("starting") as status:
            rows = Runner(name, cases, options, status.update).run()
    finally:
        torch.set_num_threads(threads_before)
    show(rows, console)
    if earlier is not None:
        show_changes(earlier, rows, console)
    path = options.out / f"{name}-{options.device}.csv"
    write_csv(path, rows)
    console.print(f"results: {path}")
    if importlib.util.find_spec("matplotlib") is None:
        console.print("no pictures: matplotlib is missing (pip install matplotlib)")
    else:
        for picture in plot(rows, options.out):
            console.print(f"picture: {picture}")
    return rows


def at_size(options: Options, full: Iterable[int], quick: Iterable[int]) -> tuple[int, ...]:
    """The sizes to use."""
    return tuple(quick if options.quick else full)
