"""Planning with data that Ray Data preprocesses; what Ray does is tested in tests/ray."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from msgspec import ValidationError

from dtrain.data import DataShape, ray_data
from dtrain.data.ray_data import Options
from dtrain.errors import InputError

SAMPLES = {"name": "table", "target": "y", "features": ["x"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "task.py").write_text("def change(dataset):\n    return dataset\n\ndef none():\n    pass\n")
    return tmp_path


def options(**words: object) -> Options:
    return Options(**{"source": "data.csv", "read": "csv", "samples": SAMPLES, **words})


def test_planning_needs_neither_ray_nor_the_data(folder: Path) -> None:
    assert ray_data.describe(options()) == DataShape("table", num_features=1)
    code = (
        "import sys; from pathlib import Path; from dtrain.data import ray_data\n"
        f"options = ray_data.Options(source='x', read='csv', transform='./task.py:change', samples={SAMPLES!r})\n"
        f"ray_data.describe(ray_data.resolve(options, Path({str(folder)!r})))\n"
        "print(*(name for name in ('ray', 'numpy', 'pyarrow', 'task') if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_paths_are_taken_from_the_job_files_folder(folder: Path) -> None:
    found = ray_data.resolve(options(source=["a.csv", "/b.csv"], transform="./task.py:change"), folder)
    assert found.source == (str(folder / "a.csv"), "/b.csv")
    assert found.transform == f"{folder / 'task.py'}:change"
    assert ray_data.own_code(found) == [folder / "task.py"]
    assert ray_data.own_code(ray_data.resolve(options(), folder)) == []
    assert ray_data.resolve(found, Path("/elsewhere")).source == found.source


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"transform": "./tusk.py:change"}, r"data.transform: there is no file .*tusk.py"),
        ({"transform": "./task.py:chang"}, r"data.transform: .*task.py has no 'chang' at its top level; did you mean"),
        ({"transform": "./task.py:none"}, r"data.transform: .*none takes 0 arguments by position"),
        ({"transform": "change"}, r"data.transform: expected FILE.py:FUNCTION"),
        ({"address": "auto", "num_cpus": 2}, r"data.num_cpus is for a Ray that is started, and data.address names one"),
        ({"samples": {"name": "table", "target": "y"}}, r"data.samples: list the columns to predict from"),
    ],
)
def test_mistakes_are_told_while_planning(folder: Path, words: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ray_data.resolve(options(**words), folder)


@pytest.mark.parametrize("words", [{"read": "xml"}, {"num_cpus": 0}, {"samples": {"name": "x"}}, {"held_out": 1.0}])
def test_options_out_of_bounds_are_refused(words: dict) -> None:
    with pytest.raises(ValidationError):
        options(**words)


def test_files_are_found_in_folders_and_by_globs(tmp_path: Path) -> None:
    for name in ("b/2.csv", "a/1.csv", ".hidden/3.csv", "a/.4.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x\n")
    expected = [str(tmp_path / "a/1.csv"), str(tmp_path / "b/2.csv")]
    assert ray_data._files(options(source=str(tmp_path))) == expected
    assert ray_data._files(options(source=f"{tmp_path}/*/*.csv")) == expected
    with pytest.raises(InputError, match=r"none leads to no file"):
        ray_data._files(options(source=str(tmp_path / "none")))


def test_pictures_are_kept_as_files_and_others_refused() -> None:
    import io

    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 4, 3), dtype=np.uint8)
    cells = ray_data._encoded(pixels)
    assert all((np.asarray(Image.open(io.BytesIO(c))) == one).all() for c, one in zip(cells, pixels, strict=True))
    grey = ray_data._encoded(pixels[..., :1])
    assert (np.asarray(Image.open(io.BytesIO(grey[0]))) == pixels[0, ..., 0]).all()
    assert ray_data._encoded(np.array([b"file", None], dtype=object)) == [b"file", None]
    with pytest.raises(InputError, match=r"has float32 of shape \[5, 4, 3\]; make it uint8"):
        ray_data._encoded(pixels.astype(np.float32))


def test_columns_keep_one_type() -> None:
    first = ray_data._block(options(), {"x": np.arange(3), "y": np.arange(3.0), "z": np.arange(3)}, None)
    assert first.column_names == ["x", "y"]
    second = ray_data._block(options(), {"x": np.arange(3.0), "y": np.arange(3)}, first.schema)
    assert second.schema == first.schema
    words = np.array(["a", "b"], dtype=object)
    with pytest.raises(InputError, match=r"gave columns that are no table \(.*\); give each column one type"):
        ray_data._block(options(), {"x": words, "y": np.arange(2)}, first.schema)


def test_the_users_own_error_is_what_is_told() -> None:
    try:
        try:
            raise KeyError("town")
        except KeyError as error:
            raise RuntimeError("ray task failed\nsomewhere\n") from error
    except RuntimeError as error:
        assert ray_data._last_words(error) == "KeyError: 'town'"
    said = (
        "task failed (pid=3)\n  File task.py\nValueError: no way\n\nray.exceptions.UserCodeException: it failed\nGo on."
    )
    wrapped = RuntimeError(said)
    assert ray_data._last_words(wrapped) == "ValueError: no way"
