"""Rerank: depth, ties, generations; its two scorers against the models they wrap."""

from typing import Any

import pytest
import torch

from data.errors import ConfigError
from data.records import Passage
from retriever_server.retrievers.cache import Cached
from retriever_server.retrievers.rerank import CrossEncoder, Rerank, Scorer, YesNo
from tests.fakes import byte_tokenizer, tiny_model
from tests.retriever_server import tiny_encoders as encoders
from tests.retriever_server.retrievers.test_compose import A, Fixed


class ByLetter(Scorer):
    """Later letters are better."""

    name = "letters"

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def score(self, pairs):
        self.asked += [(query, passage.id) for query, passage in pairs]
        return [float(ord(passage.id)) for _, passage in pairs]


def test_the_first_hits_are_ordered_by_the_scorer():
    scorer, inner = ByLetter(), Fixed("g", A)
    rerank = Rerank(inner, scorer, depth=2)
    rankings = rerank.search(["p", "q"], 1, {"y": 1})
    assert [[hit.passage.id for hit in ranking] for ranking in rankings] == [["y"], ["y"]]
    assert rankings[0][0].score == ord("y") and rankings[0][0].generation == rerank.generation
    assert rerank.generation == "rerank(g, letters, 2)"
    assert inner.asked == [(["p", "q"], 2, {"y": 1})]
    assert scorer.asked == [("p", "x"), ("p", "y"), ("q", "x"), ("q", "y")]
    assert len(rerank.search(["p"], 3)[0]) == 3  # k wins over the depth
    assert Rerank(Fixed("none", {}), scorer).search(["p"], 3) == [[]]
    with pytest.raises(ConfigError, match="depth = 0: must be >= 1"):
        Rerank(inner, scorer, depth=0)


def test_any_passage_is_scored_by_the_scorer():
    rerank = Rerank(Fixed("g", A), ByLetter(), depth=1)
    passages = [Passage("z", ""), Passage("b", "")]
    assert rerank.score(["p", "q"], [passages, []]) == [{"z": float(ord("z")), "b": float(ord("b"))}, {}]
    assert rerank.score(["p"], [[]]) == [{}]


def test_a_cache_over_a_reranker_remembers():
    scorer = ByLetter()
    cached = Cached(Rerank(Fixed("g", A), scorer))
    assert cached.search(["q"], 2) == cached.search(["q"], 2)
    assert len(scorer.asked) == 3


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    tiny_model("qwen2", len(tokenizer)).save_pretrained(folder)
    return folder


def test_yes_minus_no_is_the_same_in_a_batch_and_alone_and_that_of_the_model(language_model):
    scorer = YesNo(str(language_model), max_length=200, batch_size=2)
    passages = [Passage("1", "short"), Passage("2", "a longer text " * 5), Passage("3", "tail " * 100)]
    pairs = [("query", passage) for passage in passages]
    together = scorer.score(pairs)
    assert together == pytest.approx([scorer.score([pair])[0] for pair in pairs], abs=1e-4)
    text = "Query: query\nPassage: short\nIs the passage relevant to the query? Answer yes or no."
    ids = scorer._tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        logits = scorer._lm.model(ids).logits[0, -1].float()
    yes, no = (scorer._tokenizer(word)["input_ids"][0] for word in ("yes", "no"))
    assert together[0] == pytest.approx(float(logits[yes] - logits[no]), abs=1e-4)
    assert len(scorer._prompt(*pairs[2])) == 200  # the passage is cut, what follows it is not
    assert scorer._tokenizer.decode(scorer._prompt(*pairs[2])).endswith("Answer yes or no.")


def test_wrong_prompts_answers_and_models_are_refused(language_model):
    with pytest.raises(ConfigError, match=r"prompt: must hold \{query\} and, after it, \{passage\}"):
        YesNo(str(language_model), prompt="{passage} {query}")
    with pytest.raises(ConfigError, match="begin with the same token"):
        YesNo(str(language_model), yes="yes", no="yesterday")
    with pytest.raises(ConfigError, match=r"model = '.*/absent': no folder, no short name"):
        YesNo(str(language_model / "absent"))
    with pytest.raises(ConfigError, match="a language model without the tokens yes and no"):
        CrossEncoder("atlas", device="cpu")


def test_a_cross_encoder_scores_as_sentence_transformers_does(tmp_path):
    from sentence_transformers import CrossEncoder as Model
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = byte_tokenizer("[SEP]")
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings: Any = {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id, **sizes}
    config = BertConfig(vocab_size=len(tokenizer), **settings)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    passages = [Passage("1", "a river", "Loire"), Passage("2", "a longer text " * 3)]
    scores = CrossEncoder(str(tmp_path), max_length=64, device="cpu").score([("q", p) for p in passages])
    model = Model(str(tmp_path), max_length=64, device="cpu")
    assert scores == pytest.approx(model.predict([("q", p.contents) for p in passages]).tolist())
    assert scores[0] != scores[1]


def test_of_a_passage_of_megabytes_only_the_beginning_is_read(language_model, tmp_path, monkeypatch):
    scorers = [
        YesNo(str(language_model), max_length=200),
        CrossEncoder(encoders.tiny_model(tmp_path / "c", "cross")),
    ]
    for scorer in scorers:
        read, tokenise = (
            [],
            type(scorer._tokenizer if scorer is scorers[0] else scorer._model.tokenizer)._encode_plus,
        )

        def counted(self, text, *args, read=read, tokenise=tokenise, **options):
            read.append(len(str(text)))
            return tokenise(self, text, *args, **options)

        pairs = [("fox", Passage("1", "big red fox " * times)) for times in (400_000, 5000)]
        with monkeypatch.context() as patch:
            patch.setattr(
                type(getattr(scorer, "_tokenizer", None) or scorer._model.tokenizer), "_encode_plus", counted
            )
            long, short = scorer.score(pairs)
        assert long == pytest.approx(short) and 0 < max(read) < 100_000
