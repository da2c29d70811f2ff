"""EOS-pooled decoders: the token is there whatever the length, and its vector is what is pooled."""

import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaTokenizer

from data.errors import ConfigError, DataError
from retriever_server.encoders.checks import append_eos, check_eos, check_prompts, self_test
from retriever_server.encoders.read_spec import appends_eos, read_spec
from retriever_server.encoders.sentence import SentenceEncoder
from retriever_server.training.builders.dense import decoder
from tests.fakes import byte_tokenizer
from tests.retriever_server.training.decoder_models import tiny_decoder

TEXTS = ["", "a", "a river in the north", "long " * 100]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_decoder(tmp_path_factory.mktemp("base"), "qwen3")


def test_every_text_ends_in_eos_however_long(base):
    tokenizer = decoder(base, max_tokens=24).tokenizer
    rows = tokenizer(TEXTS, truncation=True, max_length=24)["input_ids"]
    assert [len(row) for row in rows] == [1, 2, 20, 24]
    assert all(row[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in row[:-1] for row in rows)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_vector_is_that_of_the_eos_token_alone_and_in_a_batch(base, side):
    model = decoder(base, max_tokens=24, normalise=False)
    model.tokenizer.padding_side = side
    vectors = model.encode(TEXTS, convert_to_tensor=True)
    for text, vector in zip(TEXTS, vectors, strict=True):
        ids = model.tokenizer(text, truncation=True, max_length=23, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            whole = model[0].model(input_ids=torch.tensor([[*ids, model.tokenizer.eos_token_id]]))
        assert torch.allclose(vector, whole.last_hidden_state[0, -1], atol=1e-5)


def test_it_is_saved_and_loads_in_plain_sentence_transformers(base, tmp_path):
    model = decoder(base, max_tokens=24, query_prompt="query: ")
    model.save(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert appends_eos(again) and again.max_seq_length == 24
    check_eos(again)
    assert again.encode_query("q").tolist() == model.encode_query("q").tolist()


def test_texts_stay_out_of_the_chat_template_of_the_base(tmp_path):
    folder = tiny_decoder(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}<yes>{{ m.content }}<no>\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    model = decoder(folder, max_tokens=24, query_prompt="query: ")
    model.save(str(tmp_path / "saved"))
    for each in (model, SentenceTransformer(str(tmp_path / "saved"), device="cpu")):
        [ids] = each.preprocess(["a river"], prompt="query: ")["input_ids"].tolist()
        assert each.tokenizer.decode(ids[:-1]) == "query: a river"


def test_an_eos_that_is_cut_away_is_found_out(base):
    model = decoder(base, max_tokens=24)
    preprocess = model[0].preprocess

    def before_truncation(inputs, **options):
        model.tokenizer.backend_tokenizer.post_processor = TemplateProcessing("$A", special_tokens=[])
        return preprocess([f"{text}<eos>" for text in inputs], **options)

    check_eos(model)
    model[0].preprocess = before_truncation
    with pytest.raises(DataError, match="longer than 24 tokens loses '<eos>' when it is cut"):
        check_eos(model)


def test_an_index_by_place_that_trusts_one_side_of_the_padding_is_found_out(base):
    model = decoder(base, normalise=False)
    pool = model[1]

    def last_column(features):
        return {**features, "sentence_embedding": features["token_embeddings"][:, -1]}

    model[1].forward = last_column
    assert pool is model[1]
    model.tokenizer.padding_side = "right"
    with pytest.raises(DataError, match="query vectors depend on the batch they are encoded in"):
        self_test(SentenceEncoder(model, read_spec("a model", model)))


def test_tokenizers_that_make_their_post_processor_anew_keep_it(tmp_path):
    letters = {
        piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyz"])
    }
    tokenizer = LlamaTokenizer(vocab=letters, merges=[], add_bos_token=True, add_eos_token=False)
    append_eos(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    again = LlamaTokenizer.from_pretrained(tmp_path)
    assert again("ab")["input_ids"] == tokenizer("ab")["input_ids"]
    assert again("ab" * 9, truncation=True, max_length=5)["input_ids"][-1] == again.eos_token_id


def test_another_token_and_none_at_all():
    tokenizer = byte_tokenizer("<|end|>")
    append_eos(tokenizer, "<|end|>")
    append_eos(tokenizer, "<|end|>")  # once is enough
    assert tokenizer("a", "b")["input_ids"].count(tokenizer.convert_tokens_to_ids("<|end|>")) == 2
    assert tokenizer.decode(tokenizer("a")["input_ids"]) == "a<|end|>"
    with pytest.raises(ConfigError, match="eos '<absent>': is no token of the tokenizer"):
        append_eos(tokenizer, "<absent>")


def test_a_prompt_that_melts_into_the_text_is_not_left_out_of_the_pooling(tmp_path):
    folder = tmp_path / "base"
    tiny_decoder(folder)
    byte_tokenizer(merges=("Ġ r",)).save_pretrained(folder)  # " river" begins with one token " r"
    model = decoder(str(folder), "mean", query_prompt="find:\n", pool_prompt=False)
    ids = model.tokenizer("river")["input_ids"]
    with torch.inference_mode():
        features = model[0](model.preprocess(["river"], prompt="find:\n"))
        pooled = features["token_embeddings"][0, -len(ids) :].mean(0)
    assert torch.allclose(
        torch.nn.functional.normalize(pooled, dim=0),
        model.encode_query("river", convert_to_tensor=True), atol=1e-6,
    )  # fmt: skip
    check_prompts(model)
    with pytest.raises(DataError, match="joins its end with the text"):
        decoder(str(folder), "mean", query_prompt="find: ", pool_prompt=False)
