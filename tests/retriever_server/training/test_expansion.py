"""Expansion: written once, gone on with when killed, before the encoder and never before the reader."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from data.corpus import Corpus
from data.errors import ConfigError, DataError
from data.jsonl import write_jsonl
from data.records import Passage
from retriever_server.encoders.spec import EncodingSpec
from retriever_server.training.expansion import expand
from scripts.__main__ import main


class Shout:
    """Gives the text in capitals; dies after so many passages."""

    def __init__(self, dies_after: int = 1000) -> None:
        self.left, self.asked = dies_after, 0

    def __call__(self, passages: Sequence[Passage]) -> list[str]:
        self.left -= len(passages)
        if self.left < 0:
            raise KeyboardInterrupt
        self.asked += len(passages)
        return [passage.text.upper() for passage in passages]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    rows = [{"id": str(i), "title": "t", "text": f"word {i}", "metadata": {"n": i}} for i in range(10)]
    write_jsonl(tmp_path / "c.jsonl", rows)
    return Corpus(tmp_path / "c.jsonl")


def test_killed_it_goes_on_and_ends_as_if_it_had_not_been(corpus: Corpus, tmp_path: Path) -> None:
    whole = expand(corpus, Shout(), tmp_path / "whole.jsonl", 3)
    with pytest.raises(KeyboardInterrupt):
        expand(corpus, Shout(dies_after=7), tmp_path / "out.jsonl", 3)
    with open(tmp_path / "out.jsonl.part", "a") as file:
        file.write('{"id": "6", "te')  # killed in mid-line
    again = Shout()
    expand(corpus, again, tmp_path / "out.jsonl", 3)
    assert again.asked == 4
    assert (tmp_path / "out.jsonl").read_bytes() == whole.read_bytes()
    assert expand(corpus, Shout(dies_after=0), tmp_path / "out.jsonl", 3)  # nothing is asked twice


def test_the_encoder_reads_the_expansion_and_the_text_stays(corpus: Corpus, tmp_path: Path) -> None:
    passage = Corpus(expand(corpus, Shout(), tmp_path / "out.jsonl"))[4]
    assert (passage.text, passage.metadata) == ("word 4", {"n": 4, "expansion": "WORD 4"})
    spec = EncodingSpec("m", "sparse", "", 1, passage_template="{title}\n{text} {expansion}")
    assert spec.render(passage) == "t\nword 4 WORD 4"
    assert spec.render(corpus[4]) == "t\nword 4"


def test_a_file_of_another_corpus_and_a_wrong_generator_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    expand(corpus, Shout(), tmp_path / "out.jsonl")
    write_jsonl(tmp_path / "d.jsonl", [{"id": "0", "text": "word 0"}, {"id": "1", "text": "other"}])
    with pytest.raises(ConfigError, match=r"out\.jsonl: was made with corpus .*, not "):
        expand(Corpus(tmp_path / "d.jsonl"), Shout(), tmp_path / "out.jsonl")
    with pytest.raises(DataError, match="gave 1 texts for 10 passages"):
        expand(corpus, lambda passages: ["one"], tmp_path / "new.jsonl")


def test_the_command_expands(corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out.jsonl"
    generator = "{class_path: tests.retriever_server.training.test_expansion.Shout}"
    words = ["expand", "--corpus", str(corpus.path), "--out", str(out), "--generator", generator]
    assert main(words) == 0
    written = out.read_bytes()
    assert main(words) == 0 and main([*words, "--passages_at_once", "3"]) == 2
    said = capsys.readouterr()
    assert "out.jsonl: was made with passages_at_once 32, not 3; " in said.err
    assert "remove it, or give another --out" in said.err and out.read_bytes() == written
    assert main(words) == 0
    assert "expanded passages in" in capsys.readouterr().out
    assert Corpus(out)[0].metadata["expansion"] == "WORD 0"


def test_queries_of_a_sequence_to_sequence_model_are_as_many_as_asked_for(corpus: Corpus, tmp_path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "t", "word", *map(str, range(10))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    named = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(tmp_path / "t5")
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=len(words), decoder_start_token_id=0, **sizes)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    arguments = {"model": str(tmp_path / "t5"), "count": 3, "top": 5, "max_tokens": 4}
    of = "retriever_server.training.expansion.Seq2SeqQueries"
    generator = json.dumps({"class_path": of, "init_args": arguments})
    written = []
    for name in ("one", "again"):
        options = [f"--corpus={corpus.path}", f"--out={tmp_path / name}", f"--generator={generator}"]
        assert main(["expand", *options]) == 0
        written.append([passage.metadata["expansion"] for passage in Corpus(tmp_path / name)])
    assert written[0] == written[1] and len(set(written[0])) > 1
    assert max(len(text.split()) for text in written[0]) <= 3 * 4
    from retriever_server.training.synthesis.drafts import Call
    from retriever_server.training.synthesis.generators import Seq2Seq

    calls = [Call("", seed=7, passage=corpus[i]) for i in range(2)]
    texts = [Seq2Seq(arguments["model"], top=5, max_tokens=4).write(calls) for _ in range(2)]
    assert texts[0] == texts[1] and len(texts[0]) == 2
