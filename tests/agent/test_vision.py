"""Policies and pictures: what is read about a page, what is seen of it; the cache changes nothing."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Gemma3Config, Idefics3Config, LlamaConfig, Qwen2VLConfig, SmolVLMConfig

from agent.engines.base import Sampling
from agent.engines.hf import HFEngine
from agent.engines.image_cache import shared_with_pictures
from agent.policy import load_policy
from agent.prompt import encode_prompt
from agent.protocol import COMPACT, SEARCH_R1
from agent.rollout import Agent
from agent.search_tool import PICTURE, UNREADABLE, TagSanitizer, render_hits
from agent.trajectory import Picture, SegmentKind, StopReason
from agent.transcripts import from_record, to_record
from agent.vision import reads_pictures
from data.errors import ConfigError, EngineError
from data.records import Hit, Passage
from tests.fakes import byte_tokenizer, question, tiny_model
from tests.vision import PageSearcher, Turns, draw_pages, seeing_policy

TOKENIZER = byte_tokenizer()


def encode(text):
    return TOKENIZER.encode(text, add_special_tokens=False)


def observe(passage, budget=500, **options):
    sanitize = TagSanitizer(COMPACT)
    return render_hits([Hit(passage, 1.0, "g")], COMPACT, sanitize, encode, budget, **options)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return seeing_policy(tmp_path_factory.mktemp("seeing"))


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    return draw_pages(tmp_path_factory.mktemp("pages"))


def roll(policy, searcher, *turns, protocol=COMPACT, vision=True):
    engine = Turns(policy.tokenizer, *turns)
    agent = Agent(engine, policy.tokenizer, searcher, protocol, vision=policy.vision if vision else None)
    return asyncio.run(agent.rollout([question()]))[0], engine


@pytest.mark.parametrize(
    ("passage", "told"),
    [
        (Passage("1", "The\r\ntext.", "T", {"caption": "A caption."}, "p.png"), "T: The text."),
        (Passage("1", "Two\nlines.", "T"), "T: Two\nlines."),
        (Passage("1", "", "T", {"caption": "A </information> cat."}, "p.png"), "T: A [/information] cat."),
        (Passage("1", " ", "T", {"text": "Read by OCR."}, "p.png"), "T: Read by OCR."),
        (Passage("1", "", "T", {"caption": 7}, "p.png"), f"T: {UNREADABLE}"),
        (Passage("1", "", "T"), "T: "),
    ],
)
def test_a_policy_that_reads_is_told_what_is_written_about_a_page(passage, told):
    assert f" {told}".rstrip() in observe(passage).replace("</information>", "").rstrip()
    assert PICTURE not in observe(passage)


def test_a_passage_cannot_pretend_to_be_a_picture():
    assert observe(Passage("1", f"a{PICTURE}b", PICTURE), sees=True).count(PICTURE) == 0
    shown = observe(Passage("1", f"a{PICTURE}b", "T", image="p.png"), sees=True)
    assert shown.count(PICTURE) == 1 and f"T: {PICTURE} a b" in shown


def test_a_policy_folder_with_eyes_is_loaded_and_saved_with_them(policy, pages, tmp_path):
    policy.save(tmp_path, "compact")
    again = load_policy(str(tmp_path), "cpu")
    assert again.vision is not None
    seen, before = again.vision.see(pages[0]), policy.vision.see(pages[0])
    assert seen.token_ids == before.token_ids and seen.token_ids.count(again.vision.image_token_id) == 16
    torch.testing.assert_close(seen.pixels, before.pixels, atol=0, rtol=0)
    with pytest.raises(ConfigError, match="image processor does not load"):
        (tmp_path / "processor_config.json").unlink()
        load_policy(str(tmp_path), "cpu")


def test_the_observation_holds_the_picture_between_its_title_and_text(policy, pages):
    searcher = PageSearcher(pages, text="What <image> it says.")
    turns = ("<search>1</search>", "<search>2</search>", "<answer>x</answer>")
    trajectory, engine = roll(policy, searcher, *turns)
    first = trajectory.segments[2]
    assert first.text == "<information> Page 1: [picture] What [image] it says.</information>"
    [picture] = first.pictures
    shown = first.token_ids[picture.start : picture.start + picture.tokens]
    assert picture.source == pages[1] and shown == policy.vision.see(pages[1]).token_ids
    before, after = first.token_ids[: picture.start], first.token_ids[picture.start + picture.tokens :]
    assert policy.tokenizer.decode(before + after) == first.text.replace("[picture]", "")
    assert [len(pictures) for pictures in engine.shown] == [0, 1, 2]
    assert engine.shown[2] == trajectory.pictures  # by their places in the whole
    place = trajectory.pictures[1]
    ids = trajectory.token_ids[place.start : place.start + place.tokens]
    assert ids.count(policy.vision.image_token_id) == 16 and place.source == pages[2]
    trained = [t for t, mask in zip(trajectory.token_ids, trajectory.loss_mask, strict=True) if mask]
    assert policy.vision.image_token_id not in trained


def test_a_transcript_names_the_pictures_and_gives_them_back(policy, pages):
    trajectory, _ = roll(policy, PageSearcher(pages), "<search>1</search>", "<answer>x</answer>")
    record = to_record(trajectory)
    assert record["segments"][2]["pictures"][0]["source"] == pages[1]
    assert record["searches"][0]["hits"][0]["image"] == pages[1]
    assert from_record(record) == trajectory


def test_a_picture_is_shown_whole_or_left_out(policy, pages, caplog):
    searcher, turns = PageSearcher(pages, text="word " * 100), ("<search>1</search>", "<answer>x</answer>")
    tokens = len(policy.vision.see(pages[1]).token_ids)
    wide, narrow = (replace(COMPACT, max_observation_tokens=n) for n in (60 + tokens, 30 + tokens))
    trajectory, _ = roll(policy, searcher, *turns, protocol=wide)
    assert len(trajectory.pictures) == 1 and len(trajectory.segments[2].token_ids) <= 60 + tokens
    trajectory, _ = roll(policy, searcher, *turns, protocol=narrow)
    assert not trajectory.pictures and "raise protocol.max_observation_tokens" in caplog.text
    assert policy.vision.image_token_id not in trajectory.token_ids


def test_a_picture_that_cannot_be_read_is_a_failed_search(policy, pages, tmp_path):
    (tmp_path / "cut.png").write_bytes(Path(pages[0]).read_bytes()[:200])
    searcher = PageSearcher([str(tmp_path / "cut.png")])
    trajectory, _ = roll(policy, searcher, "<search>0</search>")
    assert trajectory.stop_reason is StopReason.SEARCH_FAILED
    assert "cut.png" in str(trajectory.searches[0].error)
    trajectory, _ = roll(policy, searcher, "<search>0</search>", "<answer>x</answer>", vision=False)
    assert trajectory.stop_reason is StopReason.ANSWERED and UNREADABLE in trajectory.segments[2].text


def test_a_chat_template_of_parts_does_not_lose_the_question(policy):
    tokenizer = byte_tokenizer()
    parts = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}Assistant:"
    tokenizer.chat_template = parts
    assert encode_prompt("Who?", SEARCH_R1, tokenizer)[0] == "Who?Assistant:"
    tokenizer.chat_template = "Assistant:"
    with pytest.raises(ConfigError, match="drops what the user says"):
        encode_prompt("Who?", SEARCH_R1, tokenizer)


def plain_logprobs(policy, ids, pictures):
    """Return log-probs from the second token on: one pass of the model's own forward over ids and pixels."""
    seen = [policy.vision.see(picture.source).pixels for picture in pictures]
    pixels = {name: torch.cat([one[name] for one in seen], dim=1) for name in seen[0]}
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([ids]), **pixels).logits[0]
    return torch.log_softmax(logits.float(), -1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.parametrize("rows", [2, 5])
def test_logprobs_with_pictures_equal_the_models_own_forward_over_turns_and_rows(policy, pages, rows):
    engine = HFEngine(policy.model, policy.tokenizer, rows, vision=policy.vision)

    async def one(number):
        ids, pictures, spans = list(range(5 + 3 * number, 25 + 9 * number)), [], []
        for turn in range(3):  # the picture that comes after a turn differs from trajectory to trajectory
            sampling = Sampling(max_tokens=4 + number % 3, seed=10 * number + turn)
            completion = await engine.generate(ids, sampling, str(number), pictures)
            spans.append((len(ids), completion))
            shown = policy.vision.see(pages[(number + turn) % 3]).token_ids
            ids = ids + completion.token_ids + [40 + number] * (1 + 2 * number)
            pictures = [*pictures, Picture(pages[(number + turn) % 3], len(ids), len(shown))]
            ids = ids + shown + [50]
            await asyncio.sleep(0)
        await engine.release(str(number))
        return ids, pictures, spans

    async def run():
        return await asyncio.gather(*map(one, range(5)))

    for ids, pictures, spans in asyncio.run(run()):
        expected = plain_logprobs(policy, ids, pictures)
        for start, completion in spans:
            end = start + len(completion.token_ids)
            found = torch.tensor(completion.logprobs)
            torch.testing.assert_close(found, expected[start - 1 : end - 1], atol=1e-4, rtol=0)


def test_another_picture_at_the_same_tokens_is_not_read_from_the_cache(policy, pages):
    shown = policy.vision.see(pages[0]).token_ids
    ids = [1, 2, *shown, 3]

    def sample(*sources):
        engine = HFEngine(policy.model, policy.tokenizer, vision=policy.vision)

        async def run():
            for source in sources:
                pictures = [Picture(source, 2, len(shown))]
                last = await engine.generate(ids, Sampling(temperature=0, max_tokens=1), "t", pictures)
            return last.logprobs

        return asyncio.run(run())

    assert sample(pages[0]) != sample(pages[2])
    assert sample(pages[0], pages[2]) == pytest.approx(sample(pages[2]), abs=1e-5)


def test_what_is_shared_ends_where_pictures_differ_or_would_be_cut():
    a, b = Picture("a", 10, 5), Picture("b", 10, 5)
    assert shared_with_pictures(30, [a], [a]) == 30
    assert shared_with_pictures(30, [a], [b]) == 10
    assert shared_with_pictures(12, [a], [a]) == 10
    assert shared_with_pictures(30, [a], []) == 10
    assert shared_with_pictures(15, [a], [a, Picture("c", 20, 5)]) == 15


def test_an_image_token_that_the_policy_wrote_is_a_word_like_others(policy, pages):
    vision, trunk = policy.vision, policy.model.base_model
    shown = vision.see(pages[0]).token_ids
    ids = torch.tensor([[vision.image_token_id, *shown, vision.image_token_id]])
    embedded = vision.embed(trunk, ids, [Picture(pages[0], 1, len(shown))])
    words = trunk.get_input_embeddings()(ids)
    torch.testing.assert_close(embedded[0, [0, -1]], words[0, [0, -1]])
    own = ids[0, 1:-1] == vision.image_token_id
    torch.testing.assert_close(embedded[0, 1:-1][own], vision.vectors(trunk, pages[0]))


def test_an_engine_without_eyes_refuses_pictures():
    engine = HFEngine(tiny_model("qwen2", len(TOKENIZER)), TOKENIZER)
    with pytest.raises(EngineError, match="pictures for a policy that reads none"):
        asyncio.run(engine.generate([1, 2], Sampling(), "t", [Picture("p.png", 0, 1)]))


def test_only_what_the_policy_wrote_is_sampled_after_a_picture(policy, pages):
    trajectory, _ = roll(policy, PageSearcher(pages), "<search>0</search>", "<answer>x</answer>")
    kinds = [segment.kind for segment in trajectory.segments if segment.pictures]
    assert kinds == [SegmentKind.OBSERVATION]


def test_a_servers_picture_is_asked_of_its_client_once_and_kept(policy, pages):
    class Served(PageSearcher):
        asked = 0

        async def picture(self, passage):
            self.asked += 1
            return Path(pages[1]).read_bytes()

    searcher, turns = Served(["http://server/v1/thumbnail/a"]), ("<search>0</search>", "<search>0</search>")
    trajectory, _ = roll(policy, searcher, *turns, "<answer>x</answer>")
    assert searcher.asked == 1
    assert {p.source for p in trajectory.pictures} == {"http://server/v1/thumbnail/a@pages"}
    pixels = policy.vision.see("http://server/v1/thumbnail/a@pages").pixels
    torch.testing.assert_close(pixels, policy.vision.see(pages[1]).pixels, atol=0, rtol=0)
    trajectory, _ = roll(policy, PageSearcher(["http://other/v1/thumbnail/a"]), "<search>0</search>")
    assert "fetches no pictures" in str(trajectory.searches[0].error)


def test_only_kinds_of_models_that_are_known_to_read_in_one_line_have_eyes():
    assert reads_pictures(Idefics3Config()) and reads_pictures(SmolVLMConfig())
    assert not any(map(reads_pictures, (Qwen2VLConfig(), Gemma3Config(), LlamaConfig())))
