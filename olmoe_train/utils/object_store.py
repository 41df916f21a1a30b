"""Objects in s3://, gs://, hf:// and file://, through fsspec. Every access to a store goes through this
module.

Transient errors (a reset connection, a timeout, an answer 5xx or 429) are retried with exponential back-off
and jitter; after the last attempt they are a StoreError. Missing objects, refused access and missing packages
are not retried: they are a UserError that says what to do. Credentials come from the environment, never from
a URL.
"""

import errno
import hashlib
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from olmoe_train.utils.errors import UserError
from olmoe_train.utils.redaction import redact_text

log = logging.getLogger(__name__)
Result = TypeVar("Result")

ATTEMPTS = 9
"""Attempts of one operation. With the waits below, a store may be away for about 45 s."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 30.0
REQUEST_ATTEMPTS = 4
"""Attempts of one HTTP request of s3fs, within an operation: a part of a large upload is sent again alone."""
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10, 60
_JITTER = random.Random()
"""Of its own: checkpoints hold the state of the global generator."""
RANGE_BYTES = 64 * 1024**2
"""Bytes that one request of a download reads."""

CACHE_VARIABLE = "OLMOE_TRAIN_CACHE"
_VERSION_MARKS = ("ETag", "etag", "md5Hash", "generation", "blob_id", "LastModified", "mtime")
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}
_EXTRAS = {"s3": "s3", "gs": "gcs"}
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the role of the machine; and "
    "AWS_ENDPOINT_URL for a store that is not Amazon's",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or the service account of the machine",
    "hf": "HF_TOKEN, or `hf auth login`",
    "file": "the permissions of the directory",
}
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
_PERMANENT_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EINVAL, errno.EACCES}
_CLIENTS = (
    "aiobotocore",
    "aiohttp",
    "botocore",
    "gcsfs",
    "google",
    "httpcore",
    "httpx",
    "requests",
    "urllib3",
)
_NO_CREDENTIALS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "DefaultCredentialsError",
)
_TOO_MANY = 429


class StoreError(OSError):
    """A store did not do what it was asked, although it may do so later: restarting the run may help."""


def is_remote(path: str | Path) -> bool:
    """Whether `path` is a URL, such as s3://bucket/key, and not a path of this machine."""
    return isinstance(path, str) and "://" in path


def url_error(key: str, url: str) -> str | None:
    """The message about a URL that cannot be used as the value of `key`. None: it can."""
    scheme, _, rest = url.partition("://")
    shown = redact_text(url)
    if scheme not in _CREDENTIALS:
        return f"{key}={shown}: unknown kind of store; use s3://, gs://, hf:// or file://"
    if not rest.strip("/") or (scheme == "file" and not rest.startswith("/")):
        form = "file:///absolute/path" if scheme == "file" else f"{scheme}://BUCKET/PATH"
        return f"{key}={shown}: incomplete; write {form}"
    if scheme != "hf" and "@" in rest.partition("/")[0]:
        variables = _CREDENTIALS[scheme].partition(";")[0]
        return f"{key}={shown}: credentials do not belong into a URL; set {variables}"
    return None


def missing_package(key: str, url: str) -> str | None:
    """The message about the package that the URL needs, the value of `key`. None: it is there."""
    scheme = url.partition("://")[0]
    package = _PACKAGES.get(scheme)
    if package is None or find_spec(package) is not None:
        return None
    install = f"pip install 'olmoe-train[{_EXTRAS[scheme]}]'"
    return f"{key}={redact_text(url)}: {scheme}:// needs the package {package}: {install}"


def join(url: str, *names: str) -> str:
    """Append names to a URL."""
    return "/".join([url.rstrip("/"), *names])


def list_files(url: str) -> dict[str, int]:
    """The sizes in bytes of the objects directly in `url`, by name; {} if there is nothing."""
    return {name: int(entry["size"]) for name, entry in _list(url) if entry["type"] != "directory"}


def list_versions(url: str) -> dict[str, tuple[int, str]]:
    """(size in bytes, what changes with the contents) of the objects directly in `url`, by name."""
    found = {}
    for name, entry in _list(url):
        if entry["type"] != "directory":
            marks = [str(entry[mark]) for mark in _VERSION_MARKS if entry.get(mark) is not None]
            found[name] = (int(entry["size"]), " ".join([str(entry["size"]), *marks]))
    return found


def cache_root(directory: str | None = None) -> Path:
    """The directory of this machine for what is read of stores.

    Args:
        directory: None: the environment variable OLMOE_TRAIN_CACHE, or ~/.cache/olmoe-train.
    """
    root = directory or os.environ.get(CACHE_VARIABLE) or "~/.cache/olmoe-train"
    return Path(root).expanduser().absolute()


def cached_directory(kind: str, url: str, root: Path | None = None) -> Path:
    """The directory in the cache, made if it is missing, for `url`. Its parent is named `kind`."""
    name = re.sub(r"[^\w.-]", "_", url.rstrip("/").rpartition("/")[2])
    digest = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:12]
    directory = (root or cache_root()) / kind / f"{name}-{digest}"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def list_directories(url: str) -> list[str]:
    """The names of the directories directly in `url`; [] if there is nothing."""
    return [name for name, entry in _list(url) if entry["type"] == "directory"]


def read(url: str, start: int | None = None, stop: int | None = None) -> bytes:
    """The bytes [start, stop) of an object, or all of them.

    Raises:
        UserError: There is no such object, or access is refused.
        StoreError: The store does not answer.
    """

    def once(files: Any, path: str) -> bytes:
        found: bytes = files.cat_file(path, start=start, end=stop)
        if start is not None and stop is not None and len(found) != stop - start:
            raise ConnectionError(f"{len(found):,} bytes came of the {stop - start:,} asked for")
        return found

    return _with_retries(url, once)


def write(url: str, content: bytes) -> None:
    """Create or replace a small object. Readers see the old or the new contents."""
    _with_retries(url, lambda files, path: _atomically(files, path, lambda to: files.pipe_file(to, content)))


def upload(local: Path, url: str) -> None:
    """Create or replace an object with a file's contents. It appears when all of it has arrived."""
    assert local.is_file(), local
    _with_retries(
        url, lambda files, path: _atomically(files, path, lambda to: files.put_file(str(local), to))
    )


def download(url: str, local: Path, size: int, on_progress: Callable[[], None] = lambda: None) -> None:
    """Bring an object into a file, range by range. What the file has already is not read again.

    Args:
        url: The object.
        local: The file; it is created if it is missing. The caller checks its contents, by their hash.
        size: Bytes of the object.
        on_progress: Called after every range.
    """
    with local.open("ab") as file:
        for start in range(file.tell(), size, RANGE_BYTES):
            file.write(read(url, start, min(start + RANGE_BYTES, size)))
            on_progress()


def delete(urls: Iterable[str]) -> None:
    """Delete objects, one after the other. One that is missing already is passed over."""

    def once(files: Any, path: str) -> None:
        with suppress(FileNotFoundError):
            files.rm_file(path)

    for url in urls:
        _with_retries(url, once)


def _list(url: str) -> list[tuple[str, dict[str, Any]]]:
    def once(files: Any, path: str) -> list[dict[str, Any]]:
        files.invalidate_cache()
        try:
            return list(files.ls(path, detail=True))
        except FileNotFoundError:
            return []

    entries = [(entry["name"].rstrip("/").rpartition("/")[2], entry) for entry in _with_retries(url, once)]
    own = url.rstrip("/").partition("://")[2].strip("/")  # some stores keep an empty object for a directory
    return [(name, entry) for name, entry in entries if entry["name"].strip("/") != own]


def _atomically(files: Any, path: str, put: Callable[[str], None]) -> None:
    """Write through a temporary name where the store would show half an object: a local file system."""
    if "file" not in files.protocol:
        put(path)
        return
    temporary = f"{path}.{os.getpid():x}-{time.monotonic_ns():x}.tmp"
    put(temporary)
    files.mv(temporary, path)


def _with_retries(url: str, operation: Callable[[Any, str], Result]) -> Result:
    """Call operation(file system, path), again after transient errors.

    Raises:
        UserError: It cannot succeed before the user acts.
        StoreError: It failed ATTEMPTS times.
    """
    shown = redact_text(url)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return operation(*_filesystem(url))
        except Exception as error:
            if isinstance(error, UserError):
                raise
            reason = redact_text(f"{type(error).__name__}: {error}".strip(": \n")).splitlines()[0]
            if not _is_transient(error):
                raise UserError(_explained(shown, error, reason)) from None
            if attempt == ATTEMPTS:
                message = f"{shown}: failed {ATTEMPTS} times, the last time with {reason}"
                raise StoreError(message) from None
            wait = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (attempt - 1)) * _JITTER.uniform(0.5, 1.0)
            # A single error is no news: stores ask clients to retry.
            level = logging.WARNING if attempt > 1 else logging.DEBUG
            message = "warning: %s: attempt %d of %d failed (%s); the next one is in %.1f s"
            log.log(level, message, shown, attempt, ATTEMPTS, reason, wait)
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it. Each process gets its own, a forked one too."""
    import fsspec  # takes a fifth of a second to import, and is rarely needed

    if (error := url_error("url", url) or missing_package("url", url)) is not None:
        raise UserError(error.removeprefix("url="))
    scheme = url.partition("://")[0]
    files = fsspec.filesystem(scheme, **_options(scheme))
    if scheme == "s3":
        files.retries = 1  # botocore and this module retry
    return files, files._strip_protocol(url)


def _options(scheme: str) -> dict[str, Any]:
    if scheme == "file":
        return {"auto_mkdir": True}
    if scheme != "s3":
        return {}
    timeouts = {"connect_timeout": CONNECT_TIMEOUT_S, "read_timeout": READ_TIMEOUT_S}
    retries = {"mode": "standard", "total_max_attempts": REQUEST_ATTEMPTS}
    return {"use_listings_cache": False, "config_kwargs": {**timeouts, "retries": retries}}


def _is_transient(error: Exception) -> bool:
    """Whether the same operation may succeed a moment later."""
    if isinstance(error, _PERMANENT) or type(error).__name__ in _NO_CREDENTIALS:
        return False
    status = _http_status(error)
    if status is not None:
        return status >= 500 or status in (408, _TOO_MANY)
    if isinstance(error, OSError):
        return error.errno not in _PERMANENT_ERRNOS
    if "ParamValidation" in type(error).__name__:
        return False
    return isinstance(error, TimeoutError) or type(error).__module__.startswith(_CLIENTS)


def _http_status(error: Exception) -> int | None:
    """The status of the HTTP answer that an error reports, if it tells."""
    answer = getattr(error, "response", None)
    candidates = [getattr(error, "code", None), getattr(error, "status", None)]
    candidates.append(getattr(answer, "status_code", None))
    if isinstance(answer, dict):  # botocore's
        candidates.append(answer.get("ResponseMetadata", {}).get("HTTPStatusCode"))
    for one in candidates:
        if str(one).isdecimal():
            return int(str(one))
    return None


def _explained(shown: str, error: Exception, reason: str) -> str:
    scheme = shown.partition("://")[0]
    if isinstance(error, FileNotFoundError):
        return f"{shown}: there is no such object, or no such bucket"
    if isinstance(error, PermissionError) or type(error).__name__ in _NO_CREDENTIALS:
        return f"{shown}: access is refused ({reason}).\n  Credentials: {_CREDENTIALS[scheme]}"
    return f"{shown}: {reason}"
