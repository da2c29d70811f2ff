"""Configuration of a synthesis: frozen dataclasses, whose field docstrings are the help."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from data.errors import ConfigError, require, require_range, require_template
from retriever_server.training.recipe import Component

Shared = Literal["nothing", "passages", "all"]


@dataclass(frozen=True)
class EvaluationSet:
    """A test collection that will judge what is trained."""

    queries: str
    """JSON lines or table of questions."""
    qrels: str | None = None
    """Judgements: relevant passages are held out, too."""
    corpus: str | None = None
    """Passages that the qrels name; those that queries are written for, if not given."""


@dataclass(frozen=True)
class LabelRules:
    """The choice of positives and negatives. Without a believed judge the seed passage stays the positive."""

    positive: Literal["seed", "best"] = "seed"
    """The passage that the query was written for, or the best candidate by the fused judges (FRet's p1)."""
    negative: Literal["none", "far", "sampled", "ranks", "written"] = "none"
    """none; far: the worst of the candidates (FRet's p20); sampled: any of them; ranks: from `first_rank` of
    the retriever on (ReasonIR); written by the generator."""
    negatives: int = 1
    """The most that an example gets."""
    first_rank: int = 20
    """Rank from which `ranks` takes them."""

    def __post_init__(self) -> None:
        require_range(self, "labels.", ">= 1", "negatives", "first_rank")


@dataclass(frozen=True)
class SynthesisConfig:
    """Everything that decides what is written, and what of it is kept."""

    recipe: str
    """e5, fret, reasonir, reasonir_length, reasonir_written, qwen3, promptagator, doc2query, or one of your
    own `prompts`."""
    generator: Component
    """class_path and init_args of what writes: Chat, Local, Seq2Seq, AtlasTemplates, Scripted, module.Class;
    one argument by `--generator.init_args.url URL`."""
    corpus: str | None = None
    """JSON lines of passages; e5 does without."""
    out: str = "runs/synthesis"
    """Folder of the stages; OUT/examples.jsonl is what training reads."""
    limit: int | None = None
    """Queries to write, from passages in random order; all if not given. A larger one later goes on."""
    per_passage: int = 1
    """Queries for each passage."""
    least_characters: int = 50
    """Shorter passages get no query."""
    most_characters: int = 2000
    """Longer passages are cut in prompts."""
    pattern: str | None = None
    """Only passages in which this regular expression is found, such as because|therefore."""
    prompts: str | None = None
    """A file of recipes in the form of synthesis/recipes.yaml."""
    shots: str | None = None
    """JSON lines of {query, passage}: examples of the target task, for promptagator."""
    choices: dict[str, Any] = field(default_factory=dict)
    """Values to draw from, in place of the recipe's: {language: [German, French]}."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """temperature, top_p, max_tokens, stop: in place of the recipe's."""
    tasks: int = 2
    """e5: calls for each kind of task that brainstorm tasks."""
    retriever: str | None = None
    """Retriever of candidates: folder of an index, URL or YAML file; BM25 of the corpus if not given."""
    candidates: int = 20
    """Candidates of each query that are judged; 0: none are looked for."""
    judges: list[Component] = field(default_factory=list)
    """class_path and init_args: QueryLikelihood, Relevance, CrossEncoder, YesNo, ChatJudge. Fused by rank."""
    answer_gain: Component | None = None
    """AnswerGain, for the filter `answerable`: does the passage make the given answer likelier?"""
    measured: str | None = None
    """The judges.json of a --measure_judges; that of OUT if not given."""
    least_auc: float = 0.7
    """A judge measured below this is left out of the fusion."""
    labels: LabelRules = field(default_factory=LabelRules)
    filters: dict[str, Any] = field(default_factory=dict)
    """Filter -> its options, in their order (docs/synthesis.md lists them)."""
    evaluation: list[EvaluationSet] = field(default_factory=list)
    """Held out: no query asks what they ask, no positive is gold there."""
    shared: Shared = "nothing"
    """Parts that may be shared with evaluation sets: nothing, passages (gold ones), all."""
    query_template: str = "{query}"
    """The query as it is trained, of {query} and {task}: "Instruct: {task}\\nQuery: {query}"."""
    expansion: bool = False
    """Write OUT/expanded.jsonl, too: the corpus with the kept queries in metadata.expansion."""
    batch: int = 64
    """Calls at once; a killed run goes on after the last whole batch."""
    least_usable: float = 0.02
    """Stop where fewer of the texts, after the first 200, can be read and are different."""
    seed: int = 0
    dry_run: bool = False
    """Print three filled prompts and the calls and tokens to expect; ask nothing."""
    measure_judges: str | None = None
    """Qrels: say how well the judges know the gold passages of `queries`; writes OUT/judges.json alone."""
    queries: str | None = None
    """Questions of measure_judges; metadata.kind names their kind."""
    distractors: int = 7
    """Passages beside gold in measure_judges."""

    def __post_init__(self) -> None:
        require_range(self, "", ">= 1", "per_passage", "batch", "tasks", "distractors")
        require_range(self, "", ">= 0", "candidates")
        require_range(self, "", "in [0, 1]", "least_auc")
        require(self.limit is None or self.limit >= 1, "limit", self.limit, ">= 1")
        require(0 <= self.least_usable < 1, "least_usable", self.least_usable, "in [0, 1)")
        together = (self.measure_judges is None) == (self.queries is None)
        require(together, "queries", self.queries, "given together with measure_judges")
        found = self.filters.get("round_trip", {"k": 0})
        k = found.get("k", 1) if isinstance(found, dict) else 1
        within = not isinstance(k, int) or k <= self.candidates  # what it is else, its filter refuses
        require(within, "filters.round_trip.k", k, f"<= candidates ({self.candidates})")
        ranks = self.labels.negative == "ranks"
        enough = not ranks or self.labels.first_rank <= self.candidates
        require(enough, "labels.first_rank", self.labels.first_rank, f"<= candidates ({self.candidates})")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ConfigError(f"pattern = {self.pattern!r}: {error}") from None
        require_template(self.query_template, "query_template", "task")
