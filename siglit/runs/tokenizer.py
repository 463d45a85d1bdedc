"""The run's tokenizer: where it is, and how it is trained if it is missing."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path

from siglit.config import Experiment
from siglit.errors import UserError
from siglit.models.tokenizer import SentencePieceTokenizer, lowercases, train_sentencepiece
from siglit.runs.folder import output_dir
from siglit.runtime.files import atomic_write, write_json

_logger = logging.getLogger(__name__)


def tokenizer_path(experiment: Experiment) -> str:
    """Where the run's tokenizer is, or will be once it is trained; a pretrained text tower brings its own."""
    given = experiment.tokenizer.path or experiment.text_tower.pretrained
    return given or str(output_dir(experiment) / "tokenizer.model")


def ensure_tokenizer(experiment: Experiment, captions: Iterable[str]) -> str:
    """Return the path of the run's tokenizer, trained on the captions if it has none yet.

    `tokenizer.json` beside it keeps what it was trained with, and as actual_vocab_size how many pieces it has; fewer
    than tokenizer.vocab_size are said on stderr.

    Raises:
        UserError: the one that is there was trained with other settings.
    """
    if experiment.tokenizer.path or experiment.text_tower.pretrained:
        return tokenizer_path(experiment)
    path = Path(tokenizer_path(experiment))
    config = experiment.tokenizer
    settings = {
        "vocab_size": config.vocab_size,
        "character_coverage": config.character_coverage,
        "lowercase": lowercases(config),
    }
    note = path.with_suffix(".json")
    if path.exists():
        made = json.loads(note.read_text(encoding="utf-8")) if note.exists() else settings
        differing = [k for k in settings if made.get(k) != settings[k]]
        if differing:
            k = differing[0]
            raise UserError(
                f"{path} was trained with tokenizer.{k} {made.get(k)}, the experiment asks for {settings[k]}; "
                "remove the file, or choose another --output_dir"
            )
        return str(path)
    model = train_sentencepiece(captions, config)
    pieces = SentencePieceTokenizer(model, config.length, lowercases(config)).vocab_size
    write_json(note, {**settings, "actual_vocab_size": pieces})
    with atomic_write(path) as file:
        file.write(model)
    if pieces < config.vocab_size:
        _logger.warning(
            f"{path} has {pieces:,} pieces, not tokenizer.vocab_size {config.vocab_size:,}: "
            "the captions support no more"
        )
    return str(path)
