"""Text to token ids: SentencePiece (loaded or trained) or a transformers tokenizer, behind one interface.

Knows nothing of towers. Ids are (N, L) int32, always padded to L, as the text tower reads padding as text.
SentencePiece follows SigLIP: text in lower case, then end-of-sentence, which is also the padding and which truncation
keeps.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Protocol

import numpy as np
import sentencepiece

from siglit.config import TokenizerConfig
from siglit.errors import UserError
from siglit.models.hub import describe_failure, hub_or_cache, quiet_transformers
from siglit.runtime.files import check_regular, read_regular
from siglit.runtime.paths import expand


class Tokenizer(Protocol):
    """What batches and the text tower need of a tokenizer: ids, their number V, length L, special ids, a hash."""

    vocab_size: int
    length: int
    eos_id: int
    pad_id: int
    fingerprint: str

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Encode N texts as (N, L) int32."""


class SentencePieceTokenizer:
    """A SentencePiece model with SigLIP's conventions."""

    def __init__(self, model: bytes, length: int, lowercase: bool):
        """Read a serialized SentencePiece model.

        Raises:
            UserError: the bytes are not a SentencePiece model, or the model has no end-of-sentence piece.
        """
        try:
            # SentencePiece takes an empty model for a missing argument.
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model or b"\0")
        except RuntimeError as error:
            raise UserError("this is not a SentencePiece model; name another file, or train a tokenizer") from error
        self.length, self._lowercase = length, lowercase
        self.vocab_size = self._pieces.vocab_size()
        self.eos_id = self.pad_id = self._pieces.eos_id()
        if self.eos_id < 0:
            raise UserError("the SentencePiece model has no end-of-sentence piece (eos_id); train one that has it")
        self.fingerprint = _digest(hashlib.blake2b(model).hexdigest(), length, lowercase)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Encode N texts as (N, L) int32."""
        texts = [t.lower() for t in texts] if self._lowercase else list(texts)
        ids = np.full((len(texts), self.length), self.pad_id, dtype=np.int32)
        for row, pieces in zip(ids, self._pieces.encode(texts, num_threads=-1), strict=True):
            kept = pieces[: self.length - 1]
            row[: len(kept)] = kept
        return ids


class TransformersTokenizer:
    """A tokenizer of the transformers library, by folder or Hub name."""

    def __init__(self, name: str, length: int, lowercase: bool | None = None):
        """Load the tokenizer.

        Args:
            name: folder or Hub name.
            length: tokens per text, L.
            lowercase: whether to lower-case the text first; None leaves it to the tokenizer.

        Raises:
            UserError: the tokenizer cannot be loaded, or it has no padding token.
        """
        from transformers import AutoTokenizer

        try:
            is_here = os.path.exists(name)
            if is_here:
                check_regular(name)
            with quiet_transformers(), nullcontext() if is_here else hub_or_cache():
                self._tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except Exception as error:
            advice = (
                "Give a folder that holds tokenizer.json and tokenizer_config.json, or a SentencePiece .model"
                if os.path.exists(name)
                else "There is no such folder. Without access to the Hub give a folder or a SentencePiece .model as "
                "tokenizer.path, or a folder as text_tower.pretrained"
            )
            raise UserError(f"cannot load the tokenizer {name!r} ({describe_failure(error)}). {advice}") from error
        eos, pad = self._tokenizer.eos_token_id, self._tokenizer.pad_token_id
        eos = eos if eos is not None else self._tokenizer.sep_token_id
        if pad is None:
            raise UserError(f"the tokenizer {name!r} has no padding token; choose one that has it")
        self.length, self._lowercase = length, lowercase
        self.vocab_size = len(self._tokenizer)
        self.pad_id, self.eos_id = pad, eos if eos is not None else pad
        self.fingerprint = _digest(hashlib.blake2b(self._rules().encode()).hexdigest(), length, lowercase)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Encode N texts as (N, L) int32."""
        texts = [t.lower() for t in texts] if self._lowercase else list(texts)
        # On the right, whatever the tokenizer's default: the model's positions start with the text.
        encoded = self._tokenizer(
            texts, padding="max_length", padding_side="right", truncation=True, max_length=self.length
        )
        return np.asarray(encoded["input_ids"], dtype=np.int32)

    def _rules(self) -> str:
        """Everything that determines the ids: two tokenizers with one vocabulary may split words differently."""
        fast = getattr(self._tokenizer, "backend_tokenizer", None)
        rules = fast.to_str() if fast is not None else json.dumps(self._tokenizer.get_vocab(), sort_keys=True)
        return f"{rules} {self._tokenizer.truncation_side} {self.pad_id}"


def load_tokenizer(path: str, config: TokenizerConfig) -> Tokenizer:
    """Load a SentencePiece `.model` file, or a transformers tokenizer by folder or name.

    Raises:
        UserError: the tokenizer cannot be found or read, or lacks end-of-sentence or padding.
    """
    path = expand(path, "tokenizer.path")
    if not path.endswith(".model"):
        return TransformersTokenizer(path, config.length, config.lowercase)
    try:
        model = read_regular(path)
    except FileNotFoundError as error:
        raise UserError(
            f"there is no tokenizer {path}; check `tokenizer.path`, or train one with `siglit tokenizer train`"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from error
    try:
        return SentencePieceTokenizer(model, config.length, lowercases(config))
    except UserError as error:
        raise UserError(f"tokenizer.path {path}: {error}") from error


def lowercases(config: TokenizerConfig) -> bool:
    """Whether SentencePiece reads the text in lower case: as in SigLIP, unless tokenizer.lowercase is false."""
    return config.lowercase is not False


def train_sentencepiece(captions: Iterable[str], config: TokenizerConfig) -> bytes:
    """Train a byte-pair SentencePiece model and return it serialized.

    Byte pairs and not unigrams: on a few thousand short captions the unigram trainer leaves half of the words in pieces
    (17 pieces for "a photo of an airplane" after ten distinct captions, 6 with byte pairs).

    The vocabulary has padding 0, end-of-sentence 1 and unknown 2, no begin-of-sentence, and falls back to bytes, so
    that every text can be encoded. It is smaller than tokenizer.vocab_size where the captions do not support more.

    Raises:
        UserError: there is no caption with text, or tokenizer.vocab_size is too small for the characters.
    """
    lower = str.lower if lowercases(config) else str
    # From blank captions alone, some versions of the trainer build a vocabulary of bytes.
    sentences = (lower(c).replace("\n", " ") for c in captions if c.strip())
    first = next(sentences, None)
    if first is None:
        raise UserError("there are no captions to train a tokenizer on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_chain(first, sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=config.vocab_size,
            hard_vocab_limit=False,
            character_coverage=config.character_coverage,
            byte_fallback=True,
            # A vocabulary of this size does not change beyond this many sentences; reading them all costs memory.
            input_sentence_size=2_000_000,
            shuffle_input_sentence=True,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            num_threads=1,  # one thread: the same captions give the same model
            minloglevel=2,
        )
    except RuntimeError as error:
        minimum = re.search(r"required_chars\. (\d+) vs (\d+)", str(error))
        if minimum is not None:
            raise UserError(
                f"tokenizer.vocab_size is {config.vocab_size}, but the characters of the captions alone need "
                f"{minimum[2]} pieces; raise it, or lower tokenizer.character_coverage"
            ) from error
        raise UserError(
            f"cannot train a tokenizer with {config.vocab_size} pieces: {str(error).strip().splitlines()[-1][-200:]}"
        ) from error
    return model.getvalue()


def _chain(first: str, rest: Iterable[str]) -> Iterable[str]:
    yield first
    yield from rest


def _digest(content: str, length: int, lowercase: bool | None) -> str:
    return hashlib.blake2b(f"{content} {length} {lowercase}".encode(), digest_size=8).hexdigest()
