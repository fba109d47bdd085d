"""Do generated pictures show the reference concept, and what the prompt asks for? Scores in CLIP's space."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from pyface.errors import UserError
from pyface.metrics._base import check_images, check_unit, describe

_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pictures (Radford et al., 2021)
_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ClipEncoders:
    """A pair of encoders into one space; any that fit may be used in CLIP's place.

    Attributes:
        dim: D, length of an embedding.
        image: Tensor[N, 3, H, W] in [0, 1] -> Tensor[N, D]; does its own resizing and normalisation.
        text: list of N strings -> Tensor[N, D], on any device.
    """

    dim: int
    image: Callable[[Tensor], Tensor]
    text: Callable[[list[str]], Tensor]


def load_clip(folder: str | os.PathLike, device: str | torch.device = "cpu") -> ClipEncoders:
    """CLIP from a local folder in the format of Hugging Face transformers. Nothing is ever downloaded.

    Published scores use OpenAI's ViT-B/32: the files of https://huggingface.co/openai/clip-vit-base-patch32
    (config.json, model.safetensors or pytorch_model.bin, vocab.json, merges.txt, tokenizer_config.json).

    Pictures are resized (shorter side, bicubic with antialiasing), cut to the central square and normalised, as CLIP's
    own preprocessing does; values stay floats in between, where Pillow rounds to 8 bits. Prompts are cut at the length
    that the model knows (77 tokens).

    Raises:
        UserError: transformers is not installed, the folder is missing, or it does not hold such a model.
    """
    folder = Path(folder)
    wanted = (
        "files of a CLIP model (config.json, model.safetensors, vocab.json, merges.txt, tokenizer_config.json), for "
        "instance those of https://huggingface.co/openai/clip-vit-base-patch32; pyface never downloads them"
    )
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is no folder"
        raise UserError(f"CLIP weights: {folder} {what}; give a folder with the {wanted}")
    try:
        from transformers import CLIPModel, CLIPTokenizer
    except ImportError as error:
        raise UserError(f"CLIP scores need transformers ({error}); pip install transformers") from error
    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True).float().eval().requires_grad_(False).to(device)
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # on damaged files the parsers behind it may raise anything
        raise UserError(f"CLIP weights: {folder} cannot be loaded ({error}); it should hold the {wanted}") from error
    size = model.config.vision_config.image_size
    # Towers and projections apart: what get_image_features returns has changed between versions of transformers.

    def image(images: Tensor) -> Tensor:
        pixels = clip_pixels(images.to(device), size)
        return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)

    def text(prompts: list[str]) -> Tensor:
        limit = model.config.text_config.max_position_embeddings
        tokens = tokenizer(prompts, padding=True, truncation=True, max_length=limit, return_tensors="pt").to(device)
        pooled = model.text_model(tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
        return model.text_projection(pooled)

    return ClipEncoders(model.config.projection_dim, image, text)


def clip_pixels(images: Tensor, size: int) -> Tensor:
    """CLIP's preprocessing: Tensor[N, 3, H, W] in [0, 1] -> Tensor[N, 3, size, size], normalised."""
    height, width = images.shape[-2:]
    scale = size / min(height, width)
    # int(), as torchvision's Resize and CLIP's transform cut the longer side
    target = [size if side == min(height, width) else int(size * side / min(height, width)) for side in (height, width)]
    if scale != 1:
        images = F.interpolate(images, target, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = ((side - size + 1) // 2 for side in target)
    images = images[..., top : top + size, left : left + size]
    mean, std = (images.new_tensor(values)[:, None, None] for values in (_MEAN, _STD))
    return (images - mean) / std


class ClipAlignment(Metric):
    """CLIP alignment of generated pictures of one concept with reference pictures and prompts (CatVersion,
    arXiv:2311.14631, with the definitions of the authors' evaluation script).

    Embeddings have length 1. Image alignment is the mean cosine over the full cross product of references and
    generations, kept exactly by one sum of embeddings on each side. In the masked form everything outside the concept
    is black on both sides, so that a like background earns nothing. Scores of several concepts: one metric each,
    then their mean.

    ``update(references=..., generations=..., prompts=..., reference_masks=..., generation_masks=...)``: all by name.
    Pictures Tensor[N, 3, H, W] in [0, 1]; either side may be left out of a call. With ``text``, one prompt per
    generation, in the sheet's protocol only the edit ("running in Times Square"), without the concept's word. With
    ``masked``, masks Tensor[N, 1, H, W] or [N, H, W], bool or in [0, 1], 1 = concept, for all pictures.

    ``compute()``: ``clip_i``; with ``masked``, ``masked_clip_i``; with ``text``, ``clip_t`` and ``balance``, the
    geometric mean sqrt(clip_t * clip_i) (NaN if just one of them is negative). NaN while a side has no pictures.

    Args:
        encoders: from :func:`load_clip`, or others.
        text: score prompts too.
        masked: score masked pictures too.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, encoders: ClipEncoders, *, text: bool = True, masked: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.encoders, self.text, self.masked = encoders, text, masked
        names = ["references", "generations"] + (["masked_references", "masked_generations"] if masked else [])
        for name in names:
            self.add_state(name, torch.zeros(encoders.dim, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("agreement", "reference_count", "generation_count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(
        self,
        *,
        references: Tensor | None = None,
        generations: Tensor | None = None,
        prompts: Sequence[str] | None = None,
        reference_masks: Tensor | None = None,
        generation_masks: Tensor | None = None,
    ) -> None:
        # Everything is checked before anything is counted.
        sides = {"references": (references, reference_masks), "generations": (generations, generation_masks)}
        for side, (images, masks) in sides.items():
            self._check(side, images, masks)
        if prompts is not None and not self.text:
            raise UserError("ClipAlignment: prompts were given to a metric made with text=False")
        if self.text and (prompts is None) != (generations is None):
            raise UserError("ClipAlignment: generations and prompts must come together (or make it with text=False)")
        if isinstance(prompts, str) or (prompts is not None and len(prompts) != len(generations)):
            raise UserError(f"ClipAlignment: expected one prompt for each of the {len(generations)} generations")
        for side, (images, masks) in sides.items():
            if images is None or not len(images):
                continue
            embedded = self._unit(self.encoders.image(images), side, len(images))
            setattr(self, side, getattr(self, side) + embedded.sum(0))
            count = f"{side.removesuffix('s')}_count"
            setattr(self, count, getattr(self, count) + len(images))
            if self.masked:
                shown = images * masks.reshape(len(images), 1, *images.shape[-2:]).to(images)
                shown = self._unit(self.encoders.image(shown), side, len(images))
                setattr(self, f"masked_{side}", getattr(self, f"masked_{side}") + shown.sum(0))
            if side == "generations" and self.text:
                wanted = self._unit(self.encoders.text(list(prompts)), "prompts", len(prompts))
                self.agreement += (embedded * wanted).sum()

    def compute(self) -> dict[str, Tensor]:
        pairs = self.reference_count * self.generation_count
        result = {"clip_i": self.references @ self.generations / pairs}
        if self.masked:
            result["masked_clip_i"] = self.masked_references @ self.masked_generations / pairs
        if self.text:
            result["clip_t"] = self.agreement / self.generation_count
            result["balance"] = (result["clip_t"] * result["clip_i"]).sqrt()
        return {name: value.float() for name, value in result.items()}

    def _check(self, side: str, images: Tensor | None, masks: Tensor | None) -> None:
        if images is not None:
            check_images("ClipAlignment", channels=(3,), **{side: images})
        if masks is not None and not self.masked:
            raise UserError("ClipAlignment: masks were given to a metric made with masked=False")
        if not self.masked:
            return
        if (images is None) != (masks is None):
            raise UserError(f"ClipAlignment: {side} and their masks must come together (or make it with masked=False)")
        if images is None:
            return
        height, width = images.shape[-2:]
        if tuple(masks.shape) not in ((len(images), 1, height, width), (len(images), height, width)):
            raise UserError(
                f"ClipAlignment: masks of {side} must be [{len(images)}, 1, {height}, {width}], got {describe(masks)}"
            )
        check_unit("ClipAlignment", f"masks of {side}", masks)

    def _unit(self, embedded: Tensor, what: str, count: int) -> Tensor:
        if tuple(embedded.shape) != (count, self.encoders.dim):
            raise UserError(
                f"ClipAlignment: the encoder of {what} must return Tensor[{count}, {self.encoders.dim}], got "
                f"{describe(embedded)}"
            )
        return F.normalize(embedded.to(self.device).double(), dim=1)
