"""`sleuth merge`: several trained versions of a model in one, by spherical interpolation of their weights."""

from __future__ import annotations

from data.text import counted


def main(models: list[str], out: str, weights: list[float] | None = None) -> None:
    """Merge folders of the same model, trained differently, into the folder OUT (slerp).

    Args:
        models: Two or more folders of models: '[A, B]'.
        out: Folder for the merged model.
        weights: One a model, '[2, 1]'; all equal if not given.
    """
    from retriever_server.training.merge import merge

    merge(models, out, weights)
    print(f"merged {counted(len(models), 'model')} in {out}")
