"""``pyface protect``, ``recover`` and ``demo`` as a user meets them, with a small untrained network."""

import json
import os
import resource
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from pyface.cli.main import VERBS, app
from pyface.methods.proface_s import photo as photos
from pyface.methods.proface_s.model import ProFaceS
from pyface.vault import keys
from pyface.vault.keys import read_key_file

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (40, 61, 3), np.uint8)
BOX = ("--box", "4,5,30,31")


def small_model() -> ProFaceS:
    torch.manual_seed(0)
    model = ProFaceS(blocks=1, growth=4)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


MODEL = small_model()


@pytest.fixture(autouse=True)
def desk(tmp_path, monkeypatch):
    """A folder with a photo and a key; the small network and a cheap Argon2id in place of the real ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYFACE_PASSWORD", raising=False)
    monkeypatch.setattr(photos, "default_model", lambda: MODEL)
    cheap = keys.Argon2Cost(memory_kib=64, passes=1, lanes=1)
    monkeypatch.setattr(photos, "kdf_of", lambda secret, cost=None: keys.kdf_of(secret, cheap))
    Image.fromarray(PICTURE).save("photo.png")
    keys.write_key_file("key", keys.Secret.from_key(bytes(range(32))))
    return tmp_path


def pyface(*args: object, **options):
    return CliRunner().invoke(app, [str(arg) for arg in args], prog_name="pyface", **options)


def ok(*args: object, **options):
    result = pyface(*args, **options)
    assert result.exit_code == 0, result.output
    return result


def fails(match: str, *args: object, **options):
    """The command ends with code 2 and one line, no file has changed, and nothing is left behind."""
    before = snapshot()
    result = pyface(*args, **options)
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if not line.startswith("note:")]
    assert len(errors) == 1, result.stderr
    assert errors[0].startswith("error: ")
    assert match in errors[0]
    assert "Traceback" not in result.output
    assert snapshot() == before


def snapshot() -> dict[str, bytes]:
    return {
        os.path.join(folder, name): open(os.path.join(folder, name), "rb").read()
        for folder, _, names in os.walk(".")
        for name in names
    }


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


# ---- the story ---------------------------------------------------------------------


def test_protect_and_recover_exactly(desk):
    result = ok("protect", "photo.png", "--key-file", "key", *BOX, "--exact")
    assert "photo.protected.png: 1 face, " in result.stdout
    assert (pixels("photo.protected.png") != PICTURE).any()
    result = ok("recover", "photo.protected.png", "--key-file", "key")
    assert "photo.recovered.png: 1 face, exact" in result.stdout
    assert (pixels("photo.recovered.png") == PICTURE).all()
    assert sorted(os.listdir()) == ["key", "photo.png", "photo.protected.png", "photo.recovered.png"]


def test_json_and_output_names(desk):
    ok("protect", "photo.png", "--key-file", "key", *BOX, "--box", "40,20,20,20", "-o", "out/hidden.png")
    result = ok("protect", "photo.png", "--key-file", "key", *BOX, "-o", "out", "--obfuscator", "pixelate", "--json")
    report = json.loads(result.stdout)
    assert report["failed"] == []
    assert report["photos"][0]["output"] == os.path.join("out", "photo.protected.png")
    assert report["photos"][0]["faces"] == [[4, 5, 30, 32]]
    assert report["photos"][0]["psnr_protected"] > 0
    report = json.loads(ok("recover", "out/hidden.png", "--key-file", "key", "--json").stdout)
    assert len(report["photos"][0]["faces"]) == 2
    assert report["photos"][0]["output"] == os.path.join("out", "hidden.recovered.png")


def test_poor_recovery_is_said(desk):
    assert "keep the original" in ok("protect", "photo.png", "--key-file", "key", *BOX).stderr


def test_new_key_file(desk):
    fails("no face found", "protect", "photo.png", "--new-key-file", "new")
    ok("protect", "photo.png", "--new-key-file", "new", *BOX, "--exact")
    assert read_key_file("new").material != bytes(range(32))
    assert os.stat("new").st_mode & 0o777 == 0o600
    ok("recover", "photo.protected.png", "--key-file", "new")
    fails("never replaced", "protect", "photo.png", "--new-key-file", "new", *BOX, "-o", "b.png")
    fails(
        "do not give another key",
        "protect",
        "photo.png",
        "--new-key-file",
        "n2",
        "--key-file",
        "key",
        *BOX,
        "-o",
        "b.png",
    )


def test_password_from_environment_and_file(desk, monkeypatch):
    monkeypatch.setenv("PYFACE_PASSWORD", "correct horse")
    ok("protect", "photo.png", "--password", *BOX, "--exact")
    (desk / "password").write_text("correct horse\nsecond line\n")
    monkeypatch.delenv("PYFACE_PASSWORD")
    ok("recover", "photo.protected.png", "--password-file", "password")
    (desk / "password").write_text("correct horsf\n")
    fails("wrong key", "recover", "photo.protected.png", "--password-file", "password", "-o", "b.png")
    fails("protected with a password", "recover", "photo.protected.png", "--key-file", "key", "-o", "b.png")


def test_password_is_asked_for_twice_and_hidden(desk, monkeypatch):
    from pyface.cli import secret

    asked = []

    def prompt(text, **options):
        asked.append(options)
        return "correct horse"

    monkeypatch.setattr(secret.typer, "prompt", prompt)
    monkeypatch.setattr(secret.sys, "stdin", type("Terminal", (), {"isatty": staticmethod(lambda: True)}))
    protecting = secret.choose_secret(None, True, None, new=True)
    recovering = secret.choose_secret(None, True, None, new=False)
    assert protecting == recovering
    assert [(o["hide_input"], o["confirmation_prompt"]) for o in asked] == [(True, True), (True, False)]


def test_exif_is_not_copied_and_rotation_applied(desk):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "SecretCamera"
    Image.fromarray(PICTURE).save("photo.jpg", exif=exif, quality=95)
    upright = np.rot90(pixels("photo.jpg"), -1)
    result = ok("protect", "photo.jpg", "--key-file", "key", *BOX, "--exact")
    assert "EXIF" in result.stderr
    assert b"SecretCamera" not in (desk / "photo.protected.png").read_bytes()
    ok("recover", "photo.protected.png", "--key-file", "key")
    assert (pixels("photo.recovered.png") == upright).all()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_other_pictures(desk, mode):
    image = Image.fromarray(PICTURE).convert(mode)
    image.save("other.png")
    wanted = np.asarray(image if mode == "RGBA" else image.convert("RGB"))
    result = ok("protect", "other.png", "--key-file", "key", *BOX, "--exact")
    assert ("grey photo becomes RGB" in result.stderr) == (mode == "L")
    ok("recover", "other.protected.png", "--key-file", "key")
    assert (pixels("other.recovered.png") == wanted).all()


def test_force_shows_what_comes_out_and_warns(desk):
    ok("protect", "photo.png", "--key-file", "key", *BOX)
    (desk / "other").write_bytes(bytes(32))
    result = ok("recover", "photo.protected.png", "--key-file", "other", "--force")
    assert "wrong key" in result.stderr
    assert "not to be trusted" in result.stderr
    assert "forced" in result.stdout
    assert (pixels("photo.recovered.png") != PICTURE).any()


def test_overwrite(desk):
    ok("protect", "photo.png", "--key-file", "key", *BOX)
    fails("already exists", "protect", "photo.png", "--key-file", "key", *BOX)
    ok("protect", "photo.png", "--key-file", "key", *BOX, "--overwrite")
    fails("is the original itself", "protect", "photo.png", "--key-file", "key", *BOX, "-o", "photo.png", "--overwrite")
    os.symlink("photo.png", "link.png")
    fails("is the original itself", "protect", "photo.png", "--key-file", "key", *BOX, "-o", "link.png", "--overwrite")


# ---- bad input ---------------------------------------------------------------------


def png(width, height, depth, rows=b"\0") -> bytes:
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_bad_photos(desk):
    def bad(content: bytes, match: str):
        (desk / "bad.png").write_bytes(content)
        fails(match, "protect", "bad.png", "--key-file", "key", "--box", "0,0,1,1")

    whole = (desk / "photo.png").read_bytes()
    bad(b"", "is not a picture")
    bad(b"hello", "is not a picture")
    bad(whole[: len(whole) // 2], "cut off or damaged")
    bad(png(20_000, 10_000, 8), "200 megapixels")
    bad(png(2, 2, 16, bytes(26)), "more than 8 bits")
    bad(png(1, 1, 8, bytes(4)), "at least 16 x 16")
    fails("does not exist", "protect", "none.png", "--key-file", "key")
    fails("no face found; mark it yourself with --box", "protect", "photo.png", "--key-file", "key")
    fails("more than the limit", "protect", "photo.png", "--key-file", "key", "--max-megapixels", "0.001")


@pytest.mark.parametrize(
    ("box", "match"),
    [("50,0,20,20", "leaves the photo of 61 x 40"), ("1,2,3", "x,y,width,height"), ("a,b,c,d", "x,y,width,height")],
)
def test_bad_boxes(desk, box, match):
    fails(match, "protect", "photo.png", "--key-file", "key", "--box", box)


def test_bad_options(desk):
    base = ("protect", "photo.png", *BOX)
    fails("unknown obfuscator", *base, "--key-file", "key", "--obfuscator", "blurr")
    fails("strength must be positive", *base, "--key-file", "key", "--strength", "-3")
    fails("unknown detector", *base, "--key-file", "key", "--detector", "none")
    fails("must end in .png", *base, "--key-file", "key", "-o", "out.jpg")
    fails("--box marks a face in one photo", *base, "photo.png", "--key-file", "key")


def test_bad_keys(desk):
    base = ("protect", "photo.png", *BOX)
    fails("no key", *base)
    fails("no key", "recover", "photo.png")
    fails("cannot read key file", *base, "--key-file", "none")
    (desk / "short").write_bytes(b"abc")
    fails("exactly 32 raw bytes", *base, "--key-file", "short")
    fails("needs a terminal", *base, "--password")
    fails("not several", *base, "--password", "--key-file", "key")
    fails("cannot read password file", *base, "--password-file", "none")
    fails("has 3 characters", *base, "--password-file", "short")
    (desk / "latin").write_bytes(b"\xff\xff")
    fails("not UTF-8", *base, "--password-file", "latin")


def test_files_that_cannot_be_recovered(desk):
    ok("protect", "photo.png", "--key-file", "key", *BOX)
    whole = (desk / "photo.protected.png").read_bytes()
    fails("carries no pyface record", "recover", "photo.png", "--key-file", "key")
    (desk / "text.txt").write_text("hello")
    fails("is not a PNG", "recover", "text.txt", "--key-file", "key")
    (desk / "cut.png").write_bytes(whole[:-30])
    fails("cut off", "recover", "cut.png", "--key-file", "key")
    for position in (200, len(whole) - 100):
        (desk / "flipped.png").write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        fails("damaged", "recover", "flipped.png", "--key-file", "key")
    (desk / "other").write_bytes(bytes(32))
    fails("wrong key", "recover", "photo.protected.png", "--key-file", "other")
    fails("already protected", "protect", "photo.protected.png", "--key-file", "key", *BOX)


def test_unwritable_output(desk):
    (desk / "file").write_text("mine")
    for target in ("file/out.png", "/proc/out.png"):
        fails("cannot write", "protect", "photo.png", "--key-file", "key", *BOX, "-o", target)


def test_full_disk(desk):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        fails("cannot write", "protect", "photo.png", "--key-file", "key", *BOX)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_interruption_leaves_nothing(desk, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    before = snapshot()
    monkeypatch.setattr(photos, "load_protected", interrupted)  # while the written file is read back
    result = pyface("protect", "photo.png", "--key-file", "key", *BOX)
    assert result.exit_code == 130
    assert snapshot() == before


# ---- folders ----------------------------------------------------------------------------


@pytest.fixture
def folder(desk, monkeypatch):
    """Four photos in two folders, a text, a hidden file, and a detector that finds a face in each photo."""
    import types

    module = types.ModuleType("their_faces")
    module.find = lambda photo: [(4, 5, 30, 31)]
    monkeypatch.setitem(sys.modules, "their_faces", module)
    (desk / "in" / "sub").mkdir(parents=True)
    for name in ("a.png", "b.bmp", "sub/c.png", "sub/a.png", ".hidden.png"):
        Image.fromarray(RNG.integers(0, 256, (40, 61, 3), np.uint8)).save(desk / "in" / name)
    (desk / "in" / "notes.txt").write_text("hello")
    return ("protect", "in", "--key-file", "key", "--detector", "their_faces:find", "--exact")


def tree(root) -> list[str]:
    return sorted(os.path.relpath(os.path.join(f, n), root) for f, _, names in os.walk(root) for n in names)


def test_folder_there_and_back(folder):
    ok(*folder)
    names = ["a.protected.png", "b.protected.png", "sub/a.protected.png", "sub/c.protected.png"]
    assert tree("in-protected") == names
    ok("recover", "in-protected", "--key-file", "key")
    assert tree("in-recovered") == [name.replace("protected", "recovered") for name in names]
    for original in ("a.png", "b.bmp", "sub/c.png"):
        recovered = f"in-recovered/{os.path.splitext(original)[0]}.recovered.png"
        assert (pixels(f"in/{original}") == pixels(recovered)).all()


def test_folder_is_resumed(folder, desk):
    ok(*folder)
    before = {name: (desk / "in-protected" / name).stat().st_mtime_ns for name in tree("in-protected")}
    (desk / "in-protected" / "b.protected.png").unlink()
    result = ok(*folder)
    assert result.stdout.count("already done") == 3
    after = {name: (desk / "in-protected" / name).stat().st_mtime_ns for name in tree("in-protected")}
    assert {name for name in before if before[name] != after[name]} == {"b.protected.png"}
    ok("recover", "in-protected", "--key-file", "key")
    (desk / "in-recovered" / "a.recovered.png").unlink()
    result = ok("recover", "in-protected", "--key-file", "key")
    assert result.stdout.count("already done") == 3


def test_outputs_that_are_not_ours_or_not_whole_are_failures(folder, desk):
    ok(*folder)
    out = desk / "in-protected"
    (out / "a.protected.png").write_bytes((out / "a.protected.png").read_bytes()[:-20])
    (out / "b.protected.png").write_bytes(b"mine")
    Image.fromarray(PICTURE).save(desk / "in" / "sub" / "c.png")  # the original has changed since
    result = pyface(*folder)
    assert result.exit_code == 2
    assert "error: 3 of 4 photos failed" in result.stderr
    assert result.stderr.count("already exists") == 3
    assert (out / "b.protected.png").read_bytes() == b"mine"
    assert "already done" not in ok(*folder, "--overwrite").stdout
    ok("recover", "in-protected", "--key-file", "key")
    assert (pixels("in-recovered/sub/c.recovered.png") == PICTURE).all()
    (desk / "in-recovered" / "a.recovered.png").write_bytes(b"mine")
    result = pyface("recover", "in-protected", "--key-file", "key")
    assert result.exit_code == 2
    assert "error: 1 of 4 photos failed" in result.stderr


def test_other_key_or_options_are_not_taken_for_done(folder, desk):
    ok(*folder)
    (desk / "other").write_bytes(bytes(32))
    assert pyface(*[("other" if arg == "key" else arg) for arg in folder]).exit_code == 2
    assert pyface(*folder, "--obfuscator", "median").exit_code == 2


def test_one_bad_photo_does_not_stop_the_others(folder, desk):
    (desk / "in" / "bad.png").write_bytes(b"hello")
    (desk / "in" / "small.png").write_bytes(png(1, 1, 8, bytes(4)))
    result = pyface(*folder, "--json")
    assert result.exit_code == 2
    report = json.loads(result.stdout)
    assert len(report["photos"]) == 4
    assert [os.path.basename(entry["input"]) for entry in report["failed"]] == ["bad.png", "small.png"]
    assert "error: 2 of 6 photos failed" in result.stderr
    assert len(tree("in-protected")) == 4


def test_names_that_collide_keep_their_suffix(folder, desk):
    Image.fromarray(PICTURE).save(desk / "in" / "a.bmp")
    ok(*folder)
    assert {"a.png.protected.png", "a.bmp.protected.png"} <= set(tree("in-protected"))


def test_recovering_a_folder_shows_damaged_files_and_leaves_out_strangers(folder, desk):
    ok(*folder)
    out = desk / "in-protected"
    (out / "a.protected.png").write_bytes((out / "a.protected.png").read_bytes()[:-20])
    Image.fromarray(PICTURE).save(out / "stranger.png")
    result = pyface("recover", "in-protected", "--key-file", "key")
    assert result.exit_code == 2
    assert "1 PNG files without a pyface record are left out" in result.stderr
    assert "a.protected.png is cut off" in result.stderr
    assert len(tree("in-recovered")) == 3


def test_several_photos(desk):
    Image.fromarray(PICTURE).save("second.png")
    result = pyface("protect", "photo.png", "second.png", "--key-file", "key")
    assert result.exit_code == 2
    assert result.stderr.count("no face found") == 2
    fails("several photos need a folder", "protect", "photo.png", "second.png", "--key-file", "key", "-o", "key")


def test_bad_folders(desk):
    (desk / "empty").mkdir()
    fails("has no photos to be protected", "protect", "empty", "--key-file", "key")
    fails("not both", "protect", "empty", "photo.png", "--key-file", "key")
    fails("is a file, but a folder", "protect", "empty", "--key-file", "key", "-o", "photo.png")
    fails("folder with the originals", "protect", "empty", "--key-file", "key", "-o", "empty")


def test_folder_named_by_a_dot(folder, desk, monkeypatch):
    monkeypatch.chdir(desk / "in")
    result = ok("protect", ".", "--key-file", "../key", *folder[4:])
    assert "in-protected" in result.stdout
    assert len(tree(desk / "in-protected")) == 4
    assert len(tree(desk / "in")) == 6


def test_output_inside_the_input_folder_is_not_read_again(folder, desk):
    ok(*folder, "-o", "in/out")
    ok(*folder, "-o", "in/out")
    assert len(tree("in/out")) == 4


# ---- demo and the frame ---------------------------------------------------------------------


def test_demo_tells_the_whole_story(desk):
    result = ok("demo")
    assert tree("pyface-demo") == ["demo.key", "portrait.png", "protected.png", "recovered.png", "sheet.png"]
    for word in ("obfuscated", "protected", "recovered", "wrong key", "PSNR", "SSIM", "path '", "sheet.png"):
        assert word in result.stdout
    sheet = pixels("pyface-demo/sheet.png")
    assert sheet.shape[1] > 3 * sheet.shape[0]
    assert (sheet[0] == 255).all()
    ok("demo")
    ok("recover", "pyface-demo/protected.png", "--key-file", "pyface-demo/demo.key", "-o", "mine.png")
    assert (pixels("mine.png") == pixels("pyface-demo/recovered.png")).all()


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_every_verb_has_help(verb):
    result = ok(*([verb] if verb else []), "--help")
    assert "Usage: pyface" in result.stdout


def test_help_is_light():
    code = (
        "import sys, time; t = time.perf_counter()\n"
        "from pyface.cli.main import app\n"
        "app(['--help'], standalone_mode=False)\n"
        "print('SECONDS', time.perf_counter() - t, [m for m in ('torch', 'numpy', 'PIL') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    _, seconds, loaded = output.splitlines()[-1].split(maxsplit=2)
    assert loaded == "[]"
    assert float(seconds) > 0  # a timing is no assertion; the modules are what makes it slow


def test_unknown_verb_and_option_end_with_code_2():
    assert pyface("protct").exit_code == 2
    assert "protect" in pyface("protct").stderr
    assert pyface("protect", "--bogus").exit_code == 2
    assert pyface().exit_code == 2


def test_unforeseen_system_errors_are_one_line(desk, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(photos, "protect_photo", full)
    fails("No space left on device: somewhere", "protect", "photo.png", "--key-file", "key", *BOX)
    monkeypatch.setattr(photos, "protect_photo", lambda *args, **kwargs: (_ for _ in ()).throw(MemoryError()))
    fails("not enough memory", "protect", "photo.png", "--key-file", "key", *BOX)


def test_terminated_process_leaves_nothing(desk):
    """A real process, killed politely while it verifies what it wrote."""
    code = (
        "import time\n"
        "from pyface.methods.proface_s import photo as photos\n"
        "from pyface.methods.proface_s.model import ProFaceS\n"
        "photos.default_model = lambda: ProFaceS(blocks=1, growth=4)\n"
        "photos.load_protected = lambda *a, **k: (print('verifying', flush=True), time.sleep(60))\n"
        "from pyface.cli.main import run\n"
        "run()\n"
    )
    before = snapshot()
    args = ["protect", "photo.png", "--key-file", "key", *BOX]
    process = subprocess.Popen([sys.executable, "-c", code, *args], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "verifying\n"
    assert any(name.endswith(".part") for name in os.listdir())
    process.terminate()
    assert process.wait(20) == 143
    assert snapshot() == before
