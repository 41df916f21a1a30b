"""`olmoe generate chat=true`: what is said, in a terminal and through a pipe, and what is computed for it."""

import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from olmoe_train.checkpoint.convert.stored_model import load_stored_model
from olmoe_train.cli.chat_session import ChatSession, Ending, end_of_turn_tokens, open_session
from olmoe_train.cli.generate import main
from olmoe_train.config.generate import GenerateConfig
from olmoe_train.data.chat_template import open_template
from olmoe_train.utils.errors import UserError
from olmoe_train.utils.exit_codes import BAD_INPUT, CLOSED_OUTPUT, OK
from tests.support import fork_server
from tests.support.chat_templates import CHATML, EOS, IM_END, SPECIAL, TEMPLATES, write_tokenizer
from tests.support.commands import command_environment
from tests.support.talkers import write_babbler, write_reciter

CPU = torch.device("cpu")
ANSWER = "Ja: é漢"  # six of its characters' bytes have no token in common with another


def open_chat(directory: Path, **options: Any) -> ChatSession:
    model, files = load_stored_model(str(directory), CPU)
    return open_session(model, CPU, files, GenerateConfig(str(directory), chat=True, **options))


def answer(session: ChatSession, text: str) -> str:
    pieces: list[str] = []
    session.answer(text, pieces.append)
    return "".join(pieces)


def fed_tokens(session: ChatSession) -> list[int]:
    """From now on, collect the tokens that the model is given."""
    fed: list[int] = []
    session.model.register_forward_pre_hook(lambda _, inputs: fed.extend(inputs[0][0].tolist()))
    return fed


# Tokens of an earlier turn that are computed again; 11 are the answer's. Llama 3's prompt ends with two line
# breaks, one token, and before an answer they are two tokens. Tulu's thinker drops "<think>", 5 tokens.
COMPUTED_AGAIN = {"chatml": 0, "mistral": 0, "llama 3": 11 + 1, "tulu thinker": 11 + 5}


@pytest.mark.parametrize("template", COMPUTED_AGAIN)
def test_only_new_tokens_are_computed_and_the_answer_stays_the_same(tmp_path: Path, template: str) -> None:
    directory = write_babbler(tmp_path / "hf", TEMPLATES[template])
    session = open_chat(directory, max_new_tokens=12)
    fed = fed_tokens(session)
    known = 0
    for text in ("Hello there", "what is it?", "Yes (nothing)", "of"):
        fresh = open_chat(directory, max_new_tokens=12)
        fresh.messages = session.messages
        expected = fed_tokens(fresh)
        fed.clear()
        assert answer(session, text) == answer(fresh, text)
        shared = len(expected) - len(fed)
        assert fed == expected[shared:]
        assert shared == (known and known - COMPUTED_AGAIN[template])
        known = len(expected)


def test_a_cleared_conversation_starts_with_the_system_message(tmp_path: Path) -> None:
    directory = write_babbler(tmp_path / "hf")
    session = open_chat(directory, max_new_tokens=8, system="Hello")
    first = answer(session, "what?")
    assert answer(session, "what?") != first
    session.clear()
    assert answer(session, "what?") == first
    assert [message["content"] for message in session.messages] == ["Hello", "what?", first]
    assert answer(open_chat(directory, max_new_tokens=8), "what?") != first


ENDS = {
    "chatml": {IM_END},
    "llama 2": {EOS},
    "llama 3": {SPECIAL.index("<|eot_id|>")},
    "zephyr": {EOS},
    "olmo thinker": {EOS, IM_END},
}


@pytest.mark.parametrize("name", ENDS)
def test_tokens_that_end_an_answer(tmp_path: Path, name: str) -> None:
    directory = write_tokenizer(tmp_path / "hf", TEMPLATES[name])
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    assert end_of_turn_tokens(open_template(TEMPLATES[name], special, None, "here"), tokenizer) == ENDS[name]
    plain = "{% for message in messages %}{{ message.role ~ ': ' ~ message.content ~ '\n' }}{% endfor %}"
    assert end_of_turn_tokens(open_template(plain, special, None, "here"), tokenizer) == set()


def test_a_conversation_ends_at_the_last_position_and_says_so(tmp_path: Path) -> None:
    session = open_chat(write_babbler(tmp_path / "hf", max_position_embeddings=60))
    fed = fed_tokens(session)
    assert session.answer("what?", lambda piece: None) is Ending.positions
    assert len(fed) == 60
    before = session.messages
    with pytest.raises(UserError, match=r"tokens, but the model has max_position_embeddings=60: the message"):
        answer(session, "of")
    assert session.messages == before
    session.clear()
    assert session.answer("what?", lambda piece: None) is Ending.positions


def test_an_interrupted_answer_is_kept_as_far_as_it_was_read(tmp_path: Path) -> None:
    directory = write_babbler(tmp_path / "hf")
    session = open_chat(directory, max_new_tokens=12)
    pieces: list[str] = []

    def interrupt(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.answer("what?", interrupt)
    assert session.messages[-1] == {"role": "assistant", "content": "".join(pieces)}
    fresh = open_chat(directory, max_new_tokens=12)
    fresh.messages = session.messages
    assert answer(session, "of") == answer(fresh, "of")


def test_what_is_refused_and_what_has_no_effect(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = write_babbler(tmp_path / "hf", TEMPLATES["mistral"])
    with pytest.raises(UserError, match=r"system=Hello: the chat template refuses it: .*/hf\)$"):
        open_chat(directory, system="Hello")
    with pytest.raises(UserError, match=r"^chat_template_kwargs\.thinking: the chat template of .*/hf does"):
        open_chat(directory, chat_template_kwargs={"thinking": False})
    with pytest.raises(UserError, match="prompt is missing"):
        main(GenerateConfig(str(directory)))
    assert caplog.messages == []
    main(GenerateConfig(str(directory), "what?", 3, system="Hello", seed=1, top_p=0.5))
    assert [message.partition(" has")[0] for message in caplog.messages] == [
        "warning: top_p=0.5",
        "warning: seed=1",
        "warning: system=Hello",
    ]
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"hf: no chat template, .*\n  Copy the chat_template\.jinja"):
        open_chat(directory)


def generate(directory: Path, *options: str) -> list[str]:
    return [
        fork_server.python(),
        "-m",
        "olmoe_train",
        "generate",
        f"source={directory}",
        "chat=true",
        *options,
    ]


def piped(*command: str, lines: bytes, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        command, input=lines, stdout=stdout, stderr=subprocess.PIPE, env=command_environment(), timeout=120
    )


@pytest.mark.slow
def test_through_a_pipe_only_answers_come_out(tmp_path: Path) -> None:
    """The prompt is the first message. A line that looks like a command is a message."""
    directory = write_reciter(tmp_path / "hf", CHATML, ANSWER, max_position_embeddings=100)
    result = piped(*generate(directory, "prompt=a(b)"), lines=b"hi\n\n/help\n")
    assert (result.returncode, result.stderr) == (OK, b"")
    assert result.stdout.decode() == f"{ANSWER}\n" * 3

    # Each character of several bytes is cut off whole.
    result = piped(*generate(directory, "max_new_tokens=8"), lines=b"hi\nand now " + b"?" * 70 + b"\n")
    assert result.returncode == BAD_INPUT
    assert result.stdout.decode() == "Ja: é\n"
    warning, error, advice = result.stderr.decode().splitlines()
    assert warning.endswith("it has as many tokens as max_new_tokens allows")
    assert error.startswith("error: line 2 of the input: the conversation with this message has ")
    assert advice.startswith("  ")

    result = piped(*generate(directory), lines=b"hi\n\xff\n")
    assert result.returncode == BAD_INPUT
    assert result.stdout.decode() == f"{ANSWER}\n"
    assert b"line 2 of the input is not UTF-8" in result.stderr

    reader, writer = os.pipe()
    os.close(reader)
    result = piped(*generate(directory), lines=b"hi\n", stdout=writer)
    os.close(writer)
    assert (result.returncode, result.stderr) == (CLOSED_OUTPUT, b"")


@pytest.mark.slow
def test_a_warning_of_the_length_follows_the_text(tmp_path: Path) -> None:
    directory = write_babbler(tmp_path / "hf", max_position_embeddings=5)
    command = [
        part for part in generate(directory, "prompt=Hello", "max_new_tokens=8") if part != "chat=true"
    ]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=command_environment())
    text, warning = run.stdout.decode().splitlines()
    assert text.startswith("Hello")
    assert len(text) > len("Hello")
    assert warning.startswith("warning: the text is longer than the model's max_position_embeddings=5")


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, *command: str) -> None:
        # A shell starts background jobs with SIGINT ignored, and ignored signals stay so in every child.
        heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
        spawn = f"import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn({list(command)!r})))"
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"{heed}; {spawn}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=command_environment() | {"TERM": "dumb"},
        )

    def until(self, text: str, after: str = "") -> str:
        """Read until `text` is there, at some place after `after`; returns what was read."""
        assert self.process.stdout is not None
        seen, deadline = "", time.monotonic() + 120
        while text not in seen.partition(after)[2] if after else text not in seen:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0, deadline - time.monotonic()))
            read = os.read(self.process.stdout.fileno(), 1) if ready else b""
            assert read, f"no {text!r} in {seen!r}"
            seen += read.decode()
        return seen.replace("\r\n", "\n")

    def type(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()


@pytest.mark.slow
def test_in_a_terminal(tmp_path: Path) -> None:
    directory = write_babbler(tmp_path / "hf", max_position_embeddings=10**6)
    terminal = Terminal(*generate(directory, "max_new_tokens=100000"))

    def ask_and_interrupt() -> str:
        """Ask, read 30 characters of the answer, and stop it."""
        terminal.type("what?\n")
        terminal.until("what?\n".replace("\n", "\r\n"))
        assert terminal.process.stdout is not None
        begin = os.read(terminal.process.stdout.fileno(), 1).decode()
        while len(begin) < 30:
            begin += os.read(terminal.process.stdout.fileno(), 1).decode()
        terminal.type("\x03")
        terminal.until("\r\n> ")
        return begin

    try:
        assert "/help lists the commands" in terminal.until("> ")
        first = ask_and_interrupt()
        assert ask_and_interrupt() != first
        terminal.type("/clear\n")
        terminal.until("the conversation is forgotten\r\n> ")
        assert ask_and_interrupt() == first
        terminal.type("/quit\n")
        terminal.until("there is no command /quit; /help lists the commands\r\n> ")
        terminal.type("/help\n")
        terminal.until("/exit    leave", after="/clear   forget")
        terminal.type("/exit\n")
        assert terminal.process.wait(60) == OK
    finally:
        terminal.process.kill()
        terminal.process.wait()
