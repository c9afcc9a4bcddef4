"""Labels, encoding and metrics of classification and regression."""

import math

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value

from distill.errors import UserError
from distill.models.tokenizers import train_tokenizer
from distill.recipe.config import Data
from distill.tasks import MultiLabelClassification, Regression, SingleLabelClassification

DATA = Data(source="none")
TEXTS = ["a red fox runs", "the blue sea", "red sea, blue fox and a very long way to run home"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 4, 300)


def column(values, feature=None) -> Dataset:
    texts = ["x"] * len(values)
    return Dataset.from_dict(
        {"text": texts, "label": values},
        features=feature and Features({"text": Value("string"), "label": feature}),
    )


def named(values, feature=None, labels=None, task=SingleLabelClassification):
    read = task().read_labels(column(values, feature), Data(source="none", labels=labels))
    return task().with_labels(read)


# ---- label names


def test_declared_names_keep_their_order():
    assert named([0, 1, -1], ClassLabel(names=["zebra", "ant"])).names == ("zebra", "ant")


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["b", "a", None, "b", ""], ("a", "b")),
        ([2, 0, 1, -1, None], ("0", "1", "2")),
        ([1.0, 0.0, None], ("0", "1")),  # whole numbers with an empty cell
        ([5, 1, 3, 2, 4], ("1", "2", "3", "4", "5")),  # stars
        ([10.0, 2.0, None], ("2", "10")),
        ([-1, 1], ("-1", "1")),
        ([0, 1, 3], ("0", "1", "3")),
        ([True, False], ("False", "True")),
    ],
)
def test_names_come_from_the_values(values, names):
    assert named(values).names == names


def test_numbers_that_do_not_count_from_0_are_names():
    task = named([5, 1, 3, 2, 4])
    assert [task.parse_label(cell, None) for cell in (1, 5.0, "3")] == ["1", "5", "3"]
    assert named([-1, 1]).parse_label(-1, None) == "-1"
    assert named([-1, 0, 1]).parse_label(-1, None) is None  # hidden, as on the Hub
    with pytest.raises(ValueError, match="the labels are 1, 2, 3, 4, 5"):
        task.parse_label(0, None)


def test_labels_that_differ_in_white_space_may_be_listed():
    task = named(["food ", "food"], labels=["food", "food "])
    assert [task.parse_label(cell, None) for cell in ("food ", "food")] == ["food ", "food"]


def test_declared_labels_that_differ_in_case_are_refused():
    with pytest.raises(UserError, match=r"'Sport' and 'sport'"):
        named([0, 1], ClassLabel(names=["Sport", "sport"]))


def test_a_cell_that_differs_from_a_label_in_case_is_refused_with_the_label():
    with pytest.raises(ValueError, match=r"the labels are sport, tech.*differs from 'sport'"):
        named(["sport", "tech"]).parse_label("Sport ", None)


def test_given_names_win_over_declared_ones_and_keep_their_order():
    task = named([0, 1], ClassLabel(names=["zebra", "ant"]), labels=["ant", "zebra"])
    assert task.names == ("ant", "zebra")
    assert task.parse_label(0, ["zebra", "ant"]) == "zebra"


@pytest.mark.parametrize(
    ("values", "labels", "message"),
    [
        (["food ", "food"], None, r"'food ' and 'food'|'food' and 'food '"),
        (["New York", "a", "new  york"], None, r"'New York' and 'new  york'"),
        (["caf\u00e9", "cafe\u0301"], None, "differ in white space or case"),
        (["x", "x\u200b"], None, "differ in white space or case"),
        ([0.5, 1.0], None, "column .label. holds 0.5"),
        (["a", "a"], None, "the labels are a only, but a classifier needs at least 2"),
        (["a", "b"], ["a", "b", "a"], "data.labels is a, b, a, but"),
        ([None, None], None, "holds no label, but names are needed"),
    ],
)
def test_names_that_cannot_be_are_refused(values, labels, message):
    with pytest.raises(UserError, match=message):
        named(values, labels=labels)


def test_without_a_label_column_names_must_be_given():
    with pytest.raises(UserError, match=r"data.label is null, but the model needs names"):
        SingleLabelClassification().read_labels(column(["a"]), Data(source="none", label=None))


@pytest.mark.parametrize(
    ("cell", "name"),
    [
        ("b", "b"),
        (1, "b"),
        (1.0, "b"),
        (None, None),
        ("", None),
        (math.nan, None),
        (-1, None),
        (-1.0, None),
    ],
)
def test_a_cell_is_a_name_an_id_or_nothing(cell, name):
    assert named(["a", "b"]).parse_label(cell, None) == name


def test_numbers_are_matched_by_name_where_the_names_are_numbers():
    task = named([1, 2, 3], labels=["3", "2", "1"])
    assert [task.parse_label(cell, None) for cell in (1, 3)] == ["1", "3"]
    assert named([-1, 1], labels=["-1", "1"]).parse_label(-1, None) == "-1"


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("c", "the labels are a, b"),
        (2, r"ids lie in 0\.\.1"),
        (0.5, "a name or an integer"),
        ([1], "a name or an integer"),
    ],
)
def test_a_cell_that_cannot_be_a_label_is_refused(cell, message):
    with pytest.raises(ValueError, match=message):
        named(["a", "b"]).parse_label(cell, None)


def test_several_labels_come_as_names_ids_or_a_number_for_each_class():
    task = named([["b", "c"], ["a"], []], task=MultiLabelClassification)
    assert task.names == ("a", "b", "c")
    assert task.parse_label(["c", "a"], None) == ["a", "c"]
    assert task.parse_label([0, 1, 1], None) == ["b", "c"]
    assert task.parse_label([2], ["a", "b", "c"]) == ["c"]  # ids of declared names
    assert task.parse_label([], None) == []
    assert task.parse_label(None, None) is None
    assert task.parse_label([-1, -1, -1], None) is None


def test_lists_may_be_written_in_a_cell():
    task = named(['["b", "c"]', "['a']", "[]", ""], task=MultiLabelClassification)
    assert task.names == ("a", "b", "c")
    assert task.parse_label('["c", "a"]', None) == ["a", "c"]
    assert task.parse_label("[0, 1, 1]", None) == ["b", "c"]
    assert task.parse_label("[]", None) == []
    assert task.parse_label("", None) is None
    assert named(["[0, 1]", "[1, 0]"], task=MultiLabelClassification).names == ("0", "1")
    with pytest.raises(UserError, match=r"'a' and 'a '"):
        named([["a "], ["a"]], task=MultiLabelClassification)
    for cell in ("[a, b]", '{"a": 1}', "a"):
        with pytest.raises(ValueError, match="must hold a list"):
            task.parse_label(cell, None)


def test_one_label_is_not_read_from_several_columns():
    for task in (SingleLabelClassification(), Regression()):
        with pytest.raises(UserError, match=r"data.label is \['a', 'b'\]"):
            task.read_labels(column([0]), Data(source="none", label=["a", "b"]))


def test_names_of_several_labels_are_declared_or_counted():
    assert named(
        [[0], [1]], List(ClassLabel(names=["z", "y"])), task=MultiLabelClassification
    ).names == ("z", "y")
    assert named([[0, 1, 1], [1, 0, 0]], task=MultiLabelClassification).names == ("0", "1", "2")


@pytest.mark.parametrize("cell", ["a", [0, 1], [0, 1, 2], ["d"]])
def test_several_labels_that_cannot_be_are_refused(cell):
    with pytest.raises(ValueError, match=r"must hold|the labels are"):
        named([["a", "b", "c"]], task=MultiLabelClassification).parse_label(cell, None)


def test_a_regression_takes_finite_numbers():
    task = Regression()
    task = task.with_labels(task.read_labels(column([1.0, 3.0, None]), DATA))
    assert (task.parse_label(2, None), task.parse_label(None, None), task.spread) == (
        2.0,
        None,
        1.0,
    )
    for cell in ("much", True, math.inf):
        with pytest.raises(ValueError, match=r"must be a finite number"):
            task.parse_label(cell, None)


def test_model_options_carry_the_names_in_order():
    options = named(["b", "a"]).model_kwargs()
    assert options["id2label"] == {0: "a", 1: "b"}
    assert options["label2id"] == {"a": 0, "b": 1}
    assert Regression().model_kwargs() == {"num_labels": 1, "problem_type": "regression"}


# ---- encoding and collation


def test_texts_are_shortened_and_counted(tokenizer):
    task = named(["a", "b"])
    task.max_length = 8
    encoded = task.encode({"text": TEXTS, "label": ["a", None, "b"]}, tokenizer, DATA)
    lengths = [len(ids) for ids in tokenizer(TEXTS)["input_ids"]]
    assert (
        encoded["length"]
        == [min(8, length) for length in lengths]
        == [len(ids) for ids in encoded["input_ids"]]
    )
    assert encoded["truncated"] == [int(length > 8) for length in lengths]
    assert encoded["labels"] == [0, -100, 1]
    assert encoded["rows"] == encoded["size"] == [1, 1, 1]
    assert "token_type_ids" not in encoded


def test_pairs_carry_token_types_where_the_tokenizer_gives_them():
    tokenizer = train_tokenizer(TEXTS * 4, 300)
    task, data = named(["a", "b"]), Data(source="none", text=["text", "other"], label=None)
    assert "token_type_ids" not in task.encode(
        {"text": TEXTS[:1], "other": TEXTS[1:2]}, tokenizer, data
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    encoded = task.encode({"text": TEXTS[:1], "other": TEXTS[1:2]}, tokenizer, data)
    assert encoded["token_type_ids"] == [
        [0] * (len(tokenizer(TEXTS[0])["input_ids"]))
        + [1] * (len(tokenizer(TEXTS[1])["input_ids"]) - 1)
    ]
    assert encoded["labels"] == [-100]
    batch = task.collate([{name: values[0] for name, values in encoded.items()}], pad_id=0)
    assert set(batch.inputs) == {"input_ids", "attention_mask", "token_type_ids"}


@pytest.mark.parametrize("empty", ["", None])
def test_a_pair_may_have_one_side(empty, tokenizer):
    data = Data(source="none", text=["text", "other"], label=None)
    encoded = named(["a", "b"]).encode(
        {"text": [TEXTS[0], empty], "other": [empty, TEXTS[1]]}, tokenizer, data
    )
    assert encoded["input_ids"] == tokenizer([TEXTS[0], ""], ["", TEXTS[1]])["input_ids"]


def test_a_batch_is_padded_on_the_right():
    examples = [
        {"input_ids": [5, 6, 7], "labels": 1, "size": 1},
        {"input_ids": [8], "labels": -100, "size": 1},
    ]
    batch = SingleLabelClassification().collate(examples, pad_id=9)
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [1, -100]
    assert (batch.rows, batch.tokens, batch.positions, batch.teacher) == (2, 4, None, None)


@pytest.mark.parametrize("task", [MultiLabelClassification, Regression])
def test_unlabelled_rows_of_lists_are_nan_and_cost_nothing(task, tokenizer):
    it = task()
    it.names = ("a", "b")
    cells = [["b"], None] if task is MultiLabelClassification else [1.0, None]
    encoded = it.encode({"text": TEXTS[:2], "label": cells}, tokenizer, DATA)
    batch = it.collate(
        [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)],
        0,
    )
    assert batch.labels.isnan().all(-1).tolist() == [False, True]
    logits = torch.zeros_like(batch.labels, requires_grad=True)
    values = it.label_loss(logits, batch.labels)
    values.sum().backward()
    assert values[1] == 0
    assert (logits.grad[1] == 0).all()
    assert values[0] > 0


@pytest.mark.parametrize("max_length", [2, "abc", 12.5, None, True])
def test_max_length_must_hold_a_text(max_length):
    with pytest.raises(UserError, match=rf"task.max_length is {max_length!r}, but .* at least 3"):
        SingleLabelClassification(max_length=max_length)


# ---- metrics


def measured(task, logits, labels):
    batch = task.collate([{"input_ids": [1], "labels": label, "size": 1} for label in labels], 0)
    return task.compute_metrics(task.outcomes(torch.tensor(logits), batch))


def test_single_label_metrics():
    task = SingleLabelClassification()
    task.names = ("a", "b")
    quality = measured(task, [[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [9.0, 0.0]], [0, 1, 1, -100])
    confidence = 1 / (1 + math.exp(-2))
    assert quality["accuracy"] == pytest.approx(2 / 3)
    assert quality["f1/a"] == pytest.approx(2 / 3)
    assert quality["f1/b"] == pytest.approx(2 / 3)
    assert quality["macro_f1"] == pytest.approx(2 / 3)
    assert quality["mcc"] == pytest.approx(0.5)
    assert quality["ece"] == pytest.approx(confidence - 2 / 3, abs=1e-6)
    assert quality["nll"] == pytest.approx(
        -(2 * math.log(confidence) + math.log(1 - confidence)) / 3
    )


def test_multi_label_metrics():
    task = MultiLabelClassification()
    task.names = ("a", "b")
    quality = measured(
        task, [[9.0, -9.0], [9.0, 9.0], [0.0, 0.0]], [[1.0, 0.0], [1.0, 0.0], [math.nan, math.nan]]
    )
    assert quality["exact_match"] == 0.5
    assert quality["micro_f1"] == pytest.approx(0.8)
    assert quality["macro_f1"] == pytest.approx(0.5)
    assert quality["ece"] == pytest.approx(0.25, abs=1e-3)
    assert quality["f1/a"] == 1
    assert "f1/b" not in quality  # no example has it
    assert quality["mcc"] == pytest.approx(
        1 / math.sqrt(3)
    )  # of all four decisions: 2 true and 1 false positive, 1 true negative


def test_regression_metrics():
    quality = measured(
        Regression(), [[1.0], [2.0], [4.0], [7.0]], [[2.0], [4.0], [8.0], [math.nan]]
    )
    assert quality["pearson"] == pytest.approx(1)
    assert quality["spearman"] == pytest.approx(1, abs=1e-5)
    assert quality["mse"] == pytest.approx(7)
    assert quality["mae"] == pytest.approx(7 / 3)


@pytest.mark.parametrize(
    ("task", "label"),
    [
        (SingleLabelClassification, -100),
        (MultiLabelClassification, [math.nan]),
        (Regression, [math.nan]),
    ],
)
def test_nothing_labelled_leaves_the_primary_metric_unknown(task, label):
    it = task()
    it.names = ("a",)
    assert math.isnan(measured(it, [[1.0]], [label])[it.primary_metric])


def test_agreement_is_of_predictions():
    one, other = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[5.0, 9.0], [-3.0, -1.0]])
    assert SingleLabelClassification().agreement(one, other).tolist() == [1, 0]
    assert MultiLabelClassification().agreement(one, other).tolist() == [1, 0]
    assert Regression().agreement(
        torch.tensor([[1.0], [1.0]]), torch.tensor([[1.05], [1.2]])
    ).tolist() == [1, 0]


@pytest.mark.parametrize("task", [SingleLabelClassification, MultiLabelClassification, Regression])
def test_the_default_divergence_of_equal_models_is_nothing(task):
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert task().divergence(logits, logits).tolist() == [0, 0, 0]
