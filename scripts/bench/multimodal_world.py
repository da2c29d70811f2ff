"""The collections that `scripts.bench.multimodal` trains on and asks: drawn, and split, once.

cards    titles of hotpotqa and squad drawn in three layouts and four fonts, no letter of text beside
         them; 500 titles are held out, and the page of a title is looked for by the title
emoji    small pictures and their captions, 300 held out: captions ask for pictures, pictures for captions
figures  a title that is only in the text, a coloured shape that is only in the picture: 20 held-out
         titles with 48 figures each, asked for by both
"""

from __future__ import annotations

import base64
import random
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from data.corpus import Corpus
from data.errors import ConfigError
from data.jsonl import read_jsonl, write_jsonl
from data.pages.rendering import Style, render
from data.records import Passage, Qrels, Question
from scripts.bench.retriever_world import Work

HELD_OUT, DRAWINGS = 500, 8
HELD_OUT_EMOJI = 300
FONTS = ("DejaVuSans.ttf", "DejaVuSerif.ttf", "LiberationSans-Bold.ttf", "LiberationSerif-Regular.ttf")
COLOURS = ("red", "blue", "green", "orange", "purple", "black", "brown", "hotpink")
SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar")
FORMS = ("text", "image", "text+image")
FIGURE_TITLES, FIGURES_A_TITLE, HELD_OUT_FIGURE_TITLES = 400, 12, 20


class PageWork(Work):
    """The work folder of pages: corpora/NAME/corpus.jsonl beside their pictures."""

    def corpus(self, name: str) -> Corpus:
        """cards, emoji, figures: held out; with -train behind: to train on; titles: texts of the training."""
        if name not in self.opened:
            path = self.folder / "corpora" / name / "corpus.jsonl"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                _MAKERS[name](self, path)
            self.opened[name] = Corpus(path)
        return self.opened[name]

    def questions(self, name: str) -> tuple[list[Question], Qrels]:
        """Return the questions of a collection, one a passage; of emoji-captions with pictures alone."""
        questions = [_QUESTIONS[name](self, passage.id) for passage in self.corpus(name)]
        random.Random(0).shuffle(questions)
        return questions[: self.limit], {each.id: {each.id: 1} for each in questions}

    def examples(self, name: str) -> None:
        """Make examples/NAME.jsonl, unless it is there."""
        path = self.folder / "examples" / f"{name}.jsonl"
        if not path.exists():
            rows = list(_EXAMPLES[name](self))
            random.Random(0).shuffle(rows)
            write_jsonl(path, rows)

    @cached_property
    def titles(self) -> tuple[list[str], list[str]]:
        """Titles to train on, and those held out; no title is among both."""
        corpora = (self.data / name / "corpus.jsonl" for name in ("hotpotqa", "squad"))
        found = (row["title"].replace("_", " ").strip() for path in corpora for row in read_jsonl(path))
        titles = sorted({*found} - {""})
        random.Random(0).shuffle(titles)
        return titles[HELD_OUT:], titles[:HELD_OUT]

    @cached_property
    def emoji(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Emoji to train on, and those held out; captions are unique, and in one of both."""
        rows = {row["caption"]: row for row in read_jsonl(self.data / "visual" / "emoji" / "items.jsonl")}
        items = [rows[caption] for caption in sorted(rows)]
        random.Random(0).shuffle(items)
        return items[HELD_OUT_EMOJI:], items[:HELD_OUT_EMOJI]


# ---- cards -------------------------------------------------------------------------------------------


def style() -> Style:
    """Return the settings by which cards are drawn: 128 by 64 pixels, the letters 8 to 16 high."""
    from PIL import ImageFont

    fonts = tuple(str(ImageFont.truetype(name).path) for name in FONTS)
    layouts = ("page", "card", "note")
    return Style(layouts, fonts, width=128, height=64, font_size=8, shows="title")


def _draw_cards(path: Path, cards: Iterable[Passage]) -> None:
    drawn = render(list(cards), path.parent / "drawn", style())
    rows = ({"id": row["id"], "image": f"drawn/{row['image']}"} for row in read_jsonl(drawn.corpus))
    write_jsonl(path, rows)


def _training_cards(work: PageWork) -> Iterator[Passage]:
    for i, title in enumerate(work.titles[0]):
        yield from (Passage(f"c{i}-{n}", "", title) for n in range(DRAWINGS))


def _card_examples(work: PageWork) -> Iterator[dict[str, Any]]:
    for i, title in enumerate(work.titles[0]):
        for n in range(DRAWINGS):
            yield {"query_id": f"c{i}-{n}", "query": title, "positives": [f"c{i}-{n}"]}


def _read_cards(work: PageWork, path: Path) -> None:
    """Return what Tesseract reads on the held-out cards, three times enlarged, as small letters need."""
    from PIL import Image

    if shutil.which("tesseract") is None:
        raise ConfigError("row bm25-ocr: needs the program tesseract (tesseract-ocr)")
    rows = []
    for passage in work.corpus("cards"):
        large = path.parent / "large.png"
        with Image.open(passage.image) as card:
            card.resize((3 * card.width, 3 * card.height), Image.Resampling.BICUBIC).save(large)
        command = ["tesseract", str(large), "-", "--psm", "6", "--dpi", "200"]
        read = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append({"id": passage.id, "text": " ".join(read.stdout.split())})
    write_jsonl(path, rows)


# ---- emoji -------------------------------------------------------------------------------------------


def _write_emoji(path: Path, items: Iterable[dict[str, Any]], captions: bool) -> None:
    rows = []
    for item in items:
        picture = path.parent / f"{item['id']}.png"
        if not captions:
            picture.write_bytes(base64.b64decode(item["png_b64"]))
        shown = {"text": item["caption"]} if captions else {"image": picture.name}
        rows.append({"id": item["id"], **shown})
    write_jsonl(path, rows)


def _emoji_examples(work: PageWork) -> Iterator[dict[str, Any]]:
    """The caption of a picture, and the caption with its tags."""
    for item in work.emoji[0]:
        texts = (item["caption"], " ".join([item["caption"], *item["tags"]]))
        for n, query in enumerate(dict.fromkeys(texts)):
            yield {"query_id": f"{item['id']}-{n}", "query": query, "positives": [item["id"]]}


def _caption(work: PageWork, id_: str) -> str:
    return next(item["caption"] for item in work.emoji[1] if item["id"] == id_)


def _picture(work: PageWork, id_: str) -> str:
    found = work.corpus("emoji").get(id_)
    assert found is not None
    return found.image


# ---- figures -----------------------------------------------------------------------------------------


def draw_figure(path: Path, colour: str, shape: str, seed: str) -> None:
    """Draw a shape of that colour somewhere on 64 by 64 pixels."""
    from PIL import Image, ImageDraw

    chance = random.Random(seed)
    image = Image.new("RGB", (64, 64), chance.choice(("#ffffff", "#fdf6e3", "#e8eef7")))
    size = chance.randint(24, 48)
    x, y = chance.randint(2, 62 - size), chance.randint(2, 62 - size)
    draw, box, third = ImageDraw.Draw(image), (x, y, x + size, y + size), size // 3
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "ring":
        draw.ellipse(box, outline=colour, width=size // 6)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    elif shape == "triangle":
        draw.polygon(((x, y + size), (x + size, y + size), (x + size // 2, y)), fill=colour)
    if shape == "cross":
        draw.rectangle((x + third, y, x + 2 * third, y + size), fill=colour)
    if shape in ("cross", "bar"):
        draw.rectangle((x, y + third, x + size, y + 2 * third), fill=colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def _figure(id_: str) -> str:
    return id_.split("-", 1)[1].replace("-", " ")


def _write_figures(path: Path, titles: Sequence[str], kept: Sequence[str] = ("text+image",)) -> None:
    """Every title with every figure, in the forms that are kept."""
    rows = []
    for (i, title), colour, shape in product(enumerate(titles), COLOURS, SHAPES):
        id_ = f"{i}-{colour}-{shape}"
        picture = path.parent / "figures" / f"{id_}.png"
        draw_figure(picture, colour, shape, id_)
        image = {"image": f"figures/{picture.name}"}
        of = {"text": {"text": title}, "image": image, "text+image": {"text": title, **image}}
        rows += [{"id": id_ if len(kept) == 1 else f"{id_}-{form}", **of[form]} for form in kept]
    write_jsonl(path, rows)


def _figure_examples(work: PageWork) -> Iterator[dict[str, Any]]:
    """Return of every title some figures: both together, against another figure, and each modality alone."""
    chance = random.Random(0)
    figures = [f"{colour}-{shape}" for colour, shape in product(COLOURS, SHAPES)]
    titles = work.titles[0][:FIGURE_TITLES]
    for i, title in enumerate(titles):
        for figure in chance.sample(figures, FIGURES_A_TITLE):
            other = chance.choice([each for each in figures if each != figure])
            elsewhere = (i + chance.randrange(1, len(titles))) % len(titles)
            said = figure.replace("-", " ")
            asked = {"text": title, "image": said, "text+image": f"{title}: {said}"}
            wrong = {"text": f"{elsewhere}-{figure}", "image": f"{i}-{other}", "text+image": f"{i}-{other}"}
            for form in FORMS:
                yield {
                    "query_id": f"{i}-{figure}-{form}", "query": asked[form],
                    "positives": [f"{i}-{figure}-{form}"], "negatives": [f"{wrong[form]}-{form}"],
                }  # fmt: skip


def _held_out_figures(form: str) -> Callable[[PageWork, Path], None]:
    return lambda work, path: _write_figures(path, work.titles[1][:HELD_OUT_FIGURE_TITLES], (form,))


def _figure_question(work: PageWork, id_: str) -> str:
    return f"{work.titles[1][int(id_.split('-')[0])]}: {_figure(id_)}"


_MAKERS: dict[str, Callable[[PageWork, Path], None]] = {
    "titles": lambda work, path: write_jsonl(
        path, ({"id": str(i), "text": title} for i, title in enumerate(work.titles[0]))
    ),
    "titles-held-out": lambda work, path: write_jsonl(
        path, ({"id": f"h{i}", "text": title} for i, title in enumerate(work.titles[1]))
    ),
    "cards-train": lambda work, path: _draw_cards(path, _training_cards(work)),
    "cards": lambda work, path: _draw_cards(
        path, (Passage(f"h{i}", "", title) for i, title in enumerate(work.titles[1]))
    ),
    "cards-ocr": _read_cards,
    "emoji-train": lambda work, path: _write_emoji(path, work.emoji[0], False),
    "emoji": lambda work, path: _write_emoji(path, work.emoji[1], False),
    "emoji-captions": lambda work, path: _write_emoji(path, work.emoji[1], True),
    "figures-train": lambda work, path: _write_figures(path, work.titles[0][:FIGURE_TITLES], FORMS),
    "figures": _held_out_figures("text+image"),
    "figures-text": _held_out_figures("text"),
    "figures-image": _held_out_figures("image"),
}
_EXAMPLES = {"cards": _card_examples, "emoji": _emoji_examples, "figures": _figure_examples}
_QUESTIONS: dict[str, Callable[[PageWork, str], Question]] = {
    "cards": lambda work, id_: Question(id_, work.titles[1][int(id_[1:])], ()),
    "emoji": lambda work, id_: Question(id_, _caption(work, id_), ()),
    "emoji-captions": lambda work, id_: Question(id_, "", (), {"query_image": _picture(work, id_)}),
    "figures": lambda work, id_: Question(id_, _figure_question(work, id_), ()),
}
