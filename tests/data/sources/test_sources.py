"""Every format becomes samples in a fixed order; every mistake in a listing is one line that names its place."""

import gzip
import io
import json
import os
import pickle
import sys
import tarfile
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from siglit.config import SourceSpec
from siglit.data.sources import open_source, tar_source, tars
from siglit.data.sources import samples as samples_module
from siglit.data.sources.samples import FilePart
from siglit.errors import UserError


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def write_json(path, value):
    return write(path, json.dumps(value))


def write_jsonl(path, *records):
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def write_tar(path, members):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def write_parquet(path, columns, rows_per_group=2):
    pq.write_table(pa.table(columns), path, row_group_size=rows_per_group)
    return str(path)


def source(fmt, path, **options):
    return open_source(SourceSpec(fmt, str(path), **options))


def samples(fmt, path, **options):
    opened = source(fmt, path, **options)
    return [sample for unit in opened.units(3) for sample in opened.load(unit)]


def refused(fmt, path, *words, **options):
    """Opening or reading ends in a UserError of one line that contains all words."""
    with pytest.raises(UserError) as caught:
        samples(fmt, path, **options)
    text = str(caught.value)
    assert [word for word in words if word not in text] == [], text
    assert "\n" not in text
    return text


def captions_of(result):
    return {sample.key: sample.captions for sample in result}


class TestText:
    """csv, tsv, jsonl and image folders."""

    def test_open_clip_csv_rows_of_one_image_are_one_sample(self, tmp_path):
        (tmp_path / "a.jpg").write_bytes(b"A")
        path = write(tmp_path / "x.csv", 'filepath,title\na.jpg,one\nb/b.jpg,"two, with ""quotes"""\na.jpg,three\n')
        first, second = samples("csv", path)
        assert (first.key, first.captions, first.image_bytes()) == ("a.jpg", ("one", "three"), b"A")
        assert second.captions == ('two, with "quotes"',)
        assert second.image == FilePart(str(tmp_path / "b/b.jpg"))

    @pytest.mark.parametrize(
        ("name", "separator", "given"), [("x.tsv", "\t", None), ("x.csv", ";", ";"), ("x", "\t", r"\t")]
    )
    def test_separator_follows_the_name_unless_given(self, tmp_path, name, separator, given):
        path = write(tmp_path / name, f"filepath{separator}title\na.jpg{separator}one, two\n")
        assert captions_of(samples("csv", path, separator=given)) == {"a.jpg": ("one, two",)}

    def test_wrong_separator_shows_the_header(self, tmp_path):
        refused(
            "csv", write(tmp_path / "x.csv", "filepath\ttitle\na\tb\n"), "no column filepath", "separator ','", "title"
        )
        refused("csv", write(tmp_path / "x.csv", "filepath,title\na,b\n"), "one character", separator="::")

    def test_byte_order_mark_blank_lines_and_crlf(self, tmp_path):
        path = write(tmp_path / "x.csv", "\ufefffilepath,title\r\na.jpg,one\r\n\r\nb.jpg,Käse\r\n")
        assert captions_of(samples("csv", path)) == {"a.jpg": ("one",), "b.jpg": ("Käse",)}

    def test_not_utf8_names_line_and_byte(self, tmp_path):
        (tmp_path / "x.csv").write_bytes("filepath,title\na.jpg,Käse\n".encode("latin-1"))
        refused("csv", tmp_path / "x.csv", "x.csv, line 2", "byte 22", "0xe4", "UTF-8")
        (tmp_path / "x.jsonl").write_bytes(b'{"image": "a"}\n{"image": "\xff"}\n')
        refused("jsonl", tmp_path / "x.jsonl", "line 2", "byte 26")

    def test_missing_column_names_those_that_exist(self, tmp_path):
        path = write(tmp_path / "x.csv", "filepath,text,year\na.jpg,one,1999\n")
        refused("csv", path, "no column title", "filepath, text, year", "caption_column")
        for option in ("image_column", "caption_column", "key_column", "label_column", "lang_column"):
            given = {"caption_column": "text"} | {option: "nope"}
            refused("csv", path, "no column nope", "filepath, text, year", option, **given)
        path = write_jsonl(tmp_path / "x.jsonl", {"img": "a"}, {"txt": "b"})
        refused("jsonl", path, "no column image or filepath", "img, txt")

    def test_captions_may_be_absent_where_there_are_labels(self, tmp_path):
        path = write(tmp_path / "x.csv", "filepath,class\na.jpg,3\n")
        assert [(s.captions, s.label) for s in samples("csv", path, label_column="class")] == [((), 3)]

    @pytest.mark.parametrize(
        ("fmt", "text"), [("csv", ""), ("csv", "filepath,title\n"), ("jsonl", ""), ("jsonl", "\n\n")]
    )
    def test_empty_listing(self, tmp_path, fmt, text):
        refused(fmt, write(tmp_path / f"x.{fmt}", text), f"x.{fmt} has no samples")

    @pytest.mark.parametrize("fmt", ["csv", "jsonl", "coco", "folder", "parquet", "webdataset", "xm3600"])
    def test_missing_listing(self, tmp_path, fmt):
        refused(fmt, tmp_path / "nope", "nope", "path")

    def test_a_folder_is_no_listing(self, tmp_path):
        refused("csv", tmp_path, "cannot be read")

    def test_ragged_and_unclosed_rows_name_their_line(self, tmp_path):
        text = 'filepath,title\na.jpg,"two\nlines"\nb.jpg,one,two\n'
        refused("csv", write(tmp_path / "x.csv", text), "line 4 has 3 cells", "header has 2")
        refused("csv", write(tmp_path / "x.csv", "filepath,title\na.jpg\n"), "line 2 has 1 cell, but")
        refused("csv", write(tmp_path / "x.csv", 'filepath,title\na,b\nc,"d\ne,f\ng,h\n'), "line 3 is not valid csv")

    def test_image_path_missing_in_a_row(self, tmp_path):
        refused("csv", write(tmp_path / "x.csv", "filepath,title\n,one\n"), "line 2", "filepath is ''")
        refused(
            "jsonl", write_jsonl(tmp_path / "x.jsonl", {"image": "a"}, {"caption": "b"}), "line 2", "image is missing"
        )

    def test_key_column_and_its_duplicates(self, tmp_path):
        path = write(tmp_path / "x.csv", "filepath,title,id\na.jpg,one,1\nb.jpg,two,2\nc.jpg,three,1\na.jpg,four,1\n")
        refused("csv", path, "key 1", f"line 2 and line 4 of {path}", key_column="id")
        path = write(tmp_path / "x.csv", "filepath,title,id\na.jpg,one,1\na.jpg,two,2\na.jpg,three,1\n")
        assert captions_of(samples("csv", path, key_column="id")) == {"1": ("one", "three"), "2": ("two",)}
        path = write_jsonl(tmp_path / "x.jsonl", {"image": "a", "caption": "b", "id": None})
        refused("jsonl", path, "line 1", "key (id) is missing", key_column="id")

    def test_jsonl_lists_several_columns_and_languages(self, tmp_path):
        path = write_jsonl(
            tmp_path / "x.jsonl",
            {"image": "a", "caption": ["one", None, "zwei"], "alt": "drei", "lang": ["en", "fr", "de", "de"]},
            {"image": "b", "caption": "four", "alt": "five", "lang": "en"},
            {"image": "c", "caption": None, "alt": None, "lang": "en"},
        )
        result = samples("jsonl", path, caption_column="caption, alt", lang_column="lang")
        assert [s.captions for s in result] == [("one", "zwei", "drei"), ("four", "five"), ()]
        assert [s.langs for s in result] == [("en", "de", "de"), ("en", "en"), ()]

    def test_languages_must_match_captions(self, tmp_path):
        for lang in (["en"], None, ["en", None]):
            path = write_jsonl(tmp_path / "x.jsonl", {"image": "a", "caption": ["b", "c"], "lang": lang})
            refused("jsonl", path, "line 1", "lang", "expected one for each", lang_column="lang")

    @pytest.mark.parametrize("line", ["{", "[1]", '"a"', "[" * 100_000])
    def test_broken_json_lines_name_their_line(self, tmp_path, line):
        refused("jsonl", write(tmp_path / "x.jsonl", '{"image": "a", "caption": "b"}\n' + line + "\n"), "line 2")

    @pytest.mark.parametrize("caption", [5, ["a", 5], {"en": "a"}, float("nan")])
    def test_captions_are_text(self, tmp_path, caption):
        path = write_jsonl(tmp_path / "x.jsonl", {"image": "a", "caption": caption})
        refused("jsonl", path, "line 1", "caption is", "text")

    def test_blank_captions_are_dropped_and_their_samples_kept(self, tmp_path):
        path = write(tmp_path / "x.csv", "filepath,title\na.jpg, \nb.jpg,\nc.jpg,\u3000\nc.jpg,d\n")
        assert captions_of(samples("csv", path)) == {"a.jpg": (), "b.jpg": (), "c.jpg": ("d",)}

    def test_half_surrogates_are_replaced_in_captions_and_refused_in_keys(self, tmp_path):
        path = write(tmp_path / "x.jsonl", '{"image": "a", "caption": ["cut \\ud83d", "\\ud83d\\ude00"]}\n')
        assert captions_of(samples("jsonl", path)) == {"a": ("cut \ufffd", "😀")}
        refused("jsonl", write(tmp_path / "x.jsonl", '{"image": "\\ud83d", "caption": "a"}\n'), "line 1", "Unicode")

    @pytest.mark.parametrize("label", [None, "", "cat", "1.5", 1.5, float("nan"), True, [1], 2**70])
    def test_labels_are_integers(self, tmp_path, label):
        path = write_jsonl(tmp_path / "x.jsonl", {"image": "a", "label": 1}, {"image": "b", "label": label})
        refused("jsonl", path, "line 2: label", "integer", label_column="label")

    def test_rows_of_one_image_agree_on_its_label(self, tmp_path):
        path = write(tmp_path / "x.csv", "filepath,title,y\na,b,1\na,c,2\n")
        refused("csv", path, "labels 1 and 2", "line 2 and line 3", label_column="y")

    @pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
    def test_image_folder(self, tmp_path, name):
        if name.endswith("csv"):
            write(tmp_path / name, "file_name,text\nsub/a.png,one\n")
        else:
            write_jsonl(tmp_path / name, {"file_name": "sub/a.png", "text": "one"})
        (result,) = samples("folder", tmp_path)
        assert (result.key, result.captions) == ("sub/a.png", ("one",))
        assert result.image == FilePart(str(tmp_path / "sub/a.png"))

    def test_image_folder_needs_exactly_one_metadata_file(self, tmp_path):
        refused("folder", tmp_path, "no metadata.csv or metadata.jsonl")
        write(tmp_path / "metadata.csv", "")
        write(tmp_path / "metadata.jsonl", "")
        refused("folder", tmp_path, "both")


class TestPaths:
    def test_images_may_lie_elsewhere_and_may_be_missing(self, tmp_path):
        path = write(tmp_path / "x.csv", "filepath,title\na.jpg,one\n/abs/b.jpg,two\n")
        result = samples("csv", path, images=str(tmp_path / "pics"))
        assert [s.image.path for s in result] == [str(tmp_path / "pics/a.jpg"), "/abs/b.jpg"]
        with pytest.raises(FileNotFoundError):
            result[0].image_bytes()

    def test_variables_and_home_expand(self, tmp_path, monkeypatch):
        write(tmp_path / "x.csv", "filepath,title\na.jpg,one\n")
        monkeypatch.setenv("SIGLIT_TEST_DATA", str(tmp_path))
        monkeypatch.setenv("HOME", str(tmp_path))
        for path in ("${SIGLIT_TEST_DATA}/x.csv", "$SIGLIT_TEST_DATA/x.csv", "~/x.csv"):
            assert samples("csv", path, images="${SIGLIT_TEST_DATA}")[0].image.path == str(tmp_path / "a.jpg")
        monkeypatch.delenv("SIGLIT_TEST_DATA")
        refused("csv", "${SIGLIT_TEST_DATA}/x.csv", "SIGLIT_TEST_DATA is not set")
        refused("csv", "~/x.csv", "images is", "SIGLIT_TEST_DATA is not set", images="$SIGLIT_TEST_DATA")

    def test_patterns_find_files_in_natural_order(self, tmp_path):
        for number in (2, 10, 1):
            write_parquet(tmp_path / f"p{number}.parquet", {"image": [b"x"], "caption": ["c"]})
        for pattern in ("", "/*.parquet", "/p{1,2,10}.parquet", "/p{1..2}.parquet,{0}/p10.parquet", "/**/p*"):
            result = samples("parquet", str(tmp_path) + pattern.replace("{0}", str(tmp_path)))
            assert [sample.key for sample in result] == ["p1:0", "p2:0", "p10:0"], pattern
        refused("parquet", tmp_path / "q*.parquet", "no file matches", "q*.parquet")
        refused("parquet", tmp_path / "p{1..3}.parquet", "no file matches", "p3.parquet")
        refused("webdataset", tmp_path, "no file matches", "*.tar")

    def test_a_file_part_that_is_not_there_is_an_os_error(self, tmp_path):
        (tmp_path / "x").write_bytes(b"0123456789")
        assert FilePart(str(tmp_path / "x"), 2, 3).read() == b"234"
        with pytest.raises(OSError, match="ends after 2 of the 5 bytes"):
            FilePart(str(tmp_path / "x"), 8, 5).read()


class TestSpec:
    def test_options_a_format_does_not_read_are_refused(self, tmp_path):
        refused("coco", tmp_path, "label_column", "format coco", "images", label_column="y")
        refused("csv", tmp_path, "split", split="train")
        refused("nope", tmp_path, "'nope'", "webdataset")
        refused("karpathy", tmp_path, "needs split")

    @pytest.mark.parametrize("fold", ["", "3", "10/10", "5-2/10", "-1/10", "a/b", "0-9/0"])
    def test_bad_folds(self, tmp_path, fold):
        refused("csv", write(tmp_path / "x.csv", "filepath,title\na,b\n"), "fold is", "0-8/10", fold=fold)

    @pytest.mark.parametrize("fmt", ["csv", "parquet", "webdataset"])
    def test_folds_divide_the_keys_and_units_stay(self, tmp_path, fmt):
        names = [f"{i:03}" for i in range(200)]
        paths = {
            "csv": write(tmp_path / "x.csv", "filepath,title\n" + "".join(f"{name},c{name}\n" for name in names)),
            "parquet": write_parquet(
                tmp_path / "x.parquet", {"image": [b"i"] * 200, "caption": names, "id": names}, 30
            ),
            "webdataset": write_tar(
                tmp_path / "x.tar", [(f"{n}.{e}", n.encode()) for n in names for e in ("jpg", "txt")]
            ),
        }
        options = {"key_column": "id"} if fmt == "parquet" else {}
        sources = {fold: source(fmt, paths[fmt], fold=fold, **options) for fold in (None, "0-8/10", "9/10")}
        assert len({tuple(opened.units(7)) for opened in sources.values()}) == 1
        kept = {f: [s.key for u in opened.units(7) for s in opened.load(u)] for f, opened in sources.items()}
        assert kept[None] == names
        assert sorted(kept["0-8/10"] + kept["9/10"]) == names
        assert 5 < len(kept["9/10"]) < 40
        # Written down: another hash or byte order would move held-out samples into training.
        assert kept["9/10"][:3] == ["015", "033", "034"]
        assert len(list(sources["9/10"].captions())) == len(kept["9/10"])


class TestIdentity:
    def test_identity_follows_content_and_options_not_the_place(self, tmp_path):
        identities = []
        for folder, text, fold in (("a", "x", None), ("b", "x", None), ("c", "y", None), ("d", "x", "0/2")):
            (tmp_path / folder).mkdir()
            path = write(tmp_path / folder / "l.csv", f"filepath,title\na,{text}\n")
            identities.append(
                json.dumps(source("csv", path, fold=fold, images=str(tmp_path)).identity(), sort_keys=True)
            )
            os.utime(path, (0, 0))
        assert identities[0] == identities[1]
        assert len(set(identities)) == 3
        assert str(tmp_path) not in "".join(identities)

    def test_identity_of_tars_and_parquet_lists_names_and_sizes(self, tmp_path):
        path = write_tar(tmp_path / "a.tar", [("x.jpg", b"1")])
        assert source("webdataset", path).identity()["files"] == [["a.tar", Path(path).stat().st_size]]
        path = write_parquet(tmp_path / "a.parquet", {"image": [b"1"], "caption": ["c"]})
        identity = source("parquet", path, caption_column="caption").identity()
        assert identity["files"] == [["a.parquet", Path(path).stat().st_size]]
        assert identity["options"] == {"caption_column": "caption"}


class TestUnits:
    def test_units_cover_every_row_once(self, tmp_path):
        path = write(tmp_path / "x.csv", "filepath,title\n" + "".join(f"{i},c{i}\n" for i in range(10)))
        opened = source("csv", path)
        units = opened.units(4)
        assert [(u.number, u.start, u.stop) for u in units] == [(0, 0, 4), (1, 4, 8), (2, 8, 10)]
        assert units[2].name == "samples 8-9 of x.csv"
        assert [s.key for u in units for s in opened.load(u)] == [str(i) for i in range(10)]
        assert list(opened.captions()) == [(f"c{i}",) for i in range(10)]


class TestMemory:
    """The memory of samples is estimated from headers alone: bytes of images where the source holds them."""

    def test_files_and_tars_leave_their_images_where_they_are(self, tmp_path):
        text = "filepath,title\n" + "".join(f"{i}.jpg,c\n" for i in range(10))
        assert source("csv", write(tmp_path / "x.csv", text)).memory() == 10 * 400
        for name in ("a", "b", "c"):
            write_tar(tmp_path / f"{name}.tar", [(f"{i}.jpg", b"x" * 9000) for i in range(7)])
        opened = source("webdataset", tmp_path)
        assert opened.memory() == 3 * 7 * 400

    def test_tables_carry_them(self, tmp_path, monkeypatch):
        images = [{"bytes": os.urandom(10_000), "path": None} for _ in range(6)]
        columns = {"image": images, "caption": ["c" * 9000] * 6}
        opened = source("parquet", write_parquet(tmp_path / "x.parquet", columns))
        monkeypatch.setattr(pq.ParquetFile, "read_row_group", None)
        assert 60_000 < opened.memory() < 66_000

    def test_a_detached_sample_needs_no_source(self, tmp_path):
        opened = source(
            "parquet", write_parquet(tmp_path / "x.parquet", {"image": [b"A", b"B"], "caption": ["a", "b"]})
        )
        sample = opened.load(opened.units(2)[0])[1].detached()
        (tmp_path / "x.parquet").unlink()
        assert sample.image == pickle.loads(pickle.dumps(sample)).image_bytes() == b"B"


class TestCocoAndKarpathy:
    IMAGES = [{"id": 7, "file_name": "b.jpg"}, {"id": 3, "file_name": "a.jpg"}, {"id": 9, "file_name": "c.jpg"}]  # noqa: RUF012

    def test_coco(self, tmp_path):
        notes = [
            {"image_id": 3, "caption": "one"},
            {"image_id": 7, "caption": "two"},
            {"image_id": 3, "caption": "three"},
        ]
        path = write_json(tmp_path / "x.json", {"images": self.IMAGES, "annotations": notes})
        result = samples("coco", path, images="val2017")
        assert captions_of(result) == {"b.jpg": ("two",), "a.jpg": ("one", "three"), "c.jpg": ()}
        assert [s.key for s in result] == ["b.jpg", "a.jpg", "c.jpg"]
        assert result[0].image == FilePart("val2017/b.jpg")

    def test_coco_mistakes(self, tmp_path):
        path = tmp_path / "x.json"
        refused("coco", write_json(path, {"images": []}), "not a COCO", "annotations")
        refused("coco", write_json(path, {"images": [1], "annotations": []}), "not a COCO")
        refused("coco", write_json(path, {"images": [], "annotations": []}), "no samples")
        refused("coco", write_json(path, [1]), "list in JSON")
        refused("coco", write(path, "{"), "not valid JSON")
        notes = [{"image_id": 5, "caption": "one"}]
        refused("coco", write_json(path, {"images": self.IMAGES, "annotations": notes}), "annotation 0", "image id 5")
        twice = [*self.IMAGES, {"id": 3, "file_name": "d.jpg"}]
        refused("coco", write_json(path, {"images": twice, "annotations": []}), "image 3", "id 3")
        twice = [*self.IMAGES, {"id": 4, "file_name": "a.jpg"}]
        refused("coco", write_json(path, {"images": twice, "annotations": []}), "a.jpg", "image 1 and image 3")

    def karpathy(self, tmp_path, **fields):
        splits = ["train", "restval", "val", "test"]
        images = [{"filename": f"{s}.jpg", "split": s, "sentences": [{"raw": f"a {s}"}, {"raw": " "}]} for s in splits]
        return write_json(tmp_path / "x.json", {"images": [image | fields for image in images]})

    def test_karpathy_train_includes_restval(self, tmp_path):
        path = self.karpathy(tmp_path)
        result = samples("karpathy", path, split="train")
        assert captions_of(result) == {"train.jpg": ("a train",), "restval.jpg": ("a restval",)}
        assert captions_of(samples("karpathy", path, split="test")) == {"test.jpg": ("a test",)}

    def test_karpathy_file_path_of_coco(self, tmp_path):
        (result,) = samples("karpathy", self.karpathy(tmp_path, filepath="val2014"), split="val")
        assert (result.key, result.image) == ("val2014/val.jpg", FilePart(str(tmp_path / "val2014/val.jpg")))

    def test_karpathy_mistakes(self, tmp_path):
        refused("karpathy", self.karpathy(tmp_path), "no split dev", "restval, test, train, val", split="dev")
        refused("karpathy", self.karpathy(tmp_path, sentences=3), "not a Karpathy", split="val")
        refused("karpathy", self.karpathy(tmp_path, filename="x.jpg"), "image 0 and image 1", split="train")


class TestXm3600:
    def test_languages_run_beside_captions(self, tmp_path):
        (tmp_path / "images").mkdir()
        (tmp_path / "images/k1.png").write_bytes(b"P")
        records = [
            {"image/key": "k1", "image/locale": "en", "en": {"caption": ["a", "b"], "caption/tokenized": ["x"]}},
            {"image/key": "k2", "image/locale": "de", "de": {"caption": ["c", ""]}, "fr": {"caption": ["d"]}},
        ]
        path = write_jsonl(tmp_path / "captions.jsonl", *records)
        first, second = samples("xm3600", tmp_path)
        assert (first.key, first.captions, first.langs, first.image_bytes()) == ("k1", ("a", "b"), ("en", "en"), b"P")
        assert (second.captions, second.langs) == (("c", "d"), ("de", "fr"))
        assert second.image == FilePart(str(tmp_path / "images/k2.jpg"))
        assert samples("xm3600", path) == [first, second]

    def test_mistakes(self, tmp_path):
        path = tmp_path / "x.jsonl"
        refused("xm3600", write_jsonl(path, {"image/key": "a"}, {"image/key": "a"}), "line 1 and line 2")
        refused("xm3600", write_jsonl(path, {"en": {"caption": ["a"]}}), "line 1", "key (image/key) is missing")


class TestParquet:
    def table(self, tmp_path, name="x.parquet", count=5, **columns):
        images = [{"bytes": f"image {i}".encode(), "path": None} for i in range(count)]
        table = {"image": images, "caption": [f"c{i}" for i in range(count)], "label": list(range(count))}
        return write_parquet(tmp_path / name, table | columns)

    def test_rows_keys_and_labels_across_files(self, tmp_path):
        self.table(tmp_path, "a.parquet", 3)
        self.table(tmp_path, "b.parquet", 4)
        opened = source("parquet", tmp_path)
        result = [s for unit in opened.units(5) for s in opened.load(unit)]
        assert [s.key for s in result] == ["a:0", "a:1", "a:2", "b:0", "b:1", "b:2", "b:3"]
        assert [s.image_bytes() for s in result[2:4]] == [b"image 2", b"image 0"]
        assert [s.label for s in result] == [0, 1, 2, 0, 1, 2, 3]
        assert list(opened.captions()) == [s.captions for s in result]
        assert [s.key for s in opened.load(opened.units(5)[0])[1:3]] == ["a:1", "a:2"]

    @pytest.mark.parametrize("kind", ["string", "binary", "large_binary", "struct"])
    def test_image_column_types(self, tmp_path, kind):
        (tmp_path / "a.jpg").write_bytes(b"A")
        values = {"string": ["a.jpg", None], "struct": [{"bytes": None, "path": "a.jpg"}, None]}.get(kind, [b"A", None])
        arrow = pa.array(values) if kind == "struct" else pa.array(values, getattr(pa, kind)())
        path = write_parquet(tmp_path / "x.parquet", {"image": arrow, "caption": ["a", "b"]})
        assert [s.image_bytes() for s in samples("parquet", path)] == [b"A", b""]

    def test_a_sample_reads_only_its_row_group(self, tmp_path, monkeypatch):
        opened = source("parquet", self.table(tmp_path, count=6))
        result = opened.load(opened.units(6)[0])
        reads = []
        original = pq.ParquetFile.read_row_group
        monkeypatch.setattr(
            pq.ParquetFile,
            "read_row_group",
            lambda self, i, columns: reads.append(i) or original(self, i, columns=columns),
        )
        assert len(result) == 6
        assert reads == []
        assert [result[i].image_bytes() for i in (4, 5, 0)] == [b"image 4", b"image 5", b"image 0"]
        assert reads == [2, 0]

    def test_captions_read_no_images(self, tmp_path, monkeypatch):
        opened = source("parquet", self.table(tmp_path))
        seen = set()
        original = pq.ParquetFile.read_row_group
        monkeypatch.setattr(
            pq.ParquetFile,
            "read_row_group",
            lambda s, i, columns: seen.update(columns) or original(s, i, columns=columns),
        )
        assert len(list(opened.captions())) == 5
        assert seen == {"caption", "label"}

    def test_pickled_source_leaves_its_row_groups_behind(self, tmp_path):
        images = [os.urandom(100_000) for _ in range(4)]
        opened = source("parquet", self.table(tmp_path, count=4, image=images))
        samples_ = opened.load(opened.units(4)[0])
        assert samples_[0].image_bytes() == images[0]
        pickled = pickle.dumps(samples_)
        assert len(pickled) < 20_000
        assert pickle.loads(pickled)[3].image_bytes() == images[3]

    def test_key_column_and_list_captions(self, tmp_path):
        path = self.table(tmp_path, count=2, caption=[["a", " "], ["b", "c"]], id=[11, 12])
        assert captions_of(samples("parquet", path, key_column="id")) == {"11": ("a",), "12": ("b", "c")}

    def test_duplicate_and_missing_keys_name_both_rows(self, tmp_path):
        self.table(tmp_path, "a.parquet", 3, id=["p", "q", "r"])
        self.table(tmp_path, "b.parquet", 2, id=["s", "q"])
        refused("parquet", tmp_path, "'q'", "row 1 of", "a.parquet", "row 1 of", "b.parquet", key_column="id")
        refused(
            "parquet", self.table(tmp_path, count=2, id=["p", None]), "row 1", "key (id) is missing", key_column="id"
        )

    def test_labels(self, tmp_path):
        result = samples("parquet", self.table(tmp_path, count=2, label=[1, None]))
        assert [s.label for s in result] == [1, None]
        refused("parquet", self.table(tmp_path, count=2, label=[1, None]), "row 1", "missing", label_column="label")
        path = self.table(tmp_path, count=2, label=[1.0, float("nan")])
        assert [s.label for s in samples("parquet", path)] == [None, None]
        refused("parquet", path, "row 0", "1.0", "integer", label_column="label")

    def test_labelled_images_need_no_captions(self, tmp_path):
        path = write_parquet(tmp_path / "x.parquet", {"image": [b"a"], "label": [3]})
        assert [(s.captions, s.label) for s in samples("parquet", path)] == [((), 3)]

    def test_mistakes(self, tmp_path):
        path = self.table(tmp_path)
        refused("parquet", path, "no column text", "image, caption, label", caption_column="text")
        refused("parquet", path, "column label is int64", image_column="label")
        refused(
            "parquet", write_parquet(tmp_path / "e.parquet", {"image": pa.array([], pa.binary())}), "has no samples"
        )
        refused("parquet", write(tmp_path / "t.parquet", "PAR1 no"), "t.parquet is not a readable parquet file")

    def test_damaged_row_group_names_the_file(self, tmp_path):
        path = Path(self.table(tmp_path))
        data = bytearray(path.read_bytes())
        start = pq.read_metadata(path).row_group(0).column(2).dictionary_page_offset
        data[start : start + 20] = b"\xff" * 20
        path.write_bytes(data)
        refused("parquet", path, "x.parquet, row group 0 cannot be read")


class TestWebdataset:
    META = json.dumps({"caption": "from json", "alt": ["x", "y"], "label": 4, "uid": "u1", "lang": "en"}).encode()

    def test_img2dataset_layout(self, tmp_path):
        members = [("000/1.jpg", b"J1"), ("000/1.txt", b"one"), ("000/1.json", self.META), ("2.JSON", self.META)]
        members += [
            ("2.PNG", b"P2"),
            ("3.webp", b""),
            ("3.cls", b"7\n"),
            ("3.txt", b" "),
            ("4.txt", b"no image"),
            ("._5.jpg", b""),
        ]
        path = write_tar(tmp_path / "x.tar", members)
        result = samples("webdataset", path)
        assert captions_of(result) == {"000/1": ("one",), "2": ("from json",), "3": (), "4": ("no image",)}
        assert [s.image_bytes() for s in result] == [b"J1", b"P2", b"", b""]
        assert [s.label for s in result] == [None, None, 7, None]

    def test_columns_of_the_json(self, tmp_path):
        path = write_tar(tmp_path / "x.tar", [("1.jpg", b""), ("1.txt", b"one"), ("1.json", self.META)])
        options = {"caption_column": "caption,alt", "label_column": "label", "key_column": "uid", "lang_column": "lang"}
        (result,) = samples("webdataset", path, **options)
        assert result.captions == ("from json", "x", "y")
        assert (result.key, result.label, result.langs) == ("u1", 4, ("en", "en", "en"))
        (result,) = samples("webdataset", path, label_column="label")
        assert (result.captions, result.label) == (("one",), 4)

    def test_one_unit_per_tar_whatever_the_shard_size(self, tmp_path):
        for number in (10, 9):
            write_tar(tmp_path / f"s{number}.tar", [(f"{number}.jpg", b"")])
        opened = source("webdataset", str(tmp_path / "s{9..10}.tar"))
        assert [u.name for u in opened.units(1)] == ["s9.tar", "s10.tar"]
        assert opened.units(1) == opened.units(1000)
        assert [s.key for u in opened.units(5) for s in opened.load(u)] == ["9", "10"]

    def test_loading_reads_no_images(self, tmp_path, monkeypatch):
        path = write_tar(tmp_path / "x.tar", [("1.jpg", b"x" * 5000), ("1.txt", b"one")])
        read, original = [], samples_module.read_part
        for module in (samples_module, tars, tar_source):
            monkeypatch.setattr(
                module, "read_part", lambda path, at, size: read.append(size) or original(path, at, size)
            )
        (result,) = samples("webdataset", path)
        assert result.image == FilePart(path, 512, 5000)
        assert max(read) <= 512

    def test_long_and_hostile_names_stay_names(self, tmp_path):
        name = "../" * 40 + "etc/passwd"
        with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for extension in ("jpg", "txt"):
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size = 1
                tar.addfile(info, io.BytesIO(b"z"))
            link = tarfile.TarInfo("2.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
        (result,) = samples("webdataset", tmp_path / "x.tar")
        assert (result.key, result.captions, result.image_bytes()) == (name, ("z",), b"z")

    def test_duplicates_name_both_offsets(self, tmp_path):
        path = write_tar(tmp_path / "x.tar", [("1.jpg", b"a"), ("2.jpg", b"b"), ("1.jpg", b"c")])
        refused("webdataset", path, "x.tar", "key 1", "1.jpg at byte 512 and 1.jpg at byte 2560")
        path = write_tar(tmp_path / "x.tar", [("1.jpg", b"a"), ("1.png", b"b")])
        refused("webdataset", path, "1.jpg at byte 512 and 1.png at byte 1536")
        members = [(f"{i}.{e}", self.META) for i in (1, 2) for e in ("jpg", "json")]
        refused("webdataset", write_tar(tmp_path / "x.tar", members), "u1", "sample 0", "sample 1", key_column="uid")

    def test_compressed_tar(self, tmp_path):
        path = write_tar(tmp_path / "x.tar", [("1.jpg", b"a")])
        Path(path).write_bytes(gzip.compress(Path(path).read_bytes()))
        refused("webdataset", path, "x.tar is compressed", "unpack")

    @pytest.mark.parametrize("cut", [0, 100, 600, 1024, 1100, 1536, 2048, 2600, 3072])
    def test_truncated_tar(self, tmp_path, cut):
        """Cut in a header, in a member, and between two members, which tarfile takes for the end."""
        path = Path(write_tar(tmp_path / "x.tar", [("1.jpg", b"a" * 300), ("1.txt", b"one"), ("2.jpg", b"b" * 500)]))
        path.write_bytes(path.read_bytes()[:cut])
        refused("webdataset", path, "x.tar is truncated")

    def test_damaged_header_in_the_middle(self, tmp_path):
        path = Path(write_tar(tmp_path / "x.tar", [("1.jpg", b"a"), ("2.jpg", b"b"), ("3.jpg", b"c")]))
        data = bytearray(path.read_bytes())
        data[1024 : 1024 + 512] = b"\xaa" * 512
        path.write_bytes(data)
        refused("webdataset", path, "x.tar is truncated", "byte 1024")

    def test_an_empty_tar_is_an_empty_unit(self, tmp_path):
        """img2dataset writes one when every download of a shard failed."""
        assert samples("webdataset", write_tar(tmp_path / "x.tar", [])) == []

    def test_mistakes_inside_name_the_member(self, tmp_path):
        path = tmp_path / "x.tar"
        refused("webdataset", write_tar(path, [("1.txt", b"a\xff")]), "1.txt", "byte 513", "UTF-8")
        refused("webdataset", write_tar(path, [("1.json", b"{")]), "x.tar, sample 1", "JSON")
        refused("webdataset", write_tar(path, [("1.cls", b"cat")]), "sample 1", ".cls", "'cat'")
        refused("webdataset", write_tar(path, [("1.jpg", b"")]), "sample 1", "label", "missing", label_column="label")
        refused("webdataset", write(path, "hello"), "x.tar is truncated, or not a tar")


class FakeDataset:
    """What the source uses of datasets.Dataset."""

    def __init__(self, rows, features):
        self.rows, self.features, self.column_names = rows, features, list(features)
        self.info = types.SimpleNamespace(dataset_size=123)
        self.data = types.SimpleNamespace(nbytes=3_000)
        self.decode = True

    def __len__(self):
        return len(self.rows)

    def cast_column(self, name, feature):
        assert not feature.decode
        cast = FakeDataset(self.rows, self.features | {name: feature})
        cast.decode = False
        return cast

    def select_columns(self, names):
        assert not self.decode or "image" not in names
        return FakeDataset([{n: row[n] for n in names} for row in self.rows], {n: self.features[n] for n in names})

    def __getitem__(self, index):
        if isinstance(index, slice):
            return {name: [row[name] for row in self.rows[index]] for name in self.column_names}
        return self.rows[index]


class FakeImage:
    def __init__(self, decode=True):
        self.decode = decode


class TestHub:
    @pytest.fixture
    def hub(self, monkeypatch):
        calls = []

        def load_dataset(name, **options):
            calls.append((name, options))
            if name == "nobody/nothing":
                raise ConnectionError("Couldn't reach the Hub\nsecond line")
            rows = [{"image": {"bytes": b"%d" % i, "path": "x.png"}, "caption": f"c{i}", "label": i} for i in range(5)]
            features = {"image": FakeImage(), "caption": None, "label": types.SimpleNamespace(dtype="int64")}
            return FakeDataset(rows, features)

        module = types.ModuleType("datasets")
        module.load_dataset, module.Image = load_dataset, FakeImage
        monkeypatch.setitem(sys.modules, "datasets", module)
        return calls

    def test_images_come_undecoded(self, hub):
        result = samples("hub", "owner/set", split="train")
        assert [(s.key, s.image_bytes(), s.captions, s.label) for s in result][4] == ("train:4", b"4", ("c4",), 4)
        assert len(result) == 5
        assert hub == [("owner/set", {"split": "train"})]

    def test_identity_and_captions(self, hub):
        opened = source("hub", "owner/set", split="train")
        assert opened.identity()["dataset"] == "owner/set"
        assert json.dumps(opened.identity())
        assert list(opened.captions())[1] == ("c1",)
        assert opened.memory() == 5 * 400 + 3_000

    def test_unreachable_hub_names_the_local_way(self, hub):
        refused("hub", "nobody/nothing", "nobody/nothing", "Couldn't reach", "format: parquet", split="train")
        refused("hub", "owner/set", "needs split")

    def test_missing_package_names_the_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        refused("hub", "owner/set", "pip install 'siglit[hub]'", split="train")


DATA = Path(os.environ.get("SIGLIT_DATA", "/nonexistent"))


@pytest.mark.skipif(not (DATA / "emoji").is_dir(), reason="SIGLIT_DATA has no emoji")
def test_real_emoji():
    result = samples("xm3600", "${SIGLIT_DATA}/emoji")
    assert len(result) == 1650
    assert all(len(s.captions) == len(s.langs) > 0 for s in result)
    assert len({lang for s in result for lang in s.langs}) == 36
    assert all(s.image_bytes().startswith(b"\x89PNG") for s in result[::100])


@pytest.mark.skipif(not (DATA / "cifar10").is_dir(), reason="SIGLIT_DATA has no cifar10")
def test_real_cifar():
    opened = source("parquet", "${SIGLIT_DATA}/cifar10/train-{00000..00004}.parquet")
    units = opened.units(20_000)
    last = opened.load(units[-1])
    assert (len(units), len(last)) == (3, 10_000)
    assert last[9_999].image_bytes().startswith(b"\xff\xd8")
    assert {sample.label for sample in last[:200]} == set(range(10))
