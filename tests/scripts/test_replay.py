"""`sleuth replay`: the same retriever repeats a trajectory, another changes what follows, both are shown."""

import asyncio

import pytest

from agent.replay import replay, resample
from agent.transcripts import from_record
from data.atlas.build import build_atlas
from data.corpus import Corpus
from data.jsonl import read_jsonl
from retriever_server.indexes.bm25 import BM25Index
from scripts import __main__ as sleuth
from scripts.wiring import open_agent

SIDES = ("original", "replay")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The embedded world, and what the seed policy did greedily with some of its dev questions."""
    folder = tmp_path_factory.mktemp("world")
    build_atlas(folder)
    BM25Index.build(Corpus(folder / "corpus.jsonl"), folder / "index", title_boost=3)
    asked = ["--questions", str(folder / "dev.jsonl"), "--limit", "6", "--out", str(folder / "tokens")]
    found = ["--policy", "atlas", "--retriever", str(folder / "index"), "--device", "cpu"]
    assert sleuth.main(["evaluate", *found, *asked, "--keep_tokens"]) == 0
    return folder


def recorded(world, count=5):
    """The first trajectories that searched."""
    trajectories = map(from_record, read_jsonl(world / "tokens" / "trajectories.jsonl"))
    return [t for t in trajectories if t.searches][:count]


def again(world, retriever, how=replay, turn=-1, temperature=0.0, count=5, **options):
    """Each of these from its last search on, or the first."""

    opened = open_agent("atlas", retriever, temperature=temperature, device="cpu")

    async def run():
        async with opened:
            return [
                await how(opened.agent, each, each.searches[turn].turn, **options)
                for each in recorded(world, count)
            ]

    return asyncio.run(run())


@pytest.mark.slow
@pytest.mark.parametrize("turn", [0, -1])
def test_the_same_retriever_repeats_the_greedy_trajectory_token_for_token(world, turn):
    for before, (after,) in zip(recorded(world), again(world, str(world / "index"), turn=turn), strict=True):
        assert after.token_ids == before.token_ids and after.loss_mask == before.loss_mask
        assert [s.kind for s in after.segments] == [s.kind for s in before.segments]
        assert [(s.query, s.hits, s.turn) for s in after.searches] == [
            (s.query, s.hits, s.turn) for s in before.searches
        ]
        ended = ("answer", "stop_reason", "valid_format", "invalid_actions")
        assert all(getattr(after, name) == getattr(before, name) for name in ended)


@pytest.mark.slow
def test_another_retriever_changes_what_follows_the_query_and_nothing_before(world):
    changed = 0
    for before, (after,) in zip(recorded(world, 2), again(world, "none", count=2), strict=True):
        turn = before.searches[-1].turn
        places = [at for at, s in enumerate(before.segments) if s.kind == "policy"]
        kept = places[turn] + 1
        assert after.segments[:kept] == before.segments[:kept]
        asked = next(s for s in after.searches if s.turn == turn)
        assert (asked.query, asked.hits) == (before.searches[-1].query, [])
        changed += after.token_ids != before.token_ids
    assert changed == 2


@pytest.mark.slow
def test_samples_differ_after_the_passages_and_share_all_before(world):
    sampled = again(world, "none", resample, temperature=1.0, count=3, samples=3)
    for before, found in zip(recorded(world, 3), sampled, strict=True):
        places = [at for at, s in enumerate(before.segments) if s.kind == "policy"]
        kept = places[before.searches[-1].turn] + 2
        assert all(each.segments[:kept] == before.segments[:kept] for each in found)
        assert len({each.question.id for each in found}) == 3


def test_both_sides_are_printed_and_written_as_evaluations_with_a_report(world, tmp_path, capsys):
    first = recorded(world)[0]
    argv = ["replay", str(world / "tokens"), "--id", first.question.id, "--out", str(tmp_path / "out")]
    assert sleuth.main([*argv, "--retriever", "none", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert first.question.text in out and "on record" in out and "with none" in out and "nothing" in out
    sides = [from_record(next(read_jsonl(tmp_path / "out" / name / "trajectories.jsonl"))) for name in SIDES]
    assert sides[0].token_ids == first.token_ids and sides[1].searches[0].hits == []
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(name in page for name in SIDES)


@pytest.mark.slow
def test_shares_of_right_answers_are_printed_of_several_samples(world, capsys):
    argv = ["replay", str(world / "tokens"), "--id", recorded(world)[0].question.id, "--samples", "2"]
    assert sleuth.main([*argv, "--retriever", "none", "--device", "cpu"]) == 0
    assert "EM of 2 continuations: on record " in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, said",
    [
        ([], "holds 6 trajectories, name one: "),
        (["--id", "elsewhere"], "id = 'elsewhere'"),
        (["--id", "first", "--turn", "9"], "turn = 9: "),
        (["--id", "first", "--samples", "0"], "samples = 0: must be >= 1"),
        (["--id", "first", "--samples", "2", "--temperature", "0"], "temperature = 0.0: must be > 0"),
        (["--id", "first", "--policy", "/nowhere"], "/nowhere"),
        (["--id", "first", "--retriever", "/nowhere"], "/nowhere"),
        (["--id", "first", "--protocol", "hermes"], "protocol: hermes reads Invalid"),
        (["--id", "first", "--out", __file__], f"{__file__}: is a file, must be a folder"),
        (["--id", "first", "--protocol.tools", "[search, 5]"], "protocol.tools = 5: must be a name"),
    ],
)
def test_wrong_input_is_one_line(world, options, said, capsys):
    options = [recorded(world)[0].question.id if word == "first" else word for word in options]
    retriever = [] if "--retriever" in options else ["--retriever", "none"]
    assert sleuth.main(["replay", str(world / "tokens"), *retriever, "--device", "cpu", *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("sleuth: ") and said in line


@pytest.mark.slow
def test_a_record_without_tokens_says_how_to_keep_them(world, tmp_path, capsys):
    asked = ["--questions", str(world / "dev.jsonl"), "--limit", "1", "--out", str(tmp_path / "compact")]
    found = ["--policy", "atlas", "--retriever", "none", "--device", "cpu"]
    assert sleuth.main(["evaluate", *found, *asked]) == 0
    assert sleuth.main(["replay", str(tmp_path / "compact"), "--retriever", "none"]) == 2
    assert "sleuth evaluate --keep_tokens" in capsys.readouterr().err
