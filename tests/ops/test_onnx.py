"""Export to ONNX: the standard operator, and ONNX Runtime finds what we find."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from pyface import UserError
from pyface.nn import DeformConv2d, ModulatedDeformConv2d
from pyface.ops import deform_conv2d
from pyface.ops.onnx import translation_table

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def exported(model, args, opset, **options):
    return torch.onnx.export(
        model.eval(),
        args,
        dynamo=True,
        opset_version=opset,
        custom_translation_table=translation_table(),
        verbose=False,
        **options,
    ).model_proto


def run(proto, *inputs):
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {slot.name: t.numpy() for slot, t in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


class Everything(nn.Module):
    """Nothing square, weight groups that straddle offset groups; each argument may be left out."""

    def __init__(self, bias, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 2, dtype=dtype))
        self.bias = nn.Parameter(torch.randn(4, dtype=dtype)) if bias else None

    def forward(self, x, offset, mask=None):
        return deform_conv2d(x, offset, self.weight, self.bias, (2, 1), (1, 0), (2, 1), mask)


@pytest.mark.parametrize(
    ("opset", "bias", "masked"), [(19, True, True), (22, False, True), (22, True, False), (19, False, False)]
)
def test_every_argument_arrives_in_the_standard_operator(opset, bias, masked):
    inputs = [torch.randn(2, 6, 7, 6), torch.randn(2, 36, 3, 5) * 2, torch.rand(2, 18, 3, 5)][: 3 if masked else 2]
    inputs[1][0, ::5], inputs[1][1, 1::7], inputs[1][1, 2] = 1e4, -1e4, -1.0  # far outside, and on the border
    model = Everything(bias)
    proto = exported(model, tuple(inputs), opset)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", opset)]
    assert [node.op_type for node in proto.graph.node] == ["DeformConv"]
    torch.testing.assert_close(run(proto, *inputs), model(*inputs).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("opset", [19, 22])
def test_layers_with_batch_and_size_left_open(opset):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = ModulatedDeformConv2d(4, 6, 3, stride=2, padding=1, offset_groups=2)
            self.offset = nn.Conv2d(6, 18, 3, padding=1)
            self.second = DeformConv2d(6, 5, 3, padding=1)

        def forward(self, x):
            x = self.first(x).relu()
            return self.second(x, self.offset(x))

    model = Net()
    nn.init.normal_(model.first.conv_offset.weight, std=0.2)
    open_sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    proto = exported(model, (torch.randn(2, 4, 12, 10),), opset, dynamic_shapes=(open_sizes,))
    assert [node.op_type for node in proto.graph.node].count("DeformConv") == 2
    for shape in [(2, 4, 12, 10), (3, 4, 9, 15)]:
        x = torch.randn(shape)
        torch.testing.assert_close(run(proto, x), model(x).detach(), rtol=1e-4, atol=1e-4)


def test_float64_and_wider_offsets_keep_their_type():
    x, offset, mask = torch.randn(2, 6, 7, 6), torch.randn(2, 36, 3, 5), torch.rand(2, 18, 3, 5)
    double = Everything(True, torch.float64)
    args = x.double(), offset.double(), mask.double()
    torch.testing.assert_close(run(exported(double, args, 19), *args), double(*args).detach())
    low = Everything(True, torch.float16)
    proto = exported(low, (x.half(), offset, mask), 19)
    kinds = [node.op_type for node in proto.graph.node]
    assert kinds.count("DeformConv") == 1
    assert "Cast" in kinds
    assert proto.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    found = run(proto, x.half(), offset, mask)
    assert (found.float() - low(x.half(), offset, mask).float()).abs().max() <= 2e-2


def test_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match="pip install onnxscript"):
        translation_table()
