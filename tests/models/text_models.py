"""Tiny text models with random weights and their tokenizer, saved as transformers saves them."""

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5Model,
    XLMRobertaConfig,
    XLMRobertaModel,
)

VOCABULARY = 40
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
# What is saved, and what is to be read of it.
KINDS = {
    "bert": (BertModel, BertConfig(**SIZES, max_position_embeddings=12), BertModel),
    "xlm-roberta": (
        XLMRobertaModel,
        XLMRobertaConfig(**SIZES, max_position_embeddings=14, pad_token_id=1, bos_token_id=0, eos_token_id=2),
        XLMRobertaModel,
    ),
    "t5": (
        T5Model,
        T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2),
        T5EncoderModel,
    ),
    "gpt2": (
        GPT2Model,
        GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=12, pad_token_id=0),
        GPT2Model,
    ),
}
SPECIAL = {
    "bert": {"pad_id": 0, "eos_id": 3},
    "xlm-roberta": {"pad_id": 1, "eos_id": 2},
    "t5": {"pad_id": 0, "eos_id": 1},
    "gpt2": {"pad_id": 0, "eos_id": 0},
}


def save_model(folder, kind="bert", **options):
    """Save a tiny model of a kind; its biases and norms differ from their start, so that each of them matters."""
    model_class, config, _ = KINDS[kind]
    torch.manual_seed(1)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, **options)
    return str(folder)


def save_tokenizer(folder, lowercase=True):
    """Save a tokenizer of whole words in BERT's manner beside the model."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "dog", "Red", "picture", "square"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    if lowercase:
        inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    return str(folder)


def captions(kind="bert", length=6):
    """Three captions of 2, 4 and 6 tokens, padded."""
    ids = torch.randint(4, VOCABULARY, (3, length), generator=torch.Generator().manual_seed(0))
    for row, size in enumerate((2, 4, 6)):
        ids[row, size:] = SPECIAL[kind]["pad_id"]
    return ids
