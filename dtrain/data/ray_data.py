"""Preprocessing with Ray Data: files are read and transformed by many processes, once, and their rows are kept.

Ray runs while the data is prepared and not while it is read. Unless `address` names a cluster, prepare starts a Ray of
its own on the node, in the cores that training uses afterwards, and ends it: a run has reserved the cluster's own.
Every node of a run prepares for itself where nodes do not share a cache.
"""

import contextlib
import glob
import io
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta
from msgspec.structs import replace

from dtrain import code
from dtrain.data import DataShape, columns, samples
from dtrain.data.kept import find, keep, sha256
from dtrain.data.samples import Images, Parts, Rows, Samples, Table
from dtrain.errors import ClusterError, DtrainError, InputError
from dtrain.settings import PositiveInt, Says, Settings

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

FORMAT = 1
"""Raise when the same files would be prepared differently."""
_ROWS = "rows.arrow"
_BLOCK = 1024
_START_TIMEOUT_S = 120
_WITH_PATHS = ("images", "text", "binary")


class Options(Settings):
    """Files that Ray Data reads and a function of yours transforms, with as many processes as there are cores."""

    source: str | Annotated[tuple[str, ...], Meta(min_length=1)]
    """A file, a folder, a glob, or a list of them."""
    read: Literal["csv", "parquet", "json", "images", "text", "binary"]
    """As what Ray Data reads the files; of images, text and binary files the column `path` says where a row is from."""
    transform: Annotated[str, Meta(min_length=3, max_length=1024), Says(code.EXPECTED)] | None = None
    """Function that is called with the ray.data.Dataset that was read and gives another; a relative path starts at the
    job file's folder. Its file's contents tell whether it has changed."""
    path: Annotated[str, Meta(max_length=1024)] = ""
    """Folder that is put first on the import path; the job file's own when left out."""
    samples: Samples
    """What the columns become that it gives."""
    held_out: Annotated[float, Meta(gt=0.0, le=0.5)] = 0.1
    """Share of the rows that is never trained on."""
    address: str | None = None
    """Ray cluster to preprocess on, as `ray.init` takes it, which must see the files and have cores to spare; by
    default one is started on the node for as long as it takes."""
    num_cpus: PositiveInt | None = None
    """Cores of the Ray that is started; by default all."""


def describe(options: Options) -> DataShape:
    """What a model must know of the samples, without reading a row."""
    return samples.describe(options.samples)


def resolve(options: Options, folder: Path) -> Options:
    """The same with absolute paths. Raises `InputError` when the function is not there, or for wrong samples."""
    samples.describe(options.samples)
    if options.address is not None and options.num_cpus is not None:
        raise InputError(
            "data.num_cpus is for a Ray that is started, and data.address names one; leave one of them out"
        )
    path = code.absolute(options.path, folder) if options.path else folder.absolute().resolve()
    transform = options.transform
    if transform is not None:
        try:
            transform = code.resolve(transform, folder)
            file = code.source_file(transform, path)
            if file is not None:
                code.check_call(transform, file, ("dataset",), {})
        except InputError as error:
            raise InputError(f"data.transform: {error.message}") from None
    given = [options.source] if isinstance(options.source, str) else options.source
    return replace(
        options,
        source=tuple(os.path.abspath(folder / Path(one).expanduser()) for one in given),
        transform=transform,
        path=str(path),
        samples=samples.resolve(options.samples, folder),
    )


def own_code(options: Options) -> list[Path]:
    """The file of the user's own that resolved options name."""
    if options.transform is None:
        return []
    file = code.source_file(options.transform, Path(options.path))
    return [file] if file is not None else []


def prepare(options: Options, cache: Path) -> None:
    """Transform the files' rows into `cache`, unless the same ones were before by the same function.

    Raises `InputError` when the function fails, or for a column or cell that is not as the options say, `ClusterError`
    when Ray cannot be had, `StorageError` when the cache cannot be written.
    """
    _prepare(options, cache)


def open(options: Options, cache: Path) -> Any:  # noqa: A001
    """The prepared samples: an `ImageSource`, `TextSource` or `TableSource`. Raises what `prepare` raises."""
    watched = [*_files(options), *map(str, own_code(options))]
    folder = find(cache, "ray_data", _settings(options), watched) or _prepare(options, cache)
    parts = Parts(_rows(options, folder), None) if samples.reads_rows(options.samples) else None
    return samples.opened(options.samples, folder, parts)


def _files(options: Options) -> list[str]:
    found = []
    for one in [options.source] if isinstance(options.source, str) else options.source:
        if os.path.isdir(one):
            walked = [(folder, names) for folder, _, names in os.walk(one) if "/." not in folder[len(one) :]]
            some = [os.path.join(folder, name) for folder, names in walked for name in names if name[0] != "."]
        else:
            some = [path for path in glob.glob(one, recursive=True) if os.path.isfile(path)]
        if not some:
            raise InputError(f"data.source: {one} leads to no file; name a file, a folder or a glob")
        found += sorted(some)
    return found


def _settings(options: Options) -> list[Any]:
    name = (options.transform or "").rpartition(":")[2]
    return [FORMAT, options.read, name, samples.settings(options.samples, options.held_out)]


def _prepare(options: Options, cache: Path) -> Path:
    files = _files(options)
    own = [str(path) for path in own_code(options)]
    root = os.path.commonpath([os.path.dirname(path) for path in files])

    def contents() -> Any:
        return [[os.path.relpath(path, root), sha256(path)] for path in files] + [sha256(path) for path in own]

    def make(folder: Path) -> dict[str, Any]:
        _transform(options, files, folder / _ROWS)
        meta = samples.convert(options.samples, Parts(_rows(options, folder), None), options.held_out, folder)
        if not samples.reads_rows(options.samples):
            (folder / _ROWS).unlink()
        return meta

    return keep(cache, "ray_data", _settings(options), [*files, *own], contents, make)


def _rows(options: Options, folder: Path) -> Rows:
    import pyarrow as pa

    name = options.transform or "what Ray Data read"
    return Rows(name, pa.ipc.open_stream(pa.memory_map(str(folder / _ROWS))).read_all())


def _transform(options: Options, files: list[str], path: Path) -> None:
    """Write the transformed rows to `path`, as an Arrow stream."""
    import pyarrow as pa

    # Before Ray starts: its workers get the import path that there is then.
    function = code.load(options.transform, options.path) if options.transform is not None else None
    with _ray(options) as ray:
        reader = getattr(ray.data, "read_binary_files" if options.read == "binary" else f"read_{options.read}")
        data = reader(files, **({"include_paths": True} if options.read in _WITH_PATHS else {}))
        if function is not None:
            # By value, so that workers need not find the user's file.
            ray.cloudpickle.register_pickle_by_value(sys.modules[function.__module__])
            data = function(data)
            if not isinstance(data, ray.data.Dataset):
                raise InputError(
                    f"data.transform: {options.transform} gave a {type(data).__name__}; it must give a ray.data.Dataset"
                )
        schema = None
        with contextlib.ExitStack() as stack:
            writer: Any = None
            for batch in data.iter_batches(batch_format="numpy", batch_size=_BLOCK):
                block = _block(options, batch, schema)
                if schema is None:
                    schema = block.schema
                    writer = stack.enter_context(pa.ipc.new_stream(str(path), schema))
                writer.write_table(block)
        if schema is None:
            raise InputError(
                f"data.transform: {options.transform or 'what Ray Data read'} has no row; let some through"
            )


@contextlib.contextmanager
def _ray(options: Options) -> Iterator[Any]:
    """The module `ray`, in a cluster: the one that this process is in, the one with the address, or one of its own."""
    try:
        # Ray reads these once, when it is imported.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_raylet_start_wait_time_s", str(_START_TIMEOUT_S))
        import ray
        import ray.data
    except ImportError as error:
        raise InputError("data: ray_data needs the package 'ray'; install dtrain[train]") from error
    is_mine = not ray.is_initialized()
    if is_mine:
        quiet: dict[str, Any] = {"configure_logging": False, "log_to_driver": False, "namespace": "dtrain"}
        if options.address is None:
            quiet |= {"num_cpus": options.num_cpus or os.cpu_count(), "include_dashboard": False}
        try:
            ray.init(address=options.address or "local", **quiet)
        except Exception as error:
            said = str(error).strip().splitlines()
            raise ClusterError(
                f"Ray {f'at {options.address} cannot be joined' if options.address else 'cannot be started'} to prepare"
                f" the data: {said[0] if said else type(error).__name__}"
            ) from error
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    for name in ("ray.data", "ray.util.state"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield ray
    except DtrainError:
        raise
    except Exception as error:
        raise InputError(f"data.transform: {options.transform or options.read} failed: {_last_words(error)}") from error
    finally:
        if is_mine:
            ray.shutdown()


def _last_words(error: BaseException) -> str:
    """What the user's own code said, of an error that Ray has wrapped with its traceback."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if line.partition(":")[0].rpartition(".")[2].endswith(("Error", "Exception"))]
    said = [line for line in said if not line.startswith("ray.")] or said
    return said[-1] if said else f"{type(error).__name__}: {lines[-1] if lines else ''}"


def _block(options: Options, batch: "dict[str, np.ndarray]", schema: "pa.Schema | None") -> "pa.Table":
    """The columns that samples are made of. Raises `InputError` for one that is missing, or changes its type."""
    import pyarrow as pa

    chosen = options.samples
    image = chosen.image if isinstance(chosen, Images) else None
    if isinstance(chosen, Images):
        names = [chosen.image, chosen.label]
    elif isinstance(chosen, Table):
        names = [*chosen.features, *chosen.categories, chosen.target]
    else:
        names = [chosen.text]
    where = options.transform or "what Ray Data read"
    columns.check(where, names, list(batch))
    try:
        cells = {name: _encoded(batch[name]) if name == image else pa.array(batch[name]) for name in names}
        made = pa.table(cells)
        return made if schema is None else made.cast(schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise InputError(
            f"data: {where} gave columns that are no table ({error}); give each column one type"
        ) from error


def _encoded(column: "np.ndarray") -> list[Any]:
    """Pixels as PNG files, which keep their shape; files as they are."""
    import numpy as np
    from PIL import Image

    cells: list[Any] = []
    for cell in column:
        if (
            isinstance(cell, np.ndarray)
            and cell.dtype == np.uint8
            and (cell.ndim == 2 or cell.shape[-1:] in [(1,), (3,)])
        ):
            stream = io.BytesIO()
            Image.fromarray(cell[..., 0] if cell.shape[-1:] == (1,) else cell).save(stream, "PNG")
            cells.append(stream.getvalue())
        elif cell is None or isinstance(cell, bytes):
            cells.append(cell)
        else:
            shape = f"{cell.dtype} of shape {list(cell.shape)}" if isinstance(cell, np.ndarray) else type(cell).__name__
            raise InputError(
                f"data: the column with pictures has {shape}; make it uint8 of height x width, or height x width x 3"
            )
    return cells
