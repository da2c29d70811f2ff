"""A language model as a reranker: what is trained is what serves, in every program that loads it."""

import pytest
import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder import losses

from data.errors import ConfigError
from data.records import Passage
from retriever_server.retrievers import rerank
from retriever_server.training.builders.cross_encoder import yes_no_reranker
from tests.fakes import byte_tokenizer, tiny_model
from tests.retriever_server.training.decoder_models import tiny_decoder

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PAIRS = [("river?", "a river"), ('a "quoted" {query}\n', "old\n\ncity: {passage}"), ("long", "tail " * 100)]


@pytest.fixture(scope="module", params=["plain", "chat"])
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    if request.param == "plain":
        return tiny_decoder(folder, "qwen3")
    tokenizer = byte_tokenizer("yes", "no", merges=("Ġ a",))
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    tiny_model("qwen3", len(tokenizer)).save_pretrained(folder)
    return str(folder)


def scores(model, pairs=PAIRS):
    return model.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False).tolist()


def test_the_served_scores_are_those_trained_in_all_three_programs(base, tmp_path):
    model = yes_no_reranker(base, max_tokens=200)
    expected = scores(model)
    assert len(set(expected)) == 3
    model.save(str(tmp_path))
    assert scores(CrossEncoder(str(tmp_path), device="cpu")) == pytest.approx(expected, abs=1e-4)
    pairs = [(query, Passage("1", text)) for query, text in PAIRS]
    of_ours = rerank.YesNo(str(tmp_path), max_length=200).score(pairs)
    assert of_ours == pytest.approx(expected, abs=1e-4)
    assert of_ours == pytest.approx(rerank.YesNo(base, max_length=200).score(pairs), abs=1e-4)  # untrained
    sigmoid = rerank.CrossEncoder(str(tmp_path), device="cpu").score(pairs)
    assert sigmoid == pytest.approx(torch.tensor(expected).sigmoid().tolist(), abs=1e-4)


def test_the_text_read_is_the_prompt_and_only_the_passage_is_cut(base):
    model = yes_no_reranker(base, max_tokens=200)
    rows = model.preprocess(PAIRS)
    texts = [
        model.tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(rows["input_ids"], rows["attention_mask"], strict=True)
    ]
    asked = "Is the passage relevant to the query? Answer yes or no."
    for (query, text), read in zip(PAIRS[:2], texts, strict=False):
        assert f"Query: {query}\nPassage: {text}\n{asked}" in read
    assert asked in texts[2] and "Query: long\nPassage: tail tail" in texts[2]
    assert int(rows["attention_mask"][2].sum()) == 200


def test_lists_train_it(base):
    model = yes_no_reranker(base, max_tokens=120)
    loss = losses.ListNetLoss(model)
    queries, docs = ["red", "blue"], [["a red fox", "a blue sea"], ["blue city", "red city", "old"]]
    labels = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    values = []
    for _ in range(8):
        optimizer.zero_grad()
        values.append(loss([queries, docs], labels))
        values[-1].backward()
        optimizer.step()
    assert values[-1].item() < values[0].item() - 0.05


def test_wrong_prompts_and_answers_are_refused(base):
    with pytest.raises(ConfigError, match=r"prompt: must hold \{query\} and, after it, \{passage\}"):
        yes_no_reranker(base, prompt="{passage} {query}")
    with pytest.raises(ConfigError, match="begin with the same token"):
        yes_no_reranker(base, yes="qed", no="q")
