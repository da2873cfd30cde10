"""Amazon S3 and what speaks its protocol, through s3fs. Credentials, region and endpoint: the standard chain of AWS."""

import asyncio
from collections.abc import Iterator, Mapping
from typing import Any

from dtrain.storage import Entry
from dtrain.storage.stores import Answer, Kind, Verb, wait_for

MARK = "dtrain-mark"
CREDENTIALS = "set AWS_PROFILE or AWS_ACCESS_KEY_ID, or give the pod's service account a role"
TRANSIENT = {"RequestTimeout", "SlowDown", "InternalError", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"}
NO_CREDENTIALS = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "InvalidAccessKeyId", "SignatureDoesNotMatch"}


def connect(bucket: str) -> "S3":
    return S3(bucket)


class S3:
    """One bucket (`dtrain.storage.stores.Store`)."""

    max_parts = 10_000
    remedies: Mapping[Kind, str] = {
        "again": "check the network, and AWS_ENDPOINT_URL if it is not Amazon's own",
        "denied": "ask who looks after the bucket, or use another profile (AWS_PROFILE)",
        "no bucket": "make it, or correct the name; AWS_ENDPOINT_URL says whose it is, if not Amazon's own",
        "no credentials": CREDENTIALS,
    }
    permissions: Mapping[Verb, str] = {
        "read": "s3:GetObject (and s3:ListBucket, without which what is missing is refused too)",
        "written": "s3:PutObject",
        "listed": "s3:ListBucket",
        "deleted": "s3:DeleteObject",
    }

    def __init__(self, bucket: str) -> None:
        import s3fs

        self._bucket = bucket
        # Only one hand may try again: of a conditional write it must be known that it was tried before.
        config = {
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": 32,
            "connect_timeout": 10,
            "read_timeout": 60,
        }
        self.files = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False, config_kwargs=config)
        self.files.retries = 1

    def get(self, key: str, known: str | None = None) -> tuple[bytes, str]:
        return self._get(Key=key, **({} if known is None else {"IfNoneMatch": known}))

    def get_range(self, key: str, version: str, start: int, stop: int) -> bytes:
        return self._get(Key=key, IfMatch=version, Range=f"bytes={start}-{stop - 1}")[0]

    def facts(self, key: str) -> tuple[int, str, str]:
        found = self._call("head_object", Key=key)
        return int(found["ContentLength"]), str(found["ETag"]), found.get("Metadata", {}).get(MARK, "")

    def put(self, key: str, data: bytes, mark: str, if_absent: bool, if_version: str | None) -> str:
        condition = {"IfNoneMatch": "*"} if if_absent else {"IfMatch": if_version} if if_version is not None else {}
        marked = {"Metadata": {MARK: mark}} if mark else {}
        return str(self._call("put_object", Key=key, Body=data, **marked, **condition)["ETag"])

    def begin(self, key: str, mark: str) -> str:
        return str(self._call("create_multipart_upload", Key=key, Metadata={MARK: mark})["UploadId"])

    def put_part(self, key: str, upload: str, number: int, data: bytes) -> str:
        return str(self._call("upload_part", Key=key, UploadId=upload, PartNumber=number, Body=data)["ETag"])

    def finish(self, key: str, upload: str, mark: str, receipts: list[str]) -> None:
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(receipts, start=1)]
        self._call("complete_multipart_upload", Key=key, UploadId=upload, MultipartUpload={"Parts": parts})

    def abandon(self, key: str, upload: str, num_parts: int) -> None:
        self._call("abort_multipart_upload", Key=key, UploadId=upload)

    def entries(self, prefix: str) -> list[Entry]:
        pages = self._pages(Prefix=prefix)
        return [Entry(o["Key"], int(o["Size"]), o["ETag"]) for page in pages for o in page.get("Contents", ())]

    def folders(self, prefix: str) -> list[str]:
        pages = self._pages(Prefix=prefix, Delimiter="/")
        return [o["Prefix"][len(prefix) : -1] for page in pages for o in page.get("CommonPrefixes", ())]

    def delete(self, keys: list[str]) -> None:
        answer = self._call("delete_objects", Delete={"Objects": [{"Key": key} for key in keys], "Quiet": True})
        for refused in answer.get("Errors", ()):
            raise _Refused(refused.get("Code", ""), f"{refused.get('Key')}: {refused.get('Message', '')}")

    def answer(self, error: Exception) -> Answer:
        if isinstance(error, _Refused):
            return _by_code(0, error.code, str(error))
        for nested in (error, error.__cause__):
            response = getattr(nested, "response", None)
            if isinstance(response, dict) and "Error" in response:
                status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
                code = str(response["Error"].get("Code", status))
                text = str(response["Error"].get("Message") or nested)
                return _by_code(status, code, text if code in text else f"{code}: {text}")
        return _without_answer(error)

    # -- parts of the above --------------------------------------------------------------------------------------

    def _get(self, **words: Any) -> tuple[bytes, str]:
        async def whole() -> tuple[bytes, str]:
            answer = await self.files._call_s3("get_object", Bucket=self._bucket, **words)
            async with answer["Body"] as body:
                return await body.read(), str(answer["ETag"])

        found: tuple[bytes, str] = wait_for(self, whole)
        return found

    def _call(self, operation: str, **words: Any) -> Any:
        return wait_for(self, lambda: self.files._call_s3(operation, Bucket=self._bucket, **words))

    def _pages(self, **words: Any) -> Iterator[Any]:
        while True:
            page = self._call("list_objects_v2", **words)
            yield page
            if not page.get("IsTruncated"):
                return
            words["ContinuationToken"] = page["NextContinuationToken"]


class _Refused(Exception):
    """One object of many could not be deleted."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


def _by_code(status: int, code: str, text: str) -> Answer:
    if status == 304:
        return Answer("unchanged", text)
    if code == "NoSuchBucket":
        return Answer("no bucket", text)
    if status == 412 or code == "PreconditionFailed":
        return Answer("conflict", text)
    if code in NO_CREDENTIALS:
        return Answer("no credentials", text)
    if code == "RequestTimeTooSkewed":
        return Answer("other", f"{text} Set this machine's clock.")
    if status == 403 or code == "AccessDenied":
        return Answer("denied", text)
    if status in (408, 409, 429) or status >= 500 or code in TRANSIENT or "Throttl" in code:
        return Answer("again", text)
    if status == 404:
        return Answer("gone", text)
    return Answer("other", text)


def _without_answer(error: Exception) -> Answer:
    import aiohttp
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError

    text = f"{type(error).__name__}: {error}"
    missing = (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError)
    profile = (boto.ProfileNotFound, boto.SSOError, boto.UnauthorizedSSOTokenError, boto.TokenRetrievalError)
    if isinstance(error, (*missing, *profile)):
        return Answer("no credentials", str(error))
    cut = (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, aiohttp.ClientError, ConnectionError)
    spoiled = (ResponseParserError, boto.FlexibleChecksumError, boto.ResponseStreamingError)
    if isinstance(error, (*cut, *spoiled, TimeoutError, asyncio.TimeoutError)):
        return Answer("again", text)
    return Answer("other", text)
