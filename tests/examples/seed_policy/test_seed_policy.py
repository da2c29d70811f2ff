"""The seed policy copies what it has never seen because that is wired in, and for no other reason."""

import pytest
import torch

from agent.policy import load_policy
from agent.protocol import COMPACT, PROTOCOLS
from examples.seed_policy.seed_policy import SeedConfig, make_seed_policy, train_tokenizer

NAMES = ["Reykjavík", "N'Djamena", "Saint Kitts and Nevis", "Côte d'Ivoire", "Xi'an", "1,234.5 km", "東京"]
TEXTS = [f"Question: where is {name}?\n" for name in NAMES] * 20


@torch.no_grad()
def copying_accuracy(policy, length=80, rows=8):
    """Share of tokens of a random sequence that are predicted when it comes a second time."""
    torch.manual_seed(1)
    vocabulary = policy.model.config.vocab_size
    once = torch.randint(0, vocabulary, (rows, length))
    predicted = policy.model(torch.cat([once, once], dim=1)).logits[:, length:-1].argmax(-1)
    return float((predicted == once[:, 1:]).float().mean())


@pytest.fixture(scope="module")
def policy():
    return make_seed_policy(TEXTS, COMPACT)


def test_copying_is_wired_in(policy):
    assert copying_accuracy(policy) > 0.6


def test_without_the_wiring_there_is_no_copying():
    assert copying_accuracy(make_seed_policy(TEXTS, COMPACT, SeedConfig(copying=False))) < 0.05


def test_the_same_seed_makes_the_same_policy(policy):
    again, other = (make_seed_policy(TEXTS, COMPACT, seed=seed).model.state_dict() for seed in (0, 1))
    same = policy.model.state_dict()
    assert all(torch.equal(same[name], value) for name, value in again.items())
    assert not torch.equal(same["lm_head.weight"], other["lm_head.weight"])


def test_the_policy_survives_the_disk_under_standard_names(policy, tmp_path):
    policy.save(tmp_path, "compact")
    loaded = load_policy(str(tmp_path))
    assert loaded.model.config.model_type == "qwen2"
    assert copying_accuracy(loaded) == copying_accuracy(policy)
    assert loaded.tokenizer.encode(TEXTS[0]) == policy.tokenizer.encode(TEXTS[0])


@pytest.mark.parametrize("name", NAMES)
def test_names_survive_the_tokenizer(policy, name):
    ids = policy.tokenizer.encode(name, add_special_tokens=False)
    assert policy.tokenizer.decode(ids) == name


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_a_tag_is_one_token_wherever_it_stands_and_a_digit_is_another(protocol):
    tokenizer = train_tokenizer(TEXTS, protocol, 400)
    for tag in (f"<{slash}{name}>" for name in protocol.tags for slash in ("", "/")):
        (alone,) = tokenizer.encode(tag)
        assert tokenizer.encode(f"a{tag}b{tag}").count(alone) == 2
    assert len(tokenizer.encode("1945")) == 4
    assert len(tokenizer) <= 400
