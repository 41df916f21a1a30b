"""Object stores over HTTP: what is retried, what is not, and what messages say."""

import logging
from pathlib import Path

import pytest

from olmoe_train.utils import object_store
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.object_store import StoreError, join, url_error
from tests.support.s3 import BUCKET, KEY_ID, SECRET, Fault, FaultyS3

TEXT = bytes(range(256)) * 400


@pytest.mark.parametrize("kind", ["500", "503", "reset", "cut", "slow", "stall"])
def test_bytes_arrive_whatever_the_connection_does(
    s3: FaultyS3, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "READ_TIMEOUT_S", 1)
    url = join(BUCKET, "a", "text")
    object_store.write(url, TEXT)
    s3.faults = [Fault(kind, "GET /bucket/a/text", times=2)]
    monkeypatch.setattr(object_store, "RANGE_BYTES", 40_000)  # three ranges
    object_store.download(url, tmp_path / "text", len(TEXT))
    assert (tmp_path / "text").read_bytes() == TEXT
    assert s3.count("GET /bucket/a/text") == (3 if kind == "slow" else 5)
    assert object_store.list_files(join(BUCKET, "a")) == {"text": len(TEXT)}


def test_an_upload_is_repeated_and_a_deletion_is_complete(s3: FaultyS3, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(TEXT)
    urls = [join(BUCKET, "dir", name) for name in ("one", "two")]
    s3.faults = [Fault("503", "PUT /bucket/dir/one"), Fault("reset", "PUT /bucket/dir/two")]
    for url in urls:
        object_store.upload(tmp_path / "file", url)
        assert object_store.read(url, 255, 258) == TEXT[255:258]
    assert object_store.list_directories(BUCKET) == ["dir"]
    s3.faults = [Fault("500", "DELETE|POST")]
    object_store.delete([*urls, urls[0]])
    assert object_store.list_files(join(BUCKET, "dir")) == {}


def test_what_cannot_succeed_is_asked_for_once_and_explained(
    s3: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="s3://bucket/none: there is no such object"):
        object_store.read(join(BUCKET, "none"), 0, 9)
    s3.faults = [Fault("403", "/bucket/mine", times=9)]
    with pytest.raises(UserError, match=r"(?s)s3://bucket/mine: access is refused.*AWS_ACCESS_KEY_ID"):
        object_store.read(join(BUCKET, "mine"), 0, 9)
    assert (s3.count("/bucket/none"), s3.count("/bucket/mine")) == (1, 1)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    type(object_store._filesystem(BUCKET)[0]).clear_instance_cache()
    with pytest.raises(UserError, match=r"(?s)access is refused.*Unable to locate credentials"):
        object_store.read(join(BUCKET, "mine"))


def test_a_store_that_stays_away_is_named_and_its_credentials_are_not(
    s3: FaultyS3, caplog: pytest.LogCaptureFixture
) -> None:
    s3.faults = [Fault("500", "GET", times=100)]
    url = join(BUCKET, "x?X-Amz-Credential=" + KEY_ID)
    with (
        caplog.at_level(logging.DEBUG, "olmoe_train"),
        pytest.raises(StoreError, match="failed 9 times") as e,
    ):
        object_store.read(url)
    assert s3.count("GET") == object_store.ATTEMPTS
    said = caplog.text + str(e.value)
    assert "attempt 8 of 9 failed" in said
    assert KEY_ID not in said
    assert SECRET not in said


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/x", "k=ftp://host/x: unknown kind of store"),
        ("s3://", "k=s3://: incomplete; write s3://BUCKET/PATH"),
        ("file://relative/x", "k=file://relative/x: incomplete; write file:///absolute/path"),
        ("s3://me:secret@bucket/x", "credentials do not belong into a URL"),
        ("hf://datasets/me/data@main/x", None),
    ],
)
def test_urls_are_checked_and_their_secrets_hidden(url: str, message: str | None) -> None:
    error = url_error("k", url)
    assert (error is None) if message is None else (error is not None and message in error)
    assert "me:secret" not in str(error)


def test_a_missing_package_is_named_with_its_extra() -> None:
    with pytest.raises(UserError, match=r"gs:// needs the package gcsfs: pip install 'olmoe-train\[gcs\]'"):
        object_store.read("gs://bucket/x")


def test_files_of_this_machine_appear_whole(tmp_path: Path) -> None:
    source, url = tmp_path / "source", f"file://{tmp_path}/new/object"
    source.write_bytes(TEXT)
    object_store.upload(source, url)
    assert object_store.read(url, 1, 3) == TEXT[1:3]
    assert object_store.list_files(f"file://{tmp_path}/new") == {"object": len(TEXT)}


@pytest.mark.parametrize(
    ("status", "is_transient"),
    [(500, True), (503, True), (429, True), (408, True), (400, False), (404, False)],
)
def test_answers_of_other_stores_are_retried_by_their_status(status: int, is_transient: bool) -> None:
    class HttpError(OSError):  # as gcsfs raises it
        code = status

    assert object_store._is_transient(HttpError("injected")) is is_transient
