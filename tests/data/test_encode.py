"""From tables to arrays by what is learned: against Hugging Face's own calls, and against plain loops by hand."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fedjax_lora.core.errors import ConfigWarning
from fedjax_lora.data.encode import encode
from fedjax_lora.data.options import FilesConfig
from fedjax_lora.data.sources import load
from fedjax_lora.data.tables import Columns, Table
from fedjax_lora.data.tokens import Cache

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "good", "bad", "film", "so", "long", "and", "a"]


def bert_like():
    """Words, `[CLS] a [SEP] b [SEP]`, with types."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", model_input_names=names)


def gpt_like(begins: bool = False):
    """Bytes, as GPT-2 has them, with an end of text and no padding; `begins`: with a token that opens each text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(["<s>", "</s>", *alphabet])}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if begins:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", bos_token="<s>" if begins else None)


@pytest.fixture
def reads(tmp_path):
    """Writes rows as JSON lines and reads them as examples."""

    def read(learns, train, test, tokenizer, name="", cache=None, **options):
        paths = {}
        for part, rows in (("train", train), ("test", test)):
            paths[part] = str(tmp_path / f"{part}.jsonl")
            (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = FilesConfig(source="jsonl", **paths, **{"max_length": 8, **options})
        return load(config, tokenizer, name, cache, learns)

    return read


def test_pairs_equal_hugging_face_types_and_truncation(reads):
    pairs = [("good film", "so bad"), ("a long and long film", "good good film and so"), ("bad", "a")]
    rows = [{"premise": first, "hypothesis": second, "label": i % 2} for i, (first, second) in enumerate(pairs)]
    examples = reads("label", rows, rows[:2], bert_like())
    first, second = map(list, zip(*pairs, strict=True))
    expected = bert_like()(first, second, padding="max_length", truncation=True, max_length=8, return_tensors="np")
    assert set(examples.train) == {"input_ids", "attention_mask", "token_type_ids", "label"}
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        np.testing.assert_array_equal(examples.train[name], expected[name])
    np.testing.assert_array_equal(examples.train["label"], [0, 1, 0])
    assert examples.class_names == ("0", "1") and examples.truncated == 2
    assert examples.notes == ("columns by their names: text is 'premise', text_pair is 'hypothesis', label is 'label'",)


def test_a_single_text_and_a_tokenizer_without_types_have_none(reads):
    rows = [{"text": "good", "other": "bad", "label": i} for i in range(2)]
    assert set(reads("label", rows, rows, bert_like()).train) == {"input_ids", "attention_mask", "label"}
    paired = reads("label", rows, rows, gpt_like(), columns=Columns(text="text", text_pair="other"))
    assert set(paired.train) == {"input_ids", "attention_mask", "label"}


def test_numbers_are_targets_and_their_tenths_labels(reads):
    """The oracle is the rank: of 40 different numbers each tenth holds four, in order."""
    order = np.random.default_rng(0).permutation(40)
    rows = [{"sentence": "good", "score": float(place) / 4} for place in order]
    test = [{"sentence": "bad", "score": number} for number in (-3, 100, 1.0)]
    examples = reads("number", rows, test, bert_like())
    np.testing.assert_array_equal(examples.train["target"], order.astype(np.float32) / 4)
    assert examples.train["target"].dtype == np.float32 and examples.train["label"].dtype == np.int32
    np.testing.assert_array_equal(examples.train["label"], order // 4)
    np.testing.assert_array_equal(examples.test["label"], [0, 9, 1])
    assert examples.class_names[:2] == ("below 1.0", "1.0 to 2.0") and examples.class_names[-1] == "from 9.0"


@pytest.mark.parametrize(
    ("numbers", "labels", "names"),
    [
        ([0, 0, 0, 1, 5, 5], [0, 0, 0, 1, 2, 2], ("below 1.0", "1.0 to 5.0", "from 5.0")),
        ([2] * 30 + [7], [0] * 30 + [1], ("below 7.0", "from 7.0")),
        (["1.5", "-2"], [1, 0], ("below 1.5", "from 1.5")),
    ],
)
def test_tenths_of_few_different_numbers_are_fewer_by_hand(reads, numbers, labels, names):
    rows = [{"text": "good", "label": number} for number in numbers]
    examples = reads("number", rows, rows, bert_like())
    assert examples.class_names == names
    np.testing.assert_array_equal(examples.train["label"], labels)


TAGGED = [
    {"tokens": ["good", "film", "xylophone"], "ner_tags": ["O", "B", "O"]},
    {"tokens": ["a", "bad", "and", "long", "film", "so", "so"], "ner_tags": ["O", "I", "I", "B", "O", "O", "B"]},
    {"tokens": ["bad"], "ner_tags": ["O"]},
]


def test_words_are_labelled_at_their_first_token_loop(reads):
    """Against a loop over the tokens, one word each but for the special ones; the longest is cut to 6 of 7 words."""
    examples = reads("token_label", TAGGED, TAGGED[:1], bert_like())
    assert examples.class_names == ("B", "I", "O") and examples.truncated == 1
    for i, row in enumerate(TAGGED):
        expected = [-100, *(("B", "I", "O").index(tag) for tag in row["ner_tags"][:6])]
        expected += [-100] * (8 - len(expected))
        np.testing.assert_array_equal(examples.train["target"][i], expected)
    # O is the commonest of all; of the second sentence I stands twice, and B twice: the first of the two
    np.testing.assert_array_equal(examples.train["label"], [0, 0, 0])
    assert examples.train["target"].dtype == np.int32 and "word" not in examples.train


def test_words_of_several_tokens_bear_one_label(reads):
    """By hand: each letter is a token, and the words are told apart by their numbers."""
    rows = [{"words": "ab c def", "label": "x y x"}, {"words": ["g"], "label": ["y"]}]
    examples = reads("token_label", rows, rows, gpt_like())
    np.testing.assert_array_equal(examples.train["target"][0, :6], [0, -100, 1, 0, -100, -100])
    np.testing.assert_array_equal(examples.train["label"], [1, 1])


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("template", ["instruction", "plain"])
def test_a_response_is_learned_and_its_prompt_is_not_loop(reads, begins, template):
    """Against ids that Hugging Face gives for prompt and response apart."""
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3", "category": "sum"},
        {"instruction": "Greet.", "input": "", "output": "Hello", "category": "talk"},
    ]
    tokenizer = gpt_like(begins)
    options = {"max_length": 80, "template": template, "columns": Columns(label="category")}
    examples = reads("next_token", rows, rows[:1], tokenizer, **options)
    prompts = {
        "instruction": [
            "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n",
            "### Instruction:\nGreet.\n\n### Response:\n",
        ],
        "plain": ["Add.\n1 2\n", "Greet.\n"],
    }[template]
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        before = [0] * begins + tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids = [*before, *tokenizer(row["output"], add_special_tokens=False)["input_ids"], 1]
        target = [ids[t + 1] if t + 1 >= len(before) else -100 for t in range(len(ids) - 1)]
        np.testing.assert_array_equal(examples.train["input_ids"][i], ids + [1] * (80 - len(ids)))
        np.testing.assert_array_equal(examples.train["attention_mask"][i], [1] * len(ids) + [0] * (80 - len(ids)))
        np.testing.assert_array_equal(examples.train["target"][i], target + [-100] * (80 - len(target)))
    assert examples.class_names == ("sum", "talk") and examples.truncated == 0
    np.testing.assert_array_equal(examples.train["label"], [0, 1])
    assert any("no padding token" in note for note in examples.notes)


@pytest.mark.parametrize("begins", [False, True])
def test_of_a_text_alone_each_next_token_is_learned(reads, begins):
    """Closed form: the target is the ids, one place on; what is cut has none. A text has no label: all have 0."""
    rows = [{"text": "abc", "label": None}, {"text": "a long text", "label": None}]
    for row in rows:
        del row["label"]
    examples = reads("next_token", rows, rows, gpt_like(begins))
    ids, mask, target = (examples.train[name] for name in ("input_ids", "attention_mask", "target"))
    assert mask.sum(1).tolist() == [4 + begins, 8] and examples.truncated == 2
    assert (ids[0][mask[0] == 1] == 1).sum() == 1  # it is closed once
    expected = np.where(mask[:, 1:] == 1, ids[:, 1:], -100)
    np.testing.assert_array_equal(target, np.pad(expected, ((0, 0), (0, 1)), constant_values=-100))
    assert examples.class_names == ("all",) and not examples.train["label"].any()


def test_the_label_of_continued_texts_is_never_guessed(reads):
    """By hand: `score` is a label's common name, but constant in training, and another in testing."""
    rows = [{"prompt": "a", "response": "b", "score": 1}, {"prompt": "c", "response": "d", "score": 1}]
    examples = reads("next_token", rows, [{**rows[0], "score": 2}], gpt_like(), template="plain")
    assert examples.class_names == ("all",) and not examples.train["label"].any()
    assert examples.columns == {"prompt": "prompt", "response": "response"}


def test_names_of_classes_and_words_that_none_is_called_are_one_line():
    """Words of a test table that has no names, beside a training table that has them."""
    words = {"words": ["a b"]}
    train = Table("data.train a", {**words, "label": [[0, 1]]}, [1], classes={"label": ("O", "B")})
    test = Table("data.test b", {**words, "label": ["O Z"]}, [1])
    with pytest.raises(ValueError, match=r"^data.test b, line 1: must be a label of data.train, 'B, O', got 'Z'$"):
        encode("mine", (train, test), Columns(), "token_label", Cache(gpt_like(), ""), 8)


def test_prompts_that_leave_no_response_are_counted(reads):
    rows = [{"prompt": "a prompt", "response": "b"}, {"prompt": "c", "response": "d"}]
    message = r"^data\.train .*: no token is learned of 1 of 2 examples: prompts that fill data\.max_length = 8 tokens$"
    with pytest.warns(ConfigWarning, match=message) as caught:
        examples = reads("next_token", rows, rows[1:], gpt_like(), template="plain")
    assert len(caught) == 1 and examples.truncated == 1
    assert (examples.train["target"][0] == -100).all()


def test_data_without_a_token_to_learn_are_refused(reads):
    rows = [{"prompt": "a prompt", "response": "b"}, {"prompt": "c", "response": "d"}]
    message = (
        r"^data\.test .*: must hold an example with a token to learn, got 1 with none: prompts that fill data\.max"
    )
    with pytest.raises(ValueError, match=message):
        reads("next_token", rows[1:], rows[:1], gpt_like(), template="plain")
    with pytest.raises(ValueError, match=r"^data\.train .*, got 2 with none: empty texts$"):
        reads("next_token", [{"text": ""}] * 2, [{"text": "a"}], gpt_like())


@pytest.mark.parametrize(("tokenizer", "ids"), [(bert_like(), [1, 2]), (gpt_like(), [1]), (gpt_like(True), [0, 1])])
def test_empty_texts_are_special_tokens_alone_and_are_counted(reads, tokenizer, ids):
    """By hand: what opens and ends a text, or what ends it where the tokenizer adds nothing."""
    rows = [{"text": "", "label": 0}, {"text": "good", "label": 1}, {"text": " ", "label": 1}]
    examples = reads("label", rows, rows[:2], tokenizer)
    assert examples.train["input_ids"][0][examples.train["attention_mask"][0] == 1].tolist() == ids
    counts = [note.rpartition(": ")[2] for note in examples.notes if "empty" in note]
    assert counts == ["text is empty in 2 examples", "text is empty in 1 examples"]
    told = [{"prompt": "a", "response": text} for text in ("", "b")]
    found = reads("next_token", told, told, gpt_like(), template="plain").train
    assert found["target"][0][found["target"][0] != -100].tolist() == [1]


def test_clients_are_numbered_in_their_order(reads):
    rows = [{"text": "good", "label": i % 2, "client": client} for i, client in enumerate([10, 9, 10, 2])]
    examples = reads("label", rows, [{"text": "good", "label": 1}], bert_like())  # nobody holds what tests
    assert examples.client_names == ("2", "9", "10") and examples.clients is not None
    np.testing.assert_array_equal(examples.clients, [2, 1, 2, 0])
    without = [{"text": row["text"], "label": row["label"]} for row in rows]
    assert reads("label", without, rows, bert_like()).clients is None


def test_the_cache_tells_what_is_learned_columns_and_templates_apart(reads, tmp_path):
    """Invariance: each is what it is without a cache, whatever was kept before; counting: the second time is a hit."""
    rows = [
        {"text": "good film", "prompt": "bad", "response": "so so", "context": "a", "label": "a b"},
        {"text": "a film", "prompt": "long", "response": "bad", "context": "a", "label": "b b"},
    ]
    cache, tokenizer = tmp_path / "cache", gpt_like()
    asked = [
        ("label", {}),
        ("label", {"columns": Columns(text="prompt")}),
        ("label", {"columns": Columns(text="text", text_pair="prompt")}),
        ("token_label", {}),
        ("next_token", {"columns": Columns(text="text")}),
        ("next_token", {"max_length": 60}),
        ("next_token", {"max_length": 60, "template": "plain"}),
    ]
    counts = []
    for learns, options in asked * 2:
        tagged = [{"words": row["text"], "label": row["label"]} for row in rows]
        train = tagged if learns == "token_label" else rows
        kept = reads(learns, train, train, tokenizer, "bytes", cache, **options)
        assert kept.fingerprint == reads(learns, train, train, tokenizer, **options).fingerprint
        counts.append(len(list(cache.iterdir())))
    assert counts == [*range(1, len(asked) + 1), *[len(asked)] * len(asked)]


@pytest.mark.parametrize(
    ("learns", "train", "message"),
    [
        ("label", [{"text": "a", "label": 1}, {"label": 2}], "data.train .*line 2: text must be text, got None"),
        ("label", [{"text": 3, "label": 1}, {"label": 2}], "data.train .*line 1: text must be text, got 3"),
        ("label", [{"text": "a", "label": None}], "line 1: label must be a word or a finite number, got None"),
        ("label", [{"text": "a", "label": [1]}], r"line 1: label must be a word or a finite number, got \[1\]"),
        ("label", [{"text": "a", "label": float("nan")}], "line 1: label must be a word or a finite number, got nan"),
        ("label", [{"text": "a", "label": 1}], "train.jsonl: must hold at least 2 labels, got only '1'"),
        ("label", [{"label": 1}], "must have a column of text that is called sentence, text, .* got label"),
        ("label", [{"text": "a"}], "must have a column of label that is called label, .*, got text$"),
        (
            "label",
            [{"instruction": "a", "output": "b"}],
            "column of text that .*, got instruction, output; task=causal_lm learns 'output' after 'instruction'$",
        ),
        ("number", [{"text": "a", "label": "high"}], "line 1: label must be a finite number, got 'high'"),
        ("number", [{"text": "a", "label": float("inf")}], "line 1: label must be a finite number, got inf"),
        ("number", [{"text": "a", "label": 1e39}], r"line 1: label must be a finite number, got 1e\+39"),
        ("number", [{"text": "a", "label": True}], "line 1: label must be a finite number, got True"),
        ("number", [{"text": "a", "label": 2}], "must hold at least 2 different numbers, got only 2.0"),
        ("token_label", [{"words": [], "tags": []}], r"line 1: words must be a list of words, got \[\]"),
        ("token_label", [{"words": ["a", 2], "tags": []}], "line 1: words must be a list of words, got"),
        ("token_label", [{"words": "a b", "tags": ["x"]}], "line 1: label must be one for each of 2 words, got 1"),
        ("token_label", [{"words": "a", "tags": 3}], "line 1: label must be one for each of 1 words, got 3"),
        ("token_label", [{"words": "a", "tags": ["x"]}], "must hold at least 2 labels, got only 'x'"),
        ("next_token", [{"prompt": "a", "response": None}], "line 1: response must be text, got None"),
        ("next_token", [{"answer": "a"}], "must have a column of text that is called"),
        (
            "label",
            [{"text": "a", "label": i, "client": None} for i in (0, 1)],
            "line 1: client must be a word or a finite",
        ),
    ],
)
def test_a_wrong_value_is_one_line_that_says_where(reads, learns, train, message):
    with pytest.raises(ValueError, match=message) as caught:
        reads(learns, train, train, gpt_like())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("learns", "columns", "message"),
    [
        (
            "label",
            Columns(text="body"),
            r"^data\.columns\.text must be a column of data\.train .*: text, .*, got 'body'$",
        ),
        ("next_token", Columns(text="text", response="label"), "^data.columns.text must be absent where .*response is"),
        ("next_token", Columns(response="label"), "must have a column of prompt that is called prompt, instruction"),
    ],
)
def test_a_column_that_is_not_there_is_named(reads, learns, columns, message):
    rows = [{"text": "a", "label": label} for label in "xy"]
    with pytest.raises(ValueError, match=message):
        reads(learns, rows, rows, gpt_like(), columns=columns)


def test_the_test_table_must_hold_the_columns_and_labels_of_train(reads):
    rows = [{"text": "a", "label": label} for label in "xy"]
    with pytest.raises(ValueError, match=r"^data\.test .*: must have a column 'text', as data\.train has, got label$"):
        reads("label", rows, [{"label": "x"}], gpt_like())
    with pytest.raises(ValueError, match=r"^data\.test .*line 1: must be a label of data\.train, 'x, y', got 'z'$"):
        reads("label", rows, [{"text": "a", "label": "z"}], gpt_like())
    words = [{"words": "a b", "label": "x y"}]
    with pytest.raises(ValueError, match=r"^data\.test .*line 1: must be a label of data\.train, 'x, y', got 'z'$"):
        reads("token_label", words, [{"words": "a", "label": "z"}], gpt_like())


def test_a_tokenizer_without_an_end_cannot_continue_texts(reads):
    rows, message = (
        [{"text": "a"}],
        r"^model\.pretrained must be a model of the next token, whose tokenizer has one that ends a text \(eos_token\)",
    )
    with pytest.raises(ValueError, match=message):
        reads("next_token", rows, rows, bert_like())
