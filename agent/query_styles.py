"""Text that a retriever is asked: the policy's query alone, or with the question and the earlier queries.

Training data of a retriever (`rl.co_training.examples`) and searches of an agent are rendered by the same
functions, so that a retriever is asked in the words that it learned from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


def query_alone(question: str, history: Sequence[str], query: str) -> str:
    """Return the query as the policy wrote it."""
    return query


def question_and_query(question: str, history: Sequence[str], query: str) -> str:
    """Return the question, [SEP], the query (Agentic-R, 2601.11888)."""
    return f"{question} [SEP] {query}"


def with_history(question: str, history: Sequence[str], query: str) -> str:
    """Return the question, the query and the numbered earlier queries (ITER, 2608.27912)."""
    earlier = "".join(f"\n{number}. {asked}" for number, asked in enumerate(history, start=1))
    return f"Question: {question}\nQuery: {query}" + (f"\nEarlier queries:{earlier}" if earlier else "")


QUERY_STYLES: dict[str, Callable[[str, Sequence[str], str], str]] = {
    "query": query_alone,
    "question": question_and_query,
    "history": with_history,
}
