"""Builds pyface._cpu and, where nvcc is found, pyface._cuda: torch-free pybind11 modules, compiled through ninja.

Environment:
  PYFACE_CUDA        auto (default): build the CUDA module if nvcc works; off: never; required: fail without it
  PYFACE_CUDA_ARCHS  architectures, e.g. "80;90" (default); the last one also ships PTX for newer GPUs
  PYFACE_NVCC        nvcc to use (else CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda)
  CXX                C++17 compiler (else c++ / g++ / clang++ on PATH)
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPU_CORES = ["attention", "coupling", "deform_conv", "dense_block", "sharpness", "spectral"]
CUDA_CORES = ["attention", "coupling", "deform_conv", "sharpness", "spectral"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mprefer-vector-width=512"]
X86_ISAS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
AMX_CORES = {"attention", "deform_conv"}  # the others have nothing of their own for it
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-ignored-attributes", "-Wno-unknown-warning-option"]
WARNINGS += ["-Wno-maybe-uninitialized"]  # GCC 12 finds hundreds, all in its own AVX-512 headers


class BuildError(Exception):
    pass


def run(command):
    """Output of a command, or None if it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def find_cxx():
    for name in [os.environ.get("CXX"), "c++", "g++", "clang++"]:
        if name and shutil.which(shlex.split(name)[0]):
            return name
    raise BuildError("no C++ compiler found: install g++ or clang++ (C++17), or name one with CXX=")


def find_nvcc():
    """(path, None) or (None, why not)."""
    explicit = os.environ.get("PYFACE_NVCC")
    if explicit:
        return (explicit, None) if run([explicit, "--version"]) else (None, f"PYFACE_NVCC={explicit} does not run")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [str(Path(home) / "bin" / "nvcc") for home in homes if home]
    places += [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    for place in places:
        if place and run([place, "--version"]):
            return place, None
    return None, "nvcc not found (looked at PYFACE_NVCC, CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda)"


def has_openmp(cxx, folder):
    probe = folder / "openmp_probe.cpp"
    probe.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
    return run([*shlex.split(cxx), "-fopenmp", str(probe), "-o", str(folder / "openmp_probe")]) is not None


def escape(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class Ninja:
    """A build.ninja in the making. Objects live beside it and are rebuilt when a source, a header or a flag changes."""

    def __init__(self, folder):
        self.folder, self.lines, self.objects = folder, ["ninja_required_version = 1.5"], {}
        folder.mkdir(parents=True, exist_ok=True)

    def rule(self, name, command, depfile=True):
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def build(self, rule, output, inputs, **variables):
        self.lines.append(f"build {escape(output)}: {rule} {' '.join(escape(i) for i in inputs)}")
        self.lines += [f"  {key} = {value}" for key, value in variables.items()]

    def run(self, target):
        (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        try:
            import ninja

            program = str(Path(ninja.BIN_DIR) / "ninja")
        except ImportError:
            program = shutil.which("ninja")
            if program is None:
                raise BuildError("ninja not found: pip install ninja") from None
        jobs = os.environ.get("MAX_JOBS")
        command = [program, "-C", str(self.folder), *(["-j", jobs] if jobs else []), escape(target)]
        if subprocess.run(command).returncode != 0:
            raise BuildError(f"compilation failed, see above (build file: {self.folder / 'build.ninja'})")


class BuildCores(build_ext):
    def run(self):
        self.record = {
            "python": platform.python_version(),
            "platform": sysconfig.get_platform(),
            "git": run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]),
            "cpu": {"built": False},
            "cuda": {"built": False},
        }
        # Outside build_temp, which editable and isolated builds throw away: objects survive for the next build.
        self.folder = ROOT / "build" / f"ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        super().run()
        self.write_record()
        cuda = self.record["cuda"]
        line = f"built for {cuda['archs']}" if cuda["built"] else f"not built: {cuda['reason']}"
        print(f"pyface: _cpu built ({', '.join(self.record['cpu']['isas'])}); _cuda {line}", flush=True)

    def build_extension(self, ext):
        try:
            self.build_cpu(ext) if ext.name == "pyface._cpu" else self.build_cuda(ext)
        except BuildError as error:
            if ext.name == "pyface._cpu" or os.environ.get("PYFACE_CUDA", "auto") == "required":
                raise SystemExit(f"pyface: building {ext.name} failed: {error}") from None
            self.record["cuda"]["reason"] = str(error)
            for folder in self.homes():  # an older module must not outlive the record that says there is none
                (folder / Path(self.get_ext_filename(ext.name)).name).unlink(missing_ok=True)

    def includes(self):
        import pybind11

        own = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
        return own, [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_paths()['include']}"]

    def build_cpu(self, ext):
        cxx = find_cxx()
        ninja = Ninja(self.folder / "cpu")
        openmp = ["-fopenmp"] if has_openmp(cxx, ninja.folder) else []
        own, foreign = self.includes()
        flags = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
        flags += [*WARNINGS, *openmp, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        isas = X86_ISAS if platform.machine().lower() in ("x86_64", "amd64") else {"baseline": []}
        ninja.rule("compile", f"{cxx} -MMD -MF $out.d {' '.join(flags + own)} $extra -c $in -o $out")
        link = " ".join(openmp + shlex.split(os.environ.get("LDFLAGS", "")))
        if sys.platform == "darwin":
            link += " -undefined dynamic_lookup"
        ninja.rule("link", f"{cxx} -shared $in -o $out {link}", depfile=False)
        objects = []
        for core in CPU_CORES:
            for isa, isa_flags in isas.items():
                if isa == "amx" and core not in AMX_CORES:
                    continue
                objects.append(f"{core}.{isa}.o")
                extra = " ".join([f"-DPYFACE_ISA={isa}", *isa_flags])
                ninja.build("compile", objects[-1], [ROOT / "csrc" / "cpu" / f"{core}.cpp"], extra=extra)
        objects.append("bindings.o")
        ninja.build("compile", "bindings.o", [ROOT / "csrc" / "bindings" / "cpu.cpp"], extra=" ".join(foreign))
        self.finish(ninja, ext, objects)
        version = (run([*shlex.split(cxx), "--version"]) or "?").splitlines()[0]
        self.record["cpu"] = {
            "built": True,
            "compiler": version,
            "flags": " ".join(flags),
            "isas": list(isas),
            "openmp": bool(openmp),
        }

    def build_cuda(self, ext):
        wanted = os.environ.get("PYFACE_CUDA", "auto")
        if wanted not in ("auto", "off", "required"):
            raise SystemExit(f"pyface: PYFACE_CUDA={wanted!r} is not known: use auto, off or required")
        if wanted == "off":
            raise BuildError("switched off by PYFACE_CUDA=off")
        nvcc, reason = find_nvcc()
        if nvcc is None:
            raise BuildError(reason)
        archs = [
            a.strip().removeprefix("sm_")
            for a in os.environ.get("PYFACE_CUDA_ARCHS", "80;90").replace(",", ";").split(";")
        ]
        if not all(a and a[0].isdigit() for a in archs):
            raise BuildError(f"PYFACE_CUDA_ARCHS={os.environ['PYFACE_CUDA_ARCHS']!r} is not a list like '80;90'")
        gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        gencode.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        own, foreign = self.includes()
        ninja = Ninja(self.folder / "cuda")
        flags = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", f"-ccbin={shlex.split(find_cxx())[0]}"]
        define = f"'-DPYFACE_CUDA_ARCHS=\"{';'.join(archs)}\"'"
        ninja.rule(
            "compile", f"{nvcc} -MMD -MF $out.d {' '.join(flags + gencode + own)} {define} $extra -c $in -o $out"
        )
        ninja.rule("link", f"{nvcc} -shared -cudart static $in -o $out", depfile=False)
        objects = [f"{core}.o" for core in CUDA_CORES]
        for core in CUDA_CORES:
            ninja.build("compile", f"{core}.o", [ROOT / "csrc" / "cuda" / f"{core}.cu"])
        objects.append("bindings.o")
        extra = " ".join(f.replace("-isystem", "-isystem=") for f in foreign)
        ninja.build("compile", "bindings.o", [ROOT / "csrc" / "bindings" / "cuda.cpp"], extra=extra)
        self.finish(ninja, ext, objects)
        self.record["cuda"] = {
            "built": True,
            "nvcc": run([nvcc, "--version"]).splitlines()[-2],
            "archs": ";".join(archs),
        }

    def finish(self, ninja, ext, objects):
        module = Path(self.get_ext_filename(ext.name)).name
        ninja.build("link", module, objects)
        ninja.run(module)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ninja.folder / module, target)

    def write_record(self):
        """_build.json beside the modules: what was built, how, and why the rest was not."""
        for folder in self.homes():
            (folder / "_build.json").write_text(json.dumps(self.record, indent=2) + "\n")

    def homes(self):
        return {Path(self.get_ext_fullpath("pyface._cpu")).parent, *([ROOT / "pyface"] if self.inplace else [])}


setup(
    packages=[*find_packages(include=["pyface", "pyface.*"]), "pyface.kernels"],
    package_dir={"pyface.kernels": "kernels"},  # never installed as `kernels`, which is another project's import name
    package_data={"pyface": ["py.typed", "weights/*", "methods/*/card.md"]},
    ext_modules=[
        Extension("pyface._cpu", sources=["csrc/bindings/cpu.cpp"]),
        Extension("pyface._cuda", sources=["csrc/bindings/cuda.cpp"], optional=True),
    ],
    cmdclass={"build_ext": BuildCores},
)
