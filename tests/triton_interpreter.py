"""Triton kernels on CPU tensors, in a process of its own: the interpreter must be chosen before triton is imported."""

import copyreg
import os
import pickle
import struct
import subprocess
import sys
import traceback
from pathlib import Path

import torch

KERNELS = Path(__file__).resolve().parents[1] / "kernels"


def _memory_format(name: str) -> torch.memory_format:
    return getattr(torch, name)


# torch leaves the home of a memory format to pickle, which takes the first module that happens to have that name.
copyreg.pickle(torch.memory_format, lambda value: (_memory_format, (str(value).removeprefix("torch."),)))


class Interpreter:
    """Calls functions of kernels/<core>.py: `Interpreter("coupling")("haar_dwt2d", x)`. Strides and offsets go over."""

    def __init__(self, core: str):
        command = [sys.executable, __file__, str(KERNELS / f"{core}.py")]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def __call__(self, function: str, *args, **kwargs):
        _send(self.process.stdin, (function, args, kwargs))
        result, error = _receive(self.process.stdout)
        if error:
            raise AssertionError(f"in the interpreter:\n{error}")
        return result

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def _send(stream, value):
    data = pickle.dumps(value)
    stream.write(struct.pack("<q", len(data)) + data)
    stream.flush()


def _receive(stream):
    size = stream.read(8)
    if len(size) < 8:
        raise EOFError("the interpreter's process has ended")
    return pickle.loads(stream.read(struct.unpack("<q", size)[0]))


def load(path: Path):
    """The module in the file `path`, loaded without the package that it will be installed in."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _serve(path: str):
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    module = load(Path(path))
    while True:
        try:
            function, args, kwargs = _receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = (getattr(module, function)(*args, **kwargs), None)
        except Exception:
            answer = (None, traceback.format_exc())
        _send(answers, answer)


if __name__ == "__main__":
    _serve(sys.argv[1])
