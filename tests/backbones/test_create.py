"""The networks the sheets describe, from timm, and weights from local files only."""

import socket
import warnings

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.xception import Xception

from pyface.backbones import create_backbone, create_recogniser
from pyface.errors import UserError


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any attempt to reach the network fails the test, even where the caller swallows the error."""
    attempts = []

    def refuse(*args, **kwargs):
        attempts.append(args)
        raise AssertionError(f"network access: {args}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.delenv("PYFACE_WEIGHTS", raising=False)
    yield
    assert not attempts


def test_xception_is_the_network_of_the_acmf_sheet():
    model = create_backbone("xception", num_classes=2).eval()
    shapes = {}
    layers = ("conv1", "conv2", "block1", "block2", "block3", "block11", "block12", "conv3", "conv4")
    for name, layer in model.named_children():
        if name in layers:
            layer.register_forward_hook(lambda _, __, out, name=name: shapes.update({name: tuple(out.shape[1:])}))
    with torch.no_grad():
        assert model(torch.rand(1, 3, 224, 224)).shape == (1, 2)
    assert shapes == {
        "conv1": (32, 111, 111), "conv2": (64, 109, 109), "block1": (128, 55, 55), "block2": (256, 28, 28),
        "block3": (728, 14, 14), "block11": (728, 14, 14), "block12": (1024, 7, 7), "conv3": (1536, 7, 7),
        "conv4": (2048, 7, 7),
    }  # fmt: skip


def test_resnet18_trunk_has_the_parameters_of_the_gaze_sheet():
    trunk = create_backbone("resnet18")
    assert sum(p.numel() for p in trunk.parameters()) == 11_176_512
    assert trunk.eval()(torch.rand(2, 3, 64, 64)).shape == (2, 512)


def test_efficientnet_b4_ends_in_1792_features():
    assert create_backbone("efficientnet_b4").num_features == 1792


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("resnet18", [64, 128, 256, 512]),
        ("resnet50", [256, 512, 1024, 2048]),
        pytest.param(
            "xception",
            [128, 256, 728, 2048],
            marks=pytest.mark.skipif(
                not hasattr(Xception, "forward_intermediates"),
                reason="this timm has no taps there",
            ),
        ),
        ("efficientnet_b4", [32, 56, 160, 448]),
    ],
)
def test_feature_maps(name, channels):
    model = create_backbone(name, out_indices=(1, 2, 3, 4))
    maps = model(torch.rand(2, 3, 64, 64))
    assert model.channels == channels == [one.shape[1] for one in maps]
    assert model.strides == [4, 8, 16, 32]
    assert [one.shape[2] for one in maps][1:] == [8, 4, 2]
    sum(one.square().sum() for one in maps).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []  # or DDP would stumble


def test_layers_behind_the_last_tap_are_gone():
    shallow = create_backbone("resnet18", out_indices=(2,))
    assert not any("layer3" in key or "fc" in key for key in shallow.state_dict())
    assert shallow.eval()(torch.rand(1, 3, 32, 32))[0].shape == (1, 128, 4, 4)


def test_dilated_resnet50_keeps_stride_16():
    model = create_backbone("resnet50", output_stride=16, out_indices=(3, 4)).eval()
    with torch.no_grad():
        maps = model(torch.rand(1, 3, 64, 64))
    assert [tuple(one.shape[1:]) for one in maps] == [(1024, 4, 4), (2048, 4, 4)]
    assert model.strides == [16, 16]
    assert model.network.layer4[2].conv2.dilation == (2, 2)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnet5O", "unknown backbone 'resnet5O'; did you mean resnet50"),
        ("resnet50.a1_in2k", "did you mean resnet50.a1_in1k"),
        ("hf-hub:timm/resnet50.a1_in1k", "unknown backbone 'hf-hub:"),
        ("local-dir:/tmp", "unknown backbone"),
        ("iresnet50", "create_recogniser"),
    ],
)
@pytest.mark.parametrize("pretrained", [False, True])
def test_only_names_of_timm_are_known(name, says, pretrained):
    with pytest.raises(UserError, match=says):
        create_backbone(name, pretrained=pretrained)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"output_stride": 12}, "cannot be made with num_classes=0, in_chans=3, output_stride=12"),
        ({"num_classes": -1}, "num_classes must be at least 0"),
        ({"in_chans": 0}, "in_chans at least 1"),
        ({"out_indices": (5,)}, r"out_indices must rise within 0 to 4, got \[5\]"),
        ({"out_indices": (2, 1)}, "out_indices must rise"),
        ({"out_indices": ()}, "out_indices must rise"),
    ],
)
def test_impossible_options_are_refused(options, says):
    with pytest.raises(UserError, match=says):
        create_backbone("resnet18", **options)
    with pytest.raises(UserError, match="'legacy_xception' cannot be made"):
        create_backbone("xception", output_stride=16)


def test_missing_weights_say_where_to_get_them_and_how_to_pass_them(monkeypatch, tmp_path):
    with pytest.raises(UserError) as caught:
        create_backbone("resnet50", pretrained=True)
    for part in (
        "never downloads", "https://huggingface.co/timm/resnet50", "(weights=FILE)",
        "resnet50.safetensors", "PYFACE_WEIGHTS",
    ):  # fmt: skip
        assert part in str(caught.value)
    monkeypatch.setenv("PYFACE_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError, match=f"PYFACE_WEIGHTS={tmp_path} holds no legacy_xception.safetensors"):
        create_backbone("xception", pretrained=True)
    with pytest.raises(UserError, match=r"holds no iresnet18.*insightface.*backbone\.pth"):
        create_recogniser("iresnet18")


def test_weights_are_found_in_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("PYFACE_WEIGHTS", str(tmp_path))
    trained = timm.create_model("resnet18")
    save_file(trained.state_dict(), tmp_path / "resnet18.safetensors")
    image = torch.rand(1, 3, 64, 64)
    for name in ("resnet18", "resnet18.a1_in1k"):  # a name with a tag falls back on the file without
        found = create_backbone(name, pretrained=True, num_classes=1000).eval()
        assert torch.equal(found(image), trained.eval()(image))
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "resnet18.a1_in1k.pth")
    assert not torch.equal(create_backbone("resnet18.a1_in1k", pretrained=True).conv1.weight, trained.conv1.weight)
    taps = create_backbone("resnet18", pretrained=True, out_indices=(1,))
    assert torch.equal(taps.network.conv1.weight, trained.conv1.weight)


def test_a_stored_head_for_other_classes_is_left_out_aloud(tmp_path):
    trained = timm.create_model("resnet18", num_classes=7)
    file = tmp_path / "trained.safetensors"
    save_file(trained.state_dict(), file)
    with pytest.warns(UserWarning, match=r"fc.weight, fc.bias not loaded \(stored for 7 outputs, wanted 2\)"):
        model = create_backbone("resnet18", weights=file, num_classes=2)
    assert torch.equal(model.layer4[1].conv2.weight, trained.layer4[1].conv2.weight)
    assert model.fc.weight.shape == (2, 512)
    assert torch.equal(create_backbone("resnet18", weights=file, num_classes=7).fc.weight, trained.fc.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_backbone("resnet18", weights=file)  # no head wanted: nothing to say


def test_stored_colour_filters_are_adapted_to_other_channels(tmp_path):
    trained = timm.create_model("resnet18", num_classes=0)
    file = tmp_path / "trained.safetensors"
    save_file(trained.state_dict(), file)
    grey = create_backbone("resnet18", weights=file, in_chans=1)
    torch.testing.assert_close(grey.conv1.weight, trained.conv1.weight.sum(1, keepdim=True))
    image = torch.rand(1, 1, 32, 32)  # a grey picture gives what its three equal channels gave
    torch.testing.assert_close(grey.eval()(image), trained.eval()(image.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)
