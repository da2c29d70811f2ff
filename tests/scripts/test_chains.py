"""Files of one command are read by the next: each chain of commands that the docs name, on tiny models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.corpus import Corpus
from data.jsonl import read_json, read_jsonl
from data.records import Passage
from retriever_server.training.examples import Examples
from scripts.__main__ import main
from tests.retriever_server.training.decoder_models import tiny_decoder
from tests.retriever_server.training.recipes import base, component, settings

INFO_NCE = component("MultipleNegativesRankingLoss")


def run(*words: Any) -> None:
    assert main([str(word) for word in words]) == 0, words


def train(rivers: Path, out: Path, **changes: Any) -> Path:
    """The folder of a model of two steps."""
    fields = settings(rivers, out, **{"steps": 2, **changes})
    out.with_suffix(".yaml").write_text(yaml.safe_dump(fields))
    run("train-retriever", "--config", out.with_suffix(".yaml"))
    return out / "model"


def index(corpus: Path, out: Path, model: Path | None = None, *words: Any) -> Path:
    run("index", "--corpus", corpus, "--out", out, *(("--encoder", model) if model else ()), *words)
    return out


def written(path: Path, retriever: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(retriever))
    return path


def answers(rivers: Path, retriever: Path, capsys: Any) -> None:
    """The retriever is searched and scored; its run is scored as it is."""
    scores = retriever.with_name(f"{retriever.stem}-scores")
    judged = ("--queries", rivers / "dev.jsonl", "--qrels", rivers / "qrels.tsv")
    capsys.readouterr()
    run("search", "how long is danb", "--retriever", retriever)
    assert "miles long" in capsys.readouterr().out
    run("evaluate-retriever", "--retriever", retriever, *judged, "--out", scores)
    run("evaluate-retriever", "--retriever", scores / "run.trec", *judged, "--out", scores / "again")
    first, second = (read_json(folder / "scores.json")["scores"] for folder in (scores, scores / "again"))
    for of in first.values():
        of.pop("parts", None)  # a run says nothing of what was fused
    assert first == second and first["nDCG@10"]["queries"] == 12


METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense": (component("dense"), INFO_NCE),
    "two_towers": (component("two_towers", normalise=True), INFO_NCE),
    "splade": (component("splade"), component("splade_loss")),
    "colbert": (component("colbert", dimension=8), component("ContrastiveDistillation", similarity="maxsim")),
    "m3": (component("m3", dimension=8), component("M3Loss")),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=() if name in ("two_towers", "m3") else pytest.mark.slow)
        for name in METHODS  # m3 is dense, sparse and multi-vector in one
    ],
)
def test_merged_retrievers_are_indexed_and_searched(
    method: str, rivers: Path, tmp_path: Path, capsys: Any
) -> None:
    model, loss = METHODS[method]
    model = component(model["class_path"], **model["init_args"], base=base(rivers))
    both = [train(rivers, tmp_path / str(seed), model=model, loss=loss, seed=seed) for seed in range(2)]
    run("merge", "--models", json.dumps([*map(str, both)]), "--out", tmp_path / "merged")
    parts = ("dense", "sparse", "multi") if method == "m3" else ()
    indexes = [
        str(index(rivers / "corpus.jsonl", tmp_path / f"index{part}", tmp_path / "merged" / part))
        for part in ("", *parts)
    ]
    answers(rivers, Path(indexes[0]), capsys)
    if parts:
        fused = component("Fuse", parts=indexes[1:])
        answers(rivers, written(tmp_path / "fused.yaml", fused), capsys)


@pytest.mark.slow
def test_a_merged_retriever_is_trained_further(rivers: Path, tmp_path: Path) -> None:
    both = [str(train(rivers, tmp_path / str(seed), seed=seed)) for seed in range(2)]
    run("merge", "--models", json.dumps(both), "--weights", "[2, 1]", "--out", tmp_path / "merged")
    further = component("pretrained", base=str(tmp_path / "merged"))
    index(rivers / "corpus.jsonl", tmp_path / "index", train(rivers, tmp_path / "on", model=further))


@pytest.mark.slow
def test_merged_rerankers_and_policies_load(rivers: Path, tmp_path: Path, capsys: Any) -> None:
    bm25 = index(rivers / "corpus.jsonl", tmp_path / "bm25")
    pairs = [{**settings(rivers, "")["train"][0], "negatives": 1, "form": "pair"}]
    changes = {
        "model": component("cross_encoder", base=base(rivers)), "train": pairs,
        "loss": component("BinaryCrossEntropyLoss"), "passage_template": "{contents}",
    }  # fmt: skip
    both = [str(train(rivers, tmp_path / str(seed), seed=seed, **changes)) for seed in range(2)]
    run("merge", "--models", json.dumps(both), "--out", tmp_path / "merged")
    scorer = component("CrossEncoder", model=str(tmp_path / "merged"), device="cpu")
    reranked = component("Rerank", retriever=str(bm25), scorer=scorer, depth=5)
    answers(rivers, written(tmp_path / "reranked.yaml", reranked), capsys)
    policies = [tiny_decoder(tmp_path / f"policy{seed}", seed=seed) for seed in range(2)]
    run("merge", "--models", json.dumps(policies), "--out", tmp_path / "policy")
    yes_no = component("YesNo", model=str(tmp_path / "policy"))
    judged = component("Rerank", retriever=str(bm25), scorer=yes_no, depth=2)
    answers(rivers, written(tmp_path / "judged.yaml", judged), capsys)


@pytest.mark.slow
def test_pairs_are_converted_mined_by_what_they_trained_and_trained_on(
    rivers: Path, tmp_path: Path, capsys: Any
) -> None:
    rows = [
        (e.query, e.positives[0])
        for e in Examples(rivers / "examples.jsonl", Corpus(rivers / "corpus.jsonl"))
    ]
    texts = {passage.id: passage.text for passage in Corpus(rivers / "corpus.jsonl")}
    lines = ["query\tpassage", *(f"{query}\t{texts[id_]}" for query, id_ in rows)]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines) + "\n")
    run("convert", "--source", tmp_path / "pairs.tsv", "--source_format", "sentence-transformers",
        "--out", tmp_path / "pairs")  # fmt: skip
    corpus, examples = tmp_path / "pairs/corpus.jsonl", tmp_path / "pairs/examples.jsonl"
    of = {"examples": str(examples), "corpus": str(corpus)}
    first = train(rivers, tmp_path / "first", train=[of])
    live = index(corpus, tmp_path / "live", first)
    run(
        "mine",
        "--queries",
        examples,
        "--retriever",
        live,
        "--out",
        tmp_path / "mined.jsonl",
        "--per_query",
        2,
    )
    pairs = [{**of, "examples": str(tmp_path / "mined.jsonl"), "negatives": 2, "form": "pair"}]
    judge = train(
        rivers, tmp_path / "judge", model=component("cross_encoder", base=base(rivers)), train=pairs,
        loss=component("BinaryCrossEntropyLoss"), passage_template="{contents}",
    )  # fmt: skip
    run("mine", "--queries", examples, "--retriever", live, "--teacher", judge, "--per_query", 2,
        "--out", tmp_path / "hard.jsonl")  # fmt: skip
    taught = [{**of, "examples": str(tmp_path / "hard.jsonl"), "negatives": 2, "labels": True}]
    loss = component("ContrastiveDistillation")
    second = train(rivers, tmp_path / "second", train=taught, loss=loss, serves=str(live))
    index(corpus, live, second, "--overwrite", "true")
    run("convert", "--source", tmp_path / "hard.jsonl", "--corpus", corpus, "--target_format", "bge",
        "--out", tmp_path / "hard.bge.jsonl")  # fmt: skip
    run("convert", "--source", tmp_path / "hard.bge.jsonl", "--corpus", corpus, "--source_format", "bge",
        "--out", tmp_path / "back")  # fmt: skip
    negatives = [
        [row["negatives"] for row in read_jsonl(f)]
        for f in (tmp_path / "hard.jsonl", tmp_path / "back/examples.jsonl")
    ]
    assert negatives[0] == negatives[1]
    reranked = component("Rerank", retriever=str(live), scorer=component("CrossEncoder", model=str(judge)))
    capsys.readouterr()
    run("search", "how long is danb", "--retriever", written(tmp_path / "reranked.yaml", reranked))
    assert "miles long" in capsys.readouterr().out


@pytest.mark.slow
def test_crops_labelled_by_several_teachers_are_trained_on_in_stages(rivers: Path, tmp_path: Path) -> None:
    corpus = rivers / "corpus.jsonl"
    dense = index(corpus, tmp_path / "dense", train(rivers, tmp_path / "student"))
    teachers = json.dumps([str(index(corpus, tmp_path / "bm25")), str(dense)])
    ranks = ("--positive_ranks", "[1, 2]", "--negative_ranks", "[4, 6]")
    run("mine", "--queries", "crops", "--teachers", teachers, *ranks, "--out", tmp_path / "dragon")
    model = settings(rivers, "")["model"]
    for stage in ("stage_1", "teacher_2", "stage_2"):
        data = [{"examples": str(tmp_path / f"dragon/{stage}.jsonl"), "corpus": str(corpus), "negatives": 2}]
        folder = train(rivers, tmp_path / stage, model=model, train=data)
        model = component("pretrained", base=str(folder))
    index(corpus, tmp_path / "index", folder)


class Capitals:
    """A generator that says a passage's title in capitals."""

    def __call__(self, passages: Sequence[Passage]) -> list[str]:
        return [f"{passage.title} river".upper() for passage in passages]


def test_an_expanded_corpus_is_trained_on_and_indexed(rivers: Path, tmp_path: Path, capsys: Any) -> None:
    expanded = tmp_path / "expanded.jsonl"
    generator = json.dumps({"class_path": f"{__name__}.Capitals"})
    run("expand", "--corpus", rivers / "corpus.jsonl", "--out", expanded, "--generator", generator)
    template = "{title}\n{text} {expansion}"
    data = [{"examples": str(rivers / "examples.jsonl"), "corpus": str(expanded)}]
    model = component("unicoil", base=base(rivers))
    folder = train(
        rivers, tmp_path / "unicoil", model=model, loss=component("splade_loss"), train=data,
        passage_template=template,
    )  # fmt: skip
    answers(rivers, index(expanded, tmp_path / "index", folder), capsys)


@pytest.mark.slow
def test_the_two_encoders_of_promptreps_are_indexed_and_joined(
    rivers: Path, tmp_path: Path, capsys: Any
) -> None:
    run("promptreps", "--base", tiny_decoder(tmp_path / "base"), "--out", tmp_path / "reps")
    parts = [
        str(index(rivers / "corpus.jsonl", tmp_path / f"{kind}-index", tmp_path / "reps" / kind))
        for kind in ("dense", "sparse")
    ]
    recipe = yaml.safe_load(Path("scripts/configs/retrievers/promptreps.yaml").read_text())
    recipe["init_args"]["parts"] = parts
    answers(rivers, written(tmp_path / "promptreps.yaml", recipe), capsys)


@pytest.mark.slow
def test_the_three_steps_of_llm2vec_give_a_retriever(rivers: Path, tmp_path: Path, capsys: Any) -> None:
    texts = [{"corpus": str(rivers / "corpus.jsonl"), "form": "text"}]
    options = {"pooling": "mean", "two_way": True, "max_tokens": 32}
    steps = {
        "mntp": (texts, component("MaskedNextToken"), {}),
        "simcse": (texts, component("SimCSE"), {"dropout": 0.3}),
        "pairs": (settings(rivers, "")["train"], INFO_NCE, {}),
    }
    at = Path(tiny_decoder(tmp_path / "base"))
    for name, (data, loss, more) in steps.items():
        model = component("decoder", base=str(at), **options, **more)
        lora = {"rank": 2}
        at = train(rivers, tmp_path / name, model=model, loss=loss, train=data, lora=lora, batch_size=8)
    answers(rivers, index(rivers / "corpus.jsonl", tmp_path / "index", at), capsys)


@pytest.mark.slow
def test_a_language_model_as_a_reranker_serves_under_both_names(
    rivers: Path, tmp_path: Path, capsys: Any
) -> None:
    bm25 = index(rivers / "corpus.jsonl", tmp_path / "bm25")
    lists = [{**settings(rivers, "")["train"][0], "negatives": 2, "form": "list"}]
    folder = train(
        rivers, tmp_path / "reranker", train=lists, loss=component("ListNetLoss"), batch_size=4,
        model=component("yes_no_reranker", base=tiny_decoder(tmp_path / "base")),
        passage_template="{contents}",
    )  # fmt: skip
    for name in ("CrossEncoder", "YesNo"):
        scorer = component(name, model=str(folder), device="cpu")
        reranked = component("Rerank", retriever=str(bm25), scorer=scorer, depth=2)
        answers(rivers, written(tmp_path / f"{name}.yaml", reranked), capsys)
