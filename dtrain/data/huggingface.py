"""Data sets of the Hugging Face library `datasets` that were saved to disk; the library is not needed to read them."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta
from msgspec.structs import replace

from dtrain import component
from dtrain.data import DataShape, samples
from dtrain.data.kept import find, keep, sha256
from dtrain.data.samples import Parts, Rows, Samples
from dtrain.errors import InputError
from dtrain.settings import Settings

HELD_OUT_SPLITS = ("validation", "valid", "val", "test")
_SPLITS, _STATE, _INFO = "dataset_dict.json", "state.json", "dataset_info.json"


class Options(Settings):
    """A data set that the library `datasets` saved with `save_to_disk`, of any kind."""

    source: str
    """The folder that it was saved to."""
    samples: Samples
    """What its columns become."""
    split: str = "train"
    """Split to train on, where it has several."""
    held_out_split: str | None = None
    """Split that is held out; by default `validation` or `test`, where there is one."""
    held_out: Annotated[float, Meta(gt=0.0, le=0.5)] = 0.1
    """Share of the rows that is held out where no split is."""


def describe(options: Options) -> DataShape:
    """What a model must know of the samples, without reading a row."""
    return samples.describe(options.samples)


def resolve(options: Options, folder: Path) -> Options:
    """The same options with relative paths taken from `folder`. Raises `InputError` for what does not go together."""
    samples.describe(options.samples)
    return replace(
        options,
        source=os.path.abspath(folder / Path(options.source).expanduser()),
        samples=samples.resolve(options.samples, folder),
    )


def prepare(options: Options, cache: Path) -> None:
    """Convert the rows into `cache`, unless the same ones were before.

    Raises `InputError` for a column or cell that is not as the options say, `StorageError` when the cache cannot be
    written.
    """
    _prepare(options, cache)


def open(options: Options, cache: Path) -> Any:  # noqa: A001
    """The prepared samples: an `ImageSource`, `TextSource` or `TableSource`. Raises what `prepare` raises."""
    saved = _Saved(options)
    folder = find(cache, "huggingface", _settings(options), saved.paths) or _prepare(options, cache)
    return samples.opened(options.samples, folder, saved.read() if samples.reads_rows(options.samples) else None)


@dataclass(frozen=True)
class _Split:
    """One split: its name, and its files, the first of which says what it is."""

    name: str
    files: tuple[str, ...]


class _Saved:
    """The files of the splits that are read."""

    def __init__(self, options: Options) -> None:
        self._source = options.source
        if not os.path.isdir(options.source):
            raise InputError(
                f"data.source: there is no folder {options.source}; name one that `save_to_disk` of the library"
                " datasets wrote"
            )
        if not os.path.isfile(os.path.join(options.source, _SPLITS)):
            if options.held_out_split is not None:
                raise InputError(f"data.held_out_split: {options.source} is one data set without splits; leave it out")
            self._splits = [self._split("")]
            return
        names = _json(os.path.join(options.source, _SPLITS))["splits"]
        chosen = options.held_out_split or next((n for n in HELD_OUT_SPLITS if n in names and n != options.split), None)
        for key, name in (("split", options.split), ("held_out_split", chosen)):
            if name is not None and name not in names:
                raise InputError(
                    f"data.{key}: {options.source} has no split {name!r}{component.suggestion(name, names)}"
                )
        if chosen == options.split:
            raise InputError(f"data.held_out_split: {chosen!r} is trained on; name another split")
        self._splits = [self._split(name) for name in (options.split, chosen) if name is not None]

    @property
    def paths(self) -> list[str]:
        """All files that are read."""
        return [path for split in self._splits for path in split.files]

    def contents(self, quickly: bool) -> Any:
        """What tells the rows from others: hashes of the files, or sizes and the library's own fingerprint."""
        if quickly:
            states = [_json(split.files[0]).get("_fingerprint") for split in self._splits]
            return [states, [os.path.getsize(path) for path in self.paths]]
        return [[sha256(path) for path in split.files[2:]] for split in self._splits]

    def read(self) -> Parts:
        """The rows, in memory maps. Raises `InputError` for a file that is damaged."""
        found = [self._rows(split) for split in self._splits]
        return Parts(found[0], found[1] if len(found) > 1 else None)

    def _split(self, name: str) -> _Split:
        folder = os.path.join(self._source, name)
        state = os.path.join(folder, _STATE)
        if not os.path.isfile(state):
            raise InputError(
                f"data.source: {folder} has no {_STATE}; name a folder that `save_to_disk` of the library datasets"
                " wrote"
            )
        described = _json(state)
        if described.get("_indices_data_files"):
            raise InputError(
                f"data.source: {folder} was saved by an old version of datasets; save it again with a newer"
            )
        files = [os.path.join(folder, file["filename"]) for file in described.get("_data_files", [])]
        return _Split(name, (state, os.path.join(folder, _INFO), *files))

    def _rows(self, split: _Split) -> Rows:
        import pyarrow as pa

        tables = []
        for path in split.files[2:]:
            try:
                tables.append(pa.ipc.open_stream(pa.memory_map(path)).read_all())
            except (OSError, pa.ArrowInvalid) as error:
                raise InputError(f"data.source: {path} cannot be read ({error}); save the data set again") from error
        features = _json(split.files[1]).get("features") or {}
        classes = {name: tuple(kind["names"]) for name, kind in features.items() if _has_names(kind)}
        name = os.path.join(self._source, split.name) if split.name else self._source
        whole = pa.concat_tables(tables) if tables else pa.table({name: [] for name in features})
        return Rows(name, whole, classes)


def _has_names(kind: Any) -> bool:
    return isinstance(kind, dict) and kind.get("_type") == "ClassLabel" and bool(kind.get("names"))


def _json(path: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"data.source: {path} cannot be read ({error}); save the data set again") from error
    return found


def _settings(options: Options) -> list[Any]:
    return samples.settings(options.samples, options.held_out)


def _prepare(options: Options, cache: Path) -> Path:
    saved = _Saved(options)

    def make(folder: Path) -> dict[str, Any]:
        return samples.convert(options.samples, saved.read(), options.held_out, folder)

    quickly = samples.reads_rows(options.samples)
    return keep(cache, "huggingface", _settings(options), saved.paths, lambda: saved.contents(quickly), make)
