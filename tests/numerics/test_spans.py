"""Spans of two tokenizers and the losses over them, on arbitrary texts and cuts."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AddedToken

from distill import losses, models
from distill.data.token_spans import align
from distill.losses.spans import SpanRows, span_kl, uld
from distill.models.token_bytes import token_bytes


@st.composite
def divided(draw):
    """The bytes of a text, divided twice, also within characters."""
    content = draw(st.text(max_size=20)).encode("utf-8", "surrogatepass")
    sides = []
    for _ in range(2):
        cuts = draw(st.lists(st.integers(0, len(content)), max_size=6).map(sorted))
        edges = [0, *cuts, len(content)]
        sides.append([content[a:b] for a, b in pairwise(edges) if a < b])
    return sides


def edges_of(tokens):
    """Distances of token boundaries from the end."""
    sizes = [len(each) for each in tokens]
    return {sum(sizes[place:]) for place in range(len(sizes) + 1)}


@given(divided())
def test_spans_are_the_pieces_between_common_boundaries(sides):
    spans = align(*sides)
    expected = len(edges_of(sides[0]) & edges_of(sides[1])) - 1
    for tokens, numbers in zip(sides, spans, strict=True):
        assert sorted({*numbers.tolist()}) == list(range(expected))
        assert (np.diff(numbers) >= 0).all()
        assert len(tokens) == len(numbers)
    for number in range(expected):
        pieces = [
            b"".join(token for token, each in zip(tokens, numbers, strict=True) if each == number)
            for tokens, numbers in zip(sides, spans, strict=True)
        ]
        assert pieces[0] == pieces[1] != b""


@given(divided(), st.integers(0, 3))
def test_a_sequence_that_begins_later_and_special_tokens(sides, missing):
    one, other = sides
    late = one[missing:]
    shorter, longer = align([*late, b""], [*other, b""])
    assert shorter[-1] == longer[-1] == max(*shorter, *longer)  # both ends of text are a span
    size = sum(map(len, late))
    common = {edge for edge in edges_of(late) & edges_of(other) if edge <= size}
    assert max(*shorter, *longer) + 1 == len(common)


@given(st.lists(st.binary(min_size=1, max_size=3), min_size=1, max_size=5))
def test_one_tokenizer_is_aligned_token_by_token(tokens):
    for numbers in align(tokens, tokens):
        assert numbers.tolist() == list(range(len(tokens)))


def test_texts_that_differ_have_no_spans():
    assert [numbers.tolist() for numbers in align([b"ab", b"c"], [b"a", b"bd"])] == [[-1] * 2] * 2


# ---- the bytes of tokens


@pytest.fixture(scope="module", params=["byte level", "sentencepiece"])
def tokenizer(request):
    if request.param == "byte level":
        return models.train_tokenizer(["some words of a text"] * 3, 300, {"pad_token": "<pad>"})
    return sentencepiece_like()


def sentencepiece_like():
    """A tokenizer that writes spaces as U+2581, and bytes that are no token as <0x..>."""
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "</s>": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    for token in ("\u2581", "t", "h", "e", "th", "the", "\u2581the"):
        vocab[token] = len(vocab)
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the")]
    backend = Tokenizer(BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30))
def test_the_bytes_of_tokens_are_those_of_the_text(tokenizer, text):
    made = token_bytes(tokenizer, "teacher")
    ids = tokenizer(text.replace("\u2581", ""), add_special_tokens=False)["input_ids"]
    special = [token for token in tokenizer.all_special_tokens if token in text]
    if not special:
        assert b"".join(made[i] for i in ids) == text.replace("\u2581", "").encode()


def test_the_end_of_a_turn_has_no_bytes_whichever_token_it_is():
    ends = "<end_of_turn>", "<|im_end|>"
    tables, sequences = [], []
    for end in ends:
        tokenizer = models.train_tokenizer(["some words"] * 3, 300, {"pad_token": "<pad>"})
        tokenizer.add_tokens([AddedToken(end, special=True)])
        tables.append(token_bytes(tokenizer, "teacher"))
        sequences.append(tokenizer(f"some words{end}")["input_ids"])
    spans = align(*([table[i] for i in ids] for table, ids in zip(tables, sequences, strict=True)))
    assert spans[0].tolist() == spans[1].tolist() == [*range(len(sequences[0]))]


# ---- losses


def rows(logits, labels, spans):
    return SpanRows(logits, torch.tensor(labels), torch.tensor(spans))


def test_models_that_agree_have_no_loss():
    torch.manual_seed(0)
    logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    one = rows(logits, [1, 2, 3, 4], [0, 0, 1, 2])
    other = rows(logits.detach(), [1, 2, 3, 4], [0, 0, 1, 2])
    for divergence in (span_kl, uld):
        value = divergence(one, other, 1.0)
        assert value.shape == (3,)
        torch.testing.assert_close(value, torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    (gradient,) = torch.autograd.grad(span_kl(one, other, 1.0).sum(), logits)
    assert gradient.abs().max() < 1e-9


@given(st.integers(0, 50))
def test_the_likelihood_of_a_span_is_the_product_over_its_tokens(seed):
    generator = torch.Generator().manual_seed(seed)
    student = 2 * torch.randn(3, 7, generator=generator, dtype=torch.float64)
    teacher = 2 * torch.randn(2, 11, generator=generator, dtype=torch.float64)
    value = span_kl(rows(student, [1, 5, 0], [-1, 0, 0]), rows(teacher, [10, 3], [0, -1]), 1.0)
    q = float(student[1].softmax(-1)[5] * student[2].softmax(-1)[0])
    p = float(teacher[0].softmax(-1)[10])
    by_hand = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    assert value.tolist() == pytest.approx([by_hand], abs=1e-5)


@given(st.integers(0, 50))
def test_of_one_token_it_is_at_most_the_full_divergence(seed):
    generator = torch.Generator().manual_seed(seed)
    pair = [2 * torch.randn(5, 8, generator=generator, dtype=torch.float64) for _ in range(2)]
    labels, spans = [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]
    value = span_kl(*(rows(each, labels, spans) for each in pair), 1.0)
    assert (value <= losses.forward_kl(*pair, 1.0) + 1e-9).all()
    assert (value >= -1e-9).all()


@given(st.integers(0, 50), st.permutations(range(9)))
def test_sorted_probabilities_know_no_vocabulary(seed, order):
    """Another order of the tokens, and tokens that never come, change nothing."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    teacher = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    value = uld(rows(student, [0, 0], [0, 1]), rows(teacher, [0, 0], [0, 1]), 2.0)
    other = torch.cat([teacher[:, order], torch.full((2, 3), -1e30, dtype=torch.float64)], 1)
    again = uld(rows(student, [0, 0], [0, 1]), rows(other, [0, 0], [0, 1]), 2.0)
    torch.testing.assert_close(value, again)
    p, q = ((each / 2).softmax(-1).numpy() for each in (teacher, student))
    by_hand = [
        4
        * sum(abs(a - b) for a, b in zip(sorted(x)[::-1], [*sorted(y)[::-1], 0, 0, 0], strict=True))
        for x, y in zip(p, q, strict=True)
    ]
    assert value.tolist() == pytest.approx(by_hand)


@pytest.mark.parametrize("divergence", [span_kl, uld])
def test_gradients(divergence):
    torch.manual_seed(1)
    student = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    other = rows(torch.randn(3, 6, dtype=torch.float64), [1, 2, 3], [0, 0, 1])
    assert torch.autograd.gradcheck(
        lambda logits: divergence(rows(logits, [0, 1, 2, 3], [-1, 0, 1, 1]), other, 1.5), student
    )
