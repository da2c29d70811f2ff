"""The rows of `scripts.bench.retrievers`: model, loss, examples, steps, and what each is held against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.records import Question
from data.settings import LoraConfig
from retriever_server.retriever import Retriever
from retriever_server.training.recipe import Component
from scripts.bench.retriever_notes import sparsity
from scripts.bench.retriever_peer import peer_model, speed
from scripts.bench.retriever_world import COLLECTIONS, Row, Training, Work, minilm, smollm2

Make = Callable[[Work, str], Retriever]
SMALL = tuple(f"{name}-small" for name in COLLECTIONS)
TOKENS = 96
"""Tokens of passages, for tiny models."""
ROWS: dict[str, Row] = {}


# ---- losses and models -------------------------------------------------------------------------------


def part(class_path: str, init_args: dict[str, Any] | None = None) -> Component:
    """A model or a loss of a recipe."""
    return {"class_path": class_path, "init_args": init_args or {}}


def contrast(temperature: float = 0.05, similarity: str = "cosine", distill: float = 0.0) -> Component:
    """InfoNCE in the batch, and so much of KL to the teacher's scores."""
    given = {"similarity": similarity, "temperature": temperature, "distill_weight": distill}
    return part("ContrastiveDistillation", given)


def tiny(work: Work, builder: str, decoder: bool = False, **options: Any) -> Component:
    """A builder over a tiny random transformer."""
    return part(builder, {"base": work.base(decoder), **options})


def dense(work: Work, examples: str = "pairs", loss: Component | None = None, **more: Any) -> Training:
    """The tiny dense model that the comparisons of data and losses share."""
    model = tiny(work, "dense", pooling="mean", max_tokens=TOKENS)
    return Training(model, loss or contrast(), examples, **more)


def after(work: Work, name: str, steps: Callable[[Work], Training], **options: Any) -> Component:
    """The model that another training ended with."""
    return part("pretrained", {"base": str(work.trained(name, steps(work))), **options})


# ---- trainings ---------------------------------------------------------------------------------------


def dpr(work: Work) -> Training:
    """Two towers, in-batch and BM25 negatives."""
    negatives(work)
    model = tiny(work, "two_towers", pooling="mean", normalise=True, max_tokens=TOKENS)
    return Training(model, contrast(), "pairs_bm25", 200, 48, data={"negatives": 1})


def splade(work: Work) -> Training:
    """Begin with a head that was warmed up."""
    loss = part("splade_loss", {"passage_weight": 3e-3, "query_weight": 3e-3})
    model = part("splade", {"base": work.warmed_up(), "max_tokens": TOKENS})
    return Training(model, loss, options={"save_every": 60, "keep": 10})


def unicoil(work: Work) -> Training:
    """One weight a token."""
    return Training(tiny(work, "unicoil", max_tokens=TOKENS), contrast(1.0, "dot"))


def deepimpact(work: Work) -> Training:
    """An impact for each term of a passage."""
    return Training(tiny(work, "deepimpact", max_tokens=TOKENS), contrast(1.0, "dot"))


def colbert(work: Work) -> Training:
    """Late interaction."""
    model = tiny(work, "colbert", dimension=32, query_tokens=32, passage_tokens=TOKENS)
    return Training(model, contrast(1.0, "maxsim"), steps=200, batch_size=32)


def m3(work: Work) -> Training:
    """BGE-M3's three heads, taught by their ensemble."""
    return Training(
        tiny(work, "m3", dimension=32, max_tokens=TOKENS), part("M3Loss"), steps=200, batch_size=32
    )


def head(kind: str) -> Make:
    """One of the three encoders of `m3`."""
    return lambda work, on: work.encoded(work.trained("m3", m3(work)) / kind, on, f"m3-{kind}")


def cross_encoder(work: Work) -> Training:
    """Pairs with BM25 negatives, right or wrong."""
    negatives(work)
    data = {"negatives": 4, "form": "pair"}
    options = {"passage_template": "{contents}"}
    model = tiny(work, "cross_encoder", max_tokens=TOKENS + 32)
    return Training(model, part("BinaryCrossEntropyLoss"), "pairs_bm25", 400, 64, 1e-3, options, data)


def decoder(work: Work, two_way: bool, dropout: float = 0.0) -> Component:
    """A tiny decoder, mean pooling."""
    return tiny(work, "decoder", True, pooling="mean", two_way=two_way, dropout=dropout, max_tokens=TOKENS)


def causal(work: Work) -> Training:
    """A decoder that sees what came before."""
    return Training(decoder(work, False), contrast())


def two_way(work: Work) -> Training:
    """The same with two-way attention."""
    return Training(decoder(work, True), contrast())


TEXTS: dict[str, Any] = {"form": "text"}
ALONE = {"no_duplicates": False}


def mntp(work: Work) -> Training:
    """LLM2Vec's first step."""
    loss = part("MaskedNextToken", {"mask_token": "<|mask|>"})
    return Training(decoder(work, True), loss, None, 300, 64, options=ALONE, data=TEXTS)


def simcse(work: Work) -> Training:
    """LLM2Vec's second step."""
    base = str(work.trained("llm2vec-mntp", mntp(work)))
    given = {"base": base, "pooling": "mean", "two_way": True, "dropout": 0.5, "max_tokens": 24}
    return Training(part("decoder", given), part("SimCSE"), None, 300, 64, 1e-3, ALONE, TEXTS)


def supervised(work: Work) -> Training:
    """LLM2Vec's last step."""
    return Training(after(work, "llm2vec-simcse", simcse, max_tokens=TOKENS), contrast())


def squad_dense(examples: str, negatives: int = 0) -> Callable[[Work], Training]:
    """In-batch negatives, and so many hard ones."""

    def of(work: Work) -> Training:
        taught(work)
        return dense(work, examples, steps=200, batch_size=32, data={"negatives": negatives})

    return of


def distilled(work: Work) -> Training:
    """The same, with MiniLM's scores."""
    taught(work)
    loss = part("ContrastiveDistillation", {"temperature": 0.05, "teacher_temperature": 0.05})
    data = {"negatives": 3, "labels": True}
    return dense(work, "squad_taught", loss, steps=200, batch_size=32, data=data)


def single_teacher(number: int) -> Callable[[Work], Training]:
    """On the labels of one teacher alone."""

    def of(work: Work) -> Training:
        dragon_labels(work)
        return dense(work, f"dragon/teacher_{number}", steps=240, data={"negatives": 1, "draws": 3})

    return of


def dragon(stage: int) -> Callable[[Work], Training]:
    """On the labels of the first teachers, after the stage before."""

    def of(work: Work) -> Training:
        dragon_labels(work)
        training = dense(work, f"dragon/stage_{stage}", steps=80, data={"negatives": 1, "draws": 3})
        if stage == 1:
            return training
        return replace(training, model=after(work, f"dragon-{stage - 1}", dragon(stage - 1)))

    return of


def tuned_minilm(work: Work) -> Training:
    """MiniLM, trained further on questions about other passages than dev's."""
    model = part("pretrained", {"base": minilm()})
    return Training(model, contrast(), "pairs", 200, 32, 3e-5, {"save_every": 50})


def squad_minilm(work: Work) -> Training:
    """The same on all of squad's training questions, with BM25 negatives, and on sentences."""
    work.mined("squad_train_bm25", work.squad_train(), "squad", work.bm25("squad"), 3)
    work.squad_pairs(sentences=True)
    data = ({"negatives": 1, "draws": 3, "weight": 0.75}, {"weight": 0.25})
    options, sets = {"save_every": 50, "precision": "bfloat16"}, ("squad_train_bm25", "sentence_pairs")
    model = part("pretrained", {"base": minilm()})
    return Training(model, contrast(), sets, 600, 16, 5e-5, options, data)


def late_minilm(work: Work) -> Training:
    """MiniLM's token vectors as they are, compared by MaxSim, trained on what `squad_minilm` sees."""
    given = {"base": minilm(), "dimension": None, "query_tokens": None, "passage_tokens": 256}
    same, loss = squad_minilm(work), contrast(0.5, "maxsim")
    model = part("colbert", {**given, "query_prompt": "", "passage_prompt": ""})
    return replace(same, model=model, loss=loss, steps=100, learning_rate=2e-5)


def repllama(work: Work) -> Training:
    """SmolLM2 with LoRA, EOS pooling."""
    model = part("decoder", {
        "base": smollm2(), "pooling": "eos", "query_prompt": "query: ", "passage_prompt": "passage: ",
        "max_tokens": TOKENS,
    })  # fmt: skip
    negatives(work)
    options = {"lora": LoraConfig(rank=16, alpha=32), "save_every": 25, "precision": "bfloat16"}
    data = {"negatives": 1}
    return Training(model, contrast(0.02), "pairs_bm25", 200, 16, 3e-4, options, data)


def smollm2_pooled(two_way: bool) -> Callable[[Work], Training]:
    """SmolLM2 with mean pooling, and MNTP by LoRA to learn to see both ways."""

    def of(work: Work) -> Training:
        given = {"base": smollm2(), "pooling": "mean", "two_way": two_way, "max_tokens": TOKENS}
        options = {"lora": LoraConfig(rank=16, alpha=32), "save_every": 25, "precision": "bfloat16", **ALONE}
        loss = part("MaskedNextToken", {"mask_token": "_"})
        return Training(part("decoder", given), loss, None, 200, 16, 5e-4, options, TEXTS)

    return of


def promptreps(representation: str) -> Callable[[Work], Training]:
    """SmolLM2 as it is."""

    def of(work: Work) -> Training:
        given = {"base": smollm2(), "representation": representation, "max_tokens": 64 + TOKENS}
        return Training(part("promptreps", given), contrast())

    return of


# ---- examples ----------------------------------------------------------------------------------------


def negatives(work: Work) -> None:
    """pairs_bm25: the pairs with hard negatives of BM25."""
    work.mined("pairs_bm25", work.pairs(), "train", work.bm25("train"), 4)


def taught(work: Work) -> None:
    """squad_bm25 and squad_taught: squad's pairs with negatives of BM25, and of MiniLM with its scores."""
    work.mined("squad_bm25", work.squad_pairs(), "squad", work.bm25("squad"), 3)
    work.mined("squad_taught", work.squad_pairs(), "squad", frozen(work, "squad"), 3)


def dragon_labels(work: Work) -> None:
    """dragon/: crops of squad's passages, labelled by BM25, MiniLM and the tiny SPLADE."""
    from retriever_server.training.teachers import crops, label

    teachers = [work.bm25("squad"), frozen(work, "squad"), learned("splade", splade)(work, "squad")]
    queries = [Question(each.query_id, each.query, ()) for each in crops(work.corpus("squad"))]
    label(queries, teachers, work.corpus("squad"), work.folder / "examples" / "dragon")


# ---- retrievers --------------------------------------------------------------------------------------


def learned(name: str, training: Callable[[Work], Training], **options: Any) -> Make:
    """A trained encoder over a collection; options: of how it is loaded."""
    return lambda work, on: work.encoded(work.trained(name, training(work)), on, name, **options)


def untrained(name: str, training: Callable[[Work], Training]) -> Make:
    """Return the retriever of the model that the training starts from."""
    return lambda work, on: work.encoded(work.untrained(name, training(work)), on, f"untrained-{name}")


def frozen(work: Work, on: str) -> Retriever:
    """MiniLM as it is."""
    return work.encoded(minilm(), on, "minilm")


def late(trained: bool) -> Make:
    """MiniLM under MaxSim; its vectors are computed in bfloat16."""

    def make(work: Work, on: str) -> Retriever:
        of = work.trained if trained else work.untrained
        tag = "minilm-late" if trained else "untrained-minilm-late"
        return work.encoded(of("minilm-late", late_minilm(work)), on, tag, dtype="bfloat16")

    return make


def reranked(folder: Callable[[Work], Path]) -> Make:
    """BM25's first 20, ordered by a cross-encoder."""

    def make(work: Work, on: str) -> Retriever:
        from retriever_server.retrievers.rerank import CrossEncoder, Rerank

        return Rerank(work.bm25(on), CrossEncoder(str(folder(work))), depth=20)

    return make


def fused(*parts: Make) -> Make:
    """The convex sum of several."""

    def make(work: Work, on: str) -> Retriever:
        from retriever_server.retrievers.fuse import Fuse

        return Fuse([part(work, on) for part in parts], "convex", normalize="min-max")

    return make


def row(name: str, make: Make, table: str = "b", against: tuple[str, ...] = (), **more: Any) -> None:
    """Add a row to the table."""
    ROWS[name] = Row(table, make, against=against, **more)


def trains(name: str, training: Callable[[Work], Training], *against: str, **more: Any) -> None:
    """Add a trained encoder, its untrained control, and other rows to hold it against."""
    row(f"untrained-{name}", untrained(name, training))
    row(name, learned(name, training), against=(f"untrained-{name}", *against), **more)


# ---- the tables --------------------------------------------------------------------------------------

row("bm25", lambda work, on: work.bm25(on), "a", on=COLLECTIONS)
row("minilm", frozen, "a", ("bm25",), on=COLLECTIONS)
for _name, _tuned in {"minilm-tuned": tuned_minilm, "minilm-squad": squad_minilm}.items():
    row(_name, learned(_name, _tuned), "a", ("minilm", "bm25"), on=COLLECTIONS)
_others = ("minilm", "bm25")
row("untrained-minilm-late", late(False), "a", _others, on=COLLECTIONS)
row("minilm-late", late(True), "a", ("untrained-minilm-late", *_others), on=COLLECTIONS)

trains("dense", lambda work: dense(work))
trains("dpr", dpr)
trains("splade", splade, note=lambda work: sparsity(work, work.recipe("splade", splade(work))))
trains("unicoil", unicoil)
trains("deepimpact", deepimpact)
trains("colbert", colbert, "dense")
row("untrained-cross-encoder", reranked(lambda work: work.untrained("cross-encoder", cross_encoder(work))))
_made = reranked(lambda work: work.trained("cross-encoder", cross_encoder(work)))
row("cross-encoder", _made, against=("untrained-cross-encoder", "bm25"))
trains("causal", causal)
trains("two-way", two_way, "causal")
trains("llm2vec-mntp", mntp)
row("llm2vec-simcse", learned("llm2vec-simcse", simcse), against=("untrained-llm2vec-mntp", "llm2vec-mntp"))
row(
    "llm2vec", learned("llm2vec", supervised), against=("untrained-llm2vec-mntp", "llm2vec-simcse", "two-way")
)
row("no-negatives", learned("no-negatives", squad_dense("squad_taught")))
row("bm25-negatives", learned("bm25-negatives", squad_dense("squad_bm25", 3)), against=("no-negatives",))
row(
    "minilm-negatives",
    learned("minilm-negatives", squad_dense("squad_taught", 3)),
    against=("no-negatives", "bm25-negatives"),
)
row("distilled", learned("distilled", distilled), against=("minilm-negatives", "no-negatives"))
for _number, _teacher in enumerate(("bm25", "minilm", "splade"), start=1):
    row(f"taught-by-{_teacher}", learned(f"taught-by-{_teacher}", single_teacher(_number)))
row(
    "dragon",
    learned("dragon-3", dragon(3)),
    against=("taught-by-bm25", "taught-by-minilm", "taught-by-splade"),
)
_parts = (learned("dense", lambda work: dense(work)), learned("splade", splade))
row("dense+splade", fused(*_parts), against=("dense", "splade"))
row("dense+bm25", fused(_parts[0], lambda work, on: work.bm25(on)), against=("dense", "bm25"))

for _kind in ("dense", "sparse", "multi"):
    row(f"m3-{_kind}", head(_kind))
row("m3", fused(*map(head, ("dense", "sparse", "multi"))), against=("m3-dense", "m3-sparse", "m3-multi"))

row("bm25-small", lambda work, on: work.bm25(on), "c", on=SMALL)
row("minilm-small", frozen, "c", ("bm25-small",), on=SMALL)
row(
    "minilm-tuned-small", learned("minilm-tuned", tuned_minilm), "c", ("minilm-small", "bm25-small"), on=SMALL
)
for _kind in ("dense", "sparse"):
    _made = untrained(f"promptreps-{_kind}", promptreps(_kind))
    row(f"promptreps-{_kind}", _made, "c", ("bm25-small",), on=SMALL)
_parts = tuple(untrained(f"promptreps-{kind}", promptreps(kind)) for kind in ("dense", "sparse"))
row("promptreps-hybrid", fused(*_parts), "c", ("promptreps-dense", "promptreps-sparse"), on=SMALL)
_loaded = learned("repllama", repllama, dtype="bfloat16")
row("untrained-repllama", untrained("repllama", repllama), "c", on=SMALL)
row("repllama", _loaded, "c", ("untrained-repllama", "bm25-small"), on=SMALL)
row("smollm2-causal", untrained("smollm2-causal", smollm2_pooled(False)), "c", on=SMALL)
_both = ("squad", *SMALL)
row("smollm2-two-way", untrained("smollm2-two-way", smollm2_pooled(True)), "c", on=_both)
_loaded = learned("smollm2-mntp", smollm2_pooled(True))
row("smollm2-mntp", _loaded, "c", ("smollm2-two-way", "smollm2-causal"), on=_both)

row("sentence-transformers", peer_model("plain"), "peer")
row("ours", peer_model("ours"), "peer", ("sentence-transformers",), note=speed)
