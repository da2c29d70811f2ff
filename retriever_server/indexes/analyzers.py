"""Analyzers: a text in, the terms that BM25 counts out; the same one for queries and passages.

plain         lower-cased words in normal form KC, with their marks; all letters i of Turkish are one
stopwords     as plain, without Lucene's 33 English stop words
english       as stopwords, stemmed by Snowball's English stemmer
anserini      Lucene's English analysis, as Anserini's default: words by UAX #29, no possessive 's,
              lower case, the 33 stop words taken out, Porter's stemmer
multilingual  words by UAX #29, case folded in normal form KC, stemmed by the Snowball stemmer of a
              `language`; scripts that put no spaces between words become pairs of characters
"""

from __future__ import annotations

import re
import threading
import unicodedata
from collections.abc import Callable, Iterable
from functools import cache, lru_cache, partial

import regex

from data.errors import ConfigError
from data.text import one_i

Analyzer = Callable[[str], list[str]]

WORDS = 2
"""Version of what a word is, named in an index's settings. 1 cut words at every mark (Indic vowels)."""
_WORD_1 = re.compile(r"\w+")
_ASCII_WORD = re.compile(r"\w+", re.ASCII)
_JOINERS = regex.compile(r"(?<=\p{M})[\u200C\u200D]")  # of Indic conjuncts, as often left out
_SPACELESS = r"[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{LB=SA}]"
ENGLISH_STOP_WORDS = frozenset(
    _WORD_1.findall(
        "a an and are as at be but by for if in into is it no not of on or such that the their then there "
        "these they this to was will with"
    )
)
"""Stop words of Lucene's EnglishAnalyzer."""
MAX_TOKEN_CHARS = 255
"""Lucene cuts what is longer into pieces of this length."""
_BLY_OR_LOGY = re.compile("(?:bl|log)[iy](?:es|(?:ed|ing)?s?)$")
_DOUBLED = re.compile(r"(.)\1(?:ed|ing)s?$")
_TERMS_REMEMBERED = 1 << 18


def plain(text: str) -> list[str]:
    """Return the words of a text, lower-cased, in normal form KC.   "Élan-vital" -> ["élan", "vital"]"""
    lowered = unicodedata.normalize("NFKC", text).lower()
    if lowered.isascii():
        return _ASCII_WORD.findall(lowered)
    return _word_pattern().findall(one_i(_JOINERS.sub("", lowered)))


def _plain_1(text: str) -> list[str]:
    return _WORD_1.findall(unicodedata.normalize("NFKC", text).lower())


@cache
def _word_pattern() -> regex.Pattern:
    """`\\w+` where a mark stays with its letter."""
    return regex.compile(r"(?:[\p{L}\p{N}_]\p{M}*)+")


def stopwords(text: str, cut: Analyzer = plain) -> list[str]:
    """As `plain`, without the 33 English stop words of Lucene. No stemming."""
    return [word for word in cut(text) if word not in ENGLISH_STOP_WORDS]


def english(text: str, cut: Analyzer = plain) -> list[str]:
    """As `stopwords`, each word stemmed by Snowball.   "The rivers' ends" -> ["river", "end"]"""
    return list(map(_stemmer("english"), stopwords(text, cut)))


def anserini(text: str) -> list[str]:
    """Return the terms of Anserini's DefaultEnglishAnalyzer.   "The dog's running." -> ["dog", "run"]"""
    return [term for term in map(_english_term, segment(text)) if term]


def multilingual(text: str, language: str = "none", words: int = WORDS) -> list[str]:
    """Return folded terms of any script, stemmed where the language has a stemmer ("none": not).

    "Die Häuser" (german) -> ["die", "haus"];   "北京大学" -> ["北京", "京大", "大学"]
    Chinese, Japanese and Korean become overlapping pairs as in Lucene's CJKBigramFilter, Thai, Lao,
    Khmer and Burmese likewise; a character alone stands for itself.
    """
    stem, terms, normal = _stemmer(language), [], unicodedata.normalize("NFKC", text)
    if words == 1:
        normal = normal.casefold()
    elif language == "turkish":  # its stemmer tells the two letters apart
        normal = normal.replace("İ", "i").replace("I", "ı").casefold()
        stem = _turkish_stem
    else:
        normal = one_i(_JOINERS.sub("", normal.casefold()))
    for match in _multilingual_pattern().finditer(normal):
        token = match[0]
        if match.lastgroup == "spaceless":
            terms += [token[i : i + 2] for i in range(max(1, len(token) - 1))]
        else:
            terms.append(stem(token))
    return terms


ANALYZERS: dict[str, Analyzer] = {
    "plain": plain,
    "stopwords": stopwords,
    "english": english,
    "anserini": anserini,
    "multilingual": multilingual,
}
_FIRST: dict[str, Analyzer] = {
    "plain": _plain_1,
    "stopwords": partial(stopwords, cut=_plain_1),
    "english": partial(english, cut=_plain_1),
}


def load_analyzer(name: str, language: str = "none", words: int = WORDS) -> Analyzer:
    """Return the analyzer of this name; `words`: of an index that was built by another version.

    Raises ConfigError for a name or language that there is not.
    """
    if name not in ANALYZERS:
        raise ConfigError(f"analyzer = {name}: must be one of {', '.join(ANALYZERS)}")
    if name != "multilingual":
        if language != "none":
            raise ConfigError(f"language = {language}: only the analyzer multilingual has languages")
        return ANALYZERS[name] if words == WORDS else _FIRST.get(name, ANALYZERS[name])
    _stemmer(language)
    return partial(multilingual, language=language, words=words)


def spaceless_share(texts: Iterable[str]) -> float:
    """Return the share of letters that belong to scripts without spaces between words."""
    text = "".join(texts)
    letters = len(regex.findall(r"\p{L}", text))
    return len(regex.findall(rf"[{_SPACELESS}&&\p{{L}}]", text, regex.V1)) / letters if letters else 0.0


def segment(text: str) -> list[str]:
    """Return the tokens of Lucene's StandardTokenizer: words between the word breaks of UAX #29.

    "O'Neil's 3.5% e.g. wi-fi" -> ["O'Neil's", "3.5", "e.g", "wi", "fi"]
    Ideographs and hiragana stand alone, emoji are tokens, South-East Asian scripts stay in one run.
    """
    pattern = _ascii_pattern() if text.isascii() else _unicode_pattern()
    tokens = pattern.findall(text)
    if len(text) > MAX_TOKEN_CHARS and max(map(len, tokens), default=0) > MAX_TOKEN_CHARS:
        return [piece for token in tokens for piece in _cut(token, pattern)]
    return tokens


def _cut(token: str, pattern: re.Pattern | regex.Pattern) -> list[str]:
    """Cut a token as a scanner sees it whose window is 255 characters wide."""
    pieces, start = [], 0
    while found := pattern.search(token, start, start + MAX_TOKEN_CHARS):
        pieces.append(found[0])
        start = found.end()
    return pieces


def _words(
    letter: str, digit: str, quote: str, mid_letter: str, mid_number: str, joiner: str, more: str
) -> str:
    """Return a pattern of words: letters and digits side by side, and what UAX #29 lets stand between.

    A mid-letter (.':) joins letters alone, a mid-number (.',;) digits alone, a joiner (_) everything.
    """
    letters = f"(?:{digit}(?:{mid_number}(?={digit}))?|{quote}{letter}(?:{mid_letter}(?={letter}))?)+"
    return f"(?:{joiner})*(?:{more}{letters})(?:(?:{joiner})+(?:{more}{letters}))*(?:{joiner})*"


@cache
def _ascii_pattern() -> re.Pattern:
    """Return `_unicode_pattern` for a text of ASCII alone, six times as fast."""
    return re.compile(_words("[A-Za-z]", "[0-9]", "", "[.:']", "[.,;']", "_", ""))


@cache
def _unicode_pattern() -> regex.Pattern:
    """Lucene's grammar StandardTokenizerImpl.jflex; WB4: format and combining marks stay with their base."""
    letter, katakana = r"[\p{WB=ALetter}\p{WB=Hebrew_Letter}]", rf"(?:\p{{WB=Katakana}}{_MARKS})+|"
    pictograph = rf"\p{{Extended_Pictographic}}\p{{Emoji_Modifier}}?{_MARKS}"
    return regex.compile(
        "|".join(
            [
                rf"{pictograph}(?:(?<=\u200D){pictograph})*",
                rf"(?:\p{{WB=Regional_Indicator}}{_MARKS}){{2}}",
                _unicode_words(letter, "'", katakana),
                rf"(?:\p{{LB=SA}}{_MARKS})+",
                rf"[\p{{Script=Han}}\p{{Script=Hiragana}}]{_MARKS}",
            ]
        ),
        regex.V1,
    )


@cache
def _multilingual_pattern() -> regex.Pattern:
    """Words as above, but no apostrophe joins letters (l'avion), and runs of the scripts without spaces."""
    east_asian = r"\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Hangul}\u30FC"
    letter = rf"[[\p{{WB=ALetter}}\p{{WB=Hebrew_Letter}}]--[{east_asian}]]"
    return regex.compile(
        rf"(?P<spaceless>[{east_asian}]+|[\p{{LB=SA}}]+)|{_unicode_words(letter, '', '')}", regex.V1
    )


_MARKS = r"[\p{WB=Extend}\p{WB=Format}\p{WB=ZWJ}]*"


def _unicode_words(letter: str, apostrophe: str, more: str) -> str:
    """Return a pattern of words of all scripts; `apostrophe` joins letters, besides points and colons."""
    hebrew = rf"\p{{WB=Hebrew_Letter}}{_MARKS}"
    quote = rf"{hebrew}(?:'{_MARKS}|\"{_MARKS}(?={hebrew}))|"
    points = r"\p{WB=MidNumLet}" if apostrophe else r"[\p{WB=MidNumLet}--[\u2018\u2019\uFF07]]"
    return _words(
        letter + _MARKS,
        rf"[\p{{WB=Numeric}}\uFF10-\uFF19]{_MARKS}",
        quote,
        rf"[\p{{WB=MidLetter}}{points}{apostrophe}]{_MARKS}",
        rf"[\p{{WB=MidNum}}\p{{WB=MidNumLet}}']{_MARKS}",
        rf"\p{{WB=ExtendNumLet}}{_MARKS}",
        more,
    )


@lru_cache(_TERMS_REMEMBERED)
def _english_term(token: str) -> str:
    """Return the term that Lucene's English filters make of a token; "" of a stop word."""
    if len(token) > 1 and token[-1] in "sS" and token[-2] in "'\u2019\uff07":
        token = token[:-2]
    # Character by character, as Java does: no final sigma, no dot left over from a Turkish I.
    term = token.lower() if token.isascii() else "".join(char.lower()[0] for char in token)
    return "" if term in ENGLISH_STOP_WORDS else porter(term)


def porter(word: str) -> str:
    """Return Porter's stem of a lower-cased word, as Lucene makes it.   "relational" -> "relat"

    Snowball's "porter" is that of the paper. Lucene leaves words of two letters alone, takes one of any
    two equal consonants before -ed and -ing, and has the changes of Porter's later releases: bli -> ble and
    logi -> log behind a vowel and a consonant.
    """
    if len(word) < 3:
        return word
    stem = _stemmer("porter")(word)
    if stem[-1] == stem[-2:-1] and stem[-1] not in "aeiouylsz" and _DOUBLED.search(word):
        return stem[:-1]
    if not stem.endswith(("bli", "logi")) or not _BLY_OR_LOGY.search(word):
        return stem
    shape = ""
    for letter in stem.removesuffix("bli").removesuffix("logi"):
        shape += "v" if letter in "aeiou" or (letter == "y" and shape.endswith("c")) else "c"
    if "vc" not in shape:
        return stem
    return stem[:-1] if stem.endswith("logi") else _stemmer("porter")(f"{stem[:-1]}e")


def _turkish_stem(word: str) -> str:
    return one_i(_stemmer("turkish")(word))


@cache
def _stemmer(language: str) -> Callable[[str], str]:
    """Return the Snowball stemmer of a language, with a memory; PyStemmer's own are not safe in threads."""
    if language == "none":
        return str
    import Stemmer

    if language not in Stemmer.algorithms():
        raise ConfigError(f"language = {language}: must be none or one of {', '.join(Stemmer.algorithms())}")
    stem, lock = Stemmer.Stemmer(language, maxCacheSize=0).stemWord, threading.Lock()

    @lru_cache(_TERMS_REMEMBERED)
    def remembered(word: str) -> str:
        with lock:
            return stem(word)

    return remembered
