"""Backbones from timm, with weights from local files only."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence

from torch import Tensor, nn

from pyface.backbones.weights import find_weights, load_weights
from pyface.errors import UserError

# Names under which papers know what timm calls otherwise.
_ALIASES = {"xception": "legacy_xception"}


class Features(nn.Module):
    """Feature maps at several depths of a timm network: images -> list of Tensor[N, C_i, H_i, W_i].

    Layers behind the last tap are removed, so that every parameter gets a gradient.

    Attributes:
        channels: C_i of each map.
        strides: input pixels per step of each map.
    """

    def __init__(self, network: nn.Module, taps: Sequence[int]):
        super().__init__()
        self.network, self.taps = network, tuple(taps)
        about = [network.feature_info[tap] for tap in self.taps]
        self.channels = [one["num_chs"] for one in about]
        self.strides = [one["reduction"] for one in about]
        network.prune_intermediate_layers(list(self.taps), prune_norm=True, prune_head=True)

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.network.forward_intermediates(
            images, indices=list(self.taps), stop_early=True, intermediates_only=True
        )


def create_backbone(
    name: str,
    *,
    weights: str | os.PathLike | None = None,
    pretrained: bool = False,
    num_classes: int = 0,
    in_chans: int = 3,
    output_stride: int = 32,
    out_indices: Sequence[int] | None = None,
) -> nn.Module:
    """A network of timm's, freshly initialised or with weights from a local file. Never touches the network.

    Args:
        name: of :func:`timm.list_models`, for example "resnet18", "resnet34", "resnet50", "efficientnet_b4"; a tag such
            as ".a1_in1k" says which training is meant when the source of weights is named. "xception" is timm's
            ``legacy_xception``: layer by layer the network of the ACMF and FaceForensics++ detectors (conv1, conv2,
            block1 to block12, conv3, conv4); ``xception41`` and its relatives are other networks.
        weights: ``.safetensors`` or PyTorch file in timm's names (torchvision's ResNet files have the same).
        pretrained: without ``weights``, take ``<name>.safetensors`` or ``.pth`` from the folder ``PYFACE_WEIGHTS``.
        num_classes: outputs of the head; 0 gives the pooled features Tensor[N, C]. A stored head for another number
            is left out, with a warning where a fresh one takes its place.
        in_chans: input channels; stored weights for 3 are adapted.
        output_stride: 32, or 16 or 8 to dilate the last stages instead (ResNet; other families where timm can).
        out_indices: depths to tap, for a list of feature maps instead of the head's output: 0 = stem (stride 2), then
            one per stage (strides 4, 8, 16, 32 without dilation).

    Returns:
        The network in training mode; :class:`Features` with ``out_indices``.

    Raises:
        UserError: unknown name, an option that the network does not have, or weights that are missing or do not fit.
            A missing file's message says where to get it and how to pass it.
    """
    import timm

    name = _ALIASES.get(name, name)
    base, _, tag = name.partition(".")
    # timm would go to the hub for names with a scheme such as hf-hub:, so only its own are let through.
    if base not in timm.list_models() or (tag and name not in timm.list_models(f"{base}.*", pretrained=True)):
        near = difflib.get_close_matches(name, timm.list_models() + timm.list_models(pretrained=True), 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see timm.list_models()"
        if name.startswith("iresnet"):
            hint = "face recognisers come from pyface.backbones.create_recogniser"
        raise UserError(f"unknown backbone {name!r}; {hint}")
    if num_classes < 0 or in_chans < 1:
        raise UserError(f"backbone {name!r}: num_classes must be at least 0 and in_chans at least 1")
    if weights is None and pretrained:
        weights = find_weights(name, _source(name))
    options = {"num_classes": num_classes, "in_chans": in_chans}
    if output_stride != 32:
        options["output_stride"] = output_stride
    try:
        model = timm.create_model(name, pretrained=False, **options)
    except (TypeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"backbone {name!r} cannot be made with num_classes={num_classes}, in_chans={in_chans}, "
            f"output_stride={output_stride} ({error})"
        ) from error
    if weights is not None:
        about = model.pretrained_cfg
        load_weights(model, weights, head=_names(about.get("classifier")), first=_names(about.get("first_conv")))
    if out_indices is None:
        return model
    depths = len(model.feature_info)
    taps = list(out_indices)
    if not taps or taps != sorted(set(taps)) or not 0 <= taps[0] <= taps[-1] < depths:
        raise UserError(f"backbone {name!r}: out_indices must rise within 0 to {depths - 1}, got {taps}")
    if not hasattr(model, "forward_intermediates"):
        raise UserError(f"backbone {name!r} has no feature taps in timm {timm.__version__}; a newer timm may have them")
    return Features(model, taps)


def _source(name: str) -> str:
    import timm

    about = timm.get_pretrained_cfg(name)
    places = [f"https://huggingface.co/{about.hf_hub_id} (model.safetensors)"] if about and about.hf_hub_id else []
    places += [about.url] if about and about.url else []
    return " or ".join(places) or "whoever trained them (timm knows no source)"


def _names(entry: str | Sequence[str] | None) -> Sequence[str]:
    return (entry,) if isinstance(entry, str) else entry or ()
