"""Token files that dolma or OLMo wrote, to be trained on where they are (data.format=olmo).

They are what our own shards are, raw little-endian arrays. What they lack is where documents end and the
promise that the ids fit the vocabulary: every file is read once, in parallel, for an index of its documents
and its hash. The manifest then names the files in place of shards of its own; nothing is copied.
"""

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from olmoe_train.config.data import DataConfig, SourceConfig
from olmoe_train.config.verbs import PrepareConfig
from olmoe_train.data.prepare.corpus import Part, digest, find_parts
from olmoe_train.data.prepare.encode import cores, worker_processes
from olmoe_train.data.prepare.shards import clear, new_directory
from olmoe_train.data.prepare.summary import progress_bar, refuse_other_settings, summary, unigram_entropy
from olmoe_train.data.tokenizer import TokenizerFiles, given_tokenizer
from olmoe_train.data.tokens import (
    DTYPES,
    ENDS_DTYPE,
    MANIFEST,
    TOKENIZER,
    Manifest,
    Shard,
    Split,
    read_manifest,
    verify_hashes,
    write_manifest,
)
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.redaction import redact_text

_BLOCK = 1 << 24  # tokens read at a time: bounds memory
_NUMPY_MAGIC = b"\x93NUMPY"
_READ = {"kind", "paths", "validation_paths", "processes"}


@dataclass(frozen=True)
class _Tokens:
    """What the files do not say about themselves."""

    dtype: str
    eos_token_id: int
    vocab_size: int


def index_olmo_files(cfg: PrepareConfig) -> Manifest:
    """Make cfg.data.dir, or verify it if it was made of the same files. Returns its manifest.

    UserError for a file that is no array of such tokens: a header, a size that is no multiple of the dtype's,
    a token id beyond the vocabulary.
    """
    tokenizer = given_tokenizer(cfg.tokenizer)
    tokens = _tokens(cfg.data, tokenizer)
    parts = find_parts(_as_globs(cfg.data.source.paths), _as_globs(cfg.data.source.validation_paths))
    settings = {
        "data.format": "olmo",
        "corpus": digest([[part.path, part.size, part.validation] for part in parts]),
        "data.olmo.dtype": tokens.dtype,
        "data.olmo.eos_token_id": tokens.eos_token_id,
        "data.olmo.vocab_size": tokens.vocab_size,
        "tokenizer.path": f"sha256:{tokenizer.sha256}" if tokenizer else None,
    }
    final = Path(cfg.data.dir).expanduser().resolve()
    if (final / MANIFEST).exists():
        manifest = read_manifest(final)
        refuse_other_settings(final, manifest.settings, settings)
        print(f"already indexed, nothing to do: {final} ({verify_hashes(final)} files verified)")
    else:
        with new_directory(final) as directory:
            clear(directory)
            if tokenizer is not None:
                tokenizer.save(directory / TOKENIZER)
            manifest = _index(directory, cfg.data.source, parts, tokens, settings, tokenizer)
            write_manifest(directory, manifest)
        print(f"indexed {final}")
    print(summary(final, manifest))
    return manifest


def _as_globs(paths: list[str]) -> list[str]:
    """A folder stands for the .npy files in it."""
    return [f"{path.rstrip('/')}/**/*.npy" if Path(path).expanduser().is_dir() else path for path in paths]


def _tokens(data: DataConfig, tokenizer: TokenizerFiles | None) -> _Tokens:
    """UserError, with all reasons, for keys that are missing or have no effect."""
    source, olmo = data.source, data.olmo
    errors = [
        f"data.source.{name}={value}: has no effect with data.format=olmo"
        for name, value in vars(source).items()
        if name not in _READ and value != getattr(SourceConfig(), name)
    ]
    if not source.paths:
        errors.append("data.source.paths=[]: give the token files, globs or folders: '[corpus/**/*.npy]'")
    eos, vocab_size = olmo.eos_token_id, olmo.vocab_size
    if tokenizer is not None:
        eos = tokenizer.eos_token_id if eos is None else eos
        vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
    if eos is None or vocab_size is None:
        errors.append(
            "data.olmo.eos_token_id and data.olmo.vocab_size: the files do not say; give both, or "
            "tokenizer.path=, the tokenizer that made them"
        )
    else:
        most = 1 << 8 * DTYPES[olmo.dtype.value].itemsize
        if not 0 <= eos < vocab_size <= most:
            errors.append(
                f"data.olmo.eos_token_id={eos}, vocab_size={vocab_size}: must be 0 <= eos < vocab_size <= "
                f"{most}, for data.olmo.dtype={olmo.dtype.value}"
            )
    if errors:
        raise UserError("\n  ".join(errors))
    assert eos is not None
    assert vocab_size is not None
    return _Tokens(olmo.dtype.value, eos, vocab_size)


def _index(
    directory: Path,
    source: SourceConfig,
    parts: list[Part],
    tokens: _Tokens,
    settings: dict[str, Any],
    tokenizer: TokenizerFiles | None,
) -> Manifest:
    """Fills `directory`, the manifest left out."""
    shards: dict[str, list[Shard]] = {"train": [], "validation": []}
    counts = {name: np.zeros(tokens.vocab_size, np.int64) for name in shards}
    names = ["validation" if part.validation else "train" for part in parts]
    for name in shards:
        (directory / name).mkdir()
    index_paths = [f"{name}/shard-{number:05d}.ends.u64" for number, name in enumerate(names)]
    with progress_bar() as bar, worker_processes(source.processes or cores()) as pool:
        task = bar.add_task("indexing", total=sum(part.size for part in parts), rate="")
        results = pool.map(partial(_index_file, directory, tokens), parts, index_paths)
        for part, name, (shard, occurrences) in zip(parts, names, results, strict=True):
            shards[name].append(shard)
            counts[name] += occurrences
            bar.advance(task, part.size)
    return Manifest(
        settings=settings,
        source=redact_text(f"{len(parts):,} token files, where they are: {' '.join(source.paths)}"),
        skipped_empty_documents=0,
        tokenizer_sha256=tokenizer.sha256 if tokenizer else None,
        dtype=tokens.dtype,
        vocab_size=tokens.vocab_size,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer else None,
        bytes_per_token=0.0,  # what text they were made of is not known
        unigram_entropy=unigram_entropy(counts["train"], counts["validation"]),
        train=_split(shards["train"]),
        validation=_split(shards["validation"]),
        tokens_in_place=True,
    )


def _split(shards: list[Shard]) -> Split:
    documents, tokens = sum(shard.documents for shard in shards), sum(shard.tokens for shard in shards)
    return Split(documents, tokens, 0, tuple(shards))


def _index_file(directory: Path, tokens: _Tokens, part: Part, index_path: str) -> tuple[Shard, np.ndarray]:
    """Runs in a worker. (The file as a shard; occurrences of each token id, int64 [V].)

    A document ends with its eos; the last one, wherever the file does.
    """
    array = _open(part, tokens.dtype)
    counts = np.zeros(tokens.vocab_size, np.int64)
    sha256, ends_sha256, documents = hashlib.sha256(), hashlib.sha256(), 0
    with (directory / index_path).open("wb") as index:
        for start in range(0, len(array), _BLOCK):
            block = array[start : start + _BLOCK]
            if (largest := int(block.max())) >= tokens.vocab_size:
                raise UserError(
                    f"{part.path}: token {start + int(block.argmax()):,} is {largest}, beyond the vocabulary "
                    f"of {tokens.vocab_size:,} (data.olmo.vocab_size).\n"
                    "  It is damaged, or data.olmo.dtype or the tokenizer is another."
                )
            counts += np.bincount(block, minlength=tokens.vocab_size)
            sha256.update(block.data)
            ends = (np.flatnonzero(block == tokens.eos_token_id) + (start + 1)).astype(ENDS_DTYPE)
            if start + len(block) == len(array) and block[-1] != tokens.eos_token_id:
                ends = np.append(ends, ENDS_DTYPE.type(len(array)))
            index.write(ends.tobytes())
            ends_sha256.update(ends.tobytes())
            documents += len(ends)
    shard = Shard(part.path, len(array), sha256.hexdigest(), index_path, documents, ends_sha256.hexdigest())
    return shard, counts


def _open(part: Part, dtype: str) -> np.ndarray:
    """The file, mapped. UserError where it cannot be tokens of that type."""
    with Path(part.path).open("rb") as file:
        header = file.read(len(_NUMPY_MAGIC))
    if header == _NUMPY_MAGIC:
        raise UserError(
            f"{part.path}: has NumPy's header; dolma and OLMo write raw arrays.\n"
            "  Write it anew without: numpy.load(path).tofile(new_path)."
        )
    if part.size == 0 or part.size % DTYPES[dtype].itemsize:
        raise UserError(
            f"{part.path}: {part.size:,} bytes, which is no whole number of {dtype} tokens, or none at all.\n"
            "  It is cut short, or data.olmo.dtype is another."
        )
    return np.memmap(part.path, DTYPES[dtype], mode="r")
