"""``pyface info``: what this installation consists of and what works on this machine."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

# Every variable that pyface or its build reads, with what it does.
VARIABLES = {
    "PYFACE_PATH": "path of every op: cpu, cuda, triton, reference, auto",
    "PYFACE_CPU_ISA": "instruction set of the CPU kernels, such as baseline or avx2",
    "PYFACE_PASSWORD": "password for protect and recover",
    "PYFACE_WEIGHTS": "folder of weight files of backbones",
    "TRITON_INTERPRET": "1 runs the Triton kernels on the CPU, slowly, for checks",
    "OMP_NUM_THREADS": "threads of torch, and so of the CPU kernels",
    "PYFACE_CUDA": "at build: auto, off, required",
    "PYFACE_CUDA_ARCHS": "at build: GPU architectures, such as 80;90",
    "PYFACE_NVCC": "at build: the nvcc to use",
    "CUDA_HOME": "at build: where nvcc is looked for",
    "CUDA_PATH": "at build: where nvcc is looked for",
    "CXX": "at build: the C++ compiler",
    "CXXFLAGS": "at build: further compiler flags",
    "LDFLAGS": "at build: further linker flags",
    "MAX_JOBS": "at build: compilations at a time",
}
SECRET = {"PYFACE_PASSWORD"}  # whether it is set is shown, never its value
# Processor features that decide how fast convolutions in low precision are.
FEATURES = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
    "sve",
)


def info(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False) -> None:
    """Show this machine, how pyface was built, and which compute paths work.

    For every kernel core and path: whether it can be used here, the element types it takes, and if not, why not.
    """
    found = collect()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _show(found)


def collect() -> dict[str, Any]:
    """Everything ``pyface info --json`` prints: only dictionaries, lists, strings, numbers, booleans and None."""
    import torch

    import pyface.ops

    cpu, cpu_reason = pyface.ops._paths.load_module("_cpu")
    runtimes = openmp_runtimes()
    build = pyface.ops._paths.build_record()
    return {
        "machine": {
            "system": platform.platform(),
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "cores_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "features": _cpu_features(),
            "isas": list(cpu.isas()) if cpu else [],
            "isa_in_use": cpu.isa() if cpu else None,
            "threads": torch.get_num_threads(),
            "gpus": _gpus(),
        },
        "versions": {
            "pyface": pyface.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "triton": _version("triton"),
        },
        "build": build,
        "openmp": {"in_cpu_module": bool(cpu and cpu.openmp), "runtimes": runtimes},
        "paths": pyface.ops.table(),
        "weights": _weights(),
        "environment": {name: _value(name) for name in VARIABLES},
        "warnings": _warnings(cpu_reason, runtimes, bool(cpu and cpu.openmp)),
    }


def cpu_name() -> str:
    """The processor as its maker calls it."""
    lines = _cpuinfo()
    if lines:
        for key in ("model name", "Model", "Hardware"):
            if key in lines:
                return lines[key]
    if sys.platform == "darwin":
        import subprocess

        shown = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        if shown.returncode == 0:
            return shown.stdout.strip()
    return platform.processor() or platform.machine()


def openmp_runtimes() -> list[str]:
    """Files of the OpenMP runtimes loaded in this process; empty where the system does not tell."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    return sorted(set(re.findall(r"(/\S*lib(?:gomp|iomp|omp)[^/\s]*\.so\S*)", maps)))


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    first = text.split("\n\n")[0]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def _cpu_features() -> list[str]:
    lines = _cpuinfo()
    flags = lines.get("flags", lines.get("Features", "")).split()
    return [name for name in FEATURES if name in flags]


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return found


def _version(distribution: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _weights() -> list[dict[str, Any]]:
    import hashlib
    from importlib.resources import files

    folder = files("pyface") / "weights"
    found = []
    for file in sorted(folder.iterdir(), key=lambda entry: entry.name) if folder.is_dir() else []:
        if file.name.endswith(".safetensors"):
            content = file.read_bytes()
            found.append({"file": file.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})
    return found


def _value(name: str) -> str | None:
    value = os.environ.get(name)
    return "(set, not shown)" if value is not None and name in SECRET else value


def _warnings(cpu_reason: str | None, runtimes: list[str], cpu_openmp: bool) -> list[str]:
    warnings = []
    if cpu_reason:
        warnings.append(f"the CPU kernels cannot be used, so everything runs on plain PyTorch: {cpu_reason}")
    elif not cpu_openmp:
        warnings.append("the CPU kernels were built without OpenMP and run on one thread; install g++ and build again")
    if len(runtimes) > 1:
        warnings.append(
            f"{len(runtimes)} OpenMP runtimes are loaded ({', '.join(Path(r).name for r in runtimes)}); each keeps "
            "threads of its own, which costs speed where torch and pyface alternate"
        )
    return warnings


def _show(found: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    console.width = min(console.width, 100) if console.is_terminal else 100

    def section(title: str, rows: list[tuple[str, ...]]) -> None:
        grid = Table(
            box=None, show_header=False, padding=(0, 2, 0, 2), title=title, title_justify="left", title_style="bold"
        )
        grid.add_column(no_wrap=True, min_width=18)
        for row in rows:
            grid.add_row(*map(escape, row))
        console.print(grid)
        console.print()

    machine, versions, build = found["machine"], found["versions"], found["build"]
    isas = ", ".join(name + " (in use)" * (name == machine["isa_in_use"]) for name in machine["isas"])
    gpus = [
        f"{gpu['name']}, sm_{gpu['capability'].replace('.', '')}, {gpu['memory_gib']} GiB" for gpu in machine["gpus"]
    ]
    section(
        "Machine",
        [
            ("system", machine["system"]),
            (
                "cpu",
                f"{machine['cpu']}, {machine['cores_allowed']} of {machine['cores']} cores, "
                f"{machine['threads']} threads",
            ),
            ("cpu features", " ".join(machine["features"]) or "unknown"),
            ("kernels run on", isas or "no CPU kernels"),
            ("gpu", "; ".join(gpus) or "none that torch can use"),
        ],
    )
    torch_line = (
        f"{versions['torch']} (CUDA {versions['torch_cuda']})"
        if versions["torch_cuda"]
        else f"{versions['torch']} (no CUDA)"
    )
    section(
        "Versions",
        [("pyface", versions["pyface"]), ("python", versions["python"]), ("torch", torch_line),
         ("triton", versions["triton"] or "not installed")],
    )  # fmt: skip
    section("Build", _build_rows(build))
    section(
        "OpenMP",
        [("in the kernels", "yes" if found["openmp"]["in_cpu_module"] else "no"),
         ("loaded", "\n".join(found["openmp"]["runtimes"]) or "unknown")],
    )  # fmt: skip
    section(
        "Weights",
        [(w["file"], f"{w['bytes'] / 1e6:.1f} MB, sha256 {w['sha256'][:16]}") for w in found["weights"]]
        or [("none", "")],
    )
    section(
        "Environment",
        [(name, "-" if value is None else value, VARIABLES[name]) for name, value in found["environment"].items()],
    )

    table = Table(box=box.SIMPLE_HEAD, title="Compute paths", title_justify="left", title_style="bold", padding=(0, 1))
    table.add_column("core", no_wrap=True)
    table.add_column("path", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("element types, or why not", overflow="fold")
    for row in found["paths"]:
        table.add_row(
            row["core"],
            row["path"],
            "[green]works[/]" if row["usable"] else "[yellow]not here[/]",
            escape(", ".join(row["dtypes"]) if row["usable"] else "; ".join(row["reasons"])),
        )
    console.print(table)
    for warning in found["warnings"]:
        console.print(f"[yellow]warning:[/] {escape(warning)}")


def _build_rows(build: dict[str, Any]) -> list[tuple[str, str]]:
    if not build:
        return [("record", "none: pyface runs from its source; install it with pip install .")]
    cpu, cuda = build["cpu"], build["cuda"]
    rows = [("source", f"git {build['git']}" if build.get("git") else "not a git checkout"),
            ("python", f"{build['python']}, {build['platform']}")]  # fmt: skip
    if cpu["built"]:
        rows += [
            ("cpu module", f"built for {', '.join(cpu['isas'])}"),
            ("compiler", cpu["compiler"]),
            ("flags", cpu["flags"]),
        ]
    else:
        rows.append(("cpu module", f"not built: {cpu.get('reason', 'no reason recorded')}"))
    if cuda["built"]:
        rows += [("cuda module", f"built for sm_{cuda['archs'].replace(';', ', sm_')}"), ("nvcc", cuda["nvcc"])]
    else:
        rows.append(("cuda module", f"not built: {cuda.get('reason', 'no reason recorded')}"))
    return rows
