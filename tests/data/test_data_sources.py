"""Sources: the fixed split of the digits; files, their errors, tokens against Hugging Face, and the cache."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fedjax_lora.data.sources import DataConfig, load
from fedjax_lora.data.tokens import tokenizer_hash

TRAIN = "good film\tpos\nbad\tneg\n\nso so long and bad a film\tneg\n"
TEST = "a bad film\tneg\r\n"
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "good", "bad", "film", "so", "long", "and", "a"]


class CountingTokenizer(PreTrainedTokenizerFast):
    calls = 0

    def __call__(self, *args, **kwargs):
        type(self).calls += 1
        return super().__call__(*args, **kwargs)


def make_tokenizer(pad_token: str | None = "[PAD]", padding_side="right", words=WORDS):
    """A word-level tokenizer in the manner of BERT: `[CLS] ... [SEP]`."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    CountingTokenizer.calls = 0
    return CountingTokenizer(tokenizer_object=core, pad_token=pad_token, unk_token="[UNK]", padding_side=padding_side)


@pytest.fixture
def files(tmp_path):
    """Writes the two files and gives the config that names them."""

    def write(train=TRAIN, test=TEST, max_length=6):
        paths = tmp_path / "train.tsv", tmp_path / "test.tsv"
        for path, text in zip(paths, (train, test), strict=True):
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return DataConfig(source="tsv", train=str(paths[0]), test=str(paths[1]), max_length=max_length)

    return write


def rows_of(pool):
    """Each image as bytes."""
    return [image.tobytes() for image in pool["image"]]


def test_digits_parts_are_disjoint_and_together_the_whole_set():
    """Conservation: the images of the three parts are scikit-learn's, each as often as there."""
    examples = load(DataConfig())
    assert examples.public is not None
    images, labels = load_digits(return_X_y=True)
    whole = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    parts = [examples.train, examples.test, examples.public]
    assert len(set(rows_of({"image": whole}))) == len(whole)  # so bytes tell images apart
    assert sorted(row for part in parts for row in rows_of(part)) == sorted(rows_of({"image": whole}))
    label_of = dict(zip(rows_of({"image": whole}), labels, strict=True))
    for part in parts:
        np.testing.assert_array_equal(part["label"], [label_of[row] for row in rows_of(part)])
        assert part["image"].dtype == np.float32 and part["label"].dtype == np.int32
        assert part["image"].shape[1:] == examples.image_shape == (8, 8, 1)
        assert part["image"].min() == 0 and part["image"].max() == 1


def test_digits_split_is_stratified_and_public_holds_0_to_4_only():
    """Closed form: per class a fifth is test, then 45 % of 0-4 public, rounded."""
    examples = load(DataConfig())
    assert examples.public is not None
    whole = np.bincount(load_digits(return_X_y=True)[1])
    test = np.array([round(0.2 * n) for n in whole])
    public = np.array([round(0.45 * (n - t)) if c < 5 else 0 for c, (n, t) in enumerate(zip(whole, test, strict=True))])
    np.testing.assert_array_equal(np.bincount(examples.test["label"]), test)
    np.testing.assert_array_equal(np.bincount(examples.public["label"], minlength=10), public)
    np.testing.assert_array_equal(np.bincount(examples.train["label"]), whole - test - public)
    assert examples.class_names == tuple("0123456789")
    assert examples.tokenizer_hash == ""


def test_digits_split_is_the_recorded_one():
    """Recorded value: experiments compare only while everyone has this split."""
    assert load(DataConfig()).fingerprint == "51373f38691f81853fdf7a699e000de6c4a4cadcf192e41235635b04e8e84d23"


@pytest.mark.parametrize("pad_token", ["[PAD]", None])
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_tokens_equal_hugging_face_padding_and_truncation(files, pad_token, padding_side):
    examples = load(files(), make_tokenizer(pad_token, padding_side))
    sentences = ["good film", "bad", "so so long and bad a film"]
    expected = make_tokenizer()(sentences, padding="max_length", truncation=True, max_length=6, return_tensors="np")
    for name in ("input_ids", "attention_mask"):
        np.testing.assert_array_equal(examples.train[name], expected[name])
        assert examples.train[name].dtype == np.int32
        assert examples.test[name].shape == (1, 6)
    np.testing.assert_array_equal(examples.train["label"], [1, 0, 0])  # neg < pos
    np.testing.assert_array_equal(examples.test["label"], [0])
    assert set(examples.train) == {"input_ids", "attention_mask", "label"}
    assert examples.class_names == ("neg", "pos")
    assert examples.public is None and examples.image_shape is None
    assert examples.truncated == 1


def test_truncated_counts_only_sentences_over_the_limit(files):
    """Closed form: the longest sentence takes 7 words and 2 special tokens."""
    assert load(files(max_length=9), make_tokenizer()).truncated == 0
    assert load(files(max_length=8), make_tokenizer()).truncated == 1
    assert load(files(max_length=2), make_tokenizer()).truncated == 4


def test_numeric_labels_sort_by_value_and_others_by_text(files):
    for labels, expected in ((("10", "9", "-1"), ("-1", "9", "10")), (("10", "9", "b"), ("10", "9", "b"))):
        train = "".join(f"film\t{label}\n" for label in labels)
        assert load(files(train, f"bad\t{labels[1]}"), make_tokenizer()).class_names == expected


def test_sentence_may_hold_tabs_and_odd_line_breaks(files):
    """Invariance: a byte order mark, tabs and U+2028 inside a sentence do not add or move examples."""
    plain = load(files("good bad film\ta\nbad film\tb\n", "film\ta"), make_tokenizer())
    odd = load(files("\ufeffgood\tbad film\ta\r\nbad\u2028film\tb", "film\ta"), make_tokenizer())
    assert odd.fingerprint == plain.fingerprint


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (
            "good film\tpos\nbad neg\n",
            TEST,
            r"^data\.train .*train\.tsv, line 2: must be sentence<TAB>label, got 'bad neg'$",
        ),
        (
            "good film\tpos\n\nbad\t\n",
            TEST,
            r"^data\.train .*train\.tsv, line 3: must be sentence<TAB>label, got 'bad\\t'$",
        ),
        *[
            (
                f"{header}\n{TRAIN}",
                TEST,
                rf"^data\.train .*train\.tsv, line 1: must be sentence<TAB>label, got the header .*{last}'$",
            )
            for header, last in (
                ("label\tsentence", "sentence"),
                ("idx\tSentence\tLabel", "Label"),
                ("number\tquestion\tlabel", "label"),
            )
        ],
        (
            "text\tlabel\n",
            TEST,
            r"^data\.train must hold at least one sentence<TAB>label line, got none in .*train\.tsv$",
        ),
        (TRAIN, "\tneg\n", r"^data\.test .*test\.tsv, line 1: must be sentence<TAB>label, got '\\tneg'$"),
        ("", TEST, r"^data\.train must hold at least one sentence<TAB>label line, got none in .*train\.tsv$"),
        (TRAIN, "\n \n", r"^data\.test must hold at least one sentence<TAB>label line, got none in .*test\.tsv$"),
        (
            "good\tpos\nfilm\tpos\n",
            "bad\tpos\n",
            r"^data\.train .*train\.tsv: must hold at least 2 labels, got only 'pos'$",
        ),
        (
            TRAIN,
            "bad\tneg\nso\tmeh\n",
            r"^data\.test .*, line 2: must be a label of data\.train, 'neg, pos', got 'meh'$",
        ),
        (b"good\tpos\nb\xffd\tneg\n", TEST, r"^data\.train .*train\.tsv, line 2: must be UTF-8, got 0xff$"),
    ],
)
def test_a_bad_file_is_one_line_that_says_where(files, train, test, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(files(train, test), make_tokenizer())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "header",
    [
        "sentence\tlabel",
        "Text\tLABEL",
        "review\tsentiment",
        " text \tclass\r",
        "\ufeffcontent\ttarget",
        "\ntext\tlabels",
        "headline\tlabel",
        "question\tlabel",
        "utterance\tintent",
        "sentence\tscore",
        '"text"\t"label"',
        "#text\tlabel",
        "'# whatever it is'\tClass",
        "title\tlabel",
    ],
)
def test_a_known_header_is_skipped_invariance(files, header):
    """The same examples with it and without it, in either file."""
    plain = load(files(), make_tokenizer()).fingerprint
    assert load(files(f"{header}\n{TRAIN}", TEST), make_tokenizer()).fingerprint == plain
    assert load(files(TRAIN, f"{header}\n{TEST}"), make_tokenizer()).fingerprint == plain


@pytest.mark.parametrize(
    ("line", "more"),
    [("text\tpos", ""), ("text\tmeh", ""), ("good film\tclass", "bad\tclass\n"), ("a long text\tlabel", "so\tLabel\n")],
)
def test_a_first_line_that_only_resembles_a_header_is_an_example_count(files, line, more):
    """A label that stands elsewhere, or is no name of a column."""
    examples = load(files(f"{line}\n{TRAIN}{more}"), make_tokenizer())
    assert len(examples.train["label"]) == 4 + len(more.splitlines())
    assert examples.class_names[examples.train["label"][0]] == line.split("\t")[1]


@pytest.mark.parametrize("header", ["headline\tverdict", "good film\tis it good?", "id\theadline\tverdict"])
def test_the_only_label_that_is_no_integer_may_be_a_header_and_is_refused(files, header):
    """By hand; where another line has such a label too, or the first has an integer, it is an example."""
    numbered = TRAIN.replace("pos", "1").replace("neg", "-1")
    for given in (files(f"{header}\n{numbered}"), files(numbered, f"{header}\nbad\t1\n")):
        with pytest.raises(ValueError, match=r"line 1: must have an integer .* looks like a header: remove it$"):
            load(given, make_tokenizer())
    label = header.split("\t")[-1]
    for text, count in ((f"{header}\n{numbered}so\t{label}\n", 5), (f"so\t7\n{numbered}", 4)):
        assert len(load(files(text, "bad\t1"), make_tokenizer()).train["label"]) == count


@pytest.mark.parametrize(
    ("core", "reason"),
    [
        (models.WordLevel({"good": 0, "film": 1, "bad": 2}, unk_token="[UNK]"), "Missing \\[UNK\\] token"),
        (models.BPE({letter: i for i, letter in enumerate("godfilmba")}, []), "no token"),
    ],
)
def test_a_sentence_that_the_tokenizer_cannot_read_is_one_line(files, tmp_path, core, reason):
    """Where a tokenizer raises, and where it drops a word without saying so."""
    backend = Tokenizer(core)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    config = files("good film\tpos\nbad\tneg\n\nzzz\tneg\n", "good\tpos")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    message = (
        rf"^data\.train .*train\.tsv, line 4: must be words that the model's tokenizer knows, got 'zzz': .*{reason}"
    )
    for name in ("", "words"):
        with pytest.raises(ValueError, match=message) as caught:
            load(config, tokenizer, name, tmp_path / "cache")
        assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    config = DataConfig(source="tsv", train=str(tmp_path / "no.tsv"), test="x")
    with pytest.raises(ValueError, match=r"^data\.train must be a file that can be read, got .*no\.tsv: No such file"):
        load(config, make_tokenizer())
    for path, reason in (("a\0b", "null byte"), (str(tmp_path), "Is a directory")):
        with pytest.raises(ValueError, match=rf"^data\.train must be a file that can be read, got .*: .*{reason}"):
            load(DataConfig(source="tsv", train=path, test="x"), make_tokenizer())


def test_tsv_without_a_tokenizer_is_refused(files):
    with pytest.raises(
        ValueError, match=r"^data\.source must be one of images for a model without a tokenizer, got 'tsv'$"
    ):
        load(files())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "hub"}, r"^source must be one of digits, tsv, got 'hub'$"),
        ({"source": "tsv", "train": "a"}, r"^test must be the path of a file when source is tsv, got None$"),
        ({"source": "tsv", "test": "a"}, r"^train must be the path of a file when source is tsv, got None$"),
        ({"train": "a"}, r"^train must be absent when source is digits, got 'a'$"),
        ({"test": "a"}, r"^test must be absent when source is digits, got 'a'$"),
        ({"max_length": 1}, r"^max_length must be at least 2, got 1$"),
    ],
)
def test_config_errors_name_field_value_and_range(fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)


def test_cache_hit_reads_the_same_without_tokenising(files, tmp_path):
    tokenizer = make_tokenizer()
    first = load(files(), tokenizer, "words", tmp_path / "cache")
    calls = CountingTokenizer.calls
    again = load(files(), tokenizer, "words", tmp_path / "cache")
    assert CountingTokenizer.calls == calls > 0
    assert again.fingerprint == first.fingerprint == load(files(), tokenizer).fingerprint
    assert again.truncated == first.truncated == 1
    assert len(list((tmp_path / "cache").iterdir())) == 2  # nothing left over from writing


def test_cache_is_keyed_by_content_tokenizer_and_length(files, tmp_path):
    """Counting: each change of one of the three makes new files, and only for what changed."""
    cache = tmp_path / "cache"

    def entries(tokenizer_id="words", **changed):
        load(files(**changed), make_tokenizer(), tokenizer_id, cache)
        return len(list(cache.iterdir()))

    assert [entries(), entries(test="film\tpos"), entries("other"), entries(max_length=7)] == [2, 3, 5, 7]


def test_cache_tells_tokenizers_of_one_name_apart(files, tmp_path):
    """Invariance: a vocabulary that changed under its name gives what it gives without a cache."""
    cache = tmp_path / "cache"
    other = [*WORDS[:4], *reversed(WORDS[4:])]
    first = load(files(), make_tokenizer(), "words", cache)
    second = load(files(), make_tokenizer(words=other), "words", cache)
    assert second.fingerprint == load(files(), make_tokenizer(words=other)).fingerprint != first.fingerprint


def saved(folder, **settings):
    """The tokenizer of words as a folder gives it, its `tokenizer_config.json` changed."""
    make_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return PreTrainedTokenizerFast.from_pretrained(folder)


def test_cache_tells_settings_of_a_tokenizer_apart(files, tmp_path):
    """Invariance: sentences that are cut on the other side are what they are without a cache."""
    cut = [saved(tmp_path / side, truncation_side=side) for side in ("right", "left")]
    first, second = (load(files(), tokenizer, "words", tmp_path / "cache") for tokenizer in cut)
    assert second.fingerprint == load(files(), cut[1]).fingerprint != first.fingerprint


def reformatted(folder):
    """The tokenizer of a folder, its files written in another manner."""
    for path in folder.glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()), indent=7, sort_keys=True) + "\n\n")
    return PreTrainedTokenizerFast.from_pretrained(folder)


def lower_casing(folder):
    """The tokenizer of a folder, which does not tell capitals from small letters any more."""
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "Lowercase"}}))
    return PreTrainedTokenizerFast.from_pretrained(folder)


def test_tokenizer_hash_is_of_all_that_decides_tokens_and_of_nothing_else(tmp_path):
    """Counting: equal for copies of a folder, after use and however it is written, another for each change."""
    plain = saved(tmp_path / "plain")
    plain(["good"], truncation=True, max_length=3, padding="max_length")
    saved(tmp_path / "written")
    for same in (
        saved(tmp_path / "copy"),
        saved(tmp_path / "chat", chat_template="{{ messages }}", do_lower_case=True),
        reformatted(tmp_path / "written"),
    ):
        assert tokenizer_hash(same) == tokenizer_hash(plain)
    added = saved(tmp_path / "added")
    added.add_tokens(["dull"])
    saved(tmp_path / "lower")
    changed = [
        added,
        lower_casing(tmp_path / "lower"),
        make_tokenizer(padding_side="left"),
        make_tokenizer(pad_token=None),
        make_tokenizer(words=[*WORDS, "dull"]),
        *[
            saved(tmp_path / str(i), **settings)
            for i, settings in enumerate(
                [
                    {"truncation_side": "left"},
                    {"model_max_length": 5},
                    {"cls_token": "[CLS]"},
                    {"split_special_tokens": True},
                ]
            )
        ],
    ]
    assert len({tokenizer_hash(tokenizer) for tokenizer in [plain, *changed]}) == 1 + len(changed)


def test_cache_misses_on_any_change_of_a_folder_which_costs_time_alone(files, tmp_path):
    """Counting: the files of the cache."""
    for folder, change in (("model", lambda folder: None), ("copy", lambda folder: None), ("other", reformatted)):
        tokenizer = saved(tmp_path / folder)
        change(tmp_path / folder)
        load(files(), tokenizer, "words", tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 4


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_damaged_cache_is_rebuilt(files, tmp_path, damage):
    """Invariance: whatever happened to the cache, the examples are the same; counting: the next load is a hit."""
    cache = tmp_path / "cache"
    first = load(files(), make_tokenizer(), "words", cache)
    for path in cache.iterdir():
        content = path.read_bytes()
        flipped = content[:-1] + bytes([content[-1] ^ 1])
        path.write_bytes({"cut": content[:-5], "flip": flipped, "empty": b""}[damage])
    assert load(files(), make_tokenizer(), "words", cache).fingerprint == first.fingerprint
    calls = CountingTokenizer.calls
    assert load(files(), make_tokenizer(), "words", cache).fingerprint == first.fingerprint
    assert CountingTokenizer.calls == 0 < calls


def test_cache_folder_that_cannot_be_written_costs_a_warning_only(files, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="tokens are not cached"):
        examples = load(files(), make_tokenizer(), "words", tmp_path / "file" / "cache")
    assert examples.fingerprint == load(files(), make_tokenizer()).fingerprint


def test_cache_folder_comes_from_the_environment(files, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDJAX_LORA_CACHE", str(tmp_path / "elsewhere"))
    load(files(), make_tokenizer(), "words")
    assert len(list((tmp_path / "elsewhere").iterdir())) == 2


@pytest.mark.skipif("FEDJAX_LORA_SST2" not in os.environ, reason="FEDJAX_LORA_SST2 does not name a folder of SST-2")
def test_sst2_has_its_published_size():
    """Published counts of the binary sentence split: 6,920 training and 1,821 test sentences."""
    folder = Path(os.environ["FEDJAX_LORA_SST2"])
    config = DataConfig(source="tsv", train=str(folder / "train.tsv"), test=str(folder / "test.tsv"))
    examples = load(config, make_tokenizer())
    assert len(examples.train["label"]) == 6920 and len(examples.test["label"]) == 1821
    assert examples.class_names == ("0", "1")
