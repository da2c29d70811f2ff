"""A paid web search as a retriever."""
