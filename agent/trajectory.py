"""The token ledger: what was put in front of the policy, what it wrote, what came back.

A trajectory is a list of segments. Token ids, loss mask and log-probs are read off the segments and
stored nowhere else, and no text is ever encoded again: the tokens sampled are the tokens trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from data.records import Hit, Question


class SegmentKind(StrEnum):
    """Writer of a span of tokens."""

    PROMPT = "prompt"
    POLICY = "policy"
    OBSERVATION = "observation"


class StopReason(StrEnum):
    """The reason why a trajectory ended."""

    ANSWERED = "answered"
    """The policy gave an answer."""
    TURN_LIMIT = "turn_limit"
    """The last allowed turn was no answer."""
    TOKEN_LIMIT = "token_limit"
    """The context has no room for another turn."""
    SEARCH_FAILED = "search_failed"
    """The retriever could not be reached; the trajectory stays out of the loss."""


@dataclass(frozen=True)
class Picture:
    """A picture among tokens. `source` names it as a passage's `image` does."""

    source: str
    start: int
    """Position of its first token."""
    tokens: int
    """Number of tokens that stand for it, the markup around it included."""


@dataclass(frozen=True)
class Segment:
    """One span of a trajectory. `text` is for people; training reads `token_ids` only."""

    kind: SegmentKind
    token_ids: list[int]
    text: str
    logprobs: Sequence[float | None] | None = None
    """Log-probs of the sampled tokens, in nats, as the sampler saw them; None unless POLICY, and for a token
    that was given instead of sampled."""
    weights_version: int = 0
    """Version of the weights that sampled its first token; no later one is of older weights."""
    pictures: tuple[Picture, ...] = ()
    """Pictures in it; `start` counts in this segment."""


@dataclass(frozen=True)
class SearchRecord:
    """One search: what was asked, what came back, how long it took, or why it failed."""

    query: str
    hits: list[Hit]
    seconds: float
    error: str | None = None
    turn: int = 0
    """The policy turn that asked, from 0: invalid turns count, too."""
    tool: str = "search"
    """The tool that was called; `query` is its argument."""


class Segments:
    """A list of segments, read as one row of tokens with pictures among them."""

    segments: list[Segment]

    @property
    def token_ids(self) -> list[int]:
        """All tokens in order, prompt first."""
        return [token for segment in self.segments for token in segment.token_ids]

    @property
    def pictures(self) -> list[Picture]:
        """All pictures in order; `start` counts in `token_ids`."""
        found, offset = [], 0
        for segment in self.segments:
            found += [replace(picture, start=offset + picture.start) for picture in segment.pictures]
            offset += len(segment.token_ids)
        return found


@dataclass(eq=False)
class Ledger(Segments):
    """A trajectory while it grows; a rollout that is given one goes on from there."""

    segments: list[Segment] = field(default_factory=list)
    searches: list[SearchRecord] = field(default_factory=list)

    @property
    def turns(self) -> int:
        """Turns that the policy has written."""
        return sum(segment.kind is SegmentKind.POLICY for segment in self.segments)

    def rewind(self) -> int:
        """Go back to the last observation, as a turn that has none is written again; return the turns."""
        if self.segments and self.segments[-1].kind is SegmentKind.POLICY:
            self.segments.pop()
        turns = self.turns
        self.searches[:] = [search for search in self.searches if search.turn < turns]
        return turns


@dataclass(frozen=True)
class Trajectory(Segments):
    """A finished rollout of one question."""

    question: Question
    segments: list[Segment]
    stop_reason: StopReason
    answer: str | None = None
    searches: list[SearchRecord] = field(default_factory=list)
    invalid_actions: int = 0
    valid_format: bool = False
    """Every policy turn is one well-formed action of the protocol, and the last one is an answer."""
    confidence: float | None = None
    """Confidence in the answer, in [0, 1], where the protocol asks for it and the policy states it."""
    seconds: float = field(default=0.0, compare=False)
    """Wall time; trajectories that run at once wait for each other."""

    @property
    def loss_mask(self) -> list[int]:
        """1 where the policy wrote the token, else 0; same length as `token_ids`."""
        return [
            int(segment.kind is SegmentKind.POLICY) for segment in self.segments for _ in segment.token_ids
        ]

    @property
    def logprobs(self) -> list[float | None]:
        """The sampler's log-prob of each token, None where none was sampled; same length as `token_ids`."""
        found: list[float | None] = []
        for segment in self.segments:
            sampled = segment.kind is SegmentKind.POLICY and segment.logprobs
            found += sampled or [None] * len(segment.token_ids)
        return found

    @property
    def counts(self) -> dict[str, int]:
        """Return what was done, in numbers; `valid_format` is 0 or 1."""
        sizes = [(segment.kind, len(segment.token_ids)) for segment in self.segments]
        return {
            "searches": len(self.searches),
            "valid_format": int(self.valid_format),
            "invalid_actions": self.invalid_actions,
            "policy_tokens": sum(size for kind, size in sizes if kind is SegmentKind.POLICY),
            "total_tokens": sum(size for _, size in sizes),
            "pictures": sum(len(segment.pictures) for segment in self.segments),
        }

    @property
    def policy_text(self) -> str:
        """Text of the policy, its turns joined; never a word of the prompt or of a passage."""
        return "".join(s.text for s in self.segments if s.kind is SegmentKind.POLICY)
