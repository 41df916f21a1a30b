"""A corpus to tokens on disk: find it, train or read the tokenizer, encode in parallel, write shards.

The bytes written depend on the settings and the corpus alone, not on the number of processes nor on
interruptions: this process reads (reader.py) and writes (output.py) in order, workers encode (encode.py).
tokens.py reads what is written here.
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import Progress

from olmoe_train.config.choices import OnBadRecord, Records
from olmoe_train.config.data import OlmoFilesConfig, TokenizerConfig
from olmoe_train.config.verbs import PrepareConfig
from olmoe_train.data.prepare.batches import START, Position, read_batches
from olmoe_train.data.prepare.corpus import digest
from olmoe_train.data.prepare.encode import Encoder, cores, in_order, worker_processes
from olmoe_train.data.prepare.open_corpus import Corpus, open_corpus, source_errors, source_settings
from olmoe_train.data.prepare.progress import PROGRESS, QUARANTINE, Output, begun, read_done
from olmoe_train.data.prepare.record_spec import Reading
from olmoe_train.data.prepare.records import BadRecord, Document, Splitting, documents
from olmoe_train.data.prepare.shards import ChangedError, clear, new_directory
from olmoe_train.data.prepare.summary import progress_bar, refuse_other_settings, summary, unigram_entropy
from olmoe_train.data.tokenizer import (
    SMALLEST_VOCABULARY,
    TokenizerFiles,
    chat_template,
    given_tokenizer,
    read_tokenizer,
    template_file,
    train_tokenizer,
)
from olmoe_train.data.tokens import (
    DTYPES,
    MANIFEST,
    TOKENIZER,
    Manifest,
    Targets,
    read_manifest,
    verify_hashes,
    write_manifest,
)
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.redaction import redact, redact_text

# Batches a process under way or waiting to be written; bounds memory.
TASKS_AHEAD = 4


def prepare(cfg: PrepareConfig) -> Manifest:
    """Prepare cfg.data.dir, or verify it if it was prepared with the same settings. Returns its manifest.

    The directory appears whole or not at all; what an interrupted run with the same settings finished is
    kept. Raises UserError for bad settings, for a directory that holds anything else, and for bad input
    (path:line).
    """
    _check(cfg)
    final = Path(cfg.data.dir).expanduser().resolve()
    tokenizer = given_tokenizer(cfg.tokenizer)
    chats = cfg.data.source.records is Records.messages
    reading = Reading.of(cfg.data.source, chat_template(cfg.tokenizer, tokenizer) if chats else None)
    corpus = open_corpus(cfg.data.source)
    settings = _settings(cfg, tokenizer, reading, corpus)
    if (final / MANIFEST).exists():
        manifest = read_manifest(final)
        refuse_other_settings(final, manifest.settings, settings)
        print(f"already prepared, nothing to do: {final} ({verify_hashes(final)} files verified)")
    else:
        with new_directory(final, keep=_keep) as directory:
            try:
                manifest = _write(directory, cfg, corpus, reading, tokenizer, settings)
            except ChangedError as reason:
                print(f"starting over, what an interrupted run left in {directory} is of no use: {reason}")
                clear(directory)
                manifest = _write(directory, cfg, corpus, reading, tokenizer, settings)
        print(f"prepared {final}")
    print(summary(final, manifest))
    return manifest


def _keep(partial: Path) -> bool:
    """Of a run that failed: what the next can go on from, and the records that were too many."""
    if (partial / PROGRESS).exists():
        print(f"what is done is kept in {partial}: run the same command to go on", file=sys.stderr)
    return (partial / PROGRESS).exists() or (partial / QUARANTINE).exists()


def _check(cfg: PrepareConfig) -> None:
    """All bad values at once."""
    source, errors = cfg.data.source, source_errors(cfg.data.source)
    if not 0 <= source.validation_fraction < 1:
        errors.append(
            f"data.source.validation_fraction={source.validation_fraction}: must be at least 0 and below 1"
        )
    if not 0 <= source.max_bad_fraction <= 1:
        errors.append(f"data.source.max_bad_fraction={source.max_bad_fraction}: must be between 0 and 1")
    if source.shard_tokens < 1:
        errors.append(f"data.source.shard_tokens={source.shard_tokens}: must be at least 1")
    if source.max_record_bytes < 1:
        errors.append(f"data.source.max_record_bytes={source.max_record_bytes}: must be at least 1")
    if cfg.data.olmo != OlmoFilesConfig():
        errors.append("data.olmo: has no effect without data.format=olmo")
    if source.min_characters < 0:
        errors.append(f"data.source.min_characters={source.min_characters}: must not be negative")
    if source.max_characters is not None and source.max_characters < max(1, source.min_characters):
        errors.append(
            f"data.source.max_characters={source.max_characters}: must be at least 1 and min_characters"
        )
    if source.processes < 0:
        errors.append(f"data.source.processes={source.processes}: must be at least 1, or 0 for one a core")
    errors += _tokenizer_errors(cfg)
    if errors:
        raise UserError("\n  ".join(errors))


def _tokenizer_errors(cfg: PrepareConfig) -> list[str]:
    errors = []
    if cfg.tokenizer.template_date and cfg.data.source.records is not Records.messages:
        errors.append("tokenizer.template_date: has no effect without data.source.records=messages")
    if cfg.tokenizer.revision and not cfg.tokenizer.path:
        errors.append("tokenizer.revision: has no effect without tokenizer.path")
    if cfg.tokenizer.train_bytes < 1:
        errors.append(f"tokenizer.train_bytes={cfg.tokenizer.train_bytes}: must be at least 1")
    if cfg.tokenizer.path is None and cfg.tokenizer.vocab_size < SMALLEST_VOCABULARY:
        errors.append(
            f"tokenizer.vocab_size={cfg.tokenizer.vocab_size}: must be at least {SMALLEST_VOCABULARY} "
            "(256 bytes and 2 special tokens)"
        )
    return errors


def _settings(
    cfg: PrepareConfig, tokenizer: TokenizerFiles | None, reading: Reading, corpus: Corpus
) -> dict[str, Any]:
    """What decides the shards' bytes, as the manifest keeps it."""
    settings = {
        "seed": cfg.seed,
        **source_settings(cfg.data.source, corpus),
        "data.source.shard_tokens": cfg.data.source.shard_tokens,
        # By contents, for a path says little; a given tokenizer brings its own vocabulary size.
        "tokenizer.path": f"sha256:{tokenizer.sha256}" if tokenizer else None,
        "tokenizer.vocab_size": None if tokenizer else cfg.tokenizer.vocab_size,
    }
    if tokenizer is None and cfg.tokenizer.train_bytes != TokenizerConfig.train_bytes:
        settings["tokenizer.train_bytes"] = cfg.tokenizer.train_bytes  # manifests once had no such key
    if reading.template is not None:
        settings["chat template"] = digest([asdict(reading.template)])
    redacted: dict[str, Any] = redact(settings)
    return redacted


def _write(
    directory: Path,
    cfg: PrepareConfig,
    corpus: Corpus,
    reading: Reading,
    tokenizer: TokenizerFiles | None,
    settings: dict[str, Any],
) -> Manifest:
    """All of preparing: fills `directory`, the manifest last."""
    source = cfg.data.source
    splitting = Splitting(0.0 if corpus.own_validation else source.validation_fraction, cfg.seed)
    strict = source.on_bad_record is OnBadRecord.strict
    asked = {**settings, "corpus in place": corpus.fingerprint_in_place()}
    done = read_done(directory, asked)
    with progress_bar() as bar:
        if done is not None:
            tokenizer = read_tokenizer(directory / TOKENIZER)
            if tokenizer.sha256 != done.tokenizer_sha256:
                raise ChangedError("tokenizer.json changed")
        else:
            clear(directory)
            trained = tokenizer is None
            if tokenizer is None:
                texts = _training_texts(corpus, reading, splitting, strict, bar)
                texts = _first_bytes(texts, cfg.tokenizer.train_bytes)
                tokenizer = train_tokenizer(texts, cfg.tokenizer.vocab_size)
                tokenizer = tokenizer.with_chat_template(template_file(cfg.tokenizer))
            tokenizer.save(directory / TOKENIZER)
            done = begun(asked, tokenizer.sha256)
            if trained:  # worth keeping, like shards
                done.write(directory)
        encoder = Encoder(
            reading=reading,
            splitting=splitting,
            tokenizer_json=directory / TOKENIZER / "tokenizer.json",
            eos_token_id=tokenizer.eos_token_id,
            vocab_size=tokenizer.vocab_size,
            dtype="uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
            strict=strict,
        )
        output = Output(directory, source, tokenizer.vocab_size, DTYPES[encoder.dtype], done)
        if done.counts.records:
            print(f"going on after {done.counts.records:,} records: {output.shards_closed} shards kept")
        _encode(corpus, encoder, output, done.position, source.processes or cores(), bar)
    output.finish()
    masked = source.records is not Records.text
    manifest = _manifest(settings, corpus, tokenizer, encoder.dtype, output, masked)
    _refuse_empty_splits(manifest, source.validation_fraction)
    write_manifest(directory, manifest)
    return manifest


def _training_texts(
    corpus: Corpus, reading: Reading, splitting: Splitting, strict: bool, bar: Progress
) -> Iterator[str]:
    """UserError path:line for the first bad record, if strict; else encoding reports them."""
    task = bar.add_task("training the tokenizer", total=corpus.size, rate="")
    for batch in read_batches(corpus.parts, START, reading, corpus.hub):
        for record in documents(batch.work, reading, splitting):
            if isinstance(record, BadRecord):
                if strict:
                    raise record.error()
            elif isinstance(record, Document) and not record.validation:
                yield record.text
        bar.advance(task, batch.bytes_read)


def _first_bytes(texts: Iterator[str], limit: int) -> Iterator[str]:
    """Texts until they have `limit` bytes."""
    size = 0
    for text in texts:
        yield text
        size += len(text.encode())
        if size >= limit:
            return


def _encode(
    corpus: Corpus, encoder: Encoder, output: Output, start: Position, processes: int, bar: Progress
) -> None:
    before = sum(part.size for part in corpus.parts[: start.part])
    task = bar.add_task("encoding", total=corpus.size, completed=before, rate="")
    tokens = 0
    batches = read_batches(corpus.parts, start, encoder.reading, corpus.hub)
    with worker_processes(processes) as pool:
        for batch, encoded in in_order(pool, encoder, batches, ahead=TASKS_AHEAD * processes):
            output.add(batch, encoded)
            tokens += len(encoded.train.tokens) + len(encoded.validation.tokens)
            elapsed = bar.tasks[task].elapsed or 0.0
            rate = f"{tokens / elapsed:,.0f} tokens/s" if elapsed else ""
            bar.update(task, advance=batch.bytes_read, rate=rate)


def _manifest(
    settings: dict[str, Any],
    corpus: Corpus,
    tokenizer: TokenizerFiles,
    dtype: str,
    output: Output,
    masked: bool,
) -> Manifest:
    train, validation = output.train.finish(), output.validation.finish()
    tokens, counts, targets = train.tokens + validation.tokens, output.counts, None
    if masked:
        target_tokens = int(output.train.counts.sum() + output.validation.counts.sum())
        targets = Targets(counts.documents, counts.unaligned, counts.without_target, target_tokens)
    return Manifest(
        settings=settings,
        source=redact_text(corpus.description),
        skipped_empty_documents=counts.empty,
        quarantined_records=counts.quarantined,
        filtered_records=counts.filtered,
        tokenizer_sha256=tokenizer.sha256,
        dtype=dtype,
        vocab_size=tokenizer.vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bytes_per_token=(train.bytes + validation.bytes) / tokens if tokens else 0.0,
        unigram_entropy=unigram_entropy(output.train.counts, output.validation.counts),
        train=train,
        validation=validation,
        targets=targets,
    )


def _refuse_empty_splits(manifest: Manifest, fraction: float) -> None:
    train, validation = manifest.train.documents, manifest.validation.documents
    if not train + validation:
        filters = f" that the filters keep ({manifest.filtered_records:,} are left out)"
        raise UserError(
            f"data.source: {manifest.source} has no document with text in it"
            f"{filters if manifest.filtered_records else ''}."
        )
    if manifest.targets and not manifest.targets.tokens:
        raise UserError(
            f"data.source.records: nothing to learn in {manifest.targets.conversations:,} documents; in "
            f"{manifest.targets.unaligned:,} of them turns cannot be told among the tokens.\n"
            "  data/README.md says what a chat template must be like (chat and fine-tuning data)."
        )
    if not train or (fraction > 0 and not validation):
        raise UserError(
            f"data.source.validation_fraction={fraction}: no document of {train + validation} is in the "
            f"{'validation' if train else 'training'} split.\n"
            f"  {'Raise' if train else 'Lower'} it, or change the seed; "
            "documents with equal ids stay together (data.source.id_field=null: go by line)."
        )
