"""The benchmarks' own correctness: statistics, files, peers. No test here asserts how long something takes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from pyface.cli.bench import _load, find_benchmarks
from pyface.cli.main import app
from pyface.errors import UserError
from pyface.methods.proface_s.model import DenseSubnet, ProFaceS
from pyface.ops import deform_conv2d
from pyface.ops.reference import coupling as twin

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
harness, coupling = _load(FOLDER, "coupling")
from benchmarks import attention, deform_conv, peers, proface_s, sharpness, spectral  # noqa: E402 - _load has made the package known

QUICK = harness.Options(quick=True)


# ---- harness ---------------------------------------------------------------------------------------------------------


def fake_case(**changes) -> harness.Case:
    """Peers with a known order of visits."""
    visits = []

    def build():
        return [
            harness.Peer("pyface", lambda: visits.append("pyface"), limit=("copy_", 2.0), required=True),
            harness.Peer("copy_", lambda: visits.append("copy_")),
            harness.Peer("absent", None, why="not installed"),
        ]

    case = harness.Case("group", "operation", "size", build, **changes)
    object.__setattr__(case, "visits", visits)
    return case


def rows_of(case, options=QUICK):
    return harness.Runner("fake", [case], options).run()


def test_rounds_visit_peers_in_turn(monkeypatch):
    case = fake_case()
    calls = []
    monkeypatch.setattr(harness, "host_clock", lambda call, repeats: (call(), calls.append(1), 0.05)[-1])
    rows_of(case)
    timed = case.visits[-2 * 3 :]  # quick: three rounds, and 50 ms are too long for an untimed call before
    assert timed == ["pyface", "copy_"] * 3


def test_statistics_of_known_times():
    times = {"pyface": np.array([1.0, 2.0, 3.0, 4.0, 50.0]), "copy_": np.array([1.0, 1.0, 1.0, 2.0, 25.0])}
    case = fake_case(targets=(harness.Target("pyface", "at most", 2.2, "copy_"),))
    runner = harness.Runner("fake", [case], QUICK)
    rows = runner._rows(case, 1, case.build(), {"absent": "why"}, times, {n: np.zeros(5) for n in times})
    by = {(row["peer"], row["metric"]): row for row in rows}
    ours = by["pyface", "time"]
    assert (ours["value"], ours["unit"], ours["rounds"]) == (3000.0, "ms", 5)
    assert ours["p10"] == pytest.approx(1400)
    assert ours["p90"] == pytest.approx(31600)
    assert ours["limit_ratio"] == 1.0  # median of 1/2, 2/2, 3/2, 4/4, 50/50
    assert by["copy_", "time"]["ratio"] == 0.5  # within rounds: median of 1, 1/2, 1/3, 1/2, 1/2
    assert by["absent", "skipped"]["note"] == "why"
    assert (by["pyface", "target"]["value"], by["pyface", "target"]["met"]) == (2.0, "yes")


@pytest.mark.parametrize(
    ("kind", "bound", "value", "met"),
    [("at most", 2.0, 2.0, True), ("at most", 1.9, 2.0, False), ("faster", 0.5, 0.5, True), ("faster", 0.6, 0.5, False),
     ("excess", 1.0, 1.0, True), ("excess", 0.9, 1.0, False)],
)  # fmt: skip
def test_targets(kind, bound, value, met):
    target = harness.Target("a", kind, bound, "b")
    measured = target.measure({"a": np.array([2e-6] * 3), "b": np.array([1e-6] * 3)})
    assert measured == pytest.approx(value)
    assert target.is_met(round(measured, 9)) is met
    assert "a" in target.text()
    assert "b" in target.text()


def test_host_clock_is_per_call():
    assert 0.004 < harness.host_clock(lambda: time.sleep(0.005), 4) < 0.2  # four sleeps are 20 ms, one is 5


def test_a_peer_that_fails_is_listed_and_ours_is_not_forgiven():
    def build(required):
        def fails():
            raise RuntimeError("no compiler\nlong story")

        return [harness.Peer("peer", fails, required=required), harness.Peer("pyface", lambda: None)]

    rows = rows_of(harness.Case("g", "o", "s", lambda: build(False)))
    assert [row["note"] for row in rows if row["metric"] == "skipped"] == ["RuntimeError: no compiler"]
    assert [row["peer"] for row in rows if row["metric"] == "time"] == ["pyface"]
    with pytest.raises(RuntimeError, match="no compiler"):
        rows_of(harness.Case("g", "o", "s", lambda: build(True)))


MEMORY = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from pyface.cli.bench import _load
harness, _ = _load(Path(sys.argv[1]), "coupling")
import torch
x = torch.zeros(2_000_000)  # 8 MB
print(harness.peak_memory(lambda: x + 1, "cpu"), harness.peak_memory(lambda: (x + 1) * 2 + x, "cpu"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_sees_temporaries():
    # In a process of its own, because it changes malloc.
    done = subprocess.run([sys.executable, "-c", MEMORY, FOLDER], capture_output=True, text=True, check=True)
    if "None" in done.stdout:
        pytest.skip("this system does not let a process reset its high-water mark, or has another libc")
    one, two = map(int, done.stdout.split())
    assert abs(one - 8e6) < 1e6
    assert abs(two - 16e6) < 1e6  # x + 1 is gone when the last sum is made


def test_csv_round_trip(tmp_path):
    rows = rows_of(fake_case())
    harness.write_csv(tmp_path / "a.csv", rows)
    back = harness.read_csv(tmp_path / "a.csv")
    assert len(back) == len(rows)
    for old, new in zip(rows, back, strict=True):
        for column in harness.COLUMNS:
            if isinstance(old[column], float):
                assert new[column] == pytest.approx(old[column], rel=1e-5)
            else:
                assert str(new[column] or "") == str(old[column] or "")


@pytest.mark.parametrize(
    ("content", "message"),
    [("a,b\n1,2\n", "its columns are others"), (None, "cannot read"), ("\x00\xff", "others|damaged")],
)
def test_other_csv_files_are_refused(tmp_path, content, message):
    path = tmp_path / "x.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        harness.read_csv(path)


def test_damaged_csv_is_refused(tmp_path):
    rows = rows_of(fake_case())
    harness.write_csv(tmp_path / "a.csv", rows)
    text = (tmp_path / "a.csv").read_text().replace(",ms,", ",ms,x", 1)
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match="damaged"):
        harness.read_csv(tmp_path / "a.csv")


def test_changes_show_what_left_its_range(capsys):
    new = rows_of(fake_case())
    old = [dict(row) for row in new]
    for row in old:
        if row["metric"] == "time":
            row |= {name: row[name] * 2 for name in ("value", "p10", "p90")}
    old[0]["torch"] = "1.0"
    console = Console(width=140, record=True)
    harness.show_changes(old, new, console)
    text = console.export_text()
    assert "torch differs: 1.0" in text
    assert text.count("-50 %") == 2
    harness.show_changes([dict(r, case="other") for r in old], new, console)
    assert "nothing to compare" in console.export_text()


def test_table_has_every_peer_and_reason(capsys):
    rows = rows_of(fake_case(targets=(harness.Target("pyface", "faster", 1e9, "copy_"),)))
    console = Console(width=140, record=True)
    harness.show(rows, console)
    text = console.export_text()
    for words in ("pyface", "copy_", "absent left out: not installed", "limit: 2 x copy_", "missed", rows[0]["torch"]):
        assert words in text


def test_pictures_are_written(tmp_path):
    from PIL import Image

    rows = rows_of(fake_case())
    (picture,) = harness.plot(rows, tmp_path)
    assert picture.name == "fake-group-cpu-1t.png"
    with Image.open(picture) as image:
        assert image.size[0] > 300
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 20)}
    assert (0x1B, 0x6C, 0xA8) in colors  # a bar of ours


# ---- peers do the same as we do --------------------------------------------------------------------------------------

needs_freia = pytest.mark.skipif(bool(peers.why_no_freia()), reason="FrEIA is not installed")


def coupling_inputs():
    torch.manual_seed(1)
    return [torch.randn(2, 3, 4, 6, dtype=torch.float64) for _ in range(3)]


def test_coupling_peers_agree_with_the_reference():
    x, s, t = coupling_inputs()
    y, log_det = twin.affine_coupling(x, s, t, clamp=peers.CLAMP, return_log_det=True)
    back, inverse_log_det = twin.affine_coupling(y, s, t, clamp=peers.CLAMP, inverse=True, return_log_det=True)
    torch.testing.assert_close(peers.hinet_coupling(x, s, t), y)
    torch.testing.assert_close(peers.hinet_uncoupling(y, s, t), back)
    torch.testing.assert_close(peers.coupling_with_log_det(x, s, t), (y, log_det))
    torch.testing.assert_close(peers.uncoupling_with_log_det(y, s, t), (back, inverse_log_det))


@needs_freia
def test_freia_agrees_with_the_reference():
    x, s, t = coupling_inputs()
    expected = twin.affine_coupling(x, s, t, clamp=peers.CLAMP, return_log_det=True)
    torch.testing.assert_close(peers.freia_coupling(x, s, t)(), expected)
    expected = twin.affine_coupling(x, s, t, clamp=peers.CLAMP, inverse=True, return_log_det=True)
    torch.testing.assert_close(peers.freia_coupling(x, s, t, inverse=True)(), expected)
    both = torch.cat((x, t), 1)
    ours = {peer.name: peer.call for peer in coupling._block_cases(QUICK)[0].build() if peer.call}
    for name in ("pyface.nn", "pyface.ops, joined by hand"):
        torch.testing.assert_close(
            ours[name](), (lambda out: (out[0][0], out[1]))(ours["FrEIA"]()), rtol=1e-5, atol=1e-4
        )
    (out,), log_det = peers.freia_block(x, s, t)((both,))
    assert out.shape == both.shape
    assert log_det.shape == (2,)


def test_haar_peers_agree_with_the_reference():
    x = torch.randn(2, 3, 8, 10)
    bands = twin.haar_dwt2d(x)
    weights = peers.haar_weights(3, "cpu")
    for forward in (peers.hinet_dwt, lambda v: peers.conv_dwt(v, weights)):
        torch.testing.assert_close(forward(x), bands)
    for inverse in (peers.hinet_idwt, lambda v: peers.conv_idwt(v, weights)):
        torch.testing.assert_close(inverse(bands), x)


@needs_freia
def test_freia_haar_is_ours_up_to_signs_and_order():
    x = torch.randn(2, 3, 8, 10)
    signs = torch.tensor([1.0, -1, -1, 1]).repeat_interleave(3)[:, None, None]
    bands = twin.haar_dwt2d(x)
    by_band = peers.freia_haar(3, 8, 10, "cpu", True)(x)
    torch.testing.assert_close(by_band, bands * signs)
    by_channel = peers.freia_haar(3, 8, 10, "cpu", False)(x)
    torch.testing.assert_close(by_channel.reshape(2, 3, 4, 4, 5).transpose(1, 2).reshape(2, 12, 4, 5), bands * signs)
    torch.testing.assert_close(peers.freia_haar(3, 8, 10, "cpu", True, inverse=True)(by_band), 2 * x)
    torch.testing.assert_close(peers.freia_haar(3, 8, 10, "cpu", False, inverse=True)(by_channel.clone()), 2 * x)


@torch.no_grad()
def test_cat_form_of_proface_s_agrees_with_the_model():
    torch.manual_seed(2)
    model = proface_s._random(ProFaceS(blocks=2), "cpu")
    plain = peers.CatProFaceS(blocks=2)
    plain.load_state_dict(model.state_dict())
    image, obfuscated = (torch.rand(2, 3, 16, 12) * 2 - 1 for _ in range(2))
    key = torch.randint(0, 2, (2, 1, 16, 12)).float() * 2 - 1
    protected = plain.protect(image, obfuscated, key)
    torch.testing.assert_close(model.protect(image, obfuscated, key), protected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.recover(protected, key), plain.recover(protected, key), rtol=1e-4, atol=1e-5)


def test_flops_count_what_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    subnet = DenseSubnet()
    with FlopCounterMode(display=False) as counter:
        peers.bare_convolutions([subnet], 2, 8, 6, torch.float32, "cpu")()
    assert counter.get_total_flops() == peers.flops([subnet], 2, 8, 6)


def lists_after(call, seed=5) -> sharpness.Lists:
    torch.manual_seed(seed)
    t = sharpness._make(QUICK, [(40, 3), (7,), (65,)])
    given = call(t)
    if given is not None:  # combined gradients instead of xs overwritten
        for x, g in zip(t.xs, given, strict=True):
            x.copy_(g)
    return t


def test_sharpness_peers_agree():
    def ascend(t):
        sharpness.perturb_(t.ws, t.ys, t.saved, sharpness.multi_norm(t.ys), sharpness.RHO)

    def gsam(t):
        sharpness.multi_combine_(t.xs, t.ys, sharpness.multi_dots(t.xs, t.ys), "gsam", alpha=sharpness.ALPHA)

    def constrained(t, **bounds):
        sharpness.multi_combine_(t.xs, t.ys, sharpness.multi_dots(t.xs, t.ys), "constrained", **bounds)

    pairs = [
        (ascend, lambda t: (sharpness.davda54_ascent(t), None)[1]),
        (ascend, sharpness.plain_ascent),
        (ascend, sharpness.foreach_ascent),
        (gsam, lambda t: sharpness.gsam_combine(t.xs, t.ys)),
        (gsam, lambda t: sharpness.foreach_gsam(t.xs, t.ys)),
        (gsam, lambda t: sharpness.foreach_combine(t.xs, t.ys)),
        (gsam, lambda t: sharpness.closed_form(t.xs, t.ys)),
        (gsam, lambda t: sharpness.closed_form_(t.xs, t.ys)),
    ]
    for lower, upper in ((-2, 2), (-2, -1.5), (1.5, 2), (0.6, 0.7)):
        bounds = {"lower": lower, "upper": upper}
        pairs.append(
            (lambda t, b=bounds: constrained(t, **b), lambda t, b=bounds: sharpness.gcscoop_combine(t.xs, t.ys, **b))
        )
    for ours, theirs in pairs:
        a, b = lists_after(ours), lists_after(theirs)
        for one, other in ((a.ws, b.ws), (a.xs, b.xs)):
            for x, y in zip(one, other, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    before = lists_after(lambda t: None)
    assert not torch.equal(lists_after(ascend).ws[0], before.ws[0])
    assert not torch.equal(lists_after(gsam).xs[0], before.xs[0])


@pytest.mark.parametrize("operation", ["whole step (GCSCoOp)", "whole step (SAM)"])
def test_whole_steps_of_sharpness_agree(operation, monkeypatch):
    """Each peer starts from lists of its own here, and they end at the same weights."""
    made, ends = [], {}
    real = sharpness._make
    monkeypatch.setattr(sharpness, "_make", lambda *a: made.append(real(*a)) or made[-1])
    build = sharpness.PASSES[operation][0]
    for number in range(len(build(QUICK, [(30,), (5, 2)]))):
        torch.manual_seed(0)
        peer = build(QUICK, [(30,), (5, 2)])[number]
        if peer.name in (sharpness.CEILING, sharpness.NOTHING) or "(GSAM)" in peer.name:
            continue
        with torch.no_grad():
            peer.call()
        ends[peer.name] = made[-1]
    assert len(ends) >= 2
    torch.manual_seed(0)
    start = real(QUICK, [(30,), (5, 2)])
    first, *others = ends.values()
    assert not torch.equal(first.ws[0], start.ws[0])
    for other in others:
        for a, b in zip(first.ws, other.ws, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(bool(sharpness._memory()[1]), reason="no C compiler")
@pytest.mark.parametrize("n", [100_000, 65_536, 64])
def test_the_program_that_measures_the_memory(n):
    limit = sharpness.Ceiling(QUICK, n)
    limit.a.fill_(2.0)
    for plain in (False, True):
        limit.b.zero_()
        limit.copy(3, plain=plain)  # all, then half of it again
        assert int((limit.b == 2).sum()) == n // 16 * 16
    limit.scale()
    assert 1.9999 < float(limit.a[0]) < 2
    limit.read(3)


SAME_RESULT = (
    "FrEIA", "HiNet", "dense conv2d", "pyface.ops.dense_block fp32", "cat, NCHW fp32", "cat, channels_last fp32",
    "torchvision", "ONNX Runtime", attention.CAT, f"{attention.CAT}, padded to 16", attention.TRICK,
    "cat, softmax, products", "torch, add_bias_kv", "prior, softmax, products", "prior as SDPA's mask",
    spectral.CHAIN, spectral.HALF, spectral.LOW_RANK,
)  # fmt: skip


@pytest.mark.parametrize(
    "make_cases",
    [attention.cases, coupling.cases, deform_conv.cases, proface_s.cases, spectral.cases],
    ids=["attention", "coupling", "deform_conv", "proface_s", "spectral"],
)
def test_results_of_one_case_agree(make_cases):
    """Peers that return the very thing pyface returns must return the same values, gradients too."""
    checked = 0
    for case in make_cases(QUICK):
        torch.manual_seed(0)
        built = {peer.name: peer for peer in case.build() if peer.call}
        ours = next(peer for name, peer in built.items() if name.startswith("pyface"))
        with torch.set_grad_enabled(case.grad):
            expected = ours.call()
            for name in SAME_RESULT:
                if name not in built or case.group in ("coupling block", "op overhead"):
                    continue
                got = built[name].call()
                half = "bf16" in case.size  # the peers round in bfloat16 along the way
                torch.testing.assert_close(
                    got, expected, rtol=0.05 if half else 1e-3, atol=0.5 if half else 1e-3, check_dtype=not half
                )
                checked += 1
    assert checked >= 4


@pytest.mark.parametrize("shape", attention.QUICK, ids=lambda shape: shape.title)
def test_flex_attention_agrees(shape, monkeypatch):
    monkeypatch.setattr(peers, "compiled", lambda function: function)  # what it computes, without minutes of compiling
    tensors = attention._tensors(QUICK, shape, torch.float32)
    found = peers.flex_attention(*tensors, shape.is_causal)()
    torch.testing.assert_close(found, attention._ours(tensors, shape)(), rtol=1e-4, atol=1e-5)


def test_openvino_computes_the_same_without_the_bias():
    if why := peers.why_no("openvino", "openvino"):
        pytest.skip(why)
    x, offset, weight, _, mask = deform_conv._tensors(QUICK, (2, 6, 4, 9, 2))
    call = peers.openvino_deform_conv(x, offset, weight, mask, 1)
    expected = deform_conv2d(x, offset, weight, padding=1, mask=mask)
    torch.testing.assert_close(call(), expected, rtol=1e-4, atol=1e-4)


# ---- the command -----------------------------------------------------------------------------------------------------


def invoke(*words: str):
    """The command, in this process, as from inside the checkout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(FOLDER.parent)
        return CliRunner().invoke(app, ["bench", *words])


def test_bench_lists_what_there_is():
    done = invoke()
    assert done.exit_code == 0
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names == sorted(
        file.stem for file in FOLDER.glob("*.py") if file.stem not in ("__init__", "harness", "peers")
    )
    assert all(len(line.split()) > 3 for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "there are: acmf, attention, coupling"),
        (["coupling", "--threads", "0"], "--threads must be"),
        (["coupling", "--threads", "two"], "--threads must be"),
        (["coupling", "--device", "tpu"], "cpu or cuda"),
        (["coupling", "--quick", "--only", "no such case"], "affine coupling, forward"),
        (["coupling", "--quick", "--compare", "missing.csv"], "cannot read missing.csv"),
    ],
)
def test_mistakes_are_one_line(words, message, tmp_path):
    done = invoke(*words, "--out", str(tmp_path / "out"))
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said(tmp_path):
    done = invoke("coupling", "--quick", "--device", "cuda", "--out", str(tmp_path))
    assert done.exit_code == 2
    assert "no CUDA device" in done.stderr


def test_outside_a_checkout_the_user_is_told(tmp_path, monkeypatch):
    import pyface.cli.bench

    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").mkdir()  # somebody else's
    monkeypatch.setattr(pyface.cli.bench, "__file__", str(tmp_path / "site" / "pyface" / "cli" / "bench.py"))
    with pytest.raises(UserError, match="clone"):
        find_benchmarks()


def test_a_checkout_is_found_from_inside(monkeypatch):
    monkeypatch.chdir(FOLDER / "results")
    assert find_benchmarks() == FOLDER


def test_quick_run_from_end_to_end(tmp_path):
    """What a user types, in a process of its own, twice: the second compares with the first."""
    program = Path(sys.executable).with_name("pyface")
    command = [program, "bench", "coupling", "--quick", "--threads", "1", "--out", str(tmp_path)]
    where = {"cwd": FOLDER.parent, "capture_output": True, "text": True, "check": True}
    where["env"] = os.environ | {"OMP_NUM_THREADS": "1"}
    first = subprocess.run(command, **where)
    assert "torch.compile left out" in first.stdout
    csv = tmp_path / "coupling-cpu.csv"
    rows = harness.read_csv(csv)
    assert {row["group"] for row in rows} == {"affine coupling", "coupling block", "Haar wavelet", "op overhead"}
    ours = [row for row in rows if row["metric"] == "time" and row["peer"] == "pyface"]
    assert all(row["value"] > 0 and row["p10"] <= row["value"] <= row["p90"] for row in ours)
    assert all(math.isfinite(row["limit_ratio"]) for row in ours)
    assert {row["quick"] for row in rows} == {"yes"}
    assert len(list(tmp_path.glob("*.png"))) == 4
    second = subprocess.run([*command, "--only", "dwt", "--compare", str(csv)], **where)
    assert "Changes since" in second.stdout
    assert {row["group"] for row in harness.read_csv(csv)} == {"Haar wavelet"}


def test_on_gpu_script_is_sound():
    script = FOLDER / "on_gpu.sh"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)


def test_on_gpu_script_goes_on_and_tells(tmp_path):
    """With an interpreter that fails at some parts: the others run, the failures are named, the exit code is 1."""
    fake = tmp_path / "python"
    failing = '*"-m pytest"* | *"bench proface_s"*'
    fake.write_text(f'#!/usr/bin/env bash\necho "ran $*"\ncase "$*" in {failing}) exit 3 ;; esac\n')
    fake.chmod(0o755)
    environment = os.environ | {"PYTHON": str(fake), "OUT": str(tmp_path / "out")}
    environment.pop("WHEELS", None)
    done = subprocess.run([FOLDER / "on_gpu.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "failed: tests bench-proface_s" in done.stdout
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "pip install --no-build-isolation --no-deps -e ." in log
    assert "pytest -m gpu" in log
    assert f"bench coupling --device cuda --out {tmp_path / 'out'}" in log
    fake.write_text("#!/usr/bin/env bash\n")
    assert subprocess.run([FOLDER / "on_gpu.sh"], env=environment, capture_output=True).returncode == 0
