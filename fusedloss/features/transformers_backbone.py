"""Image and text backbones of transformers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fusedloss.features.backbone import Backbone, BackboneOptions, explain_missing
from fusedloss.features.manifest import FeatureSource
from fusedloss.features.weights import load_weights, sha256_of_weights

if TYPE_CHECKING:
    from PIL.Image import Image

POOLINGS = ("cls", "mean")
# Tokens, where the network itself allows more.
LONGEST_TEXT = 512
# A layer behind the last hidden state, missing from many checkpoints.
UNUSED = ("pooler",)


class TransformersBackbone(Backbone):
    """Pools the last hidden state, after the network's final LayerNorm."""

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        kind: Literal["image", "text"],
        source: FeatureSource,
        device: torch.device,
    ) -> None:
        self.kind = kind
        self.processor = processor
        super().__init__(model, source, device)

    def prepare(self, item: Image | str) -> Any:
        if self.kind == "text":
            return item
        return self.processor(images=item, return_tensors="pt")["pixel_values"][0]

    def collate(self, items: Sequence[Any]) -> Any:
        if self.kind == "image":
            return super().collate(items)
        return self.processor(
            list(items), padding=True, truncation=True, max_length=self.source.max_length, return_tensors="pt"
        )

    def example(self) -> Any:
        if self.kind == "text":
            return self.collate(["a"])
        from PIL import Image

        return self.collate([self.prepare(Image.new("RGB", (224, 224)))])

    def forward(self, batch: Any) -> Tensor:
        if self.kind == "text":
            hidden: Tensor = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"][:, :, None].to(hidden.dtype)
        else:
            hidden = self.model(pixel_values=batch).last_hidden_state
            # CLIP applies it to its pooled token only.
            if hasattr(self.model, "post_layernorm"):
                hidden = self.model.post_layernorm(hidden)
            # A convolutional network's (B, C, H, W).
            if hidden.ndim == 4:
                hidden = hidden.flatten(2).transpose(1, 2)
            mask = hidden.new_ones(*hidden.shape[:2], 1)
            mask[:, : prefix_tokens(self.model)] = 0
        if self.source.pooling == "cls":
            return hidden[:, 0]
        pooled: Tensor = (hidden * mask).sum(dim=1).float() / mask.sum(dim=1).float()
        return pooled


def load_transformers(name: str, options: BackboneOptions) -> TransformersBackbone:
    """The network of transformers with this name, or in this folder; errors as `load_backbone`."""
    for option in ("image_size", "crop"):
        if getattr(options, option) is not None:
            raise ValueError(
                f"{option} must be None for hf backbones, whose image networks use their own processor; "
                f"got {getattr(options, option)}"
            )
    try:
        import transformers
    except (ImportError, RuntimeError) as error:
        raise explain_missing("transformers", error) from error
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        kind: Literal["image", "text"] = "image" if is_image_network(config) else "text"
        processor_class = transformers.AutoImageProcessor if kind == "image" else transformers.AutoTokenizer
        processor = processor_class.from_pretrained(name)
        model = load_model(transformers, name, config, options.weights)
    except (OSError, KeyError, ValueError, RuntimeError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"hf:{name} cannot be loaded: {reason}") from error
    model = getattr(model, "vision_model", model) if kind == "image" else model
    pooling = choose_pooling(model, kind, options.pooling, name)
    max_length = options.max_length
    if kind == "text":
        max_length = prepare_tokenizer(processor, config, max_length, name)
        description = f"{type(processor).__name__} sha256 {sha256_of_tokenizer(processor)}"
    elif max_length is not None:
        raise ValueError(f"max_length must be None for hf:{name}, which reads images; got {max_length}")
    else:
        description = json.dumps(processor.to_dict(), sort_keys=True, default=str)
    source = FeatureSource(
        backbone=f"hf:{name}",
        weights=options.weights_origin(),
        weights_sha256=sha256_of_weights(model, UNUSED),
        pooling=pooling,
        transform=description,
        max_length=max_length,
        precision=options.precision,
        normalized=options.normalize,
    )
    return TransformersBackbone(model, processor, kind, source, options.device)


def load_model(transformers: Any, name: str, config: Any, weights: Path | None) -> nn.Module:
    """The network, pretrained unless a file of weights is given."""
    if weights is not None:
        model: nn.Module = transformers.AutoModel.from_config(config)
        load_weights(model, weights, UNUSED)
        return model
    model, report = transformers.AutoModel.from_pretrained(name, output_loading_info=True, dtype=torch.float32)
    missing = sorted(key for key in report["missing_keys"] if not key.startswith(UNUSED))
    if missing:
        raise ValueError(f"hf:{name}: its checkpoint lacks {len(missing)} tensors, the first is {missing[0]!r}")
    return model


def is_image_network(config: Any) -> bool:
    """Whether a network reads images."""
    return hasattr(config, "vision_config") or not hasattr(config, "vocab_size")


def has_class_token(model: nn.Module) -> bool:
    """Whether a network has a token for the whole image."""
    embeddings = getattr(model, "embeddings", None)
    return any(hasattr(embeddings, name) for name in ("cls_token", "class_embedding"))


def prefix_tokens(model: Any) -> int:
    """Tokens before the patches: the class token and the registers."""
    return (1 + int(getattr(model.config, "num_register_tokens", 0) or 0)) if has_class_token(model) else 0


def choose_pooling(model: nn.Module, kind: str, pooling: str | None, name: str) -> str:
    """The requested pooling, if the network can do it, or its default."""
    if pooling is None:
        return "cls" if kind == "image" and has_class_token(model) else "mean"
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)} for hf backbones; got {pooling!r}")
    if pooling == "cls" and kind == "image" and not has_class_token(model):
        raise ValueError(f"pooling must be mean for hf:{name}, which has no class token; got 'cls'")
    return pooling


def prepare_tokenizer(tokenizer: Any, config: Any, max_length: int | None, name: str) -> int:
    """Make sure that batches can be padded, and return the length in tokens at which texts are cut."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    longest = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", LONGEST_TEXT))
    if max_length is not None and max_length > longest:
        raise ValueError(f"max_length must be at most {longest} for hf:{name}; got {max_length}")
    return max_length or min(longest, LONGEST_TEXT)


def sha256_of_tokenizer(tokenizer: Any) -> str:
    """The sha256 of a tokenizer's content."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
