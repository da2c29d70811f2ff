"""Masked next-token prediction and unsupervised SimCSE: against loops, transformers, and their own steps."""

import pytest
import torch
from sentence_transformers import SentenceTransformer, losses
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from data.errors import ConfigError
from retriever_server.training.builders.dense import decoder
from retriever_server.training.losses.masked_next_token import MaskedNextToken, masked_next_token_loss
from retriever_server.training.losses.simcse import SimCSE
from tests.retriever_server.training.decoder_models import tiny_decoder

TEXTS = ["a river in the north", "red fox", "x", "the capital of a country is not its largest city"]


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return tiny_decoder(tmp_path_factory.mktemp("untied"), "llama")


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return tiny_decoder(tmp_path_factory.mktemp("tied"), "qwen2")


def test_a_masked_token_is_predicted_from_the_vector_before_it():
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 5, 3), torch.randn(7, 3)
    ids, chosen = torch.randint(7, (2, 5)), torch.zeros(2, 5, dtype=torch.bool)
    chosen[0, 1] = chosen[0, 4] = chosen[1, 2] = True
    expected = [cross_entropy(head @ hidden[row, i - 1], ids[row, i]) for row, i in ((0, 1), (0, 4), (1, 2))]
    loss = masked_next_token_loss(hidden, head, ids, chosen)
    assert float(loss) == pytest.approx(float(sum(expected) / 3), abs=1e-6)
    assert float(masked_next_token_loss(hidden, head, ids, chosen & False)) == 0


@pytest.mark.parametrize("base", ["tied", "untied"])
def test_it_is_the_loss_of_the_language_model_on_masked_labels(base, request):
    """transformers shifts labels by one: position i - 1 predicts label i."""
    folder = request.getfixturevalue(base)
    model = decoder(folder, "mean", two_way=True)
    loss = MaskedNextToken(model, share=0.4, replace="all")
    features = model.preprocess(TEXTS)
    torch.manual_seed(1)
    value = loss([features])
    torch.manual_seed(1)
    ids, mask = features["input_ids"], features["attention_mask"]
    chosen = loss._choose(ids, mask)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    whole.config.is_causal = False
    masked = ids.masked_fill(chosen, model.tokenizer.convert_tokens_to_ids("_"))
    expected = whole(input_ids=masked, attention_mask=mask, labels=ids.masked_fill(~chosen, -100)).loss
    assert float(value) == pytest.approx(float(expected), abs=1e-5)
    value.backward()
    assert (loss.head is None) == (base == "tied")
    assert not any(parameter is loss.head for parameter in loss.parameters())


def test_what_is_masked_is_never_the_first_token_nor_padding_nor_special(tied):
    model = decoder(tied, "eos")
    loss = MaskedNextToken(model, share=0.99)
    for side in ("left", "right"):
        model.tokenizer.padding_side = side
        features = model.preprocess(TEXTS)
        ids, mask = features["input_ids"], features["attention_mask"]
        chosen = loss._choose(ids, mask)
        assert not chosen[mask == 0].any() and not chosen[ids == model.tokenizer.eos_token_id].any()
        for row, real in zip(chosen, mask.bool(), strict=True):
            assert not row[real][0]
        assert chosen.any()
    assert not loss._choose(*(features[key][2:3] for key in ("input_ids", "attention_mask"))).any()  # "x"


def test_bert_masking_leaves_a_tenth_and_makes_a_tenth_random(tied):
    loss = MaskedNextToken(decoder(tied, "mean"), replace="bert")
    ids = torch.full((400, 50), 7)
    chosen = torch.ones_like(ids, dtype=torch.bool)
    chosen[:, :10] = False
    masked = loss._masked(ids, chosen)
    assert (masked[:, :10] == 7).all()
    shares = [float((masked[:, 10:] == token).float().mean()) for token in (loss.mask_id, 7)]
    assert shares == pytest.approx([0.8, 0.1], abs=0.02)


def test_a_few_steps_lower_the_loss(tied):
    model = decoder(tied, "mean", two_way=True)
    loss = MaskedNextToken(model, share=0.3, replace="all")
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    features = model.preprocess(TEXTS * 4)
    torch.manual_seed(0)
    values = []
    for _ in range(25):
        optimizer.zero_grad()
        values.append(loss([dict(features)]))
        values[-1].backward()
        optimizer.step()
    assert sum(map(float, values[-5:])) < 0.7 * sum(map(float, values[:5]))


def test_simcse_is_info_nce_of_two_passes_with_other_dropout(tied):
    model = decoder(tied, "mean", two_way=True, dropout=0.3).train()
    features = model.preprocess(TEXTS)
    torch.manual_seed(0)
    value = SimCSE(model, temperature=0.05)([features])
    torch.manual_seed(0)
    first, second = (model(dict(features))["sentence_embedding"] for _ in range(2))
    assert not torch.allclose(first, second)
    scores = first @ second.T / 0.05
    assert float(value) == pytest.approx(float(cross_entropy(scores, torch.arange(4))), abs=1e-5)
    theirs = losses.MultipleNegativesRankingLoss(model, scale=20)
    torch.manual_seed(0)
    assert float(value) == pytest.approx(float(theirs([dict(features), dict(features)], None)), abs=1e-5)


def test_the_steps_follow_one_another_through_their_folders(tied, tmp_path):
    """Two-way stays, dropout does not."""
    one = decoder(tied, "mean", two_way=True, dropout=0.3)
    one.save(str(tmp_path / "one"))
    two = decoder(str(tmp_path / "one"), "mean", two_way=True, query_prompt="find:\n", pool_prompt=False)
    assert two.transformers_model.config.attention_dropout == 0
    two.save(str(tmp_path / "two"))
    served = SentenceTransformer(str(tmp_path / "two"), device="cpu")
    assert served.transformers_model.config.is_causal is False
    assert served.prompts["query"] == "find:\n" and not served[1].include_prompt
    MaskedNextToken(two)  # tied: the head is there


def test_what_cannot_be_trained_so_is_refused(tied, untied, tmp_path):
    with pytest.raises(ConfigError, match="the model has no dropout"):
        SimCSE(decoder(tied, "mean"))
    with pytest.raises(ConfigError, match="mask_token 'two words': must be one token, is 9"):
        MaskedNextToken(decoder(tied, "mean"), mask_token="two words")
    with pytest.raises(ConfigError, match="share = 1, replace"):
        MaskedNextToken(decoder(tied, "mean"), share=1)
    decoder(untied, "mean").save(str(tmp_path))
    with pytest.raises(ConfigError, match="holds no language model head"):
        MaskedNextToken(decoder(str(tmp_path), "mean"))
