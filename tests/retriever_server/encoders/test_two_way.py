"""Two-way attention in decoders: it is, it stays so when saved, and each way of losing it is found out."""

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import masking_utils
from transformers.models.llama import modeling_llama

from data.errors import DataError
from retriever_server.encoders.checks import check_two_way, make_two_way, self_test
from retriever_server.encoders.read_spec import describe_first, is_two_way, outer_transformers, read_spec
from retriever_server.encoders.sentence import SentenceEncoder
from retriever_server.training.builders.dense import decoder
from tests.fakes import tiny_model
from tests.retriever_server.training.decoder_models import tiny_decoder


def two_way(kind="llama", attention="sdpa"):
    model = tiny_model(kind, 97)
    model.set_attn_implementation(attention)
    make_two_way(model)
    return model


def hidden(model, ids, mask=None):
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3"])
def test_a_two_way_decoder_is_proved_and_a_causal_one_is_not(kind, attention):
    model = two_way(kind, attention)
    check_two_way(model)
    assert not model.training
    model.config.is_causal = True
    with pytest.raises(DataError, match=f"{attention} attention.*: attends to earlier tokens alone"):
        check_two_way(model)


def test_two_way_attention_is_that_of_a_model_without_any_mask():
    model, ids = two_way(), torch.randint(97, (1, 9))
    full = torch.ones(1, 1, 9, 9, dtype=torch.bool)  # transformers takes a whole mask as it is
    assert torch.allclose(hidden(model, ids), hidden(tiny_model("llama", 97), ids, full), atol=1e-6)


def test_a_batch_of_one_that_is_causal_is_found_out(monkeypatch):
    """As llm2vec#74: the mask is only made two-way where there is more than one text."""
    right = masking_utils.create_bidirectional_mask

    def wrong(config, inputs_embeds, attention_mask, past_key_values, **options):
        options = {k: v for k, v in options.items() if k in ("or_mask_function", "and_mask_function")}
        if len(inputs_embeds) > 1:
            return right(config, inputs_embeds, attention_mask, past_key_values=past_key_values, **options)
        length = inputs_embeds.shape[1]
        return torch.ones(length, length, dtype=torch.bool).tril()[None, None]

    monkeypatch.setattr(masking_utils, "create_bidirectional_mask", wrong)
    with pytest.raises(DataError, match="attends to earlier tokens alone"):
        check_two_way(two_way())


def test_sdpa_that_takes_no_mask_for_a_causal_one_is_found_out(monkeypatch):
    """As llm2vec#79: only the mask is exchanged, which is none without padding; the kernel stays causal."""
    monkeypatch.setattr(
        modeling_llama, "create_causal_mask",
        lambda position_ids=None, **options: masking_utils.create_bidirectional_mask(**options),
    )  # fmt: skip
    model = tiny_model("llama", 97)
    ids, mask = torch.randint(97, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, :2] = 0
    other = ids.clone()
    other[:, -1] = (ids[:, -1] + 1) % 97
    assert not torch.equal(hidden(model, ids, mask)[0, 0], hidden(model, other, mask)[0, 0])  # looks right
    with pytest.raises(DataError, match=r"sdpa attention.*: attends to earlier tokens alone"):
        check_two_way(model)


def test_tokens_that_see_the_padding_are_found_out(monkeypatch, tmp_path):
    model = decoder(tiny_decoder(tmp_path / "base"), "mean", two_way=True)
    right = masking_utils.create_bidirectional_mask
    monkeypatch.setattr(
        masking_utils, "create_bidirectional_mask",
        lambda config, embeds, mask, **options: right(config, embeds, torch.ones_like(mask), **options),
    )  # fmt: skip
    with pytest.raises(DataError, match="query vectors depend on the batch they are encoded in"):
        self_test(SentenceEncoder(model, read_spec("a model", model)))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_saved_two_way_model_is_two_way_in_plain_sentence_transformers(tmp_path, attention):
    model = decoder(tiny_decoder(tmp_path / "base"), "mean", two_way=True, attention=attention)
    model.save(str(tmp_path / "saved"))
    again = SentenceTransformer(
        str(tmp_path / "saved"), device="cpu", model_kwargs={"attn_implementation": attention}
    )
    (transformer,) = outer_transformers(again)
    assert is_two_way(transformer) and transformer.config._attn_implementation == attention
    check_two_way(transformer)
    assert torch.allclose(
        again.encode("a river", convert_to_tensor=True), model.encode("a river", convert_to_tensor=True)
    )
    assert describe_first(again) == ["two-way"]
    causal = decoder(tiny_decoder(tmp_path / "other"), "mean")
    assert describe_first(causal) == [] and not is_two_way(outer_transformers(causal)[0])
