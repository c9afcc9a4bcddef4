"""Students of a teacher's layers, and the layout of model families."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    DistilBertForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from distill import models
from distill.errors import UserError
from distill.models.architectures import TRANSLATIONS
from distill.models.attention_parts import attention_parts
from distill.tasks import CausalLanguageModelling, SingleLabelClassification, Task

VOCABULARY = 50
_ENCODER = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}
_GROUPED = _ENCODER | {"num_key_value_heads": 1, "head_dim": 8}
SIZES = {
    "bert": _ENCODER,
    "roberta": _ENCODER | {"pad_token_id": 1},
    "distilbert": {
        "dim": 16,
        "n_layers": 3,
        "n_heads": 2,
        "hidden_dim": 24,
        "max_position_embeddings": 20,
    },
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 20},
    "llama": _GROUPED | {"tie_word_embeddings": True},
    "mistral": _GROUPED,
    "qwen2": _ENCODER | {"num_key_value_heads": 1},
    "qwen3": _GROUPED,
}
CAUSAL = [family for family in SIZES if family != "distilbert"]


def classification(*names: str) -> Task:
    task = SingleLabelClassification()
    task.names = names or ("red", "green", "blue")
    return task


def random(family: str, task: Task, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A tiny model whose every tensor, norms and biases included, is random."""
    torch.manual_seed(seed)
    model = models.load(
        None,
        {"model_type": family, "vocab_size": VOCABULARY, "pad_token_id": 0}
        | SIZES[family]
        | changes,
        task,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(pad: int, rows: int = 4, length: int = 12) -> dict[str, torch.Tensor]:
    """Random tokens, padded on the right to different lengths."""
    generator = torch.Generator().manual_seed(7)
    mask = (torch.arange(length) < torch.tensor([[length - 3 * row] for row in range(rows)])).long()
    tokens = torch.randint(2, VOCABULARY, (rows, length), generator=generator)
    return {"input_ids": torch.where(mask == 1, tokens, pad), "attention_mask": mask}


CASES = [pytest.param(family, classification(), id=f"{family}-classification") for family in SIZES]
CASES += [
    pytest.param(family, CausalLanguageModelling(), id=f"{family}-language") for family in CAUSAL
]


@pytest.mark.parametrize(("family", "task"), CASES)
class TestSameArchitecture:
    def test_a_student_with_all_layers_has_the_logits_of_its_teacher(
        self, family: str, task: Task
    ) -> None:
        teacher = random(family, task)
        student, report = models.select_layers(teacher, [0, 1, 2], None, task)
        inputs = batch(teacher.config.pad_token_id)
        with torch.no_grad():
            assert torch.equal(models.logits(student, inputs), models.logits(teacher, inputs))
        assert type(student) is type(teacher)
        assert models.fingerprint(student) == models.fingerprint(teacher)
        assert not report.initialized
        assert not report.dropped

    def test_every_tensor_is_in_the_report(self, family: str, task: Task) -> None:
        teacher = random(family, task)
        student, report = models.select_layers(teacher, [0, 2], None, task)
        assert_complete(report, student, teacher)
        assert len(report.dropped) == len(models.blocks(teacher)[1].state_dict())

    def test_layers_hold_the_weights_of_those_named_in_their_order(
        self, family: str, task: Task
    ) -> None:
        teacher = random(family, task)
        student, _ = models.select_layers(teacher, [2, 0], None, task)
        assert len(models.blocks(student)) == student.config.num_hidden_layers == 2
        for block, source in zip(models.blocks(student), (2, 0), strict=True):
            expected = models.blocks(teacher)[source].state_dict()
            assert all(
                torch.equal(tensor, expected[name]) for name, tensor in block.state_dict().items()
            )

    def test_student_and_teacher_share_no_memory(self, family: str, task: Task) -> None:
        teacher = random(family, task)
        before = models.fingerprint(teacher)
        student, _ = models.select_layers(teacher, [0, 2], None, task)
        actual, expected = (
            {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
            for model in (student, teacher)
        )
        assert not actual & expected
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.zero_()
        student.config.id2label = {}
        assert models.fingerprint(teacher) == before
        assert teacher.config.id2label
        assert teacher.config.num_hidden_layers == 3

    def test_a_saved_student_loads_strictly_with_the_same_logits(
        self, family: str, task: Task, tmp_path
    ) -> None:
        student, _ = models.select_layers(random(family, task), [0, 2], None, task)
        student.save_pretrained(tmp_path)
        again = models.load(str(tmp_path), None, task, "student", strict=True)
        assert models.fingerprint(again) == models.fingerprint(student)
        inputs = batch(student.config.pad_token_id)
        with torch.no_grad():
            assert torch.equal(models.logits(again, inputs), models.logits(student, inputs))
        assert again.config.id2label == student.config.id2label


def assert_complete(
    report: models.TensorReport, student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    """Copied + initialized = the student; sources + dropped = the teacher; nothing twice."""
    sources = {source for names in report.copied.values() for source in names}
    assert sorted([*report.copied, *report.initialized]) == sorted(student.state_dict())
    assert sorted([*sources, *report.dropped]) == sorted(teacher.state_dict())


@pytest.mark.parametrize("family", CAUSAL)
def test_tied_embeddings_stay_tied(family: str) -> None:
    task = CausalLanguageModelling()
    student, _ = models.select_layers(
        random(family, task, tie_word_embeddings=True), [1], None, task
    )
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight


@pytest.mark.parametrize("family", CAUSAL)
def test_a_language_model_does_not_see_what_it_predicts(family: str) -> None:
    model = random(family, CausalLanguageModelling())
    inputs = batch(model.config.pad_token_id, rows=1)
    changed = inputs | {
        "input_ids": torch.cat([inputs["input_ids"][:, :-1], torch.tensor([[3]])], 1)
    }
    with torch.no_grad():
        before, after = models.logits(model, inputs), models.logits(model, changed)
    assert torch.allclose(before[:, :-1], after[:, :-1], atol=1e-6)
    assert not torch.allclose(before[:, -1], after[:, -1], atol=1e-3)


class TestBertToDistilBert:
    def test_the_encoder_of_all_layers_has_the_outputs_of_the_teacher(self) -> None:
        task = classification()
        teacher = random("bert", task)
        student, report = models.select_layers(teacher, [0, 1, 2], "distilbert", task)
        inputs = batch(0, rows=4)
        with torch.no_grad():
            expected = teacher.base_model(**inputs).last_hidden_state
            actual = student.base_model(**inputs).last_hidden_state
        real = inputs["attention_mask"] == 1
        assert (actual - expected)[real].abs().max() < 1e-5
        assert student.config.model_type == "distilbert"
        assert_complete(report, student, teacher)

    def test_the_token_type_table_is_folded_into_the_positions(self) -> None:
        task = classification()
        teacher = random("bert", task)
        student, report = models.select_layers(teacher, [1], "distilbert", task)
        tables = teacher.bert.embeddings
        expected = tables.position_embeddings.weight + tables.token_type_embeddings.weight[0]
        assert torch.equal(student.distilbert.embeddings.position_embeddings.weight, expected)
        assert len(report.copied["distilbert.embeddings.position_embeddings.weight"]) == 2

    def test_config_and_labels_follow_the_teacher(self) -> None:
        task = classification("a", "b")
        teacher = random(
            "bert",
            task,
            hidden_dropout_prob=0.3,
            attention_probs_dropout_prob=0.2,
            hidden_act="relu",
        )
        config = models.select_layers(teacher, [0, 2], "distilbert", task)[0].config
        assert (config.dim, config.hidden_dim, config.n_heads, config.n_layers) == (16, 24, 2, 2)
        assert (config.dropout, config.attention_dropout, config.activation) == (0.3, 0.2, "relu")
        assert (config.vocab_size, config.max_position_embeddings, config.id2label) == (
            VOCABULARY,
            20,
            {0: "a", 1: "b"},
        )

    @pytest.mark.parametrize(
        ("change", "key"),
        [({"layer_norm_eps": 1e-5}, "layer_norm_eps"), ({"is_decoder": True}, "is_decoder")],
    )
    def test_config_values_that_distilbert_fixes_are_refused(self, change: dict, key: str) -> None:
        task = classification()
        with pytest.raises(UserError, match=f"teacher's {key} is .* but a distilbert student"):
            models.select_layers(random("bert", task, **change), [0], "distilbert", task)

    def test_token_types_are_left_out_for_a_model_that_has_none(self) -> None:
        student = random("distilbert", classification())
        inputs = batch(0)
        with torch.no_grad():
            expected = models.logits(student, inputs)
            assert torch.equal(
                models.logits(
                    student, inputs | {"token_type_ids": torch.ones_like(inputs["input_ids"])}
                ),
                expected,
            )


def test_initialized_tensors_depend_on_the_seed_alone() -> None:
    task = classification()
    teacher = random("bert", task)
    teacher.classifier = nn.Linear(16, 5)  # a head that does not fit
    students = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        students.append(models.select_layers(teacher, [0], None, task))
    assert students[0][1].initialized == ["classifier.weight", "classifier.bias"]
    prints = [models.fingerprint(student) for student, _ in students]
    assert prints[0] == prints[1] != prints[2]


def test_a_half_precision_teacher_gives_a_student_in_fp32() -> None:
    task = classification()
    teacher = random("bert", task).to(torch.bfloat16)
    student, _ = models.select_layers(teacher, [0, 2], None, task)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert torch.equal(student.classifier.weight, teacher.classifier.weight.float())


def test_settings_listed_by_layer_follow_the_layers() -> None:
    task = CausalLanguageModelling()
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    teacher = random("qwen2", task, use_sliding_window=True, sliding_window=4, layer_types=kinds)
    assert models.select_layers(teacher, [1, 2], None, task)[0].config.layer_types == kinds[1:]
    assert teacher.config.layer_types == kinds


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], r"student.layers is \[\], but"),
        ([0, 3], "student.layers has 3, .* 3 layers: .* 0 to 2"),
        ([-1], "student.layers has -1, but"),
        ([0, 1, 0], r"student.layers is \[0, 1, 0\], but each layer"),
    ],
)
def test_wrong_layers_are_refused(layers: list[int], message: str) -> None:
    task = classification()
    with pytest.raises(UserError, match=message):
        models.select_layers(random("bert", task), layers, None, task)


@pytest.mark.parametrize(
    ("family", "target"),
    [("roberta", "distilbert"), ("distilbert", "bert"), ("bert", "gpt2"), ("bert", "nonsense")],
)
def test_an_architecture_that_is_no_subset_is_refused(family: str, target: str) -> None:
    task = classification()
    with pytest.raises(
        UserError,
        match=f"student.architecture is {target}, but .* {family}",
    ):
        models.select_layers(random(family, task), [0], target, task)


def test_a_gpt2_whose_blocks_depend_on_their_place_keeps_all_layers() -> None:
    task = CausalLanguageModelling()
    teacher = random("gpt2", task, scale_attn_by_inverse_layer_idx=True)
    models.select_layers(teacher, [0, 1, 2], None, task)
    with pytest.raises(UserError, match="gpt2, but with its settings"):
        models.select_layers(teacher, [0, 2], None, task)


def test_the_report_names_every_tensor_once() -> None:
    task = classification()
    text = str(models.select_layers(random("bert", task), [0, 2], "distilbert", task)[1])
    assert (
        "distilbert.transformer.layer.{0,1}.ffn.lin1.weight"
        " <- bert.encoder.layer.{0,2}.intermediate.dense.weight" in text
    )
    assert "position_embeddings.weight + bert.embeddings.token_type_embeddings.weight" in text
    assert "dropped: bert.encoder.layer.{1}.attention.self.query.weight" in text
    assert len(text.splitlines()) == len(set(text.splitlines()))


class TestArchitectures:
    def test_every_translation_is_tested_here(self) -> None:
        assert set(TRANSLATIONS) == {("bert", "distilbert")}

    @pytest.mark.parametrize("family", [family for family in SIZES if family != "gpt2"])
    def test_projections_are_query_key_and_value(self, family: str) -> None:
        model = random(family, classification())
        block = models.blocks(model)[0]
        names = {id(module): name for name, module in block.named_modules()}
        parts = attention_parts(model, block)
        assert [names[id(part.layer)].rpartition(".")[2][0] for part in parts] == ["q", "k", "v"]

    def test_parts_of_a_fused_projection_are_its_thirds(self) -> None:
        model = random("gpt2", classification())
        block = models.blocks(model)[0]
        assert isinstance(block.attn.c_attn, Conv1D)
        output = torch.arange(48.0).expand(2, 5, 48)
        parts = [part.select(output) for part in attention_parts(model, block)]
        assert torch.equal(torch.cat(parts, -1), output)
        assert [part.shape for part in parts] == [(2, 5, 16)] * 3

    def test_a_model_without_blocks_is_refused_by_name(self) -> None:
        model = nn.Module()
        model.config = PreTrainedConfig()
        model.base_model = nn.Embedding(3, 4)
        with pytest.raises(UserError, match="no list of equal blocks"):
            models.blocks(model)

    def test_a_model_without_a_head_has_the_same_blocks(self) -> None:
        assert (
            len(models.blocks(AutoModel.from_config(random("bert", classification()).config))) == 3
        )


def test_one_model_class_serves_transformers_alone() -> None:
    """A student of layers is a plain model of transformers, without classes of this library."""
    student, _ = models.select_layers(
        random("bert", classification()), [0], "distilbert", classification()
    )
    assert type(student) is DistilBertForSequenceClassification
    assert not [
        module for module in student.modules() if type(module).__module__.startswith("distill.")
    ]
