"""Tiny random models that read images, saved as those on the hub are: CLIP, ColPali, ColQwen2, Idefics3."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from data.records import Item

_SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_TEXT = {**_SMALL, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2}


def picture(seed: int, height: int = 40, width: int = 56) -> Item:
    """A picture of coarse noise, as the bytes of a PNG."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST).save(out, "PNG")
    return Item(out.getvalue())


def tokenizer(specials: dict[str, str], more: list[str], **options: Any) -> Any:
    """One token a byte, after the special ones, which are named, and `more` of them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*specials.values(), *more, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    options = {"model_max_length": 256, "additional_special_tokens": more, **options}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **specials, **options)


def tiny_clip(folder: Path) -> str:
    """A CLIPModel and its processor: two towers in one checkpoint, nothing of sentence-transformers."""
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    ends = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    texts = tokenizer({**ends, "pad_token": "!pad"}, [], model_max_length=32)
    begin, end = ends.values()
    texts.backend_tokenizer.post_processor = TemplateProcessing(
        f"{begin} $A {end}", special_tokens=[(begin, 0), (end, 1)]
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "vocab_size": len(texts)}
    config = CLIPConfig(
        text_config={**_SMALL, **ids, "max_position_embeddings": 32, "projection_dim": 16},
        vision_config={**_SMALL, "image_size": 32, "patch_size": 8, "projection_dim": 16},
        projection_dim=16,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    CLIPProcessor(images, texts).save_pretrained(folder)
    return str(folder)


def tiny_colqwen2(folder: Path, most_pixels: int = 16 * 28 * 28) -> str:
    """A ColQwen2ForRetrieval: as many patches as the image has room for, at most 16 tokens."""
    import torch
    from transformers import ColQwen2Config, ColQwen2ForRetrieval, ColQwen2Processor, Qwen2VLConfig
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    named = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    around = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    texts = tokenizer(named, around)
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": most_pixels})
    names = ("vision_start", "vision_end", "image", "video")
    ids = {f"{name}_token_id": 3 + i for i, name in enumerate(names)}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    vlm = Qwen2VLConfig(
        text_config={**_TEXT, "vocab_size": len(texts), "rope_parameters": rope, "bos_token_id": 2},
        vision_config={"embed_dim": 32, "hidden_size": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2},
        **ids,
    )
    torch.manual_seed(0)
    ColQwen2ForRetrieval(ColQwen2Config(vlm_config=vlm, embedding_dim=16)).save_pretrained(folder)
    ColQwen2Processor(images, texts).save_pretrained(folder)
    return str(folder)


def tiny_colpali(folder: Path) -> str:
    """A ColPaliForRetrieval: PaliGemma, 16 patches an image."""
    import torch
    from transformers import ColPaliConfig, ColPaliForRetrieval, ColPaliProcessor, PaliGemmaConfig
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    named = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    texts = tokenizer(named, [], extra_special_tokens={"image_token": "<image>"})
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    images.image_seq_length = 16
    processor = ColPaliProcessor(images, texts)
    vlm = PaliGemmaConfig(
        text_config={**_TEXT, "model_type": "gemma", "head_dim": 16, "vocab_size": len(texts)},
        vision_config={
            **_SMALL, "model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8,
            "projection_dim": 32,
        },
        image_token_index=texts.convert_tokens_to_ids("<image>"),
        projection_dim=32,
    )  # fmt: skip
    torch.manual_seed(0)
    ColPaliForRetrieval(ColPaliConfig(vlm_config=vlm, embedding_dim=16)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


_CHAT = (
    "{% for m in messages %}{% for part in m.content %}{% if part.type == 'image' %}<image>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}<|im_end|>"
)


def tiny_vlm(folder: Path, kind: str = "dense", side: int = 32, split: bool = False) -> str:
    """A saved model of sentence-transformers over an Idefics3: DSE (dense) or ColPali (multi).

    side: of an image, patches of 8, 4 of them a token. split: large images become several and a whole.
    """
    import sentence_transformers as st
    import torch
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import Idefics3Config, Idefics3Model, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    around = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    texts = tokenizer({"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}, around)
    size = {"longest_edge": 2 * side if split else side}
    images = Idefics3ImageProcessorPil(
        size=size, max_image_size={"longest_edge": side}, do_image_splitting=split
    )
    config = Idefics3Config(
        vision_config={**_SMALL, "image_size": side, "patch_size": 8},
        text_config={**_TEXT, "model_type": "llama", "vocab_size": len(texts), "pad_token_id": 0},
        scale_factor=2, image_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    Idefics3Model(config).save_pretrained(folder)
    Idefics3Processor(images, texts, image_seq_len=(side // 16) ** 2, chat_template=_CHAT).save_pretrained(
        folder
    )
    prompts, transformer = {"query": "find: ", "document": ""}, Transformer(str(folder))
    if kind == "dense":
        model: Any = st.SentenceTransformer(
            modules=[transformer, Pooling(32, "lasttoken"), Normalize()], prompts=prompts, device="cpu"
        )
    else:
        project = Dense(
            32, 16, bias=False, module_input_name="token_embeddings", activation_function=torch.nn.Identity()
        )
        modules = [transformer, project, MultiVectorMask(), Normalize("token_embeddings")]
        model = st.MultiVectorEncoder(modules=modules, prompts=prompts, device="cpu")
    model.save(str(folder / "model"))
    return str(folder / "model")
