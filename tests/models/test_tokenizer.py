"""Tokenizers keep SigLIP's conventions, train reproducibly, and name what is wrong with a file."""

from dataclasses import replace

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from siglit.config import TokenizerConfig
from siglit.errors import UserError
from siglit.models.tokenizer import SentencePieceTokenizer, TransformersTokenizer, load_tokenizer, train_sentencepiece

CONFIG = TokenizerConfig(vocab_size=400, length=12)
LOWER = replace(CONFIG, lowercase=True)
CAPTIONS = [
    f"A {color} {thing} {place} the {other}."
    for color in ("red", "green", "Blue")
    for thing in ("circle", "dog", "House")
    for place in ("above", "left of", "behind")
    for other in ("street", "tree", "sea")
]


@pytest.fixture(scope="module")
def trained():
    return train_sentencepiece(CAPTIONS, CONFIG)


def decode(trained, ids):
    return sentencepiece.SentencePieceProcessor(model_proto=trained).decode([int(i) for i in ids if i != 1])


class TestSentencePiece:
    def test_rows_are_padded_with_end_of_sentence(self, trained):
        tokenizer = SentencePieceTokenizer(trained, 12, True)
        ids = tokenizer(["a red dog", "", "a green circle above the tree."])
        assert ids.shape == (3, 12)
        assert ids.dtype == np.int32
        assert tokenizer.eos_id == tokenizer.pad_id == 1
        assert (ids[1] == 1).all()
        for row in ids:
            length = int(np.argmax(row == 1))
            assert (row[length:] == 1).all()
            assert (row[:length] > 2).all()

    def test_text_comes_back_in_lower_case(self, trained):
        tokenizer = SentencePieceTokenizer(trained, 40, True)
        assert decode(trained, tokenizer(["A Blue House"])[0]) == "a blue house"
        assert np.array_equal(tokenizer(["A BLUE house"]), tokenizer(["a blue House"]))

    def test_lower_case_is_the_default(self, tmp_path, trained):
        (tmp_path / "words.model").write_bytes(trained)
        default, explicit = (load_tokenizer(str(tmp_path / "words.model"), c) for c in (CONFIG, LOWER))
        assert np.array_equal(default(["A Red dog"]), explicit(["a red dog"]))
        assert default.fingerprint == explicit.fingerprint
        assert train_sentencepiece(CAPTIONS, LOWER) == trained

    def test_case_is_kept_where_configured(self, trained):
        tokenizer = SentencePieceTokenizer(trained, 40, False)
        assert decode(trained, tokenizer(["A Blue House"])[0]) == "A Blue House"

    @pytest.mark.parametrize("length", [1, 2, 5])
    def test_truncation_keeps_end_of_sentence(self, trained, length):
        long = "a red circle above the tree. " * 10
        ids = SentencePieceTokenizer(trained, length, True)([long])[0]
        whole = SentencePieceTokenizer(trained, 500, True)([long])[0]
        assert ids[-1] == 1
        assert np.array_equal(ids[:-1], whole[: length - 1])
        assert (ids[:-1] != 1).all()

    def test_an_unseen_script_comes_back_byte_by_byte(self, trained):
        tokenizer = SentencePieceTokenizer(trained, 80, True)
        for text in ("猫が好き", "ευχαριστώ", "🐈 кошка"):
            ids = tokenizer([text])[0]
            assert decode(trained, ids) == text
            assert 2 not in ids

    def test_ids_are_below_the_vocabulary_size(self, trained):
        tokenizer = SentencePieceTokenizer(trained, 80, True)
        assert tokenizer(["ευχαριστώ zzz 🐈", *CAPTIONS]).max() < tokenizer.vocab_size <= CONFIG.vocab_size

    def test_no_texts(self, trained):
        assert SentencePieceTokenizer(trained, 7, True)([]).shape == (0, 7)

    def test_a_model_without_end_of_sentence_is_refused(self, tmp_path):
        (tmp_path / "text").write_text("\n".join(CAPTIONS))
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / "text"),
            model_prefix=str(tmp_path / "no_eos"),
            vocab_size=60,
            model_type="bpe",
            eos_id=-1,
            minloglevel=2,
        )
        with pytest.raises(UserError, match="no end-of-sentence piece"):
            load_tokenizer(str(tmp_path / "no_eos.model"), CONFIG)


class TestTraining:
    def test_the_same_captions_give_the_same_bytes(self, trained):
        assert train_sentencepiece(iter(CAPTIONS), CONFIG) == trained
        assert train_sentencepiece([*CAPTIONS, "another zebra zebra zebra"], CONFIG) != trained

    def test_special_pieces(self, trained):
        pieces = sentencepiece.SentencePieceProcessor(model_proto=trained)
        assert (pieces.pad_id(), pieces.eos_id(), pieces.unk_id(), pieces.bos_id()) == (0, 1, 2, -1)

    def test_words_of_the_captions_become_few_pieces(self, trained):
        """Also of a single caption: what the unigram trainer leaves in letters."""
        for captions in (CAPTIONS, CAPTIONS[:1]):
            tokenizer = SentencePieceTokenizer(train_sentencepiece(captions, CONFIG), 60, True)
            assert (tokenizer([CAPTIONS[0]]) != 1).sum() <= 10

    def test_upper_case_is_learned_only_where_it_is_kept(self):
        kept = train_sentencepiece(CAPTIONS, replace(CONFIG, lowercase=False))
        assert kept != train_sentencepiece(CAPTIONS, CONFIG)
        assert "▁House" in pieces_of(kept)
        assert not any(piece != piece.lower() for piece in pieces_of(train_sentencepiece(CAPTIONS, CONFIG))[259:])

    @pytest.mark.parametrize("captions", [[], iter([])])
    def test_no_captions(self, captions):
        with pytest.raises(UserError, match="no captions"):
            train_sentencepiece(captions, CONFIG)

    @pytest.mark.parametrize("captions", [[""], ["", "  "]])
    def test_only_blank_captions(self, captions):
        with pytest.raises(UserError, match=r"cannot train a tokenizer|no captions"):
            train_sentencepiece(captions, CONFIG)

    def test_a_vocabulary_too_small_for_the_bytes(self):
        with pytest.raises(UserError, match="tokenizer.vocab_size is 100.*need 278 pieces"):
            train_sentencepiece(CAPTIONS, replace(CONFIG, vocab_size=100))

    def test_captions_with_line_breaks(self):
        assert train_sentencepiece(["a red\ndog", "a blue\ndog"], CONFIG)


def pieces_of(model):
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    return [pieces.id_to_piece(i) for i in range(pieces.vocab_size())]


def save_words(folder, *, pre_tokenizer=None, normalizer=None, **special):
    """A transformers tokenizer of whole words with an end-of-sentence, built without network."""
    words = ["<pad>", "</s>", "<unk>", "a", "red", "dog", "-", "red-dog", "left", "of"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizer or pre_tokenizers.Whitespace()
    if normalizer is not None:
        inner.normalizer = normalizer
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"} | special
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    return str(folder)


class TestTransformers:
    def test_a_folder(self, tmp_path):
        tokenizer = load_tokenizer(save_words(tmp_path / "words"), replace(CONFIG, length=6, lowercase=True))
        assert isinstance(tokenizer, TransformersTokenizer)
        assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id) == (10, 1, 0)
        ids = tokenizer(["A red dog", "zebra", "a red dog left of a dog"])
        assert ids.dtype == np.int32
        assert ids.tolist() == [[3, 4, 5, 1, 0, 0], [2, 1, 0, 0, 0, 0], [3, 4, 5, 8, 9, 1]]

    @pytest.mark.parametrize("lowercase", [False, None])
    def test_case_is_kept_unless_configured(self, tmp_path, lowercase):
        """A cased pretrained model knows capital letters."""
        tokenizer = load_tokenizer(save_words(tmp_path / "words"), replace(CONFIG, length=4, lowercase=lowercase))
        assert tokenizer(["a RED"]).tolist() == [[3, 2, 1, 0]]

    def test_a_tokenizer_that_lower_cases_still_does(self, tmp_path):
        words = save_words(tmp_path / "words", normalizer=normalizers.Lowercase())
        assert load_tokenizer(words, replace(CONFIG, length=4))(["a RED"]).tolist() == [[3, 4, 1, 0]]

    def test_fingerprint_depends_on_length_and_case(self, tmp_path):
        words = save_words(tmp_path / "words")
        configs = [replace(CONFIG, length=n, lowercase=case) for n in (4, 5) for case in (True, None)]
        assert len({load_tokenizer(words, config).fingerprint for config in configs}) == 4

    def test_padding_is_on_the_right(self, tmp_path):
        """Positions of a pretrained model start with the text."""
        words = save_words(tmp_path / "words", padding_side="left")
        assert load_tokenizer(words, replace(CONFIG, length=5))(["a red"]).tolist() == [[3, 4, 1, 0, 0]]

    def test_without_padding_token(self, tmp_path):
        with pytest.raises(UserError, match="no padding token"):
            load_tokenizer(save_words(tmp_path / "words", pad_token=None), CONFIG)

    def test_without_end_of_sentence_padding_ends_it(self, tmp_path):
        tokenizer = load_tokenizer(save_words(tmp_path / "words", eos_token=None), CONFIG)
        assert tokenizer.eos_id == tokenizer.pad_id == 0

    def test_same_vocabulary_cut_otherwise_is_another_tokenizer(self, tmp_path):
        """The fingerprint names the file of token ids: it must differ where ids do."""
        one = load_tokenizer(save_words(tmp_path / "one"), CONFIG)
        other = load_tokenizer(save_words(tmp_path / "two", pre_tokenizer=pre_tokenizers.WhitespaceSplit()), CONFIG)
        assert not np.array_equal(one(["red-dog"]), other(["red-dog"]))
        assert one.fingerprint != other.fingerprint
        assert one.fingerprint == load_tokenizer(save_words(tmp_path / "three"), CONFIG).fingerprint

    def test_fingerprint_does_not_change_by_use(self, tmp_path):
        folder = save_words(tmp_path / "one")
        tokenizer = load_tokenizer(folder, CONFIG)
        tokenizer(["a dog"])
        assert tokenizer.fingerprint == load_tokenizer(folder, CONFIG).fingerprint

    @pytest.mark.parametrize("name", ["siglit-tests/absent", "/no/such/folder"])
    def test_out_of_reach_names_the_local_way(self, monkeypatch, name):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(UserError, match=rf"cannot load the tokenizer '{name}'.*folder or a SentencePiece .model"):
            load_tokenizer(name, CONFIG)


class TestLoading:
    def test_a_model_file(self, tmp_path, monkeypatch, trained):
        (tmp_path / "words.model").write_bytes(trained)
        monkeypatch.setenv("SIGLIT_TEST_TOKENIZER", str(tmp_path))
        tokenizer = load_tokenizer("$SIGLIT_TEST_TOKENIZER/words.model", CONFIG)
        assert isinstance(tokenizer, SentencePieceTokenizer)
        assert np.array_equal(tokenizer(CAPTIONS), SentencePieceTokenizer(trained, 12, True)(CAPTIONS))

    @pytest.mark.parametrize("content", [b"", b"no model", b"\x00" * 100])
    def test_not_a_sentencepiece_model(self, tmp_path, content):
        (tmp_path / "words.model").write_bytes(content)
        with pytest.raises(UserError, match=r"words\.model: this is not a SentencePiece model"):
            load_tokenizer(str(tmp_path / "words.model"), CONFIG)

    def test_missing_file_names_the_command(self, tmp_path):
        with pytest.raises(UserError, match=r"no tokenizer .*words\.model.*siglit tokenizer train"):
            load_tokenizer(str(tmp_path / "words.model"), CONFIG)

    def test_a_folder_called_model(self, tmp_path):
        (tmp_path / "words.model").mkdir()
        with pytest.raises(UserError, match=r"cannot read the tokenizer .*words\.model"):
            load_tokenizer(str(tmp_path / "words.model"), CONFIG)

    def test_fingerprint_depends_on_model_length_and_case(self, tmp_path, trained):
        other = train_sentencepiece(CAPTIONS[:20], CONFIG)
        tokenizers = [
            SentencePieceTokenizer(model, length, lowercase)
            for model in (trained, other)
            for length in (12, 16)
            for lowercase in (True, False)
        ]
        assert len({t.fingerprint for t in tokenizers}) == 8
        assert SentencePieceTokenizer(trained, 12, True).fingerprint == tokenizers[0].fingerprint
