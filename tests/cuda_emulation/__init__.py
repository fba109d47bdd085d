"""Compiles the .cu files of csrc/cuda for the CPU, under AddressSanitizer and UBSan, and calls them with torch tensors.

`build` makes a program out of kernel sources and a driver, once per content; `run` sends it calls and writes what it
answers back into the tensors, as a call by pointer would have. include/cuda_runtime.h says what the emulation covers.
"""

import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
ORDERS = {"ascending": 0, "descending": 1, "shuffled": 2}
FLAGS = [
    "-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fno-strict-aliasing",
    "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fsanitize-sections=emulated_shared",
    "-DPYFACE_MAX_BLOCKS=4",  # few, so that small tensors already walk in grid strides
    "-DPYFACE_SMALL_LAUNCHES",
    f"-I{HERE / 'include'}", f"-I{CSRC}", f"-I{CSRC / 'include'}",
]  # fmt: skip


class EmulationError(AssertionError):
    """The emulated device or a sanitizer stopped the program; the message is what it printed."""


def compiler() -> str | None:
    """Path of the C++ compiler (CXX or g++), None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def build(*sources: Path) -> Path:
    """Path of the program made of `sources` and the emulator; built again only when one of them has changed."""
    cxx = compiler()
    version = subprocess.run([cxx, "--version"], check=True, capture_output=True).stdout
    digest = hashlib.sha256(version + repr((FLAGS, sources)).encode())
    for path in sorted([*CSRC.glob("include/**/*"), *CSRC.glob("cuda/*"), *HERE.glob("**/*.*")]):
        if path.is_file() and path.suffix != ".pyc":
            digest.update(str(path).encode() + b"\0" + path.read_bytes())
    cache = Path(tempfile.gettempdir()) / f"pyface-cuda-emulation-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    if cache.stat().st_uid != os.getuid():
        raise PermissionError(f"{cache} belongs to another user; remove it or set TMPDIR")
    program = cache / digest.hexdigest()[:24]
    if not program.exists():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            linked = Path(folder) / "program"
            inputs = [str(HERE / "emulation.cpp"), *map(str, sources)]
            command = [cxx, *FLAGS, "-x", "c++", *inputs, "-o", str(linked)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise EmulationError(f"{' '.join(command)}\n{done.stderr}")
            os.replace(linked, program)
    return program


def run(program: Path, calls: list[tuple], order: str = "shuffled", seed: int = 0) -> list[int]:
    """Performs `calls` in one process and returns their status codes (cudaError_t).

    A call is (op number, argument, ...). A tensor stands for its data pointer, None for a null pointer; int, bool and
    float are passed as they are. Everything a tensor's storage holds goes over and comes back, so outputs are filled in
    place, and the storage is an allocation of its own over there. `order` is the order in which the threads of a block
    take turns.
    """
    request, storages = bytearray(), []
    for op, *arguments in calls:
        buffers, packed = {}, bytearray()
        for argument in arguments:
            if argument is None:
                packed += struct.pack("<qq", -1, 0)
            elif isinstance(argument, torch.Tensor):
                storage = argument.untyped_storage()
                index, _ = buffers.setdefault(storage.data_ptr(), (len(buffers), storage))
                packed += struct.pack("<qq", index, argument.storage_offset() * argument.element_size())
            else:
                packed += struct.pack("<d" if isinstance(argument, float) else "<q", argument)
        request += struct.pack("<4q", op, ORDERS[order], seed, len(buffers))
        for _, storage in buffers.values():
            request += struct.pack("<q", storage.nbytes()) + _bytes(storage).numpy().tobytes()
        request += packed
        storages.append([storage for _, storage in buffers.values()])
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "asked", Path(folder) / "answered"
        asked.write_bytes(request)
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
        done = subprocess.run([program, asked, answered], capture_output=True, text=True, env=environment)
        if done.returncode:
            raise EmulationError(f"exit code {done.returncode}\n{done.stderr}")
        answer = memoryview(answered.read_bytes())
    codes, at = [], 0
    for buffers in storages:
        codes.append(struct.unpack_from("<q", answer, at)[0])
        at += 8
        for storage in buffers:
            if storage.nbytes():
                _bytes(storage).copy_(
                    torch.frombuffer(bytearray(answer[at : at + storage.nbytes()]), dtype=torch.uint8)
                )
            at += storage.nbytes()
    return codes


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)
