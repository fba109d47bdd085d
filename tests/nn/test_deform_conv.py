"""Deformable layers: torchvision's class, the one with an offset branch, foreign state dicts, and swapping in place."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyface.nn import DeformConv2d, ModulatedDeformConv2d, replace_deform_conv

torchvision = pytest.importorskip("torchvision")  # torch's CPU-only builds have none

OPTIONS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2, "bias": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "all options"])
def test_is_the_class_of_torchvision(options):
    torch.manual_seed(3)
    theirs = torchvision.ops.DeformConv2d(8, 6, **options)
    torch.manual_seed(3)
    ours = DeformConv2d(8, 6, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for a, b in zip(ours.parameters(), theirs.parameters()):
        assert torch.equal(a, b)  # the same random numbers in the same order
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(ours, name) == getattr(theirs, name)
    x = torch.randn(2, 8, 9, 10)
    taps = ours.kernel_size[0] * ours.kernel_size[1]
    size = F.conv2d(x, ours.weight, None, ours.stride, ours.padding, ours.dilation, ours.groups).shape[2:]
    offset, mask = torch.randn(2, 4 * taps, *size), torch.rand(2, 2 * taps, *size)
    for args in ((x, offset), (x, offset, mask)):
        torch.testing.assert_close(ours(*args), theirs(*args), rtol=1e-5, atol=1e-5)
    other = DeformConv2d(8, 6, **options)
    other.load_state_dict(theirs.state_dict())
    assert torch.equal(other(x, offset), ours(x, offset))
    assert "kernel_size" in repr(ours)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_modulated_layer_starts_as_half_a_convolution(groups):
    layer = ModulatedDeformConv2d(8, 6, 3, stride=2, padding=1, groups=groups, offset_groups=4)
    x = torch.randn(2, 8, 9, 10)
    expected = F.conv2d(x, layer.weight / 2, layer.bias, 2, 1, 1, groups)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    layer(x).square().sum().backward()
    assert layer.conv_offset.weight.grad.abs().max() > 0  # and its branch learns from the first step
    assert "offset_groups=4" in repr(layer)


def test_the_modulated_layer_is_its_parts():
    layer = ModulatedDeformConv2d(4, 6, (3, 2), padding=1, offset_groups=2).double()
    nn.init.normal_(layer.conv_offset.weight, std=0.3)
    nn.init.normal_(layer.conv_offset.bias)
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    first, second, mask = layer.conv_offset(x).chunk(3, 1)  # as mmcv and DCNv2 write it
    offset = torch.cat((first, second), 1)
    expected = torchvision.ops.deform_conv2d(x, offset, layer.weight, layer.bias, padding=1, mask=torch.sigmoid(mask))
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("prefix", ["", "neck.0.dcn."])
@pytest.mark.parametrize("names", ["conv_offset.", "conv_offset_mask."])
def test_loads_state_dicts_of_mmcv_and_dcnv2(prefix, names):
    source = ModulatedDeformConv2d(4, 6, 3, padding=1)
    for p in source.parameters():
        nn.init.normal_(p)
    state = {prefix + key.replace("conv_offset.", names): value for key, value in source.state_dict().items()}
    layer = ModulatedDeformConv2d(4, 6, 3, padding=1)
    model = layer if not prefix else nn.ModuleDict({"neck": nn.ModuleList([nn.ModuleDict({"dcn": layer})])})
    keys = list(state)
    model.load_state_dict(state)
    assert list(state) == keys  # the caller's dictionary is left as it is
    for a, b in zip(layer.parameters(), source.parameters()):
        assert torch.equal(a, b)


def test_wrong_groups_are_named():
    with pytest.raises(ValueError, match=r"DeformConv2d: out_channels must be a multiple of groups \(4\), got 6"):
        DeformConv2d(8, 6, 3, groups=4)
    with pytest.raises(ValueError, match=r"in_channels must be a multiple of offset_groups \(3\), got 8"):
        ModulatedDeformConv2d(8, 6, 3, offset_groups=3)


class Neck(nn.Module):
    """Somebody's model: a shared layer, one that is the child of a list, and a class of their own."""

    def __init__(self):
        super().__init__()
        self.offset = nn.Conv2d(4, 18, 3, padding=1)
        self.first = torchvision.ops.DeformConv2d(4, 4, 3, padding=1)
        self.more = nn.ModuleList([self.first, torchvision.ops.DeformConv2d(4, 4, 3, padding=1, bias=False)])

        class Own(torchvision.ops.DeformConv2d):
            pass

        self.own = Own(4, 4, 3, padding=1)

    def forward(self, x):
        for layer in (*self.more, self.own):
            x = layer(x, self.offset(x))
        return x


def test_replaces_the_layers_of_a_model_in_place():
    model, x = Neck(), torch.randn(2, 4, 8, 9)
    calls = []
    model.first.register_forward_hook(lambda *_: calls.append(1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    first, parameters, expected = model.first, dict(model.named_parameters()), model(x)
    assert replace_deform_conv(model) == 2
    assert model.first is first
    assert type(model.first) is type(model.more[1]) is DeformConv2d
    assert type(model.own) is not DeformConv2d
    assert {id(p) for p in model.parameters()} == {id(p) for p in parameters.values()}
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == 2
    model(x).square().sum().backward()
    before = model.first.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.first.weight, before)
    assert replace_deform_conv(model) == 0
    alone = torchvision.ops.DeformConv2d(4, 4, 3)
    assert replace_deform_conv(alone) == 1
    assert "DeformConv2d(4, 4" in repr(alone)


@pytest.mark.filterwarnings("ignore")  # of what else that package imports
def test_replaces_the_layers_of_a_published_model():
    """birder's LIT (arXiv:2105.14217), which merges patches with torchvision's layer; not in our extras."""
    lit = pytest.importorskip("birder.net.lit_v1", reason="pip install birder")
    torch.manual_seed(0)
    config = {"embed_dim": 32, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "drop_path_rate": 0.0}
    model = lit.LIT_v1(3, 10, config=config | {"has_msa": [False, False, True, True]}, size=(64, 64)).eval()
    offset_branches = [m.offset_conv for m in model.modules() if hasattr(m, "offset_conv")]
    for branch in offset_branches:
        nn.init.normal_(branch.weight, std=0.1)
    x, state = torch.randn(2, 3, 64, 64), {k: v.clone() for k, v in model.state_dict().items()}

    def gradients():
        out = model(x)
        return out, torch.autograd.grad(out.square().sum(), list(model.parameters()))

    expected, wanted = gradients()
    assert replace_deform_conv(model) == len(offset_branches) == 3
    found, got = gradients()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert list(model.state_dict()) == list(state)
    model.load_state_dict(state)
