"""Scores of searches: forks of a scripted agent with exact expectations, likelihoods, a judge, the file."""

import asyncio
import json
from dataclasses import replace

import pytest
import torch

from agent.engines.base import Sampling
from agent.protocol import COMPACT
from agent.rollout import Agent
from agent.transcripts import to_record
from data.errors import DataError, SleuthError
from data.jsonl import read_jsonl, write_jsonl
from data.records import Hit, Passage, Question
from retriever_server.client.chat import ChatClient
from rl.co_training.examples import LabelConfig, mine_trajectories
from rl.co_training.forks import Forks, answer_logprobs, arranged, take_up
from rl.co_training.judges import LanguageModelJudge
from rl.co_training.scores import Candidates, Scored, score_file
from rl.co_training.searches import read_searches
from tests.fakes import byte_tokenizer, tiny_model
from tests.retriever_server.answering import answering
from tests.scripted import ScriptedEngine

PASSAGES = {"a": "nothing here", "b": "The town is Dijon.", "c": "the red cow", "d": "no town"}
QUESTION = Question("q1", "Which town?", ("Dijon",), {"supporting_ids": ["b"]})
PROTOCOL = replace(COMPACT, top_k=2)


class Ranked:
    """Finds the same passages for every query, the first k."""

    def __init__(self, order="abcd"):
        self.order, self.asked = order, []

    async def search(self, query, k):
        self.asked.append((query, k))
        return [Hit(Passage(id_, PASSAGES[id_], id_), 1.0, "g") for id_ in self.order[:k]]


def reader(text):
    """Searches once; answers Dijon where an observation says it, else Lyon."""
    seen = text[text.index("Which town?") :]
    if "<information>" not in seen:
        return "<think> so </think><search> town</search>"
    return f"<think> so </think><answer> {'Dijon' if 'Dijon' in seen else 'Lyon'}</answer>"


def agent_with(searcher, script=reader):
    tokenizer = byte_tokenizer()
    return Agent(ScriptedEngine(tokenizer, script), tokenizer, searcher, PROTOCOL, Sampling(temperature=1.0))


def rolled_out(tmp_path, order="abcd", question=QUESTION, script=reader):
    """The agent's trajectory in a file, in the compact form; with the agent."""
    agent = agent_with(Ranked(order), script)
    trajectories = asyncio.run(agent.rollout([question]))
    write_jsonl(tmp_path / "t.jsonl", [to_record(t, tokens=False) for t in trajectories])
    return agent, trajectories


def candidates(tmp_path):
    [searches] = read_searches(tmp_path / "t.jsonl")
    hits = [Hit(Passage(id_, text, id_), 0.0, "") for id_, text in PASSAGES.items()]
    return Candidates(searches, 0, tuple(hits))


def test_a_trajectory_is_taken_up_again_token_for_token(tmp_path):
    agent, [whole] = rolled_out(tmp_path)
    [searches] = read_searches(tmp_path / "t.jsonl")
    hits = whole.searches[0].hits
    ledger = take_up(agent, searches.segments, [], "town", 0, hits)
    assert ledger is not None
    assert ledger.token_ids == [token for s in whole.segments[:-1] for token in s.token_ids]
    [again] = asyncio.run(agent.rollout([QUESTION], ledgers=[ledger]))
    assert again.token_ids == whole.token_ids and len(again.searches) == 1
    with pytest.raises(DataError, match="a trajectory of 2 turns has no turn 7"):
        take_up(agent, searches.segments, [], "town", 7, hits)


def test_an_observation_stays_filled_up_as_usual(tmp_path):
    rolled_out(tmp_path)
    search = candidates(tmp_path)  # it showed a and b
    assert [arranged(search, id_, True) for id_ in "abcd"] == [("a", "b"), ("a", "b"), ("a", "c"), ("a", "d")]
    assert [arranged(search, id_, False) for id_ in "abcd"] == [
        ("b", "c"),
        ("a", "c"),
        ("a", "b"),
        ("a", "b"),
    ]


def test_a_fork_is_worth_what_the_passage_changes(tmp_path):
    agent, _ = rolled_out(tmp_path)
    [scored] = asyncio.run(Forks(agent, continuations=2).fork([candidates(tmp_path)]))
    assert scored.scores == {"a": 0.0, "b": 1.0, "c": -1.0, "d": -1.0}  # c and d take the place of b
    turns = 2 * len([("a", "b"), ("b", "c"), ("a", "c"), ("a", "d")])
    assert len(agent.engine.prompts) == 2 + turns and scored.tokens > 0  # type: ignore[attr-defined]


def test_alone_shows_one_passage(tmp_path):
    agent, _ = rolled_out(tmp_path)
    [scored] = asyncio.run(Forks(agent).alone([candidates(tmp_path)]))
    assert scored.scores == {"a": 0.0, "b": 1.0, "c": 0.0, "d": 0.0}


def test_only_the_first_candidates_and_some_drawn_are_tried(tmp_path):
    agent, _ = rolled_out(tmp_path)
    [scored] = asyncio.run(Forks(agent, top=1, drawn=1).fork([candidates(tmp_path)]))
    [again] = asyncio.run(Forks(agent, top=1, drawn=1).fork([candidates(tmp_path)]))
    assert len(scored.scores) == 2 and "a" in scored.scores and scored == again


def test_the_likelihood_is_that_of_the_answers_tokens_alone(tmp_path):
    model = tiny_model("qwen2", 300).eval()
    rows = [([1, 2, 3, 4], [5, 6]), ([7, 8], [9])]
    expected = []
    for context, answer in rows:
        ids = torch.tensor([context + answer])
        logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
        expected.append(sum(float(logprobs[len(context) + n - 1, token]) for n, token in enumerate(answer)))
    assert answer_logprobs(model, rows) == pytest.approx(expected, abs=1e-4)


def test_the_likelihood_compares_with_and_without_the_passage(tmp_path):
    agent, _ = rolled_out(tmp_path)
    model = tiny_model("qwen2", len(agent.tokenizer)).eval()
    [scored] = asyncio.run(Forks(agent, model).likelihood([candidates(tmp_path)]))
    assert set(scored.scores) == set("abcd") and scored.scores["c"] != scored.scores["b"]
    assert scored.scores["b"] == pytest.approx(-scored.scores["c"])  # each stands where the other would


def scored_file(tmp_path, scorers, mixed=False):
    files = tmp_path / "t.jsonl", tmp_path / "scores.jsonl"
    return asyncio.run(score_file(*files, scorers, Ranked(), 4, mixed=mixed))


def test_scores_lie_in_a_file_that_is_not_made_twice_and_label_the_searches(tmp_path):
    agent, _ = rolled_out(tmp_path)
    forks = Forks(agent, continuations=1)
    costs = scored_file(tmp_path, {"fork": forks.fork, "alone": forks.alone})
    assert costs["searches"] == 1 and costs["fork tokens"] > costs["alone tokens"] > 0
    before = (tmp_path / "scores.jsonl").read_bytes()
    assert scored_file(tmp_path, {}) == costs and (tmp_path / "scores.jsonl").read_bytes() == before
    scores = tmp_path / "scores.jsonl"
    mine_trajectories(tmp_path / "t.jsonl", tmp_path / "e.jsonl", LabelConfig("fork"), scores=scores)
    [row] = read_jsonl(tmp_path / "e.jsonl")
    assert row["positives"] == ["b"] and set(row["negatives"]) == {"a", "c", "d"}


def test_a_part_that_was_begun_is_scored_again_as_a_whole_and_another_scorer_is_refused(tmp_path):
    _, [whole] = rolled_out(tmp_path)
    record = to_record(whole, tokens=False)
    write_jsonl(tmp_path / "t.jsonl", [record | {"id": f"q{i}"} for i in range(20)])
    sizes = []

    async def size(batch):
        sizes.append(len(batch))
        return [Scored({"a": float(len(batch))}, 1) for _ in batch]

    scored_file(tmp_path, {"size": size})
    lines = (tmp_path / "scores.jsonl").read_text().splitlines()
    (tmp_path / "scores.jsonl").write_text("\n".join([*lines[:17], lines[17][:9]]))
    scored_file(tmp_path, {"size": size})
    again = (tmp_path / "scores.jsonl").read_text().splitlines()
    assert sizes == [16, 4, 4] and again[:17] == lines[:17] and len(again) == 20
    with pytest.raises(DataError, match=r"scores.jsonl: holds scores without fork; choose another file"):
        scored_file(tmp_path, {"size": size, "fork": size})
    write_jsonl(tmp_path / "t.jsonl", [record | {"id": "other"}])
    with pytest.raises(DataError, match="the scores are of another file"):
        scored_file(tmp_path, {"size": size})


def test_the_candidates_drawn_do_not_depend_on_where_the_file_lies(tmp_path):
    agent, _ = rolled_out(tmp_path)
    forks, here = Forks(agent, top=0, drawn=1), candidates(tmp_path)
    places = {
        tuple(forks._tried(replace(here, searches=replace(here.searches, place=p)))) for p in "abcdefgh"
    }
    assert len(places) == 1


def test_only_groups_that_do_not_agree_are_forked_if_so_asked(tmp_path):
    agent, [whole] = rolled_out(tmp_path)
    record = to_record(whole, tokens=False)
    other = record | {"id": "q1~2", "metadata": {"sample_of": "q1"}}
    alone = {"fork": Forks(agent, continuations=1).fork}
    for answer, found in (("Dijon", 0), ("Lyon", 2)):
        write_jsonl(tmp_path / "t.jsonl", [record, other | {"answer": answer}])
        (tmp_path / "scores.jsonl").unlink(missing_ok=True)
        assert scored_file(tmp_path, alone, mixed=True)["searches"] == found
        assert (
            tmp_path / "scores.jsonl"
        ).exists()  # for `sleuth mine`, which then says that nothing is there


def reply(body):
    prompt = body["messages"][0]["content"]
    if "Grade each" in prompt:
        case = json.loads(prompt.split("\n\n")[1])
        said = str([90 if "Dijon" in text else 5 for text in case["passages"]])
        said = "no list" if "no list" in case["queries"][-1] else f"<think>[1]</think>{said}"
    else:
        said = "USELESS" if "opened a page" in prompt else "Dijon"
    return 200, {"choices": [{"message": {"content": said}}], "usage": {"total_tokens": 7}}


@pytest.mark.parametrize(("query", "grades"), [("town", [5.0, 90.0, 5.0, 5.0]), ("no list", [])])
def test_a_judge_grades_candidates_and_what_it_does_not_grade_has_no_score(query, grades, tmp_path):
    script = [f"<think> so </think><search> {query}</search>", "<think> so </think><answer> Dijon</answer>"]
    rolled_out(tmp_path, script=script)
    with answering(v1__chat__completions=reply) as server:
        chat = ChatClient(f"{server.url}/v1", cache=tmp_path / "cache.jsonl")
        [scored] = asyncio.run(LanguageModelJudge(chat, "m").judge([candidates(tmp_path)]))
        assert list(scored.scores.values()) == grades and scored.tokens == 14
        asked = len(server.seen)
        asyncio.run(LanguageModelJudge(chat, "m").judge([candidates(tmp_path)]))
        assert len(server.seen) == asked  # replies are kept
    with pytest.raises(SleuthError, match="chat http"):
        asyncio.run(LanguageModelJudge(ChatClient(server.url), "m").judge([candidates(tmp_path)]))
