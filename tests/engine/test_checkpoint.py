"""Weights and anything else on disk."""

from __future__ import annotations

import json
import stat

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pyface.engine import load_weights, save_weights
from pyface.engine.checkpoint import pack, unpack
from pyface.errors import UserError

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
LEAVES |= st.integers(0, 5).map(lambda n: torch.arange(n))
KEYS = st.text() | st.integers() | st.just("$tensor")
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner),
    max_leaves=12,
)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@given(TREES)
def test_anything_survives_json(tree):
    tensors = {}
    assert same(unpack(json.loads(json.dumps(pack(tree, tensors))), tensors), tree)


def test_what_has_no_place_in_a_checkpoint_is_named():
    with pytest.raises(TypeError, match=r"state\.0 is a set"):
        pack({"state": [{1, 2}]}, {})


def test_weights_of_tied_and_transposed_parameters(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    model["a"].bias.data = torch.randn(3, 2).T[0]
    save_weights(model, tmp_path / "w.safetensors", {"step": "3"})
    other = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    assert load_weights(other, tmp_path / "w.safetensors") == {"step": "3"}
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]
    assert stat.S_IMODE((tmp_path / "w.safetensors").stat().st_mode) & 0o044


def test_weights_that_do_not_fit_are_explained(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(nn.Linear(3, 2), path)
    with pytest.raises(UserError, match=r"weight has shape \(2, 3\), expected \(2, 4\)"):
        load_weights(nn.Linear(4, 2), path)
    with pytest.raises(UserError, match="has an unknown 'bias'"):
        load_weights(nn.Linear(3, 2, bias=False), path)
    with pytest.raises(UserError, match="no value for '0.bias'"):
        load_weights(nn.Sequential(nn.Linear(3, 2)), path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        load_weights(nn.Linear(3, 2), path)
    with pytest.raises(UserError, match="cannot read"):
        load_weights(nn.Linear(3, 2), tmp_path / "absent.safetensors")
