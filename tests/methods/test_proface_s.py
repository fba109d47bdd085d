import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from pyface.data.obfuscators import obfuscate
from pyface.engine import Trainer
from pyface.errors import UserError
from pyface.methods import create_model, list_models, load_official, register_model
from pyface.methods.proface_s import losses
from pyface.methods.proface_s.convert import convert_state_dict, read_checkpoint
from pyface.methods.proface_s.model import DenseSubnet, ProFaceS
from pyface.methods.proface_s.recipe import (
    Config,
    Recipe,
    evaluate,
    psnr,
    random_key_map,
    validation_pictures,
    wrong_key_map,
)

# ------------------------------------------------------------------------------------------------------------- network


def pictures(height=32, width=24, batch=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(batch, 3, height, width, generator=generator, dtype=dtype) * 2 - 1
    key = torch.randint(0, 2, (batch, 1, height, width), generator=generator).to(dtype) * 2 - 1
    return image, obfuscate(image, "blur", 60.0), key


def random_model(std=0.03, dtype=torch.float32, **config):
    torch.manual_seed(0)
    model = ProFaceS(**config).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.requires_grad_(False)


def plain_dwt(x):
    a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    return torch.cat([(a + b + c + d) / 2, (-a + b - c + d) / 2, (-a - b + c + d) / 2, (a - b - c + d) / 2], 1)


def plain_idwt(bands):
    ll, hl, lh, hh = bands.chunk(4, 1)
    x = bands.new_zeros(bands.shape[0], bands.shape[1] // 4, 2 * bands.shape[2], 2 * bands.shape[3])
    x[..., ::2, ::2], x[..., ::2, 1::2] = (ll - hl - lh + hh) / 2, (ll + hl - lh - hh) / 2
    x[..., 1::2, ::2], x[..., 1::2, 1::2] = (ll - hl + lh - hh) / 2, (ll + hl + lh + hh) / 2
    return x


def plain_dense(weights, prefix, u):
    features = [u]
    for layer in range(1, 6):
        weight, bias = weights[f"{prefix}.conv{layer}.weight"], weights[f"{prefix}.conv{layer}.bias"]
        out = F.conv2d(torch.cat(features, 1), weight, bias, padding=1)
        features.append(F.leaky_relu(out, 0.01))
    return out


def plain_alpha(s):
    return torch.exp(4 * (torch.sigmoid(s) - 0.5))


def plain_protect(official, x, y, key, blocks):
    """The released forward pass, from the equations and under the released names."""
    x, y, key = plain_dwt(x), plain_dwt(y), plain_dwt(key)
    for i in range(blocks):
        name, u = f"model.inv_blocks.{i}", torch.cat((x, key), 1)
        y = plain_alpha(plain_dense(official, f"{name}.p", u)) * y + plain_dense(official, f"{name}.f", u)
        v = torch.cat((y, key), 1)
        x = plain_alpha(plain_dense(official, f"{name}.r", v)) * x + plain_dense(official, f"{name}.y", v)
    return plain_idwt(y), x


def plain_recover(official, protected, key, blocks):
    y, key = plain_dwt(protected), plain_dwt(key)
    x = torch.cat((key, key, key), 1)
    for i in reversed(range(blocks)):
        name, v = f"model.inv_blocks.{i}", torch.cat((y, key), 1)
        x = (x - plain_dense(official, f"{name}.y", v)) / plain_alpha(plain_dense(official, f"{name}.r", v))
        u = torch.cat((x, key), 1)
        y = (y - plain_dense(official, f"{name}.f", u)) / plain_alpha(plain_dense(official, f"{name}.p", u))
    return plain_idwt(x)


def official_state_dict(blocks=3, std=0.03, dtype=torch.float32):
    """Random weights in the complete layout of a released checkpoint."""
    generator = torch.Generator().manual_seed(3)
    state = {}
    for block in range(blocks):
        for subnet in "ryfp":
            for layer in range(1, 6):
                name = f"model.inv_blocks.{block}.{subnet}.conv{layer}"
                shape = (12 if layer == 5 else 32, 16 + 32 * (layer - 1), 3, 3)
                state[f"{name}.weight"] = torch.randn(shape, generator=generator, dtype=dtype) * std
                state[f"{name}.bias"] = torch.randn(shape[0], generator=generator, dtype=dtype) * std
    return state


@pytest.mark.parametrize("blocks", [1, 3])
def test_released_checkpoint_gives_the_released_function(blocks):
    official = official_state_dict(blocks, dtype=torch.float64)
    model = ProFaceS(blocks=blocks).double()
    model.load_state_dict(convert_state_dict(official), strict=True)
    x, y, key = pictures(dtype=torch.float64)
    with torch.no_grad():
        protected, by_product = model.protect(x, y, key, return_by_product=True)
        expected, expected_by_product = plain_protect(official, x, y, key, blocks)
        torch.testing.assert_close(protected, expected)
        torch.testing.assert_close(by_product, expected_by_product)
        torch.testing.assert_close(model.recover(protected, key), plain_recover(official, protected, key, blocks))


def test_parameter_count_is_the_published_one():
    assert sum(p.numel() for p in ProFaceS().parameters()) == 1_073_040
    assert sum(p.numel() for p in DenseSubnet().parameters()) == 89_420


def test_a_fresh_network_is_the_identity():
    x, y, key = pictures()
    protected, by_product = ProFaceS().protect(x, y, key, return_by_product=True)
    torch.testing.assert_close(protected, y)
    torch.testing.assert_close(by_product, plain_dwt(x))


@pytest.mark.parametrize(
    ("dtype", "subnet_dtype", "tolerance"),
    [(torch.float32, None, 1e-5), (torch.float64, None, 1e-10), (torch.float32, torch.bfloat16, 0.1)],
    ids=["fp32", "fp64", "bf16 sub-nets"],
)
@pytest.mark.parametrize("size", [(96, 64), (2, 2), (34, 58)])
def test_with_the_by_product_recovery_is_the_exact_inverse(dtype, subnet_dtype, tolerance, size):
    model = random_model(dtype=dtype, subnet_dtype=subnet_dtype)
    x, y, key = pictures(*size, dtype=dtype)
    protected, by_product = model.protect(x, y, key, return_by_product=True)
    assert protected.dtype == dtype
    assert (model.recover(protected, key, by_product=by_product) - x).abs().max() < tolerance
    assert (model.recover(protected, -key, by_product=by_product) - x).abs().max() > 0.2


def test_one_key_map_serves_a_batch():
    model, (x, y, key) = random_model(), pictures()
    key = key[:1]
    torch.testing.assert_close(model.protect(x, y, key), model.protect(x, y, key.repeat(2, 1, 1, 1)))
    torch.testing.assert_close(model.recover(y, key), model.recover(y, key.repeat(2, 1, 1, 1)))


def test_noise_instead_of_the_key():
    x, _, key = pictures()
    model = random_model(recovery_input="noise")
    torch.manual_seed(0)
    first = model.recover(x, key)
    assert not torch.equal(first, model.recover(x, key))
    torch.manual_seed(0)
    assert torch.equal(first, model.recover(x, key))


def test_narrow_pictures_are_widened():
    x, y, key = pictures()
    assert random_model().protect(x.bfloat16(), y.bfloat16(), key).dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8), torch.ones(1, 1, 8, 8)), r"image must be Tensor\[B, 3, H"),
        ((torch.zeros(1, 3, 8, 7), torch.zeros(1, 3, 8, 7), torch.ones(1, 1, 8, 7)), "even height and width"),
        ((torch.zeros(0, 3, 8, 8), torch.zeros(0, 3, 8, 8), torch.ones(1, 1, 8, 8)), "not be empty"),
        ((torch.zeros(1, 3, 8, 8).byte(), torch.zeros(1, 3, 8, 8), torch.ones(1, 1, 8, 8)), "floating point"),
        ((torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 6), torch.ones(1, 1, 8, 8)), "same shape"),
        ((torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8), torch.ones(3, 1, 8, 8)), r"key_map must be Tensor\[2 or 1"),
        ((torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8), torch.ones(1, 1, 4, 4)), "key_map must be"),
    ],
)
def test_wrong_tensors_are_explained(arguments, message):
    with pytest.raises(UserError, match=message):
        ProFaceS().protect(*arguments)


def test_wrong_recovery_and_settings_are_explained():
    with pytest.raises(UserError, match="by_product must be"):
        ProFaceS().recover(torch.zeros(1, 3, 8, 8), torch.ones(1, 1, 8, 8), by_product=torch.zeros(1, 3, 8, 8))
    with pytest.raises(UserError, match="recovery_input"):
        ProFaceS(recovery_input="zeros")
    with pytest.raises(UserError, match="blocks"):
        ProFaceS(blocks=0)


# ------------------------------------------------------------------------------------------------------- dense sub-net


def concatenating(net, stream, key):
    features = [torch.cat((stream, key.expand(stream.shape[0], -1, -1, -1)), 1)]
    for conv in net.children():
        out = conv(torch.cat(features, 1))
        features.append(F.leaky_relu(out, 0.01))
    return out


@pytest.mark.parametrize("batch_of_keys", [1, 3])
def test_one_buffer_equals_concatenation(batch_of_keys):
    torch.manual_seed(0)
    net = DenseSubnet()
    stream = torch.randn(3, 12, 9, 14, requires_grad=True)
    key = torch.randn(batch_of_keys, 4, 9, 14, requires_grad=True)
    inputs = [stream, key, *net.parameters()]
    out, expected = net(stream, key), concatenating(net, stream, key)
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn_like(out)
    for got, want in zip(
        torch.autograd.grad(out, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(net(stream, key), expected)


def test_gradcheck():
    torch.manual_seed(0)
    net = DenseSubnet(in_channels=3, out_channels=2, growth=2).double()
    stream = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    key = torch.randn(1, 1, 4, 5, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in net.named_parameters()]

    def run(stream, key, *parameters):
        return torch.func.functional_call(net, dict(zip(names, parameters, strict=True)), (stream, key))

    assert torch.autograd.gradcheck(run, (stream, key, *net.parameters()))


def test_frozen_sub_net_still_passes_gradients_on():
    net = DenseSubnet().requires_grad_(False)
    stream = torch.randn(1, 12, 4, 4, requires_grad=True)
    net(stream, torch.randn(1, 4, 4, 4)).sum().backward()
    assert stream.grad.abs().sum() > 0


def test_autocast_changes_nothing():
    torch.manual_seed(0)
    net = DenseSubnet()
    inputs = torch.randn(1, 12, 6, 6, requires_grad=True), torch.randn(1, 4, 6, 6)
    expected = net(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(*inputs)
    assert torch.equal(out, expected)
    out.sum().backward()


def test_training_keeps_one_buffer_per_sub_net():
    """Memory plan: 144 channels are saved, against 16 + 48 + 80 + 112 + 144 for a concatenation per layer."""
    net = DenseSubnet()
    parameters = {p.data_ptr() for p in net.parameters()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        net(torch.randn(2, 12, 64, 64), torch.randn(2, 4, 64, 64))
    activations = [t for t in saved if t.data_ptr() not in parameters and t.shape[-1] == 64]
    assert sum(t.numel() for t in activations) == 2 * 144 * 64 * 64


# -------------------------------------------------------------------------------------------- names and checkpoints


def test_registry():
    assert list_models() == sorted(list_models())
    assert "proface_s" in list_models("pro*")
    assert list_models("zzz*") == []
    assert len(create_model("proface_s", blocks=2).blocks) == 2
    with pytest.raises(UserError, match="did you mean 'proface_s'"):
        create_model("profaces")
    with pytest.raises(UserError, match="already registered"):
        register_model("proface_s", create_model, load_official)
    with pytest.raises(UserError, match="layers"):
        create_model("proface_s", layers=4)
    with pytest.raises(UserError, match="blocks=3"):
        create_model("proface_s", pretrained=True, blocks=2)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_load_official(tmp_path, suffix, prefix):
    official = {prefix + name: value for name, value in official_state_dict(blocks=2).items()}
    path = tmp_path / f"released{suffix}"
    torch.save(official, path) if suffix == ".pth" else save_file(official, path)
    model = load_official("proface_s", path)
    assert len(model.blocks) == 2
    assert torch.equal(model.blocks[1].omega.conv3.weight, official[f"{prefix}model.inv_blocks.1.p.conv3.weight"])


def test_convert_refuses_what_it_does_not_know():
    official = official_state_dict(blocks=1)
    with pytest.raises(UserError, match="unknown key 'model.extra'"):
        convert_state_dict(official | {"model.extra": torch.zeros(1)})
    del official["model.inv_blocks.0.f.conv2.bias"]
    with pytest.raises(UserError, match="no value for our 'blocks.0.phi.conv2.bias'"):
        convert_state_dict(official)
    with pytest.raises(UserError, match="incomplete"):
        convert_state_dict({})


def test_unreadable_checkpoints_are_explained(tmp_path):
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"a": os.getcwd}, tmp_path / "code.pth")
    for name in ("missing.pth", "missing.safetensors", "text.pth", "text.safetensors", "list.pth", "code.pth"):
        with pytest.raises(UserError, match=name):
            read_checkpoint(tmp_path / name)
    wrong = official_state_dict(blocks=1)
    wrong["model.inv_blocks.0.p.conv1.bias"] = torch.zeros(7)
    torch.save(wrong, tmp_path / "shape.pth")
    with pytest.raises(UserError, match="blocks.0.omega.conv1.bias has shape"):
        load_official("proface_s", tmp_path / "shape.pth")


# ------------------------------------------------------------------------------------------------------------- losses


def test_released_triplet_works_row_by_row():
    torch.manual_seed(0)
    a, p, n = torch.rand(3, 2, 3, 6, 5).unbind()
    near, far = ((a - other + 1e-6).abs().sum(3) for other in (p, n))
    assert near.shape == (2, 3, 6)
    torch.testing.assert_close(losses.l1_triplet(a, p, n), (near - far + 1.2).clamp(min=0).mean())
    near, far = ((a - other).abs().mean((1, 2, 3)) for other in (p, n))
    expected = (near - far + 1.2).clamp(min=0).mean()
    torch.testing.assert_close(losses.l1_triplet(a, p, n, per_image=True), expected)


def test_released_objectives():
    torch.manual_seed(0)
    x, y, protected, recovered, wrong = torch.rand(5, 2, 3, 6, 4).unbind()
    l1 = F.l1_loss

    def distance(a, b):
        return (a - b).square().mean((1, 2, 3))

    def triplet(a, p, n):
        return (distance(a, p).mean() - distance(a, n).mean() + 1.2).clamp(min=0)

    hiding = 5 * distance(y, protected).mean() + l1(y, protected)
    random_wr = (
        0.3 * hiding
        + 0.5 * l1(recovered, x)
        + 0.2 * (triplet(x, recovered, wrong) + losses.l1_triplet(x, recovered, wrong))
    )
    obfuscated_wr = (
        0.2 * hiding + 0.3 * (l1(recovered, x) + l1(wrong, y)) + 0.5 * (triplet(recovered, x, y) + triplet(wrong, y, x))
    )
    given = (x, y, protected, recovered, wrong)
    torch.testing.assert_close(losses.random_wr_loss(*given, perceptual=distance)[0], random_wr)
    torch.testing.assert_close(losses.obfuscated_wr_loss(*given, perceptual=distance)[0], obfuscated_wr)
    without = 0.3 * l1(y, protected) + 0.5 * l1(recovered, x) + 0.2 * losses.l1_triplet(x, recovered, wrong)
    torch.testing.assert_close(losses.random_wr_loss(*given)[0], without)


def test_store_8bit_is_a_file_forward_and_the_identity_backward():
    x = torch.linspace(-1.3, 1.3, 997).view(1, 1, 1, -1).requires_grad_()
    stored = losses.store_8bit(x)
    bytes_ = (stored.detach() + 1) * 127.5
    torch.testing.assert_close(bytes_, bytes_.round().clamp(0, 255), atol=2e-5, rtol=0)
    assert (stored - x.clamp(-1, 1)).abs().max() <= 0.5 / 127.5 + 1e-6
    stored.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("size", [6, 20, 64])
def test_leak_sees_the_face_in_any_colours(size):
    image = validation_pictures(64)["astronaut"][..., :size, :size]
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    assert losses.leak(image, image).item() == pytest.approx(1, abs=1e-3)
    assert losses.leak(0.8 - 0.5 * image, image).item() == pytest.approx(0.25, abs=1e-3)
    assert losses.leak(torch.full_like(image, 0.7), image).item() == pytest.approx(0, abs=1e-6)
    if size == 64:
        assert losses.leak(image.roll(21, 3), image).item() < 0.2
        assert psnr(1 - 2 * image, image) < 8
        assert losses.leak(1 - 2 * image + 0.05 * noise, image).item() > 3


def test_leak_lets_gradients_through():
    image = validation_pictures(32)["chelsea"]
    wrong = (0.5 * image).requires_grad_()
    before = losses.leak(wrong, image)
    (gradient,) = torch.autograd.grad(before.sum(), wrong)
    step = 0.1 * before.detach() / gradient.square().sum()
    assert losses.leak(wrong - step * gradient, image) < before


def test_deployable_limits_stop_paying_once_met():
    x = torch.zeros(1, 3, 8, 8)
    recovered = (x + 0.1).requires_grad_()
    stored = (x + 0.001).requires_grad_()
    wrong = (x + 1.0).requires_grad_()  # far away, and flat: shows nothing
    loss, report = losses.deployable_loss(x, x, stored, recovered, wrong)
    assert report["recovered"] == pytest.approx(-20 * np.log10(0.05), abs=1e-3)
    assert report["protected"] == pytest.approx(-20 * np.log10(0.0005), abs=0.05)
    loss.backward()
    assert recovered.grad.abs().sum() > 0
    assert not stored.grad.any()
    assert not wrong.grad.any()
    assert report["leak"] < 1e-9
    near = (x + 0.3).requires_grad_()
    losses.deployable_loss(x, x, near, recovered, near)[0].backward()
    assert near.grad.abs().sum() > 0


# ------------------------------------------------------------------------------------------------------------- recipe

SMALL = {
    "scenes": 6, "scene_size": 32, "stages": ((0.5, 16, 1.0), (1.0, 24, 0.5)), "batch_size": 2, "steps": 40,
    "max_minutes": None, "checkpoint_every": 5, "log_every": 10, "validate_every": 1000, "validation_size": 16,
    "workers": 0, "warmup": 5, "ema": 0.9,
}  # fmt: skip


def train(config, folder, resume=False, perceptual=None):
    return Trainer(Recipe(config, perceptual), folder, resume=resume, quiet=True).fit()


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_killed_run_ends_where_an_unbroken_one_does(tmp_path, one_thread):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    config = Config.preset("default", **SMALL)
    expected = train(config, whole)
    broken.mkdir()
    os.link(whole / "pool.npy", broken / "pool.npy")
    code = (
        "import json, sys, torch; torch.set_num_threads(1)\n"
        "from pyface.engine import Trainer\n"
        "from pyface.methods.proface_s.recipe import Config, Recipe\n"
        "Trainer(Recipe(Config.preset('default', **json.loads(sys.argv[1]))), sys.argv[2], quiet=True).fit()\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, json.dumps(SMALL), str(broken)])
    deadline = time.monotonic() + 60
    while not list(broken.glob("checkpoints/step-*")):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    with (broken / "log.csv").open() as file:
        assert len(list(csv.reader(file))) < 5
    resumed = train(config, broken, resume=True)
    for name, value in expected.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    with (whole / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["recovered"]) > float(rows[0]["recovered"]) + 3
    assert float(rows[-1]["lr"]) < 1e-4
    for folder in (whole, broken):
        with (folder / "log.csv").open() as file:
            assert [int(row["step"]) for row in csv.DictReader(file)] == [10, 20, 30, 40]
        with (folder / "validation.csv").open() as file:
            assert [row["step"] for row in csv.DictReader(file)] == ["40"] * 15
    with pytest.raises(UserError, match="other settings"):
        train(Config.preset("default", **SMALL | {"lr": 1e-4}), broken, resume=True)
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("objective", ["random_wr", "obfuscated_wr"])
def test_released_objectives_train_on_photographs(tmp_path, objective, one_thread):
    from PIL import Image

    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.jpg")
    settings = SMALL | {"objective": objective, "data": str(tmp_path), "scenes": 2, "steps": 3, "workers": 1}
    calls = []

    def distance(a, b):
        calls.append(a.shape)
        return (a - b).abs().mean((1, 2, 3))

    config = Config.preset("paper", **settings)
    assert config.eps == 1e-6
    train(config, tmp_path / "run", perceptual=distance)
    assert np.load(tmp_path / "run" / "pool.npy").shape == (2, 2, 32, 32, 3)
    assert calls


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "x"}, "must be one of deployable, random_wr, obfuscated_wr"),
        ({"subnet": "float8"}, "must be one of bfloat16, float32"),
        ({"steps": 0}, "must be positive"),
        ({"stages": ((1.0, 15, 1.0),)}, "even crop"),
        ({"stages": ((1.0, 512, 1.0),)}, "at most 256"),
        ({"stages": ((0.5, 64, 1.0),)}, "ends at 1"),
        ({"stages": ((1.0, 64, 0.3),)}, "whole number"),
        ({"stages": ((1.0, 64, 0.0),)}, "whole number"),
        ({"scenes": 0}, "must be positive"),
    ],
)
def test_unusable_settings_are_explained(changes, message):
    with pytest.raises(UserError, match=message):
        Config.preset("default", **changes)


def test_bad_training_folders_are_explained(tmp_path):
    with pytest.raises(UserError, match="unknown preset"):
        Config.preset("huge")
    with pytest.raises(UserError, match="no .jpg"):
        train(Config.preset("default", **SMALL | {"data": str(tmp_path)}), tmp_path / "run", resume=True)
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"broken\.jpg"):
        train(Config.preset("default", **SMALL | {"data": str(tmp_path)}), tmp_path / "run", resume=True)


def test_the_published_distance_is_never_downloaded_silently(tmp_path, monkeypatch):
    pytest.importorskip("lpips")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    config = Config.preset("paper", **SMALL | {"steps": 1})
    with pytest.raises(UserError, match="vgg16-397923af.pth into .*hub.*perceptual=false"):
        train(config, tmp_path / "run")


def test_one_photograph_in_ten_is_kept_from_training(tmp_path):
    from PIL import Image

    from pyface.methods.proface_s.recipe import _files, _held_out

    for index in range(21):
        Image.new("RGB", (20, 30), (10 * index, 0, 0)).save(tmp_path / f"{index}.png")
    config = Config.preset("tiny", data=str(tmp_path), validation_size=16)
    held, trained = _held_out(config), _files(config)
    assert (len(held), len(trained)) == (2, 19)
    assert set(held).isdisjoint(trained)
    rows = Recipe(config).evaluate(ProFaceS(blocks=1, growth=4))
    assert {row["picture"] for row in rows} == {os.path.basename(file) for file in held}


def test_parts_of_a_batch_draw_what_the_whole_draws(tmp_path, one_thread):
    settings = SMALL | {"steps": 3, "batch_size": 4, "subnet": "float32", "validation_size": 8}
    whole = train(Config.preset("default", **settings), tmp_path / "whole")
    (tmp_path / "parts").mkdir()
    os.link(tmp_path / "whole" / "pool.npy", tmp_path / "parts" / "pool.npy")
    parts = train(Config.preset("default", **settings, accumulate=2), tmp_path / "parts")
    moved = 0.0
    fresh = Recipe(Config.preset("default", **settings)).model().state_dict()
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-3, atol=2e-5)
        moved = max(moved, (value - fresh[name]).abs().max().item())
    assert moved > 1e-3


# ---------------------------------------------------------------------------------------------------- shipped weights


@pytest.fixture(scope="module")
def pretrained():
    return create_model("proface_s", pretrained=True).eval()


@pytest.mark.parametrize(
    ("size", "subnet_dtype", "names"),
    [
        (256, torch.bfloat16, ("astronaut", "coffee", "chelsea", "rocket", "lfw")),
        (256, None, ("coffee",)),
        (128, None, ("astronaut",)),
        (400, torch.bfloat16, ("astronaut",)),
    ],
    ids=["256-bf16", "256-fp32", "128-fp32", "400-bf16"],
)
def test_shipped_weights_meet_the_bars(pretrained, size, subnet_dtype, names):
    photographs = validation_pictures(size)
    pretrained.subnet_dtype = subnet_dtype
    rows = evaluate(pretrained, {name: photographs[name] for name in names}, seed=size)
    assert len(rows) == 3 * len(names)
    failed = [
        row for row in rows
        if row["recovered"] < 36 or row["protected"] < 38 or row["wrong"] > 13 or row["leak"] > 0.01
        or row["keyless"] > 0.02
    ]  # fmt: skip
    assert not failed


def test_wrong_keys_in_training_are_of_every_kind():
    rng = np.random.default_rng(0)
    maps = wrong_key_map(200, 8, 10, rng)
    assert maps.shape == (200, 1, 8, 10)
    signs = (maps.abs() == 1).flatten(1).all(1)
    assert 80 < signs.sum() < 160
    assert 5 < (maps == 0).flatten(1).all(1).sum() < 40
    assert maps.abs().flatten(1).std(1).max() > 0.1


@torch.no_grad()
def test_the_obfuscated_picture_alone_does_not_give_the_face_back(pretrained):
    pretrained.subnet_dtype = None
    image = validation_pictures(128)["astronaut"]
    hidden = obfuscate(image, "blur")
    key = random_key_map(1, 128, 128, np.random.default_rng(0))
    assert psnr(pretrained.recover(hidden, key), image) < psnr(hidden, image) + 3


def test_psnr_against_scikit_image():
    from skimage.metrics import peak_signal_noise_ratio

    x, y, _ = pictures(batch=1)
    expected = peak_signal_noise_ratio((x.numpy() + 1) / 2, (y.numpy() + 1) / 2, data_range=1)
    assert psnr(x, y) == pytest.approx(expected, abs=1e-4)
    assert psnr(x, x) == float("inf")
