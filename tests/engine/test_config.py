"""Settings: documentation, types, presets, TOML and back, and what is said about mistakes."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_method.recipe import Config

from pyface.engine import TrainConfig, load_config, setting, to_toml
from pyface.engine.config import differences
from pyface.errors import UserError
from pyface.methods import find_recipe, list_models

WORDS = st.text(st.characters(codec="utf-8"), max_size=12)
NUMBERS = st.floats(allow_nan=False)


def fields(config):
    for field in dataclasses.fields(config):
        yield field
        if dataclasses.is_dataclass(getattr(config, field.name)):
            yield from fields(getattr(config, field.name))


def every_config():
    return [Config, *(find_recipe(name).Config for name in list_models() if name != "toy_method")]


@pytest.mark.parametrize("cls", every_config(), ids=lambda cls: cls.method)
def test_every_field_of_every_method_is_documented(cls):
    assert {"default", "tiny"} <= set(cls.presets) or cls is Config
    for name in cls.presets:
        config = cls.preset(name)
        for field in fields(config):
            text = field.metadata.get("help", "")
            assert len(text) > 3, field.name
            assert "\n" not in text
        toml = to_toml(config)
        assert all(f"# {field.metadata['help']}" in toml for field in fields(config))


@pytest.mark.parametrize("cls", every_config(), ids=lambda cls: cls.method)
def test_presets_survive_toml(cls, tmp_path):
    for name in cls.presets:
        (tmp_path / "file.toml").write_text(to_toml(cls.preset(name)), encoding="utf-8")
        assert load_config(cls, file=tmp_path / "file.toml") == cls.preset(name)


@given(
    data=WORDS.filter(lambda text: text != "none"),
    lr=NUMBERS.filter(lambda x: x >= 0),
    seed=st.integers(0, 2**60),
    steps=st.none() | st.integers(1, 2**40),
    minutes=st.none() | st.floats(1e-3, 1e9),
    width=st.integers(-5, 5),
    sizes=st.lists(st.tuples(st.integers(), NUMBERS)).map(tuple),
)
def test_any_config_survives_toml(tmp_path_factory, data, lr, seed, steps, minutes, width, sizes):
    config = Config.preset(
        data=data, lr=lr, seed=seed, steps=steps, max_minutes=minutes, hidden={"width": width}, sizes=sizes
    )
    file = tmp_path_factory.mktemp("toml") / "config.toml"
    file.write_text(to_toml(config), encoding="utf-8", newline="")
    assert load_config(Config, file=file) == config


def test_each_place_overrides_the_one_before(tmp_path):
    file = tmp_path / "part.toml"
    file.write_text("lr = 0.5\nseed = 3\nbatch_size = 16\n[hidden]\ndropout = 0.25\n")
    config = load_config(
        Config, preset="tiny", file=file, changes={"seed": 4, "batch_size": 32}, assignments=["batch_size=64"]
    )
    assert (config.epochs, config.lr, config.seed, config.batch_size) == (1, 0.5, 4, 64)
    assert (config.hidden.width, config.hidden.dropout) == (3, 0.25)
    assert load_config(Config, file=file).epochs == 3

    class Other(Config):
        presets = {"default": {"epochs": 7}}

    assert load_config(Other, file=file).epochs == 7
    assert load_config(Other).lr == Config.preset().lr


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("lr=1e-4", "lr", 1e-4),
        ("lr=1", "lr", 1.0),
        ("epochs=none", "epochs", None),
        ("steps = 7", "steps", 7),
        ("data=12", "data", "12"),
        ("data=a=b", "data", "a=b"),
        ("precision=bf16", "precision", "bf16"),
        ("sizes=[[3, 1], [4, 2.5]]", "sizes", ((3, 1.0), (4, 2.5))),
    ],
)
def test_assignments(text, name, value):
    found = getattr(load_config(Config, changes={"max_minutes": 1.0}, assignments=[text]), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preset": "tinny"}, "toy_method: unknown preset 'tinny'; did you mean 'tiny'?"),
        ({"preset": "x"}, "known: default, tiny"),
        ({"changes": {"learning": 1}}, "toy_method: unknown setting 'learning'; known: .*lr"),
        ({"changes": {"batchsize": 1}}, "unknown setting 'batchsize'; did you mean 'batch_size'"),
        ({"changes": {"hidden": {"wdith": 1}}}, r"hidden\.unknown setting 'wdith'; did you mean 'width'"),
        ({"changes": {"hidden": 3}}, "hidden is a group of settings"),
        ({"assignments": ["hidden.width=wide"]}, r"hidden\.width must be a whole number, got 'wide'"),
        ({"changes": {"steps": 1.5}}, "steps must be a whole number, got 1.5"),
        ({"changes": {"steps": True}}, "steps must be a whole number, got True"),
        ({"changes": {"lr": "fast"}}, "lr must be a number, got 'fast'"),
        ({"changes": {"data": 3}}, "data must be a text, got 3"),
        ({"changes": {"precision": "bf61"}}, "precision must be one of no, bf16, fp16; got 'bf61'"),
        ({"changes": {"sizes": [[1, 2, 3]]}}, r"sizes\[0\] must be \[a whole number, a number\], got"),
        ({"changes": {"sizes": 3}}, "sizes must be a list, each entry"),
        ({"assignments": ["lr"]}, "expected NAME=VALUE"),
        ({"changes": {"lr": -1.0}}, "toy_method: lr must not be negative, got -1"),
        ({"changes": {"lr": float("nan")}}, "lr must not be negative"),
        ({"changes": {"batch_size": 0}}, "batch_size must be positive, got 0"),
        ({"changes": {"ema": 1.0}}, "ema must be at least 0 and below 1"),
        ({"changes": {"epochs": None}}, "nothing says when training ends"),
    ],
)
def test_mistakes_are_explained(given, message):
    with pytest.raises(UserError, match=message):
        load_config(Config, **given)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"lr = = 1", "not valid TOML: .*line 1"),
        (b"\xff", "not valid TOML"),
        (b'method = "acmf"', "holds settings of acmf, expected toy_method"),
        (b"[hidden]\nwidht = 3", "did you mean 'width'"),
        (None, "cannot read .*No such file"),
    ],
)
def test_files_with_mistakes_are_explained(tmp_path, content, message):
    file = tmp_path / "config.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_config(Config, file=file)


def test_differences_leave_free_settings_out():
    old = Config.preset(lr=0.1, log_every=5, epochs=2)
    new = Config.preset(lr=0.2, log_every=5, epochs=9, keep=4, hidden={"dropout": 0.5})
    assert differences(old, new) == ["lr (0.1, now 0.2)", "hidden.dropout (0.0, now 0.5)"]


def test_a_method_may_change_a_default_of_all():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(TrainConfig):
        steps: int | None = setting(5, "steps")

    assert Mine.preset().steps == 5
    assert load_config(Mine, assignments=["clip=2"]).clip == 2.0
