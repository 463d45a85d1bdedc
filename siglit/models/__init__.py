"""The image tower (timm), the text tower and the tokenizer (transformers, sentencepiece)."""
