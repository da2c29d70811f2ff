"""Train one retriever over domains, languages and modalities, and a specialist of each, with the same budget.

    pip install babel
    python -m scripts.bench.unified [--work runs/unified] [--steps 120]

The recipe is scripts/configs/retriever/unified.yaml in small: its sets, weights and temperature over a random
vision-language model of two layers. Domains: places and tongues (names of the Unicode CLDR) and figures
(coloured shapes), each in English, German and French, as a text and as an image: a name drawn on a card, or
the figure. A specialist sees one domain, language or modality alone, for as many updates. Asked are names
that no training saw; searched are all held-out passages of a modality, and a drawing of every figure.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from data.errors import ConfigError
from data.jsonl import read_json, read_jsonl, write_json, write_jsonl
from data.records import Passage, Question
from data.yaml_file import read_yaml
from scripts.bench.multimodal_world import COLOURS, SHAPES, draw_figure

RECIPE = Path(__file__).parents[1] / "configs" / "retriever" / "unified.yaml"
SIDE, PATCH, BATCH = 64, 16, 32
DOMAINS, LANGUAGES, MODALITIES = ("places", "tongues", "figures"), ("en", "de", "fr"), ("text", "image")
HELD_OUT, DRAWINGS = {"places": 60, "tongues": 100, "figures": 16}, 8
ASKED = {
    "en": ("where can I read about {}", "what is {}", "tell me of {}"),
    "de": ("wo lese ich von {}", "was ist {}", "erzähl mir von {}"),
    "fr": ("où lire sur {}", "qu'est-ce que {}", "parle-moi de {}"),
}
SAID = {
    "places": {
        "en": "{}: a country or territory", "de": "{}: ein Land oder Gebiet",
        "fr": "{} : un pays ou territoire",
    },
    "tongues": {
        "en": "{}: a language that is spoken", "de": "{}: eine Sprache, die man spricht",
        "fr": "{} : une langue parlée",
    },
    "figures": {"en": "{}: a small picture", "de": "{}: ein kleines Bild", "fr": "{} : une petite image"},
}  # fmt: skip
WORDS = {
    "de": dict(zip((*COLOURS, *SHAPES), (
        "rot", "blau", "grün", "orange", "lila", "schwarz", "braun", "rosa",
        "Kreis", "Quadrat", "Dreieck", "Kreuz", "Ring", "Balken",
    ), strict=True)),
    "fr": dict(zip((*COLOURS, *SHAPES), (
        "rouge", "bleu", "vert", "orange", "violet", "noir", "marron", "rose",
        "cercle", "carré", "triangle", "croix", "anneau", "barre",
    ), strict=True)),
}  # fmt: skip


@dataclass(frozen=True)
class Entity:
    """A thing with a name in each language, and perhaps a figure."""

    domain: str
    id: str
    names: dict[str, str]
    figure: tuple[str, str] = ("", "")
    """Colour and shape."""

    def image_id(self, language: str) -> str:
        """Return the id of its image: a card has a language, a figure has none."""
        return f"{self.id}-image" + ("" if self.figure[0] else f"-{language}")


def main(work: str = "runs/unified", steps: int = 120, batch_size: int = BATCH) -> None:
    """Train what is not there yet, and print the table.

    Args:
        work: Folder of all that is made.
        steps: Updates of every training.
        batch_size: Examples an update.
    """
    folder, entities = Path(work), _entities()
    held_out = [each for of in entities.values() for each in of[0]]
    if not (folder / "train" / "corpus.jsonl").exists():
        _write_world(folder, entities)
    values = {"unified": _judged(folder, "unified", {}, held_out, steps, batch_size)}
    values["untrained"] = _judged(folder, "untrained", {}, held_out, 0, batch_size)
    for axis, names in _AXES.items():
        for name in names:
            values[name] = _judged(folder, name, {axis: name}, held_out, steps, batch_size)
    print(_table(values))


_AXES = {"domain": DOMAINS, "language": LANGUAGES, "modality": MODALITIES}


# ---- the world ---------------------------------------------------------------------------------------


def _entities() -> dict[str, tuple[list[Entity], list[Entity]]]:
    """Return the entities of each domain: those held out, and those to train on."""
    try:
        from babel import Locale  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError("scripts.bench.unified needs: pip install babel") from error
    locales = {language: Locale(language) for language in LANGUAGES}
    found = {}
    for domain, table in (("places", "territories"), ("tongues", "languages")):
        tables = {language: getattr(locale, table) for language, locale in locales.items()}
        found[domain] = [
            Entity(domain, f"{domain}-{code}", {language: str(of[code]) for language, of in tables.items()})
            for code in sorted(set.intersection(*map(set, tables.values())))
        ]
    found["figures"] = [
        Entity("figures", f"figures-{colour}-{shape}-{n}", _figure_names(colour, shape), (colour, shape))
        for colour, shape, n in product(COLOURS, SHAPES, range(DRAWINGS))
    ]
    return {domain: _split(entities, HELD_OUT[domain]) for domain, entities in found.items()}


def _figure_names(colour: str, shape: str) -> dict[str, str]:
    de, fr = WORDS["de"], WORDS["fr"]
    return {
        "en": f"{colour} {shape}",
        "de": f"{de[shape]} in {de[colour]}",
        "fr": f"{fr[shape]} {fr[colour]}",
    }


def _split(entities: list[Entity], count: int) -> tuple[list[Entity], list[Entity]]:
    """Hold out `count` entities; no name of theirs, in any language, is among the others."""
    random.Random(0).shuffle(entities)
    chosen, taken = [], set()
    for each in entities:
        if len(chosen) < count and not taken & {*each.names.values()}:
            chosen.append(each)
            taken |= {*each.names.values()}
    return chosen, [each for each in entities if not taken & {*each.names.values()}]


def _write_world(folder: Path, split: dict[str, tuple[list[Entity], list[Entity]]]) -> None:
    for domain, (_, entities) in split.items():
        write_jsonl(folder / "examples" / f"{domain}.jsonl", _examples(entities))
    for at, part in enumerate(("held-out", "train")):
        entities = [each for of in split.values() for each in of[at]]
        if part == "held-out":  # a new drawing of every other figure, to tell them apart
            others = {each.figure: each for each in split["figures"][1]}.values()
            entities += [replace(each, id=f"{each.id}-other") for each in others]
        texts, images = list(_texts(entities)), _draw(folder / part, entities)
        write_jsonl(folder / part / "text.jsonl", texts)
        write_jsonl(folder / part / "image.jsonl", images)
        write_jsonl(folder / part / "corpus.jsonl", [*texts, *images])


def _texts(entities: list[Entity]) -> Iterator[dict[str, Any]]:
    for each in entities:
        for language, name in each.names.items():
            yield {"id": f"{each.id}-text-{language}", "text": SAID[each.domain][language].format(name)}


def _draw(folder: Path, entities: list[Entity]) -> list[dict[str, Any]]:
    """Draw names on cards, and figures."""
    from PIL import ImageFont

    from data.pages.rendering import Style, render

    fonts = tuple(str(ImageFont.truetype(name).path) for name in ("DejaVuSans.ttf", "DejaVuSerif.ttf"))
    style = Style(("page", "card"), fonts, width=SIDE, height=SIDE, font_size=9, shows="title")
    named = [
        Passage(each.image_id(language), "", name)
        for each in entities
        if not each.figure[0]
        for language, name in each.names.items()
    ]
    drawn = render(named, folder / "drawn", style)
    rows = [{"id": row["id"], "image": f"drawn/{row['image']}"} for row in read_jsonl(drawn.corpus)]
    for each in entities:
        if each.figure[0]:
            draw_figure(folder / f"{each.id}.png", *each.figure, each.id)
            rows.append({"id": each.image_id(""), "image": f"{each.id}.png"})
    return rows


def _examples(entities: list[Entity]) -> Iterator[dict[str, Any]]:
    for each in entities:
        for language, name in each.names.items():
            for modality in MODALITIES:
                ids = {"text": f"{each.id}-text-{language}", "image": each.image_id(language)}
                query = random.Random(f"{each.id} {language} {modality}").choice(ASKED[language]).format(name)
                id_ = f"{each.id}-{language}-{modality}"
                yield {"query_id": id_, "query": query, "positives": [ids[modality]]}


# ---- trainings ---------------------------------------------------------------------------------------


def _trained(folder: Path, name: str, only: dict[str, str], steps: int, batch_size: int) -> Path:
    """Return the folder of the model: of the recipe over the examples that are kept, or untrained."""
    from retriever_server.training.build_components import build_model
    from retriever_server.training.recipe import DataConfig, RetrieverRecipe
    from retriever_server.training.run import train

    asked = read_yaml(RECIPE)
    sets = []
    for given in asked["train"]:
        domain = Path(given["examples"]).stem
        rows = [
            row
            for row in read_jsonl(folder / "examples" / f"{domain}.jsonl")
            if all(_slice(row["query_id"])[axis] == value for axis, value in only.items())
        ]
        if rows:
            kept = folder / "kept" / name / f"{domain}.jsonl"
            write_jsonl(kept, rows)
            shares = {} if "modality" in only else given["shares"]
            corpus = str(folder / "train" / "corpus.jsonl")
            sets.append(DataConfig(corpus, str(kept), weight=given["weight"], shares=shares))
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 512, "num_hidden_layers": 2}
    base = {
        "config": {
            "model_type": "idefics3", "scale_factor": 1, "text_config": {**sizes, "num_key_value_heads": 4},
            "vision_config": {**sizes, "image_size": SIDE, "patch_size": PATCH},
        },
        "corpus": str(folder / "train" / "text.jsonl"), "vocabulary": 1200,
    }  # fmt: skip
    model = {
        "class_path": asked["model"]["class_path"],
        "init_args": {"base": base, "instruction": "", "max_tokens": 96},
    }
    loss = {
        "class_path": "MultipleNegativesRankingLoss",
        "init_args": {"scale": asked["loss"]["init_args"]["scale"]},
    }
    recipe = RetrieverRecipe(
        model, loss, sets, out=str(folder / "models" / name), inputs=asked["inputs"], steps=max(1, steps),
        batch_size=batch_size, learning_rate=1e-3, save_every=max(1, steps), device="cpu",
    )  # fmt: skip
    out = Path(recipe.out) / "model"
    if out.exists():
        return out
    if steps:
        with redirect_stdout(sys.stderr):
            train(recipe)
    else:
        import torch

        torch.manual_seed(0)
        build_model(recipe).model.save_pretrained(str(out))
    return out


def _judged(
    folder: Path, name: str, only: dict[str, str], held_out: list[Entity], steps: int, batch_size: int
) -> dict[str, float]:
    """Return nDCG@10 of each held-out question: the passage of its modality is looked for."""
    path = folder / "results" / f"{name}.json"
    if not path.exists():
        from data.corpus import Corpus
        from retriever_server.encoders.loading import load_encoder
        from retriever_server.evaluation import judge, parse_metrics, rank_all
        from retriever_server.indexes.manifest import index_kind

        start, cpu = time.perf_counter(), time.process_time()
        model = _trained(folder, name, only, steps, batch_size)
        encoder, found = load_encoder(str(model), inputs="text+image"), {}
        for modality in MODALITIES:
            corpus = Corpus(folder / "held-out" / f"{modality}.jsonl")
            index = index_kind("flat").build(corpus, folder / "indexes" / f"{name}-{modality}", encoder)
            rows = [row for row in _examples(held_out) if _slice(row["query_id"])["modality"] == modality]
            questions = [Question(row["query_id"], row["query"], ()) for row in rows]
            qrels = {row["query_id"]: dict.fromkeys(row["positives"], 1) for row in rows}
            found |= judge(rank_all(index, questions, 10), qrels, parse_metrics("nDCG@10", 10))["nDCG@10"]
        seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        write_json(path, {"steps": steps, **seconds, "values": found})
        print(f"{name}: {seconds}", file=sys.stderr, flush=True)
    return read_json(path)["values"]


def _table(values: dict[str, dict[str, float]]) -> str:
    """Return by axis: the unified model against the specialist of that slice, on the slice."""
    from retriever_server.evaluation import compare, means

    lines = ["| axis | slice | questions | untrained | unified | specialist | unified - specialist [95 %] |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|")
    for axis, names in _AXES.items():
        for name in names:
            ids = [id_ for id_ in values["unified"] if _slice(id_)[axis] == name]
            of = {
                who: {"nDCG@10": {id_: values[who][id_] for id_ in ids}}
                for who in ("untrained", "unified", name)
            }
            scores = [f"{means(each)['nDCG@10']:.3f}" for each in of.values()]
            by = compare(of["unified"], of[name])["nDCG@10"]
            difference = f"{by['difference']:+.3f} [{by['low']:+.3f}, {by['high']:+.3f}]"
            lines.append(f"| {' | '.join([axis, name, str(len(ids)), *scores, difference])} |")
    for who in ("untrained", "unified"):
        cells = {}
        for id_, value in values[who].items():
            at = _slice(id_)
            cells.setdefault(f"{at['domain']}, {at['modality']}", {})[id_] = value
        lines.append(
            f"\n{who}: " + "; ".join(f"{k} {sum(v.values()) / len(v):.3f}" for k, v in cells.items())
        )
    return "\n".join(lines)


def _slice(id_: str) -> dict[str, str]:
    domain, *_, language, modality = id_.split("-")
    return {"domain": domain, "language": language, "modality": modality}


if __name__ == "__main__":
    from scripts.__main__ import run_script

    run_script(main)
