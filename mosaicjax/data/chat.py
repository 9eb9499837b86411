"""Chat templates: conversations as text, with the characters that bear loss.

A template is Jinja, as in a Hugging Face `tokenizer_config.json`, rendered in a sandbox. What the assistant
said is what stands in its `{% generation %}` blocks; of a template without them, what each turn of the
assistant adds to the prompt for it. A special token is one where the template writes it: the same characters
in a turn's own text are text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import Enum
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from mosaicjax.data.conversations import ALL_FIELDS, Format, Message, messages_of, pair_of, told_by
from mosaicjax.data.marked import Marked, Pair
from mosaicjax.data.tokenizer import Tokenizer
from mosaicjax.errors import InputError

TEMPLATES = Path(__file__).parent / "templates"
SHIPPED = {path.stem: path for path in sorted(TEMPLATES.glob("*.jinja"))}
NEEDED = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
"""Special tokens that a shipped template is nothing without."""
OWN = "tokenizer"
OWN_FILE = "chat_template.jinja"
CONFIG = "tokenizer_config.json"
OPEN, CLOSE, BREAK = "\ufdd0", "\ufdd1", "\ufdd2"
"""Around what is learned, and within what looks like a special token: Unicode has no such characters."""


class LossOn(Enum):
    """Which tokens of a conversation bear loss."""

    RESPONSE = "response"
    """All that the assistant says."""
    LAST = "last"
    """What the assistant says last."""
    ALL = "all"
    """Every token."""


@dataclass(frozen=True)
class Chat:
    """How rows become documents; a token store records it.

    `template` is the Jinja text, `special` the tokenizer's special tokens, `bos` and `eos` those that a
    template may name.
    """

    template: str
    format: Format = Format.AUTO
    loss_on: LossOn = LossOn.RESPONSE
    special: tuple[str, ...] = ()
    bos: str = ""
    eos: str = ""

    @classmethod
    def of(
        cls,
        template: str,
        tokenizer: Tokenizer,
        *,
        format_: Format = Format.AUTO,
        loss_on: LossOn = LossOn.RESPONSE,
    ) -> Chat:
        """The template of a name of `SHIPPED`, of `tokenizer` (the tokenizer's own), or of a file.

        Raises: InputError for a template that is not there or is no Jinja, or special tokens that it needs.
        """
        config = tokenizer.files[0].with_name(CONFIG)
        names = _token_names(config)
        lacking = [token for token in NEEDED.get(template, ()) if token not in tokenizer.special]
        if lacking:
            raise InputError(
                f"the template {template} needs special tokens that the tokenizer lacks",
                expected=" ".join(NEEDED[template]),
                got=" ".join(sorted(tokenizer.special)),
                fix=f"one of {', '.join(SHIPPED)}, or `data add-tokens` with --special {lacking[0]}",
            )
        made = cls(
            template=_template_text(template, config),
            format=format_,
            loss_on=loss_on,
            special=tuple(sorted(tokenizer.special)),
            bos=names.get("bos_token", ""),
            eos=names.get("eos_token", tokenizer.separator_token),
        )
        _compiled(made.template)
        return made.of_pairs() if format_ is Format.PREFERENCE else made

    def of_pairs(self) -> Chat:
        """The same for preference pairs, of which the answers alone bear loss.

        Raises: InputError where every token should.
        """
        if self.loss_on is LossOn.ALL:
            raise InputError(
                "--loss-on all with preference pairs, whose answers are compared",
                fix="a build without --loss-on",
            )
        return replace(self, format=Format.PREFERENCE, loss_on=LossOn.LAST)

    def __str__(self) -> str:
        """In a line."""
        digest = hashlib.sha256(self.template.encode()).hexdigest()
        return f"{self.format.value} rows, loss on {self.loss_on.value}, template {digest[:12]}"

    def columns(self, names: Sequence[str], place: str) -> list[str]:
        """Those of a table's columns that rows are read from.

        Raises: InputError where there is none.
        """
        found = [name for name in names if name in ALL_FIELDS]
        if not found:
            raise InputError(
                f"{place} holds no conversations",
                expected=f"columns among {', '.join(ALL_FIELDS)}",
                got=", ".join(names),
            )
        return found

    def content(self, row: Mapping[str, Any], place: str) -> Marked | Pair:
        """A row as a document, or as the two of a pair.

        Raises: InputError naming the row that is no conversation, or that the template refuses.
        """
        format_ = told_by(row, place) if self.format is Format.AUTO else self.format
        if format_ is not Format.PREFERENCE:
            return self._checked(messages_of(row, format_, place), place)
        prompt, chosen, rejected = pair_of(row, place)
        pair = Pair(*(self._checked([*prompt, answer], place) for answer in (chosen, rejected)))
        if pair.chosen.text == pair.rejected.text:
            raise InputError(
                f"{place}: the template writes the same for chosen and rejected",
                expected="two answers",
                fix="leave the row out",
            )
        return pair

    def _checked(self, messages: Sequence[Message], place: str) -> Marked:
        """A conversation as a document, once it is known to hold none of our marks."""
        _check_marks(messages, place)
        return self.marked(messages, place)

    def prompt(self, messages: Sequence[Message], place: str) -> Marked:
        """A conversation up to where the assistant's next turn begins, with no part that is learned alone.

        Raises: InputError where the template refuses it.
        """
        _check_marks(messages, place)
        whole = self.render([self._as_text(message) for message in messages], place, prompt=True)
        text, special, _ = self._spans(whole)
        return Marked(text, tuple(special), ((0, len(text)),), place)

    def text(self, messages: Sequence[Message], place: str, *, prompt: bool) -> str:
        """A conversation as one text, up to where the assistant's next turn begins.

        Without `prompt` the last turn is to be gone on with: the text ends where that message's own does,
        less blanks where the template takes them from the end of a turn.

        Raises: InputError where the template refuses it, or leaves the last message out.
        Source: Transformers 5, `render_jinja_template` with `continue_final_message`.
        """
        _check_marks(messages, place)
        if not prompt:
            messages = [*messages[:-1], {**messages[-1], "content": f"{messages[-1]['content']}{BREAK} "}]
        text = self.render(messages, place, prompt=prompt).replace(OPEN, "").replace(CLOSE, "")
        if prompt:
            return text
        before, found, behind = text.rpartition(BREAK)
        if not found:
            raise InputError(f"{place}: the chat template leaves out the turn that is to be gone on with")
        return before if behind.startswith(" ") else before.rstrip()

    def turn_end(self) -> tuple[str, str]:
        """What ends a turn of the assistant: a special token, or else a text; "" for what it is not.

        Raises: InputError for a template that refuses a question and its answer.
        """
        place = "a question and its answer"
        asked, answer = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "Two."}
        _, found, rest = self.render([asked, answer], place).rpartition(str(answer["content"]))
        if not found:
            raise InputError("the chat template leaves out what the assistant says")
        text, special, _ = self._spans(rest.partition(CLOSE)[0])
        before = text[: special[0][0]] if special else text
        if before.strip():
            return "", before
        return (text[slice(*special[0])] if special else ""), ""

    def marked(self, messages: Sequence[Message], place: str) -> Marked:
        """A conversation as a text, and what of it is learned."""
        messages = [self._as_text(message) for message in messages]
        whole = self.render(messages, place)
        if OPEN not in whole:
            whole = self._by_turns(messages, whole, place)
        text, special, learned = self._spans(whole)
        if self.loss_on is LossOn.ALL:
            learned = [(0, len(text))]
        elif self.loss_on is LossOn.LAST:
            learned = learned[-1:]
        return Marked(text, tuple(special), tuple(learned), place)

    def render(self, messages: Sequence[Message], place: str, *, prompt: bool = False) -> str:
        """The template's text, with its marks; with `prompt` up to where an assistant's turn begins.

        Raises: InputError with what the template says against the conversation.
        """
        import jinja2

        try:
            return _compiled(self.template).render(
                messages=messages,
                add_generation_prompt=prompt,
                bos_token=self.bos,
                eos_token=self.eos,
                tools=None,
                documents=None,
            )
        # A template is a program: these are what it says to messages that it was not made for.
        except (
            jinja2.TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
        ) as error:
            raise InputError(f"{place}: the chat template refuses it", got=str(error)) from error

    def _by_turns(self, messages: Sequence[Message], whole: str, place: str) -> str:
        """Mark what each turn of the assistant adds to the prompt for it."""
        marked, at = "", 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:number], place, prompt=True)
            after = self.render(messages[: number + 1], place)
            if not whole.startswith(before) or not whole.startswith(after) or not at <= len(before):
                raise InputError(
                    f"{place}: what of it the assistant says cannot be told: the chat template writes turns"
                    " otherwise once others follow",
                    fix="a template with {% generation %} around it",
                )
            marked += whole[at : len(before)] + OPEN + whole[len(before) : len(after)] + CLOSE
            at = len(after)
        return marked + whole[at:]

    @cached_property
    def _tokens(self) -> re.Pattern[str]:
        longest_first = sorted(self.special, key=len, reverse=True)
        return re.compile(f"(?<!{BREAK})(?:{'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def _as_text(self, value: Any) -> Any:
        """The same with no special token in it that the template would seem to have written."""
        if isinstance(value, str):
            return self._tokens.sub(lambda found: "".join(BREAK + each for each in found[0]), value)
        if isinstance(value, Mapping):
            return {name: self._as_text(each) for name, each in value.items()}
        if isinstance(value, list):
            return [self._as_text(each) for each in value]
        return value

    def _spans(self, whole: str) -> tuple[str, list[tuple[int, int]], list[tuple[int, int]]]:
        """A text without its marks, and where special tokens and what is learned lie in it."""
        text, special, learned = "", [], []
        begun = 0
        for part in re.split(f"([{OPEN}{CLOSE}])", whole):
            if part == OPEN:
                begun = len(text)
            elif part == CLOSE:
                if len(text) > begun:
                    learned.append((begun, len(text)))
            else:
                at = 0
                for found in self._tokens.finditer(part):
                    text += part[at : found.start()].replace(BREAK, "")
                    special.append((len(text), len(text) + len(found[0])))
                    text += found[0]
                    at = found.end()
                text += part[at:].replace(BREAK, "")
        return text, special, learned


def brings_template(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer's files hold a chat template."""
    config = tokenizer.files[0].with_name(CONFIG)
    return config.with_name(OWN_FILE).exists() or bool(_config(config).get("chat_template"))


def _check_marks(messages: Sequence[Message], place: str) -> None:
    written = json.dumps(messages, ensure_ascii=False, default=str)
    if any(mark in written for mark in (OPEN, CLOSE, BREAK)):
        raise InputError(f"{place} holds a character that is none (U+FDD0 to U+FDD2)", fix="leave it out")


def _template_text(template: str, config: Path) -> str:
    if template in SHIPPED:
        return SHIPPED[template].read_text(encoding="utf-8")
    if template == OWN:
        own = config.with_name(OWN_FILE)
        if own.exists():
            return own.read_text(encoding="utf-8")
        found = _config(config).get("chat_template")
        if isinstance(found, list):
            named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
            found = named.get("default")
        if not isinstance(found, str):
            raise InputError(
                f"{config.parent} brings no chat template",
                expected="chat_template in tokenizer_config.json, or chat_template.jinja",
                fix=f"--template {' or '.join(SHIPPED)}, or a file",
            )
        return found
    path = Path(template)
    if not path.is_file():
        raise InputError(
            f"there is no chat template {template}", expected=f"{', '.join((*SHIPPED, OWN))}, or a file"
        )
    if path.suffix == ".json":
        return _template_text(OWN, path)
    return path.read_text(encoding="utf-8")


def _config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged", expected="JSON", got=str(error)) from error
    return found if isinstance(found, dict) else {}


def _token_names(config: Path) -> dict[str, str]:
    """The special tokens that a tokenizer's configuration names, by what they are for."""
    named = {}
    for name, value in _config(config).items():
        token = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(token, str):
            named[name] = token
    return named


@lru_cache(maxsize=4)
def _compiled(template: str) -> Any:
    """A template ready to render, as Hugging Face's are: https://huggingface.co/docs/transformers/chat_templating.

    Raises: InputError for what is no Jinja.
    """
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` puts marks around what the assistant says."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller: Any) -> str:
            return f"{OPEN}{caller()}{CLOSE}"

    def refuse(why: str) -> None:
        raise jinja2.TemplateError(why)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = lambda value, **options: json.dumps(
        value, **({"ensure_ascii": False} | options)
    )
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise InputError("the chat template is no Jinja", got=str(error)) from error
