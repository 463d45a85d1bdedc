"""`siglit tokenizer train`: trains the run's SentencePiece vocabulary on the training captions."""

from dataclasses import dataclass, replace

from siglit.config import Experiment
from siglit.data.sources import open_source
from siglit.errors import UserError
from siglit.models.tokenizer import load_tokenizer
from siglit.runs.tokenizer import ensure_tokenizer
from siglit.runtime.text import plural


@dataclass(frozen=True)
class TokenizerResult:
    """The trained tokenizer."""

    path: str
    vocab_size: int
    captions_cut: float
    """Share of the first 10,000 captions that tokenizer.length truncates."""

    def __str__(self) -> str:
        """One line."""
        return f"{self.path}: {plural(self.vocab_size, 'piece')}; {self.captions_cut:.1%} of the captions are truncated"


def tokenizer_train(experiment: Experiment) -> TokenizerResult:
    """Train on the captions of data.train and write tokenizer.model into the run's folder.

    Raises:
        UserError: tokenizer.path or text_tower.pretrained is set, the run's tokenizer has other settings, or data.train
            has no captions.
    """
    if experiment.tokenizer.path is not None:
        raise UserError(f"tokenizer.path is set to {experiment.tokenizer.path}; remove it to train a tokenizer")
    if experiment.text_tower.pretrained is not None:
        raise UserError(
            f"text_tower.pretrained is {experiment.text_tower.pretrained!r}, which has its own tokenizer; remove it to "
            "train a tokenizer"
        )
    captions = [caption for group in open_source(experiment.data.train).captions() for caption in group]
    path = ensure_tokenizer(experiment.folder, experiment.tokenizer, None, captions)
    length = experiment.tokenizer.length
    longer = load_tokenizer(path, replace(experiment.tokenizer, length=length + 1))
    cut = float((longer(captions[:10_000])[:, length - 1] != longer.pad_id).mean())
    return TokenizerResult(path=path, vocab_size=longer.vocab_size, captions_cut=cut)
