"""Lyrics to the token ids of the released model's lyric vocabulary."""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Whitespace

from acestep_ray.data.lyric_text import read_lyric_text
from acestep_ray.data.lyrics.cleaners import clean
from acestep_ray.data.lyrics.segment import (
    LANGUAGES,
    LETTERS,
    detect_line_languages,
    is_structure_line,
    parse_language,
)
from acestep_ray.errors import InputError
from acestep_ray.foreign_files import explained

MAX_LYRIC_TOKENS = 4096
MAX_LINE_CHARACTERS = 32_768
"""A line is cut after this many characters: whole books in one line would take minutes."""

_ROMANISED = {"zh": {"han"}, "ja": {"han", "kana"}, "ko": {"hangul"}}
_ROMANISED_LETTERS = ("han", "kana", "hangul")
_WHOLE_TAG = re.compile(r"\[[^\[\]]*\]\W*")
# Of characters: a token of known text has up to some five, an unknown one has one.
_SUSPICIOUS_SHARE = 0.005
# Whitespace and quotation marks, which go; brackets, of tags; Chinese, Japanese and Korean letters with their
# punctuation, which become Latin letters and commas.
_READ_WITHOUT_TOKEN = (
    r"\s\"\[\]\u1100-\u11ff\u3000-\u30ff\u3131-\u318e\u31f0-\u31ff\u3400-\u9fff\uac00-\ud7a3"
    r"\uf900-\ufaff\uff00-\uffef"
)

# The token that stands where there are no lyrics; its mask is 0, as in the released model's inference.
_NO_LYRICS_ID = 0
_START, _SPACE, _UNKNOWN = "[START]", "[SPACE]", "[UNK]"
_LANGUAGE_TOKENS = {language: f"[{'zh-cn' if language == 'zh' else language}]" for language in LANGUAGES}
_REQUIRED_TOKENS = (_START, _SPACE, _UNKNOWN, *_LANGUAGE_TOKENS.values())
# Part of the fingerprint: raise it whenever the same lyrics and vocabulary give other ids than before. Lyrics here are
# what `read_lyric_text` returns, which is part of a song's identity itself.
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
    unknown_share: float = 0.0
    """Of the tokens that stand for sung text, from 0 to 1: not of spaces, language tokens and structure tags."""

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
        self._unknown_id = vocabulary[_UNKNOWN]
        self._language_ids = frozenset(vocabulary[token] for token in _LANGUAGE_TOKENS.values())
        self._silent_ids = frozenset({self._start_id, self._space_id})
        # First tokens of lines that are structure tags: `[`, or a tag as a whole.
        self._tag_ids = frozenset(
            index
            for token, index in vocabulary.items()
            if token.startswith("[") and token not in _REQUIRED_TOKENS
        )
        characters = "".join(entry for entry in vocabulary if len(entry) == 1)
        self._without_token = re.compile(
            rf"[^{re.escape(''.join(sorted({*characters, *characters.upper()})))}{_READ_WITHOUT_TOKEN}]+"
        )

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

        The lines are those of `read_lyric_text`. A blank line is `[SPACE]` alone. A line that starts with a tag in
        brackets is English; `language` decides for all others, or, where it is None, `detect_line_languages` over the
        first 4096 lines that are not blank.
        Raises `InputError` for a language that is not supported, unless there are no lyrics.
        """
        # Callers have read them already, and noted what was changed; that changes nothing then.
        lyrics, _ = read_lyric_text(lyrics)
        lines = [line.strip()[:MAX_LINE_CHARACTERS] for line in lyrics.split("\n")]
        if not any(lines):
            return LyricTokens([_NO_LYRICS_ID], [])
        chosen = None if language is None else parse_language(language)

        # Each line is a token at least.
        languages = iter(self._line_languages([line for line in lines if line][:MAX_LYRIC_TOKENS], chosen))
        ids = [self._start_id]
        encoded_languages: list[str] = []
        sung: list[int] = []
        for line in lines:
            if len(ids) >= MAX_LYRIC_TOKENS:
                break
            if line:
                encoded_languages.append(next(languages))
                line_ids = self.encode_line(line, encoded_languages[-1])
                ids += line_ids
                if not _WHOLE_TAG.fullmatch(line):
                    sung += line_ids
            ids.append(self._space_id)
        return LyricTokens(ids[:MAX_LYRIC_TOKENS], encoded_languages, self._share_of_unknown(sung))

    def unknown_share(self, ids: Sequence[int]) -> float:
        """Share of unknown tokens among those of sung text, from 0 to 1: not of spaces, languages and tags."""
        lines: list[list[int]] = [[]]
        for token in ids:
            if token in self._language_ids:
                lines.append([])
            elif token not in self._silent_ids:
                lines[-1].append(token)
        return self._share_of_unknown([token for line in lines if not self._is_tag(line) for token in line])

    def _share_of_unknown(self, sung: Sequence[int]) -> float:
        counted = [
            token for token in sung if token not in self._silent_ids and token not in self._language_ids
        ]
        return counted.count(self._unknown_id) / len(counted) if counted else 0.0

    def _is_tag(self, line: list[int]) -> bool:
        """Whether the tokens of a line are those of a tag in brackets, of which the released vocabulary knows some."""
        if not line or line[0] in self._tag_ids:
            return bool(line)
        return len(line) > 2 and line[0] == line[-1] == self._unknown_id and line.count(self._unknown_id) == 2

    def encode_line(self, line: str, language: str) -> list[int]:
        """Return the ids of one line, cleaned in `language` (one of `LANGUAGES`) and led by the language's token."""
        marked = f"{_LANGUAGE_TOKENS[language]}{clean(line, language)}".replace(" ", _SPACE)
        return self._tokenizer.encode(marked).ids

    def may_lack_tokens(self, lyrics: str, language: str | None = None) -> bool:
        """Whether more than a few characters may have no token: cheap to ask of lyrics before they are encoded.

        False means that less than some per cent of the tokens are unknown.
        """
        romanised = {name for name in _ROMANISED_LETTERS if LETTERS[name].search(lyrics)}
        if romanised and not self._is_romanised(romanised, language):
            return True
        unknown = sum(map(len, self._without_token.findall(lyrics)))
        return unknown > _SUSPICIOUS_SHARE * len(lyrics)

    @staticmethod
    def _is_romanised(scripts: set[str], language: str | None) -> bool:
        """Whether one language's reading, that of `language` if given, romanises all of these scripts."""
        try:
            chosen = parse_language(language) if language else None
        except InputError:
            return True  # such lyrics are not encoded at all
        readings = _ROMANISED.values() if chosen is None else [_ROMANISED.get(chosen, set())]
        return any(scripts <= reading for reading in readings)

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
