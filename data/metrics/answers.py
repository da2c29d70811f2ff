"""Scores of answers against gold answers: exact match, F1 and cover-EM, each the best over the golds.

A normalizer turns a text into words with single spaces between them; the metrics compare words. Two cases
differ from SQuAD's script: an empty prediction or None never matches, and a text that normalizes to nothing
("A", "The", "++") stands for itself in lower case, so that the gold answer "A" is met by "a" alone.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial

from data.errors import ConfigError
from data.text import one_i

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SPACED_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "\u2018\u2019\u00b4", " "))
_SPACELESS = re.compile(
    "[\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3400-\u4dbf\u4e00-\u9fff"  # Han
    "\uf900-\ufaff\U00020000-\U0003ffff"
    "\u3040-\u30ff\u31f0-\u31ff"  # Hiragana, Katakana
    "\u0e00-\u0e7f\u0e80-\u0eff\u1780-\u17ff"  # Thai, Lao, Khmer
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f]"  # Myanmar
)
Golds = str | Iterable[str]


def exact_match(prediction: str | None, gold_answers: Golds, normalizer: str = "squad") -> float:
    """1.0 if the prediction has the words of a gold answer in their order, else 0.0."""
    return _best(prediction, gold_answers, normalizer, lambda words, gold: float(words == gold))


def f1(prediction: str | None, gold_answers: Golds, normalizer: str = "squad") -> float:
    """Harmonic mean of precision and recall of the words, counted with repetition (Rajpurkar et al. 2016)."""
    return _best(prediction, gold_answers, normalizer, _word_f1)


def cover_em(prediction: str | None, gold_answers: Golds, normalizer: str = "squad") -> float:
    """1.0 if the words of a gold answer stand side by side in the prediction, else 0.0.

    Search-R1's sub-EM looks for the gold answer as a substring instead, and so finds "art" in "party" and
    the gold answer "A" (normalized to nothing) in every text; whatever this finds, sub-EM finds too, but
    for a text that normalizes to nothing.
    """
    return _best(prediction, gold_answers, normalizer, _covers)


_NOT_AVAILABLE = re.compile(r"\bn(?:/|\.\s?)a\b", re.IGNORECASE)
_ABSTENTIONS = re.compile(
    r"i (?:do not|dont|really dont|cannot|cant) (?:know|answer|tell|determine|say)\b.*|not sure|"
    r"im not sure\b.*|unknown|unanswerable|idk|no answer|cannot be determined\b.*|cannot answer\b.*|"
    r"(?:there is )?(?:not enough|insufficient|no) (?:information|evidence)\b.*"
)


def is_abstention(answer: str | None) -> bool:
    """Return whether an answer says that it is none: "I don't know", "Unknown.", "Not enough information".

    None is no abstention: no answer was given. Nor is a text that goes on to answer ("Unknown Pleasures"), or
    sodium's "Na", unlike "N/A".
    """
    text = normalize_answer(_NOT_AVAILABLE.sub("no answer", (answer or "").replace("\u2019", "'")))
    return _ABSTENTIONS.fullmatch(text) is not None


METRICS = {"em": exact_match, "f1": f1, "cover_em": cover_em}


def hotpot_f1(prediction: str | None, gold_answers: Golds, normalizer: str = "squad") -> float:
    """F1 as HotpotQA's script has it: yes, no and noanswer are right only as a whole."""

    def one(words: list[str], gold: list[str]) -> float:
        closed = any(each in (["yes"], ["no"], ["noanswer"]) for each in (words, gold))
        return float(words == gold) if closed else _word_f1(words, gold)

    return _best(prediction, gold_answers, normalizer, one)


def triviaqa_em(prediction: str | None, gold_answers: Golds, normalizer: str = "triviaqa") -> float:
    """Exact match in TriviaQA's own normal form, in which punctuation and underscores part words."""
    return exact_match(prediction, gold_answers, "triviaqa")


def contains(prediction: str | None, gold_answers: Golds, normalizer: str = "squad") -> float:
    """Accuracy of PopQA's script: a gold answer, as it is, in lower case or capitalised, is a substring."""
    golds = [gold_answers] if isinstance(gold_answers, str) else gold_answers
    forms = [form for gold in golds for form in (gold, gold.lower(), gold.capitalize())]
    return float(any(form in (prediction or "") for form in forms))


OFFICIAL = {**METRICS, "hotpot_f1": hotpot_f1, "triviaqa_em": triviaqa_em, "contains": contains}
"""METRICS, and those of the scripts of single sets."""


def normalize_answer(text: str) -> str:
    """SQuAD's normal form, as in Search-R1: lower case, no ASCII punctuation, no a/an/the, single spaces.

    "The  naïve-Café!" -> "naïvecafé"
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def normalize_unicode(text: str, fold_accents: bool = False) -> str:
    """A normal form for every script: NFKC, case folded, no punctuation of any script, no a/an/the.

    Where a script puts no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Myanmar), each character
    with its marks is a word. All letters i of Turkish are one. fold_accents drops the diacritics of Latin,
    Greek and Cyrillic letters; letters that are not composed, such as "ø", stay.
    "「東京」 the Ｃａｆé" -> "東 京 café"
    """
    folded = one_i(unicodedata.normalize("NFKC", text).casefold())
    # Again at the end: folding and leaving out characters can bring together what composes.
    text = unicodedata.normalize("NFKC", "".join(filter(_is_kept, folded)))
    if fold_accents:
        decomposed = unicodedata.normalize("NFD", text)
        # Only this block: the marks of other scripts (Thai vowels, Japanese voicing) make other letters.
        text = unicodedata.normalize("NFC", re.sub("[\u0300-\u036f]", "", decomposed))
    words = separate_characters(text).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def _normalize_triviaqa(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_SPACED_PUNCTUATION)).split())


NORMALIZERS: dict[str, Callable[[str], str]] = {
    "squad": normalize_answer,
    "unicode": normalize_unicode,
    "unicode_folded": partial(normalize_unicode, fold_accents=True),
    "triviaqa": _normalize_triviaqa,
}


def _best(
    prediction: str | None,
    gold_answers: Golds,
    normalizer: str,
    score: Callable[[list[str], list[str]], float],
) -> float:
    if normalizer not in NORMALIZERS:
        raise ConfigError(f"normalizer = {normalizer!r}: must be one of {', '.join(NORMALIZERS)}")
    normalize = NORMALIZERS[normalizer]
    words = words_of(prediction or "", normalize)
    if not words:
        return 0.0
    golds = [gold_answers] if isinstance(gold_answers, str) else gold_answers
    return max((score(words, words_of(gold, normalize)) for gold in golds), default=0.0)


def words_of(text: str, normalize: Callable[[str], str]) -> list[str]:
    """The words of a text in a normal form; of one that normalizes to nothing, in lower case as it is."""
    return normalize(text).split() or text.lower().split()


def _word_f1(words: list[str], gold: list[str]) -> float:
    common = (Counter(words) & Counter(gold)).total()
    return 2 * common / (len(words) + len(gold))


def _covers(words: list[str], gold: list[str]) -> float:
    starts = range(len(words) - len(gold) + 1)
    return float(bool(gold) and any(words[i : i + len(gold)] == gold for i in starts))


def _is_kept(character: str) -> bool:
    """Return whether it is neither punctuation nor an invisible mark, such as a zero-width space (Cf)."""
    if character in string.punctuation:
        return False
    category = unicodedata.category(character)
    return category[0] != "P" and category != "Cf"


def separate_characters(text: str) -> str:
    """Put spaces around each character of a script without spaces; marks stay with the one they are on."""
    if not _SPACELESS.search(text):
        return text
    pieces, alone = [], False
    for character in text:
        if unicodedata.category(character)[0] != "M":
            spaceless = bool(_SPACELESS.match(character))
            if spaceless or alone:
                pieces.append(" ")
            alone = spaceless
        pieces.append(character)
    return "".join(pieces)
