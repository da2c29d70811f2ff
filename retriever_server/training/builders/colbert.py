"""Late interaction over texts: a vector a token."""

from __future__ import annotations

import string
from typing import Any

from sentence_transformers.base.modules import Normalize
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from tokenizers import AddedToken

from retriever_server.encoders.spec import MULTI
from retriever_server.training.builders.dense import Base, assemble, load_transformer, projection


def colbert(
    base: Base,
    dimension: int | None = 128,
    query_tokens: int | None = 32,
    passage_tokens: int = 180,
    attend_to_expansion: bool = False,
    query_prompt: str = "[unused0] ",
    passage_prompt: str = "[unused1] ",
    skip_punctuation: bool = True,
    dtype: str = "float32",
) -> Any:
    """ColBERT: a vector of `dimension` a token, scored by MaxSim (Khattab and Zaharia 2020).

    Queries are filled up with mask tokens to `query_tokens`, or left as they are if it is None; passages are
    cut at `passage_tokens`, and their punctuation is not kept. dimension: None leaves the vectors of the
    base as wide as they are, without a projection that must be learned.
    """
    filled: Any = {"strategy": "fixed", "length": query_tokens, "attend": attend_to_expansion}
    expansion = filled if query_tokens else None
    transformer = load_transformer(
        base, None, dtype, query_expansion=expansion, query_length=query_tokens,
        document_length=passage_tokens,
    )  # fmt: skip
    known = transformer.tokenizer.get_vocab()
    # A vocabulary without BERT's spare words has no markers.
    prompts = [
        "" if text.startswith("[unused") and text.strip() not in known else text
        for text in (query_prompt, passage_prompt)
    ]
    markers = [text.strip() for text in prompts if text.strip() in known]
    whole = [AddedToken(each, normalized=False, special=True) for each in markers]  # or it falls to pieces
    transformer.tokenizer.add_tokens(whole, special_tokens=True)
    project = [] if dimension is None else [projection(transformer, dimension)]
    skipped = [sign for sign in string.punctuation if sign in known] if skip_punctuation else None
    modules: list[Any] = [transformer, *project, MultiVectorMask(skipped), Normalize("token_embeddings")]
    return assemble(MULTI, modules, prompts[0], prompts[1])
