"""The run's tokenizer: where it is, and its training where it is missing."""

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path

from siglit.config import TokenizerConfig
from siglit.errors import UserError
from siglit.models.tokenizer import SentencePieceTokenizer, lowercases, train_sentencepiece
from siglit.runs.folder import ensure_folder, read_json_object
from siglit.runtime.files import atomic_write, file_hash, write_json

_logger = logging.getLogger(__name__)


def tokenizer_path(folder: Path, config: TokenizerConfig, pretrained: str | None) -> str:
    """File, folder or Hub name of the run's tokenizer, which need not be trained yet.

    Args:
        folder: of the run.
        config: a tokenizer that it names takes precedence.
        pretrained: text_tower.pretrained, which has a tokenizer of its own.
    """
    return config.path or pretrained or str(folder / "tokenizer.model")


def ensure_tokenizer(folder: Path, config: TokenizerConfig, pretrained: str | None, captions: Iterable[str]) -> str:
    """Return `tokenizer_path`, after training a tokenizer on the captions if the run needs one and has none.

    `tokenizer.json` beside it records what it was trained with, its hash, and as actual_vocab_size how many pieces it
    has; warns if these are fewer than tokenizer.vocab_size.

    Raises:
        UserError: the run's tokenizer was trained with other settings, or it or its record is damaged.
    """
    if config.path or pretrained:
        return tokenizer_path(folder, config, pretrained)
    path = Path(tokenizer_path(ensure_folder(folder), config, pretrained))
    settings = {
        "vocab_size": config.vocab_size,
        "character_coverage": config.character_coverage,
        "lowercase": lowercases(config),
    }
    note = path.with_suffix(".json")
    if path.exists():
        saved = read_json_object(note, f"remove it and {path.name}, or restore both") if note.exists() else settings
        if saved.get("blake2b", file_hash(path)) != file_hash(path):
            raise UserError(
                f"{path} is damaged: its hash is not the one in {note.name}; restore it, or train again with another "
                "--output_dir"
            )
        for name, expected in settings.items():
            if saved.get(name) != expected:
                raise UserError(
                    f"{note} says that {path.name} was trained with tokenizer.{name} {saved.get(name)}, but the "
                    f"experiment has {expected}; remove both files, or choose another --output_dir"
                )
        return str(path)
    model = train_sentencepiece(captions, config)
    pieces = SentencePieceTokenizer(model, config.length, lowercases(config)).vocab_size
    digest = hashlib.blake2b(model, digest_size=16).hexdigest()
    write_json(note, {**settings, "actual_vocab_size": pieces, "blake2b": digest})
    with atomic_write(path) as file:
        file.write(model)
    if pieces < config.vocab_size:
        _logger.warning(
            f"{path} has {pieces:,} pieces, fewer than tokenizer.vocab_size {config.vocab_size:,}: "
            "the captions do not support more"
        )
    return str(path)
