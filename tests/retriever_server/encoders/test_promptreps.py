"""PromptReps: the values of its README, both representations of one forward pass, the way into indexes."""

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer, SparseEncoder
from transformers import AutoModelForCausalLM

from data.corpus import Corpus
from data.errors import DataError
from retriever_server.encoders.loading import load_encoder
from retriever_server.encoders.promptreps import token_weights
from retriever_server.indexes.analyzers import stopwords
from retriever_server.indexes.base import open_index
from retriever_server.open_retriever import open_retriever
from retriever_server.training.builders.promptreps import promptreps
from scripts.__main__ import main
from tests.fakes import byte_tokenizer
from tests.retriever_server.training.decoder_models import tiny_decoder

FOX = "The quick brown fox jumps over the lazy dog."
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_decoder(tmp_path_factory.mktemp("base"), "qwen3")


def naive(text, tokenizer, logits, top_k=128):
    """The logic of the README: the best tokens of the text's words, and 100 x log(1 + relu), rounded."""
    ids = sorted(
        {i for word in stopwords(text) for i in tokenizer(word, add_special_tokens=False)["input_ids"]}
    )
    logits = torch.log(1 + torch.relu(logits))
    if not ids:
        values, found = logits.topk(10)
    else:
        values, at = logits[ids].topk(min(top_k, len(ids)))
        found = torch.tensor(ids)[at]
    vector = np.zeros(len(logits), np.float32)
    vector[found.numpy()] = np.rint(values.numpy() * 100)
    return vector


def test_the_values_are_those_of_the_readme():
    said = {
        "fox": 21.62,
        "dog": 15.38,
        "brown": 14.75,
        "j": 14.38,
        "quick": 13.19,
        "lazy": 12.06,
        "umps": 3.23,
    }
    logits = torch.tensor([[*said.values(), 30.0, -5.0]])
    weights = token_weights(logits, torch.arange(7)[None])
    expected = {"fox": 312, "dog": 280, "brown": 276, "j": 273, "quick": 265, "lazy": 257, "umps": 144}
    assert dict(zip(said, weights[0].tolist(), strict=False)) == expected
    assert weights[0, 7:].tolist() == [0, 0]  # "30" is not in the text
    assert token_weights(logits, torch.arange(7)[None], top_tokens=2)[0].count_nonzero() == 2


@pytest.mark.parametrize("chat", [False, True])
def test_both_representations_are_those_of_one_plain_forward_pass(base, tmp_path, chat):
    if chat:
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = CHAT
        folder = tmp_path / "chat"
        AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        base = str(folder)
    model = promptreps(base, "sparse", max_tokens=400)
    template = model.prompts["document"]
    assert template.count("{text}") == 1 and template.endswith('The word is "')
    assert ("</s><assistant>The word" in template) == chat
    assert "Query: " in model.prompts["query"] and "the query in" in model.prompts["query"]
    texts = [FOX, "a river", "the of"]
    features = model[0](model.preprocess(texts, prompt=template))
    language_model = AutoModelForCausalLM.from_pretrained(base)
    for i, text in enumerate(texts):
        ids = model.tokenizer(template.replace("{text}", text), return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            out = language_model(ids, output_hidden_states=True)
        expected = naive(text, model.tokenizer, out.logits[0, -1])
        np.testing.assert_allclose(features["sparse_embedding"][i].detach(), expected, atol=1)  # of rounding
        np.testing.assert_allclose(
            features["dense_embedding"][i].detach(), out.hidden_states[-1][0, -1], atol=1e-4
        )
    assert features["sparse_embedding"][2].count_nonzero() <= 10  # a text without words of its own
    assert torch.equal(features["sentence_embedding"], features["sparse_embedding"])


def test_a_long_text_is_cut_and_the_prompt_after_it_is_not(base):
    model = promptreps(base, max_tokens=300)
    ids = model.preprocess(["river " * 200], prompt=model.prompts["document"])["input_ids"]
    assert ids.shape[1] <= 300
    assert model.tokenizer.decode(ids[0]).endswith('The word is "')
    with pytest.raises(ValueError, match=r"prompt 'no place': must hold \{text\}"):
        model.preprocess(["a"], prompt="no place")


@pytest.mark.slow
def test_it_serves_as_dense_as_sparse_and_as_both(base, tmp_path, world_corpus):
    command = ["promptreps", "--base", base, "--out", str(tmp_path / "out"), "--max_tokens", "400"]
    assert main(command) == 0
    assert main(command) == 2  # is there
    folders = {kind: str(tmp_path / "out" / kind) for kind in ("dense", "sparse")}
    for kind in folders:
        out = str(tmp_path / f"{kind}-index")
        assert main(["index", "--corpus", str(world_corpus), "--encoder", folders[kind], "--out", out]) == 0
        index = open_index(out)
        assert index.describe()["kind"] == {"dense": "flat", "sparse": "inverted"}[kind]
        assert f"PromptReps({kind}" in index.describe()["spec"]["pooling"]
        first = Corpus(world_corpus)[0]
        assert index.search([first.text], 3)
    hybrid = tmp_path / "hybrid.yaml"
    hybrid.write_text(
        "class_path: Fuse\ninit_args:\n  method: convex\n  normalize: min-max\n"
        f"  parts: [{tmp_path}/dense-index, {tmp_path}/sparse-index]\n"
    )
    hits = open_retriever(str(hybrid)).search(["river"], 3)[0]
    assert len(hits) == 3 and hits[0].score <= 2
    for kind, of in (("dense", SentenceTransformer), ("sparse", SparseEncoder)):
        with pytest.raises(ValueError, match="trust_remote_code"):  # the class is ours
            of(folders[kind], device="cpu")
        model = of(folders[kind], device="cpu", trust_remote_code=True)
        vector = load_encoder(folders[kind]).encode(["river"], "passage")
        theirs = model.encode_document("river")
        theirs = theirs.to_dense().numpy() if kind == "sparse" else theirs / np.linalg.norm(theirs)
        ours = vector.toarray()[0] if kind == "sparse" else vector[0]
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.slow
def test_another_template_is_another_encoder(base, tmp_path):
    promptreps(base, max_tokens=400).save(str(tmp_path))
    one, other = load_encoder(str(tmp_path)), load_encoder(str(tmp_path), passage_prompt="{text} means:")
    assert one.spec.hash != other.spec.hash
    assert not np.allclose(one.encode(["a"], "passage"), other.encode(["a"], "passage"))
    with pytest.raises((DataError, ValueError), match="must hold"):
        load_encoder(str(tmp_path), passage_prompt="passage: ")


@pytest.fixture(scope="module")
def world_corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    rows = [
        f'{{"id": "{i}", "contents": "{text}"}}'
        for i, text in enumerate([FOX, "a river", "red sea", "old city"])
    ]
    path.write_text("\n".join(rows) + "\n")
    return path
