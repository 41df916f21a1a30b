"""The options of `data` and `tokenizer`, as olmoe_train/config/train.py has those of the other groups."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from olmoe_train.config.choices import DataFormat, OnBadRecord, Packing, Records, SourceKind, TokenDtype


@dataclass  # not frozen, as MixtureSource
class FieldFilter:
    field: str = MISSING
    """Name of a field or column."""
    values: list[Any] = MISSING
    """Records whose field equals one of them are kept."""


@dataclass(frozen=True)
class SourceConfig:
    kind: SourceKind = SourceKind.python_stdlib
    """Where documents come from: python_stdlib; files (JSON lines, text, parquet, arrow); datasets (what the
    `datasets` library streams, or parquet and arrow). `olmoe prepare` alone reads data.source."""
    paths: list[str] = field(default_factory=list)
    """Files, globs (** for any depth) and folders. *.jsonl and *.json, also .gz and .zst: a JSON object a
    line; *.parquet, *.arrow: rows; all else: a file is a document, .gz and .zst decompressed. A folder stands
    for the .jsonl, .json.gz, .json.zst, .txt, .parquet and .arrow files in it, at any depth."""
    validation_paths: list[str] = field(default_factory=list)
    """Files, globs and folders that are the validation split, even where `paths` matches them too; []: hold
    out validation_fraction."""
    name: str | None = None
    """Dataset to stream: its name on the Hugging Face hub, or a local directory laid out like one."""
    subset: str | None = None
    """Configuration of the dataset `name`, where it has several."""
    revision: str | None = None
    """Branch, tag or commit of the dataset `name`; null: its main branch."""
    split: str = "train"
    """Split of the dataset `name` to train on."""
    validation_split: str | None = None
    """Split of the dataset `name` to validate on; null: hold out validation_fraction."""
    records: Records = Records.text
    """What a record holds: text (text_field; all of it is learnt), messages (messages_field: a conversation,
    rendered by the tokenizer's chat template; the assistant's turns are learnt), prompt_completion
    (prompt_field and completion_field; the completion is learnt)."""
    text_field: str = "text"
    """Field or column that holds a document's text."""
    messages_field: str = "messages"
    """Field or column that holds a conversation: a list of {"role": ..., "content": ...}."""
    prompt_field: str = "prompt"
    """Field or column that holds a prompt, a string."""
    completion_field: str = "completion"
    """Field or column that holds its completion, a string."""
    id_field: str | None = "id"
    """Field or column that identifies a document, for the choice of validation documents; where a document
    has none, and with null, its file and line do."""
    keep: list[FieldFilter] = field(default_factory=list)
    """Filters: only records whose fields have these values, e.g. [{field: metadata.language, values: [en,
    fr]}, {field: source, values: [wiki]}]. A dot reaches into an object; null stands for a field that is
    missing. Text files have no fields."""
    min_characters: int = 0
    """Filter: fewest characters of a document's text."""
    max_characters: int | None = None
    """Filter: most characters of a document's text; null: any number."""
    max_record_bytes: int = 16 * 1024 * 1024
    """Longest record (a line of JSON, a row's text, a file of text), in bytes; a longer one is a bad record.
    Memory grows with it: some 150 times as much in a tokenising process."""
    on_bad_record: OnBadRecord = OnBadRecord.strict
    """A record that cannot be read: strict stops with path:line; quarantine writes it with the reason to
    quarantine.jsonl and goes on."""
    max_bad_fraction: float = 0.001
    """Share of all records that may be quarantined; more stops the run."""
    validation_fraction: float = 0.05
    """Share of documents held out for validation, chosen by a hash of the document's identity."""
    shard_tokens: int = 100_000_000
    """Most tokens a shard file holds."""
    processes: int = 0
    """Tokenising processes; 0: one a core."""


@dataclass(frozen=True)
class OlmoFilesConfig:
    dtype: TokenDtype = TokenDtype.uint16
    """Data type of the token files, which does not stand in them."""
    eos_token_id: int | None = None
    """Token that ends documents; null: that of the tokenizer (tokenizer.path)."""
    vocab_size: int | None = None
    """Every token id is below it; null: the tokenizer's."""


@dataclass  # frozen, data.mixture.0.weight=2 could not change what a preset gave
class MixtureSource:
    dir: str = MISSING
    """Prepared directory; a relative one is inside of data.dir."""
    name: str | None = None
    """What metrics call it: eval/NAME/loss, data/NAME/share; null: the last part of dir."""
    weight: float | None = None
    """Share of the training tokens, relative to the other sources' weights."""
    tokens: int | None = None
    """Budget of training tokens, in place of weight; more than the source has repeats it."""


@dataclass(frozen=True)
class DataConfig:
    dir: str = MISSING
    """Directory of prepared tokens (`olmoe prepare` writes it); with data.mixture, where its sources are."""
    format: DataFormat = DataFormat.prepared
    """olmo: token files that dolma or OLMo wrote (data.source.paths: raw .npy, no header) are trained on
    where they are; `olmoe prepare` reads them once for data.dir's index of documents. prepared: data.dir has
    the tokens."""
    olmo: OlmoFilesConfig = field(default_factory=OlmoFilesConfig)
    mixture: list[MixtureSource] = field(default_factory=list)
    """Several prepared directories to train on together: [{dir: web, weight: 7}, {dir: code, weight: 3}], or
    with token budgets, {dir: web, tokens: 700000000}; `name` is for the metrics. []: data.dir alone."""
    sequence_length: int = 512
    """Tokens a training sequence."""
    packing: Packing = Packing.concat
    """What a sequence is. concat: consecutive tokens, whatever the documents (as released). best_fit: whole
    documents, as many as fit, and padding; only a document longer than the sequence is cut."""
    mask_documents: bool = False
    """Each document of a sequence by itself: attention stays inside, positions start at 0, its first token is
    not predicted. The released model did without."""
    repetition_filter: bool = False
    """Leave a training sequence in which 1 to 13 tokens repeat 32 times or more out of the loss, as released;
    its tokens still route."""
    verify_hashes: bool = False
    """Compare every file of data.dir with its hash before anything else; reads all of them."""
    num_workers: int = 0
    """Loader worker processes a rank; 0: load in the training process."""
    source: SourceConfig = field(default_factory=SourceConfig)


@dataclass(frozen=True)
class TokenizerConfig:
    path: str | None = None
    """Tokenizer to use: a tokenizer.json, an HF directory, or a model's name on the Hugging Face hub (whose
    cache serves without a network). null: train a byte-level BPE on the training split."""
    revision: str | None = None
    """Branch, tag or commit of a tokenizer of the hub; null: its main branch."""
    chat_template: str | None = None
    """Chat template in place of the tokenizer's own: a Jinja file, or the name of one in
    configs/chat_templates (tulu). It is copied into data.dir and exports. null: the tokenizer's."""
    template_date: str | None = None
    """Day (YYYY-MM-DD) for a chat template that asks for today's, so that the same command always makes the
    same tokens."""
    vocab_size: int = 4096
    """Vocabulary of the tokenizer to train, special tokens included."""
    train_bytes: int = 1_000_000_000
    """Train it on the first so many bytes of the training split's text; memory grows with their different
    words."""
