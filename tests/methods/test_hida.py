import importlib.util
import json
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from skimage import data as pictures
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

from pyface.engine import Trainer
from pyface.errors import UserError
from pyface.methods import create_model, find_recipe, list_models, load_official
from pyface.methods.hida import convert, depth, losses, photo, recipe
from pyface.methods.hida.model import (
    HIDA,
    AdaptiveUp,
    Discriminator,
    MetaAcon,
    OutlineUp,
    acon,
    style_weights,
)
from pyface.methods.hida.recipe import Config


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def inputs(size=64, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(batch, 3, size, size, generator=generator) * 2 - 1
    return image, torch.rand(batch, 1, size, size, generator=generator), style_weights([1, 3][:batch], batch)


def small(**config):
    torch.manual_seed(0)
    return HIDA(2, 64, **config).eval()


# ------------------------------------------------------------------------- the released network, from the equations


def layer(shape, generator, device="cpu"):
    scale = 1 / math.sqrt(max(1, math.prod(shape[1:])))
    if device == "meta":
        return torch.empty(shape, device=device)
    return torch.randn(shape, generator=generator) * scale


def released(width=2, device="cpu", seed=0):
    """A state dict with the names and shapes of the authors' generator, the unused ones included."""
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def conv(name, outs, ins, kernel):
        state[f"{name}.weight"] = layer((outs, ins, kernel, kernel), generator, device)
        state[f"{name}.bias"] = layer((outs,), generator, device)

    def scalars(name, channels):
        for p in ("p1", "p2"):
            state[f"{name}.{p}"] = layer((1, channels, 1, 1), generator, device)

    def meta(name, channels):
        inner = max(16, channels // 16)
        conv(f"{name}.fc1", inner, channels, 1)
        conv(f"{name}.fc2", channels, inner, 1)
        scalars(name, channels)
        for norm, count in (("bn1", inner), ("bn2", channels)):
            for part in ("weight", "bias", "running_mean", "running_var"):
                state[f"{name}.{norm}.{part}"] = layer((count,), generator, device)
            state[f"{name}.{norm}.num_batches_tracked"] = torch.zeros((), dtype=torch.long, device=device)

    conv("down_rgb", width, 3, 4)
    conv("down_par", width, 1, 4)
    encoded = [2, 2, 4, 8, 8, 8, 8, 8]
    for number, (ins, outs) in enumerate(zip(encoded, encoded[1:]), 2):
        meta(f"down{number}.model.0", ins * width)
        conv(f"down{number}.model.1", outs * width, ins * width, 4)
    outputs = [8, 8, 8, 8, 4, 2, 1]
    sizes = [8, 16, 16, 16, 16, 8, 4]
    for number, (ins, outs) in enumerate(zip(sizes, outputs)):
        name, ins, outs = f"up{number}", ins * width, outs * width
        conv(f"{name}.layers", outs, ins, 4)
        state[f"{name}.layers.weight"] = layer((ins, outs, 4, 4), generator, device)
        conv(f"{name}.dcn", outs, ins, 3)
        conv(f"{name}.dcn.conv_offset_mask", 54, ins, 3)
        conv(f"{name}.fc1", outs, 5, 3)
        conv(f"{name}.fc2", outs, 4, 3)
        conv(f"{name}.fc3", outs, outs, 3)
        scalars(name, outs)
        conv(f"{name}.en_conv", 1, ins // 2, 4)
        state[f"{name}.en_conv.weight"] = layer((ins // 2, 1, 4, 4), generator, device)
        meta(f"{name}.metaAcon", outs)
        meta(f"{name}.metaAcon_en", 1)
        conv(f"{name}.norm.mlp_shared.0", 128, 2, 3)
        meta(f"{name}.norm.mlp_shared.1", 128)
        meta(f"{name}.norm.metaAcon", ins)
        conv(f"{name}.norm.mlp_gamma", outs, outs, 3)
        conv(f"{name}.norm.mlp_beta", outs, outs, 3)
    for head in ("final_rgb", "final_par"):
        meta(f"{head}.0", 2 * width)
        conv(f"{head}.1", 1, 2 * width, 4)
        state[f"{head}.1.weight"] = layer((2 * width, 1, 4, 4), generator, device)
    return {f"Generator.{key}": value for key, value in state.items()}


def plain_hida(state, image, relief, style):
    """The released forward pass, sheet section 3, under the released names; ``style`` 1, 2 or 3."""
    state = {key.removeprefix("Generator."): value for key, value in state.items()}

    def part(name):
        return state[f"{name}.weight"], state[f"{name}.bias"]

    def plain_acon(x, name, switch):
        p1, p2 = state[f"{name}.p1"], state[f"{name}.p2"]
        return (p1 * x - p2 * x) * torch.sigmoid(switch * (p1 * x - p2 * x)) + p2 * x

    def meta(x, name):
        pooled = F.conv2d(F.conv2d(x.mean((2, 3), keepdim=True), *part(f"{name}.fc1")), *part(f"{name}.fc2"))
        return plain_acon(x, name, torch.sigmoid(pooled))

    def norm(x):
        mean, variance = x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True, unbiased=False)
        return (x - mean) / (variance + 1e-5).sqrt()

    seen = F.conv2d(image, *part("down_rgb"), stride=2, padding=1)
    form = F.conv2d(relief, *part("down_par"), stride=2, padding=1)
    features = [torch.cat((seen, form), 1)]
    for number in range(2, 9):
        x = F.conv2d(meta(features[-1], f"down{number}.model.0"), *part(f"down{number}.model.1"), stride=2, padding=1)
        features.append(x if number == 8 else norm(x))
    planes = image.new_zeros(len(image), 3, *image.shape[2:])
    planes[:, {1: 2, 2: 0, 3: 1}[style]] = 1
    out = features.pop()
    for number in range(7):
        name = f"up{number}"
        skip = features.pop() if number else None
        z = out if skip is None else torch.cat((out, skip), 1)
        if number < 2:
            z = F.interpolate(z, scale_factor=2, mode="bilinear")
            branch = F.conv2d(z, *part(f"{name}.dcn.conv_offset_mask"), padding=1)
            first, second, mask = branch.chunk(3, 1)
            weight, bias = part(f"{name}.dcn")
            y = deform_conv2d(z, torch.cat((first, second), 1), weight, bias, padding=1, mask=torch.sigmoid(mask))
        else:
            y = F.conv_transpose2d(z, *part(f"{name}.layers"), stride=2, padding=1)
        condition = F.interpolate(torch.cat((relief, planes), 1), y.shape[2:], mode="nearest")
        if skip is None:
            condition = F.conv2d(condition, *part(f"{name}.fc2"), padding=1)
        else:
            view = meta(F.conv_transpose2d(skip, *part(f"{name}.en_conv"), stride=2, padding=1), f"{name}.metaAcon_en")
            condition = F.conv2d(torch.cat((condition, view), 1), *part(f"{name}.fc1"), padding=1)
        condition = meta(condition, f"{name}.metaAcon")
        theta = torch.sigmoid(F.conv2d(condition, *part(f"{name}.fc3"), padding=1))
        gamma = F.conv2d(condition, *part(f"{name}.norm.mlp_gamma"), padding=1)
        beta = F.conv2d(condition, *part(f"{name}.norm.mlp_beta"), padding=1)
        active = plain_acon(y, name, theta)
        out = norm(active) * (1 + gamma) + beta + active
    drawn, reconstructed = (
        F.conv_transpose2d(meta(torch.cat((out, stem), 1), f"{head}.0"), *part(f"{head}.1"), stride=2, padding=1)
        for head, stem in (("final_rgb", seen), ("final_par", form))
    )
    return torch.tanh(drawn), reconstructed


@pytest.mark.parametrize("style", [1, 2, 3])
def test_a_released_checkpoint_draws_as_the_equations_say(tmp_path, style):
    state = released()
    file = tmp_path / "epoch=749.ckpt"
    torch.save({"state_dict": state | {"Discrimanator.discriminator_0.model5.0.bias": torch.zeros(1)}}, file)
    model = load_official("hida", file).double().eval()
    assert model.width == 2
    assert model.image_size == 256
    image, relief, _ = inputs(256, 1)
    with torch.no_grad():
        found = model(image.double(), relief.double(), style_weights(style).double(), return_depth=True)
        state = {name: value.double() for name, value in state.items()}
        for one, expected in zip(found, plain_hida(state, image.double(), relief.double(), style)):
            torch.testing.assert_close(one, expected, atol=1e-9, rtol=1e-7)


def test_sizes_are_those_of_the_release():
    with torch.device("meta"):
        model, critic = HIDA(), Discriminator()
    state = released(64, "meta")
    assert round(sum(value.numel() for value in state.values()) / 1e6, 1) == 108.7
    converted = convert.convert_state_dict(state)
    assert sum(value.numel() for value in converted.values()) == convert.USED == 80_894_566
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert sum(p.numel() for p in critic.parameters()) == 2_763_713
    sizes = [sum(p.numel() for p in model.up[block].up.parameters()) for block in (0, 1)]
    assert sizes == [2_359_296 + 512 + 248_886, 4_718_592 + 512 + 497_718]


def test_shapes_inside():
    model, critic = HIDA(4), Discriminator(4)
    shapes = []
    for block in (*model.down, *model.up):
        block.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape[1:])))
    with torch.no_grad():
        drawn = model(*inputs(256, 1))
    encoder = [(8, 64), (16, 32), (32, 16), (32, 8), (32, 4), (32, 2), (32, 1)]
    decoder = [(32, 2), (32, 4), (32, 8), (32, 16), (16, 32), (8, 64), (4, 128)]
    assert shapes == [(channels, side, side) for channels, side in encoder + decoder]
    assert drawn.shape == (1, 1, 256, 256)
    assert drawn.abs().max() <= 1
    assert critic(torch.zeros(1, 1, 256, 256), drawn).shape == (1, 1, 35, 35)


def test_the_critic_is_the_released_one():
    generator = torch.Generator().manual_seed(0)
    places = {"model0.0": (4, 2), "model1.1": (8, 4), "model2.1": (16, 8), "model3.1": (32, 16), "model5.0": (1, 32)}
    state = {}
    for name, shape in places.items():
        state[f"Discrimanator.discriminator_0.{name}.weight"] = layer((*shape, 4, 4), generator)
        state[f"Discrimanator.discriminator_0.{name}.bias"] = layer(shape[:1], generator)
    critic = Discriminator(4)
    critic.load_state_dict(convert.convert_critic(state))
    relief, drawn = torch.rand(2, 1, 64, 64), torch.rand(2, 1, 64, 64) * 2 - 1
    x = torch.cat((relief, drawn), 1)
    for index, (name, stride) in enumerate(zip(places, (2, 2, 2, 1, 1))):
        key = f"Discrimanator.discriminator_0.{name}"
        if index:
            x = F.instance_norm(x)
        if index == 4:
            x = F.leaky_relu(x, 0.2)
        x = F.conv2d(x, state[f"{key}.weight"], state[f"{key}.bias"], stride, 2)
        if index < 4:
            x = F.leaky_relu(x, 0.2)
    torch.testing.assert_close(critic(relief, drawn), x)


def test_checkpoints_that_are_not_hidas_are_refused(tmp_path):
    state = released()
    with pytest.raises(UserError, match=r"unknown key 'up7\.fc1\.weight'"):
        convert.convert_state_dict(state | {"Generator.up7.fc1.weight": torch.zeros(1)})
    state.pop("Generator.up3.fc3.bias")
    with pytest.raises(UserError, match=r"no value for 'up3\.fc3\.bias'"):
        convert.convert_state_dict(state)
    with pytest.raises(UserError, match="not a complete HIDA checkpoint"):
        convert.convert_critic(released())
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="does not hold HIDA's weights"):
        convert.load(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="cannot read"):
        convert.load(tmp_path / "missing.safetensors")


@pytest.mark.parametrize("config", [{}, {"deformable": False}, {"adaptation": "style"}])
def test_weights_of_any_width_come_back(tmp_path, config):
    model = small(**config)
    save_file({name: value.half() for name, value in model.state_dict().items()}, tmp_path / "w.safetensors")
    back = convert.load(tmp_path / "w.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(back(*inputs()), model(*inputs()), atol=0.02, rtol=0)


# --------------------------------------------------------------------------------------------- the parts, one by one


def test_metaacon_without_its_branch_is_a_swish():
    module = MetaAcon(5)
    for branch in (module.reduce, module.expand):
        torch.nn.init.zeros_(branch.weight)
        torch.nn.init.zeros_(branch.bias)
    module.p1.data.fill_(1)
    module.p2.data.fill_(0)
    x = torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(module(x), x * torch.sigmoid(x / 2))
    torch.testing.assert_close(acon(x, torch.ones(()), torch.zeros(()), torch.ones(())), F.silu(x))


def test_outlines_start_as_half_a_convolution():
    block = OutlineUp(6, 4, deformable=True)
    block.conv.bias.data.normal_()
    z = torch.randn(2, 6, 3, 3)
    up = F.interpolate(z, scale_factor=2, mode="bilinear")
    expected = 0.5 * F.conv2d(up, block.conv.weight, padding=1) + block.conv.bias[:, None, None]
    torch.testing.assert_close(block(z), expected, atol=1e-5, rtol=1e-5)
    assert block.conv.weight.abs().max() <= 1 / math.sqrt(9 * 6)
    assert sum(p.numel() for p in OutlineUp(6, 4, False).parameters()) == 6 * 4 * 9 + 4


@pytest.mark.parametrize("gain", ["1+gamma", "gamma"])
@pytest.mark.parametrize("residual", ["post", "pre"])
def test_variants_of_the_block(gain, residual):
    torch.manual_seed(0)
    block = AdaptiveUp(
        4, 2, 3, outline=False, dropout=0.0, deformable=True, adaptation="pixel", gain=gain, residual=residual
    )
    torch.nn.init.zeros_(block.modulation.weight)
    torch.nn.init.zeros_(block.modulation.bias)
    previous, skip, relief = torch.randn(2, 4, 4, 4), torch.randn(2, 2, 4, 4), torch.rand(2, 1, 8, 8)
    y = block.up(torch.cat((previous, skip), 1))
    active = acon(y, block.p1, block.p2, torch.tensor(0.5))  # theta = sigmoid(0)
    expected = active if residual == "post" else y
    if gain == "1+gamma":
        expected = expected + F.instance_norm(active)
    torch.testing.assert_close(block(previous, skip, relief, style_weights(1, 2)), expected)


def test_styles_differ_and_mix():
    assert style_weights([2, 1], 2).tolist() == [[0, 1, 0], [1, 0, 0]]
    assert style_weights(3, 2).tolist() == [[0, 0, 1]] * 2
    assert style_weights((0.5, 0.5, 0.0)).tolist() == [[0.5, 0.5, 0]]
    image, relief, _ = inputs(batch=1)
    model = small()
    with torch.no_grad():
        drawn = [model(image, relief, style_weights(style)) for style in (1, 2, 3, (0.5, 0.5, 0.0))]
    for index, one in enumerate(drawn):
        for other in drawn[:index]:
            assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize(
    "style", [0, 4, True, "1", (0.5, 0.6, 0.0), (-0.5, 1.5, 0.0), (1.0,), (0.5, 0.5), 1.0, [1, 2, 3], math.nan, None]
)
def test_styles_that_are_none(style):
    with pytest.raises(UserError, match="style"):
        style_weights(style, 2)


@pytest.mark.parametrize("config", [{}, {"deformable": False}, {"adaptation": "style"}, {"residual": "pre"}])
def test_a_picture_does_not_depend_on_its_batch_mates(config):
    model, (image, relief, style) = small(**config), inputs()
    with torch.no_grad():
        both = model(image, relief, style)
        alone = torch.cat([model(image[i : i + 1], relief[i : i + 1], style[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(both, alone, atol=1e-5, rtol=1e-5)


def test_everything_learns_and_dropout_is_for_training():
    model, critic = small().train(), Discriminator(2)
    torch.manual_seed(0)
    for block in model.up[:2]:  # from zero, the offset branch gets its first gradient through the mask alone
        torch.nn.init.normal_(block.up.conv.weight)
    image, relief, style = inputs()
    drawn, form = model(image, relief, style, return_depth=True)
    loss = losses.generator_loss(critic(relief, drawn)) + losses.geometry_loss(form, relief)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert not torch.equal(model(image, relief, style), drawn)
    model.eval()
    assert torch.equal(model(image, relief, style), model(image, relief, style))


def test_the_ablation_leaves_depth_out_of_the_decoder():
    image, relief, style = inputs()
    for adaptation, touched in (("pixel", True), ("style", False)):
        model = small(adaptation=adaptation)
        torch.nn.init.zeros_(model.depth_stem.weight)
        with torch.no_grad():
            changed = (model(image, relief, style) - model(image, 1 - relief, style)).abs().max() > 1e-4
        assert changed == touched


def test_settings_and_shapes_are_checked():
    for config in ({"width": 0}, {"image_size": 100}, {"gain": "x"}, {"residual": "x"}, {"adaptation": "x"}):
        with pytest.raises(UserError, match=next(iter(config))):
            HIDA(**{"width": 2, "image_size": 32} | config)
    model, (image, relief, style) = small(), inputs()
    for wrong in (
        (image[:, :2], relief, style),
        (image[..., :48], relief, style),
        (image, relief[..., :32], style),
        (image, relief, style[:, :2]),
    ):
        with pytest.raises(UserError, match="hida: "):
            model(*wrong)
    wide = torch.cat((image, image), 3), torch.cat((relief, relief), 3), style
    assert model(*wide).shape == (2, 1, 64, 128)
    assert "hida" in list_models()
    assert create_model("hida", width=2, image_size=32).width == 2
    with pytest.raises(UserError, match="unexpected keyword argument 'depth'"):
        create_model("hida", depth=3)


def test_bf16_stays_close():
    model, (image, relief, style) = small(), inputs()
    with torch.no_grad():
        exact = model(image, relief, style)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(image, relief, style)
    assert (rough.float() - exact).abs().mean() < 0.05


@pytest.mark.gpu
def test_gpu_agrees():
    model, (image, relief, style) = small(), inputs()
    with torch.no_grad():
        here = model(image, relief, style)
        there = model.cuda()(image.cuda(), relief.cuda(), style.cuda()).cpu()
    assert (here - there).abs().max() < 1e-4


def test_the_shipped_network_draws_like_its_artists():
    from pyface.data.procedural import ProceduralFaces
    from pyface.data.sketch import sketch
    from pyface.metrics import scoot

    model = create_model("hida", pretrained=True).eval()
    people = ProceduralFaces(12, 250, seed=7, identities=12, occluders=False)
    samples = [people[index] for index in (0, 5, 10)]
    image, relief = (torch.stack([sample[name] for sample in samples]) for name in ("image", "depth"))
    drawn = {style: recipe.draw(model, image, relief, style_weights(style, 3)) for style in (1, 2, 3)}
    for style, found in drawn.items():
        artist = torch.stack([sketch(sample, style) for sample in samples])
        assert (found - artist).abs().mean() < 0.12
        scores = {other: scoot(drawn[other], artist).mean().item() for other in drawn}
        assert max(scores, key=scores.get) == style
    with pytest.raises(UserError, match="fix all settings"):
        create_model("hida", pretrained=True, width=64)


# -------------------------------------------------------------------------------------------------------- objectives


def test_texture_loss_follows_directions_not_contrast():
    generator = torch.Generator().manual_seed(0)
    image = F.interpolate(torch.rand(1, 3, 6, 6, generator=generator), (32, 32), mode="bicubic")
    grey = image.sum(1, keepdim=True)
    assert losses.texture_loss(3 * grey, image) < 0.02
    assert losses.texture_loss(-grey, image) > 1.9
    flat = torch.full((1, 1, 8, 8), 0.3, requires_grad=True)
    inner = losses.texture_loss(flat, torch.full((1, 3, 8, 8), 0.3))
    inner.backward()
    assert flat.grad.isfinite().all()
    assert inner <= 1


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.2, 5))
def test_texture_loss_by_its_definition(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(1, 1, 7, 6, generator=generator)
    image = scale * torch.rand(1, 3, 7, 6, generator=generator)
    a, b = (F.pad(x.expand(-1, 3, -1, -1).sum(1)[0], (1, 1, 1, 1)).numpy() for x in (drawn, image))
    total = 0.0
    for r in range(7):
        for c in range(6):
            gradients = []
            for x in (a, b):
                patch = x[r : r + 3, c : c + 3]
                gradients.append(((patch[:, 0] - patch[:, 2]).sum() / 3, (patch[0] - patch[2]).sum() / 3))
            (x, y), (u, v) = gradients
            total += 1 - (x * u + y * v) / math.sqrt(x * x + y * y + 1e-7) / math.sqrt(u * u + v * v + 1e-7)
    assert losses.texture_loss(drawn, image).item() == pytest.approx(total / 42, abs=1e-4)


def test_geometry_loss_has_a_gradient_where_nothing_is_wrong():
    relief = torch.rand(2, 1, 4, 4)
    guess = relief.clone().requires_grad_()
    loss = losses.geometry_loss(guess, relief)
    loss.backward()
    assert loss < 2e-6
    assert guess.grad.isfinite().all()
    assert losses.geometry_loss(relief + 0.25, relief).item() == pytest.approx(0.25)


def test_critic_loss():
    real, drawn = torch.tensor([[[[2.0, 0.0]]]]), torch.tensor([[[[-3.0, 1.0]]]])
    # hinge: (0 + 1)/2 on real, (0 + 2)/2 on drawn; means 1 and -1: balance 2 * 0.5 * 2^4
    assert losses.critic_loss(real, drawn).item() == pytest.approx(0.5 + 1.0 + 16)
    assert losses.critic_loss(real, drawn, balance=0.0).item() == pytest.approx(1.5)
    assert losses.generator_loss(drawn).item() == pytest.approx(1.0)


# ------------------------------------------------------------------------------------------------------------- depth


def face_map(height=40, width=30):
    return depth.rough_head(height, width, (3, 4, 24, 30))


def write_depth(path, values):
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        Image.fromarray(values).save(path)


@pytest.mark.parametrize("kind", ["8", "16", "rgb", "npy", "npy16", "npy1hw"])
def test_depth_files_come_back(tmp_path, kind):
    truth = face_map()
    values = truth[0].numpy()
    path = tmp_path / ("d.npy" if kind.startswith("npy") else "d.png")
    bytes8 = np.rint(values * 255).astype(np.uint8)
    write_depth(
        path,
        {
            "8": bytes8,
            "16": np.rint(values * 65535).astype(np.uint16),
            "rgb": bytes8[..., None].repeat(3, 2),
            "npy": values,
            "npy16": np.rint(values * 65535).astype(np.uint16),
            "npy1hw": values[None],
        }[kind],
    )
    found = depth.read_depth(path)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, truth, atol=0.51 / 255 if kind in ("8", "rgb") else 1e-4, rtol=0)


def test_depth_files_that_are_none(tmp_path):
    values = face_map()[0].numpy()
    cases = {
        "inverted.npy": (1 - values, "darker inside"),
        "dark.npy": (np.where(values > 0, 1.2 - values, 0).astype(np.float32), "darker inside"),
        "metres.npy": (values * 3, "from 0 to"),
        "nan.npy": (np.full((4, 4), np.nan), "scale depth"),
        "signed.npy": (np.ones((4, 4), np.int32), "unsigned whole numbers"),
        "five.npy": (np.ones((4, 4, 5)), r"\[4, 4, 5\]"),
        "colour.png": (np.random.default_rng(0).integers(0, 256, (9, 9, 3)).astype(np.uint8), "colour picture"),
    }
    for name, (content, message) in cases.items():
        write_depth(tmp_path / name, content)
        with pytest.raises(UserError, match=message):
            depth.read_depth(tmp_path / name)
    for name in ("gone.png", "gone.npy"):
        with pytest.raises(UserError, match="cannot read"):
            depth.read_depth(tmp_path / name)
    for name in ("junk.png", "junk.npy"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(UserError, match="junk"):
            depth.read_depth(tmp_path / name)
    write_depth(tmp_path / "cut.png", np.zeros((40, 40), np.uint16))
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    with pytest.raises(UserError, match="cut off"):
        depth.read_depth(tmp_path / "cut.png")
    write_depth(tmp_path / "black.png", np.zeros((4, 4), np.uint8))
    with pytest.warns(UserWarning, match="0 everywhere"):
        assert not depth.read_depth(tmp_path / "black.png").any()


def test_depth_by_name(tmp_path, monkeypatch):
    image, box = np.zeros((40, 30, 3), np.uint8), (3, 4, 24, 30)
    assert not depth.find_depth("none", image, box).any()
    torch.testing.assert_close(depth.find_depth("rough", image, box), face_map())
    write_depth(tmp_path / "small.png", np.full((8, 8), 9, np.uint8))
    with pytest.raises(UserError, match="8 x 8 pixels and the photo 30 x 40"):
        depth.find_depth(str(tmp_path / "small.png"), image, box)
    with pytest.raises(UserError, match="neither a depth file nor a predictor"):
        depth.find_depth("nobody", image, box)
    (tmp_path / "my_depth.py").write_text(
        "import numpy as np\n"
        "def near(photo, box):\n"
        "    rows, columns = np.mgrid[:40, :30]\n"
        "    return 1 / (1 + np.hypot(rows - 20, columns - 15))\n"
        "def wrong(photo, box): return np.ones((2, 2))\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert depth.find_depth("my_depth:near", image, box).shape == (1, 40, 30)
    for name, message in (("wrong", "must return floats"), ("gone", "cannot load"), ("number", "not callable")):
        with pytest.raises(UserError, match=message):
            depth.find_depth(f"my_depth:{name}", image, box)
    with pytest.raises(UserError, match="already registered"):
        depth.register_depth("rough", lambda: None)
    assert "rough" in depth.list_depth()


def test_the_rough_head_resembles_a_procedural_one():
    from pyface.data.procedural import ProceduralFaces

    people = ProceduralFaces(40, 64, seed=3, occluders=False)
    overlaps, errors = [], []
    for index in range(0, 40, 8):
        sample = people[index]
        truth, rough = sample["depth"], depth.rough_head(64, 64, recipe.face_box(sample["landmarks"]))
        both = (truth > 0) & (rough > 0)
        overlaps.append((both.sum() / ((truth > 0) | (rough > 0)).sum()).item())
        errors.append((truth - rough)[both].abs().mean().item())
    assert np.mean(overlaps) > 0.7
    assert np.mean(errors) < 0.1


# ------------------------------------------------------------------------------------------------------------- photo


def test_a_portrait_is_framed_and_drawn():
    portrait, model = pictures.astronaut(), small()
    drawing = photo.sketch_photo(portrait, 2, model=model)
    left, top, side = drawing.crop
    x, y, w, h = drawing.face
    assert left < x
    assert top < y
    assert left + side > x + w
    assert top + side > y + h
    assert drawing.sketch.shape == drawing.depth.shape == (62, 62)  # 250 / 256 of 64
    assert drawing.depth.max() > 180
    given = photo.sketch_photo(portrait, 2, model=model, box=drawing.face)
    assert np.array_equal(given.sketch, drawing.sketch)
    other = photo.sketch_photo(portrait, 1, model=model, box=drawing.face)
    assert not np.array_equal(other.sketch, drawing.sketch)
    flat = photo.sketch_photo(portrait, 2, model=model, box=drawing.face, depth="none")
    assert not flat.depth.any()
    assert not np.array_equal(flat.sketch, drawing.sketch)
    stretched = photo.sketch_photo(portrait, 2, model=model, box=drawing.face, resize=True)
    assert stretched.sketch.shape == (side, side)


def test_no_face_gives_a_warning_and_no_depth():
    picture = np.full((90, 120, 3), 128, np.uint8)
    with pytest.warns(UserWarning, match="no face"):
        drawing = photo.sketch_photo(picture, model=small())
    assert drawing.crop == (15, 0, 90)
    assert drawing.face is None
    assert not drawing.depth.any()


def test_whole_crops_and_boxes_are_checked():
    picture, model = np.full((80, 80, 3), 128, np.uint8), small()
    relief = depth.rough_head(80, 80, (10, 10, 60, 60))
    assert photo.sketch_photo(picture, model=model, depth=relief, whole=True).crop == (0, 0, 80)
    with pytest.raises(UserError, match="square"):
        photo.sketch_photo(picture[:70], model=model, depth="none", whole=True)
    with pytest.raises(UserError, match="outside"):
        photo.sketch_photo(picture, model=model, box=(100, 0, 10, 10))
    with pytest.raises(UserError, match="depth must be"):
        photo.sketch_photo(picture, model=model, depth=relief[:, :70])
    corner = photo.sketch_photo(picture, model=model, box=(60, 60, 40, 40)).crop
    assert corner == (28, 28, 52)


def test_padding_is_undone():
    seen = {}

    class Probe(HIDA):
        def forward(self, image, relief, style):
            seen["photo"], seen["depth"] = image, relief
            return image.mean(1, keepdim=True)

    probe = Probe(1, 64)
    image, relief = torch.rand(1, 3, 62, 62), torch.rand(1, 1, 62, 62)
    drawn = recipe.draw(probe, image, relief, style_weights(1))
    torch.testing.assert_close(drawn, image.mean(1, keepdim=True), atol=1e-5, rtol=0)
    assert seen["photo"].shape[-1] == 64
    assert (seen["photo"][..., 0, :] == -1).all()
    assert not seen["depth"][..., 0].any()


# ------------------------------------------------------------------------------------------------------------ recipe

TINY = {
    "width": 2, "critic_width": 2, "image_size": 32, "faces": 2, "steps": 3, "validation": 1, "log_every": 1,
    "checkpoint_every": 0, "validate_every": 0,
}  # fmt: skip


def config(**changes):
    return Config.preset("tiny", **TINY | changes)


def train(folder, **changes):
    chosen = config(**changes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "not measured")
        trainer = Trainer(find_recipe("hida")(chosen), folder, quiet=True)
        return trainer, trainer.fit(), chosen


def test_training_takes_turns_and_resumes(tmp_path):
    trainer, network, _ = train(tmp_path / "run")
    assert isinstance(network, HIDA)
    assert not any("critic" in name for name in network.state_dict())
    before = {name: value.clone() for name, value in trainer.run.model["critic"].state_dict().items()}
    fresh = find_recipe("hida")(config())
    torch.manual_seed(0)
    assert any(not torch.equal(value, before[name]) for name, value in fresh.model()["critic"].state_dict().items())
    log = (tmp_path / "run" / "log.csv").read_text().splitlines()
    assert {"gan", "pixel", "geometry", "texture", "critic", "norm_generator", "norm_critic"} <= set(log[0].split(","))
    assert len(log) == 4
    back = convert.load(tmp_path / "run")
    image, relief, style = inputs(32)
    with torch.no_grad():
        torch.testing.assert_close(back(image, relief, style), network.eval()(image, relief, style))
    _, again, _ = train(tmp_path / "again")
    for name, value in again.state_dict().items():
        assert torch.equal(value, network.state_dict()[name]), name


def test_batches_compare_styles():
    plain, together = (find_recipe("hida")(config(together=value)) for value in (False, True))
    rng = np.random.default_rng(0)
    order = together.order(0, 30, rng).reshape(-1, 3)
    assert (order // 3 == order[:, :1] // 3).all()
    assert sorted(order.ravel()) == list(range(30))
    assert sorted(plain.order(0, 30, rng)) == list(range(30))
    assert (plain.order(0, 30, rng).reshape(-1, 3) // 3).std(1).any()


def test_rate_falls_in_the_second_half(tmp_path):
    train(tmp_path / "run", steps=4, lr=0.01)
    rows = (tmp_path / "run" / "log.csv").read_text().splitlines()
    column = rows[0].split(",").index("lr")
    assert [float(row.split(",")[column]) for row in rows[1:]] == pytest.approx([0.01, 0.01, 0.01, 0.005])


@pytest.mark.parametrize("changes", [{"redraw": True}, {"use_depth": False}, {"texture_target": "photo"}])
def test_settings_shape_the_run(tmp_path, changes):
    _, plain, _ = train(tmp_path / "plain", steps=2)
    _, other, _ = train(tmp_path / "other", steps=2, **changes)
    assert any(not torch.equal(value, other.state_dict()[name]) for name, value in plain.state_dict().items())


def test_learning_brings_the_sketch_nearer(tmp_path):
    torch.manual_seed(0)
    run, network, chosen = train(tmp_path / "run", steps=40, faces=2, lr=1e-2, jitter=0.0, rough=0.0, flat=0.0, ema=0.0)
    rows = (tmp_path / "run" / "log.csv").read_text().splitlines()
    column = rows[0].split(",").index("pixel")
    values = [float(row.split(",")[column]) for row in rows[1:]]
    assert np.mean(values[-5:]) < 0.5 * np.mean(values[:3])


def test_paper_settings():
    chosen = Config.preset("paper")
    assert (chosen.width, chosen.image_size, chosen.photo_size) == (64, 256, 250)
    assert (chosen.lr, chosen.betas, chosen.weight_decay, chosen.epochs) == (2e-4, (0.5, 0.999), 0.01, 800)
    weights = [chosen.gan, chosen.pixel, chosen.geometry, chosen.texture, chosen.balance]
    assert (weights, chosen.batch_size) == ([1, 4, 4, 1, 2], 4)
    for wrong in ({"rough": 1.5}, {"rough": 0.6, "flat": 0.6}, {"faces": 0}, {"jitter": -1.0}):
        with pytest.raises(UserError, match="hida: "):
            Config.preset("tiny", **wrong)


def test_windows_move_all_channels_together():
    pixels = torch.randint(1, 256, (6, 1, 31, 31), dtype=torch.uint8).expand(-1, 5, -1, -1)
    torch.manual_seed(0)
    windows = recipe.random_windows(pixels, 32)
    assert windows.shape == (6, 5, 32, 32)
    assert (windows == windows[:, :1]).all()
    padded = 2 * math.ceil(math.ceil(32 * 1.117) / 2)
    places, flips = set(), set()
    for one, window in zip(pixels, windows):
        whole = F.pad(one[0].float() / 255, ((padded - 31) // 2, padded - 31 - (padded - 31) // 2) * 2)
        matches = [
            (flip, top, left)
            for flip in (0, 1)
            for top in range(padded - 31)
            for left in range(padded - 31)
            if torch.equal(whole[top : top + 32, left : left + 32].flip(-1) if flip else
                           whole[top : top + 32, left : left + 32], window[0])
        ]  # fmt: skip
        assert len(matches) == 1
        flips.add(matches[0][0])
        places.add(matches[0][1:])
    assert flips == {0, 1}
    assert len(places) > 1


def test_jitter_stays_in_range_and_spares_nothing_else():
    torch.manual_seed(0)
    image = torch.rand(4, 3, 16, 16)
    changed = recipe.jittered(image, 1.0)
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert (changed - image).abs().mean() > 0.01


def test_fs2k_is_a_source(tmp_path):
    from pyface.data.sets.synthesis import synthesize

    folder = tmp_path / "FS2K"
    synthesize("fs2k", folder, 14, seed=0, image_size=48)
    _, network, chosen = train(tmp_path / "run", data=str(folder), steps=2)
    pool = np.load(tmp_path / "run" / "pool.npy", mmap_mode="r")
    assert pool.shape[1:] == (5, 31, 31)
    assert pool[:, 3].any()
    assert set(np.load(tmp_path / "run" / "styles.npy").tolist()) <= {1, 2, 3}
    with pytest.warns(UserWarning, match="weights are missing: .*fid"):
        table = recipe.evaluate(network, chosen)
    assert sum(row["pictures"] for row in table) == len(json.loads((folder / "anno_test.json").read_text()))
    for row in table:
        assert {"style", "pictures", "scoot", "fsim", "ssim"} == set(row)
        assert 0 < row["scoot"] <= 1
        assert 0 < row["fsim"] <= 1
    for file in (folder / "depth").rglob("*.png"):
        file.unlink()
    with pytest.raises(UserError, match="has no depth map"):
        train(tmp_path / "flat", data=str(folder), steps=2)
    train(tmp_path / "flat2", data=str(folder), steps=2, use_depth=False)


def test_a_perfect_drawing_scores_best(monkeypatch):
    def copy(network, image, relief, style):
        return next(sketches)

    chosen = config(validation=1)
    pairs = list(recipe.procedural_pairs(chosen, chosen.seed + recipe.TEST_SEED, 1, training=False))
    sketches = iter([torch.stack([pair["sketch"] for pair in pairs])])
    monkeypatch.setattr(recipe, "draw", copy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = recipe.evaluate(small(), chosen)
    assert [row["style"] for row in table] == [1, 2, 3]
    for row in table:
        assert row["scoot"] == row["fsim"] == 1
        assert row["ssim"] == pytest.approx(1, abs=1e-4)


def test_fid_without_its_package_is_told(tmp_path):
    if importlib.util.find_spec("torch_fidelity"):
        pytest.skip("torch-fidelity is installed")
    with pytest.raises(UserError, match="pip install torch-fidelity"):
        recipe.evaluate(small(), config(inception=str(tmp_path / "inception.pth")))


def test_the_authors_fid_is_a_column_of_its_own(monkeypatch):
    monkeypatch.setattr(recipe, "authors_features", lambda file, device: lambda drawn: drawn.flatten(1)[:, :9])
    with pytest.warns(UserWarning, match="weights are missing") as seen:
        table = recipe.evaluate(HIDA(2, 32).eval(), config(validation=2, inception_torchvision="some.pth"))
    assert "fid_authors" not in str(seen[0].message)
    assert all(row["fid_authors"] >= 0 for row in table)


def test_spoilt_depth_is_as_often_as_asked():
    kinds = [depth_kind(pair) for pair in recipe.procedural_pairs(config(rough=0.5, flat=0.5), 0, 8, training=True)]
    assert set(kinds) == {"flat", "there"}
    kinds = [depth_kind(pair) for pair in recipe.procedural_pairs(config(rough=0, flat=1), 0, 2, training=False)]
    assert set(kinds) == {"there"}


def depth_kind(pair):
    return "there" if pair["depth"].any() else "flat"


# ---------------------------------------------------------------------------------------------------------- distances


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.integers(3, 40))
def test_frechet_distance_by_matrix_root(seed, count):
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(count, 6)) @ rng.normal(size=(6, 6)), rng.normal(size=(count + 5, 6)) + 0.5
    root = sqrtm(np.cov(a.T) @ np.cov(b.T))
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root.real)
    found = recipe.frechet_distance(torch.from_numpy(a), torch.from_numpy(b))
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert recipe.frechet_distance(torch.from_numpy(a), torch.from_numpy(a)) == pytest.approx(0, abs=1e-8)
    assert math.isnan(recipe.frechet_distance(torch.from_numpy(a[:1]), torch.from_numpy(b)))


def test_the_authors_features(tmp_path):
    from torchvision.models import inception_v3

    torch.manual_seed(0)
    network = inception_v3(weights=None, init_weights=False, transform_input=True).eval()
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    features = recipe.authors_features(str(tmp_path / "inception.pth"), batch=2)
    drawn = torch.rand(3, 1, 40, 40)
    found = features(drawn)
    assert found.shape == (2, 2048)  # the incomplete batch is dropped
    assert len(features(drawn[:1])) == 1
    kept = {}
    network.avgpool.register_forward_hook(lambda _, __, out: kept.update(pool=out))
    with torch.no_grad():
        network(F.interpolate(drawn[:2].expand(-1, 3, -1, -1), (299, 299), mode="bilinear"))
    torch.testing.assert_close(found, kept["pool"].flatten(1).double(), atol=1e-5, rtol=1e-5)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not hold torchvision's Inception"):
        recipe.authors_features(str(tmp_path / "other.pth"))
