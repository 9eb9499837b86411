"""Conversations as prompts: by the tokenizer's chat template, or one that was named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mosaicjax.data.chat import OWN, SHIPPED, Chat, brings_template
from mosaicjax.data.loss_mask import encode_marked
from mosaicjax.data.tokenizer import Tokenizer
from mosaicjax.serve.problems import Problem

PLACE = "messages"


class Chatter:
    """Makes a conversation's ids; `ends` and `stops` are the tokens and texts that end the assistant's turn.

    `before` are ids put before a conversation whose template does not begin with them itself.
    """

    def __init__(self, chat: Chat, tokenizer: Tokenizer, before: tuple[int, ...]) -> None:
        """Ask the template how a turn ends.

        Raises:
            InputError: it refuses a question and its answer.
        """
        self._chat, self._tokenizer, self._before = chat, tokenizer, before
        token, text = chat.turn_end()
        self.ends = (tokenizer.special[token],) if token else ()
        self.stops = (text,) if text else ()

    def ids(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """A conversation up to the turn that is to be written.

        Raises:
            InputError: the template refuses it.
        """
        marked = self._chat.prompt(messages, PLACE)
        ((array, _),) = encode_marked([marked], self._tokenizer)
        ids: list[int] = array.tolist()
        if self._before and ids[: len(self._before)] != list(self._before):
            ids = [*self._before, *ids]
        return ids or [self._tokenizer.separator]


def chatter_of(template: str, tokenizer: Tokenizer, before: tuple[int, ...]) -> Chatter | None:
    """By a template's name or file ("": the tokenizer's own); None where the tokenizer brings none.

    Raises:
        InputError: no such template, special tokens that it needs, or one that does not work.
    """
    if not template and not brings_template(tokenizer):
        return None
    return Chatter(Chat.of(template or OWN, tokenizer), tokenizer, before)


def lacking() -> Problem:
    """There is no template to read a conversation by."""
    return Problem(
        400,
        "this model's tokenizer brings no chat template; serve it with --template"
        f" {' or '.join(SHIPPED)}, or a file",
        code="no_chat_template",
    )
