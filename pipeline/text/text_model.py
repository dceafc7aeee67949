"""Holds what every model of texts has: its tokenizer, its settings, how its texts are run."""

from __future__ import annotations

import functools
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from bertile.base.errors import InputError, UsageError, nearest
from bertile.base.progress import Progress
from bertile.families import text_settings
from bertile.families.text_settings import USUAL_PROMPTS
from bertile.loader import Model
from bertile.loading.exits import LAYERS
from bertile.text.engine import Answer, Engine
from bertile.text.tokens import LONGER, Ids, Text, TextTokenizer, max_tokens

LOG = logging.getLogger("bertile")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class Steps(NamedTuple):
    """What a call does before the model and behind it; between them runs `TextModel.engine`.

    `prepare` makes an encoding of each text: `prepare(texts, first=1)`, where errors count texts
    from `first`. `finish` makes of an `Answer` what the caller gets.
    """

    prepare: Callable[..., list[Any]]
    finish: Callable[[Answer], Any]


class Call:
    """How many texts of a call are `cut`; a thread that tokenizes counts for the one that asked.

    `layers` counts, of a bundle whose texts leave early, texts by the encoder layers that they went
    through.
    """

    def __init__(self) -> None:
        self.cut, self.layers = 0, Counter[int]()

    def count(self, answer: Answer) -> None:
        """Say of an answer through how many layers it went, where that is known."""
        if LAYERS in answer.outputs:
            self.layers[int(answer.outputs[LAYERS])] += 1


class TextModel:
    """A bundle that answers texts; `bertile.open` makes it. A context manager.

    `model` is the loaded `bertile.Model`, `engine` runs its texts, and `settings` is what the
    directory says of texts.
    """

    def __init__(self, model: Model, directory: Path, streams: int | None = None) -> None:
        self.model, self._streams = model, streams
        self._last = threading.local()  # of each thread: its `call`
        self.settings = text_settings.of_bundle(directory, model.manifest)
        self._tokens = TextTokenizer(directory, self.settings, max_tokens(model.manifest))
        self.engine = Engine(model, streams)

    @property
    def tokenizer(self) -> Any:
        """The bundle's `tokenizers.Tokenizer`, which neither cuts nor pads."""
        return self._tokens.whole

    @property
    def max_seq_length(self) -> int | None:
        """To how many tokens a text is cut; None for no limit."""
        return self._tokens.cut_at

    @property
    def truncated(self) -> int:
        """How many texts of this thread's last call were cut, since they were too long."""
        return self._call().cut

    @property
    def layers(self) -> Counter[int]:
        """Of a bundle whose texts leave early, how many of this thread's last call went through so
        many encoder layers.
        """
        return self._call().layers

    def _call(self) -> Call:
        """What this thread did last."""
        call: Call | None = getattr(self._last, "call", None)
        return call or Call()

    @property
    def prompts(self) -> dict[str, str]:
        """What can be put in front of a text, by name."""
        return {**dict.fromkeys(USUAL_PROMPTS, ""), **self.settings.prompts}

    @property
    def default_prompt_name(self) -> str | None:
        """The prompt that every text has where no other is asked for."""
        return self.settings.default_prompt

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of a classifier's classes, in the order of its logits."""
        return self.model.labels

    def close(self) -> None:
        """Give back the library and the weights; a later call raises BertileError."""
        self.engine.close()
        self.model.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle or a copy is the directory, which is opened again where it is read."""
        return type(self), (self.model, Path(self.model.directory), self._streams)

    def __repr__(self) -> str:
        return f"<bertile.text.{type(self).__name__} of {self.model!r}>"

    def label(self, index: int) -> str:
        """The name of a class, as transformers calls those without."""
        return self.labels[index] if index < len(self.labels) else f"LABEL_{index}"

    def prompt_text(self, name: str | None, prompt: str | None) -> str:
        """What goes in front of a text; UsageError for a name, or a prompt, that cannot be used."""
        if prompt is None:
            name = self.default_prompt_name if name is None else name
            if name is not None and name not in self.prompts:
                raise UsageError(f"prompt '{name}' is unknown{nearest(name, self.prompts)}")
            prompt = self.prompts[name] if name is not None else ""
        if prompt and not self.settings.include_prompt:
            raise UsageError(
                "this model leaves a prompt out of its pooling, which a bundle does not",
                'encode without: prompt=""',
            )
        return prompt

    def preparer(
        self,
        prompt_name: str | None = None,
        prompt: str | None = None,
        *,
        prompted: bool = True,
        truncate: bool = True,
        side: str | None = None,
        offsets: bool = False,
        cut: str = LONGER,
    ) -> Callable[..., list[Any]]:
        """The first of a call's `Steps`: texts, pairs of them or lists of ids to encodings.

        A prompt is put in front of a text, and of the first of a pair, where the call is
        `prompted`; ids are taken as they are. What is too long is cut at `side`, "left" or
        "right", else as the directory says; InputError, unless `truncate`. UsageError, at once, for
        a prompt that cannot be used.
        """
        before = self.prompt_text(prompt_name, prompt) if prompted else ""

        def prepare(texts: Sequence[Any], first: int = 1) -> list[Any]:
            self._check_ids(texts, first)
            if before:
                texts = [_prompted(before, text) for text in texts]
            return self._tokens.encode(
                texts, truncate=truncate, side=side, offsets=offsets, cut=cut, first=first
            )

        return prepare

    def _check_ids(self, texts: Sequence[Any], first: int) -> None:
        """Raise InputError for a list of ids of which the model does not have all."""
        for number, text in enumerate(texts, first):
            if isinstance(text, Ids) and (not text or max(text) >= self._below or min(text) < 0):
                raise InputError(
                    f"text {number} is no list of ids from 0 to {self._below - 1}", "give those"
                )

    @functools.cached_property
    def _below(self) -> int:
        """How many ids the model has."""
        limits = {spec["name"]: spec["below"] for spec in self.model.manifest["inputs"]}
        return limits.get("input_ids") or self.tokenizer.get_vocab_size()

    def _answer(self, text: Text, prepare: Callable[..., list[Any]]) -> Answer:
        """The answer to a single text, by all threads."""
        call = self._begun()
        (encoding,) = prepare([text])
        answer = self.engine.single(encoding)
        call.cut = int(bool(encoding.overflowing))
        call.count(answer)
        return answer

    def _answers(
        self,
        texts: Iterable[Text],
        prepare: Callable[..., list[Any]],
        *,
        show_progress_bar: bool | None = None,
        what: str = "texts",
    ) -> Iterator[Answer]:
        """The answers in the order of the texts, as they come; how many were cut is logged."""
        call, seen = self._begun(), 0

        def encode(window: list[Text]) -> list[Any]:
            nonlocal seen
            encodings = prepare(window, first=seen + 1)
            seen += len(window)
            call.cut += sum(bool(encoding.overflowing) for encoding in encodings)
            return encodings

        answers = self.engine.stream(texts, encode)
        total = len(texts) if isinstance(texts, Sequence) else None
        with closing(_shown(answers, total, what, show_progress_bar)) as shown:
            for answer in shown:
                call.count(answer)
                yield answer
        if call.cut:
            LOG.info("%d texts were cut to %d tokens", call.cut, self.max_seq_length)

    def _begun(self) -> Call:
        """A call of this thread, which `truncated` and `layers` tell of from now on."""
        self._last.call = call = Call()
        return call


def also_named(**names: str) -> Callable[[F], F]:
    """A method that takes arguments by their older names too: old=new."""

    def decorate(method: F) -> F:
        @functools.wraps(method)
        def taking(self: Any, *arguments: Any, **options: Any) -> Any:
            renamed = {names.get(name, name): value for name, value in options.items()}
            return method(self, *arguments, **renamed)

        return cast(F, taking)

    return decorate


def checked(texts: Iterable[Any], is_text: Callable[[Any], bool], kind: str) -> Iterable[Any]:
    """The texts, of which each must be as `is_text` says; UsageError, with its number, if not.

    A sequence is checked at once, another iterable as it is read.
    """
    if isinstance(texts, (str, bytes, Mapping)) or not isinstance(texts, Iterable):
        raise UsageError(f"a {type(texts).__name__} is no list of texts", f"give {kind}, or a list")
    if isinstance(texts, Sequence):
        for number, text in enumerate(texts, 1):
            _must_be(text, number, is_text, kind)
        return texts
    return _checking(texts, is_text, kind)


def _checking(texts: Iterable[Any], is_text: Callable[[Any], bool], kind: str) -> Iterator[Any]:
    for number, text in enumerate(texts, 1):
        _must_be(text, number, is_text, kind)
        yield text


def _must_be(text: Any, number: int, is_text: Callable[[Any], bool], kind: str) -> None:
    if not is_text(text):
        raise UsageError(f"text {number} is a {type(text).__name__}, not {kind}", f"give {kind}")


def is_single(text: Any) -> bool:
    """Whether it is a text by itself."""
    return isinstance(text, str)


def is_pair(text: Any) -> bool:
    """Whether it is a pair of texts: a tuple or list of two."""
    pair = isinstance(text, (tuple, list)) and len(text) == 2
    return pair and isinstance(text[0], str) and isinstance(text[1], str)


def _prompted(before: str, text: Any) -> Any:
    if isinstance(text, str):
        return before + text
    return text if isinstance(text, Ids) else (before + text[0], text[1])


def _shown(answers: Iterator[T], total: int | None, what: str, show: bool | None) -> Iterator[T]:
    """The answers, with a bar on stderr where it is asked for, or where `bertile` logs as much."""
    if show is None:
        show = LOG.getEffectiveLevel() in (logging.DEBUG, logging.INFO)
    if not show:
        yield from answers
        return
    with Progress().bar(what, total) as bar:
        for answer in answers:
            bar.advance()
            yield answer
