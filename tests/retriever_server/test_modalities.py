"""A modality that somebody registers goes the way of images: corpus, encoder, index, search, training."""

import io
import subprocess
import sys
import wave

import numpy as np
import pytest

from data.corpus import Corpus
from data.errors import ConfigError, CorpusChanged, DataError
from data.jsonl import write_jsonl
from data.pages import modalities
from data.records import Item, Passage
from retriever_server.client.wire import with_image_bytes
from retriever_server.encoders.image_inputs import input_kind
from retriever_server.encoders.loading import load_encoder
from retriever_server.encoders.spec import EncodingSpec, similarities
from retriever_server.indexes.base import open_index
from retriever_server.indexes.flat import FlatIndex
from retriever_server.retriever import texts_of
from tests.retriever_server.tiny_encoders import tiny_model
from tests.retriever_server.training.recipes import component, recipe

RATE = 16_000


def wav(pitch: float, samples: int) -> bytes:
    """A file of a tone."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        tone = np.sin(np.arange(samples) * pitch * 2 * np.pi / RATE)
        file.writeframes((tone * 20_000).astype("<i2").tobytes())
    return out.getvalue()


def read_wav(source: str | bytes) -> dict:
    """Return what sentence-transformers takes for audio."""
    try:
        with wave.open(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            array = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 2**15
            return {"array": array, "sampling_rate": file.getframerate()}
    except (OSError, EOFError, wave.Error) as error:
        raise DataError(f"{str(source)[:80]}: no sound: {error}") from error


@pytest.fixture
def audio(monkeypatch):
    """Sounds are registered, for one test."""
    monkeypatch.setattr(modalities, "_KNOWN", dict(modalities._KNOWN))
    modalities.register("audio", read_wav, lambda: [wav(300, 3000), wav(900, 5000)])


@pytest.fixture(scope="module")
def ears(tmp_path_factory) -> str:
    """A text tower and a spectrogram transformer, saved as one model of sentence-transformers."""
    import sentence_transformers as st
    import torch
    from sentence_transformers.base.modules import Normalize, Router, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import ASTConfig, ASTFeatureExtractor, ASTModel

    folder = tmp_path_factory.mktemp("ears")
    torch.manual_seed(0)
    config = ASTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, patch_size=8,
        frequency_stride=8, time_stride=8, max_length=32, num_mel_bins=16,
    )  # fmt: skip
    ASTModel(config).save_pretrained(folder / "ast")
    ASTFeatureExtractor(max_length=32, num_mel_bins=16).save_pretrained(folder / "ast")
    text = st.SentenceTransformer(tiny_model(folder / "text", "dense"), device="cpu")
    towers = {"text": [text[0], Pooling(32)], "audio": [Transformer(str(folder / "ast")), Pooling(32)]}
    router = Router(towers, route_mappings={(None, name): name for name in towers})
    st.SentenceTransformer(modules=[router, Normalize()], device="cpu").save(str(folder / "model"))
    return str(folder / "model")


@pytest.fixture
def sounds(tmp_path):
    """A corpus of tones, one of them with a text."""
    for i in range(6):
        (tmp_path / f"{i}.wav").write_bytes(wav(200 * (i + 1), 2000 + 500 * i))
    rows = [{"id": str(i), "audio": f"{i}.wav", **({"text": "a tone"} if i == 2 else {})} for i in range(6)]
    write_jsonl(tmp_path / "corpus.jsonl", rows)
    return tmp_path / "corpus.jsonl"


def test_sounds_go_from_a_corpus_into_an_index_and_are_found(audio, ears, sounds, tmp_path):
    corpus = Corpus(sounds)
    assert corpus[2] == Passage("2", "a tone", media={"audio": str(tmp_path / "2.wav")})
    encoder = load_encoder(ears, device="cpu")
    assert encoder.spec.inputs == "audio" and encoder.takes == {"text", "audio"}
    assert '"num_mel_bins": 16' in encoder.spec.image_processor
    FlatIndex.build(corpus, tmp_path / "index", encoder, "float32", passages_per_shard=4)
    index = open_index(tmp_path / "index", device="cpu")
    tone = Item((tmp_path / "4.wav").read_bytes(), modality="audio")
    by_sound, by_file, by_text = index.search(
        [tone, Item(corpus[1].media["audio"], modality="audio"), "tone"], 6
    )
    assert by_sound[0].passage.id == "4" and by_sound[0].score == pytest.approx(1, abs=1e-5)
    assert by_file[0].passage.id == "1" and len(by_text) == 6
    theirs = encoder._model.encode([{"audio": read_wav(tone.image)}])
    assert float(similarities(theirs, encoder.encode([tone], "query")).min()) == pytest.approx(1, abs=1e-5)


def test_training_opens_sounds(audio, ears, sounds):
    from retriever_server.encoders.loading import load_model
    from retriever_server.training.trainer import ImageCollator

    model = load_model(ears)
    tones = [Item(str(sounds.parent / f"{i}.wav"), modality="audio") for i in range(2)]
    features = ImageCollator(model)(tones)
    assert features["input_values"].shape == (2, 32, 16)
    assert "input_ids" in ImageCollator(model)(["a tone", "two"])
    with pytest.raises(DataError, match=r"nowhere\.wav: no sound"):
        ImageCollator(model)([Item("nowhere.wav", modality="audio")])


@pytest.mark.slow
def test_a_recipe_trains_on_sounds_and_what_it_saves_encodes_them(audio, ears, sounds, tmp_path):
    from retriever_server.training.run import train

    rows = [{"query": f"tone {i}", "positives": [str(i)]} for i in range(6)]
    write_jsonl(tmp_path / "examples.jsonl", rows)
    model = component("pretrained", base=ears)
    train(recipe(tmp_path, tmp_path / "run", model=model, inputs="audio", steps=2, batch_size=3, workers=2))
    trained = load_encoder(str(tmp_path / "run" / "model"), device="cpu")
    assert trained.spec.inputs == "audio" and trained.spec.fingerprint != load_encoder(ears).spec.fingerprint


def test_a_broken_sound_stops_a_build_by_name_or_is_skipped(audio, ears, sounds, tmp_path):
    (tmp_path / "3.wav").write_bytes(b"RIFF")
    encoder = load_encoder(ears, device="cpu")
    with pytest.raises(DataError, match=r"passage '3': .*3\.wav: no sound"):
        FlatIndex.build(Corpus(sounds), tmp_path / "index", encoder)
    index = FlatIndex.build(Corpus(sounds), tmp_path / "index", encoder, on_error="skip")
    assert len(index.skipped) == 1


def test_items_and_specs_name_their_modality(audio):
    item = Item("a.wav", "a tone", "audio")
    assert input_kind(item) == "text+audio" and input_kind(Item("a.wav", modality="audio")) == "audio"
    both = EncodingSpec("m", "dense", "f", 4, inputs="text+audio")
    heard = Passage("1", "a tone", image="a.png", media={"audio": "a.wav"})
    assert both.render(heard) == item and both.render(Passage("2", "still")) == "still"
    alone = EncodingSpec("m", "dense", "f", 4, inputs="audio")
    assert alone.render(heard) == Item("a.wav", modality="audio")
    with pytest.raises(DataError, match="passage '2' has no audio, and m encodes nothing else"):
        alone.render(Passage("2", "still", image="a.png"))
    with pytest.raises(DataError, match="bm25: reads text only, a query with audio was given"):
        texts_of([item], "bm25")
    with pytest.raises(DataError, match="a query of audio: a server is asked with texts and images"):
        with_image_bytes(item)


def test_what_nobody_registered_is_refused_by_name(audio, sounds, monkeypatch):
    corpus = Corpus(sounds)
    monkeypatch.setattr(modalities, "_KNOWN", {"image": modalities._KNOWN["image"]})
    with pytest.raises(CorpusChanged, match='passage 0: neither "contents" nor "text" nor "image"'):
        corpus[0]
    with pytest.raises(
        ConfigError, match=r"inputs 'audio': must be one of text, image, text\+image \(data.pages.mod"
    ):
        EncodingSpec("m", "dense", "f", 4, inputs="audio")
    with pytest.raises(ConfigError, match="modality = 'audio': must be one of image"):
        modalities.read(Item("a.wav", modality="audio"))
    for name in ("image", "text", "text+audio"):
        with pytest.raises(ConfigError, match=f"modality = {name!r}".replace("+", r"\+")):
            modalities.register(name, read_wav)


def test_a_package_that_is_installed_registers_its_own(tmp_path):
    (tmp_path / "smells.py").write_text(
        "from data.pages.modalities import register\nregister('smell', bytes)\n"
    )
    info = tmp_path / "smells-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: smells\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[sleuth.modalities]\nsmell = smells\n")
    show = "from data.pages.modalities import kinds; print(*kinds())"
    code = f"import sys; sys.path.append({str(tmp_path)!r}); {show}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["text", "image", "text+image", "smell", "text+smell"]


def test_specs_of_texts_and_images_keep_their_hashes():
    spec = EncodingSpec("m", "dense", "f", 4)
    seen = EncodingSpec("m", "dense", "f", 4, inputs="image", image_processor="P {}")
    assert (spec.hash, seen.hash) == ("f19db6199f171943", "f63f8493a6c2c026")
