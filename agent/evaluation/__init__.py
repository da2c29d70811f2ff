"""The evaluation of an agent: what is recorded of a question, scores, controls, comparisons, reports."""
