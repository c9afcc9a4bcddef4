"""An export that is loadable, equal and smaller gets its name; any other leaves nothing behind."""

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file, save_file

from distill import export, isolated, packing
from distill.errors import RunFailed
from distill.export import command
from distill.export.card import card
from distill.export.proof_record import Proof
from distill.prepare import Prepared
from distill.recipe import capabilities, compose, config
from distill.tasks import CausalLanguageModelling, MultiLabelClassification, Regression, comparison
from tests.unit import tiny_runs
from tests.unit.tiny_runs import classifier, exported, made


@pytest.fixture
def ready(tmp_path):
    return made(tmp_path, classifier("no", "perhaps", "yes"))


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(isolated, "run_isolated", tiny_runs.run_here)


@pytest.fixture
def tampered(monkeypatch):
    """Changes the export between its writing and its proof."""

    def tamper(change):
        write = packing.write_format

        def changed(spec, student, draft):
            write(spec, student, draft)
            change(draft)

        monkeypatch.setattr(packing, "write_format", changed)

    return tamper


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def refused(ready, match):
    with pytest.raises(RunFailed, match=match) as error:
        exported(*ready)
    assert error.value.exit_code == 1
    assert left(ready[4]) == ["student", "teacher"]
    assert "\n" not in str(error.value)


def one_weight(draft):
    tensors = load_file(draft / "model.safetensors")
    tensors["classifier.weight"][0, 0] += 0.5
    save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})


def no_head(draft):
    tensors = load_file(draft / "model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})


def edited(name, change):
    def edit(draft):
        content = json.loads((draft / name).read_text())
        change(content)
        (draft / name).write_text(json.dumps(content))

    return edit


def swap(content):
    labels = content["id2label"]
    labels["0"], labels["2"] = labels["2"], labels["0"]


def rename(content):
    content["id2label"]["0"] = "never"


def no_tokenizer(draft):
    for file in draft.glob("token*"):
        file.unlink()


def exchange(content):
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (one_weight, "not equal: .* logits differ by up to 0"),
        (edited("config.json", swap), "not equal: .* of its predictions"),
        (edited("config.json", rename), "not equal: its labels are never, perhaps, yes"),
        (edited("tokenizer.json", exchange), "not equal"),
        (no_head, r"not loadable: .*classifier\.weight"),
        (no_tokenizer, "not loadable: "),
        (lambda draft: (draft / "model.safetensors").unlink(), "not loadable"),
        (lambda draft: (draft / "model.safetensors").write_bytes(b"0123456789"), "not loadable"),
    ],
    ids=[
        "weight",
        "swapped labels",
        "renamed label",
        "tokenizer changed",
        "no head",
        "no tokenizer",
        "no weights",
        "damaged weights",
    ],
)
def test_a_tampered_export_is_refused_and_leaves_nothing(
    ready, in_process, tampered, change, match
):
    tampered(change)
    refused(ready, match)


@pytest.mark.parametrize(
    ("seconds", "flipped", "named"), [(0.5, False, True), (2.0, False, False), (0.5, True, False)]
)
def test_a_faster_dtype_is_named_where_it_is_faster_and_agrees(
    ready, monkeypatch, seconds, flipped, named
):
    def run_and_time(script, request):
        response = tiny_runs.run_here(script, request)
        for form, answers in response["outputs"].items():
            for answer in answers:
                answer["seconds"] = 1.0 if form == "stored" else seconds
                if form == "bfloat16" and flipped:
                    answer["logits"] = {name: -logit for name, logit in answer["logits"].items()}
        return response

    monkeypatch.setattr(isolated, "run_isolated", run_and_time)
    folder = exported(*ready)
    assert folder is not None
    proof, card = (
        json.loads((folder / "proof.json").read_text()),
        (folder / "README.md").read_text(),
    )
    assert ("faster" in proof) == named == ('dtype="bfloat16"' in card)


def test_an_export_as_large_as_its_teacher_is_refused(tmp_path, in_process):
    ready = made(tmp_path, classifier("no", "yes"), teacher_layers=1)
    refused(
        ready, r"not smaller: its weights take ([\d,]+) bytes on disk, but its teacher's take \1"
    )


def test_a_teacher_stored_without_safetensors_is_weighed_too(ready, in_process):
    weights = ready[4] / "teacher" / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    assert json.loads((exported(*ready) / "proof.json").read_text())["ratio"] < 1


@pytest.mark.parametrize(
    ("task", "student", "exported_logits", "agreed"),
    [
        (classifier("a", "b", "c"), [9.0, 9.0001, 0.0], [9.0001, 9.0, 0.0], True),
        (classifier("a", "b", "c"), [9.0, 9.01, 0.0], [9.01, 9.0, 0.0], False),
        (classifier("a", "b", "c"), [9.0, 9.0001, 0.0], [0.0, 0.0, 9.0], False),
        (classifier("a", "b", kind=MultiLabelClassification), [9.0, 1e-5], [9.0, -1e-5], True),
        (classifier("a", "b", kind=MultiLabelClassification), [9.0, 1e-2], [9.0, -1e-2], False),
    ],
)
def test_predictions_of_near_ties_are_equal(task, student, exported_logits, agreed):
    student_1C, export_1C = torch.tensor([student]), torch.tensor([exported_logits])
    tied = comparison.break_ties(student_1C, export_1C, torch.tensor([[comparison.NEAR * 9 / 2]]))
    assert task.agreement(export_1C, student_1C).item() == 0
    assert task.agreement(export_1C, tied).item() == agreed


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/home/me/secret/bert", "bert"),
        ("./secret/bert", "bert"),
        ("~/secret/bert/", "bert"),
        ("org/bert", "org/bert"),
        ("distill.corpora.generated", "distill.corpora.generated"),
        ("package:models/bert", "package:models/bert"),
    ],
)
def test_the_card_has_no_path_of_this_machine(ready, name, shown):
    run, task, *_ = ready
    run = replace(
        run,
        data=replace(run.data, source=name),
        teacher=config.Teacher(model=name),
        student=config.Student(model=name),
    )
    proof = Proof(
        texts=1,
        rows=1,
        agreement=1,
        max_difference=0,
        tolerance=None,
        max_logit=1,
        bytes=1,
        teacher_bytes=None,
        ratio=None,
        bits_per_weight=32,
        latency_p50_ms=1,
        format="dense",
        dtype="float32",
        quantize=None,
        code=False,
        threads=1,
        device="cpu",
        versions={},
    )
    assert Proof.from_json(json.loads(json.dumps(proof.to_json()))) == proof
    text = card(run, task, proof, None)
    assert "secret" not in text
    assert text.count(shown) >= 5


def test_without_a_teacher_there_is_nothing_to_be_smaller_than(tmp_path, in_process):
    run, *rest = made(tmp_path, classifier("no", "yes"), teacher_layers=1)
    folder = exported(replace(run, teacher=None), *rest)
    assert json.loads((folder / "proof.json").read_text())["teacher_bytes"] is None


def test_an_interrupted_export_leaves_nothing(ready, monkeypatch):
    def interrupted(script, request):
        assert len(left(ready[4])) == 3
        raise KeyboardInterrupt

    monkeypatch.setattr(isolated, "run_isolated", interrupted)
    with pytest.raises(KeyboardInterrupt):
        exported(*ready)
    assert left(ready[4]) == ["student", "teacher"]


def test_an_earlier_export_stays_until_a_new_one_is_proven(ready, in_process, tampered):
    final = exported(*ready)
    (final / "mark").write_text("earlier")
    tampered(one_weight)
    with pytest.raises(RunFailed, match="not equal"):
        exported(*ready)
    assert (final / "mark").read_text() == "earlier"


def test_a_new_export_takes_the_place_of_an_earlier_one(ready, in_process):
    (exported(*ready) / "mark").write_text("earlier")
    final = exported(*ready)
    assert not (final / "mark").exists()
    assert left(ready[4]) == ["export", "student", "teacher"]


def test_an_earlier_export_comes_back_when_renaming_fails(ready, in_process, monkeypatch):
    final = exported(*ready)
    (final / "mark").write_text("earlier")
    real = os.replace

    def failing(source, target):
        if Path(target) == final and "-old" not in str(source):
            raise OSError("disk gone")
        real(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="disk gone"):
        exported(*ready)
    assert (final / "mark").read_text() == "earlier"
    assert left(ready[4]) == ["export", "student", "teacher"]


def test_no_export_where_the_recipe_wants_none(ready):
    run, *rest = ready
    assert exported(replace(run, export=config.Export(format=None)), *rest) is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_the_bits_keep_the_predictions_and_halve_the_bytes(tmp_path, in_process, dtype):
    ready = made(tmp_path, classifier("no", "perhaps", "yes"), dtype=dtype)
    proof = json.loads((exported(*ready) / "proof.json").read_text())
    assert proof["agreement"] >= 0.99
    assert proof["tolerance"] is None
    assert 1e-6 < proof["max_difference"] < 0.5
    weights = (tmp_path / "export" / "model.safetensors").stat().st_size
    assert weights < 0.6 * (tmp_path / "student" / "model.safetensors").stat().st_size


def test_numbers_that_overflow_in_half_the_bits_are_refused(tmp_path, in_process, tampered):
    def overflow(draft):
        tensors = load_file(draft / "model.safetensors")
        tensors["classifier.bias"][:] = torch.nan
        save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})

    tampered(overflow)
    refused(made(tmp_path, classifier("no", "yes"), dtype="float16"), "not equal")


def test_prompts_of_a_language_model_are_proven(tmp_path, in_process):
    run, task, raw, tokenizer, folder = made(
        tmp_path, CausalLanguageModelling(max_length=16), "gpt2", columns=("prompt", "answer")
    )
    raw = Dataset.from_dict({"prompt": [*raw["prompt"][:3], None], "answer": raw["answer"][:4]})
    proof = json.loads((exported(run, task, raw, tokenizer, folder) / "proof.json").read_text())
    assert (proof["texts"], proof["agreement"]) == (4, 1)


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "roberta"])
def test_pairs_of_texts_are_proven_as_pairs(tmp_path, in_process, model_type):
    ready = made(tmp_path, classifier("no", "yes"), model_type, columns=("premise", "hypothesis"))
    folder = exported(*ready)
    assert json.loads((folder / "proof.json").read_text())["max_difference"] < 1e-5
    assert '"text_pair"' in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    "task",
    [classifier("a", "b", "c", kind=MultiLabelClassification), classifier(kind=Regression)],
    ids=["several", "number"],
)
def test_other_classifiers_are_proven_too(tmp_path, in_process, task):
    proof = json.loads((exported(*made(tmp_path, task)) / "proof.json").read_text())
    assert proof["agreement"] == 1
    assert proof["max_difference"] < 1e-5


def test_language_models_are_proven_token_by_token(tmp_path, in_process):
    ready = made(tmp_path, CausalLanguageModelling(max_length=16), "gpt2")
    proof = json.loads((exported(*ready) / "proof.json").read_text())
    assert proof["agreement"] == 1
    assert proof["rows"] > 3 * proof["texts"]


def test_a_tampered_language_model_is_refused(tmp_path, in_process, tampered):
    def scale(draft):
        tensors = load_file(draft / "model.safetensors")
        tensors["transformer.ln_f.weight"] *= 1.01
        save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})

    tampered(scale)
    refused(
        made(tmp_path, CausalLanguageModelling(max_length=16), "gpt2"),
        "not equal: .* logits differ",
    )


def test_texts_longer_than_the_model_are_cut_as_in_training(tmp_path, in_process):
    ready = made(tmp_path, classifier("no", "yes"))
    run, task, _, tokenizer, folder = ready
    long = Dataset.from_dict({"text": ["the cat sees " * 50, "a dog"]})
    proof = json.loads((exported(run, task, long, tokenizer, folder) / "proof.json").read_text())
    assert proof["max_difference"] < 1e-5
    assert proof["texts"] == 2


def test_the_number_of_texts_is_the_recipes(tmp_path, in_process):
    ready = made(tmp_path, classifier("no", "yes"), examples=5)
    assert json.loads((exported(*ready) / "proof.json").read_text())["texts"] == 5


def test_the_export_stands_alone(ready, tmp_path):
    """End to end, with the proof in its own process."""
    final = exported(*ready, metrics=None)
    proof = json.loads((final / "proof.json").read_text())
    assert proof["agreement"] == 1
    assert proof["ratio"] < 1
    assert proof["versions"]["torch"] == torch.__version__
    stored = {path.name: path.read_bytes() for path in final.iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
        "proof.json",
    } <= stored.keys()
    for name in stored.keys() - {"README.md"}:
        assert b"distill" not in stored[name]
        assert str(tmp_path).encode() not in stored[name]
    assert stored["README.md"].startswith(
        b"---\nlibrary_name: transformers\npipeline_tag: text-classification\n"
    )
    assert left(tmp_path) == ["export", "student", "teacher"]
    assert final.stat().st_mode == (tmp_path / "student").stat().st_mode
    assert len({path.stat().st_mode for path in final.iterdir()}) == 1


@pytest.mark.slow
def test_language_models_stand_alone(tmp_path):
    final = exported(*made(tmp_path, CausalLanguageModelling(max_length=16), "gpt2"))
    assert json.loads((final / "proof.json").read_text())["agreement"] == 1


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["distill.export", *arguments])
    export.main()


def test_the_command_line_exports_a_run_folder(ready, in_process, monkeypatch, capsys):
    run, task, raw, tokenizer, folder = ready
    compose.save_recipe(run, folder / "recipe.yaml")
    prepared = Prepared(task, tokenizer, DatasetDict(train=raw, test=raw), DatasetDict())
    monkeypatch.setattr(command, "prepared", lambda *_: prepared)
    run_main(monkeypatch, f"run={folder}", "dtype=bfloat16", "examples=3")
    assert f"export: {folder / 'export'}" in capsys.readouterr().out
    proof = json.loads((folder / "export" / "proof.json").read_text())
    assert (proof["dtype"], proof["texts"]) == ("bfloat16", 3)


def test_damaged_metrics_are_left_out_of_the_card(ready, in_process, monkeypatch, capsys):
    run, task, raw, tokenizer, folder = ready
    compose.save_recipe(run, folder / "recipe.yaml")
    (folder / "metrics.json").write_text('{"student": ')
    prepared = Prepared(task, tokenizer, DatasetDict(train=raw, test=raw), DatasetDict())
    monkeypatch.setattr(command, "prepared", lambda *_: prepared)
    run_main(monkeypatch, f"run={folder}")
    assert "Not measured." in (folder / "export" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "run is not given"),
        (["run=nowhere"], "run is nowhere, but there is no such folder"),
        (["run=x", "formt=onnx"], "formt is given, but there is no such key: did you mean format?"),
    ],
)
def test_a_wrong_command_line_is_answered_in_one_sentence(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run_main(monkeypatch, *arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in error
    assert error.count("\n") == 1


def test_the_readme_lists_every_format_and_key():
    readme = (Path(command.__file__).parent / "README.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", readme, re.MULTILINE)) >= {*capabilities.FORMATS}
    for options in re.findall(r"^python -m distill\.export (.*)$", readme, re.MULTILINE):
        assert {part.split("=")[0] for part in options.split()} <= {*vars(command.Options())}
