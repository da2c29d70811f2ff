"""The pipeline: stages, resuming, provenance, what training reads."""

import json
import shutil

import pytest

from data.corpus import Corpus
from data.errors import ConfigError, DataError, RunStopped
from data.examples import Examples
from data.jsonl import read_jsonl
from retriever_server.training.synthesis.config import LabelRules
from retriever_server.training.synthesis.drafts import Written
from retriever_server.training.synthesis.generators import Scripted
from retriever_server.training.synthesis.judges import Oracle
from tests.retriever_server.training.synthesis.rivers import NAMES, Lengths, rivers, run, synthesize

FILTERS = {"length": {}, "vague": {}, "answerable": {}, "duplicates": {}}


class Wrong(Lengths):
    """Asks some passages about another river, and some for nothing."""

    def text(self, call):
        number = NAMES.index(call.passage.title)
        if number % 5 == 0:
            return "I'm sorry, I cannot."
        name = NAMES[(number + (number % 4 == 1)) % len(NAMES)]
        return json.dumps({"task": "Find lengths", "query": f"How many miles has river {name}?"})


FAR = LabelRules("best", "far")
ORACLE = Oracle(truth={f"How many miles has river {name}?": [name] for name in NAMES})


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.json*")) if path.suffix != ".part"}


def test_examples_are_what_training_reads_with_their_provenance(tmp_path):
    summary = synthesize(run(tmp_path, Lengths(), filters=FILTERS, labels=FAR))
    corpus = rivers(tmp_path)
    examples = Examples(tmp_path / "out" / "examples.jsonl", corpus)
    assert len(examples) == summary["examples"] == len(NAMES)
    for example in examples:
        name = example.provenance["seed_passage"]
        assert example.positives == (name,) and example.query == f"How many miles has river {name}?"
        assert example.negatives and name not in example.negatives and example.answers
        assert example.provenance["passed"] == list(FILTERS)
        assert {"recipe", "generator", "prompt", "random_seed", "raw", "draws"} <= set(example.provenance)
        assert example.provenance["raw"][0].startswith('{"task"')


@pytest.mark.parametrize("stops_after", [0, 4, 12, 16])
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(tmp_path, stops_after):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    synthesize(run(tmp_path / "whole", Lengths(), judges=[ORACLE], labels=FAR, filters=FILTERS))
    with pytest.raises(KeyboardInterrupt):
        synthesize(
            run(tmp_path / "killed", Lengths(stops_after), judges=[ORACLE], labels=FAR, filters=FILTERS)
        )
    part = tmp_path / "killed" / "out" / "generated.jsonl.part"
    if part.exists():
        with open(part, "ab") as file:
            file.write(b'{"id": "half a li')
    again = Lengths()
    synthesize(run(tmp_path / "killed", again, judges=[ORACLE], labels=FAR, filters=FILTERS))
    assert again.calls == len(NAMES) - stops_after // 4 * 4
    whole, killed = files(tmp_path / "whole" / "out"), files(tmp_path / "killed" / "out")
    for name in ("seeds.jsonl", "generated.jsonl", "candidates.jsonl", "judged.jsonl", "examples.jsonl"):
        assert whole[name] == killed[name], name


def test_a_larger_limit_goes_on_where_the_smaller_one_ended(tmp_path):
    first, second = Lengths(), Lengths()
    synthesize(run(tmp_path, first, limit=6))
    synthesize(run(tmp_path, second, limit=14))
    (tmp_path / "at_once").mkdir()
    synthesize(run(tmp_path / "at_once", Lengths(), limit=14))
    assert (first.calls, second.calls) == (6, 10)  # the batch that was cut short is written again
    examples = [tmp_path / of / "examples.jsonl" for of in ("out", "at_once/out")]
    assert examples[0].read_bytes() == examples[1].read_bytes()


def test_relabelling_repairs_wrong_seeds_and_rejections_add_up(tmp_path):
    summary = synthesize(run(tmp_path, Wrong(), judges=[ORACLE], labels=FAR, candidates=8))
    truth = {f"How many miles has river {name}?": name for name in NAMES}
    for example in Examples(tmp_path / "out" / "examples.jsonl", rivers(tmp_path)):
        assert example.positives == (truth[example.query],)
        assert (example.scores or {})[example.positives[0]] == 1.0 and example.provenance[
            "scores"
        ] == "oracle"
    assert summary["relabelled"] > 0
    assert summary["examples"] + sum(each["count"] for each in summary["rejected"]) == summary["texts"]
    assert {"stage": "generated", "reason": "refusal", "count": 4} in summary["rejected"]
    rejected = list(read_jsonl(tmp_path / "out" / "rejected.jsonl"))
    assert len(rejected) == 4


def test_filters_and_labels_may_change_without_asking_again(tmp_path):
    synthesize(run(tmp_path, Lengths()))
    silent = Lengths(stops_after=0)
    with pytest.raises(RunStopped, match=r"no example is left of 20 texts; mostly: too short \(20\)"):
        synthesize(run(tmp_path, silent, filters={"length": {"least_words": 7}}))
    assert (
        synthesize(run(tmp_path, silent, filters={"length": {"least_words": 6}}, labels=FAR))["examples"]
        == 20
    )


def test_a_stage_of_other_settings_is_refused_by_its_name(tmp_path):
    synthesize(run(tmp_path, Lengths()))
    with pytest.raises(ConfigError, match=r"candidates\.jsonl: was made by other settings"):
        synthesize(run(tmp_path, Lengths(), candidates=6))
    with pytest.raises(ConfigError, match=r"seeds\.jsonl: was made by other settings"):
        synthesize(run(tmp_path, Lengths(), seed=1))
    with pytest.raises(ConfigError, match=r"generated\.jsonl: was made by other settings"):
        synthesize(run(tmp_path, Scripted(["x"])))


def test_a_corpus_that_changed_in_between_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        synthesize(run(tmp_path, Lengths(8)))
    shutil.rmtree(tmp_path / "bm25")
    text = (tmp_path / "corpus.jsonl").read_text().replace("miles", "leagues", 1)
    (tmp_path / "corpus.jsonl").write_text(text)
    with pytest.raises(DataError, match="it changed since, or is another; give another --out"):
        synthesize(run(tmp_path, Lengths(), Corpus(tmp_path / "corpus.jsonl")))


def test_written_passages_get_a_corpus_of_their_own(tmp_path):
    tasks = json.dumps(["Given a symptom, find causes", "Given a name, find its origin"])
    fields = {"query": "why do leaves fall", "positive": "Leaves fall as days grow short."}
    made = json.dumps({**fields, "negative": "Ash."})

    class Writer(Lengths):
        def text(self, call):
            return tasks if call.passage is None and "JSON list" in call.prompt else made

        def write(self, calls):
            return [Written(self.text(call)) for call in calls]

    none = run(tmp_path / "none", Scripted(["I will."]), rivers(tmp_path), recipe="e5")
    with pytest.raises(RunStopped, match=r"no reply has tasks \(mostly: no list\); .*none/out/tasks.jsonl"):
        synthesize(none)
    made_run = run(tmp_path, Writer(), recipe="e5", labels=LabelRules(negative="written"), limit=3)
    made_run.corpus = made_run.retriever = None
    assert synthesize(made_run)["examples"] == 3
    corpus = Corpus(tmp_path / "out" / "corpus.jsonl")
    for example in Examples(tmp_path / "out" / "examples.jsonl", corpus):
        [good, bad] = map(corpus.get, (*example.positives, *example.negatives))
        assert good and bad and (good.text, bad.text) == ("Leaves fall as days grow short.", "Ash.")
        assert example.provenance["task"].startswith("Given")


def test_a_written_negative_stands_beside_the_seed_passage(tmp_path):
    class Writer(Lengths):
        def text(self, call):
            query = f"How many miles has river {call.passage.title}?"
            return json.dumps({"query": query, "negative": f"No river is {call.passage.title}."})

    labels = LabelRules(positive="best", negative="written")
    synthesize(run(tmp_path, Writer(), recipe="reasonir_written", judges=[ORACLE], labels=labels))
    corpus = Corpus(tmp_path / "out" / "corpus.jsonl")
    for example in Examples(tmp_path / "out" / "examples.jsonl", corpus):
        seed = example.provenance["seed_passage"]
        assert example.positives == (seed,) and len(example.negatives) == 1
        negative = corpus.get(example.negatives[0])
        assert negative is not None and negative.text == f"No river is {seed}."


def test_kept_queries_expand_their_passages(tmp_path):
    writer, settings = (
        Scripted(["how long is it now", "which sea"]),
        {"recipe": "doc2query", "expansion": True},
    )
    synthesize(run(tmp_path, writer, filters={"length": {"least_words": 3}}, **settings))
    found = Corpus(tmp_path / "out" / "expanded.jsonl")
    kept = {row["positives"][0] for row in read_jsonl(tmp_path / "out" / "examples.jsonl")}
    expanded = {p.id for p in found if p.metadata["expansion"] == "how long is it now"}
    assert kept == expanded and 0 < len(kept) < len(NAMES)
