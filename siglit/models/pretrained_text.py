"""Pretrained text models of transformers: loaded safely, rebuilt from a description, masked and pooled.

Knows nothing of heads, images or training.
Shapes: N captions, L tokens, W hidden width.
"""

import inspect
import json
import os
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_TEXT_ENCODING_MAPPING, MODEL_MAPPING, AutoConfig

from siglit.errors import UserError
from siglit.models.hub import describe_failure, hub_or_cache, quiet_transformers
from siglit.runtime.files import check_regular
from siglit.runtime.paths import expand


def load_text_model(name: str) -> nn.Module:
    """Load a text encoder and its weights in float32, by folder or Hub name, without running code from there.

    Raises:
        UserError: the model cannot be found or read, is not a text encoder, or its file lacks weights.
    """
    folder = expand(name, "text_tower.pretrained")
    try:
        is_here = os.path.exists(folder)
        if is_here:
            check_regular(folder)
        with quiet_transformers(), nullcontext() if is_here else hub_or_cache():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            _check_kernels(config, name)
            model_class, options = _class_of(config, name)
            model, loading = model_class.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,  # otherwise a file in half precision gives half-precision parameters
                weights_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"cannot load text_tower.pretrained {name!r} ({describe_failure(error)}). Without access to the Hub give a "
            "folder with config.json and model.safetensors"
        ) from error
    missing = sorted(loading["missing_keys"])
    if len(missing) > 0:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"the weights of text_tower.pretrained {name!r} lack {', '.join(missing[:3])}{more} of "
            f"{model_class.__name__}; give the folder of a complete model"
        )
    return model


def rebuild_text_model(architecture: dict[str, Any]) -> nn.Module:
    """Build a model with random weights from what `architecture_of` returned."""
    config = CONFIG_MAPPING[architecture["model_type"]].from_dict(architecture)
    _check_kernels(config, architecture["model_type"])
    model_class, options = _class_of(config, architecture["model_type"])
    return model_class(config, **options)


def _check_kernels(config: Any, name: str) -> None:
    """Refuse a configuration that makes transformers download and run attention code (by the package `kernels`)."""
    for key, value in vars(config).items():
        if hasattr(value, "to_json_string"):  # a part of a composite model
            _check_kernels(value, name)
        elif "implementation" in key and "/" in str(value):
            raise UserError(
                f"text_tower.pretrained {name!r}: config.json has {key} {value}, code from elsewhere; remove that entry"
            )


def architecture_of(model: Any) -> dict[str, Any]:
    """Describe a model in JSON's types for `rebuild_text_model`, without its path or transformers' version."""
    architecture = json.loads(model.config.to_json_string(use_diff=False))
    return {k: v for k, v in architecture.items() if k not in ("_name_or_path", "transformers_version")}


def check_text_model(model: Any, name: str, *, vocab_size: int, length: int) -> int:
    """Run the model once on L tokens and return its hidden width W.

    Raises:
        UserError: the model is not a text encoder, has fewer than L positions, or fewer ids than the tokenizer.
    """
    if _width(model, min(length, 2)) is None:
        raise UserError(
            f"text_tower.pretrained {name!r} is not a text encoder: {type(model).__name__} returns no state per token; "
            "choose one such as BERT, MiniLM or XLM-R"
        )
    rows = len(model.get_input_embeddings().weight)
    if vocab_size > rows:
        raise UserError(
            f"the tokenizer has {vocab_size:,} ids, but text_tower.pretrained {name!r} has embeddings for {rows:,}; "
            "remove tokenizer.path to use the model's own tokenizer"
        )
    width = _width(model, length)
    if width is None:
        stated = getattr(model.config, "max_position_embeddings", None)
        raise UserError(
            f"tokenizer.length is {length}, but text_tower.pretrained {name!r} cannot read that many tokens"
            f"{f' (it has {stated} positions)' if stated else ''}; lower tokenizer.length"
        )
    return width


def text_mask(ids: torch.Tensor, *, eos_id: int, pad_id: int) -> torch.Tensor:
    """Return an (N, L) int64 mask of (N, L) ids: 1 for text, 0 for padding.

    Where the padding token is the end-of-sentence token, the first one belongs to the text. The first token is always
    1: attention and mean are undefined over an empty text.
    """
    padding = ids == pad_id
    if eos_id == pad_id:
        padding = padding & (padding.cumsum(1) > 1)
    mask = (~padding).long()
    mask[:, 0] = 1
    return mask


def pool(states: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Pool (N, L, W) token states as (N, W): mean over the mask, first token (cls), or last token of the mask."""
    if pooling == "cls":
        return states[:, 0]
    if pooling == "last":
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
        return states[torch.arange(len(states), device=states.device), last]
    assert pooling == "mean"
    weights = mask.unsqueeze(2).float()  # float32 sums, also under autocast
    return (states * weights).sum(1) / weights.sum(1)


def _class_of(config: Any, name: str) -> tuple[Any, dict[str, Any]]:
    """Return the model's class and its options: the encoder alone of T5 and the like, without an unused pooler."""
    encoders = MODEL_FOR_TEXT_ENCODING_MAPPING
    if type(config) not in encoders and (config.is_encoder_decoder or type(config) not in MODEL_MAPPING):
        raise UserError(
            f"text_tower.pretrained {name!r} is not a text encoder: transformers has none for {config.model_type!r}; "
            "choose one such as BERT, MiniLM, XLM-R or T5"
        )
    config.use_cache = False  # set by models that can also generate
    model_class = (encoders if type(config) in encoders else MODEL_MAPPING)[type(config)]
    with_pooler = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    return model_class, {"add_pooling_layer": False} if with_pooler else {}


def _width(model: Any, length: int) -> int | None:
    """W, or None where the model does not return one state for each of `length` tokens."""
    pad = getattr(model.config, "pad_token_id", None)
    ids = torch.full((1, length), 1 if pad == 0 else 0)
    try:
        with torch.no_grad():
            states = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    except Exception:  # whatever a model of another kind does with token ids
        return None
    return states.shape[2] if states.ndim == 3 and states.shape[1] == length else None
