"""Log-probs of trained tokens against a plain forward of each trajectory alone, whatever the layout."""

import asyncio
import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from agent.engines.base import Sampling
from agent.engines.hf import HFEngine
from agent.trajectory import Segment, SegmentKind, StopReason, Trajectory
from data.errors import ConfigError
from rl.config import RolloutConfig
from rl.learner import logprobs as scoring
from rl.learner.batch import MicroBatch, micro_batches
from rl.learner.logprobs import Scorer
from tests.fakes import SIZES, byte_tokenizer, question, tiny_model
from tests.rl.learner.test_batch import BATCH, VOCABULARY

KINDS = ["qwen2", "qwen3", "llama", "gemma3"]
LAYOUTS = ["packed", "right", "left"]
ROLLOUT = RolloutConfig()


def lay_out(layout: str, trajectories=BATCH, max_tokens=10_000) -> MicroBatch:
    """All trajectories as one micro-batch: packed, or padded on either side."""
    (batch,) = micro_batches(trajectories, range(len(trajectories)), max_tokens, layout == "packed")
    if layout != "left":
        return batch
    width = max(batch.lengths)

    def shift(tensor):
        return torch.stack([r.roll(width - n) for r, n in zip(tensor, batch.lengths, strict=True)])

    moved = {k: shift(v) for k, v in vars(batch).items() if getattr(v, "ndim", 0) == 2}
    return MicroBatch(**{**vars(batch), **moved})


def plain(model, batch, trajectories=BATCH, transform=lambda logits: logits):
    """Log-probs and entropy by one forward a trajectory over the whole vocabulary."""
    logprobs, entropy = [], []
    for row in batch.rows:
        ids, mask = trajectories[row].token_ids, trajectories[row].loss_mask
        logits = transform(model(torch.tensor([ids])).logits[0].float())
        distribution = torch.log_softmax(logits, -1)
        trained = [t for t, kept in enumerate(mask) if kept]
        logprobs += [distribution[t - 1, ids[t]] for t in trained]
        entropy += [-(distribution[t - 1].exp() * distribution[t - 1]).sum() for t in trained]
    return torch.stack(logprobs), torch.stack(entropy)


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        scale = theirs[name].abs().max().item()
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6 * max(1.0, scale), rtol=1e-5, msg=name)


def weights_of(batch):
    """Something to weigh log-probs with, so that no two tokens count alike."""
    return torch.linspace(-1, 1, int(batch.counts.sum()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_and_gradients_are_those_of_each_trajectory_alone(kind, layout):
    model, batch = tiny_model(kind, VOCABULARY), lay_out(layout)
    logprobs, entropy = plain(model, batch)
    expected = gradients(model, (logprobs * weights_of(batch)).sum())
    taken = Scorer(model, ROLLOUT, chunk_tokens=7)(batch)
    torch.testing.assert_close(taken.logprobs, logprobs, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(taken.entropy, entropy, atol=1e-6, rtol=1e-6)
    assert_same(gradients(model, (taken.logprobs * weights_of(batch)).sum()), expected)


@pytest.mark.parametrize("kind", ["qwen2", "gemma3"])
def test_gradient_checkpointing_reads_packed_rows_alike_in_the_backward_pass(kind):
    model, batch = tiny_model(kind, VOCABULARY), lay_out("packed")
    expected = gradients(model, (Scorer(model, ROLLOUT)(batch).logprobs * weights_of(batch)).sum())
    model.gradient_checkpointing_enable()
    model.train()
    calls = []
    model.base_model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    taken = Scorer(model, ROLLOUT)(batch)
    assert_same(gradients(model, (taken.logprobs * weights_of(batch)).sum()), expected)
    assert len(calls) == 2  # it was run again


@pytest.mark.parametrize("kind", ["qwen2", "gemma3"])
def test_packed_trajectories_do_not_see_each_other(kind):
    model, batch = tiny_model(kind, VOCABULARY), lay_out("packed")
    before = Scorer(model, ROLLOUT)(batch).logprobs.split(batch.counts.tolist())
    first = batch.lengths[0]
    batch.token_ids[0, :first] = (batch.token_ids[0, :first] + 1) % VOCABULARY
    after = Scorer(model, ROLLOUT)(batch).logprobs.split(batch.counts.tolist())
    assert (before[0] != after[0]).any()
    assert all(torch.equal(a, b) for a, b in zip(before[1:], after[1:], strict=True))


class Largest(TorchDispatchMode):
    """Notes how large the largest tensor is that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            self.elements = max(self.elements, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_no_tensor_of_all_tokens_and_the_vocabulary_exists(entropy_gradient):
    model, batch = tiny_model("qwen2", 2048), lay_out("packed")
    tokens = int(batch.counts.sum())

    def largest(chunk_tokens):
        with Largest() as mode:
            taken = Scorer(model, ROLLOUT, chunk_tokens)(batch, entropy_gradient)
            (taken.logprobs.sum() + entropy_gradient * taken.entropy.sum()).backward()
        return mode.elements

    head = model.get_output_embeddings().weight.numel()
    assert largest(tokens) == tokens * 2048 > head  # it would be noticed
    assert largest(8) == head


def test_entropy_has_a_gradient_on_request_only():
    model, batch = tiny_model("qwen2", VOCABULARY), lay_out("packed")
    assert not Scorer(model, ROLLOUT)(batch).entropy.requires_grad
    expected = gradients(model, plain(model, batch)[1].sum())
    entropy = Scorer(model, ROLLOUT, 7)(batch, entropy_gradient=True).entropy
    assert_same(gradients(model, entropy.sum()), expected)


@pytest.mark.parametrize("packed", [True, False])
def test_a_micro_batch_without_trained_tokens_has_a_gradient_of_zero(packed):
    """So that a process which has none can take part in a sharded backward pass."""
    prompt = Trajectory(question(), [Segment(SegmentKind.PROMPT, [1, 2], "")], StopReason.TOKEN_LIMIT)
    (batch,) = micro_batches([prompt], [0], 100, packed)
    model = tiny_model("qwen2", VOCABULARY)
    taken = Scorer(model, ROLLOUT)(batch)
    assert taken.logprobs.shape == taken.entropy.shape == (0,)
    found = gradients(model, taken.logprobs.sum())
    assert found.keys() == dict(model.named_parameters()).keys()
    assert not any(gradient.any() for gradient in found.values())


def test_temperature_is_that_of_the_sampler():
    model, batch = tiny_model("qwen2", VOCABULARY), lay_out("packed")
    taken = Scorer(model, RolloutConfig(temperature=0.7))(batch)
    expected, _ = plain(model, batch, transform=lambda logits: logits / 0.7)
    torch.testing.assert_close(taken.logprobs, expected)


@pytest.mark.parametrize(("top_p", "top_k"), [(0.5, 0), (1.0, 3), (0.8, 5)])
def test_truncated_log_probs_are_the_samplers_own(top_p, top_k):
    tokenizer = byte_tokenizer()
    model = tiny_model("qwen2", len(tokenizer))
    rollout = RolloutConfig(temperature=0.8, top_p=top_p, top_k=top_k, renormalise_logprobs=True)
    sampling = Sampling(0.8, top_p, top_k, renormalise=True, max_tokens=40, seed=5)
    done = asyncio.run(HFEngine(model, tokenizer).generate([1, 2, 3], sampling, "t"))
    trajectory = Trajectory(
        question(),
        [
            Segment(SegmentKind.PROMPT, [1, 2, 3], ""),
            Segment(SegmentKind.POLICY, done.token_ids, "", done.logprobs),
        ],
        StopReason.ANSWERED,
    )
    (batch,) = micro_batches([trajectory], [0], 100)
    taken = Scorer(model, rollout)(batch)
    torch.testing.assert_close(taken.logprobs, batch.sampler_logprobs, atol=1e-5, rtol=0)
    whole = Scorer(model, RolloutConfig(temperature=0.8))(batch)
    assert (taken.logprobs > whole.logprobs + 1e-4).any()
    assert top_k == 0 or taken.entropy.max() <= torch.tensor(float(top_k)).log() + 1e-5
    taken.logprobs.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_taken_token_always_counts_as_kept():
    """Another's rounding may have kept a token at the edge: its log-prob is never minus infinity."""
    model, batch = tiny_model("qwen2", VOCABULARY), lay_out("packed")
    rollout = RolloutConfig(top_k=1, renormalise_logprobs=True)
    taken = Scorer(model, rollout)(batch)
    assert taken.logprobs.isfinite().all() and (taken.logprobs < -1).any() and taken.entropy.isfinite().all()


def capped_model() -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    config = Gemma2Config(
        **SIZES, vocab_size=VOCABULARY, head_dim=16, sliding_window=16, final_logit_softcapping=0.5
    )
    return Gemma2ForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["gemma2", "cohere", "granite"])
def test_logits_are_capped_and_scaled_where_the_model_does(kind):
    sizes = {**SIZES, "vocab_size": VOCABULARY, "eos_token_id": None, "pad_token_id": None}
    torch.manual_seed(0)
    model = {
        "gemma2": capped_model,
        "cohere": lambda: CohereForCausalLM(CohereConfig(**sizes, logit_scale=0.1)),
        "granite": lambda: GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=3.0)),
    }[kind]()
    batch = lay_out("right" if kind == "gemma2" else "packed")
    taken = Scorer(model.eval(), ROLLOUT, 7)(batch)
    torch.testing.assert_close(taken.logprobs, plain(model, batch)[0], atol=1e-6, rtol=1e-6)


def test_attention_that_cannot_be_cut_is_refused():
    with pytest.raises(ConfigError, match="gemma2 has soft caps on its attention; set packing: false"):
        Scorer(capped_model(), ROLLOUT)(lay_out("packed"))
    mamba = MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(ConfigError, match=r"mamba has layers of kind \['linear_attention'"):
        Scorer(mamba, ROLLOUT)(lay_out("packed"))
    model = tiny_model("qwen2", VOCABULARY)
    model.base_model.layers[0].self_attn.register_parameter("sinks", torch.nn.Parameter(torch.zeros(4)))
    with pytest.raises(ConfigError, match="sinks"):
        Scorer(model, ROLLOUT)(lay_out("packed"))


@pytest.mark.parametrize("kind", ["qwen2", "gemma3"])
def test_a_model_that_was_packed_does_all_else_as_before(kind, tmp_path):
    def decode(model):
        ids = torch.tensor([[0] * 20 + [5, 6, 7], list(range(23))])
        mask = torch.tensor([[0] * 20 + [1] * 3, [1] * 23])
        options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
        engine = HFEngine(model, byte_tokenizer())
        done = asyncio.run(engine.generate(list(range(30)), Sampling(max_tokens=9, seed=1), "t"))
        return model.generate(ids, attention_mask=mask, **options).tolist(), done

    model = tiny_model(kind, VOCABULARY)
    before = decode(model)
    Scorer(model, ROLLOUT)(lay_out("packed"))
    assert model.config._attn_implementation == scoring.PACKED
    assert decode(model) == before
    model.save_pretrained(tmp_path)
    assert scoring.PACKED not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def test_the_kernel_of_variable_lengths_is_asked_for_the_same_attention(monkeypatch):
    """Its arguments, against the loop: the kernel itself needs a GPU (the next test)."""

    def varlen_attn(q, k, v, ends, ends_k, longest, longest_k, *, scale, window_size, enable_gqa):
        assert ends.dtype == torch.int32 and longest == longest_k == int(ends.diff().max())
        parts = []
        for start, end in torch.stack([ends[:-1], ends_k[1:]], 1).tolist():
            near = torch.ones(end - start, end - start, dtype=torch.bool).tril()
            near = near if window_size[0] < 0 else near.triu(-window_size[0])
            heads = [x[start:end].transpose(0, 1)[None] for x in (q, k, v)]
            out = torch.nn.functional.scaled_dot_product_attention(
                *heads, attn_mask=near, scale=scale, enable_gqa=enable_gqa
            )
            parts.append(out[0].transpose(0, 1))
        return torch.cat(parts)

    for kind in KINDS:
        model, batch = tiny_model(kind, VOCABULARY), lay_out("packed")
        expected = Scorer(model, ROLLOUT)(batch).logprobs
        with monkeypatch.context() as patch:
            patch.setattr(scoring, "varlen_attn", varlen_attn)
            patch.setattr(scoring, "_has_kernel", lambda query: True)
            torch.testing.assert_close(Scorer(model, ROLLOUT)(batch).logprobs, expected, atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_packed_log_probs_on_a_gpu_are_those_of_padded_rows(kind):
    model = tiny_model(kind, VOCABULARY).to("cuda", torch.bfloat16)
    batches = [lay_out("packed"), lay_out("right")]
    packed, padded = (Scorer(model, ROLLOUT)(batch).logprobs for batch in batches)
    torch.testing.assert_close(packed, padded, atol=0.1, rtol=0.02)
