"""Pictures with labels in tar shards (WebDataset's layout), read in place from disk or object storage by fsspec.

Where each sample lies is looked up once and kept in the cache, by the shards' sizes and times or tags: reading any
sample is then one range of one shard. So the order is that of every source: each sample exactly once an epoch, for any
number of workers, shuffled over all shards and not only within a buffer, and any step is found at once. It relies on
shards that do not change during a run: one that is cut short or no longer holds a picture where it did is an error.
"""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

from msgspec import Meta
from msgspec.structs import replace

from dtrain.data import DataShape, pictures, tar_shards
from dtrain.data.augmentation import Augmentation
from dtrain.data.kept import digest
from dtrain.data.pixels import Decoded, Look, Scaling
from dtrain.data.prepared import fault, prepared, read_meta, write_whole
from dtrain.data.tar_shards import Sample, Shard
from dtrain.errors import InputError, TrainingError
from dtrain.settings import Float, PositiveFloat, Settings, to_builtins

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

FORMAT = 1
"""Raise when the same shards would be prepared differently."""
_SPREAD = 0x5EED
_LABEL = 3
"""Column of the label, behind shard, offset and size."""
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
Addresses = str | Annotated[tuple[str, ...], Meta(min_length=1)]


class Options(Settings):
    """Pictures with labels in tar shards, read in place from disk or object storage."""

    source: Addresses
    """Shards: paths, globs or addresses of `.tar` files, or a list of them; `s3://bucket/train-{000..146}.tar` stands
    for 147."""
    held_out_source: Addresses | None = None
    """Shards that are never trained on, in the same words."""
    held_out: Annotated[float, Meta(gt=0.0, le=0.5)] | None = None
    """Share of the samples that is never trained on, where there is no `held_out_source`; 0.05 by default."""
    storage_options: dict[str, str | int | Float | bool] = {}
    """What fsspec is told about the storage, e.g. `{anon: true}` for public buckets of S3."""
    picture: tuple[str, ...] = ("jpg", "jpeg", "png", "webp")
    """What a picture's name may end with, after its first dot."""
    label: Literal["cls", "txt", "json"] = "cls"
    """The member that holds the label, by what its name ends with: a number, or one of `classes`."""
    label_key: str = "label"
    """Where in a `json` member the label stands."""
    classes: tuple[str, ...] = ()
    """Names that stand for labels 0, 1, and so on, where labels are written as names."""
    num_classes: Annotated[int, Meta(ge=2, le=2**20)]
    """Number of labels."""
    size: Annotated[int, Meta(ge=4, le=2048)] = 224
    """Height and width in pixels to which pictures are scaled."""
    channels: Literal[1, 3] = 3
    """1 for grey, 3 for colours."""
    center_crop: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.875
    """Share of the shorter side that is kept, in the middle."""
    augment: Augmentation = Augmentation()
    """What is done to training pictures by chance."""
    mean: Annotated[tuple[Float, ...], Meta(min_length=1)] | None = None
    """Subtracted from each channel (black is 0, white 1); by default ImageNet's."""
    std: Annotated[tuple[PositiveFloat, ...], Meta(min_length=1)] | None = None
    """What each channel is divided by then; by default ImageNet's."""


def describe(options: Options) -> DataShape:
    """Classes, channels and size, without reading a shard."""
    return DataShape(
        "images",
        num_classes=options.num_classes,
        channels=options.channels,
        height=options.size,
        width=options.size,
        is_cheap=False,
    )


def resolve(options: Options, folder: Path) -> Options:
    """The same options with relative paths taken from `folder`. Raises `InputError` for what does not go together."""
    if options.held_out is not None and options.held_out_source is not None:
        raise InputError("data.held_out and data.held_out_source exclude each other; leave one of them out")
    if options.classes and len(options.classes) != options.num_classes:
        raise InputError(
            f"data.classes has {len(options.classes)} names, and data.num_classes is {options.num_classes};"
            " write a name for each class"
        )
    _look(options).check()
    changes = {"source": _resolved(options.source, folder)}
    if options.held_out_source is not None:
        changes["held_out_source"] = _resolved(options.held_out_source, folder)
    return replace(options, **changes)


def prepare(options: Options, cache: Path) -> None:
    """Look up where the samples lie, in shards that are new or have changed; reads their labels, and no picture.

    Raises `InputError` for shards that are not there, not whole, or not as the options say.
    """
    _prepare(options, cache)


def open(options: Options, cache: Path) -> "ShardSource":  # noqa: A001
    """The samples as they were looked up last, which is done now when it was not yet. Raises what `prepare` raises."""
    try:
        folder = cache / _note(options, cache).read_text()
    except OSError:
        folder = None
    if folder is None or fault(folder, sizes_only=True):
        folder = _prepare(options, cache)
    return ShardSource(options, folder)


class ShardSource:
    """Samples are pictures with their labels."""

    def __init__(self, options: Options, folder: Path) -> None:
        import numpy as np

        meta = read_meta(folder)
        self.fingerprint: str = meta["fingerprint"]
        """Changes with the shards' names, members and labels and with what is held out, not with where they lie."""
        self.classes = options.classes or tuple(map(str, range(options.num_classes)))
        """What the labels stand for."""
        defaults = _IMAGENET if options.channels == 3 else tuple((sum(one) / 3,) for one in _IMAGENET)
        given = (options.mean or defaults[0], options.std or defaults[1])
        mean, std = (np.broadcast_to(np.array(one, dtype=np.float32), options.channels) for one in given)
        self._scaling = Scaling(mean, std)
        self._yardsticks: dict[str, float] = meta["accuracy"]
        self.train, self.held_out = (
            Members(
                Shards(meta["shards"][part], options.storage_options),
                np.load(folder / f"{part}.npy", mmap_mode="r"),
                _look(options),
                augment,
                self._scaling.normalised,
                options,
            )
            for part, augment in (("train", options.augment), ("held_out", Augmentation()))
        )

    def yardsticks(self) -> dict[str, dict[str, float]]:
        """Accuracy of always naming the most frequent class."""
        return {"accuracy": dict(self._yardsticks)}

    def to_pixels(self, images: "np.ndarray") -> "np.ndarray":
        """Pictures to look at, uint8 [n, h, w, c], for images as in a batch, float32 [n, c, h, w]."""
        return self._scaling.to_pixels(images)


class Shards:
    """Ranges of shards, wherever they lie."""

    def __init__(self, urls: Sequence[str], options: dict[str, Any]) -> None:
        self.urls = urls
        self._options = options
        self._readers: dict[str, Any] = {}

    def read(self, rows: "np.ndarray") -> list[bytes | BaseException]:
        """The bytes of each of `rows` (shard, offset, size), or what prevented it; all of a storage at once."""
        found: list[bytes | BaseException] = [b""] * len(rows)
        groups: dict[str, list[int]] = {}
        for number, (shard, _, _) in enumerate(rows):
            groups.setdefault(self.urls[shard].partition("://")[0], []).append(number)
        for protocol, numbers in groups.items():
            reader = self._reader(protocol, self.urls[rows[numbers[0], 0]])
            paths = [reader._strip_protocol(self.urls[rows[number, 0]]) for number in numbers]
            starts = [int(rows[number, 1]) for number in numbers]
            ends = [int(rows[number, 1] + rows[number, 2]) for number in numbers]
            answers = reader.cat_ranges(paths, starts, ends, on_error="return")
            for number, answer, start, end in zip(numbers, answers, starts, ends, strict=True):
                if isinstance(answer, bytes) and len(answer) != end - start:
                    answer = EOFError(f"{len(answer)} bytes are left of {end - start}")
                found[number] = answer
        return found

    def _reader(self, protocol: str, url: str) -> Any:
        if protocol not in self._readers:
            self._readers[protocol], _ = tar_shards.filesystem(url, self._options)
        return self._readers[protocol]


class Members:
    """Pictures in shards, read and decoded when they are asked for."""

    def __init__(
        self, shards: Shards, rows: "np.ndarray", look: Look, augment: Augmentation, normalised: Any, options: Options
    ) -> None:
        self.num_samples = len(rows)
        self._shards, self._rows, self._options = shards, rows, options
        self._look, self._augment, self._normalised = look, augment, normalised

    def batch(self, indices: "np.ndarray", draws: "np.ndarray") -> "dict[str, np.ndarray]":
        """images, float32 [b, c, h, w], and labels, int64 [b]. Raises `TrainingError` for a sample that is broken."""
        import numpy as np

        rows = np.asarray(self._rows[indices])
        fetched: Any = _Fetched(rows, self._shards.read(rows[:, :_LABEL]), self._shards.urls, self._options)
        return Decoded(fetched, self._look, self._augment, self._normalised).batch(np.arange(len(rows)), draws)


class _Fetched:
    """The pictures of one batch, which were fetched together (see `pictures.Pictures`)."""

    def __init__(
        self, rows: "np.ndarray", found: Sequence[bytes | BaseException], urls: Sequence[str], options: Options
    ) -> None:
        import numpy as np

        self.labels = np.ascontiguousarray(rows[:, _LABEL])
        self._rows, self._found, self._urls, self._options = rows, found, urls, options

    def fitted(
        self, numbers: "Sequence[int] | np.ndarray", size: int, channels: int, center_crop: float
    ) -> "np.ndarray":
        import numpy as np

        every = [self.decoded(number, channels) for number in numbers]
        return np.stack([pictures.fit(one, size, pictures.center(one, center_crop)) for one in every])

    def decoded(self, number: int, channels: int) -> "Image":
        import io

        from PIL import Image, UnidentifiedImageError

        data = self._found[number]
        if isinstance(data, BaseException):
            self._refuse(number, "read", data)
        try:
            with Image.open(io.BytesIO(data)) as picture:
                if picture.mode.startswith(("I", "F")):
                    raise ValueError("it has more than 8 bits a channel")
                return pictures.in_channels(picture, channels)
        except UnidentifiedImageError:  # which names the object in memory, not the member
            self._refuse(number, "decoded", ValueError("it is of no kind that Pillow knows"))
        except Exception as error:  # PIL's decoders raise many kinds
            self._refuse(number, "decoded", error)

    def _refuse(self, number: int, what: str, error: BaseException) -> NoReturn:
        url, offset = self._urls[self._rows[number, 0]], int(self._rows[number, 1])
        raise TrainingError(
            f"data.source: the picture {_name_at(url, offset, self._options)} in the shard {url} cannot be {what}"
            f" ({error}); replace the shard, or take that sample out"
        ) from error


def _name_at(url: str, offset: int, options: Options) -> str:
    """What the member whose data begins at `offset` is called; its place where the shard no longer says."""
    try:
        reader, path = tar_shards.filesystem(url, options.storage_options)
        with reader.open(path, "rb") as stream:
            for sample in tar_shards.samples(Shard(url, ()), stream, int(reader.info(path)["size"])):
                for member in sample.members.values():
                    if member.offset_data == offset:
                        return member.name
    except Exception:  # noqa: S110 -- the error that is about to be told is the one that counts
        pass
    return f"at byte {offset}"


def _chosen(options: Options, shard: Shard, stream: Any, sample: Sample) -> list[int]:
    """Offset and size of a sample's picture, and its label."""
    where = f"data.source: sample {sample.key} in the shard {shard.url}"
    picture = next((sample.members[suffix] for suffix in options.picture if suffix in sample.members), None)
    label = sample.members.get(options.label)
    if picture is None or label is None:
        missing = " or ".join(f".{suffix}" for suffix in ([options.label] if picture else options.picture))
        there = ", ".join(f".{suffix}" for suffix in sample.members)
        raise InputError(
            f"{where} has no {missing} (it has {there}); correct data.label and data.picture, or the shard"
        )
    stream.seek(label.offset_data)
    text = stream.read(label.size).decode("utf-8", errors="replace").strip()
    try:
        number = _number(options, text)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{where}: its .{options.label} says {text[:80]!r}, which is no label ({error}); it must be a number below"
            f" data.num_classes {options.num_classes}, or a name in data.classes"
        ) from error
    return [picture.offset_data, picture.size, number]


def _number(options: Options, text: str) -> int:
    import json

    word: Any = text
    if options.label == "json":
        found = json.loads(text)
        if not isinstance(found, dict) or options.label_key not in found:
            raise ValueError(f"there is no {options.label_key!r} in it")
        word = found[options.label_key]
    if options.classes and word in options.classes:
        return options.classes.index(word)
    number = int(word)
    if isinstance(word, float | bool) or not 0 <= number < options.num_classes:
        raise ValueError("out of range")
    return number


def _prepare(options: Options, cache: Path) -> Path:
    shards = {"train": _found(options.source, options)}
    if options.held_out_source is not None:
        shards["held_out"] = _found(options.held_out_source, options)
        twice = {shard.url for shard in shards["train"]} & {shard.url for shard in shards["held_out"]}
        if twice:
            raise InputError(f"data.held_out_source: {min(twice)} is among data.source too; hold out other shards")
    settings = [FORMAT, options.picture, options.label, options.label_key, options.classes, options.num_classes]
    lists = {
        part: tar_shards.list_all(found, options.storage_options, cache, settings, partial(_chosen, options))
        for part, found in shards.items()
    }
    contents = {
        part: [[shard.name, tar_shards.digest_of(folder)] for shard, folder in zip(found, lists[part], strict=True)]
        for part, found in shards.items()
    }
    urls = {part: [shard.url for shard in found] for part, found in shards.items()}
    fingerprint = f"webdataset-{digest(FORMAT, contents, options.held_out)}"
    name = f"webdataset-{digest(fingerprint, urls)}"
    folder = prepared(cache, name, partial(_convert, options, fingerprint, urls, lists))
    write_whole(_note(options, cache), folder.name)
    return folder


def _convert(
    options: Options, fingerprint: str, urls: dict[str, list[str]], lists: dict[str, list[Path]], folder: Path
) -> dict[str, Any]:
    import numpy as np

    from dtrain.data.order import permute

    rows = {}
    for part, folders in lists.items():
        every = [tar_shards.rows_of(one) for one in folders]
        shard = np.repeat(np.arange(len(every)), [len(one) for one in every])
        rows[part] = np.column_stack([shard, np.concatenate(every)])
    if "held_out" not in rows:
        whole = rows["train"]
        num_held = round((options.held_out or 0.05) * len(whole))
        if not 0 < num_held < len(whole):
            raise InputError(
                f"data.held_out {options.held_out or 0.05} of {len(whole)} samples holds {num_held} out; give more"
                " samples, another share, or data.held_out_source"
            )
        places = permute(_SPREAD, np.zeros(len(whole), dtype=np.int64), np.arange(len(whole)), len(whole))
        rows = {"train": whole[np.sort(places[num_held:])], "held_out": whole[places[:num_held]]}
        urls = {"train": urls["train"], "held_out": urls["train"]}
    else:
        held = rows["held_out"]
        rows["held_out"] = held[permute(_SPREAD, np.zeros(len(held), dtype=np.int64), np.arange(len(held)), len(held))]
    for part, found in rows.items():
        np.save(folder / f"{part}.npy", found)
    most = np.bincount(rows["train"][:, _LABEL]).argmax()
    accuracy = {"always the most frequent class": float((rows["held_out"][:, _LABEL] == most).mean())}
    return {"shards": urls, "fingerprint": fingerprint, "accuracy": accuracy}


def _look(options: Options) -> Look:
    return Look(
        options.size,
        options.channels,
        options.center_crop,
        "on_read",
        options.held_out,
        options.augment,
        options.mean,
        options.std,
    )


def _found(addresses: Addresses, options: Options) -> list[Shard]:
    patterns = [addresses] if isinstance(addresses, str) else list(addresses)
    return tar_shards.find(patterns, dict(options.storage_options))


def _note(options: Options, cache: Path) -> Path:
    """Where `prepare` writes which folder it made last for these options."""
    return cache / f"webdataset-{digest(FORMAT, to_builtins(options))}.seen"


def _resolved(addresses: Addresses, folder: Path) -> tuple[str, ...]:
    return tuple(
        one if "://" in one else os.path.abspath(folder / Path(one).expanduser())
        for one in ([addresses] if isinstance(addresses, str) else addresses)
    )
