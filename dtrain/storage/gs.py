"""Google Cloud Storage, through gcsfs. Credentials by Google's standard chain, workload identity among them.

The store has no uploads in parts that one name covers: parts are objects of their own, composed into one and deleted.
Requests are made one by one, on the session of gcsfs: its own tries hide what was tried, and each other's answers.
"""

import asyncio
import io
import json
import math
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from dtrain.storage import Entry
from dtrain.storage.stores import Answer, Kind, Verb, delete_each, wait_for

MARK = "dtrain-mark"
NUM_COMPOSED = 32
"""Objects that one request composes at most."""


def connect(bucket: str) -> "Gs":
    return Gs(bucket)


class Gs:
    """One bucket (`dtrain.storage.stores.Store`)."""

    max_parts = NUM_COMPOSED**2
    remedies: Mapping[Kind, str] = {
        "again": "check the network",
        "denied": "ask who looks after the bucket, or use another account (GOOGLE_APPLICATION_CREDENTIALS)",
        "no bucket": "make it, or correct the name",
        "no credentials": "run `gcloud auth application-default login`, set GOOGLE_APPLICATION_CREDENTIALS, or give the"
        " pod's service account a role by workload identity",
    }
    permissions: Mapping[Verb, str] = {
        "read": "storage.objects.get",
        "written": "storage.objects.create and storage.objects.delete (to replace)",
        "listed": "storage.objects.list",
        "deleted": "storage.objects.delete",
    }

    def __init__(self, bucket: str) -> None:
        import gcsfs  # type: ignore[import-not-found, import-untyped, unused-ignore]

        self._bucket = bucket
        self.files = gcsfs.GCSFileSystem(skip_instance_cache=True, use_listings_cache=False)

    def get(self, key: str, known: str | None = None) -> tuple[bytes, str]:
        headers, data = self._object("GET", key, alt="media", ifGenerationNotMatch=known)
        return data, headers["x-goog-generation"]

    def get_range(self, key: str, version: str, start: int, stop: int) -> bytes:
        part = {"Range": f"bytes={start}-{stop - 1}"}
        return self._object("GET", key, headers=part, alt="media", ifGenerationMatch=version)[1]

    def facts(self, key: str) -> tuple[int, str, str]:
        found = json.loads(self._object("GET", key)[1])
        return int(found["size"]), str(found["generation"]), found.get("metadata", {}).get(MARK, "")

    def put(self, key: str, data: bytes, mark: str, if_absent: bool, if_version: str | None) -> str:
        said = json.dumps({"name": key, "metadata": {MARK: mark}}).encode()
        limit = b"==dtrain=="
        while limit in data:
            limit += b"="
        body = b"--%b\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n%b\r\n" % (limit, said)
        body += b"--%b\r\nContent-Type: application/octet-stream\r\n\r\n%b\r\n--%b--" % (limit, data, limit)
        answer = self._call(
            "POST",
            f"{self.files._location}/upload/storage/v1/b/{quote(self._bucket, safe='')}/o",
            headers={"Content-Type": f'multipart/related; boundary="{limit.decode()}"'},
            data=io.BytesIO(body),
            uploadType="multipart",
            ifGenerationMatch="0" if if_absent else if_version,
        )
        return str(json.loads(answer[1])["generation"])

    def begin(self, key: str, mark: str) -> str:
        return f"{key}.dtrain-part-{mark}"

    def put_part(self, key: str, upload: str, number: int, data: bytes) -> str:
        self.put(f"{upload}-{number:04d}", data, "", False, None)
        return f"{upload}-{number:04d}"

    def finish(self, key: str, upload: str, mark: str, receipts: list[str]) -> None:
        groups = [receipts[at : at + NUM_COMPOSED] for at in range(0, len(receipts), NUM_COMPOSED)]
        names = [f"{upload}-group-{number:04d}" for number in range(len(groups))] if len(groups) > 1 else []
        try:
            for name, group in zip(names, groups, strict=False):
                self._compose(name, group, "")
            self._compose(key, names or receipts, mark)
        except _Refused as error:
            # A try before this one may have composed it, and got no further than to delete some of the parts.
            if error.status != 404 or self.facts(key)[2] != mark:
                raise
        self.delete([*receipts, *names])

    def abandon(self, key: str, upload: str, num_parts: int) -> None:
        groups = [f"{upload}-group-{number:04d}" for number in range(math.ceil(num_parts / NUM_COMPOSED))]
        self.delete([*(f"{upload}-{number:04d}" for number in range(1, num_parts + 1)), *groups])

    def entries(self, prefix: str) -> list[Entry]:
        pages = self._pages(prefix=prefix, fields="items(name,size,generation),nextPageToken")
        return [Entry(o["name"], int(o["size"]), str(o["generation"])) for page in pages for o in page.get("items", ())]

    def folders(self, prefix: str) -> list[str]:
        pages = self._pages(prefix=prefix, delimiter="/", fields="prefixes,nextPageToken")
        return [name[len(prefix) : -1] for page in pages for name in page.get("prefixes", ())]

    def delete(self, keys: list[str]) -> None:
        async def one(key: str) -> None:
            try:
                await self._request("DELETE", self._url(key))
            except _Refused as error:
                if error.status != 404 or _is_of_bucket(error.text):
                    raise

        delete_each(self, keys, one)

    def answer(self, error: Exception) -> Answer:
        if not isinstance(error, _Refused):
            return _without_answer(error)
        status, text = error.status, f"{error.status}: {error.text}"
        kinds: dict[int, Kind] = {304: "unchanged", 412: "conflict", 401: "no credentials", 403: "denied", 404: "gone"}
        if status in (408, 429) or status >= 500:
            return Answer("again", text)
        if status == 404 and _is_of_bucket(error.text):
            return Answer("no bucket", text)
        return Answer(kinds.get(status, "other"), text)

    # -- parts of the above --------------------------------------------------------------------------------------

    def _compose(self, key: str, sources: list[str], mark: str) -> None:
        said = {"sourceObjects": [{"name": name} for name in sources], "destination": {"metadata": {MARK: mark}}}
        headers = {"Content-Type": "application/json"}
        self._call("POST", f"{self._url(key)}/compose", headers=headers, data=io.BytesIO(json.dumps(said).encode()))

    def _pages(self, **words: str) -> list[Any]:
        pages: list[Any] = []
        token: str | None = None
        while not pages or token:
            pages.append(json.loads(self._call("GET", self._url(), pageToken=token, **words)[1]))
            token = pages[-1].get("nextPageToken")
        return pages

    def _url(self, key: str | None = None) -> str:
        at = f"{self.files.base}b/{quote(self._bucket, safe='')}/o"
        return at if key is None else f"{at}/{quote(key, safe='')}"

    def _object(self, method: str, key: str, **words: Any) -> tuple[Mapping[str, str], bytes]:
        return self._call(method, self._url(key), **words)

    def _call(self, method: str, url: str, **words: Any) -> tuple[Mapping[str, str], bytes]:
        answer: tuple[Mapping[str, str], bytes] = wait_for(self, lambda: self._request(method, url, **words))
        return answer

    async def _request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None = None,
        data: io.BytesIO | None = None,
        **parameters: str | None,
    ) -> tuple[Mapping[str, str], bytes]:
        import yarl

        session = await self.files._set_session()
        async with session.request(
            method,
            yarl.URL(url, encoded=True),
            params=self.files._get_params(parameters),
            headers=self.files._get_headers(headers),
            data=data,
        ) as answer:
            content = await answer.read()
            if answer.status >= 300:
                raise _Refused(answer.status, _text_of(content) or str(answer.reason))
            return answer.headers, content


class _Refused(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


def _text_of(content: bytes) -> str:
    """What an error's body says."""
    try:
        said = json.loads(content)["error"]
        return str(said["message"] if isinstance(said, dict) else said)
    except (ValueError, KeyError, TypeError):
        return content.decode(errors="replace").strip()[:200]


def _is_of_bucket(text: str) -> bool:
    return "bucket" in text.lower() and "object" not in text.lower()


def _without_answer(error: Exception) -> Answer:
    import aiohttp
    from google.auth import exceptions as auth

    text = f"{type(error).__name__}: {error}"
    if isinstance(error, auth.TransportError):
        return Answer("again", text)
    if isinstance(error, auth.GoogleAuthError):
        return Answer("no credentials", str(error))
    if isinstance(error, aiohttp.ClientError | ConnectionError | TimeoutError | asyncio.TimeoutError):
        return Answer("again", text)
    return Answer("other", text)
