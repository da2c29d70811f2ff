"""Invented names as varied as real ones, and never a real one of the embedded world.

A tiny policy must copy names it has never seen. So names come from languages drawn at random (few sounds
each), from plain random letters, in one to three words, with hyphens, apostrophes, particles and the
common words that real names are built with.
"""

from __future__ import annotations

import random
from functools import cache
from string import ascii_lowercase

from data.atlas.world import load_world

ONSETS = (
    *"bcdfghjklmnpqrstvwxyz",
    *["bh", "bl", "br", "ch", "cl", "cr", "dh", "dj", "dr", "dz", "fl", "fr", "gh", "gl", "gn", "gr", "gw", "hl", "hv", "kh", "kl", "kn", "kr", "kw", "ll", "mb", "mn", "nd", "ng", "nj", "nk", "ny", "ph", "pl", "pr", "ps", "qu", "rh", "sc", "sch", "sh", "sk", "sl", "sm", "sn", "sp", "st", "str", "sv", "sw", "sz", "th", "tl", "tr", "ts", "tsh", "tw", "vl", "vr", "wh", "zh", "zw"],
    "", "", "", "",
)  # fmt: skip
NUCLEI = (
    *"aeiouyaeiouaeio",
    *["aa", "ae", "ai", "ao", "au", "ay", "ea", "ee", "ei", "eo", "eu", "ia", "ie", "io", "iu", "oa", "oe", "oi", "oo", "ou", "ua", "ue", "ui", "uo", "ya", "yo"],
)
CODAS = (
    *"bcdfghjklmnprstvwxz",
    *["ch", "ck", "ff", "gh", "ks", "kh", "ld", "lk", "ll", "lm", "ls", "lt", "mb", "mp", "nd", "ng", "nk", "ns", "nt", "nz", "ph", "rd", "rg", "rk", "rl", "rm", "rn", "rs", "rt", "sh", "sk", "ss", "st", "th", "tt", "tz"],
)  # fmt: skip
BEFORE = (
    "North", "South", "East", "West", "New", "Upper", "Lower", "Central", "Great", "Grand", "San", "Santa",
    "Saint", "St.", "Port", "Puerto", "Mount", "Mont", "Monte", "Cerro", "Pico", "Jabal", "Lake", "Cape",
    "Fort", "Al", "El", "La", "Le", "Las", "Los", "Ban", "Beit", "Ciudad", "Rio", "Bukit", "Gunung", "Ras",
    "Khao", "Tel", "Umm", "Nova", "Alto", "Old", "Ain", "Bir", "Kuh-e", "Nevado", "Volcan", "Ile", "Ad", "As",
)  # fmt: skip
AFTER = (
    "Islands", "Island", "City", "Harbor", "Bay", "Province", "Republic", "Hill", "Peak", "Point", "Terminal",
    "Valley", "Coast", "River", "District", "Norte", "Sur", "Sud", "Nord", "Est", "Oblast", "Dagi", "Town",
    "Mountain", "State", "Region", "Federation", "Kingdom", "Alta", "Bajo",
)  # fmt: skip
JOINTS = ("-", "-", "-", " ", " ", " ", " de ", " del ", " al ", "-al-", " el ", " of ", " and ", " og ", " da ", "-e ", "-sur-", " ")  # fmt: skip
LENGTHS = range(3, 25)


@cache
def real_names() -> frozenset[str]:
    """Every name of the embedded world, lower case."""
    return frozenset(name.lower() for entity in load_world().entities for name in entity.names)


class Language:
    """A few sounds drawn at random, and the words they make."""

    def __init__(self, rng: random.Random) -> None:
        self.onsets = rng.sample(ONSETS, rng.randint(5, 16))
        self.nuclei = rng.sample(NUCLEI, rng.randint(3, 8))
        self.codas = rng.sample(CODAS, rng.randint(2, 8))
        self.ends = [self._syllable(rng) for _ in range(3)]  # as -istan, -ville, -burg are

    def _syllable(self, rng: random.Random) -> str:
        coda = rng.choice(self.codas) if rng.random() < 0.45 else ""
        return rng.choice(self.onsets) + rng.choice(self.nuclei) + coda

    def word(self, rng: random.Random) -> str:
        """A lower-case word of 1-4 syllables; one in six is plain random letters."""
        draw = rng.random()
        if draw < 0.12:
            return "".join(rng.choices(ascii_lowercase, k=rng.randint(3, 9)))
        if draw < 0.17:
            return "".join(rng.choices("aeioubcdfghklmnprst", k=rng.randint(3, 10)))
        count = rng.choices((1, 2, 3, 4), (15, 45, 30, 10))[0]
        text = "".join(self._syllable(rng) for _ in range(count))
        return text + rng.choice(self.ends) if draw > 0.8 else text

    def title(self, rng: random.Random) -> str:
        """A capitalised word, sometimes with an apostrophe in it."""
        text = self.word(rng)
        if rng.random() < 0.06 and len(text) > 3:
            at = rng.randint(1, len(text) - 1)
            text = f"{text[:at]}'{text[at:]}"
            return text[0].upper() + (text[1:] if rng.random() < 0.7 else text[1:].title())
        return text[0].upper() + text[1:]

    def name(self, rng: random.Random) -> str:
        """One to three words."""
        while True:
            draw = rng.random()
            text = self.title(rng)
            if draw > 0.92:
                joint = rng.choice(JOINTS)
                text = f"{text}{joint}{self.title(rng)}"
            elif draw > 0.84:
                text = f"{text} {self.title(rng)}"
            elif draw > 0.74:
                text = f"{rng.choice(BEFORE)} {text}"
            elif draw > 0.68:
                text = f"{text} {rng.choice(AFTER)}"
            elif draw > 0.65:
                text = f"{rng.choice(BEFORE)} {text} {self.title(rng)}"
            if len(text) in LENGTHS and text[-1] != "'" and not _holds_real_name(text):
                return text


def _holds_real_name(text: str) -> bool:
    words = text.lower().split()
    known = real_names()
    return any(" ".join(words[i:j]) in known for i in range(len(words)) for j in range(i + 1, len(words) + 1))
