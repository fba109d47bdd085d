"""Export to ONNX and back through ONNX Runtime."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pyface
from pyface import UserError
from pyface.nn import DeformConv2d, ModulatedDeformConv2d
from pyface.ops.onnx import translations

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def export(model, inputs, opset, dynamic_shapes):
    program = torch.onnx.export(
        model.eval(), inputs, dynamo=True, opset_version=opset, custom_translation_table=translations(opset),
        dynamic_shapes=dynamic_shapes, verbose=False,
    )  # fmt: skip
    return program.model_proto


def run(model, *inputs):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {declared.name: t.numpy() for declared, t in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


class Masked(nn.Module):
    """torchvision's layer as models use it: offsets and mask come from outside."""

    def __init__(self, **options):
        super().__init__()
        self.layer = DeformConv2d(4, 6, (3, 2), **options)

    def forward(self, x, offset, mask):
        return self.layer(x, offset, mask)


@pytest.mark.parametrize("opset", [19, 22])
def test_a_layer_goes_through_onnx_runtime(opset):
    model = Masked(stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2, bias=opset == 19).eval()

    def inputs(batch, height, width):
        x = torch.randn(batch, 4, height, width)
        size = ((height + 2 - 3) // 2 + 1, width + 4 - 2)
        return x, torch.randn(batch, 2 * 2 * 6, *size) * 2, torch.rand(batch, 2 * 6, *size)

    first = inputs(2, 9, 8)
    exported = export(model, first, opset, None)
    onnx.checker.check_model(exported)
    assert [entry.version for entry in exported.opset_import if entry.domain == ""] == [opset]
    (node,) = [node for node in exported.graph.node if "Deform" in node.op_type]
    assert (node.op_type, node.domain) == ("DeformConv", "")
    with torch.no_grad():
        torch.testing.assert_close(run(exported, *first), model(*first), rtol=1e-4, atol=1e-5)


def test_batch_and_size_may_be_dynamic():
    model = ModulatedDeformConv2d(8, 6, 3, stride=2, padding=1, groups=2, offset_groups=2).eval()
    nn.init.normal_(model.conv_offset.weight, std=0.3)
    shapes = ({0: "batch", 2: "height", 3: "width"},)
    exported = export(model, (torch.randn(2, 8, 12, 11),), 22, shapes)
    with torch.no_grad():
        for size in ((2, 8, 12, 11), (3, 8, 21, 18)):
            x = torch.randn(size)
            torch.testing.assert_close(run(exported, x), model(x), rtol=1e-4, atol=1e-5)


def test_without_the_mask_all_taps_count():
    model = DeformConv2d(3, 4, 3, padding=1).eval()
    x, offset = torch.randn(1, 3, 6, 7), torch.randn(1, 18, 6, 7)
    exported = export(model, (x, offset), 19, None)
    with torch.no_grad():
        torch.testing.assert_close(run(exported, x, offset), model(x, offset), rtol=1e-4, atol=1e-5)


def test_offsets_that_are_wider_than_the_input_stay_so():
    model = Masked(groups=2).half().eval()
    inputs = torch.randn(2, 4, 7, 6).half(), torch.randn(2, 24, 5, 5) * 2, torch.rand(2, 12, 5, 5)
    exported = export(model, inputs, 19, None)
    onnx.checker.check_model(exported, full_check=True)
    assert exported.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    with torch.no_grad(), pyface.paths("reference"):
        torch.testing.assert_close(run(exported, *inputs), model(*inputs), rtol=2e-3, atol=2e-3)


def test_what_cannot_be_exported_is_said():
    with pytest.raises(UserError, match="from opset 19 on, got opset_version=18"):
        translations(18)
    with pytest.raises(UserError, match="no opset 999"):
        translations(999)
