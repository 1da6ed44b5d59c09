from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers
from torch import Tensor

from xdistil_fast import student as serving
from xdistil_fast.labels import repair
from xdistil_fast.model_io import ModelConfig
from xdistil_fast.train.alignment import align
from xdistil_fast.train.losses import representation_cosine, representation_mse
from xdistil_fast.train.schedules import GROUPS
from xdistil_fast.train.student import Student, tag_words

LABELS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
V, E, H = 12, 8, 6
RNG = np.random.default_rng(1)
TABLE = RNG.standard_normal((V, E)).astype(np.float32)
IDS = torch.from_numpy(RNG.integers(0, V, 9).astype(np.int32))
CU = torch.tensor([0, 4, 4, 9], dtype=torch.int32)


def make(
    head: str = "softmax", dropout: float = 0.0, seed: int = 3, projection: int = 0
) -> Student:
    """A student, whose output layer reads a projection of that size unless 0."""
    return Student(
        TABLE, H, len(LABELS), head=head, dropout=dropout, seed=seed,
        projection_size=projection, projected=projection > 0,
    )  # fmt: skip


def make_config(head: str = "softmax", projection: int = 0) -> ModelConfig:
    return ModelConfig(
        labels=tuple(LABELS), vocab_size=V, embedding_size=E, hidden_size=H, head=head,
        projection_size=projection,
    )  # fmt: skip


@pytest.mark.parametrize("projection", [0, 5])
@pytest.mark.parametrize("head", ["softmax", "crf"])
def test_tensors_are_those_of_the_model_folder(head: str, projection: int) -> None:
    found = {name: v.shape for name, v in make(head, projection=projection).tensors().items()}
    assert found == make_config(head, projection).tensor_shapes()


@pytest.mark.parametrize("projection", [0, 5, 70])
def test_served_student_computes_the_same(projection: int) -> None:
    trained = make(projection=projection)
    served = serving.Student(make_config(projection=projection), trained.tensors())
    np.testing.assert_allclose(
        served.logits(IDS.numpy(), CU.numpy()),
        trained(IDS, CU).detach().numpy(),
        rtol=1e-5,
        atol=1e-6,
    )


def test_start_values_follow_the_seed_and_leave_the_global_one_alone() -> None:
    torch.manual_seed(40)
    before = torch.get_rng_state()
    first, again, other = make(), make(), make(seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in first.tensors().items():
        np.testing.assert_array_equal(value, again.tensors()[name])
    assert (first.tensors()["output.weight"] != other.tensors()["output.weight"]).any()
    np.testing.assert_array_equal(first.tensors()["embedding.weight"], TABLE)


def test_training_does_not_write_into_the_table_given() -> None:
    table = TABLE.copy()
    student = Student(table, H, len(LABELS))
    with torch.no_grad():
        student.embedding.weight.zero_()
    np.testing.assert_array_equal(table, TABLE)


def test_load_takes_what_tensors_gives() -> None:
    first, second = make("crf"), make("crf", seed=9)
    second.load(first.tensors())
    for name, value in first.tensors().items():
        np.testing.assert_array_equal(value, second.tensors()[name])


def test_dropout_is_seeded_unbiased_and_off_without_generator() -> None:
    student = make(dropout=0.25)
    first = student(IDS, CU, np.random.default_rng(1))
    assert torch.equal(first, student(IDS, CU, np.random.default_rng(1)))
    assert not torch.equal(first, student(IDS, CU, np.random.default_rng(2)))
    assert torch.equal(student(IDS, CU), make()(IDS, CU))
    dropped = student._drop(torch.ones(300, 400), np.random.default_rng(5))
    assert set(np.unique(dropped.numpy())) == {0.0, np.float32(1 / 0.75)}
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("projection", [0, 5])
def test_gradient_reaches_every_parameter(projection: int) -> None:
    student = make(dropout=0.1, projection=projection)
    student(IDS, CU, np.random.default_rng(0)).square().sum().backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


PIECES = ["[UNK]", "oda", "##lind", "##e", "rows", "to", "farn", "##ess", ".", "mill", "##er", "by"]


@pytest.mark.parametrize("head", ["softmax", "crf"])
def test_words_get_the_tag_of_their_first_piece(head: str) -> None:
    tokenizer = tokenizers.Tokenizer(
        models.WordPiece({p: i for i, p in enumerate(PIECES)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    sentences = [
        ["odalinde", "rows", "to", "farness", "."],
        [],
        ["\u0007", "miller"],  # a word without pieces
        ["\u0007"],
        ["by", "farn", "mill"],
    ]
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
    aligned = align(tokenizer, sentences)
    tensors = make(head).tensors()
    served = serving.Student(make_config(head), tensors)
    tagged = tag_words(served, aligned, LABELS)
    assert [len(tags) for tags in tagged] == [len(words) for words in sentences]
    assert tagged[2][0] == tagged[3][0] == "O"
    # Each sentence for itself, by hand.
    for sentence, tags in zip(sentences, tagged, strict=True):
        one = align(tokenizer, [sentence])
        cu = one.cu_pieces.astype(np.int32)
        pieces = np.arange(len(one.ids))  # each a word of its own
        best, _ = served.decode_words(served.logits(one.ids, cu), cu, pieces, cu)
        names = [LABELS[best[p]] if p >= 0 else "O" for p in one.first_piece]
        assert tags == repair(names)
    assert any(tag != "O" for tags in tagged for tag in tags)


@pytest.mark.parametrize("loss", [representation_mse, representation_cosine])
def test_a_random_teachers_states_can_be_overfitted(loss: Callable[..., Tensor]) -> None:
    rng = np.random.default_rng(1)
    table = rng.standard_normal((20, 8)).astype(np.float32)
    model = Student(table, 24, 3, projection_size=6, seed=3)
    assert model.projection is not None
    cu = torch.tensor([0, 5, 6, 13], dtype=torch.int32)
    ids = torch.from_numpy(rng.integers(0, 20, 13).astype(np.int32))
    states = torch.from_numpy(rng.standard_normal((13, 6)).astype(np.float32))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(250):
        optimizer.zero_grad()
        value = loss(model.projection(model.encode(ids, cu)), states)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert value.item() < 1e-3
    assert model.output.weight.grad is None


def test_every_parameter_is_of_one_group() -> None:
    model = Student(np.zeros((4, 2), np.float32), 3, 2, head="crf", projection_size=5)
    groups = model.groups()
    assert list(groups) == list(GROUPS)
    listed = sorted(name for names in groups.values() for name in names)
    assert listed == sorted(name for name, _ in model.named_parameters())
    assert {name.partition(".")[0] for name in groups["output"]} == {"output", "crf"}
    plain = Student(np.zeros((4, 2), np.float32), 3, 2).groups()
    assert plain["projection"] == []
