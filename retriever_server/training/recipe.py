"""The recipe of a retriever's training: frozen dataclasses, whose field docstrings are the help.

Nothing heavy is imported here, so that a wrong key is refused before any model loads. Models and losses
go by class_path and init_args; a name without a dot is looked up in `training/builders` and
`training/losses`, and among the losses of sentence-transformers for that kind of model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from data.errors import require, require_range
from data.settings import LoraConfig, WandbConfig
from retriever_server.encoders.spec import EncodingSpec

Component = dict[str, Any]
"""{class_path: a name, init_args: {...}}; an argument may be such a mapping again."""


@dataclass(frozen=True)
class DataConfig:
    """One set of examples (docs/training-retrievers.md has the format)."""

    corpus: str
    """The passages that the ids name."""
    examples: str | None = None
    """JSON lines of {query, positives, negatives, scores}, by id; none where form is text."""
    negatives: int = 0
    """Hard negatives a query; random passages where an example has too few."""
    labels: bool = False
    """Hand the teacher's scores to the loss; examples without are left out."""
    labels_of: Literal["teacher", "any"] = "teacher"
    """Source of the scores: a teacher alone, or any, also those of the retriever that mined the negatives."""
    weights: bool = False
    """Hand the loss (WeightedInfoNCE) the weights that `sleuth mine --trajectories` gave examples and
    negatives; 1 where an example says none."""
    form: Literal["tuple", "pair", "list", "text"] = "tuple"
    """Columns: query, positive, negatives; query, passage, label; query, passages, labels; a text."""
    draws: int = 1
    """Times that an example comes up in an epoch, with other positives and negatives each time."""
    weight: float = 1.0
    """Share of batches, among several sets."""
    shares: dict[str, float] = field(default_factory=dict)
    """Within the set: weights of kinds of pairs, such as {"text > image": 2, "text > text": 1}; by their
    number if not given. A batch holds one kind alone."""
    query_prompt: str | None = None
    """Put before the queries of this set while training; the model's own if not given."""
    on_error: Literal["stop", "skip"] = "stop"
    """stop at a wrong example, or skip it."""

    def __post_init__(self) -> None:
        given = (self.examples is None) == (self.form == "text")
        require(given, "train.examples", self.examples, "a file, or none where form is text")
        alone = not self.weights or (self.form == "tuple" and not self.labels)
        require(alone, "train.weights", self.weights, "false, unless form is tuple and labels is false")
        require(self.negatives >= 0, "train.negatives", self.negatives, ">= 0")
        require(self.draws >= 1, "train.draws", self.draws, ">= 1")
        require(self.weight > 0, "train.weight", self.weight, "> 0")
        require(all(share > 0 for share in self.shares.values()), "train.shares", self.shares, "all > 0")


@dataclass(frozen=True)
class DevConfig:
    """The dev set that the model is scored on at every checkpoint; off without queries."""

    queries: str | None = None
    """JSON lines or table of queries, as for `sleuth evaluate-retriever`."""
    qrels: str | None = None
    """Judgements: the passages that are relevant to the queries."""
    corpus: str | None = None
    """Corpus that is searched; the first train corpus if not given."""
    metrics: str = "nDCG@10,recall@100,MRR@10"
    """Names of ir-measures; the first decides which checkpoint is best."""
    limit: int = 500
    """Queries used, the first ones."""
    shared: Literal["nothing", "passages", "all"] = "nothing"
    """Overlap allowed with the training examples: no question and no relevant passage, relevant passages
    alone, or questions, too. What is shared is refused: it is scored for having been learned by heart."""
    passages: int = 10_000
    """Size of the corpus searched: the relevant ones and others evenly drawn; 0: all."""

    def __post_init__(self) -> None:
        both = (self.queries is None) == (self.qrels is None)
        require(both, "dev.qrels", self.qrels, "given together with dev.queries")
        require(self.limit >= 1, "dev.limit", self.limit, ">= 1")
        require(self.passages >= 0, "dev.passages", self.passages, ">= 0")


@dataclass(frozen=True)
class RetrieverRecipe:
    """Everything that decides the training of a retriever or a reranker."""

    model: Component
    """class_path of what builds it (dense, two_towers, splade, colbert, cross_encoder, pretrained, ...) and
    init_args; one of these by `--model.init_args.base NAME`."""
    loss: Component
    """class_path of a loss of sentence-transformers or ours, and init_args; it gets the model."""
    train: list[DataConfig]
    """Sets of examples; a batch comes from one of them."""
    out: str = "runs/retriever"
    """Run folder; OUT/model is the trained model."""
    passage_template: str = "{title}\n{text}"
    """The text of a passage, from {title}, {text} and {contents}; saved with the model."""
    inputs: str | None = None
    """Part of a passage that is encoded: text, image, or what it has of both (text+image; or of another
    registered modality); saved with the model. If not given the image where the model reads images."""
    steps: int | None = None
    """Updates; by `epochs` if not given."""
    epochs: float = 1.0
    """Passes over the examples."""
    batch_size: int = 32
    """Examples a process and micro-batch: the in-batch negatives."""
    accumulate: int = 1
    """Micro-batches an update. Adds no in-batch negatives: for these take a Cached... loss."""
    learning_rate: float = 2e-5
    """Peak."""
    warmup: float = 0.1
    """Share of the updates in which the learning rate rises."""
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    """Fall of the learning rate after the warm-up."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Longer gradients are shortened; 0: never."""
    matryoshka: list[int] = field(default_factory=list)
    """Dimensions whose prefixes of a vector are trained, too, such as [256, 128, 64]."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the computation; weights stay as the builder loads them."""
    gradient_checkpointing: bool = False
    """Compute activations again instead of keeping them."""
    sharding: Literal["none", "fsdp"] = "none"
    """fsdp: divide weights, gradients and the optimiser's state over the processes (FSDP2)."""
    no_duplicates: bool = True
    """No text twice in a batch of all processes, where it would be its own negative."""
    serves: str | None = None
    """Folder of the index that this model is to replace: prompts, pooling and the rest must be its own."""
    dev: DevConfig = field(default_factory=DevConfig)
    save_every: int = 500
    """Updates between checkpoints, and between scores on dev."""
    keep: int = 2
    """Checkpoints kept beside the best."""
    export: Literal["best", "last"] = "best"
    """The checkpoint that becomes OUT/model; best by the first dev metric, the last without dev."""
    log_every: int = 10
    """Updates between lines of metrics."""
    seed: int = 0
    """Seed of new weights, of the order of examples and of dropout."""
    workers: int = 0
    """Processes that read, decode and tokenise batches ahead; 0: the training one does it in between."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    wandb: WandbConfig = field(default_factory=WandbConfig)
    resume: bool = False
    """Go on although the configuration has changed. The same one goes on by itself."""

    def __post_init__(self) -> None:
        require(len(self.train) >= 1, "train", self.train, "a list of at least one set of examples")
        require_range(self, "", ">= 1", "batch_size", "accumulate", "save_every", "keep", "log_every")
        require_range(self, "", "> 0", "epochs", "learning_rate")
        require_range(self, "", ">= 0", "weight_decay", "max_grad_norm", "workers")
        require(self.steps is None or self.steps >= 1, "steps", self.steps, ">= 1")
        # One process alone would score, with its share of the weights.
        scored = self.sharding == "fsdp" and self.dev.queries is not None
        require(not scored, "sharding", self.sharding, "none with dev.queries (score OUT/model afterwards)")
        require(0 <= self.warmup < 1, "warmup", self.warmup, "in [0, 1)")
        require(all(size >= 1 for size in self.matryoshka), "matryoshka", self.matryoshka, "sizes >= 1")
        require(0 <= self.seed < 2**32, "seed", self.seed, "in [0, 2**32)")
        EncodingSpec("template", "dense", "", 1, passage_template=self.passage_template)  # it can be rendered
