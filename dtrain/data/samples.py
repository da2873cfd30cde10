"""What the columns of an Arrow table become: pictures with labels, tokens, or rows of numbers.

For sources that hold columns of any kind; they say which become what, and where the rows are.
"""

import gzip
import hashlib
import io
import logging
import lzma
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta
from msgspec.structs import replace

from dtrain.data import DataShape, columns, pictures, table, text
from dtrain.data.augmentation import Augmentation
from dtrain.data.holding import absent_from
from dtrain.data.pixels import LARGE, ImageSource, Look
from dtrain.data.pixels import convert as convert_pictures
from dtrain.data.tokens import TRAINING_BYTES, BytePairs, TokenizerOptions, identity, learn
from dtrain.data.tokens import check as check_tokenizer
from dtrain.data.tokens import resolve as resolve_tokenizer
from dtrain.errors import DtrainError, InputError, TrainingError
from dtrain.settings import Float, PositiveFloat, PositiveInt, Settings, all_but, one_of, to_builtins

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from PIL.Image import Image

FORMAT = 1
"""Raise when the same rows would be prepared differently."""
_DOCUMENTS = 1024


class Images(Settings):
    """Pictures with labels."""

    name: Literal["images"] = "images"
    image: str = "image"
    """Column with the pictures: files of any usual format as bytes, or pixels from 0 to 255."""
    label: str = "label"
    """Column with the labels: whole numbers from 0."""
    num_classes: Annotated[int, Meta(ge=2, le=2**20)]
    """Number of labels."""
    size: Annotated[int, Meta(ge=4, le=2048)]
    """Height and width of a picture in pixels, to which others are scaled."""
    channels: Literal[1, 3] = 3
    """1 for grey, 3 for colours."""
    center_crop: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    """Share of the shorter side that is kept, in the middle; 0.875 is usual for ImageNet."""
    augment: Augmentation = Augmentation()
    """What is done to training pictures by chance."""
    mean: tuple[Float, ...] | None = None
    """Subtracted from each channel (black is 0, white 1); by default its mean over the training pictures."""
    std: Annotated[tuple[PositiveFloat, ...], Meta(min_length=1)] | None = None
    """What each channel is divided by then; by default its standard deviation."""
    decode: Literal["once", "on_read"] | None = None
    """Keep decoded pixels in the cache, or decode pictures whenever they are read; by default once, but on_read from
    size 128 on."""


class Tokens(Settings):
    """Text, to predict the next token of."""

    name: Literal["tokens"] = "tokens"
    text: str = "text"
    """Column with the text; each row is a document."""
    tokenizer: TokenizerOptions = BytePairs()
    """How text becomes numbers."""
    sequence_length: Annotated[PositiveInt, Meta(le=2**20)] = 256
    """Tokens a sample trains on: how far back the model can look."""
    held_out_limit: PositiveInt = 512_000
    """At most this many bytes of text are held out, so that the evaluation over all of them stays quick."""
    held_out_context: Annotated[float, Meta(ge=0.0, le=0.9)] = 0.5
    """Share of a held-out window that only gives context and was predicted in the window before; 0 is quickest."""


class Table(Settings):
    """Rows of numbers and categories, from which a class or a number is predicted."""

    name: Literal["table"] = "table"
    target: str
    """Column to predict."""
    num_classes: Annotated[int, Meta(ge=2, le=2**20)] | None = None
    """Number of different values of the target, to predict a class; without it, a number is predicted."""
    features: tuple[str, ...] = ()
    """Columns with numbers to predict from."""
    categories: dict[str, PositiveInt] = {}
    """Columns with words to predict from, each with how many of its most frequent words count: a feature is made of
    each, 1 where the row has that word."""
    missing: Literal["refuse", "mean"] = "refuse"
    """What is done where a number is missing: stop, or take the mean of the training rows."""


if TYPE_CHECKING:
    Samples = Images | Tokens | Table
else:
    Samples = one_of(Images, Tokens, Table)


@dataclass(frozen=True)
class Rows:
    """Rows of a source, as `name` tells of them; numbered from 0."""

    name: str
    columns: "pa.Table"
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of the labels, of columns that have some."""

    def check(self, names: Sequence[str]) -> None:
        """Raises `InputError` for a column that is not there."""
        columns.check(self.name, names, self.columns.column_names)

    def table(self, names: Sequence[str]) -> columns.Table:
        """Some columns to read numbers and words from."""
        self.check(names)
        return columns.Table(self.name, self.columns.select(list(names)), 0)


@dataclass(frozen=True)
class Parts:
    """Rows to train on, and those held out where the source says which."""

    train: Rows
    held_out: Rows | None


def describe(samples: Images | Tokens | Table) -> DataShape:
    """What a model must know of them. Raises `InputError` for what does not go together."""
    if isinstance(samples, Images):
        look = _look(samples, None)
        look.check()
        size, classes = samples.size, samples.num_classes
        return DataShape(
            "images", num_classes=classes, channels=samples.channels, height=size, width=size, is_cheap=look.is_cheap
        )
    if isinstance(samples, Tokens):
        return text.describe(_text(samples, ""))
    if not samples.features and not samples.categories:
        raise InputError("data.samples: list the columns to predict from in `features` or `categories`")
    return table.describe(_table(samples, "", 0.1))


def resolve(samples: Images | Tokens | Table, folder: Path) -> Images | Tokens | Table:
    """The same with relative paths taken from `folder`."""
    if not isinstance(samples, Tokens):
        return samples
    return replace(samples, tokenizer=resolve_tokenizer(samples.tokenizer, folder))


def settings(samples: Images | Tokens | Table, held_out: float) -> list[Any]:
    """What changes what is prepared of the same rows."""
    if isinstance(samples, Images):
        columns_of = [samples.image, samples.label, samples.num_classes]
        return [FORMAT, "images", columns_of, _look(samples, held_out).settings()]
    if isinstance(samples, Tokens):
        return [FORMAT, "tokens", samples.text, identity(samples.tokenizer), samples.held_out_limit, held_out]
    return [FORMAT, "table", to_builtins(samples), held_out]


def reads_rows(samples: Images | Tokens | Table) -> bool:
    """Whether workers go on reading the rows after they were prepared."""
    return isinstance(samples, Images) and _look(samples, None).decode == "on_read"


def convert(samples: Images | Tokens | Table, parts: Parts, held_out: float, folder: Path) -> dict[str, Any]:
    """Fill `folder`, as `prepared` asks for. Raises `InputError` for a column or cell that is not as `samples` say."""
    both = [rows for rows in (parts.train, parts.held_out) if rows is not None]
    if isinstance(samples, Images):
        look = _look(samples, None if parts.held_out else held_out)
        found = [Cells(rows, samples, _labels(rows, samples)) for rows in both]
        names = parts.train.classes.get(samples.label, ())
        if len(names) != samples.num_classes:
            names = tuple(map(str, range(samples.num_classes)))
        return convert_pictures(look, pictures.Found(names, *found), parts.train.name, folder)
    if isinstance(samples, Tokens):
        return _convert_text(samples, both, held_out, folder)
    options = _table(samples, parts.train.name, held_out)
    names = (*samples.features, *samples.categories, samples.target)
    raw = table.joined(options, [rows.table(names) for rows in both])
    raw.num_train = parts.train.columns.num_rows if parts.held_out else None
    return table.convert(options, raw, folder)


def opened(samples: Images | Tokens | Table, folder: Path, parts: Parts | None) -> Any:
    """The source of what `convert` wrote; `parts` are needed where `reads_rows`."""
    if isinstance(samples, Images):
        return ImageSource(_look(samples, None), folder, partial(_reopened, samples, folder, parts))
    if isinstance(samples, Tokens):
        return text.TextSource(_text(samples, ""), folder)
    return table.TableSource(folder)


class Cells:
    """Pictures in the cells of a column, which are decoded when they are asked for (see `pictures.Pictures`).

    A cell that is no picture raises `error`, which is another class while training than while preparing.
    """

    must_be_decoded = True

    def __init__(
        self,
        rows: Rows,
        samples: Images,
        labels: "np.ndarray",
        numbers: "np.ndarray | None" = None,
        error: type[DtrainError] = InputError,
    ) -> None:
        rows.check([samples.image])
        self.labels = labels
        self._rows, self._column, self._numbers, self._error = rows, samples.image, numbers, error
        self._cells = rows.columns.column(samples.image)

    def contents(self, quickly: bool = False) -> list[str]:
        found = []
        for number in range(len(self.labels)):
            cell = self._cell(number)
            data = cell if isinstance(cell, bytes) else _pixels(cell).tobytes()
            found.append(hashlib.sha256(data).hexdigest())
        return found

    def decoded(self, number: int, channels: int) -> "Image":
        from PIL import Image

        cell = self._cell(number)
        if isinstance(cell, bytes):
            return pictures.decode(io.BytesIO(cell), self._at(number), channels, self._error)
        pixels = _pixels(cell)
        try:
            return pictures.in_channels(Image.fromarray(pixels), channels)
        except (TypeError, ValueError):
            raise self._error(
                f"data: {self._at(number)} is an array of {pixels.dtype} of shape {list(pixels.shape)}, which is no"
                " picture; make it uint8 of height x width, or height x width x 3"
            ) from None

    def fitted(
        self, numbers: "Sequence[int] | np.ndarray", size: int, channels: int, center_crop: float
    ) -> "np.ndarray":
        return pictures.fit_all((self.decoded(number, channels) for number in numbers), size, center_crop)

    def note(self, folder: Path, part: str, numbers: "np.ndarray") -> None:
        numbers.tofile(folder / f"{part}_rows.bin")

    def _cell(self, number: int) -> Any:
        """Bytes of a file, or an array of pixels."""
        cell = self._cells[self._row(number)].as_py()
        if isinstance(cell, dict):  # as the library datasets keeps pictures: their bytes, or a path to them
            if cell.get("bytes") is None and cell.get("path"):
                try:
                    return Path(cell["path"]).read_bytes()
                except OSError as error:
                    raise self._error(
                        f"data: {self._at(number)} names the file {cell['path']}, which cannot be read"
                        f" ({error.strerror}); put it back, or keep the pictures in the column"
                    ) from error
            cell = cell.get("bytes")
        if cell is None or isinstance(cell, str | int | float):
            raise self._error(f"data: {self._at(number)} holds {cell!r}, which is no picture; leave the row out")
        return cell

    def _row(self, number: int) -> int:
        return int(number if self._numbers is None else self._numbers[number])

    def _at(self, number: int) -> str:
        return f"{self._rows.name}, column {self._column!r}, row {self._row(number)}"


def _reopened(samples: Images, folder: Path, parts: Parts | None, part: str, labels: "np.ndarray") -> Cells:
    import numpy as np

    assert parts is not None
    rows = parts.held_out if part == "held_out" and parts.held_out is not None else parts.train
    return Cells(rows, samples, labels, np.fromfile(folder / f"{part}_rows.bin", dtype=np.int64), TrainingError)


def _pixels(cell: Any) -> "np.ndarray":
    import numpy as np

    pixels = np.asarray(cell)
    if pixels.dtype.kind in "iu" and pixels.size and pixels.min() >= 0 and pixels.max() <= 255:
        pixels = pixels.astype(np.uint8)
    return pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels


def _labels(rows: Rows, samples: Images) -> "np.ndarray":
    import numpy as np

    values = rows.table([samples.label]).numbers(samples.label)
    wrong = np.flatnonzero((values < 0) | (values >= samples.num_classes) | (values % 1 != 0))
    if wrong.size:
        raise InputError(
            f"data: {rows.name}, column {samples.label!r}, row {wrong[0]} has the label {values[wrong[0]]:g}, which is"
            f" none of 0 to {samples.num_classes - 1}; correct it, or data.samples.num_classes"
        )
    return values.astype(np.int64)


def _look(samples: Images, held_out: float | None) -> Look:
    return Look(
        samples.size,
        samples.channels,
        samples.center_crop,
        samples.decode or ("on_read" if samples.size >= LARGE else "once"),
        held_out,
        samples.augment,
        samples.mean,
        samples.std,
    )


def _text(samples: Tokens, source: str) -> text.Options:
    return text.Options(
        source=source,
        tokenizer=samples.tokenizer,
        sequence_length=samples.sequence_length,
        held_out_context=samples.held_out_context,
    )


def _table(samples: Table, source: str, held_out: float) -> table.Options:
    return table.Options(source=source, held_out=held_out, **all_but("name", samples))


def _convert_text(samples: Tokens, both: Sequence[Rows], held_out: float, folder: Path) -> dict[str, Any]:
    import numpy as np

    check_tokenizer(samples.tokenizer)
    documents = [partial(_documents, rows, samples.text) for rows in both]
    contents = [[hashlib.sha256(one).hexdigest() for one in read()] for read in documents]
    sizes = [np.array([len(one) for one in read()], dtype=np.int64) for read in documents]
    if not all(size.any() for size in sizes):
        raise InputError(f"data: column {samples.text!r} of {both[0].name} has no text; name another, or give some")
    held = _chosen(contents[-1], sizes[-1], held_out if len(both) == 1 else 1.0, samples.held_out_limit)
    trained = ~held if len(both) == 1 else absent_from(contents[0], contents[1])
    if not (sizes[0] * trained).any() or not (sizes[-1] * held).any():
        raise InputError(
            f"data.held_out {held_out} of {int(sizes[0].sum())} bytes of text leaves none to train on or none held out;"
            " give more documents, or another share"
        )
    if len(both) > 1 and not held.all():
        logging.getLogger(__name__).info(
            "%d of %d held-out documents are used (samples.held_out_limit)", held.sum(), len(held)
        )
    tokenizer = learn(samples.tokenizer, _some(documents[0], trained))
    dtype = np.uint16 if samples.tokenizer.vocabulary_size <= 2**16 else np.uint32
    separator = np.array([tokenizer.separator], dtype=dtype).tobytes()
    for part, read, chosen in (("train", documents[0], trained), ("held_out", documents[-1], held)):
        with (folder / f"{part}.bin").open("wb") as out:
            for block in _blocks(read, chosen):
                for tokens in tokenizer.encode(block):
                    out.write(separator + tokens.astype(dtype).tobytes())
    tokenizer.lengths().tofile(folder / "token_bytes.bin")
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), "utf-8")
    whole = b"".join(one for block in _blocks(documents[-1], held) for one in block)
    packed = {
        "gzip -9": len(gzip.compress(whole, 9, mtime=0)),
        "xz -9e": len(lzma.compress(whole, preset=9 | lzma.PRESET_EXTREME)),
    }
    return {
        "dtype": np.dtype(dtype).str,
        "separator": tokenizer.separator,
        "mask": tokenizer.mask,
        "held_out_bytes": len(whole),
        "bits_per_byte": {name: 8 * size / len(whole) for name, size in packed.items()},
    }


def _documents(rows: Rows, name: str) -> Iterator[bytes]:
    import pyarrow as pa

    rows.check([name])
    column = rows.columns.column(name)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise InputError(f"data: column {name!r} of {rows.name} holds {column.type}, and no text; name another")
    for chunk in column.chunks:
        for start in range(0, len(chunk), _DOCUMENTS):
            yield from ((one or "").encode() for one in chunk.slice(start, _DOCUMENTS).to_pylist())


def _chosen(contents: Sequence[str], sizes: "np.ndarray", share: float, limit: int) -> "np.ndarray":
    """Documents to hold out, bool [n]: by hash, `share` of the bytes but at most `limit`, equal ones together."""
    import numpy as np

    target = min(sizes.sum() * share, limit)
    order = np.array(sorted(range(len(contents)), key=contents.__getitem__))
    total = np.cumsum(sizes[order])
    held = np.zeros(len(contents), dtype=bool)
    held[order[total <= max(target, total[0])]] = True
    return ~absent_from(contents, [one for one, is_held in zip(contents, held, strict=True) if is_held])


def _some(read: Any, chosen: "np.ndarray") -> Iterator[bytes]:
    left = TRAINING_BYTES
    for block in _blocks(read, chosen):
        for one in block:
            if left <= 0:
                return
            left -= len(one)
            yield one


def _blocks(read: Any, chosen: "np.ndarray") -> Iterator[list[bytes]]:
    """The chosen documents that are not empty, in lists of bounded length."""
    block: list[bytes] = []
    for one, is_chosen in zip(read(), chosen, strict=True):
        if is_chosen and one:
            block.append(one)
        if len(block) >= _DOCUMENTS:
            yield block
            block = []
    if block:
        yield block
