"""Runs in a bucket: what all stores have in common.

A store (`s3`, `gs`, `abfs`: a file here each, on the fsspec package for it) makes single requests. Here they are tried
again with growing delays while the store is unwell, large files go in several parts at once, and what a store refuses
is said with the next move. Nothing is cached, and a forked child makes connections of its own.
"""

import contextlib
import functools
import importlib
import math
import os
import secrets
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from dtrain.errors import InputError, StorageError
from dtrain.storage import Conflict, Entry, NotThere, check_name, retrying, stores
from dtrain.storage.stores import Answer, Connection, Store, Verb

T = TypeVar("T")
STORES = {
    "s3": ("s3", "s3fs"),
    "s3a": ("s3", "s3fs"),
    "gs": ("gs", "gcsfs"),
    "gcs": ("gs", "gcsfs"),
    "abfs": ("abfs", "adlfs"),
    "abfss": ("abfs", "adlfs"),
    "az": ("abfs", "adlfs"),
}
"""By scheme: the file here, and the package it needs."""
EXTRAS = {"s3fs": "s3", "gcsfs": "gcs", "adlfs": "azure"}
PATIENCE_S = 120.0
"""How long a request is tried again while the store is unwell."""
FIRST_PATIENCE_S = 15.0
"""The same before it has ever answered: then more likely its address is wrong."""
PART = 16 << 20
"""Bytes of a part of a large file; larger only where a store takes too few parts."""


def open(  # noqa: A001
    place: str,
    *,
    patience_s: float = PATIENCE_S,
    first_patience_s: float = FIRST_PATIENCE_S,
    part_bytes: int = PART,
) -> "Bucket":
    """The runs below a URI. Asks nobody yet. Raises `InputError` for a URI that nobody serves."""
    parts = urlsplit(place)
    place = place.partition("?")[0]  # behind it stands a signature at times: nothing to repeat
    if parts.password is not None:
        raise InputError(
            f"a storage is {parts.scheme}://BUCKET/FOLDER, without a password in it: credentials come from the store's"
            " own chain of profiles, environment and workload identity"
        )
    if parts.scheme not in STORES:
        raise InputError(f"{place}: nobody here serves {parts.scheme}://; use a folder, s3://, gs:// or abfs://")
    if not parts.netloc or parts.query or parts.fragment:
        raise InputError(f"{place}: a storage is {parts.scheme}://BUCKET/FOLDER, and nothing after it")
    name, package = STORES[parts.scheme]
    try:
        module = importlib.import_module(f"dtrain.storage.{name}")
        importlib.import_module(package)
    except ImportError as error:
        raise InputError(
            f"{place} needs the package {package} ({error}): pip install 'dtrain[{EXTRAS[package]}]'"
        ) from None
    root = parts.path.strip("/")
    uri = f"{parts.scheme}://{parts.netloc}" + (f"/{root}" if root else "")
    return Bucket(
        uri, parts.netloc, root, lambda: module.connect(parts.netloc), patience_s, first_patience_s, part_bytes
    )


class Bucket:
    """Runs in a bucket (`dtrain.storage.Storage`)."""

    def __init__(
        self,
        uri: str,
        bucket: str,
        root: str,
        connect: Callable[[], Store],
        patience_s: float,
        first_patience_s: float,
        part_bytes: int,
    ) -> None:
        self._uri, self._bucket, self._root = uri, bucket, root
        self._connect = connect
        self._patience_s, self._first_patience_s = patience_s, first_patience_s
        self._part_bytes = part_bytes

    def __repr__(self) -> str:
        return f"Bucket({self.uri!r})"

    @property
    def uri(self) -> str:
        return self._uri

    @property
    def local(self) -> Path | None:
        return None

    def read(self, name: str) -> tuple[bytes, str]:
        return self._ask("read", name, lambda store, key: store.get(key))

    def read_if_changed(self, name: str, version: str | None) -> tuple[bytes, str] | None:
        def attempt(store: Store, key: str) -> tuple[bytes, str] | None:
            try:
                found = store.get(key, version)
            except Exception as error:
                if version is not None and store.answer(error).kind == "unchanged":
                    return None
                raise
            return None if found[1] == version else found

        return self._ask("read", name, attempt)

    def write(self, name: str, data: bytes, *, if_absent: bool = False, if_version: str | None = None) -> str:
        # Of a request whose answer was lost nobody knows if it was carried out: the mark says so. It is asked for even
        # at the first try, as the network library sends some requests again of itself.
        mark = secrets.token_hex(8)

        def attempt(store: Store, key: str) -> str:
            try:
                return store.put(key, data, mark, if_absent, if_version)
            except Exception as error:
                kind = store.answer(error).kind
                if kind != "conflict" and not (kind == "gone" and if_version is not None):
                    raise
                found = self._facts(store, key)
                if found is not None and found[2] == mark:
                    return found[1]
                what = "is there already" if if_absent else "was written or deleted by somebody else meanwhile"
                raise Conflict(f"{self._uri}/{name} {what}") from error

        return self._ask("written", name, attempt)

    def upload(self, file: Path, name: str) -> None:
        try:
            with file.open("rb") as source:
                size = os.fstat(source.fileno()).st_size
                if size <= self._part_bytes:
                    data = source.read(size)
                    with self._here().gate:
                        self._ask("written", name, lambda store, key: store.put(key, data, "", False, None))
                else:
                    self._upload_parts(source.fileno(), size, name)
        except OSError as error:
            raise StorageError(f"{file} cannot be read: {error.strerror or error}") from error

    def download(self, name: str, file: Path) -> None:
        making = file.with_name(f".{file.name}.writing-{secrets.token_hex(4)}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                for is_last in (False, True):
                    try:
                        self._download(name, making)
                        break
                    except Conflict:  # written anew meanwhile
                        if is_last:
                            raise
                making.replace(file)
            finally:
                making.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"{file} cannot be written: {error.strerror or error}") from error

    def entries(self, prefix: str = "") -> list[Entry]:
        start = len(self._key(""))
        found = self._ask("listed", prefix, lambda store, key: store.entries(key))
        # Some tools put an empty object in a folder's place.
        named = [Entry(e.name[start:], e.bytes, e.version) for e in found if not e.name.endswith("/")]
        return sorted(named, key=lambda entry: entry.name)

    def folders(self, prefix: str = "") -> list[str]:
        return sorted(self._ask("listed", prefix, lambda store, key: store.folders(key)))

    def delete(self, names: Iterable[str]) -> None:
        keys = [self._key(check_name(self._uri, name)) for name in names]
        for at in range(0, len(keys), 1000):
            self._ask("deleted", "", functools.partial(_delete, keys=keys[at : at + 1000]))

    # -- large files ---------------------------------------------------------------------------------------------

    def _upload_parts(self, descriptor: int, size: int, name: str) -> None:
        connection, mark = self._here(), secrets.token_hex(8)
        part = max(self._part_bytes, math.ceil(size / connection.store.max_parts))
        starts = range(0, size, part)
        upload = self._ask("written", name, lambda store, key: store.begin(key, mark))
        failed = threading.Event()

        def put(start: int) -> str:
            with connection.gate:
                if failed.is_set():
                    return ""
                data = os.pread(descriptor, min(part, size - start), start)
                if len(data) < min(part, size - start):
                    raise StorageError(f"{self._uri}/{name}: the file became shorter while it was uploaded")
                number = start // part + 1
                return self._ask("written", name, lambda store, key: store.put_part(key, upload, number, data))

        def finish(store: Store, key: str) -> None:
            try:
                store.finish(key, upload, mark, receipts)
            except Exception as error:
                found = self._facts(store, key) if store.answer(error).kind != "again" else None
                if found is None or found[2] != mark:  # it is there when an answer before was lost
                    raise

        try:
            with ThreadPoolExecutor(stores.NUM_PARALLEL, "dtrain-upload") as pool:
                try:
                    receipts = list(pool.map(put, starts))
                except BaseException:  # Ctrl-C too: what has not begun need not
                    failed.set()
                    raise
            self._ask("written", name, finish)
        except BaseException:
            with contextlib.suppress(Exception):  # what went wrong before is what is said
                connection.store.abandon(self._key(name), upload, len(starts))
            raise

    def _download(self, name: str, file: Path) -> None:
        size, version, _ = self._ask("read", name, lambda store, key: store.facts(key))
        with file.open("wb") as target:
            descriptor = target.fileno()

            def get(start: int) -> None:
                stop = min(start + self._part_bytes, size)
                with self._here().gate:
                    data = self._ask("read", name, lambda store, key: self._whole(store, key, version, start, stop))
                done = 0
                while done < len(data):
                    done += os.pwrite(descriptor, data[done:], start + done)

            starts = range(0, size, self._part_bytes)
            with ThreadPoolExecutor(min(stores.NUM_PARALLEL, len(starts) or 1), "dtrain-download") as pool:
                for _ in pool.map(get, starts):
                    pass

    @staticmethod
    def _whole(store: Store, key: str, version: str, start: int, stop: int) -> bytes:
        try:
            data = store.get_range(key, version, start, stop)
        except Exception as error:
            if store.answer(error).kind == "conflict":
                raise Conflict(f"{key} was written anew while it was read") from error
            raise
        if len(data) != stop - start:
            raise retrying.Again(f"{len(data)} bytes came instead of {stop - start}")
        return data

    # -- asking --------------------------------------------------------------------------------------------------

    def _here(self) -> Connection:
        """What this very process holds of the bucket."""
        try:
            return stores.connection(f"{urlsplit(self._uri).scheme}://{self._bucket}", self._connect)
        except (ValueError, OSError) as error:
            raise StorageError(f"{self._uri} cannot be used: {error}") from error

    def _key(self, name: str) -> str:
        return f"{self._root}/{name}" if self._root else name

    def _ask(self, verb: Verb, name: str, request: Callable[[Store, str], T]) -> T:
        """What a request answers, tried again while that may help; all it may raise instead is an error of ours."""
        if verb == "listed":
            assert not name or name.endswith("/"), name
        if name:
            check_name(self._uri, name.removesuffix("/") if verb == "listed" else name)
        elif verb in ("read", "written"):
            check_name(self._uri, name)
        connection, key = self._here(), self._key(name)
        where = f"{self._uri}/{name}" if name else self._uri

        def attempt() -> T:
            try:
                result = request(connection.store, key)
            except (StorageError, retrying.Again):
                raise
            except Exception as error:
                answer = connection.store.answer(error)
                if answer.kind == "again":
                    raise retrying.Again(answer.text) from error
                connection.has_answered = True
                raise self._said(answer, verb, where) from error
            connection.has_answered = True
            return result

        patience_s = self._patience_s if connection.has_answered else min(self._first_patience_s, self._patience_s)
        try:
            return retrying.call(attempt, patience_s)
        except retrying.Again as error:
            move = "" if connection.has_answered else f"; {connection.store.remedies['again']}"
            raise StorageError(
                f"{where} cannot be {verb}: the store did not do it within {patience_s:g} s ({error.reason}){move}"
            ) from error

    def _facts(self, store: Store, key: str) -> tuple[int, str, str] | None:
        """Size, version and mark of an object that may not be there."""
        try:
            return store.facts(key)
        except Exception as error:
            if store.answer(error).kind == "gone":
                return None
            raise

    def _said(self, answer: Answer, verb: Verb, where: str) -> StorageError:
        store = self._here().store
        if answer.kind == "gone" and verb == "read":
            return NotThere(f"{where} does not exist")
        if answer.kind == "gone":  # some do not say that it is the bucket
            answer = Answer("no bucket", answer.text)
        if answer.kind == "denied":
            permission = store.permissions[verb]
            reason = f"bucket {self._bucket} refuses ({answer.text}); these credentials need {permission} there"
        elif answer.kind == "no bucket":
            reason = f"there is no bucket {self._bucket} ({answer.text})"
        elif answer.kind == "no credentials":
            reason = f"there are no credentials that bucket {self._bucket} takes ({answer.text})"
        else:
            reason = answer.text
        move = store.remedies.get(answer.kind)
        return StorageError(f"{where} cannot be {verb}: {reason}" + (f"; {move}" if move else ""))


def _delete(store: Store, _: str, keys: list[str]) -> None:
    store.delete(keys)
