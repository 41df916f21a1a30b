"""The options of `data` and `tokenizer`."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from olmoe_train.config.choices import (
    DataFormat,
    LearnedTurns,
    OnBadRecord,
    Packing,
    Records,
    SourceKind,
    TokenDtype,
    Truncate,
    Turns,
)


@dataclass  # not frozen, for the same reason as MixtureSource
class FieldFilter:
    field: str = MISSING
    """Name of a field or column; a dot reaches into an object."""
    values: list[Any] = MISSING
    """Keep the records whose field equals one of these; null stands for a missing field."""


@dataclass(frozen=True)
class SourceConfig:
    kind: SourceKind = SourceKind.python_stdlib
    """Where documents come from. python_stdlib: the source code of Python's standard library. files: JSON
    lines, text, parquet and arrow files. datasets: what the `datasets` library streams, or parquet and arrow
    files. Only `olmoe prepare` reads data.source."""
    paths: list[str] = field(default_factory=list)
    """Files, globs (** matches any depth) and folders. *.jsonl and *.json, also compressed as .gz or .zst:
    one JSON object per line. *.parquet and *.arrow: one record per row. Every other file is one document,
    after decompression if it ends in .gz or .zst. A folder stands for all .jsonl, .json.gz, .json.zst, .txt,
    .parquet and .arrow files in it, at any depth."""
    validation_paths: list[str] = field(default_factory=list)
    """Files, globs and folders of the validation split, even if `paths` matches them, too. []: hold out
    validation_fraction."""
    name: str | None = None
    """Dataset to stream: its name on the Hugging Face hub, or a local directory with the same layout."""
    subset: str | None = None
    """Configuration of the dataset `name`, if it has several."""
    revision: str | None = None
    """Branch, tag or commit of the dataset `name`; null: its main branch."""
    split: str = "train"
    """Split of the dataset `name` to train on."""
    validation_split: str | None = None
    """Split of the dataset `name` to validate on; null: hold out validation_fraction."""
    records: Records = Records.text
    """What a record contains. text: text_field; all of it contributes to the loss. messages: messages_field,
    a conversation that the tokenizer's chat template renders; only the assistant's turns contribute to the
    loss. sharegpt: conversations_field, a conversation in the form of ShareGPT. alpaca: instruction_field,
    input_field and output_field, a conversation of one question and its answer. prompt_completion:
    prompt_field and completion_field; only the completion contributes to the loss. preference: chosen_field
    and rejected_field, two completions of one prompt, for objective=preference. unpaired_preference:
    prompt_field, completion_field and label_field, a completion that is wanted or not, for
    objective.kind=kto."""
    text_field: str = "text"
    """Field or column with the text of a document."""
    messages_field: str = "messages"
    """Field or column with a conversation: a list of {"role": ..., "content": ...}. The content is a string
    or a list of text parts; an assistant message may have tool_calls instead."""
    conversations_field: str = "conversations"
    """Field or column with a conversation of records=sharegpt: a list of {"from": ..., "value": ...}, from
    human, gpt, system, function_call, tool or observation. A field `system` is its system message."""
    instruction_field: str = "instruction"
    """Field or column with the question of records=alpaca, a string."""
    input_field: str = "input"
    """Field or column with a text that belongs to the question of records=alpaca. It follows the question
    after a blank line; a record may lack it. Fields `system` (a string) and `history` (a list of [question,
    answer]) are earlier messages."""
    output_field: str = "output"
    """Field or column with the answer of records=alpaca, a string."""
    tools_field: str | None = "tools"
    """Field or column with the tools of a conversation, for the chat template: a list of JSON schemas, or
    such a list as a JSON string. A record may lack it. null: no tools."""
    template_kwargs_field: str | None = "chat_template_kwargs"
    """Field or column with variables of a conversation for the chat template, an object such as
    {"enable_thinking": false}. They override tokenizer.chat_template_kwargs. A record may lack it. null:
    none."""
    learn: LearnedTurns = LearnedTurns.all
    """Which turns of the assistant contribute to the loss. all: every turn. last: the last one. marked: every
    turn except those whose message has "weight": 0 or "train": false. An empty turn never does.
    completion: of preferences, every turn after the prompt."""
    turns: Turns = Turns.together
    """What becomes of a conversation with several turns. together: one document. expand: a document for each
    turn that contributes to the loss, which ends with this turn; the turns before it are read only. For chat
    templates that render an earlier turn differently from the last one, such as those that drop thoughts."""
    prompt_field: str = "prompt"
    """Field or column with a prompt, a string. Of preferences, a string or a list of messages;
    records=preference may lack it, and the prompt is then the common beginning of the two conversations."""
    completion_field: str = "completion"
    """Field or column with the completion of the prompt, a string. Of records=unpaired_preference, a string
    or a list of messages."""
    chosen_field: str = "chosen"
    """Field or column with the preferred completion of records=preference: a string or a list of messages."""
    rejected_field: str = "rejected"
    """Field or column with the other completion of records=preference, in the form of the preferred one."""
    label_field: str = "label"
    """Field or column of records=unpaired_preference: true if the completion is wanted, false if it is
    not."""
    truncate: Truncate = Truncate.drop
    """What becomes of a preference with more than data.sequence_length tokens in a prompt with its
    completion. drop: it is left out. prompt_start: the prompt loses its first tokens, equally many before
    both completions. completion_end: each completion loses its last tokens. What cannot be cut in this way is
    left out."""
    id_field: str | None = "id"
    """Field or column that identifies a document; the choice of validation documents depends on it. null, or
    a document without this field: its file and line identify it."""
    keep: list[FieldFilter] = field(default_factory=list)
    """Filters: keep only the records whose fields have these values, for example [{field: metadata.language,
    values: [en, fr]}, {field: source, values: [wiki]}]. A dot reaches into an object; null stands for a
    missing field. Text files have no fields."""
    min_characters: int = 0
    """Filter: least number of characters in the text of a document."""
    max_characters: int | None = None
    """Filter: greatest number of characters in the text of a document; null: no limit."""
    max_record_bytes: int = 16 * 1024 * 1024
    """Longest record (a line of JSON, the text of a row, or a text file), in bytes. A longer one is a bad
    record. Memory grows with it: a tokenizing process needs about 150 times as much."""
    on_bad_record: OnBadRecord = OnBadRecord.strict
    """What to do with a record that cannot be read. strict: stop, and name path:line. quarantine: write it
    and the reason to quarantine.jsonl, and continue."""
    max_bad_fraction: float = 0.001
    """Greatest fraction of the records that may be quarantined. `olmoe prepare` stops if there are more."""
    validation_fraction: float = 0.05
    """Fraction of the documents to hold out for validation. A hash of a document's identity decides whether
    it is held out. Of two or more documents at least one is held out, and at least one is not. 0: none."""
    shard_tokens: int = 100_000_000
    """Greatest number of tokens in a shard file."""
    processes: int = 0
    """Number of tokenizing processes; 0: one per CPU core."""


@dataclass(frozen=True)
class OlmoFilesConfig:
    dtype: TokenDtype = TokenDtype.uint16
    """Data type of the token files, which they do not state themselves."""
    eos_token_id: int | None = None
    """Token at the end of each document; null: that of the tokenizer (tokenizer.path)."""
    vocab_size: int | None = None
    """Every token id is smaller than this; null: the size of the tokenizer's vocabulary."""


@dataclass  # not frozen: data.mixture.0.weight=2 could not change what a preset sets
class MixtureSource:
    dir: str = MISSING
    """Prepared directory. A relative path is relative to data.dir."""
    name: str | None = None
    """Name in metrics: eval/NAME/loss, data/NAME/share; null: the last part of dir."""
    weight: float | None = None
    """Share of the training tokens, relative to the weights of the other sources."""
    tokens: int | None = None
    """Number of training tokens, instead of weight. A source with fewer tokens is repeated. Not in
    data.stages."""


@dataclass  # not frozen, for the same reason as MixtureSource
class DataStage:
    until_tokens: int | None = None
    """Training tokens, counted from the start of the run and with padding, at which this stage ends and the
    next one begins: a multiple of data.sequence_length. null: the end of the run; only for the last stage."""
    dir: str | None = None
    """Prepared directory to train on in this stage, relative to data.dir; its last part is the name of the
    source. Set dir or mixture."""
    mixture: list[MixtureSource] = field(default_factory=list)
    """Several prepared directories with weights, as in data.mixture."""


@dataclass(frozen=True)
class DataConfig:
    dir: str = MISSING
    """Directory of prepared tokens, which `olmoe prepare` writes, or the URL of such a directory in an object
    store (s3://, gs://, hf:// or file://), whose shards are read block by block through cache_dir. With
    data.mixture: the directory that the sources' directories are relative to."""
    format: DataFormat = DataFormat.prepared
    """prepared: data.dir contains the tokens. olmo: token files that dolma or OLMo wrote (data.source.paths:
    raw .npy files without a header) are used in place; `olmoe prepare` reads them once and writes an index of
    their documents to data.dir."""
    olmo: OlmoFilesConfig = field(default_factory=OlmoFilesConfig)
    mixture: list[MixtureSource] = field(default_factory=list)
    """Several prepared directories to train on together, with weights ([{dir: web, weight: 7}, {dir: code,
    weight: 3}]) or with numbers of tokens ([{dir: web, tokens: 700000000}, ...]). []: train on data.dir
    itself."""
    stages: list[DataStage] = field(default_factory=list)
    """Other data in later parts of the run: [{until_tokens: 512000000, dir: web}, {mixture: [{dir: web,
    weight: 1}, {dir: math, weight: 1}]}]. A source of several stages continues in each of them where the one
    before left off. Only for objective=next_token. []: the same data in the whole run."""
    sequence_length: int = 512
    """Tokens per training sequence."""
    packing: Packing = Packing.concat
    """How documents form sequences. concat: consecutive tokens, cut anywhere (as in the released model's
    training). best_fit: as many whole documents as fit, then padding; only a document longer than the
    sequence is cut. none: every document is padded to the longest one of its micro-batch; only for
    preferences. With objective=preference, packing changes no result."""
    mask_documents: bool = False
    """Separate the documents in a sequence: attention does not cross documents, positions start at 0 in each
    document, and the first token of a document is not predicted. The released model was trained without
    this."""
    repetition_filter: bool = False
    """Exclude a training sequence from the loss if a group of 1 to 13 tokens repeats at least 32 times in it
    (as in the released model's training). The experts still process its tokens."""
    verify_hashes: bool = False
    """Before training, compare the hash of every file in data.dir. This reads all files."""
    num_workers: int = 0
    """Loader worker processes per rank; 0: the training process loads the data."""
    cache_dir: str | None = None
    """Directory of this machine for what is read of data in an object store. Runs may share it. null: that of
    the environment variable OLMOE_TRAIN_CACHE, or ~/.cache/olmoe-train."""
    cache_gb: float = 20.0
    """Most GB (10^9 bytes) of shards in cache_dir, with up to 16 processes of this machine; the blocks that
    were not used for the longest time are deleted. An order of samples that is random needs room for all
    shards, or reads blocks again and again."""
    cache_block_kib: int = 1024
    """Part of a shard that one request reads from an object store, in KiB. If the shards do not fit into
    cache_gb, a size nearer to that of a sample reads less."""
    source: SourceConfig = field(default_factory=SourceConfig)


@dataclass(frozen=True)
class TokenizerConfig:
    path: str | None = None
    """Tokenizer to use: a tokenizer.json, an HF directory, or the name of a model on the Hugging Face hub
    (without a network, the hub's local cache is used). null: train a byte-level BPE on the training split."""
    revision: str | None = None
    """Branch, tag or commit of a tokenizer on the hub; null: the main branch."""
    chat_template: str | None = None
    """Chat template to use instead of the tokenizer's own: a Jinja file, or the name of one in
    configs/chat_templates (tulu). It is copied into data.dir and exports. null: the tokenizer's own."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables for the chat template, as apply_chat_template of Transformers takes them: {enable_thinking:
    false}."""
    template_date: str | None = None
    """Date (YYYY-MM-DD) for a chat template that contains the current date, so that the same command always
    produces the same tokens."""
    vocab_size: int = 4096
    """Vocabulary size of the tokenizer to train, special tokens included."""
    train_bytes: int = 1_000_000_000
    """Number of bytes of text, from the start of the training split, to train the tokenizer on. Memory grows
    with the number of different words in them."""
