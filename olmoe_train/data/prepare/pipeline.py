"""Prepares a corpus: find it, train or read the tokenizer, encode in parallel, write shards and a manifest.

The bytes that are written depend only on the settings and the corpus, not on the number of processes or on
interruptions. This process reads the corpus (batches.py) and writes the output (progress.py) in order, and
worker processes encode (encode.py).
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from olmoe_train.config.choices import OnBadRecord, Records
from olmoe_train.config.data import OlmoFilesConfig, SourceConfig, TokenizerConfig
from olmoe_train.config.verbs import PrepareConfig
from olmoe_train.data.chat_template import ChatTemplate
from olmoe_train.data.manifest import (
    DTYPES,
    MANIFEST,
    TOKENIZER,
    Manifest,
    Preferences,
    Targets,
    read_manifest,
    write_manifest,
)
from olmoe_train.data.prepare.batches import START, Position, read_batches
from olmoe_train.data.prepare.corpus import digest
from olmoe_train.data.prepare.encode import Encoder, cores, in_order, worker_processes
from olmoe_train.data.prepare.limits import DEFAULT_LIMITS, Limits
from olmoe_train.data.prepare.open_corpus import Corpus, open_corpus, source_errors, source_settings
from olmoe_train.data.prepare.origins import write_source_files
from olmoe_train.data.prepare.progress import (
    PROGRESS,
    QUARANTINE,
    Counts,
    OutputWriter,
    PrepareProgress,
    read_progress,
)
from olmoe_train.data.prepare.record_spec import CONVERSATIONS, PREFERENCES, RecordSpec
from olmoe_train.data.prepare.records import BadRecord, Document, ValidationSplit, documents
from olmoe_train.data.prepare.shards import ChangedError, clear, resumable_directory
from olmoe_train.data.prepare.summary import (
    check_same_settings,
    left_out,
    no_targets,
    progress_bar,
    summary,
    unigram_entropy,
)
from olmoe_train.data.prepare.validation_split import held_out_below, split_note
from olmoe_train.data.tokenizer import (
    SMALLEST_VOCABULARY,
    TokenizerFiles,
    chat_template_from_config,
    read_tokenizer_files,
    template_from_config,
    tokenizer_from_config,
    train_tokenizer,
)
from olmoe_train.data.tokens import verify_hashes
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.redaction import redact, redact_text


def prepare(cfg: PrepareConfig, limits: Limits = DEFAULT_LIMITS) -> Manifest:
    """Prepare data.dir, or verify it if it was prepared with the same settings before.

    The directory appears complete or not at all. What an interrupted run with the same settings finished is
    kept and not done again.

    Args:
        cfg: The configuration of `olmoe prepare`.
        limits: Sizes and intervals that do not change the result.

    Returns:
        The manifest of the prepared data.

    Raises:
        UserError: A setting is invalid, data.dir holds something else, or the input is bad (path:line).
    """
    _check(cfg)
    final = Path(cfg.data.dir).expanduser().resolve()
    tokenizer = tokenizer_from_config(cfg.tokenizer)
    spec = RecordSpec.from_config(cfg.data.source, _template(cfg, tokenizer), cfg.data.sequence_length)
    corpus = open_corpus(cfg.data.source)
    settings = _settings(cfg, tokenizer, spec, corpus)
    if (final / MANIFEST).exists():
        manifest = read_manifest(final)
        check_same_settings(final, manifest.settings, settings)
        print(f"already prepared, nothing to do: {final} ({verify_hashes(final)} files verified)")
    else:
        with resumable_directory(final, keep=_keep) as directory:
            preparation = _Preparation(directory, cfg, corpus, spec, settings, limits)
            try:
                manifest = preparation.run(tokenizer)
            except ChangedError as reason:
                print(f"starting over: what an interrupted run left in {directory} is unusable ({reason})")
                clear(directory)
                manifest = preparation.run(tokenizer)
        print(f"prepared {final}")
    print(summary(final, manifest))
    return manifest


def _template(cfg: PrepareConfig, tokenizer: TokenizerFiles | None) -> ChatTemplate | None:
    """The chat template, if the records need one. Preferences may be texts, which need none."""
    records = cfg.data.source.records
    has_one = tokenizer.chat_template if tokenizer else cfg.tokenizer.chat_template
    if records in CONVERSATIONS or (records in PREFERENCES and has_one):
        return chat_template_from_config(cfg.tokenizer, tokenizer)
    return None


def _keep(partial: Path) -> bool:
    """Decide whether a failed run's directory is kept: if it has progress or quarantined records."""
    if (partial / PROGRESS).exists():
        print(f"finished work is kept in {partial}: run the same command to continue", file=sys.stderr)
    return (partial / PROGRESS).exists() or (partial / QUARANTINE).exists()


def _check(cfg: PrepareConfig) -> None:
    """Raise UserError with all invalid values at once."""
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
            f"data.source.max_characters={source.max_characters}: must be at least 1, and at least "
            "data.source.min_characters"
        )
    if source.processes < 0:
        errors.append(f"data.source.processes={source.processes}: must be at least 1, or 0 for one per core")
    errors += _tokenizer_errors(cfg)
    if errors:
        raise UserError("\n  ".join(errors))


def _tokenizer_errors(cfg: PrepareConfig) -> list[str]:
    errors = []
    if cfg.data.source.records not in (*CONVERSATIONS, *PREFERENCES):
        chats = " or ".join(records.value for records in CONVERSATIONS)
        errors += [
            f"tokenizer.{key}: has no effect without data.source.records={chats}"
            for key in ("template_date", "chat_template_kwargs")
            if getattr(cfg.tokenizer, key)
        ]
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
    cfg: PrepareConfig, tokenizer: TokenizerFiles | None, spec: RecordSpec, corpus: Corpus
) -> dict[str, Any]:
    """Collect the settings that determine the bytes of the shards, as the manifest stores them."""
    settings = {
        "seed": cfg.seed,
        **source_settings(cfg.data.source, corpus, cfg.data.sequence_length),
        "data.source.shard_tokens": cfg.data.source.shard_tokens,
        # A tokenizer counts by its contents, wherever it lies. It brings its own vocabulary size.
        "tokenizer.path": f"sha256:{tokenizer.sha256}" if tokenizer else None,
        "tokenizer.vocab_size": None if tokenizer else cfg.tokenizer.vocab_size,
    }
    if tokenizer is None and cfg.tokenizer.train_bytes != TokenizerConfig.train_bytes:
        settings["tokenizer.train_bytes"] = cfg.tokenizer.train_bytes  # older manifests have no such key
    if spec.template is not None:
        settings["chat template"] = digest([spec.template.identity])
    redacted: dict[str, Any] = redact(settings)
    return redacted


@dataclass(frozen=True)
class _Preparation:
    """One preparation, from the corpus to the manifest."""

    directory: Path
    cfg: PrepareConfig
    corpus: Corpus
    spec: RecordSpec
    settings: dict[str, Any]
    limits: Limits

    @property
    def strict(self) -> bool:
        return self.cfg.data.source.on_bad_record is OnBadRecord.strict

    @property
    def validation(self) -> ValidationSplit:
        """By a hash only if validation has no files of its own."""
        fraction = 0.0 if self.corpus.has_validation_files else self.cfg.data.source.validation_fraction
        return ValidationSplit(fraction, self.cfg.seed)

    def run(self, tokenizer: TokenizerFiles | None) -> Manifest:
        """Fill the directory, the manifest last. tokenizer: None if it has to be trained."""
        manifest, counts = self._attempt(tokenizer, None)
        below = held_out_below(manifest, counts, self.validation.fraction)
        if below is not None:
            # Anew from the start: a tokenizer is trained on the training split alone.
            clear(self.directory)
            manifest, _ = self._attempt(tokenizer, below)
        _check_splits(manifest, self.cfg.data.source, self.corpus)
        write_manifest(self.directory, manifest)
        return manifest

    def _attempt(self, tokenizer: TokenizerFiles | None, below: int | None) -> tuple[Manifest, Counts]:
        """Fill the directory except the manifest.

        Args:
            tokenizer: None if it has to be trained.
            below: ValidationSplit.below. What an interrupted run left overrides it.
        """
        source = self.cfg.data.source
        with progress_bar() as bar:
            tokenizer, progress = self._start(tokenizer, below, bar)
            encoder = Encoder(
                spec=self.spec,
                validation=replace(self.validation, below=progress.held_out_below),
                tokenizer_json=self.directory / TOKENIZER / "tokenizer.json",
                eos_token_id=tokenizer.eos_token_id,
                vocab_size=tokenizer.vocab_size,
                dtype="uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
                strict=self.strict,
            )
            form = tokenizer.vocab_size, DTYPES[encoder.dtype]
            output = OutputWriter(self.directory, source, *form, progress, self.corpus.files, self.limits)
            if progress.counts.records:
                print(
                    f"continuing after {progress.counts.records:,} records; "
                    f"{output.shards_closed} finished shards are kept"
                )
            self._encode(encoder, output, progress.position, bar)
        output.finish()
        note = split_note(output.counts, progress.held_out_below, self.validation.fraction)
        manifest = _manifest(self.settings, self.corpus, tokenizer, encoder.dtype, output, source)
        files = write_source_files(self.directory, self.corpus)
        return replace(manifest, split_note=note, source_files=files), output.counts

    def _start(
        self, tokenizer: TokenizerFiles | None, below: int | None, bar: Progress
    ) -> tuple[TokenizerFiles, PrepareProgress]:
        """Continue from what an interrupted run left, or save (and train first, if needed) the tokenizer."""
        settings = {**self.settings, "corpus in place": self.corpus.fingerprint_in_place()}
        progress = read_progress(self.directory, settings)
        if progress is not None:
            tokenizer = read_tokenizer_files(self.directory / TOKENIZER)
            if tokenizer.sha256 != progress.tokenizer_sha256:
                raise ChangedError("tokenizer.json changed")
            return tokenizer, progress
        clear(self.directory)
        trained = tokenizer is None
        if tokenizer is None:
            cfg = self.cfg.tokenizer
            texts = _first_bytes(
                self._training_texts(replace(self.validation, below=below), bar), cfg.train_bytes
            )
            tokenizer = train_tokenizer(texts, cfg.vocab_size).with_chat_template(template_from_config(cfg))
        tokenizer.save(self.directory / TOKENIZER)
        progress = PrepareProgress.start(settings, tokenizer.sha256, below)
        if trained:  # training takes long enough to keep its result, like a shard
            progress.write(self.directory)
        return tokenizer, progress

    def _training_texts(self, validation: ValidationSplit, bar: Progress) -> Iterator[str]:
        """Yield the texts of the training split.

        If strict, raises UserError (path:line) for the first bad record. Otherwise encoding reports them.
        """
        task = bar.add_task("training the tokenizer", total=self.corpus.size, rate="")
        batches = read_batches(self.corpus.files, START, self.spec, self.corpus.hub, self.limits)
        for batch in batches:
            for record in documents(batch.work, self.spec, validation):
                if isinstance(record, BadRecord):
                    if self.strict:
                        raise record.error()
                elif isinstance(record, Document) and not record.validation:
                    yield record.text
            bar.advance(task, batch.bytes_read)

    def _encode(self, encoder: Encoder, output: OutputWriter, start: Position, bar: Progress) -> None:
        """Encode the corpus from `start` on, and write it."""
        processes = self.cfg.data.source.processes or cores()
        before = sum(file.size for file in self.corpus.files[: start.part])
        task = bar.add_task("encoding", total=self.corpus.size, completed=before, rate="")
        tokens = 0
        batches = read_batches(self.corpus.files, start, self.spec, self.corpus.hub, self.limits)
        ahead = self.limits.batches_per_process * processes
        with worker_processes(processes) as pool:
            for batch, encoded in in_order(pool, encoder, batches, ahead):
                output.add(batch, encoded)
                tokens += len(encoded.train.tokens) + len(encoded.validation.tokens)
                elapsed = bar.tasks[task].elapsed or 0.0
                rate = f"{tokens / elapsed:,.0f} tokens/s" if elapsed else ""
                bar.update(task, advance=batch.bytes_read, rate=rate)


def _first_bytes(texts: Iterator[str], limit: int) -> Iterator[str]:
    """Yield texts until they add up to `limit` UTF-8 bytes."""
    size = 0
    for text in texts:
        yield text
        size += len(text.encode())
        if size >= limit:
            return


def _manifest(
    settings: dict[str, Any],
    corpus: Corpus,
    tokenizer: TokenizerFiles,
    dtype: str,
    output: OutputWriter,
    source: SourceConfig,
) -> Manifest:
    train, validation = output.train.finish(), output.validation.finish()
    tokens, counts, targets = train.tokens + validation.tokens, output.counts, None
    if source.records is not Records.text:
        target_tokens = int(output.train.counts.sum() + output.validation.counts.sum())
        targets = Targets(
            counts.records_with_text, counts.unaligned, counts.without_target, target_tokens, **counts.turns
        )
    preferences = None
    if source.records in PREFERENCES:
        paired = source.records is Records.preference
        records = counts.records_with_text
        preferences = Preferences(paired, records, counts.longest, **counts.preferences)
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
        preferences=preferences,
    )


def _check_splits(manifest: Manifest, source: SourceConfig, corpus: Corpus) -> None:
    """Raise UserError if a split has no documents, or the data has no targets."""
    train, validation = manifest.train.documents, manifest.validation.documents
    if not train + validation and (found := manifest.preferences) and (reasons := left_out(found)):
        raise UserError(
            f"data.source: of {manifest.source} no preference is left: {'; '.join(reasons)}.\n"
            "  docs/guides/fine-tune.md says what a chat template must satisfy; data.source.truncate cuts."
        )
    if not train + validation:
        filters = f" that passes the filters ({manifest.filtered_records:,} records do not)"
        raise UserError(
            f"data.source: {manifest.source} has no document with text in it"
            f"{filters if manifest.filtered_records else ''}."
        )
    if manifest.targets and not manifest.targets.tokens:
        raise UserError(no_targets(manifest.targets, train + validation))
    if corpus.has_validation_files and not (train and validation):
        raise UserError(
            f"data.source: no document of {train + validation} is in the files of the "
            f"{'validation' if train else 'training'} split."
        )
    # One record may be several documents (data.source.turns=expand). It is not divided.
    records = manifest.targets.conversations if manifest.targets else train + validation
    if not train or (source.validation_fraction > 0 and not validation and records > 1):
        raise UserError(
            f"data.source.validation_fraction={source.validation_fraction}: all {records:,} documents have "
            "the same id, and documents with equal ids stay together in one split.\n"
            f"  Set data.source.id_field=null (now {source.id_field}), so that their lines identify them."
        )
