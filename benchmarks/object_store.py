"""Prepared data and checkpoints in an object store, against the local disk; and s3fs against obstore.

    pip install moto[s3] flask flask-cors s3fs obstore
    python -m benchmarks.object_store --rounds 5

The store is moto's server in a process of its own, on the same machine: no network, and a server in Python
that takes more of the cores than a client. So the rates are a lower bound, and the CPU time of the client
alone, which is measured too, compares the clients. Rounds are interleaved, after one that does not count.
"""

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from benchmarks.common import EOS, write_prepared
from olmoe_train.config.data import DataConfig
from olmoe_train.data.remote import local_directory
from olmoe_train.data.tokens import TokenSplit, open_split
from olmoe_train.utils import object_store
from olmoe_train.utils.files import fsync_path

URL = "s3://bucket"
SAMPLE, DOCUMENT = 4096, 2000  # tokens
Measured = dict[str, list[tuple[float, float]]]
"""(seconds, CPU seconds of this process) of each round, by name."""


def start_server() -> subprocess.Popen[bytes]:
    """Start moto's server on a free port, and name it in the environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    endpoint = f"http://127.0.0.1:{port}"
    os.environ |= {"AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark"}
    for _ in range(100):
        try:
            urllib.request.urlopen(urllib.request.Request(f"{endpoint}/bucket", method="PUT")).close()
            return server
        except OSError:
            time.sleep(0.2)
    raise RuntimeError("moto's server did not start")


def measure(
    variants: Mapping[str, Callable[[], object]], rounds: int, before: Callable[[], None]
) -> Measured:
    """Run each variant once per round, all of them in turn, with `before` in front of each."""
    found: Measured = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, variant in variants.items():
            before()
            started, cpu = time.perf_counter(), time.process_time()
            variant()
            if number:
                found[name].append((time.perf_counter() - started, time.process_time() - cpu))
    return found


def show(title: str, found: Measured, size: int, reference: str) -> None:
    """Print medians, and the median of the ratios to `reference` in the same round."""
    print(f"\n{title} ({size / 1e6:.0f} MB)\n\n| Variant | s | MB/s | Time / {reference} | Client CPU, s |")
    print("|---|---|---|---|---|")
    for name, rounds in found.items():
        seconds = statistics.median(one for one, _ in rounds)
        ratio = statistics.median(
            one / other for (one, _), (other, _) in zip(rounds, found[reference], strict=True)
        )
        cpu = statistics.median(one for _, one in rounds)
        print(
            f"| {name} | {seconds:.3f} | {size / 1e6 / seconds:.0f} | {ratio:.2f} | {cpu:.3f} |", flush=True
        )


def read_samples(split: TokenSplit, order: np.ndarray) -> int:
    """Read all samples in the given order."""
    return sum(int(split.read(int(one) * SAMPLE, int(one + 1) * SAMPLE)[0]) for one in order)


def shards(root: Path, rounds: int, megabytes: int) -> None:
    """Read a training split sample by sample in a random order: disk, warm cache, cold cache."""
    generator = np.random.default_rng(0)
    tokens_DT = generator.integers(2, 50_000, (megabytes * 500_000 // DOCUMENT, DOCUMENT), np.uint16)
    tokens_DT[:, -1] = EOS
    local = write_prepared(root / "prepared", list(tokens_DT), list(tokens_DT[:2]), vocab_size=50_000)
    for path in local.rglob("*"):
        if path.is_file():
            object_store.upload(path, object_store.join(URL, "prepared", *path.relative_to(local).parts))
    remote = DataConfig(dir=object_store.join(URL, "prepared"), cache_dir=str(root / "cache"))
    directory = local_directory(remote, remote.dir)
    order = generator.permutation(len(open_split(local, "train")) // SAMPLE)

    def cold() -> int:
        shutil.rmtree(root / "cache" / "blocks", ignore_errors=True)
        return read_samples(open_split(directory, "train"), order)

    variants = {
        "disk (memory map)": lambda: read_samples(open_split(local, "train"), order),
        "store, cold cache": cold,
        "store, warm cache": lambda: read_samples(open_split(directory, "train"), order),
    }
    found = measure(variants, rounds, lambda: None)
    show("Reading all samples in a random order", found, len(order) * SAMPLE * 2, "disk (memory map)")


def ranges(rounds: int, megabytes: int, block: int) -> None:
    """Read an object by ranges, one after the other: s3fs through the seam, and obstore."""
    import obstore
    from obstore.store import S3Store

    object_store.write(object_store.join(URL, "object"), os.urandom(megabytes * 10**6))
    store = S3Store("bucket", endpoint=os.environ["AWS_ENDPOINT_URL"], client_options={"allow_http": True})
    starts = range(0, megabytes * 10**6 - block + 1, block)
    variants = {
        "s3fs": lambda: [object_store.read(f"{URL}/object", at, at + block) for at in starts],
        "obstore": lambda: [
            bytes(obstore.get_range(store, "object", start=at, length=block)) for at in starts
        ],
    }
    found = measure(variants, rounds, lambda: None)
    show(f"Reading ranges of {block / 2**20:g} MiB", found, len(starts) * block, "s3fs")


def uploads(root: Path, rounds: int, megabytes: int) -> None:
    """Write a file: to the disk with fsync, with s3fs through the seam, and with obstore."""
    import obstore
    from obstore.store import S3Store

    source, copy = root / "shard", root / "copy"
    source.write_bytes(os.urandom(megabytes * 10**6))
    store = S3Store("bucket", endpoint=os.environ["AWS_ENDPOINT_URL"], client_options={"allow_http": True})

    def to_disk() -> None:
        shutil.copyfile(source, copy)
        fsync_path(copy)

    variants: dict[str, Callable[[], object]] = {
        "disk (copy, fsync)": to_disk,
        "s3fs": lambda: object_store.upload(source, f"{URL}/shard"),
        "obstore": lambda: obstore.put(store, "shard", source),
    }
    found = measure(variants, rounds, lambda: None)
    show("Writing a file of a checkpoint", found, megabytes * 10**6, "disk (copy, fsync)")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=100)
    arguments = parser.parse_args()
    server = start_server()
    try:
        with tempfile.TemporaryDirectory() as directory:
            root = Path(directory)
            shards(root, arguments.rounds, arguments.megabytes)
            for block in (1024**2, 16 * 1024**2):
                ranges(arguments.rounds, arguments.megabytes, block)
            uploads(root, arguments.rounds, arguments.megabytes)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
