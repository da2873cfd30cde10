"""Azure Blob Storage and Data Lake, through adlfs. Credentials by Azure's standard chain, workload identity among them.

A container is `abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/FOLDER`, or `abfs://CONTAINER/FOLDER` where
AZURE_STORAGE_ACCOUNT_NAME or AZURE_STORAGE_CONNECTION_STRING says whose it is.
"""

import asyncio
import io
import logging
import os
from collections.abc import Mapping
from typing import Any

from dtrain.storage import Entry
from dtrain.storage.stores import Answer, Kind, Verb, delete_each, wait_for

MARK = "dtrain_mark"
ONCE: Mapping[str, int] = {"retry_total": 0}
"""Only one hand may try again."""


def connect(bucket: str) -> "Abfs":
    return Abfs(bucket)


class Abfs:
    """One container (`dtrain.storage.stores.Store`)."""

    max_parts = 50_000
    remedies: Mapping[Kind, str] = {
        "again": "check the network, and the name of the storage account",
        "denied": "ask who looks after the container for the role Storage Blob Data Contributor",
        "no bucket": "make it, or correct the name and the account's",
        "no credentials": "run `az login`, or give the pod's service account a workload identity",
    }
    permissions: Mapping[Verb, str] = {
        "read": "blobs/read",
        "written": "blobs/write",
        "listed": "blobs/read",
        "deleted": "blobs/delete",
    }

    def __init__(self, bucket: str) -> None:
        import adlfs  # type: ignore[import-not-found, import-untyped, unused-ignore]

        logging.getLogger("azure.identity").setLevel(logging.ERROR)  # it tells each way in that is not set up
        container, _, host = bucket.partition("@")
        if not host and not {"AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_CONNECTION_STRING"} & set(os.environ):
            raise ValueError(
                f"whose container is it? Write abfs://{container}@ACCOUNT.dfs.core.windows.net,"
                " or set AZURE_STORAGE_ACCOUNT_NAME"
            )
        account = {"account_name": host.split(".")[0]} if host else {}
        self.files = adlfs.AzureBlobFileSystem(skip_instance_cache=True, use_listings_cache=False, **account)
        self._container = self.files.service_client.get_container_client(container)

    def get(self, key: str, known: str | None = None) -> tuple[bytes, str]:
        from azure.core import MatchConditions  # type: ignore[import-not-found, import-untyped, unused-ignore]

        return self._read(key, {} if known is None else _if(MatchConditions.IfModified, known))

    def get_range(self, key: str, version: str, start: int, stop: int) -> bytes:
        from azure.core import MatchConditions  # type: ignore[import-not-found, import-untyped, unused-ignore]

        return self._read(
            key, {"offset": start, "length": stop - start, **_if(MatchConditions.IfNotModified, version)}
        )[0]

    def facts(self, key: str) -> tuple[int, str, str]:
        found = wait_for(self, lambda: self._blob(key).get_blob_properties(**ONCE))
        return int(found.size), _plain(found.etag), (found.metadata or {}).get(MARK, "")

    def put(self, key: str, data: bytes, mark: str, if_absent: bool, if_version: str | None) -> str:
        from azure.core import MatchConditions  # type: ignore[import-not-found, import-untyped, unused-ignore]

        condition = _if(MatchConditions.IfNotModified, if_version) if if_version is not None else {}
        words = {"metadata": {MARK: mark} if mark else None, **condition, **ONCE}
        done = wait_for(self, lambda: self._blob(key).upload_blob(io.BytesIO(data), overwrite=not if_absent, **words))
        return _plain(done["etag"])

    def begin(self, key: str, mark: str) -> str:
        return mark

    def put_part(self, key: str, upload: str, number: int, data: bytes) -> str:
        block = f"{upload}-{number:05d}"
        wait_for(self, lambda: self._blob(key).stage_block(block, io.BytesIO(data), length=len(data), **ONCE))
        return block

    def finish(self, key: str, upload: str, mark: str, receipts: list[str]) -> None:
        from azure.storage.blob import BlobBlock  # type: ignore[import-not-found, import-untyped, unused-ignore]

        blocks = [BlobBlock(block_id=block) for block in receipts]
        wait_for(self, lambda: self._blob(key).commit_block_list(blocks, metadata={MARK: mark}, **ONCE))

    def abandon(self, key: str, upload: str, num_parts: int) -> None:
        """Nothing to do: the store forgets blocks that were not committed within a week."""

    def entries(self, prefix: str) -> list[Entry]:
        async def pages() -> list[Entry]:
            found = self._container.list_blobs(name_starts_with=prefix, include=["metadata"], **ONCE)
            # Where names are a real tree, its folders are listed too.
            return [
                Entry(blob.name, int(blob.size), _plain(blob.etag))
                async for blob in found
                if (blob.metadata or {}).get("hdi_isfolder") != "true"
            ]

        listed: list[Entry] = wait_for(self, pages)
        return listed

    def folders(self, prefix: str) -> list[str]:
        async def pages() -> list[str]:
            found = self._container.walk_blobs(name_starts_with=prefix, delimiter="/", **ONCE)
            return [item.name[len(prefix) : -1] async for item in found if item.name.endswith("/")]

        listed: list[str] = wait_for(self, pages)
        return listed

    def delete(self, keys: list[str]) -> None:
        from azure.core.exceptions import ResourceNotFoundError  # type: ignore[import-not-found, import-untyped, unused-ignore]

        async def one(key: str) -> None:
            try:
                await self._blob(key).delete_blob(**ONCE)
            except ResourceNotFoundError as error:
                if str(error.error_code) == "ContainerNotFound":
                    raise

        delete_each(self, keys, one)

    def answer(self, error: Exception) -> Answer:
        from azure.core import exceptions as azure  # type: ignore[import-not-found, import-untyped, unused-ignore]

        text = str(getattr(error, "reason", None) or getattr(error, "message", None) or error).splitlines()[0]
        code = str(getattr(error, "error_code", None) or "")
        status = getattr(error, "status_code", None) or 0
        if isinstance(error, azure.HttpResponseError) and status:
            return Answer(_kind(status, code), f"{code or status}: {text}")
        if isinstance(error, azure.ClientAuthenticationError):
            return Answer("no credentials", text)
        lost = (azure.ServiceRequestError, azure.ServiceResponseError, azure.HttpResponseError)
        if isinstance(error, (*lost, ConnectionError, TimeoutError, asyncio.TimeoutError)):
            return Answer("again", f"{type(error).__name__}: {text}")
        return Answer("other", f"{type(error).__name__}: {text}")

    # -- parts of the above --------------------------------------------------------------------------------------

    def _blob(self, key: str) -> Any:
        return self._container.get_blob_client(key)

    def _read(self, key: str, words: Mapping[str, Any]) -> tuple[bytes, str]:
        async def whole() -> tuple[bytes, str]:
            stream = await self._blob(key).download_blob(**words, **ONCE)
            return await stream.readall(), _plain(stream.properties.etag)

        found: tuple[bytes, str] = wait_for(self, whole)
        return found


def _if(condition: Any, version: str) -> dict[str, Any]:
    return {"etag": f'"{version}"', "match_condition": condition}


def _plain(etag: str) -> str:
    """Some answers quote it, and listings do not."""
    return str(etag).strip('"')


def _kind(status: int, code: str) -> Kind:
    if code in ("ContainerNotFound", "ContainerBeingDeleted"):
        return "no bucket"
    if status in (408, 429) or status >= 500:
        return "again"
    if status == 412 or code == "BlobAlreadyExists":
        return "conflict"
    if status == 401 or code in ("AuthenticationFailed", "InvalidAuthenticationInfo", "NoAuthenticationInformation"):
        return "no credentials"
    kinds: dict[int, Kind] = {304: "unchanged", 403: "denied", 404: "gone", 409: "again"}
    return kinds.get(status, "other")
