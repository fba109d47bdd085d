"""Reading weight files that strangers made."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pyface.backbones import load_weights, read_weights
from pyface.errors import UserError


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


@pytest.mark.parametrize("wrap", [
    lambda state: state,
    lambda state: {"state_dict": state, "epoch": 3},
    lambda state: {"model": state, "optimizer": {"state": {}, "lr": 0.1}},
    lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
    lambda state: {"state_dict": {key: value * 0 for key, value in state.items()}, "state_dict_ema": state},
    lambda state: {key: value for key, value in state.items() if "num_batches" not in key},
], ids=["plain", "state_dict", "model", "module", "ema", "no counters"])  # fmt: skip
def test_what_training_scripts_write_is_read(tmp_path, wrap):
    trained, model = network(), network()
    file = tmp_path / "weights.pth"
    torch.save(wrap(trained.state_dict()), file)
    load_weights(model, file)
    for key, value in trained.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_safetensors_are_read(tmp_path):
    trained, model = network(), network()
    save_file(trained.state_dict(), tmp_path / "weights.safetensors")
    load_weights(model, tmp_path / "weights.safetensors")
    assert torch.equal(model[3].weight, trained[3].weight)


def test_what_does_not_fit_is_named_and_nothing_is_loaded(tmp_path):
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {key: torch.ones_like(value) for key, value in before.items() if key != "3.bias"}
    state |= {"4.weight": torch.ones(1), "0.weight": torch.ones(4, 1, 3, 3)}
    file = tmp_path / "weights.pth"
    torch.save(state, file)
    with pytest.raises(UserError) as caught:
        load_weights(model, file)
    assert str(caught.value) == (
        f"weights {file} do not fit Sequential: the file lacks 3.bias; has unknown 4.weight; "
        f"has other shapes: 0.weight is [4, 1, 3, 3] instead of [4, 3, 3, 3]"
    )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_pickle_that_runs_code_is_refused_unrun(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"weight": Trap()}))
    torch.save({"weight": Trap()}, tmp_path / "zip.pth")
    for name in ("plain.pth", "zip.pth"):
        with pytest.raises(UserError, match="not a weight file"):
            read_weights(tmp_path / name)
    assert not (tmp_path / "trapped").exists()


def test_damaged_files_are_refused(tmp_path):
    good = tmp_path / "good.pth"
    torch.save(network().state_dict(), good)
    (tmp_path / "cut.pth").write_bytes(good.read_bytes()[:500])
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("cut.pth", "cut.safetensors", "empty.pth"):
        with pytest.raises(UserError, match=f"{name} is not a weight file that pyface reads"):
            read_weights(tmp_path / name)
    for name in ("none.pth", "none.safetensors", "folder.safetensors"):
        with pytest.raises(UserError, match=f"{name}"):
            read_weights(tmp_path / name)
    for content in ([1, 2], {}, {"epoch": 3}):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(UserError, match="holds no state dict"):
            read_weights(tmp_path / "other.pth")
