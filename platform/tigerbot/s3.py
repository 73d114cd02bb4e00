"""Speaking to S3: the client, which errors a retry can help, and what the others say to a person."""

from __future__ import annotations

import base64
import hashlib
import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from boto3.session import Session
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    EndpointConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
)
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from tigerbot.errors import CorruptError, StorageError, UnusableStorageError
from tigerbot.staging import MissingError

T = TypeVar("T")

FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 20.0
_CODES_AGAIN = {
    "BadDigest",
    "IncompleteBody",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "RequestTimeTooSkewed",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "XAmzContentSHA256Mismatch",
}
_KEYS_FIX = "correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN, if they are temporary)"
_REFUSALS = {
    "NoSuchBucket": ("the bucket does not exist", "make it, or correct storage.uri and AWS_ENDPOINT_URL"),
    "InvalidAccessKeyId": ("the service does not know this access key", _KEYS_FIX),
    "InvalidClientTokenId": ("the service does not know this access key", _KEYS_FIX),
    "SignatureDoesNotMatch": ("the secret key does not fit the access key", _KEYS_FIX),
    "ExpiredToken": ("the credentials have expired", "get new ones"),
    "AccessDenied": ("these credentials may not do this", "give them read, write, list and delete on the bucket"),
    "403": ("these credentials may not do this", "correct the keys, or give them read and list on the bucket"),
    "InvalidBucketName": ("is no name a bucket can have", "correct storage.uri"),
}


class DiffersError(Exception):
    """What arrived is not what was sent: worth another attempt."""


_CUT_SHORT = (
    DiffersError,
    EndpointConnectionError,
    HTTPClientError,
    HTTPError,
    IncompleteReadError,
    ResponseParserError,
)


def connect(connect_timeout_s: float, read_timeout_s: float, connections: int) -> Any:
    """A boto3 S3 client whose only retries are ours."""
    own_endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    config = Config(
        connect_timeout=connect_timeout_s,
        read_timeout=read_timeout_s,
        max_pool_connections=max(connections, 10),
        retries={"total_max_attempts": 1},
        # MinIO and its like answer to host/bucket, not to bucket.host, and know no checksum trailers.
        s3={"addressing_style": "path" if own_endpoint else "auto"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    session = Session()
    return session.client("s3", region_name=session.region_name or "us-east-1", config=config)


def retrying(call: Callable[[], T], *, where: str, attempts: int, sleep: Callable[[float], None]) -> T:
    """The result of a call, tried again with full jitter while that can help.

    Raises:
        MissingError: there is no such object.
        CorruptError: bytes still differ after the last attempt.
        StorageError: refused, or still failing after the last attempt.
    """
    for attempt in range(1, attempts + 1):
        try:
            return call()
        except (DiffersError, BotoCoreError, ClientError, HTTPError) as error:
            if not _may_help(error):
                raise _refused(error, where) from None
            if attempt == attempts:
                kind = CorruptError if isinstance(error, DiffersError) else StorageError
                raise kind(
                    f"failed {attempts} times, last: {_said(error)}",
                    where=where,
                    fix="check AWS_ENDPOINT_URL and the network; the same command continues",
                ) from None
        sleep(random.uniform(0, min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**attempt)))
    raise AssertionError("attempts is at least 1")


def error_code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def pages(call: Callable[[Callable[[], Any]], Any], listing: Callable[..., Any], **arguments: Any) -> Iterator[Any]:
    """The pages of a listing, each asked for through `call`, which retries."""
    while True:
        page = call(partial(_page, listing, **arguments))
        yield page
        if not page.get("IsTruncated"):
            return
        arguments |= {name.removeprefix("Next"): value for name, value in page.items() if name.startswith("Next")}


def whole(answer: dict[str, Any], field: str) -> dict[str, Any]:
    """The answer, if it has the field every such answer has: botocore reads one that was cut off as an empty one."""
    if field not in answer:
        raise DiffersError("the answer was cut off")
    return answer


def _page(listing: Callable[..., Any], **arguments: Any) -> dict[str, Any]:
    page = listing(**arguments)
    return whole(page, "Name" if "Name" in page else "Bucket")


def sent(put: Callable[..., Any], data: bytes, **named: Any) -> dict[str, Any]:
    """Send bytes with their checksum; the answer, if it speaks of these bytes.

    A service that says a SHA-256 has compared it with ours; one that only repeats what it was told is found out by
    the ETag, which is the bytes' MD5 unless the object is encrypted with a key of its own.
    """
    sha256 = sha256_base64(data)
    answer = put(**named, Body=data, ChecksumSHA256=sha256)
    own_key = str(answer.get("ServerSideEncryption", "")).startswith("aws:") or "SSECustomerAlgorithm" in answer
    same_md5 = own_key or answer["ETag"].strip('"') == md5(data)
    if answer.get("ChecksumSHA256", sha256) != sha256 or not same_md5:
        raise DiffersError("what arrived differs from what was sent")
    return answer


def deleted(client: Any, bucket: str, named: list[dict[str, str]]) -> None:
    """Delete objects, or say which one could not be."""
    answer = client.delete_objects(Bucket=bucket, Delete={"Objects": named})
    for error in answer.get("Errors", []):
        raise StorageError(f"cannot be deleted: {error.get('Message')}", where=error.get("Key", ""), fix="try again")
    if len(answer.get("Deleted", [])) != len(named):
        raise DiffersError("the answer was cut off")


def sha256_base64(data: bytes) -> str:
    return base64.b64encode(hashlib.sha256(data).digest()).decode()


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _may_help(error: Exception) -> bool:
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or status in (408, 429) or error_code(error) in _CODES_AGAIN
    return isinstance(error, _CUT_SHORT)


def _refused(error: Exception, where: str) -> StorageError:
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        fix = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile with AWS_PROFILE"
        return UnusableStorageError("there are no S3 credentials", where=where, fix=fix)
    if not isinstance(error, ClientError):
        return StorageError(_said(error), where=where, fix="correct the AWS settings")
    code = error_code(error)
    if code in ("NoSuchKey", "NoSuchUpload", "404"):
        return MissingError("is not there", where=where, fix="check the key")
    if code in _REFUSALS:
        what, fix = _REFUSALS[code]
        return UnusableStorageError(what, where=where, fix=fix)
    return StorageError(_said(error), where=where, fix="correct storage.uri or the AWS settings")


def _said(error: Exception) -> str:
    if isinstance(error, ClientError):
        error_said = error.response.get("Error", {}).get("Message", "")
        text = f"{error.operation_name} answered {error_code(error)} {error_said}".strip()
    else:
        text = " ".join(str(error).split())
    return text if len(text) <= 160 else text[:157] + "..."
