"""Indexes token files that dolma or OLMo wrote, so that they are trained on in place (data.format=olmo).

Such files are raw little-endian arrays, like our own shards. Two things are missing: where documents end,
and the guarantee that the ids fit the vocabulary. So every file is read once, in parallel, which gives an
index of its documents and its hash. The manifest then names these files in place of shards. Nothing is
copied.
"""

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from olmoe_train.config.data import DataConfig, SourceConfig
from olmoe_train.config.verbs import PrepareConfig
from olmoe_train.data.manifest import (
    DTYPES,
    ENDS_DTYPE,
    MANIFEST,
    TOKENIZER,
    Manifest,
    Shard,
    Split,
    read_manifest,
    write_manifest,
)
from olmoe_train.data.prepare.corpus import CorpusFile, digest, find_files
from olmoe_train.data.prepare.encode import cores, worker_processes
from olmoe_train.data.prepare.shards import clear, resumable_directory
from olmoe_train.data.prepare.summary import check_same_settings, progress_bar, summary, unigram_entropy
from olmoe_train.data.tokenizer import TokenizerFiles, tokenizer_from_config
from olmoe_train.data.tokens import verify_hashes
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.redaction import redact_text

BLOCK_TOKENS = 1 << 24
"""Tokens that are read at a time. Bounds memory."""
_NUMPY_MAGIC = b"\x93NUMPY"
# The keys of data.source that have an effect.
_USED_KEYS = {"kind", "paths", "validation_paths", "processes"}


@dataclass(frozen=True)
class TokenFormat:
    """What the files do not say about themselves."""

    dtype: str
    eos_token_id: int
    vocab_size: int


def index_olmo_files(cfg: PrepareConfig) -> Manifest:
    """Index token files into data.dir, or verify it if it was made of the same files before.

    Returns:
        The manifest of data.dir.

    Raises:
        UserError: A setting is invalid, or a file is not an array of such tokens: it has a header, its size
            is not a multiple of the dtype's, or a token id is beyond the vocabulary.
    """
    tokenizer = tokenizer_from_config(cfg.tokenizer)
    tokens = _token_format(cfg.data, tokenizer)
    files = find_files(_as_globs(cfg.data.source.paths), _as_globs(cfg.data.source.validation_paths))
    settings = {
        "data.format": "olmo",
        "corpus": digest([[file.path, file.size, file.validation] for file in files]),
        "data.olmo.dtype": tokens.dtype,
        "data.olmo.eos_token_id": tokens.eos_token_id,
        "data.olmo.vocab_size": tokens.vocab_size,
        "tokenizer.path": f"sha256:{tokenizer.sha256}" if tokenizer else None,
    }
    final = Path(cfg.data.dir).expanduser().resolve()
    if (final / MANIFEST).exists():
        manifest = read_manifest(final)
        check_same_settings(final, manifest.settings, settings)
        print(f"already indexed, nothing to do: {final} ({verify_hashes(final)} files verified)")
    else:
        with resumable_directory(final) as directory:
            clear(directory)
            if tokenizer is not None:
                tokenizer.save(directory / TOKENIZER)
            manifest = _index(directory, cfg.data.source, files, tokens, settings, tokenizer)
            write_manifest(directory, manifest)
        print(f"indexed {final}")
    print(summary(final, manifest))
    return manifest


def _as_globs(paths: list[str]) -> list[str]:
    """Replace directories by globs for the .npy files in them, at any depth."""
    return [f"{path.rstrip('/')}/**/*.npy" if Path(path).expanduser().is_dir() else path for path in paths]


def _token_format(data: DataConfig, tokenizer: TokenizerFiles | None) -> TokenFormat:
    """Take the format from data.olmo, else from the tokenizer. UserError lists all keys that are wrong."""
    source, olmo = data.source, data.olmo
    errors = [
        f"data.source.{name}={value}: has no effect with data.format=olmo"
        for name, value in vars(source).items()
        if name not in _USED_KEYS and value != getattr(SourceConfig(), name)
    ]
    if not source.paths:
        errors.append("data.source.paths=[]: give token files, globs or directories: '[corpus/**/*.npy]'")
    eos, vocab_size = olmo.eos_token_id, olmo.vocab_size
    if tokenizer is not None:
        eos = tokenizer.eos_token_id if eos is None else eos
        vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
    if eos is None or vocab_size is None:
        errors.append(
            "data.olmo.eos_token_id and data.olmo.vocab_size: the files do not say; give both, or give the "
            "tokenizer that made the files as tokenizer.path"
        )
    else:
        largest = 1 << 8 * DTYPES[olmo.dtype.value].itemsize
        if not 0 <= eos < vocab_size <= largest:
            errors.append(
                f"data.olmo.eos_token_id={eos}, vocab_size={vocab_size}: must be 0 <= eos < vocab_size <= "
                f"{largest}, for data.olmo.dtype={olmo.dtype.value}"
            )
    if errors:
        raise UserError("\n  ".join(errors))
    assert eos is not None
    assert vocab_size is not None
    return TokenFormat(olmo.dtype.value, eos, vocab_size)


def _index(
    directory: Path,
    source: SourceConfig,
    files: list[CorpusFile],
    tokens: TokenFormat,
    settings: dict[str, Any],
    tokenizer: TokenizerFiles | None,
) -> Manifest:
    """Write the indexes into `directory`, and return the manifest without writing it."""
    shards: dict[str, list[Shard]] = {"train": [], "validation": []}
    counts = {name: np.zeros(tokens.vocab_size, np.int64) for name in shards}
    names = ["validation" if file.validation else "train" for file in files]
    for name in shards:
        (directory / name).mkdir()
    index_paths = [f"{name}/shard-{number:05d}.ends.u64" for number, name in enumerate(names)]
    with progress_bar() as bar, worker_processes(source.processes or cores()) as pool:
        task = bar.add_task("indexing", total=sum(file.size for file in files), rate="")
        results = pool.map(partial(index_token_file, directory, tokens), files, index_paths)
        for file, name, (shard, occurrences) in zip(files, names, results, strict=True):
            shards[name].append(shard)
            counts[name] += occurrences
            bar.advance(task, file.size)
    return Manifest(
        settings=settings,
        source=redact_text(f"{len(files):,} token files, where they are: {' '.join(source.paths)}"),
        skipped_empty_documents=0,
        tokenizer_sha256=tokenizer.sha256 if tokenizer else None,
        dtype=tokens.dtype,
        vocab_size=tokens.vocab_size,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer else None,
        bytes_per_token=0.0,  # the text is not known
        unigram_entropy=unigram_entropy(counts["train"], counts["validation"]),
        train=_split(shards["train"]),
        validation=_split(shards["validation"]),
        tokens_in_place=True,
    )


def _split(shards: list[Shard]) -> Split:
    documents, tokens = sum(shard.documents for shard in shards), sum(shard.tokens for shard in shards)
    return Split(documents, tokens, 0, tuple(shards))


def index_token_file(
    directory: Path,
    tokens: TokenFormat,
    file: CorpusFile,
    index_path: str,
    block_tokens: int = BLOCK_TOKENS,
) -> tuple[Shard, np.ndarray]:
    """Write the document index of a token file. Runs in a worker.

    A document ends with its eos, and the last one in any case at the end of the file.

    Args:
        directory: The prepared directory.
        tokens: Format of the file.
        file: The token file.
        index_path: File to write, relative to `directory`.
        block_tokens: Tokens that are read at a time.

    Returns:
        (the file as a shard, occurrences of each token id as int64 [vocab_size]).
    """
    array = _open(file, tokens.dtype)
    counts = np.zeros(tokens.vocab_size, np.int64)
    sha256, ends_sha256, documents = hashlib.sha256(), hashlib.sha256(), 0
    with (directory / index_path).open("wb") as index:
        for start in range(0, len(array), block_tokens):
            block = array[start : start + block_tokens]
            if (largest := int(block.max())) >= tokens.vocab_size:
                raise UserError(
                    f"{file.path}: token {start + int(block.argmax()):,} is {largest}, beyond the vocabulary "
                    f"of {tokens.vocab_size:,} (data.olmo.vocab_size).\n"
                    "  The file is damaged, or data.olmo.dtype or the tokenizer does not fit it."
                )
            counts += np.bincount(block, minlength=tokens.vocab_size)
            sha256.update(block.data)
            ends = (np.flatnonzero(block == tokens.eos_token_id) + (start + 1)).astype(ENDS_DTYPE)
            if start + len(block) == len(array) and block[-1] != tokens.eos_token_id:
                ends = np.append(ends, ENDS_DTYPE.type(len(array)))
            index.write(ends.tobytes())
            ends_sha256.update(ends.tobytes())
            documents += len(ends)
    shard = Shard(file.path, len(array), sha256.hexdigest(), index_path, documents, ends_sha256.hexdigest())
    return shard, counts


def _open(file: CorpusFile, dtype: str) -> np.ndarray:
    """Map a file into memory. UserError if it cannot be tokens of that dtype."""
    with Path(file.path).open("rb") as raw:
        header = raw.read(len(_NUMPY_MAGIC))
    if header == _NUMPY_MAGIC:
        raise UserError(
            f"{file.path}: has NumPy's header, but dolma and OLMo write raw arrays.\n"
            "  Write it without the header: numpy.load(path).tofile(new_path)."
        )
    if file.size == 0 or file.size % DTYPES[dtype].itemsize:
        raise UserError(
            f"{file.path}: {file.size:,} bytes, which is not a whole, positive number of {dtype} tokens.\n"
            "  The file is truncated, or data.olmo.dtype is wrong."
        )
    return np.memmap(file.path, DTYPES[dtype], mode="r")
