"""Makes ids of texts and of pairs as the model's own library does: case, prompt, what is cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bertile.base.errors import BundleError, InputError, require
from bertile.families.text_settings import TextSettings

FILE = "tokenizer.json"
# What a tokenizer's encoding calls the inputs of a model.
FIELDS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}


class Ids(list[int]):
    """A text as its ids, special ones among them: its own encoding."""

    overflowing: Sequence[Any] = ()

    @property
    def ids(self) -> list[int]:
        """The ids themselves, as an encoding has them."""
        return self

    @property
    def attention_mask(self) -> list[int]:
        """That there is no padding."""
        return [1] * len(self)

    @property
    def type_ids(self) -> list[int]:
        """That all belong to the first text."""
        return [0] * len(self)


Text = str | tuple[str, str] | Ids  # a text, or a pair of them
# What of a pair is cut, in tokenizers' words.
LONGER, FIRST, SECOND = "longest_first", "only_first", "only_second"


class TextTokenizer:
    """The tokenizer of a bundle, or of an exported model, in `directory`.

    `limit` is how many tokens the model takes. `whole` is the `tokenizers.Tokenizer` that neither
    cuts nor pads. Raises BundleError where there is none, or where it cannot be read.
    """

    def __init__(self, directory: Path, settings: TextSettings, limit: int | None = None) -> None:
        self.settings, self._path = settings, directory / FILE
        self.whole, self._side = self._read()
        self.longest = _least(limit, settings.longest)
        self.cut_at = _least(self.longest, settings.cut_at)
        self._cutting: dict[tuple[Any, ...], Any] = {}

    def encode(
        self,
        texts: Sequence[Text],
        *,
        truncate: bool = True,
        side: str | None = None,
        offsets: bool = False,
        cut: str = LONGER,
        first: int = 1,
    ) -> list[Any]:
        """The `tokenizers.Encoding` of each text or pair: its ids, and, where `offsets` are asked
        for, the characters and the names of its tokens.

        What is too long is cut at `side`, or at that which the directory says, of a pair the longer
        text, or the first alone where `cut` is FIRST; unless `truncate`, InputError, which counts
        texts from `first`.
        """
        limit = self.cut_at if truncate else None
        tokenizer = self.cutting(limit, cut, side=side) if limit else self.whole
        encode = tokenizer.encode_batch if offsets else tokenizer.encode_batch_fast
        words = [text for text in texts if not isinstance(text, Ids)]
        encodings = encode(words)
        if len(words) < len(texts):
            rest = iter(encodings)
            encodings = [
                self._cut(text, limit, side) if isinstance(text, Ids) else next(rest)
                for text in texts
            ]
        if not truncate and self.longest:
            self._refuse_longer(encodings, first)
        return encodings

    def cutting(self, length: int, strategy: str, stride: int = 0, side: str | None = None) -> Any:
        """A `tokenizers.Tokenizer` that cuts to `length` tokens; kept for the next call.

        What it leaves out is an encoding's `overflowing`, which goes back by `stride` tokens.
        """
        side = side or self.settings.side or self._side
        key = (length, strategy, stride, side)
        if key not in self._cutting:
            tokenizer, _ = self._read()
            tokenizer.enable_truncation(length, stride=stride, strategy=strategy, direction=side)
            self._cutting[key] = tokenizer
        return self._cutting[key]

    def special_id(self, kind: str) -> int | None:
        """The id of the token that BERT's relatives call "mask", "unk" or "pad"; None without."""
        for word in _SPECIAL[kind]:
            if (number := self.whole.token_to_id(word)) is not None:
                return number
        return None

    def words(self, tokens: Sequence[str]) -> str:
        """What tokens are as text."""
        if self.whole.decoder is None:
            return " ".join(tokens)
        return self.whole.decoder.decode(list(tokens))

    def _cut(self, ids: Ids, limit: int | None, side: str | None) -> Ids:
        if limit is None or len(ids) <= limit:
            return ids
        left = (side or self.settings.side or self._side) == "left"
        kept, rest = (ids[-limit:], ids[:-limit]) if left else (ids[:limit], ids[limit:])
        cut = Ids(kept)
        cut.overflowing = [Ids(rest)]
        return cut

    def _refuse_longer(self, encodings: Sequence[Any], first: int) -> None:
        for number, encoding in enumerate(encodings, first):
            if len(encoding) > self.longest:
                raise InputError(
                    f"text {number} has {len(encoding)} tokens, the model takes at most"
                    f" {self.longest}",
                    "shorten it, or let it be cut (truncate=True, no --no-truncate)",
                )

    def _read(self) -> tuple[Any, str]:
        """The tokenizer, and the side at which its file says that texts are cut."""
        (tokenizers,) = require("run", "tokenizers")
        if not self._path.is_file():
            raise BundleError(
                f"{self._path.parent} has no {FILE}", "call bertile.load with token ids"
            )
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(self._path))
        except Exception as error:  # the package raises plain Exception for what it cannot read
            raise BundleError(
                f"{self._path} cannot be read: {error}", "compile the model again"
            ) from error
        # what the file says is how the model was trained, often padding and cutting at 128 tokens
        tokenizer.no_padding()
        side = (tokenizer.truncation or {}).get("direction", "right")
        tokenizer.no_truncation()
        _normalize(tokenizers, tokenizer, self.settings)
        return tokenizer, side


_SPECIAL = {
    "mask": ("[MASK]", "<mask>"),
    "unk": ("[UNK]", "<unk>"),
    "pad": ("[PAD]", "<pad>"),
}


def _normalize(tokenizers: Any, tokenizer: Any, settings: TextSettings) -> None:
    """Set the tokenizer's normalizer as transformers and sentence-transformers do."""
    kinds, normalizer = tokenizers.normalizers, tokenizer.normalizer
    if settings.normalizer is not None and isinstance(normalizer, kinds.BertNormalizer):
        normalizer = kinds.BertNormalizer(normalizer.clean_text, **settings.normalizer)
    if settings.lower:
        lower = kinds.Lowercase()
        normalizer = lower if normalizer is None else kinds.Sequence([lower, normalizer])
    if normalizer is not None:
        tokenizer.normalizer = normalizer


def max_tokens(manifest: Mapping[str, Any]) -> int | None:
    """The most tokens of one sequence, by the model's positions and by a static length."""
    return _least(manifest["model"].get("max_length"), manifest["static"].get("length"))


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit), default=None)
