"""Judges: against a plain forward pass, a table by hand, and scikit-learn."""

import math

import pytest
import torch

from data.errors import DataError
from data.records import Passage, Question
from retriever_server.indexes.base import open_index
from retriever_server.indexes.bm25 import BM25Index
from retriever_server.retriever import Scorer
from retriever_server.training.builders.tiny import tiny_base
from retriever_server.training.synthesis.config import LabelRules
from retriever_server.training.synthesis.drafts import Draft
from retriever_server.training.synthesis.judges import (
    AnswerGain,
    Oracle,
    QueryLikelihood,
    Relevance,
    believed,
    fuse,
    measure,
    parse_score,
    warnings_of,
)  # fmt: skip
from retriever_server.training.synthesis.results import label
from tests.retriever_server.training.synthesis.rivers import NAMES, rivers

PAIRS = [
    ("how long is the amadro", Passage("1", "The river amadro is 90 miles long.", "amadro")),
    ("a", Passage("2", "Short.")),
    ("where does the niger rise, and how high is its source", Passage("3", "The niger rises " * 12)),
]


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("causal")
    rivers(folder)
    config = {"model_type": "llama", "num_key_value_heads": 2, "max_position_embeddings": 1024}
    return tiny_base(config, str(folder / "corpus.jsonl"), 300, folder=folder / "model")


def plain_logprobs(judge, context, span):
    """Log-probabilities of the span's tokens by one forward over everything, no cache."""
    lm = judge._lm
    before, after = lm.tokens(judge.prefix) + lm.tokens(context), lm.tokens(span)
    with torch.inference_mode():
        logits = lm.model(torch.tensor([before + after])).logits[0].float().log_softmax(-1)
    return [logits[len(before) + i - 1, token].item() for i, token in enumerate(after)]


def test_the_likelihood_of_a_query_is_that_of_a_plain_forward(causal):
    judge = QueryLikelihood(causal, batch_size=2)
    expected = []
    for query, passage in PAIRS:
        text = f"{passage.title} {passage.text}".strip()
        values = plain_logprobs(judge, f"{text}\nQuery:", f" {query}")
        expected.append(sum(values) / len(values))
    assert judge.score(PAIRS) == pytest.approx(expected, abs=1e-4)
    assert judge.score(PAIRS[::-1]) == pytest.approx(
        expected[::-1], abs=1e-4
    )  # twice: the cache is as it was


def test_relevance_is_yes_minus_no_of_a_plain_forward(causal):
    judge = Relevance(causal, batch_size=3)
    expected = []
    for query, passage in PAIRS:
        context = f"{query}\nPassage: {' '.join(f'{passage.title} {passage.text}'.split())}\nAnswer:"
        yes, no = (plain_logprobs(judge, context, word) for word in (" Yes", " No"))
        expected.append(next(a - b for a, b in zip(yes, no, strict=False) if a != b))
    assert judge.score(PAIRS) == pytest.approx(expected, abs=1e-4)


def test_the_gain_of_an_answer_is_the_difference_of_two_likelihoods(causal):
    judge = AnswerGain(causal)
    asked, told = "Question: how long?\nAnswer:", "Passage: It is 90 miles.\nQuestion: how long?\nAnswer:"
    means = [sum(values) / len(values) for values in (plain_logprobs(judge, c, " 90") for c in (told, asked))]
    [gain] = judge.gains([("how long?", Passage("1", "It is 90 miles."), "90")])
    assert gain == pytest.approx(means[0] - means[1], abs=1e-4)


def test_long_passages_are_cut_before_the_query(causal):
    judge = QueryLikelihood(causal, max_length=20)
    whole = Passage("1", "The river amadro is long. " * 50)
    assert len(judge._lm.tokens(judge._shown(whole))) <= 21 and math.isfinite(
        judge.score([("how long", whole)])[0]
    )


@pytest.mark.parametrize(
    "reply, value",
    [('{"score": 70}', 70), ("<think>10?</think> 85", 85), ("Score: 12.5", 12.5), ('{"score": 170}', None),
     ("no idea", None), ("score: 3 or score: 7", None), ("", None), ('{"score": "high"}', None), ("-", None)],
)  # fmt: skip
def test_a_score_is_read_or_is_none(reply, value):
    found = parse_score(reply)
    assert math.isnan(found) if value is None else found == value


def test_reciprocal_rank_fusion_by_hand():
    fused = fuse([{"a": 9.0, "b": 5.0, "c": 5.0}, {"a": 0.1, "b": 0.9, "c": 0.2}])
    assert fused == pytest.approx({"a": 1 / 61 + 1 / 63, "b": 1 / 62 + 1 / 61, "c": 1 / 62 + 1 / 62})
    assert fuse([]) == {}


class Noisy(Scorer):
    """The truth plus a fixed noise."""

    name = "noisy"

    def __init__(self, size):
        self.size, self.seen = size, []

    def score(self, pairs):
        noise = torch.Generator().manual_seed(len(self.seen))
        values = [(p.id in query) + self.size * torch.randn(1, generator=noise).item() for query, p in pairs]
        self.seen.append(([float(p.id in query) for query, p in pairs], values))
        return values


def test_the_measure_of_a_judge_agrees_with_scikit_learn(tmp_path):
    from sklearn.metrics import roc_auc_score

    corpus = rivers(tmp_path)
    BM25Index.build(corpus, tmp_path / "bm25")
    kinds = ["easy", "hard"]
    questions = [
        Question(n, f"how long is {n} river", (), {"kind": kinds[i % 2]}) for i, n in enumerate(NAMES)
    ]
    qrels = {name: {name: 1} for name in NAMES[:-1]}  # the last is not judged
    judge, oracle = Noisy(0.7), Oracle(truth={q.text: [q.id] for q in questions})
    found = measure([judge, oracle], questions, qrels, open_index(tmp_path / "bm25"), corpus, distractors=5)
    aucs = [roc_auc_score(*each) for each in judge.seen]
    firsts = [values[0] == max(values) for _, values in judge.seen]
    assert found["noisy"]["all"]["queries"] == len(NAMES) - 1
    assert found["noisy"]["all"]["auc"] == pytest.approx(sum(aucs) / len(aucs), abs=1e-4)
    assert found["noisy"]["hard"]["auc"] == pytest.approx(sum(aucs[1::2]) / len(aucs[1::2]), abs=1e-4)
    assert found["noisy"]["all"]["gold@1"] == pytest.approx(sum(firsts) / len(firsts), abs=1e-4)
    assert found["oracle"]["all"] == {"queries": len(NAMES) - 1, "gold@1": 1.0, "auc": 1.0}
    for elsewhere in ({}, {name: {f"other {name}": 1} for name in NAMES}):
        with pytest.raises(DataError, match=r"no question has a relevant passage in .*corpus\.jsonl"):
            measure([judge], questions, elsewhere, open_index(tmp_path / "bm25"), corpus)


def test_a_judge_below_the_least_auc_is_left_out_and_its_figure_is_said(tmp_path):
    measured = {"noisy": {"all": {"auc": 0.8}, "hard": {"auc": 0.548}}}
    assert believed(measured, "noisy", "easy", 0.7) and not believed(measured, "noisy", "hard", 0.7)
    assert not believed(measured, "noisy", "easy", 0.9)
    lines = warnings_of(measured, [Noisy(1)], 0.7)
    assert lines == [
        "judge noisy: AUC 0.548 on queries of kind hard, below 0.7: left out of the fusion there"
    ]
    assert "was never measured" in warnings_of({}, [Noisy(1)], 0.7)[0]


def test_labels_of_a_draft_by_hand(tmp_path):
    corpus = rivers(tmp_path)
    a, b, c, d = NAMES[:4]
    hits = ((b, 9.0), (c, 8.0), (d, 7.0))
    scores = {"good": {a: 0.1, b: 0.9, c: 0.5, d: 0.3}, "partial": {a: 1.0}}
    given = Draft("x", a, {"query": "q"}, hits=hits, scores=scores)
    best = label(given, LabelRules("best", "far"), ["good", "partial"], corpus, 0)
    assert (best.positive, best.negatives, best.labels) == (b, (d,), {b: 0.9, d: 0.3})
    seed = label(given, LabelRules("seed", "far"), ["good"], corpus, 0)
    assert (seed.positive, seed.negatives) == (a, (d,))
    unjudged = label(given, LabelRules("best", "far", 2), [], corpus, 0)
    assert (unjudged.positive, unjudged.negatives, unjudged.labels) == (a, (d, c), {})
    ranks = label(given, LabelRules("seed", "ranks", 5, first_rank=2), [], corpus, 0)
    assert ranks.negatives == (c, d)
    drawn = label(given, LabelRules("seed", "sampled", 2), [], corpus, 0)
    assert set(drawn.negatives) < {b, c, d} and len(drawn.negatives) == 2
