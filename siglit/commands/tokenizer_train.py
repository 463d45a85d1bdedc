"""`siglit tokenizer train`: trains the run's SentencePiece vocabulary on the training captions."""

from dataclasses import dataclass, replace

from siglit.config import Experiment
from siglit.data.sources import open_source
from siglit.errors import UserError
from siglit.models.tokenizer import load_tokenizer
from siglit.runs.tokenizer import ensure_tokenizer


@dataclass(frozen=True)
class TokenizerResult:
    """The trained tokenizer."""

    path: str
    vocab_size: int
    captions_cut: float
    """Share of the first 10,000 captions that are longer than tokenizer.length."""

    def __str__(self) -> str:
        """One line for a person."""
        return f"{self.path}: {self.vocab_size:,} pieces; {self.captions_cut:.1%} of the captions are cut"


def tokenizer_train(experiment: Experiment) -> TokenizerResult:
    """Train on the captions of data.train and write tokenizer.model into the run's folder.

    Raises:
        UserError: tokenizer.path or text_tower.pretrained is set, a model is there already, or there are no captions.
    """
    if experiment.tokenizer.path is not None:
        raise UserError(f"tokenizer.path names a tokenizer ({experiment.tokenizer.path}); remove it to train one")
    if experiment.text_tower.pretrained is not None:
        raise UserError(
            f"text_tower.pretrained {experiment.text_tower.pretrained!r} brings its own tokenizer; remove it to "
            "train one"
        )
    captions = [c for several in open_source(experiment.data.train).captions() for c in several]
    path = ensure_tokenizer(experiment.folder, experiment.tokenizer, None, captions)
    length = experiment.tokenizer.length
    longer = load_tokenizer(path, replace(experiment.tokenizer, length=length + 1))
    cut = float((longer(captions[:10_000])[:, length - 1] != longer.pad_id).mean())
    return TokenizerResult(path=path, vocab_size=longer.vocab_size, captions_cut=cut)
