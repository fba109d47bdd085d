"""csrc/cuda under the real compiler: PTX for sm_90, and a module that imports where there is no GPU."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
HOMES = [Path(os.environ[name]) / "bin" / "nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
NVCC = next(
    (str(p) for p in (*HOMES, shutil.which("nvcc"), Path("/usr/local/cuda/bin/nvcc")) if p and Path(p).exists()), None
)
FLAGS = ["-std=c++17", "-O3", f"-I{CSRC}", f"-I{CSRC / 'include'}"]

pytestmark = pytest.mark.skipif(
    NVCC is None, reason="nvcc not found (looked at CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda)"
)


def nvcc(*arguments):
    done = subprocess.run([NVCC, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, f"nvcc {' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}"
    assert "warning" not in done.stderr, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    """PTX of every kernel of coupling.cu, by mangled name."""
    ptx = tmp_path_factory.mktemp("ptx") / "coupling.ptx"
    nvcc(*FLAGS, "-ptx", "-arch=compute_90", CSRC / "cuda" / "coupling.cu", "-o", ptx)
    return dict(re.findall(r"\.entry (\w+)\((.*?)\n}", ptx.read_text(), re.DOTALL))


def test_every_variant_is_compiled(entries):
    count = {
        kind: sum(kind in name for name in entries) for kind in ("forward_kernel", "backward_kernel", "haar", "log_det")
    }
    assert count == {"forward_kernel": 6 * 4, "backward_kernel": 6 * 4, "haar": 4, "log_det": 2}


def test_kernels_move_16_bytes_at_a_time(entries):
    """A lane handles 8 elements. The optimiser once split wide stores into single words, unseen by any other test."""
    sizes = {"f": 4, "d": 8, "13__nv_bfloat16": 2, "6__half": 2}
    for name, body in entries.items():
        wide = len(re.findall(r"ld\.global\.v\d", body)), len(re.findall(r"st\.global\.wb\.v4", body))
        kind = re.search(
            r"(forward|backward)_kernelI(f|d|13__nv_bfloat16|6__half)(f|d|13__nv_bfloat16|6__half|S\d?_)", name
        )
        if kind:
            x = 8 * sizes[kind[2]] // 16
            s = 8 * sizes.get(kind[3], sizes[kind[2]]) // 16
            assert wide == ((x + 2 * s, x) if kind[1] == "forward" else (2 * x + 2 * s, x + s)), name
        elif "haar" in name:
            assert wide == (8, 8), name


def test_offsets_are_64_bit_and_divisions_exact(entries):
    for name, body in entries.items():
        assert re.search(r"(mul|mad)\.lo\.s64", body), name
        assert not re.search(r"div\.(approx|full)", body), f"{name}: fast-math slipped in"


@pytest.mark.slow
def test_deform_conv_is_multiplied_by_tensor_cores_where_its_types_allow(tmp_path):
    ptx = tmp_path / "deform_conv.ptx"
    nvcc(*FLAGS, "-ptx", "-arch=compute_90", CSRC / "cuda" / "deform_conv.cu", "-o", ptx)
    _, *pieces = re.split(r"\.entry (\w+)\(", ptx.read_text())
    entries = dict(zip(pieces[::2], pieces[1::2], strict=True))
    counted = {"forward": 0, "columns": 0, "weight": 0}
    cores = {"6__half": "f16", "13__nv_bfloat16": "bf16"}
    for name, body in entries.items():
        kind = re.search(r"(?<!sum_)(forward|columns|weight)_kernelI(f|d|6__half|13__nv_bfloat16)Lb([01])E", name)
        assert not re.search(r"div\.(approx|full)", body), f"{name}: fast-math slipped in"
        if not kind:
            continue
        counted[kind[1]] += 1
        type_ = "tf32" if kind[3] == "1" else cores.get(kind[2])
        assert ("wmma.mma" in body) == (type_ is not None), name
        # f16 goes without saying in the name of an instruction
        assert all(type_ in line for line in re.findall(r"wmma\.mma\S+", body)) or type_ == "f16", name
        if kind[1] != "columns":
            assert re.search(r"ld\.global\.v\d", body), f"{name}: corners are not read in vectors"
    assert counted == {"forward": 11, "columns": 5, "weight": 11}


@pytest.mark.slow
def test_attention_is_multiplied_by_tensor_cores_where_its_types_allow(tmp_path):
    ptx = tmp_path / "attention.ptx"
    nvcc(*FLAGS, "-ptx", "-arch=compute_80", CSRC / "cuda" / "attention.cu", "-o", ptx)
    _, *pieces = re.split(r"\.entry (\w+)\(", ptx.read_text())
    counted = {"forward": 0, "backward": 0}
    cores = {"6__half": "f16.f16", "13__nv_bfloat16": "bf16.bf16"}
    for name, body in zip(pieces[::2], pieces[1::2], strict=True):
        kind = re.search(r"(forward|backward)_kernelI(f|d|6__half|13__nv_bfloat16)Lb([01])E", name)
        assert not re.search(r"div\.(approx|full)", body), f"{name}: fast-math slipped in"
        assert "atom" not in body, f"{name}: a sum in no fixed order"
        if not kind:
            continue
        counted[kind[1]] += 1
        type_ = "tf32.tf32" if kind[3] == "1" else cores.get(kind[2])
        products = re.findall(r"mma\.sync\S+", body)
        assert bool(products) == (type_ is not None), name
        assert all(f".f32.{type_}.f32" in line for line in products), name
        assert ("ldmatrix" in body) == (kind[2] in cores), name
        assert re.search(r"ld\.global\.nc\.v4", body), f"{name}: rows are not read 16 bytes at a time"
    assert counted == {"forward": 7, "backward": 5}


@pytest.mark.slow
def test_module_imports_without_a_gpu(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = """
from pyface import _cuda
info = _cuda.build_info()
assert info["archs"] == "90" and info["nvcc"] and info["runtime"], info
assert _cuda.coupling_scratch(3, 1000) == 3 * 4 and _cuda.coupling_scratch(5, 0) == 0
try:
    devices = _cuda.device_count()
except RuntimeError as error:
    devices = 0
    assert "CUDA" in str(error)
if devices == 0:
    # The op table's own calls reach the runtime (their arguments fit) and come back as its error.
    import torch
    from pyface.ops import _attention_gpu
    from pyface.ops._deform_conv_gpu import Cuda
    from pyface.ops.coupling import _Cuda

    attention = _attention_gpu.Cuda(_cuda)
    attention.where = lambda tensor: (0, 0)
    heads, rows, lse = torch.zeros(2, 3, 5, 8), torch.zeros(1, 3, 2, 8), torch.zeros(2, 3, 5)
    every = heads, heads, heads, rows, rows, torch.zeros(3, 2), torch.zeros(2, 3, 5, 4)
    conv = Cuda(_cuda)
    conv.where = lambda tensor: (0, 0)
    geometry = (1, 1), (1, 1), (1, 1)
    tensors = torch.zeros(2, 4, 5, 5), torch.zeros(2, 36, 5, 5), torch.zeros(6, 2, 3, 3)
    mask, grad = torch.zeros(2, 18, 5, 5), torch.zeros(2, 6, 5, 5)
    ones = [tuple(i == j for j in range(4)) for i in range(4)]
    from pyface.ops import spectral

    filters, keep, sign = spectral._Cuda(_cuda), torch.ones(5, 5), torch.zeros(2, 4, 5, 5, dtype=torch.int8)
    filters.where = lambda tensor: (0, 0)
    from pyface.ops import _sharpness_gpu

    lists = _sharpness_gpu.Cuda(_cuda)
    lists.where = lambda tensor: (0, 0)
    half = [torch.zeros(3, dtype=torch.float16)]
    sums, sgd = (torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2)), (0.1, 0.9, 0.0, 0.0, True, False, False)
    # What the module reads off lists of tensors is what Python writes down about them.
    if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        from pyface.ops.sharpness import table

        reader = _cuda.TensorReader(torch.Tensor.__dlpack_c_exchange_api__, torch.Tensor, torch.nn.Parameter, 1)
        f32, f64, f16 = torch.float32, torch.float64, torch.float16
        kinds = [(f32, f16), (torch.bfloat16, torch.bfloat16), (f16, f32), (f64, f64)]
        weights, gradients = [[torch.zeros(2, 3, dtype=kind[i]).t() for kind in kinds] for i in range(2)]
        plain, values = (weights, None, gradients, gradients, weights), torch.zeros(5, 3, dtype=f64)
        for some in ((None, None), (values, torch.zeros(2))):
            assert _cuda.read_sharpness_lists(reader, plain, *some).table == table(plain)
        assert lists.read(plain, None, None) is None  # these are no CUDA tensors
        assert _cuda.read_sharpness_lists(reader, plain, *sums) is None
        for unfit in (([values], None, None, [values.half()], None), (weights, None, None, gradients[:2], None),
                      (weights, None, None, [t.contiguous() for t in gradients], None)):
            assert _cuda.read_sharpness_lists(reader, unfit, None, None) is None
    core, x = _Cuda(_cuda), torch.zeros(2, 4, 2, 2)
    core.where = lambda tensor: (0, 0)
    options = dict(clamp=2.0, activation="sigmoid", inverse=False)
    for call in (
        lambda: core.forward(x, x, x, log_det=True, **options),
        lambda: core.forward(x, x, x, log_det=False, **options),
        lambda: core.backward(x, None, x, x, x, from_output=True, needs_x=True, needs_s=True, **options),
        lambda: core.haar_dwt2d(x),
        lambda: core.haar_idwt2d(x),
        lambda: filters.high_pass(tensors[0], (1, 1), False),
        lambda: filters.mask_high_frequencies(tensors[0], keep > 0, (1, 1), False, True),
        lambda: filters.mask_high_frequencies_backward(tensors[0], sign, keep, (1, 1), False),
        lambda: conv.forward(*tensors, None, mask, *geometry),
        lambda: conv.forward(*tensors, torch.zeros(6), None, *geometry),
        *(lambda needs=needs: conv.backward(grad, *tensors, mask, *geometry, needs) for needs in ones),
        lambda: attention.forward(*every, True, 0.5, 5, 4.0, True),
        lambda: attention.forward(*every[:3], None, None, None, None, False, 0.5, 1, 1.0, False),
        lambda: attention.backward(heads, lse, *every, heads, lse, True, 0.5, 5, 4.0, [True] * 7),
        lambda: attention.sum(torch.zeros(2, 3), torch.float32),
        lambda: lists.sums(half, half, None, 0.0),
        lambda: lists.sums(None, half, half, 0.1),
        lambda: lists.perturb_(half, half, half, *sums, [0.1], 1e-12, 0.0, None),
        lambda: lists.restore_(half, half),
        lambda: lists.combine_(half, half, *sums, "gsam", 0.4, 0.0, False),
        lambda: lists.step_(half, half, half, half, half, *sums, "gsam", 0.4, 0.0, True, *sgd),
        lambda: torch.use_deterministic_algorithms(True) or conv.backward(grad, *tensors, mask, *geometry, ones[0]),
    ):
        try:
            call()
        except RuntimeError as error:
            assert "CUDA error" in str(error), error
        else:
            raise AssertionError("a launch without a GPU went through")
"""
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_spectral_kernels_are_compiled_with_64_bit_offsets_and_exact_divisions(tmp_path):
    ptx = tmp_path / "spectral.ptx"
    nvcc(*FLAGS, "-ptx", "-arch=compute_90", CSRC / "cuda" / "spectral.cu", "-o", ptx)
    entries = dict(re.findall(r"\.entry (\w+)\((.*?)\n}", ptx.read_text(), re.DOTALL))
    kinds = ("gather", "project", "expand", "spread")
    count = {kind: sum(f"{kind}_kernel" in name for name in entries) for kind in kinds}
    assert count == {"gather": 4, "project": 2, "expand": 2, "spread": 4}
    for name, body in entries.items():
        assert re.search(r"(mul|mad)\.lo\.s64", body), name
        assert not re.search(r"div\.(approx|full)", body), f"{name}: fast-math slipped in"


@pytest.mark.slow
def test_sharpness_kernels_move_16_bytes_at_a_time_and_keep_no_copy_of_their_table(tmp_path):
    ptx = tmp_path / "sharpness.ptx"
    nvcc(*FLAGS, "-ptx", "-arch=compute_90", CSRC / "cuda" / "sharpness.cu", "-o", ptx)
    _, *pieces = re.split(r"\.entry (\w+)\(", ptx.read_text())
    counted = {}
    for name, body in zip(pieces[::2], pieces[1::2], strict=True):
        kind = re.search(r"(sums|finish|perturb|restore|combine|step)_kernel", name)[1]
        counted[kind] = counted.get(kind, 0) + 1
        assert ".local" not in body, f"{name}: arguments are copied to local memory"
        assert not re.search(r"div\.(approx|full)", body), f"{name}: fast-math slipped in"
        assert ("atom" in body) == (kind == "finish"), f"{name}: a sum in no fixed order"
        if kind != "finish":
            assert re.search(r"ld\.global\.v(4|2\.f64)", body), f"{name}: not read 16 bytes at a time"
        if kind not in ("finish", "sums"):
            assert "st.global.wb.v4" in body, f"{name}: not written 16 bytes at a time"
    assert counted == {"sums": 4 + 8 + 4, "finish": 1, "perturb": 8, "restore": 4, "combine": 4, "step": 8}
