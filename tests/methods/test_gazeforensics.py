"""GazeForensics: network, losses, clips, teacher, training, released checkpoints, detector."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torchvision.models import resnet18
from typer.testing import CliRunner

from pyface.cli.main import app
from pyface.data.images import write_png
from pyface.data.protocols import FaceClip, test_parts
from pyface.engine import Trainer
from pyface.engine.checkpoint import load_weights, save_weights
from pyface.errors import UserError
from pyface.methods import create_model, list_models, load_official
from pyface.methods.detection import load_detector
from pyface.methods.gazeforensics import GazeForensics, GazeNetwork, convert, losses, recipe, teacher
from pyface.methods.gazeforensics.clips import (
    clip_quota,
    epoch_order,
    evaluation_clips,
    padded,
    paired_order,
    training_frames,
)
from pyface.methods.gazeforensics.detector import spread
from pyface.methods.gazeforensics.model import FRAMES, expected_degrees, parameters_of, prepared
from pyface.methods.gazeforensics.recipe import Config, Recipe, measures

TRUNK, WIDTH = "test_resnet", 96
SMALL = {"gaze": WIDTH, "leaky": 8, "heads": 2, "head_width": 16, "compressed": 4}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(**changes):
    torch.manual_seed(0)
    return GazeForensics(TRUNK, **SMALL | changes).eval()


def videos(count=6, length=20, side=32, seed=0):
    """Real and fake videos of noise; the fakes are darker."""
    rng = np.random.default_rng(seed)
    return [
        FaceClip(
            f"v{i}", i % 2, "texture" if i % 2 else "real", str(i), "",
            rng.integers(0, 100 if i % 2 else 256, (length, side, side, 3), dtype=np.uint8),
        )
        for i in range(count)
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- network


def test_published_size():
    model = create_model("gazeforensics")
    assert parameters_of(model) == 14_455_874
    parts = {"trunk": 11_176_512, "embedding": 279_072, "attention": 1_050_624, "compress": 168_352,
             "classifier": 156_226}  # fmt: skip
    assert {name: parameters_of(getattr(model, name)) for name in parts} == parts
    assert sum(parameters_of(getattr(model, name)) for name in ("query", "key", "value")) == 1_625_088
    assert model.settings() == {
        "gaze": 512, "leaky": 32, "heads": 8, "head_width": 64, "compressed": 32, "frozen": False, "angles": False,
    }  # fmt: skip
    assert "gazeforensics" in list_models("gaze*")


def test_network_is_the_equations():
    """Attention written out head by head from equation (3), in double precision."""
    model = small().double()
    clips = torch.randn(2, FRAMES, 3, 32, 32, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, z_gaze = model(clips)
        z = torch.stack([model.embedding(model.trunk(clip)) for clip in clips])
        torch.testing.assert_close(z_gaze, z[..., :WIDTH])

        def layers(part, x):
            linear = [layer for layer in part if isinstance(layer, torch.nn.Linear)]
            for number, layer in enumerate(linear):
                x = x @ layer.weight.T + layer.bias
                x = x.clamp(min=0) if number < len(linear) - 1 else x
            return x

        q, k, v = (layers(part, z) for part in (model.query, model.key, model.value))
        attention = model.attention
        q, k, v = (
            x @ w.T + b
            for x, w, b in zip((q, k, v), attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3))
        )
        heads = []
        for head in range(2):
            mine = slice(16 * head, 16 * head + 16)
            weights = (q[..., mine] @ k[..., mine].transpose(1, 2) / math.sqrt(16)).softmax(-1)
            heads.append(weights @ v[..., mine])
        mixed = attention.out_proj(torch.cat(heads, -1))
        expected = layers(model.classifier, layers(model.compress, mixed).flatten(1))
    torch.testing.assert_close(logits, expected)


def test_frames_are_told_apart_only_behind_the_attention():
    """No positional encoding: other orders permute the attention's output, and the flattened MLP sees the order."""
    model = small()
    clips = torch.randn(1, FRAMES, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(FRAMES, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        first, second = model(clips)[0], model(clips[:, order])[0]
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("leaky", [0, 8])
def test_frozen_variant_uses_the_teacher_as_it_is(leaky):
    model = small(frozen=True, leaky=leaky).train()
    assert not model.teacher.training
    assert not any(p.requires_grad for p in model.teacher.parameters())
    assert (model.trunk is None) == (leaky == 0)
    clips = torch.randn(2, FRAMES, 3, 32, 32)
    logits, z = model.eval()(clips)
    own = model.teacher(clips.flatten(0, 1)).unflatten(0, (2, FRAMES))
    torch.testing.assert_close(z, own)
    torch.testing.assert_close(model(clips, own)[0], logits)
    logits.sum().backward()
    assert all(p.grad is None for p in model.teacher.parameters())


def test_bad_networks_and_inputs_are_refused():
    for wrong in ({"leaky": -1}, {"heads": 0}, {"frozen": True, "gaze": 5}, {"colour": 1}):
        with pytest.raises(UserError):
            create_model("gazeforensics", trunk=TRUNK, **SMALL | wrong)
    with pytest.raises(UserError, match="no weights ship"):
        create_model("gazeforensics", pretrained=True)
    for shape in ((1, 13, 3, 32, 32), (14, 3, 32, 32), (1, 14, 1, 32, 32)):
        with pytest.raises(UserError, match="clips must be"):
            small()(torch.zeros(shape))


def test_input_is_normalised_and_cropped():
    pixels = torch.arange(3 * 224 * 224, dtype=torch.float64).reshape(1, 3, 224, 224) % 256
    full = prepared(pixels.to(torch.uint8), 224)
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    torch.testing.assert_close(full[0, :, 5, 7], (pixels[0, :, 5, 7].float() / 255 - mean) / std)
    torch.testing.assert_close(prepared(pixels.float() / 255, 224), full)
    ramp = torch.linspace(0, 1, 224).expand(1, 3, 224, 224)
    central = prepared(ramp, 224, "central")
    # The middle 177 of 224 columns, stretched: half way stays half way, the ends are those of columns 23 and 199.
    back = central[0, 0, 0] * 0.229 + 0.485
    torch.testing.assert_close(back[[0, -1]], ramp[0, 0, 0, [23, 199]], atol=3e-3, rtol=0)
    with pytest.raises(UserError, match="crop"):
        prepared(ramp, 224, "none")


# -------------------------------------------------------------------------------------------------------------- losses


def test_classification_loss_is_the_codes_cross_entropy_of_both_outputs():
    logits = torch.randn(9, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1])
    fake_first = torch.stack((labels, 1 - labels), 1).float()
    expected = F.binary_cross_entropy(logits.softmax(1), fake_first)
    torch.testing.assert_close(losses.classification_loss(logits, labels), expected)
    torch.manual_seed(3)
    smoothed = losses.classification_loss(logits, labels, (0.1, 0.05))
    torch.manual_seed(3)
    target = (fake_first - (0.1 + 0.05 * torch.rand(9, 2))).abs()
    torch.testing.assert_close(smoothed, F.binary_cross_entropy(logits.softmax(1), target))
    assert losses.classification_loss(torch.tensor([[500.0, -500.0]]), torch.tensor([0])) == 1000  # nothing saturates
    torch.testing.assert_close(losses.fake_probability(logits), logits.softmax(1)[:, 0])


def test_gaze_loss_and_its_weight():
    a, b = torch.randn(2, FRAMES, 5), torch.randn(2, FRAMES, 5)
    expected = sum((a[i, t, d] - b[i, t, d]) ** 2 for i in range(2) for t in range(FRAMES) for d in range(5))
    torch.testing.assert_close(losses.gaze_loss(a, b), expected / (2 * FRAMES * 5))
    weights = [losses.gaze_weight(4.0, 0.01, epoch / 25) for epoch in range(25)]
    assert [round(w, 2) for w in weights[:3]] == [4.0, 3.33, 2.77]
    assert weights[-1] == pytest.approx(0.0481, abs=5e-5)


def test_angle_loss():
    logits = torch.full((1, 90), -50.0)
    logits[0, [45, 50]] = 50.0  # half at 0 degrees, half at 20
    assert expected_degrees(logits).item() == pytest.approx(10.0, abs=1e-4)
    # 10 degrees is bin 47; its logit is 100 below the two that share the mass.
    loss = losses.angle_loss(logits, torch.tensor([10.0]))
    assert loss.item() == pytest.approx(100 + math.log(2), rel=1e-5)
    further = losses.angle_loss(logits, torch.tensor([11.0]))
    assert further.item() == pytest.approx(100 + math.log(2) + 1, rel=1e-4)
    losses.angle_loss(logits, torch.tensor([-180.0])).isfinite()
    losses.angle_loss(logits, torch.tensor([180.0])).isfinite()


# --------------------------------------------------------------------------------------------------------------- clips


@given(st.integers(1, 400), st.integers(0, 1 << 30))
@settings(max_examples=200, deadline=None)
def test_training_clips_lie_within_the_video(length, seed):
    frames = training_frames(length, np.random.default_rng(seed))
    assert len(frames) == FRAMES
    assert frames == sorted(frames)
    assert frames[0] >= 0
    assert frames[-1] < length
    if length >= FRAMES:
        assert len(set(frames)) == FRAMES


def test_training_clips_range_from_consecutive_to_nearly_all():
    drawn = [training_frames(60, np.random.default_rng(seed)) for seed in range(400)]
    spans = [clip[-1] - clip[0] + 1 for clip in drawn]
    assert min(spans) == FRAMES
    assert max(spans) >= 54
    # s = (14 + extend) / 14, as in the sheet
    for clip in drawn:
        assert any(
            clip == [clip[0] + math.floor(round(j * (14 + extend) / 14, 9)) for j in range(14)] for extend in range(46)
        )


@pytest.mark.parametrize(
    ("length", "strides"),
    [
        (14, {1: 1}),
        (27, {1: 1}),
        (28, {2: 1}),  # at step 1 there are 2 clips, not more than 1 + 2
        (56, {4: 1, 1: 4}),
        (140, {10: 1, 2: 5}),  # 1 then 5 (> 1 + 2) at step 2; then 6 clips exist
        (280, {20: 1, 5: 4, 2: 10}),
    ],
)
def test_evaluation_clips(length, strides):
    clips = evaluation_clips(length)
    found = {}
    for clip in clips:
        step = clip[1] - clip[0]
        assert clip == list(range(clip[0], clip[0] + 14 * step, step))
        assert 0 <= clip[0] <= clip[-1] < length
        found[step] = found.get(step, 0) + 1
    assert found == strides or length == 280  # the last is checked by the rule itself, below
    assert clips == evaluation_clips(length)
    expected, last, total = {}, -9, 0
    for step in range(length // 14, 0, -1):
        if step <= 3 and length // 14 != 1 and total >= 5:
            break
        m = length // (14 * step)
        if m > last + 2:
            expected[step], last, total = m, m, total + m
    assert found == expected


def test_short_videos_repeat_their_last_frame():
    assert padded(3) == [0, 1] + 12 * [2]
    assert evaluation_clips(3) == [padded(3)]
    assert training_frames(3, np.random.default_rng(0)) == padded(3)
    with pytest.raises(UserError):
        padded(0)


def test_quota_balances_the_classes_by_the_longest_videos():
    lengths, labels = [14 * 5, 14 * 3, 14 * 9, 14 * 2], [0, 0, 1, 1]
    assert clip_quota(lengths, labels) == [5, 3, 6, 2]  # 8 real; 11 fake lose 3 off the longest
    assert clip_quota(lengths, labels, cap=4) == [3, 3, 4, 2]
    assert clip_quota([5, 30], [0, 1]) == [1, 1]
    with pytest.raises(UserError, match="real and fake"):
        clip_quota([20, 20], [1, 1])


@given(st.lists(st.integers(1, 30), min_size=2, max_size=12), st.floats(0.05, 1), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_epochs_keep_a_share_of_each_class_and_spare_short_videos(counts, share, seed):
    labels = [i % 2 for i in range(len(counts))]
    quota = clip_quota([14 * n for n in counts], labels)
    total = sum(n for n, label in zip(quota, labels) if label)
    order = epoch_order(quota, labels, share, np.random.default_rng(seed))
    kept = np.bincount(order, minlength=len(counts))
    for label in (0, 1):
        mine = [i for i, own in enumerate(labels) if own == label]
        assert sum(kept[mine]) == max(1, round(share * total))
        cut = [i for i in mine if kept[i] < quota[i]]
        # Levelled from the top: what lost a clip has at most one less than the largest that is left.
        assert all(kept[i] >= max(kept[mine]) - 1 for i in cut)


def test_a_real_clip_comes_with_a_fake_of_the_same_person():
    labels = [0, 1, 1, 0, 1, 0]
    people = ["p", "p", "q", "q", "p", "alone"]
    quota = clip_quota([14 * 6] * 6, labels)
    fakes = set()
    for seed in range(8):
        order = paired_order(quota, labels, people, 0.5, np.random.default_rng(seed))
        assert [labels[video] for video in order] == [0, 1] * (len(order) // 2)
        assert np.bincount(order[::2]).tolist() == [3, 0, 0, 3, 0, 3]
        for real, fake in zip(order[::2], order[1::2]):
            assert people[real] in (people[fake], "alone")
            fakes.add((people[real], int(fake)))
    assert {fake for person, fake in fakes if person == "p"} == {1, 4}


# ------------------------------------------------------------------------------------------------------------- teacher


def label_folder(root: Path, side=20):
    rng = np.random.default_rng(0)
    (root / "Label").mkdir(parents=True)
    (root / "Image").mkdir()
    lines = ["Face Left Right Origin 3DGaze 2DGaze"]
    for number, (pitch, yaw) in enumerate([(0.1, -0.2), (0.0, 2.0), (-0.5, 1.0)]):
        write_png(root / "Image" / f"{number}.png", rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        lines.append(f"{number}.png l.png r.png name {0.1},{0.2},{-0.9} {pitch},{yaw}")
    for split in ("train", "val", "test"):
        (root / "Label" / f"{split}.label").write_text("\n".join(lines) + "\n")
    return root


def test_gaze_labels(tmp_path):
    root = label_folder(tmp_path)
    train, test = teacher.GazeLabels(root, "train", 20), teacher.GazeLabels(root, "test", 32)
    assert (len(train), len(test)) == (3, 2)  # 2 rad are more than 90 degrees
    torch.testing.assert_close(train[1]["degrees"], torch.tensor([0.0, math.degrees(2.0)]))
    assert train[0]["pixels"].dtype == torch.uint8
    assert train[0]["pixels"].shape == (3, 20, 20)
    assert test[1]["pixels"].shape == (3, 32, 32)
    (root / "Label" / "val.label").write_text("header\n0.png l r name 0,0,0\n")
    with pytest.raises(UserError, match="line 2"):
        teacher.GazeLabels(root, "val", 20)
    (root / "Label" / "val.label").write_text("header\n")
    with pytest.raises(UserError, match="no pictures"):
        teacher.GazeLabels(root, "val", 20)
    with pytest.raises(UserError, match=r"Label/train\.label"):
        teacher.GazeLabels(root / "nowhere", "train", 20)


class Eyes(torch.utils.data.Dataset):
    """A dark pupil on a bright ball: up for a positive pitch, to the picture's left for a positive yaw."""

    def __init__(self, count, seed):
        rng = np.random.default_rng(seed)
        self.degrees = torch.from_numpy(rng.uniform(-30, 30, (count, 2)).astype(np.float32))
        y, x = np.mgrid[0:32, 0:32]
        centres = 16 - self.degrees.numpy() / 3
        near = [np.hypot(x - right, y - down) < 4 for down, right in centres]
        self.pixels = torch.from_numpy(np.where(np.stack(near)[:, None], 20, 200).astype(np.uint8)).repeat(1, 3, 1, 1)

    def __len__(self):
        return len(self.degrees)

    def __getitem__(self, index):
        return {"pixels": self.pixels[index], "degrees": self.degrees[index]}


def test_teacher_learns_to_see_where_eyes_look(tmp_path):
    """On eyes it never saw; mirrored pictures look the other way."""
    config = Config.preset(
        "teacher", trunk=TRUNK, image_size=32, epochs=None, steps=80, batch_size=32, lr=1e-2, validate_every=0,
        augment=False,
    )  # fmt: skip
    made = Recipe(config)
    made._gaze_data = lambda split, folder, quiet=True: Eyes(400 if split == "train" else 64, len(split))
    network = Trainer(made, tmp_path, quiet=True).fit()
    (row,) = made.evaluate(network)
    assert row["pictures"] == 64
    assert row["angular_error"] < 9  # 23 degrees for who always guesses straight ahead
    images = prepared(Eyes(64, 9).pixels, 32)
    with torch.no_grad():
        gaze, other = network.gaze(images), network.gaze(images.flip(-1))
    assert np.corrcoef(gaze[:, 1], other[:, 1])[0, 1] < -0.8
    assert np.corrcoef(gaze[:, 0], other[:, 0])[0, 1] > 0.8
    loaded = teacher.load_teacher(tmp_path, TRUNK)
    with torch.no_grad():
        torch.testing.assert_close(loaded.gaze(images), gaze)
    with pytest.raises(UserError, match="does not hold"):
        teacher.load_teacher(tmp_path, "resnet18")
    with pytest.raises(UserError, match="not a detector"):
        load_detector("gazeforensics", tmp_path)


def test_procedural_faces_know_their_gaze_and_are_framed_like_videos(tmp_path):
    wide, close = (teacher.GazeFaces(3, 48, 5, margin) for margin in (2.0, 0.9))
    assert np.array_equal(wide.degrees, close.degrees)
    assert np.abs(wide.degrees).max() < 90
    assert not np.array_equal(wide.faces, close.faces)
    kept = teacher.GazeFaces(3, 48, 5, 0.9, tmp_path)
    again = teacher.GazeFaces(3, 48, 5, 0.9, tmp_path)
    for other in (kept, again):
        assert torch.equal(other[1]["pixels"], close[1]["pixels"])
        assert torch.equal(other[1]["degrees"], close[1]["degrees"])


def test_teachers_of_others_load(tmp_path):
    torch.manual_seed(0)
    trunk = resnet18(weights=None)
    l2cs = {k: v for k, v in trunk.state_dict().items() if not k.startswith("fc.")}
    headless = dict(l2cs)
    for name, outputs, inputs in (("fc_yaw_gaze", 90, 512), ("fc_pitch_gaze", 90, 512), ("fc_finetune", 3, 515)):
        l2cs |= {f"{name}.weight": torch.randn(outputs, inputs), f"{name}.bias": torch.randn(outputs)}
    torch.save(l2cs, tmp_path / "l2cs.pkl")
    torch.save(headless, tmp_path / "gazeBackend_512.pkl", _use_new_zipfile_serialization=False)
    network = teacher.load_teacher(tmp_path / "l2cs.pkl")
    x = torch.randn(2, 3, 64, 64)
    trunk.fc = torch.nn.Identity()
    with torch.no_grad():
        feature = trunk.eval()(x)
        torch.testing.assert_close(network.embed(x), feature)
        pitch, yaw = network(x)
        torch.testing.assert_close(yaw, feature @ l2cs["fc_yaw_gaze.weight"].T + l2cs["fc_yaw_gaze.bias"])
        torch.testing.assert_close(pitch, feature @ l2cs["fc_pitch_gaze.weight"].T + l2cs["fc_pitch_gaze.bias"])
        bare = teacher.load_teacher(tmp_path / "gazeBackend_512.pkl")
        torch.testing.assert_close(bare.embed(x), feature)
    assert network.angles.known
    assert not bare.angles.known


def test_embeddings_are_kept_and_made_anew_when_anything_changes(tmp_path):
    torch.manual_seed(0)
    network, clips, file = GazeNetwork(TRUNK).eval(), videos(3), tmp_path / "embeddings.safetensors"
    made = teacher.embeddings(file, network, clips, size=32)
    assert made.shape == (2, 60, WIDTH)
    pixels = torch.from_numpy(clips[1].faces).permute(0, 3, 1, 2)
    with torch.no_grad():
        for kind, values in zip(made, (pixels, pixels.flip(-1))):
            torch.testing.assert_close(kind[20:40].float(), network.embed(prepared(values, 32)), atol=2e-3, rtol=2e-3)
    before = file.stat().st_mtime_ns
    assert torch.equal(teacher.embeddings(file, network, clips, size=32), made)
    assert file.stat().st_mtime_ns == before
    other = videos(3)
    other[0].faces[3, 4, 5, 1] ^= 1
    with torch.no_grad():
        changed = GazeNetwork(TRUNK).eval()
    for args in ((network, other, 32, "full"), (changed, clips, 32, "full"), (network, clips, 32, "central")):
        teacher.embeddings(file, network, clips, size=32) if not file.exists() else None
        with pytest.warns(UserWarning, match="made anew"):
            teacher.embeddings(file, *args[:2], size=args[2], crop=args[3])
    file.write_bytes(b"broken")
    with pytest.warns(UserWarning, match="made anew"):
        assert torch.equal(teacher.embeddings(file, network, clips, size=32), made)


# ------------------------------------------------------------------------------------------------------------ training


def test_learning_rates_are_the_sheets(tmp_path):
    config = Config(image_size=32, trunk=TRUNK)
    made = Recipe(config)
    model = torch.nn.ModuleDict({"trunk": torch.nn.Linear(2, 2), "query": torch.nn.Linear(2, 2)})
    run = types.SimpleNamespace(optimizers=made.optimizers(model), steps=None)
    assert list(run.optimizers) == ["backbone", "classifier"]
    schedulers = made.schedulers(run)
    assert [after for _, after in schedulers] == ["epoch", "epoch"]
    seen = {}
    for epoch in range(25):
        for optimizer in run.optimizers.values():
            (group,) = optimizer.param_groups
            seen[epoch] = group["lr"], group["betas"][0]
            optimizer.step()
        for scheduler, _ in schedulers:
            scheduler.step()
    wanted = {0: (7e-8, 0.95), 3: (3.08e-5, 0.906), 6: (6.9e-5, 0.8515), 7: (6.99e-5, 0.85), 12: (5.43e-5, 0.8725),
              18: (1.84e-5, 0.924), 24: (7e-12, 0.95)}  # fmt: skip
    for epoch, (lr, beta) in wanted.items():
        assert seen[epoch][0] == pytest.approx(lr, rel=3e-3), epoch
        assert seen[epoch][1] == pytest.approx(beta, abs=6e-4), epoch
    assert Recipe(Config(batch_size=8))._lr() == pytest.approx(7e-5 / 4)


def test_settings_that_make_no_sense_are_refused():
    for wrong in ({"share": 0.0}, {"warm": 1.0}, {"gaze_weight": -1.0}, {"videos": 0}, {"epochs": 1},
                  {"epochs": None, "steps": 5}, {"gaze_decay": 0.0}, {"smooth": (-0.1, 0.0)}):  # fmt: skip
        with pytest.raises(UserError):
            Config(**wrong)


def tiny(**changes):
    return Config.preset(
        "tiny", **{"videos": 2, "validation": 1, "tests": 1, "frames": 16, "image_size": 32, "epochs": 2, "steps": None,
                   "teacher_faces": 32, "teacher_steps": 3, "train_on": "texture,reenactment",
                   "test_on": "texture,colour_transfer", "batch_size": 4, "validate_every": 1} | changes
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the command, its folder, and the folder of face crops."""
    root = tmp_path_factory.mktemp("gazeforensics")
    config = tiny(cache=str(root / "crops"))
    made = Recipe(config)
    network = Trainer(made, root / "run", quiet=True).fit()
    return root, config, made, network


def test_a_run_and_its_evaluation(trained):
    root, config, made, network = trained
    rows = made.evaluate(network)
    assert [row["family"] for row in rows] == ["texture", "colour_transfer", "all of them"]
    assert rows[2]["real"] == 1
    assert rows[2]["fake"] == 2
    with open(root / "run" / "log.csv") as file:
        log = list(csv.DictReader(file))
    assert {"verdict", "gaze", "mu", "accuracy"} <= log[0].keys()
    result = CliRunner().invoke(app, ["evaluate", "gazeforensics", "--weights", str(root / "run"), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["evaluation"] == rows
    chosen = ["--weights", str(root / "run"), "--test-on", "colour_transfer", "--json"]
    result = CliRunner().invoke(app, ["evaluate", "gazeforensics", *chosen])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["evaluation"] == [rows[1]]


def test_unseen_families_are_those_not_trained_on(trained):
    _, config, made, network = trained
    other = Recipe(dataclasses.replace(config, test_on="unseen", train_on="all"))
    with pytest.raises(UserError, match="no family of procedural is unseen"):
        other.evaluate(network)
    tested = [test_parts("texture,splice", which, "procedural")[0].families for which in ("seen", "unseen")]
    assert tested == [("texture", "splice"), ("blend_swap", "reenactment", "colour_transfer")]


def test_weights_are_chosen_by_validation_and_say_what_they_are(trained):
    root, config, made, _ = trained
    with open(root / "run" / "validation.csv") as file:
        table = list(csv.DictReader(file))
    about = load_weights(made.model(), root / "run" / "gazeforensics.safetensors")
    assert float(about["auc"]) == pytest.approx(max(float(row["auc"]) for row in table))
    assert about["training"] == "2 real, 2 reenactment, 2 texture videos of procedural: texture,reenactment"
    assert "1 real, 1 reenactment, 1 texture" in about["calibration"]
    assert 0 < float(about["threshold"]) < 1


def steps(folder, config):
    """Losses of every step, and the final weights."""
    made = Recipe(config)
    trainer = Trainer(made, folder, quiet=True)
    network = trainer.fit()
    with open(folder / "log.csv") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)], network


def test_cached_embeddings_train_as_the_teacher_does(trained, tmp_path):
    root, config, _, _ = trained
    config = dataclasses.replace(config, log_every=1, teacher=str(root / "run" / "teacher"), lr=1e-4, precision="no")
    with_cache, _ = steps(tmp_path / "a", config)
    without, _ = steps(tmp_path / "b", dataclasses.replace(config, cached=False))
    assert not (tmp_path / "b" / "embeddings.safetensors").exists()
    assert len(with_cache) == 4 // 4 * 2
    np.testing.assert_allclose(with_cache, without, rtol=2e-3)


@pytest.mark.parametrize(
    "variant", [{"leaky": 0}, {"gaze_weight": 0.0}, {"frozen": True}, {"frozen": True, "leaky": 0}, {"augment": True}]
)
def test_variants_train(trained, tmp_path, variant):
    root, config, _, _ = trained
    config = dataclasses.replace(config, teacher=str(root / "run" / "teacher"), **variant)
    made = Recipe(config)
    network = Trainer(made, tmp_path, quiet=True).fit()
    if "gaze_weight" in variant:
        assert not network.angles.known
    known = teacher.load_teacher(root / "run" / "teacher", TRUNK)
    if "frozen" in variant:
        for name, value in known.trunk.state_dict().items():
            assert torch.equal(network.teacher.state_dict()[name], value)
    detector = load_detector("gazeforensics", tmp_path)
    faces = torch.rand(16, 3, 32, 32)
    wanted = recipe.score_video(
        network, (faces * 255).round().byte().permute(0, 2, 3, 1).numpy(), 32, "full"
    )[1]  # fmt: skip
    found = detector.score((faces * 255).round() / 255, maps=True)
    assert found.video == pytest.approx(wanted.mean(), abs=1e-5)
    assert (found.gaze is None) == ("gaze_weight" in variant)


def test_student_learns_to_tell_and_to_look(tmp_path):
    """Dark videos are fake: a few steps bring both losses down."""
    torch.manual_seed(0)
    made = Recipe(tiny(epochs=None, steps=30, init="none", lr=2e-2, log_every=5))
    made.clips = recipe.Clips(videos(12))
    made.quota = clip_quota(made.clips.lengths, made.clips.labels)
    made.teacher = GazeNetwork(TRUNK).eval()
    made.known = teacher.embeddings(None, made.teacher, made.clips.videos, size=32)
    made._validation = videos(6, seed=1)
    made.prepare = lambda folder, quiet: None
    network = Trainer(made, tmp_path, quiet=True).fit()
    with open(tmp_path / "log.csv") as file:
        log = list(csv.DictReader(file))
    assert float(log[-1]["gaze"]) < 0.7 * float(log[0]["gaze"])
    assert made.validate(network)[0]["auc"] == 1.0


def test_imagenet_start_is_the_users_file(trained, tmp_path, monkeypatch):
    root, config, _, _ = trained
    config = dataclasses.replace(config, teacher=str(root / "run" / "teacher"), init="imagenet")
    monkeypatch.delenv("PYFACE_WEIGHTS", raising=False)
    with pytest.raises(UserError, match="PYFACE_WEIGHTS"):
        Recipe(config).prepare(tmp_path, True)
    torch.manual_seed(5)
    trunk = GazeNetwork(TRUNK).trunk
    save_weights(trunk, tmp_path / f"{TRUNK}.safetensors")
    monkeypatch.setenv("PYFACE_WEIGHTS", str(tmp_path))
    made = Recipe(config)
    made.prepare(tmp_path, True)
    torch.testing.assert_close(made.model().trunk.conv1[0].weight, trunk.conv1[0].weight)


def test_gaze_label_folders_train_a_teacher(tmp_path):
    root = label_folder(tmp_path / "gaze360", 32)
    config = Config.preset(
        "teacher", data=str(root), trunk=TRUNK, image_size=32, epochs=None, steps=2, batch_size=2, validate_every=0
    )
    made = Recipe(config)
    rows = made.evaluate(Trainer(made, tmp_path / "run", quiet=True).fit())
    assert rows[0]["pictures"] == 2
    assert 0 <= rows[0]["angular_error"] <= 180


def test_measures():
    clips = videos(4)
    scores = [np.array([0.1, 0.3]), np.array([0.6, 0.4]), np.array([0.4]), np.array([0.9, 0.9])]
    row = measures(clips, scores)
    assert row["auc"] == 1.0
    assert row["accuracy"] == 1.0
    assert row["clip_accuracy"] == pytest.approx(6 / 7)
    # The sheet's example: clips with P(real) .9, .4 of a real video, .6, .2 of a fake one.
    row = measures(clips[:2], [np.array([0.1, 0.6]), np.array([0.4, 0.8])])
    assert (row["accuracy"], row["clip_accuracy"], row["auc"]) == (1.0, 0.5, 1.0)


def test_changed_pictures_stay_alike_within_a_clip():
    torch.manual_seed(0)
    values = torch.rand(1, 3, 24, 24).expand(6, -1, -1, -1)
    out = recipe.changed(values, 3, area=(0.7, 1.0), ratio=(0.8, 1.3), colours=0.2)
    assert torch.equal(out[0], out[2])
    assert not torch.allclose(out[0], out[3])
    assert 0 <= out.min() <= out.max() <= 1
    same = recipe.changed(values, 3, area=(1.0, 1.0), ratio=(1.0, 1.0), colours=0.0)
    torch.testing.assert_close(same, values, atol=1e-5, rtol=0)
    flat = recipe.degraded(torch.rand(3, 3, 40, 40))
    assert flat.shape == (3, 3, 40, 40)


# ------------------------------------------------------------------------------------------------ released checkpoints


def official(frozen=False, leaky=32, seed=0):
    """State dict in the layout of the authors' code: DataParallel around it, layers of an FC_block in a ModuleList."""
    generator = torch.Generator().manual_seed(seed)

    def layers(name, *widths):
        values = {}
        for number, (before, after) in enumerate(zip(widths, widths[1:])):
            values[f"{name}.fc.{number}.weight"] = torch.randn(after, before, generator=generator) / math.sqrt(before)
            values[f"{name}.fc.{number}.bias"] = torch.randn(after, generator=generator) / 10
        return values

    torch.manual_seed(seed)
    trunk = resnet18(weights=None).state_dict()
    trunk = {k: v for k, v in trunk.items() if not k.startswith("fc.")}
    values = {}
    if frozen:
        values |= {f"gaze_backend.module.{k}": v.clone() for k, v in trunk.items()}
    if not frozen or leaky:
        values |= {f"base_model.{k}": v * 1.01 if v.is_floating_point() else v for k, v in trunk.items()}
        values |= layers("gaze_fc", 512, leaky if frozen else 512 + leaky)
    for part in "QKV":
        values |= layers(f"MHA_{part}_fc", 512 + leaky, 512, 512)
    values |= {
        "multihead_attn.in_proj_weight": torch.randn(1536, 512, generator=generator) / 23,
        "multihead_attn.in_proj_bias": torch.randn(1536, generator=generator) / 10,
        "multihead_attn.out_proj.weight": torch.randn(512, 512, generator=generator) / 23,
        "multihead_attn.out_proj.bias": torch.randn(512, generator=generator) / 10,
    }
    values |= layers("MHA_comp", 512, 256, 128, 32) | layers("last_fc", 448, 256, 128, 64, 2)
    return {f"module.{k}": v for k, v in values.items()}


def their_forward(values, clips, leaky=32):
    """The released network written from its description, straight off the state dict."""
    values = {k.removeprefix("module."): v for k, v in values.items()}

    def trunk(name):
        network = resnet18(weights=None)
        own = {k.removeprefix(name): v for k, v in values.items() if k.startswith(name)}
        network.fc = torch.nn.Identity()
        network.load_state_dict(own)
        return network.eval()(clips.flatten(0, 1)).unflatten(0, (-1, FRAMES))

    def block(name, x):
        count = sum(k.startswith(f"{name}.fc.") and k.endswith("weight") for k in values)
        for number in range(count):
            x = x @ values[f"{name}.fc.{number}.weight"].T + values[f"{name}.fc.{number}.bias"]
            x = x.relu() if number < count - 1 else x
        return x

    frozen = any(k.startswith("gaze_backend.") for k in values)
    parts = []
    if not frozen or leaky:
        parts.append(block("gaze_fc", trunk("base_model.")))
    if frozen:
        parts.append(trunk("gaze_backend.module."))  # their order: free features first
    z = torch.cat(parts, 2)
    attention = torch.nn.MultiheadAttention(512, 8, batch_first=True)
    attention.load_state_dict(
        {k.removeprefix("multihead_attn."): v for k, v in values.items() if k.startswith("multihead_attn.")}
    )
    x, _ = attention(*(block(f"MHA_{part}_fc", z) for part in "QKV"))
    return block("last_fc", block("MHA_comp", x).flatten(1)).softmax(1)


@pytest.mark.parametrize(("frozen", "leaky"), [(False, 32), (False, 0), (True, 32), (True, 0)])
def test_released_layouts_compute_what_they_should(tmp_path, frozen, leaky):
    values = official(frozen, leaky)
    torch.save({"epoch": 24, "state_dict": values, "history": {"acc": [0.5]}}, tmp_path / "checkpoint_25.pth")
    model = load_official("gazeforensics", tmp_path / "checkpoint_25.pth").eval()
    assert (model.gaze, model.leaky) == (512, leaky)
    clips = torch.randn(1, FRAMES, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(clips)[0].softmax(1), their_forward(values, clips, leaky))
    if not frozen and leaky:
        assert parameters_of(model) == 14_455_874


@pytest.mark.parametrize("zipped", [True, False])
def test_their_settings_are_read_past_and_nothing_runs(tmp_path, monkeypatch, zipped):
    ran = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return (open, (str(ran), "w"))

    # The authors' files hold an object of a class of theirs.
    module = types.ModuleType("Config")
    module.Config = type("Config", (), {"__module__": "Config"})
    monkeypatch.setitem(sys.modules, "Config", module)
    own = module.Config()
    own.model = {"leaky": 32}
    values = official()
    file = tmp_path / "checkpoint_25.pth"
    options = {"_use_new_zipfile_serialization": zipped}
    torch.save({"epoch": 24, "state_dict": values, "config": own}, file, **options)
    monkeypatch.delitem(sys.modules, "Config")
    if zipped:
        assert isinstance(load_official("gazeforensics", file), GazeForensics)
    else:  # torch lists the classes of zipped files only
        with pytest.raises(UserError, match="state dict"):
            load_official("gazeforensics", file)
    torch.save({"state_dict": values, "config": Bomb()}, file, **options)
    try:
        load_official("gazeforensics", file)
    except UserError:
        pass
    assert not ran.exists()


def test_bad_checkpoints_are_refused(tmp_path):
    values = official()
    for change in (
        {"module.extra.weight": torch.zeros(1)},
        {"module.gaze_fc.other": torch.zeros(1)},
        {"module.last_fc.fc.0.weight": torch.zeros(256, 32)},
    ):
        torch.save({"state_dict": values | change}, tmp_path / "bad.pth")
        with pytest.raises(UserError, match=r"not a checkpoint|does not hold|another length"):
            load_official("gazeforensics", tmp_path / "bad.pth")
    values.pop("module.MHA_Q_fc.fc.0.weight")
    torch.save({"state_dict": values}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="does not hold"):
        load_official("gazeforensics", tmp_path / "bad.pth")
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    with pytest.raises(UserError):
        load_official("gazeforensics", tmp_path / "bad.pth")
    save_weights(torch.nn.Linear(2, 2), tmp_path / "other.safetensors", {"method": "hida"})
    with pytest.raises(UserError, match="weights of hida"):
        load_detector("gazeforensics", tmp_path / "other.safetensors")


# ------------------------------------------------------------------------------------------------------------ detector


def test_detector_scores_what_evaluation_scores(trained):
    root, config, made, network = trained
    detector = load_detector("gazeforensics", root / "run")
    about = load_weights(made.model(), root / "run" / "gazeforensics.safetensors")
    assert (detector.image_size, detector.margin, detector.least_frames) == (32, config.margin, 14)
    assert detector.threshold == pytest.approx(float(about["threshold"]))
    assert (detector.training, detector.calibration) == (about["training"], about["calibration"])
    for video in made._validation:
        faces = torch.from_numpy(np.array(video.faces)).permute(0, 3, 1, 2).float() / 255
        found = detector.score(faces)
        clips, scores = recipe.score_video(network, video.faces, 32, "full")
        assert found.video == pytest.approx(scores.mean(), abs=1e-6)
        np.testing.assert_allclose(found.fake, spread(clips, scores, len(faces)), atol=1e-6)
        assert found.attention is None
        assert found.gaze is None


def test_detect_on_a_video(trained, tmp_path):
    from pyface.data.sets.clips import Take, film
    from pyface.data.video import write_video

    shown = film(Take(3, 3, {}), seed=0, frames=24, image_size=128, framing=0.85)
    write_video(tmp_path / "clip.mp4", shown["images"])
    report = tmp_path / "report.html"
    arguments = ["detect", str(tmp_path / "clip.mp4"), "-m", "gazeforensics", "--weights", str(trained[0] / "run")]
    result = CliRunner().invoke(app, [*arguments, "--json", "--html", str(report)])
    assert result.exit_code == 0, result.output
    assert "gazeforensics" in result.output
    assert "2 real, 2 reenactment, 2 texture" in result.output  # what the weights were trained on
    assert report.stat().st_size > 10_000


def test_short_videos_and_pictures_are_refused(trained):
    detector = load_detector("gazeforensics", trained[0] / "run")
    for count in (1, 13):
        with pytest.raises(UserError, match=f"there are {count}"):
            detector.score(torch.rand(count, 3, 32, 32))


def test_clip_scores_spread_to_frames():
    fake = spread([[1, 2, 3], [3, 5, 7]], np.array([0.2, 0.6]), 10)
    np.testing.assert_allclose(fake, [np.nan, 0.2, 0.2, 0.4, 0.6, 0.6, 0.6, 0.6, np.nan, np.nan])


def test_attention_is_grad_cam_through_the_whole_network(trained):
    detector = load_detector("gazeforensics", trained[0] / "run")
    faces = torch.rand(14, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = detector.score(faces, maps=True)
    network = detector.network
    images = prepared(faces, 32)
    kept = []

    # timm's trunk hands its last stage's output to the pooling.
    def keep(module, given, out):
        out.retain_grad()
        kept.append(out)

    handle = network.trunk.layer4.register_forward_hook(keep)
    logits = network(images[None])[0]
    handle.remove()
    (logits[0, 0] - logits[0, 1]).backward()
    (features,) = kept
    cam = (features.grad.mean((2, 3), keepdim=True) * features).sum(1).clamp(min=0).detach()
    cam = cam / cam.max() if cam.max() > 0 else cam
    np.testing.assert_allclose(found.attention, cam.numpy(), atol=1e-4)
    assert 0 <= found.attention.min() <= found.attention.max() <= 1


def test_gaze_is_what_the_teachers_heads_read_off_the_student(trained):
    detector = load_detector("gazeforensics", trained[0] / "run")
    network = detector.network
    faces = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = detector.score(faces, maps=True)
    seen = sorted({i for clip in evaluation_clips(20) for i in clip})
    with torch.no_grad():
        z = network.embed(prepared(faces[seen], 32))[:, :WIDTH]
        pitch, yaw = network.angles.degrees(z).deg2rad().T
    np.testing.assert_allclose(found.gaze[seen], torch.stack((-yaw, pitch), 1).numpy(), atol=1e-5)
    others = [i for i in range(20) if i not in seen]
    assert others
    assert np.isnan(found.gaze[others]).all()


def test_released_weights_detect_without_gaze_or_threshold(tmp_path):
    torch.save({"state_dict": official()}, tmp_path / "checkpoint_25.pth")
    detector = load_detector("gazeforensics", tmp_path / "checkpoint_25.pth")
    assert (detector.image_size, detector.threshold, detector.training) == (224, None, "")
    found = detector.score(torch.rand(15, 3, 224, 224), maps=True)
    assert found.gaze is None
    assert found.attention.shape == (15, 7, 7)


def test_convert_needs_known_names():
    with pytest.raises(UserError, match="unknown key"):
        convert.convert_state_dict({"module.something": torch.zeros(1)})
