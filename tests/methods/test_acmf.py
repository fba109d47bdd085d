"""ACMF: Grad-CAM of a batch, stage 2, training, the cross-forgery table, checkpoints of any origin, the detector."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import pyface
from pyface.cli.main import app
from pyface.data.protocols import FaceClip
from pyface.engine import read_about, save_weights
from pyface.errors import UserError
from pyface.methods.acmf import ACMF, NOTEBOOK, Adaptation, Adapter, convert_state_dict, fake_share
from pyface.methods.acmf.convert import load
from pyface.methods.acmf.losses import consistency_loss, flooded
from pyface.methods.acmf.model import scaled_maps
from pyface.methods.acmf.recipe import Config, Frames, Recipe, error_rates, video_scores
from pyface.methods.detection import Detector, load_detector

SIDE = 32
SMALL = "mobilenetv3_small_050"


def small(seed: int = 0, backbone: str = SMALL, target: str | None = None) -> ACMF:
    torch.manual_seed(seed)
    return ACMF(backbone, SIDE, target=target).eval()


def coarse() -> ACMF:
    """A network whose attention maps are 4 x 4 at 32 pixels."""
    return small(backbone="resnet10t", target="layer2")


def clip(label: int, frames: int = 2, family: str = "splice", seed: int = 0) -> FaceClip:
    rng = np.random.default_rng(seed)
    faces = rng.integers(0, 256, (frames, SIDE, SIDE, 3), dtype=np.uint8)
    return FaceClip(f"v{seed}", label, family if label else "real", "a", "", faces)


# ----------------------------------------------------------------------------------------------------------- attention


def one_image_grad_cam(model: ACMF, image: torch.Tensor, size: int) -> torch.Tensor:
    """The sheet's equations 9 to 12 for one image, with a hook and a backward pass through the whole network."""
    kept = []
    handle = model.network.get_submodule(model.target).register_forward_hook(lambda *a: kept.append(a[2]))
    logits = model.network(image[None])
    handle.remove()
    kept[0].retain_grad()
    model.zero_grad()
    logits[0, logits[0].argmax()].backward()
    weights = kept[0].grad[0].sum((1, 2)) / kept[0][0, 0].numel()
    heat = sum(weights[c] * kept[0][0, c] for c in range(len(weights)))
    heat = F.interpolate(heat[None, None], (size, size), mode="bilinear", align_corners=True)[0, 0]
    model.zero_grad()
    return ((heat - heat.min()) / (heat.max() - heat.min())).detach()


@pytest.mark.parametrize(
    ("backbone", "target"),
    [("xception", "conv3"), ("tf_efficientnet_b0", "blocks.6.0.conv_pwl"), ("resnet10t", "layer4")],
)
def test_batched_grad_cam_is_that_of_each_image(backbone, target):
    model = small(backbone=backbone)
    assert model.target == target
    side = 64
    images = torch.rand(2, 3, side, side)
    logits, maps = model.attend(images)
    torch.testing.assert_close(logits, model(images).detach())
    assert not maps.requires_grad
    for image, one in zip(images, scaled_maps(maps, side)):
        torch.testing.assert_close(one, one_image_grad_cam(model, image, side), rtol=1e-3, atol=1e-3)
    assert all(p.grad is None for p in model.parameters())
    _, same = model.attend(images, graph=True)
    torch.testing.assert_close(same.detach(), maps)
    assert torch.is_grad_enabled()


def test_a_loss_of_the_maps_reaches_the_target_and_what_is_below_it_only():
    model = small(backbone="xception")
    _, maps = model.attend(torch.rand(1, 3, 64, 64), graph=True)
    scaled_maps(maps, 64).mean(0).square().mean().backward()
    network = model.network
    assert network.conv3.pointwise.weight.grad.abs().sum() > 0
    assert network.conv1.weight.grad.abs().sum() > 0
    for layer in (network.bn3, network.conv4.pointwise, network.fc):
        assert layer.weight.grad is None


def test_maps_are_scaled_to_the_unit_interval_and_flat_ones_to_zero():
    maps = torch.stack([torch.tensor([[-3.0, 1.0], [5.0, 0.0]]), torch.full((2, 2), 7.0)]).requires_grad_()
    scaled = scaled_maps(maps, 8)
    assert scaled.shape == (2, 8, 8)
    assert scaled[0].min() == 0
    assert scaled[0].max() == 1
    assert scaled[0, 0, -1].item() == pytest.approx(0.5)  # corners are aligned
    assert (scaled[1] == 0).all()
    scaled.sum().backward()
    assert maps.grad.isfinite().all()


def test_unknown_networks_and_targets_are_named():
    with pytest.raises(UserError, match="no module 'nose'"):
        ACMF(SMALL, SIDE, target="nose")
    with pytest.raises(UserError, match="unknown backbone"):
        ACMF("xceptoin", SIDE)
    with pytest.raises(UserError, match="image_size"):
        ACMF(SMALL, 8)
    with pytest.raises(UserError, match="unexpected keyword"):
        pyface.create_model("acmf", depth=3)


# --------------------------------------------------------------------------------------------------- losses and scores


def test_losses_and_scores():
    assert flooded(torch.tensor(0.5), 0.04) == 0.5
    assert flooded(torch.tensor(0.01), 0.04) == pytest.approx(0.07)
    assert consistency_loss(torch.ones(4, 4), torch.zeros(4, 4)) == 1
    logits = torch.tensor([[0.0, 0.0], [2.0, -1.0], [-800.0, -810.0]])
    s0, s1 = torch.sigmoid(logits.double()).unbind(1)
    expected = s1 / (s0 + s1)
    torch.testing.assert_close(fake_share(logits)[:2], expected[:2])
    assert fake_share(logits)[2] == pytest.approx(1 / (1 + math.exp(10)))  # where the sigmoids are 0


def test_frame_and_video_protocols():
    clips = [clip(0, 2, seed=1), clip(1, 2, seed=2), clip(0, 1, seed=3), clip(1, 3, seed=4)]
    logits = [torch.tensor(rows) for rows in (
        [[1.0, 0.0], [0.0, 3.0]], [[0.0, 2.0], [0.0, 1.0]], [[2.0, 0.0]], [[0.0, 1.0], [0.0, 1.0], [5.0, 0.0]],
    )]  # fmt: skip
    rates = error_rates(clips, logits)
    scores = torch.cat([fake_share(one) for one in logits])
    labels = torch.cat([torch.full((len(one.faces),), one.label) for one in clips])
    real, fake = scores[labels == 0], scores[labels == 1]
    wins = (fake[:, None] > real).double() + 0.5 * (fake[:, None] == real).double()
    assert rates["frame_auc"] == pytest.approx(wins.mean().item())
    videos = video_scores(logits)
    assert rates["video_auc"] == pytest.approx(np.mean([videos[f] > videos[r] for f in (1, 3) for r in (0, 2)]))
    right = [(videos[i] >= 0.5) == bool(c.label) for i, c in enumerate(clips)]
    assert rates["video_accuracy"] == pytest.approx(np.mean(right))
    assert math.isnan(error_rates(clips[:1], logits[:1])["video_auc"])


def test_an_epoch_takes_every_real_frame_once_and_families_alike():
    clips = [clip(0, 6, seed=1), clip(1, 2, "a", seed=2), clip(1, 9, "b", seed=3)]
    frames = Frames(clips)
    order = frames.balanced(np.random.default_rng(0))
    kinds = [clips[frames.places[index][0]].family for index in order]
    assert sorted(kinds) == ["a"] * 3 + ["b"] * 3 + ["real"] * 6
    assert len({index for index, kind in zip(order, kinds) if kind == "real"}) == 6
    assert kinds[::2] == ["real"] * 6


def test_a_real_frame_comes_with_a_forged_one_of_the_same_person_and_moment():
    people = [
        dataclasses.replace(clip(label, 4, family, seed=number), identity=person)
        for number, (label, family, person) in enumerate(
            [(0, "", "p"), (0, "", "q"), (0, "", "alone"), (1, "a", "p"), (1, "a", "q"), (1, "b", "q"), (1, "b", "p")]
        )
    ]
    frames = Frames(people)
    places = [frames.places[index] for index in frames.balanced(np.random.default_rng(0))]
    for (real, moment), (fake, forged_moment) in zip(places[::2], places[1::2]):
        assert (people[real].label, people[fake].label) == (0, 1)
        if people[real].identity != "alone":
            assert (people[fake].identity, forged_moment) == (people[real].identity, moment)


# ------------------------------------------------------------------------------------------------------------- stage 2


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1, 0, 1])
    return [(torch.rand(4, 3, SIDE, SIDE, generator=generator), labels) for _ in range(3)]


def test_stage_2_is_the_published_loop(batches):
    """Against the loop written out, with single-image maps, hooks and the network itself as the reference."""
    model = coarse()
    settings = Adaptation(drop_rate=0.0)  # masks are random
    adapter = Adapter(model, batches[:1], settings)
    frames = torch.rand(3, 3, SIDE, SIDE)
    judged = adapter(frames, "video")

    images, labels = batches[0]
    other = coarse()
    optimizer = torch.optim.AdamW(other.parameters(), 1e-3, (0.9, 0.95), weight_decay=0.01)
    reference = torch.stack([one_image_grad_cam(model, image, SIDE) for image in images]).mean(0)
    for _ in range(2):
        other.train()
        loss = (F.cross_entropy(other(images), labels) - 0.04).abs() + 0.04
        other.eval()
        maps = []
        for frame in frames:
            _, one = other.attend(frame[None], graph=True)
            maps.append(scaled_maps(one, SIDE)[0])
        loss = loss + (torch.stack(maps).mean(0) - reference).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert reference.isfinite().all()
    with torch.no_grad():
        torch.testing.assert_close(judged, other(frames), rtol=2e-2, atol=2e-3)
    assert (judged - model(frames).detach()).abs().max() > 1e-2


def test_every_video_starts_anew_whatever_came_before(batches):
    model = coarse()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = torch.rand(2, 3, SIDE, SIDE), torch.rand(3, 3, SIDE, SIDE)
    adapter = Adapter(model, batches)
    alone = Adapter(model, batches)(second, "b")
    adapter(first, "a")
    assert torch.equal(adapter(second, "b"), alone)
    assert adapter.network is not model
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    adapter.reset()
    for name, value in adapter.network.state_dict().items():
        assert torch.equal(value, before[name])
    assert not adapter.optimizer.state
    carried = Adapter(model, batches, Adaptation(carry_state=True))
    carried(first, "a")
    assert not torch.equal(carried(second, "b"), alone)


def test_notebook_variant_and_bad_pools(batches):
    adapter = Adapter(coarse(), batches[:1], NOTEBOOK)
    (step,) = adapter.adapt(torch.rand(2, 3, SIDE, SIDE))
    assert step["classification"] > 0
    assert step["consistency"] > 0
    preset = Config.preset("notebook").adaptation
    assert (preset.steps, preset.scale, preset.flood, preset.drop_rate) == (1, 0.1, 0.0, 0.0)
    with pytest.raises(UserError, match="at least one batch"):
        Adapter(small(), [])


def test_stage_2_keeps_no_hooks_and_can_run_in_bfloat16(batches):
    adapter = Adapter(small(), batches, Adaptation(precision="bf16"))
    for _ in range(2):
        assert adapter(torch.rand(2, 3, SIDE, SIDE)).dtype == torch.float32
    assert not any(module._forward_hooks for module in adapter.network.modules())


# --------------------------------------------------------------------------------------------------------- checkpoints


def authors_xception(seed: int = 0) -> dict[str, torch.Tensor]:
    """The released Xception's layout: last_linear, no wrapper."""
    torch.manual_seed(seed)
    state = ACMF("xception").network.state_dict()
    return {key.replace("fc.", "last_linear."): value for key, value in state.items()}


def test_released_xception_loads(tmp_path):
    state = authors_xception()
    old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    old = {f"module.{k}": v[..., 0, 0] if k.endswith("pointwise.weight") else v for k, v in old.items()}
    torch.save({"state_dict": old}, tmp_path / "0.1-5.pth", _use_new_zipfile_serialization=False)
    model = pyface.load_official("acmf", tmp_path / "0.1-5.pth").eval()
    assert model.backbone == "xception"
    assert model.target == "conv3"
    plain = ACMF("xception").network.eval()
    plain.load_state_dict({key.replace("last_linear.", "fc."): value for key, value in state.items()})
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(image), plain(image))


def test_notebook_efficientnet_loads():
    """Names of efficientnet_pytorch, whose blocks are counted through; values by the order of layers in a block."""
    torch.manual_seed(0)
    model = ACMF("tf_efficientnet_b0").network
    layers = ["_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_se_reduce", "_se_expand", "_project_conv", "_bn2"]
    theirs, index = {}, 0
    for stage in model.blocks:
        for block in stage:
            parts = [m for m in block.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
            names = layers if len(parts) == 8 else layers[2:]
            # timm keeps squeeze-and-excitation behind the depthwise part, as they do
            order = sorted(parts, key=lambda m: [n for n, x in block.named_modules() if x is m][0] == "")
            for name, part in zip(names, order, strict=True):
                theirs |= {f"net._blocks.{index}.{name}.{key}": value for key, value in part.state_dict().items()}
            index += 1
    for name, part in (("_conv_stem", model.conv_stem), ("_bn0", model.bn1), ("_conv_head", model.conv_head),
                       ("_bn1", model.bn2), ("_fc", model.classifier)):  # fmt: skip
        theirs |= {f"net.{name}.{key}": value for key, value in part.state_dict().items()}
    backbone, values = convert_state_dict(theirs)
    assert backbone == "tf_efficientnet_b0"
    for key, value in model.state_dict().items():
        assert torch.equal(values[f"network.{key}"], value), key


def test_checkpoints_of_others_are_refused_by_name(tmp_path):
    for change, message in (
        ({"extra.weight": torch.zeros(1)}, "unknown 'extra.weight'"),
        ({"last_linear.weight": torch.zeros(1000, 2048)}, "another shape"),
        ({"bn4.bias": None}, "lacks 'bn4.bias'"),
    ):
        state = authors_xception() | change
        state = {key: value for key, value in state.items() if value is not None}
        with pytest.raises(UserError, match=message):
            convert_state_dict(state)
    with pytest.raises(UserError, match="not a checkpoint of ACMF"):
        convert_state_dict({"leaky.fc.weight": torch.zeros(2)})
    other = tmp_path / "hida.safetensors"
    save_weights(nn.Linear(2, 2), other, {"method": "hida"})
    for read in (load, lambda path: load_detector("acmf", path)):
        with pytest.raises(UserError, match="weights of hida, expected weights of acmf"):
            read(other)
    save_weights(nn.Linear(2, 2), other)
    with pytest.raises(UserError, match="name no method"):
        load(other)
    (tmp_path / "evil.pth").write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UserError, match="not a weight file"):
        load(tmp_path / "evil.pth")
    with pytest.raises(UserError, match="not the folder of a run"):
        load(tmp_path)


# ------------------------------------------------------------------------------------------------ training and commands

TINY = {
    "backbone": SMALL, "target": "none", "image_size": SIDE, "frames": 2, "videos": 3, "test_videos": 2,
    "test_frames": 2, "steps": 6, "batch_size": 8, "validate_every": 3, "checkpoint_every": 3, "log_every": 2,
    "fac_batch": 4, "fac_pool": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of the commands on two families."""
    folder = tmp_path_factory.mktemp("runs") / "acmf"
    settings = [part for name, value in TINY.items() for part in ("--set", f"{name}={value}")]
    result = CliRunner().invoke(
        app,
        ["train", "acmf", "--preset", "tiny", "--train-on", "splice,texture", "--test-on", "unseen",
         "--out", str(folder), "--json", "--set", "fac=false", *settings],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return folder, json.loads(result.stdout)["evaluation"]


def test_training_leaves_weights_that_describe_themselves(run):
    folder, rows = run
    assert [row["family"] for row in rows] == ["blend_swap", "colour_transfer", "reenactment", ""]
    assert all(row["trained_on"] == "no" for row in rows[:-1])
    assert all(0 <= row["video_auc"] <= 1 and "fac_video_auc" not in row for row in rows)
    about = read_about(folder / "acmf.safetensors")
    assert about["backbone"] == SMALL
    assert about["training"] == (
        "procedural: splice,texture (train: 3 real, 3 splice, 3 texture videos), masked frequencies (drop rate 0.1)"
    )
    assert "val: 2 real, 2 splice, 2 texture videos" in about["calibration"]
    assert 0 < float(about["threshold"]) < 1
    for path in (folder, folder / "acmf.safetensors"):
        model, said = load(path)
        assert model.image_size == SIDE
        assert said == about


def test_evaluation_with_stage_2_on_families_of_choice(run):
    folder, _ = run
    result = CliRunner().invoke(
        app, ["evaluate", "acmf", "-w", str(folder), "--test-on", "splice", "--set", "fac=true", "--json"]
    )
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["evaluation"]
    assert row["trained_on"] == "yes"
    assert row["videos"] == 4
    assert {"frame_auc", "video_auc", "video_eer", "fac_frame_auc", "fac_video_auc"} <= row.keys()
    result = CliRunner().invoke(app, ["evaluate", "acmf", "-w", str(folder), "--test-on", "magic", "--json"])
    assert result.exit_code != 0
    assert "no forgery family" in result.output


def test_protocol_in_one_command(tmp_path):
    settings = [part for name, value in (TINY | {"steps": 2}).items() for part in ("--set", f"{name}={value}")]
    command = ["evaluate", "acmf", "--preset", "tiny", "--train-on", "splice", "--test-on", "texture", "--json",
               "--out", str(tmp_path / "run"), "--set", "fac=false", *settings]  # fmt: skip
    first, again = (CliRunner().invoke(app, command) for _ in range(2))
    assert first.exit_code == again.exit_code == 0, first.output
    (row,) = json.loads(first.stdout)["evaluation"]
    assert (row["family"], row["trained_on"]) == ("texture", "no")
    assert json.loads(again.stdout)["evaluation"] == [row]


def test_one_class_alone_cannot_be_trained_on(tmp_path):
    recipe = Recipe(Config.preset("tiny", **TINY))
    recipe._clips = lambda *_args, **_kwargs: [clip(0)]
    with pytest.raises(UserError, match="the training videos are 1 real"):
        recipe.prepare(tmp_path, True)
    for wrong in ({"drop_rate": 2.0}, {"batch_size": 1}, {"frames": 0}, {"flood": -1.0}):
        with pytest.raises(UserError):
            Config.preset("tiny", **wrong)


def test_consistency_mode_and_spectrum_masks_train():
    from pyface.engine import Run

    changes = {"consistency": 1.0, "mask_domain": "spectrum", "per": "image", "backbone": "resnet10t",
               "target": "layer2"}  # fmt: skip
    recipe = Recipe(Config.preset("tiny", **(TINY | changes)))
    recipe.train_clips = [clip(0, 4, seed=1), clip(1, 4, seed=2)]
    run = Run(recipe)
    run.progress = 0.5
    batch = {"image": torch.randint(0, 256, (4, 3, SIDE, SIDE), dtype=torch.uint8), "label": torch.tensor([0, 1, 0, 1])}
    report = recipe.step(run, batch)
    report["loss"].backward()
    assert report["consistency"] > 0
    assert all(p.grad is not None for p in run.model.parameters())
    assert run.model.training


def test_detector(run, tmp_path):
    folder, _ = run
    detector: Detector = load_detector("acmf", folder)
    assert (detector.method, detector.image_size, detector.margin, detector.least_frames) == ("acmf", SIDE, 0.8, 1)
    assert detector.threshold is not None
    assert "val:" in detector.calibration
    faces = torch.rand(5, 3, SIDE, SIDE)
    scores = detector.score(faces, maps=True)
    assert scores.fake.shape == (5,)
    assert scores.attention.shape == (5, SIDE, SIDE)
    assert scores.attention.min() >= 0
    assert scores.attention.max() <= 1
    plain = detector.score(faces)
    np.testing.assert_allclose(plain.fake, scores.fake, atol=1e-5)
    logits = detector.network(faces).detach()
    assert plain.video == pytest.approx(float(fake_share(logits.double().mean(0))), abs=1e-6)
    assert plain.attention is None
    parts = [detector.score(part) for part in faces.split(2)]
    assert detector.combine(parts) == pytest.approx(plain.video, abs=1e-6)
    assert math.isnan(detector.score(faces[:0]).video)
    with pytest.raises(UserError, match=r"Tensor\[T, 3, 32, 32\]"):
        detector.score(torch.rand(1, 3, 16, 16))
    torch.save(authors_xception(), tmp_path / "authors.pth")
    released = load_detector("acmf", tmp_path / "authors.pth")
    assert released.image_size == 224
    assert released.threshold is None
    assert released.training == ""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "acmf.safetensors").unlink()
    with pytest.raises(UserError, match="has not ended"):
        load_detector("acmf", copy)
