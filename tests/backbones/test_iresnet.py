"""The recogniser's layout, counted by hand, since no released weights are at hand."""

import pytest
import torch

from pyface.backbones import IResNet, create_recogniser
from pyface.backbones.iresnet import DEPTHS
from pyface.errors import UserError
from pyface.metrics import IdentitySimilarity


def count_by_hand(depths):
    """Parameters: 3 x 3 and 1 x 1 convolutions without bias, 2 per channel of a norm, 1 per channel of a PReLU."""
    total = 3 * 64 * 9 + 2 * 64 + 64
    inputs = 64
    for depth, outputs in zip(depths, (64, 128, 256, 512)):
        for block in range(depth):
            total += 2 * inputs + inputs * outputs * 9 + 2 * outputs + outputs + outputs * outputs * 9 + 2 * outputs
            if block == 0:
                total += inputs * outputs + 2 * outputs  # downsample
            inputs = outputs
    return total + 2 * 512 + (512 * 7 * 7) * 512 + 512 + 2 * 512


@pytest.mark.parametrize("name", DEPTHS)
def test_parameters(name):
    with torch.device("meta"):
        model = IResNet(DEPTHS[name])
    assert sum(p.numel() for p in model.parameters()) == count_by_hand(DEPTHS[name])
    stages = [len(getattr(model, f"layer{stage}")) for stage in (1, 2, 3, 4)]
    # the name's number: convolutions on the longest path and the linear layer
    assert int(name.removeprefix("iresnet")) == 1 + 2 * sum(stages) + 1


def test_names_are_those_of_arcface_torch():
    with torch.device("meta"):
        keys = list(IResNet(DEPTHS["iresnet18"]).state_dict())
    assert {key.split(".")[0] for key in keys} == {
        "conv1", "bn1", "prelu", "layer1", "layer2", "layer3", "layer4", "bn2", "fc", "features",
    }  # fmt: skip
    parts = {key.removeprefix("layer2.0.") for key in keys if key.startswith("layer2.0.")}
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert parts == {
        "conv1.weight", "conv2.weight", "prelu.weight", "downsample.0.weight",
        *(f"{layer}.{one}" for layer in ("bn1", "bn2", "bn3", "downsample.1") for one in norm),
    }  # fmt: skip
    assert not any(key.startswith("layer2.1.downsample") for key in keys)


def small():
    torch.manual_seed(0)
    return IResNet((1, 1, 1, 1), features=16, width=4)


def test_forward_shapes():
    model = small()
    shapes = []
    for stage in (1, 2, 3, 4):
        getattr(model, f"layer{stage}").register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape[1:])))
    assert model(torch.rand(2, 3, 112, 112)).shape == (2, 16)
    assert shapes == [(4, 56, 56), (8, 28, 28), (16, 14, 14), (32, 7, 7)]
    assert not model.features.weight.requires_grad


def test_one_block_by_hand():
    """With identity-like weights a block is x + PReLU(x) on every pixel."""
    from pyface.backbones.iresnet import _Block

    block = _Block(2, 2, 1).eval()
    with torch.no_grad():
        for conv in (block.conv1, block.conv2):
            conv.weight.zero_()
            conv.weight[0, 0, 1, 1] = conv.weight[1, 1, 1, 1] = 1
    x = torch.randn(1, 2, 5, 5)
    torch.testing.assert_close(block(x), x + torch.where(x > 0, x, 0.25 * x), rtol=1e-4, atol=1e-4)


def test_embedder_scales_resizes_and_normalises():
    from pyface.backbones import FaceEmbedder

    model = FaceEmbedder(small()).eval()
    faces = torch.rand(2, 3, 112, 112)
    with torch.no_grad():
        found = model(faces)
        torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
        torch.testing.assert_close(found, torch.nn.functional.normalize(model.network(faces * 2 - 1), dim=1))
        large = faces.repeat_interleave(2, 2).repeat_interleave(2, 3)
        assert model(large).shape == (2, 16)
    assert IdentitySimilarity(model)(faces, faces)["similarity"].item() == pytest.approx(1)


def test_weights_load_from_a_file(tmp_path):
    trained = IResNet(DEPTHS["iresnet18"])
    torch.save({f"module.{key}": value for key, value in trained.state_dict().items()}, tmp_path / "backbone.pth")
    recogniser = create_recogniser("iresnet18", weights=tmp_path / "backbone.pth")
    assert not recogniser.training
    assert torch.equal(recogniser.network.fc.weight, trained.fc.weight)
    with pytest.raises(UserError, match=r"do not fit IResNet: the file lacks layer1.2"):
        create_recogniser("iresnet34", weights=tmp_path / "backbone.pth")
    with pytest.raises(UserError, match="unknown recogniser 'iresnet19'; known: iresnet18"):
        create_recogniser("iresnet19")
