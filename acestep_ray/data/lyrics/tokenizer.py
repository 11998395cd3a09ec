"""Lyrics to the token ids of the released model's lyric vocabulary."""

from __future__ import annotations

import hashlib
import string
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Whitespace

from acestep_ray.data.lyrics.cleaners import clean
from acestep_ray.data.lyrics.segment import (
    LANGUAGES,
    detect_line_languages,
    is_structure_line,
    parse_language,
)
from acestep_ray.errors import InputError
from acestep_ray.foreign_files import explained

MAX_LYRIC_TOKENS = 4096
MAX_LINE_CHARACTERS = 32_768
"""A line is cut after this many characters: whole books in one line would take minutes."""

# The token that stands where there are no lyrics; its mask is 0, as in the released model's inference.
_NO_LYRICS_ID = 0
_START, _SPACE, _UNKNOWN = "[START]", "[SPACE]", "[UNK]"
_LANGUAGE_TOKENS = {language: f"[{'zh-cn' if language == 'zh' else language}]" for language in LANGUAGES}
_REQUIRED_TOKENS = (_START, _SPACE, _UNKNOWN, *_LANGUAGE_TOKENS.values())
# Part of the fingerprint: raise it whenever the same lyrics and vocabulary give other ids than before.
_RULES_VERSION = 2

# What the vocabulary of the tiny checkpoint is made of.
_STRUCTURE_TAGS = [
    "[start]",
    "[intro]",
    "[verse]",
    "[chorus]",
    "[bridge]",
    "[outro]",
    "[end]",
    "[inst]",
    "[solo]",
    "[hook]",
    "[pre-chorus]",
    "[break]",
]
_ASCII = string.ascii_lowercase + string.digits + string.punctuation + string.ascii_uppercase
_OTHER_CHARACTERS = (
    "àáâãäåąæçćčďèéêëęěìíîïıłñńňòóôõöőøœřśšşßťùúûüůűýÿźżžğ"
    "абвгдежзийклмнопрстуфхцчшщъыьэюяё"
    "ابتثجحخدذرزسشصضطظعغفقكلمنهويءآأؤإئةىًٌٍَُِّْ"
    "अआइईउऊऋएऐओऔकखगघङचछजझञटठडढणतथदधनपफबभमयरलवशषसहािीुूृेैोौंःँ़्"
    "—–’‘“”„«»…¿¡€£°،؟؛।"
)
_FREQUENT_PAIRS = (
    "th he in er an re on en at es or te st ar nd to nt is ou it me le ne de se la ma na sa ta ra ha ka ga ya wa "
    "mi ni si ti ri hi ki gi li bi di mo no so ro ho ko go yo lo do mu nu su ru ku gu lu du ke ge be ve we ch sh "
    "zh ng ai ei ao ia ie ua uo ue eo eu ll ss tt ee oo al el il ol ul am em im om um ab ad ed id od ic ec "
    "ac oc as os us ur ir ut et of my by un au be po pa pe pi tr cr br gr pr st sk sz cz rz"
)


@dataclass(frozen=True)
class LyricTokens:
    """The token ids of a song's lyrics (at most `MAX_LYRIC_TOKENS`) and the language of each line that is not blank.

    Without lyrics, `ids` is one token 0, since the model needs one, and its mask is 0.
    """

    ids: list[int]
    languages: list[str]

    @property
    def is_empty(self) -> bool:
        """Whether the song has no lyrics."""
        return self.ids == [_NO_LYRICS_ID]

    @property
    def mask(self) -> list[int]:
        """The attention mask (len(ids),): ones, or one 0 without lyrics."""
        return [0] if self.is_empty else [1] * len(self.ids)


class LyricTokenizer:
    """Encodes lyrics line by line, each in its language. Special tokens are found by name in the vocabulary."""

    def __init__(self, tokenizer: Tokenizer, fingerprint: str):
        self._tokenizer = tokenizer
        self.fingerprint = fingerprint
        """Changes when the vocabulary or the rules of this front end do."""
        vocabulary = tokenizer.get_vocab()
        self._start_id, self._space_id = vocabulary[_START], vocabulary[_SPACE]

    @classmethod
    def from_file(cls, path: str | Path) -> LyricTokenizer:
        """Return the tokenizer of a vocabulary file, a Hugging Face `tokenizers` JSON.

        Raises `InputError` if the file is missing, cannot be read or lacks one of the tokens that lyrics need.
        """
        path = Path(path)
        another = "give the lyric vocabulary of an ACE-Step v1 checkpoint (lyric_tokenizer/vocab.json)"
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(
                f"the lyric vocabulary cannot be read ({error.strerror})", where=str(path), fix=another
            ) from error
        try:
            tokenizer = Tokenizer.from_buffer(content)
        except Exception as error:  # the tokenizers library raises bare Exceptions
            reason, fix = explained(path, error, another)
            raise InputError(
                f"the lyric vocabulary is not a Hugging Face tokenizers JSON ({reason})",
                where=str(path),
                fix=fix,
            ) from error
        missing = [token for token in _REQUIRED_TOKENS if tokenizer.token_to_id(token) is None]
        if missing:
            raise InputError(
                f"the lyric vocabulary lacks the tokens {', '.join(missing)}", where=str(path), fix=another
            )
        digest = hashlib.sha256(f"lyric rules {_RULES_VERSION}\n".encode() + content)
        return cls(tokenizer, digest.hexdigest())

    def encode(self, lyrics: str, language: str | None = None) -> LyricTokens:
        """Return the tokens of `lyrics`: `[START]`, then every line's, each closed by `[SPACE]`.

        A blank line is `[SPACE]` alone. A line that starts with a tag in brackets is English; `language` decides
        for all others, or, where it is None, `detect_line_languages` over the first 4096 lines that are not blank.
        Raises `InputError` for a language that is not supported.
        """
        chosen = None if language is None else parse_language(language)
        lines = [line.strip()[:MAX_LINE_CHARACTERS] for line in lyrics.split("\n")]
        if not any(lines):
            return LyricTokens([_NO_LYRICS_ID], [])

        # Each line is a token at least.
        languages = iter(self._line_languages([line for line in lines if line][:MAX_LYRIC_TOKENS], chosen))
        ids = [self._start_id]
        encoded_languages = []
        for line in lines:
            if len(ids) >= MAX_LYRIC_TOKENS:
                break
            if line:
                encoded_languages.append(next(languages))
                ids += self.encode_line(line, encoded_languages[-1])
            ids.append(self._space_id)
        return LyricTokens(ids[:MAX_LYRIC_TOKENS], encoded_languages)

    def encode_line(self, line: str, language: str) -> list[int]:
        """Return the ids of one line, cleaned in `language` (one of `LANGUAGES`) and led by the language's token."""
        marked = f"{_LANGUAGE_TOKENS[language]}{clean(line, language)}".replace(" ", _SPACE)
        return self._tokenizer.encode(marked).ids

    @staticmethod
    def _line_languages(lines: list[str], chosen: str | None) -> list[str]:
        if chosen is None:
            return detect_line_languages(lines)
        return ["en" if is_structure_line(line) else chosen for line in lines]


def build_tiny_vocabulary(path: str | Path, size: int = 512) -> None:
    """Write a lyric vocabulary of at most `size` ids in the form of the released one, for the tiny checkpoint.

    Special tokens first and last, single characters between them, then pairs of letters while there is room; the
    same `size` always gives the same file. A `size` below the special tokens and ASCII raises `ValueError`.
    """
    leading = ["[STOP]", _UNKNOWN, _SPACE]
    trailing = [*_LANGUAGE_TOKENS.values(), *_STRUCTURE_TAGS, _START]
    room = size - len(leading) - len(trailing)
    if room < len(_ASCII):
        raise ValueError(f"a lyric vocabulary needs at least {size - room + len(_ASCII)} ids, not {size}")
    characters = list(dict.fromkeys(_ASCII + _OTHER_CHARACTERS))[:room]
    pairs = list(dict.fromkeys(_FREQUENT_PAIRS.split()))[: room - len(characters)]

    entries = [*leading, *characters, *pairs, *trailing]
    model = BPE(
        vocab={entry: index for index, entry in enumerate(entries)},
        merges=[(pair[0], pair[1]) for pair in pairs],
        unk_token=_UNKNOWN,
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens([*leading, *trailing])
    tokenizer.save(str(path))
