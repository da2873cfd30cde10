"""A name in a file is a file in a folder."""

import math
from typing import Annotated, Any

import msgspec
import numpy as np
import pytest
from msgspec import Meta

from dtrain import component
from dtrain.errors import InputError
from dtrain.settings import Settings, from_json, to_builtins, to_json
from dtrain.spec import words


class Sizes(Settings):
    rate: Annotated[float, Meta(ge=0, le=10)] = 1.0
    """How fast."""
    depths: list[Annotated[int, Meta(ge=1)]] | None = None
    """How deep."""


class Metrics(Settings):
    values: dict[str, Any] = {}


def test_names_are_the_files_that_declare_options():
    assert "ddp" in component.names("strategies")
    for folder in ("strategies", "models", "data", "backends"):
        for name in component.names(folder):
            assert issubclass(component.load(folder, name).Options, Settings)


def test_helpers_beside_components_are_neither_names_nor_imported(tmp_path, monkeypatch):
    package = pytest.importorskip("dtrain.strategies")
    (tmp_path / "zero.py").write_text("class Options: ...\n")
    (tmp_path / "helper.py").write_text("raise RuntimeError('imported')\n")
    (tmp_path / "_private.py").write_text("class Options: ...\n")
    monkeypatch.setattr(package, "__path__", [str(tmp_path)])
    component.names.cache_clear()
    try:
        assert component.names("strategies") == ("zero",)
    finally:
        component.names.cache_clear()


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(InputError, match="there is no 'dpd' in dtrain/strategies/; did you mean 'ddp'"):
        component.load("strategies", "dpd")
    for name in ("../spec/job", "__init__", ""):
        with pytest.raises(InputError):
            component.load("strategies", name)


@pytest.mark.parametrize("values", [{"rate": math.nan}, {"rate": math.inf}, {"rat": 1.0}, {"depths": [0]}])
def test_options_refuse_what_is_no_value(values):
    with pytest.raises(msgspec.ValidationError):
        Sizes(**values)


def test_options_cannot_change():
    with pytest.raises(AttributeError, match="immutable"):
        Sizes().rate = 2.0


def test_a_name_stands_beside_the_options():
    named = component.with_name("sizes", Sizes)
    assert named().name == "sizes"
    assert issubclass(named, Sizes)
    with pytest.raises(msgspec.ValidationError):
        named(name="other")
    assert component.with_name("sizes", Sizes) is named


def test_types_are_said_in_words():
    said = {key: words.expected(field.annotation) for key, field in words.fields(Sizes).items()}
    assert said == {
        "rate": "a number at least 0 and at most 10",
        "depths": "a list, each a whole number at least 1, or null",
    }
    tuples = tuple[int, ...] | tuple[int, str]
    assert words.expected(tuples) == "a list, each a whole number, or a list of 2: a whole number; text"


def test_numbers_of_other_libraries_become_pythons_own():
    class Word(str):
        pass

    record = Metrics(values={"loss": np.float32(0.5), "best": np.float64(0.25), "step": np.int64(3), "word": Word("a")})
    assert to_builtins(record) == {"values": {"loss": 0.5, "best": 0.25, "step": 3, "word": "a"}}
    assert from_json(to_json(record), Metrics) == record
    assert from_json(to_json(Metrics(values={"loss": math.nan})), Metrics).values == {"loss": None}
    with pytest.raises(TypeError, match="a object is not a setting"):
        to_json(Metrics(values={"x": object()}))
