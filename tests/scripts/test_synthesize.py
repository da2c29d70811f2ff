"""`sleuth synthesize` from the command line, with templates that know the truth."""

from pathlib import Path

import pytest

from data.atlas.questions import make_questions
from data.corpus import Corpus
from data.examples import Examples
from data.jsonl import read_json, read_jsonl, write_jsonl
from data.machine.lock import locked
from retriever_server.training.synthesis.drafts import draw_seed
from scripts.__main__ import main
from scripts.bench.synthesis_templates import AtlasOracle, AtlasTemplates, corpus_rows, open_world

CONFIGS = Path("scripts/configs/synthesis")
FRET = str(CONFIGS / "fret.yaml")
TEMPLATES = "{class_path: AtlasTemplates, init_args: {invented: 12, faults: {wrong_seed: 0.5}}}"
ORACLE = "[{class_path: AtlasOracle, init_args: {invented: 12}}]"


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    folder, world = tmp_path_factory.mktemp("world"), open_world(12)
    write_jsonl(folder / "corpus.jsonl", corpus_rows(world))
    asked = make_questions(world, None, {"one_hop": 24, "two_hop": 24})
    write_jsonl(folder / "dev.jsonl", (question.as_record() for question in asked))
    return folder


def synthesize(atlas, out, *more):
    given = ["--corpus", str(atlas / "corpus.jsonl"), "--out", str(out), "--generator", TEMPLATES]
    return main(["synthesize", "--config", FRET, *given, "--judges", ORACLE, *more])


def test_the_command_writes_examples_with_repaired_seeds(atlas, tmp_path, capsys):
    assert synthesize(atlas, tmp_path, "--limit", "60") == 0
    said = capsys.readouterr().out
    summary, oracle = read_json(tmp_path / "summary.json"), AtlasOracle(12)
    corpus = Corpus(atlas / "corpus.jsonl")
    examples = Examples(tmp_path / "examples.jsonl", corpus)
    assert len(examples) == summary["examples"] > 40 and summary["relabelled"] > 15
    positives = [next(p for p in corpus if p.id == e.positives[0]) for e in examples]
    asked = [e.query.split("Query: ")[1] for e in examples]
    right = oracle.score(list(zip(asked, positives, strict=True)))
    assert sum(right) / len(right) > 0.95
    assert f"{summary['examples']} examples in" in said and "tokens each" in said


def test_a_dry_run_prints_prompts_and_costs_and_asks_nothing(atlas, tmp_path, capsys):
    more = [
        "--generator",
        "{class_path: Chat, init_args: {url: 'http://127.0.0.1:9/v1'}}",
        "--dry_run",
        "true",
    ]
    assert synthesize(atlas, tmp_path / "out", *more, "--limit", "60") == 0
    said = capsys.readouterr().out
    assert said.count("--- prompt") == 3 and "Passage: " in said and "{passage}" not in said
    assert "60 queries, 60 calls: about" in said and "1 judge read 1,260 pairs each" in said
    assert not (tmp_path / "out").exists()
    e5 = ["synthesize", "--config", "scripts/configs/synthesis/e5.yaml", "--dry_run", "true"]
    assert main(e5) == 0
    said = capsys.readouterr().out
    assert "JSON list of 20 strings" in said and '"positive"' in said and "160 queries, 168 calls" in said


@pytest.mark.slow
def test_judges_are_measured_and_a_bad_one_is_left_out_with_its_figure(atlas, tmp_path, capsys, caplog):
    rows = list(read_jsonl(atlas / "dev.jsonl"))
    gold = "".join(f"{row['id']}\t{row['metadata']['entities'][-1]}\t1\n" for row in rows)
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + gold)
    judges = f"[{ORACLE[1:-1]}, {{class_path: scripts.bench.synthesis_templates.RandomJudge}}]"
    measure = ["--measure_judges", str(tmp_path / "qrels.tsv"), "--queries", str(atlas / "dev.jsonl")]
    assert synthesize(atlas, tmp_path / "out", "--judges", judges, *measure) == 0
    table = capsys.readouterr().out
    assert "gold@1" in table and "one_hop" in table
    measured = read_json(tmp_path / "out" / "judges.json")["judges"]
    assert measured["random 0"]["all"]["auc"] < 0.7 < measured["atlas oracle"]["one_hop"]["auc"]
    assert synthesize(atlas, tmp_path / "out", "--judges", judges, "--limit", "30") == 0
    written = tmp_path / "out" / "examples.jsonl"
    assert f"judge random 0: AUC {measured['random 0']['all']['auc']:.3f}, below 0.7" in caplog.text
    assert {row["provenance"]["scores"] for row in read_jsonl(written)} == {"atlas oracle"}


@pytest.mark.parametrize(
    "more, message",
    [
        (["--filters", "{lenght: {}}"], "filters: 'lenght': must be one of"),
        (["--recipe", "fred"], "recipe = 'fred'"),
        (["--judges", "[{class_path: Nobody}]"], r"judges[0].class_path: 'Nobody' must be one of"),
        (["--generator", "{class_path: Chat, init_args: {urll: x}}"], "init_args.urll: unknown key"),
        (["--generator.init_args.kindz", "x"], "generator.init_args.kindz: unknown key"),
        (["--corpus", "nothing.jsonl"], "nothing.jsonl: no such file"),
        (["--candidates", "5", "--filters", "{round_trip: {k: 9}}"], "filters.round_trip.k = 9"),
        (["--filters", "{round_trip: 9}"], "filters.round_trip = 9: must be its options"),
        (["--filters", "{score: {least: 0, of: me}}"], "filters.score.of = 'me': must be one of retriever"),
        (["--choices", "{tongue: [German]}"], "choices = 'tongue': must be one of "),
        (["--query_template", "find"], "query_template = 'find': must be a text that names {query}"),
        (["--retriever", "nowhere"], "retriever 'nowhere': must be"),
        (["--pattern", "("], "pattern = '('"),
        (["--dry_run", "true", "--pattern", "no such words"], "leave no passage to write queries for"),
        (["--measure_judges", "q.tsv"], "queries = None: must be given together"),
        (["--evaluation", "[{queries: none.jsonl}]"], "none.jsonl"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(atlas, tmp_path, capsys, more, message):
    assert synthesize(atlas, tmp_path, *more) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in said and said.startswith("sleuth: ")


@pytest.mark.parametrize("filters, warned", [("{score: {least: 0.7}}", 1), ("{score: {least: 1.5}}", 0)])
def test_a_cosine_asked_of_bm25_is_warned_of(atlas, tmp_path, caplog, filters, warned):
    assert synthesize(atlas, tmp_path, "--limit", "5", "--filters", filters) == 0
    assert caplog.text.count("filters.score.least = 0.7: a cosine") == warned


def test_a_folder_that_another_process_writes_is_refused(atlas, tmp_path, capsys):
    with locked(tmp_path / ".lock", "another"):
        assert synthesize(atlas, tmp_path, "--limit", "5") == 2
    assert f"{tmp_path} is being written by process" in capsys.readouterr().err


@pytest.mark.slow
def test_interrupted_it_is_one_line_and_the_same_command_goes_on(atlas, tmp_path, capsys, monkeypatch):
    write, asked = AtlasTemplates.write, []

    def interrupted(self, calls):
        asked.append(calls)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return write(self, calls)

    monkeypatch.setattr(AtlasTemplates, "write", interrupted)
    more = ("--limit", "60", "--batch", "16")
    assert synthesize(atlas, tmp_path / "a", *more) == 130
    said = capsys.readouterr().err.strip().splitlines()[-1]
    go_on = "start the same command again to go on"
    assert said == f"sleuth: interrupted; what is done is kept in {tmp_path / 'a'}: {go_on}"
    assert synthesize(atlas, tmp_path / "a", *more) == synthesize(atlas, tmp_path / "b", *more) == 0
    assert len(asked) == 2 + 3 + 4
    examples = [(tmp_path / of / "examples.jsonl").read_bytes() for of in "ab"]
    assert examples[0] == examples[1]


@pytest.mark.parametrize(
    "path", sorted(Path("scripts/configs/synthesis").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_recipe_of_ours_fills_its_prompts(atlas, tmp_path, capsys, path):
    write_jsonl(tmp_path / "shots.jsonl", [{"query": "how long is the Rhine", "passage": "It is long."}])
    given = ["--corpus", str(atlas / "corpus.jsonl"), "--shots", str(tmp_path / "shots.jsonl")]
    given += ["--retriever", "null", "--limit", "2", "--dry_run", "true"]
    given += ["--least_characters", "1", "--pattern", "null"]
    assert main(["synthesize", "--config", str(path), *given]) == 0
    assert "2 queries" in capsys.readouterr().out


def test_faults_are_planted_at_their_rates(atlas):
    corpus, writer = (
        Corpus(atlas / "corpus.jsonl"),
        AtlasTemplates({"wrong_seed": 0.15, "quote": 0.1}, invented=12),
    )
    seeds = [(passage, f"{passage.id} {i}") for passage in corpus for i in range(40)]
    faults = [writer.record(passage, draw_seed(seed))["fault"] for passage, seed in seeds]
    assert abs(faults.count("wrong_seed") / len(faults) - 0.15) < 0.03
    assert abs(faults.count("quote") / len(faults) - 0.1) < 0.03
