"""CLIP alignment with encoders simple enough to work out by hand, and loading from local files."""

import json
import math

import numpy as np
import pytest
import torch

from pyface.errors import UserError
from pyface.metrics import ClipAlignment, ClipEncoders, load_clip

pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method")


def mean_colour(images):
    return images.mean((2, 3))


def colour_named(prompts):
    return torch.tensor([[float(letter in prompt) for letter in "rgb"] for prompt in prompts])


ENCODERS = ClipEncoders(3, mean_colour, colour_named)


def flat(*colours):
    return torch.tensor(colours)[:, :, None, None].repeat(1, 1, 4, 4)


RED, GREEN = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)


def test_by_hand():
    metric = ClipAlignment(ENCODERS)
    # references r and g; generations r, r and (r + g) / sqrt 2. Cosines over the cross product: 1 1 h, 0 0 h
    metric.update(references=flat(RED))
    metric.update(references=flat(GREEN), generations=flat(RED), prompts=["r"])
    metric.update(generations=flat(RED, (0.3, 0.3, 0.0)), prompts=["g", "r g"])
    result = {name: value.item() for name, value in metric.compute().items()}
    h = math.sqrt(0.5)
    clip_i, clip_t = (2 + 2 * h) / 6, (1 + 0 + 1) / 3
    assert result == pytest.approx({"clip_i": clip_i, "clip_t": clip_t, "balance": math.sqrt(clip_i * clip_t)})


def test_masks_make_the_background_black_on_both_sides():
    half = torch.zeros(1, 1, 4, 4)
    half[..., :2] = 1
    reference, generation = flat(RED), flat(RED)
    reference[..., 2:] = torch.tensor(GREEN)[:, None, None]  # unlike backgrounds
    metric = ClipAlignment(ENCODERS, text=False, masked=True)
    sharp = half[:, 0].bool()
    metric.update(references=reference, reference_masks=half, generations=generation, generation_masks=sharp)
    result = metric.compute()
    assert list(result) == ["clip_i", "masked_clip_i"]
    assert result["clip_i"].item() == pytest.approx(math.sqrt(0.5))
    assert result["masked_clip_i"].item() == pytest.approx(1)
    # and another background changes the one but not the other
    changed = ClipAlignment(ENCODERS, text=False, masked=True)
    changed.update(
        references=reference.where(half.bool(), torch.rand(1, 3, 4, 4)),
        reference_masks=half,
        generations=generation,
        generation_masks=half,
    )
    assert changed.compute()["masked_clip_i"] == result["masked_clip_i"]
    assert changed.compute()["clip_i"] != result["clip_i"]


def test_a_missing_side_is_nan():
    assert ClipAlignment(ENCODERS).compute()["clip_i"].isnan()
    metric = ClipAlignment(ENCODERS)
    metric.update(generations=flat(RED), prompts=["r"])
    result = metric.compute()
    assert result["clip_i"].isnan()
    assert result["clip_t"] == 1


def test_wrong_input_is_refused_before_anything_is_counted():
    red, mask = flat(RED), torch.ones(1, 1, 4, 4)
    text, masked = ClipAlignment(ENCODERS), ClipAlignment(ENCODERS, text=False, masked=True)
    for metric, given, says in [
        (text, {"references": red, "generations": red}, "generations and prompts must come together"),
        (text, {"references": red, "prompts": ["r"]}, "generations and prompts must come together"),
        (text, {"references": red, "generations": red, "prompts": ["r", "g"]}, "one prompt for each of the 1"),
        (text, {"references": red, "generations": red, "prompts": "r"}, "one prompt for each of the 1"),
        (text, {"references": red, "reference_masks": mask}, "masked=False"),
        (text, {"references": red[:, :1]}, "3 channels"),
        (text, {"references": red * 2}, r"in \[0, 1\]"),
        (masked, {"references": red}, "references and their masks must come together"),
        (masked, {"references": red, "reference_masks": mask[..., :2]}, r"must be \[1, 1, 4, 4\], got"),
        (masked, {"references": red, "reference_masks": mask * 255}, r"masks of references must be in \[0, 1\]"),
        (masked, {"prompts": ["r"]}, "text=False"),
    ]:
        with pytest.raises(UserError, match=says):
            metric.update(**given)
        assert metric.reference_count == 0
    odd = ClipAlignment(ClipEncoders(4, mean_colour, colour_named))
    with pytest.raises(UserError, match=r"must return Tensor\[1, 4\], got float32 \[1, 3\]"):
        odd.update(references=red)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A small CLIP with random weights, in the files of a released one."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 60, "max_position_embeddings": 7, "bos_token_id": 58, "eos_token_id": 59},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    words = letters + [f"{letter}</w>" for letter in letters] + ["ca", "ca" + "t</w>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    vocabulary |= {"<|startoftext|>": 58, "<|endoftext|>": 59}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    return folder


def test_load_clip_gives_what_transformers_gives(clip_folder):
    transformers = pytest.importorskip("transformers")
    clip = load_clip(clip_folder)
    assert clip.dim == 12
    model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 70, 50, 3), np.uint8)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    prepared = transformers.CLIPImageProcessor(**size)(list(pixels), return_tensors="pt")["pixel_values"]
    tokens = torch.tensor([[58, 53, 59, 59], [58, 0, 27, 59]])  # "cat", "ab" (a, then b at a word's end)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    with torch.no_grad():
        expected = model(input_ids=tokens, attention_mask=mask, pixel_values=prepared)
        found = torch.nn.functional.normalize(clip.image(images), dim=1)
        # Pillow rounds to 8 bits after resizing, we do not
        torch.testing.assert_close(found, expected.image_embeds, rtol=0, atol=0.01)
        words = torch.nn.functional.normalize(clip.text(["cat", "ab"]), dim=1)
        torch.testing.assert_close(words, expected.text_embeds, rtol=0, atol=1e-5)
        assert clip.text(["cat " * 30]).shape == (1, 12)  # longer than the model knows: cut
    metric = ClipAlignment(clip)
    metric.update(references=images, generations=images, prompts=["cat", "ab"])
    between = (expected.image_embeds @ expected.image_embeds.T).mean().item()
    assert metric.compute()["clip_i"].item() == pytest.approx(between, abs=0.01)


def test_missing_or_damaged_clip_files_say_what_is_expected(clip_folder, tmp_path):
    with pytest.raises(UserError, match="nowhere is no folder; .*clip-vit-base-patch32; pyface never downloads"):
        load_clip(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no config.json"):
        load_clip(tmp_path)
    (tmp_path / "config.json").write_bytes((clip_folder / "config.json").read_bytes())
    with pytest.raises(UserError, match="cannot be loaded"):
        load_clip(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_clip(tmp_path)
