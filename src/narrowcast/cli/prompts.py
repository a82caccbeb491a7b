"""Prompts from the command line, as token ids."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from narrowcast.errors import InvalidInputError
from narrowcast.launch import under_torchrun

STANDARD_INPUT = Path("-")


def read(path: Path) -> str:
    """The prompt in a file, or in standard input, without the line ends behind it."""
    if path == STANDARD_INPUT and under_torchrun():
        raise InvalidInputError(
            "--file -", expected="a file, which all ranks can read", found="torchrun", remedy="Pass the prompt in one."
        )
    try:
        data = sys.stdin.buffer.read() if path == STANDARD_INPUT else path.read_bytes()
        return data.decode("utf8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InvalidInputError(
            f"--file {path}", expected="UTF-8 text", found=f"bytes that are not ({error.reason})", remedy="Convert it."
        ) from error
    except OSError as error:
        raise InvalidInputError(
            f"--file {path}", expected="a text file", found=error.strerror, remedy="Pass another."
        ) from error


def encode(tokenizer: Any, prompts: Sequence[str], *, chat: bool = False) -> list[Tensor]:
    """Ids [1, T] of each prompt as it is, or, in a `chat`, as its user's first words.

    InvalidInputError for no prompts, for an empty one, and for a chat with a model that has no template for it.
    """
    if chat and not tokenizer.chat_template:
        raise InvalidInputError(
            "--chat", expected="a model with a chat template", found="none", remedy="Leave it out, and begin a text."
        )
    found = [_chat(tokenizer, text) if chat else tokenizer(text, return_tensors="pt").input_ids for text in prompts]
    if not found or any(text == "" or ids.shape[1] == 0 for text, ids in zip(prompts, found, strict=True)):
        raise InvalidInputError(
            "--prompt", expected="text", found="nothing", remedy="Pass --prompt TEXT, or --file FILE."
        )
    return found


def _chat(tokenizer: Any, text: str) -> Tensor:
    asked = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    ids: Tensor = tokenizer.apply_chat_template([{"role": "user", "content": text}], **asked).input_ids
    return ids
