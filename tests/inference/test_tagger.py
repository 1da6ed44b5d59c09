from __future__ import annotations

import itertools
import json
import os
import pickle
import threading
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from xdistil_fast import ModelError, Tagger
from xdistil_fast.labels import make_labels, repair, spans
from xdistil_fast.model_io import ModelConfig, load_folder, save_folder

KEYS = ["entity_group", "score", "word", "start", "end"]
HARD = (
    "Ada met \U0001f469\u200d\U0001f4bb and \U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7 in London.",
    "Zoe\u0308 Mu\u0308ller and Cafe\u0301 Ode\u0301on, not Zoë Müller",
    "سافرت ليلى إلى القاهِرَة؛ דוד גר בִּירוּשָׁלַיִם.",
    "東京で田中さんが会社を作りました。\u3000北京也有一家。",
    "Ada\x00Lovelace\x07 wrote\u00a0to\u202fCharles\tBabbage\r\nfrom London",
    "\ufeffLondon\u200b and \u200eCharles\u200f",
    "İstanbul ǅ ß ﬁ ½ \u0130i\u0307",
    "lone \ud83d and \ud83d\ude00 as two and \udc00Ada",
    "अनीता दिल्ली में काम करती है और मुंबई जाएगी।",
    "김민수는 서울에서 부산까지 갔다.",
    "\u0301\u0302 \u0303a \u200d\u200d",
    "[UNK] [PAD] Ada[UNK]London",
)


def check(text: str, entities: list[Any], labels: list[str]) -> None:
    """What holds of the entities of any text."""
    before = 0
    for entity in entities:
        assert list(entity) == KEYS
        start, end = entity["start"], entity["end"]
        assert type(start) is int
        assert type(end) is int
        assert before <= start < end <= len(text)
        assert text[start:end] == entity["word"]
        assert entity["word"] == entity["word"].strip()
        assert unicodedata.category(entity["word"][0])[0] != "M"
        assert end == len(text) or unicodedata.category(text[end])[0] != "M"
        assert "B-" + entity["entity_group"] in labels
        assert type(entity["score"]) is float
        assert 0 <= entity["score"] <= 1
        before = end


def test_shape_of_results(tagger: Tagger, sentences: tuple[str, ...]) -> None:
    single = tagger(sentences[0])
    assert single
    check(sentences[0], single, tagger.labels)
    several = tagger(list(sentences))
    assert several == [tagger(text) for text in sentences]
    assert tagger(sentences) == several
    assert tagger("") == tagger([]) == []
    assert tagger(["", "  ", "\x07\u200d"]) == [[], [], []]
    json.dumps(several)


@pytest.mark.parametrize("text", HARD)
def test_exact_offsets(tagger: Tagger, text: str) -> None:
    check(text, tagger(text), tagger.labels)
    check(text * 20, tagger(text * 20), tagger.labels)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.text(
        st.characters(codec=None)
        | st.sampled_from("ab ,.\u0301\u0308\u200d\ufe0f\u00a0\ud800東\U0001f469\U0001f4bb\u093f"),
        max_size=60,
    )
)
def test_exact_offsets_of_any_text(tagger: Tagger, text: str) -> None:
    check(text, tagger(text), tagger.labels)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.lists(st.text(max_size=5), max_size=12), max_size=4))
def test_one_valid_tag_a_word(tagger: Tagger, batch: list[list[str]]) -> None:
    tags = tagger.tag_words(batch)
    assert [len(row) for row in tags] == [len(words) for words in batch]
    for row in tags:
        assert set(row) <= set(tagger.labels)
        assert repair(row) == row


def test_entities_spell_the_tags(tagger: Tagger, sentences: tuple[str, ...]) -> None:
    """Entities and word tags are two views of one result."""
    tagged = tagger.tag_batch(sentences)
    rows = tagger.words(sentences, tagged)
    for text, row, entities in zip(
        sentences, rows, tagger.entities(sentences, tagged), strict=True
    ):
        found = spans([tag for _, tag in row])
        assert [span.type for span in found] == [entity["entity_group"] for entity in entities]
        for span, entity in zip(found, entities, strict=True):
            words = [word for word, _ in row[span.start : span.end]]
            inner = text[entity["start"] : entity["end"]]
            assert "".join("".join(words).split()) == "".join(inner.split())


def test_split_text_gives_the_same_tags(tagger: Tagger) -> None:
    """Words cut as the tokenizer cuts them get the tags they get in running text."""
    text = "Ada Lovelace wrote to Charles Babbage from London ."
    tagged = tagger.tag_batch([text])
    words, tags = zip(*tagger.words([text], tagged)[0], strict=True)
    assert list(words) == text.split()
    assert tagger.tag_words([text.split()]) == [list(tags)]


def test_words_without_pieces(tagger: Tagger) -> None:
    with_gaps = tagger.tag_words([["Ada", "\x07", "Lovelace", "", "wrote"], ["\u200d"], []])
    without = tagger.tag_words([["Ada", "Lovelace", "wrote"]])[0]
    assert with_gaps[0][1] == with_gaps[0][3] == "O"
    assert with_gaps[1:] == [["O"], []]
    assert [tag[2:] for tag in with_gaps[0][::2]] == [tag[2:] for tag in without]
    assert repair(with_gaps[0]) == with_gaps[0]


def byte_level() -> Tokenizer:
    """As RoBERTa's: several pieces may share one character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def unigram() -> Tokenizer:
    """As XLM-R's: NFKC turns one character into several, words are cut at white space only."""
    pieces = ["<unk>", "\u2581", *map(chr, range(33, 127)), "\u2044", "\u0301", "\u6771"]
    tokenizer = Tokenizer(models.Unigram([(piece, -2.0) for piece in pieces], unk_id=0))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def decomposing() -> Tokenizer:
    """Accents are characters of their own, and cut off as words of their own."""
    pieces = ["[UNK]", *map(chr, range(33, 127)), "\u0301", "\u0308"]
    tokenizer = Tokenizer(
        models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.NFD()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return tokenizer


@pytest.fixture(scope="module", params=[byte_level, unigram, decomposing])
def other_tokenizer(
    request: pytest.FixtureRequest, make_model: Callable[..., Path], tmp_path_factory: Any
) -> Tagger:
    """The same weights behind other kinds of tokenizers."""
    path = tmp_path_factory.mktemp("other") / "m"
    return Tagger.from_pretrained(make_model(path, tokenizer=request.param().to_str()))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text(st.sampled_from("ab ,.½ﬁé\u0301\u0308\u200d\u00a0\ud800東\U0001f469"), max_size=30))
def test_exact_offsets_of_other_tokenizers(other_tokenizer: Tagger, text: str) -> None:
    check(text, other_tokenizer(text), other_tokenizer.labels)
    row = other_tokenizer.words([text], other_tokenizer.tag_batch([text]))[0]
    place = 0
    for word, _ in row:
        place = text.index(word, place) + len(word)  # words are substrings, one behind the other


@pytest.mark.parametrize("text", HARD)
def test_other_tokenizers_batch_equals_single(other_tokenizer: Tagger, text: str) -> None:
    check(text, other_tokenizer(text), other_tokenizer.labels)
    assert other_tokenizer([text, "Ada wrote.", text]) == [
        other_tokenizer(text),
        other_tokenizer("Ada wrote."),
        other_tokenizer(text),
    ]


# Same bits, however it is run


def everything(tagger: Tagger, texts: list[str], **options: Any) -> list[Any]:
    return list(tagger.pipe(texts, **options))


@pytest.fixture(scope="module")
def texts(sentences: tuple[str, ...]) -> list[str]:
    random = np.random.default_rng(5)
    words = " ".join(sentences).split()
    lengths = [0, 1, 2, 3, 5, 8, 13, 40, 90, 200, 7, 1, 30, 64]
    made = [" ".join(random.choice(words, length)) for length in lengths]
    return [*made, *sentences, *HARD]


def test_batch_equals_single(tagger: Tagger, texts: list[str]) -> None:
    alone = [tagger(text) for text in texts]
    assert sum(map(len, alone)) > 100
    assert tagger(texts) == alone
    assert tagger(texts[::-1]) == alone[::-1]
    for batch_tokens in (1, 7, 100, 10**6):
        assert everything(tagger, texts, batch_tokens=batch_tokens) == alone
    split = [text.split() for text in texts]
    assert tagger.tag_words(split) == [tagger.tag_words([words])[0] for words in split]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_matter(
    folder: Path, tagger: Tagger, texts: list[str], threads: int
) -> None:
    other = Tagger.from_pretrained(folder, threads=threads)
    assert other.threads == threads
    assert other(texts) == tagger(texts)
    assert other.tag_words([t.split() for t in texts]) == tagger.tag_words(
        [t.split() for t in texts]
    )


def test_shared_between_threads(tagger: Tagger, texts: list[str]) -> None:
    expected = tagger(texts)
    results: dict[int, Any] = {}

    def work(number: int) -> None:
        results[number] = [tagger(texts) for _ in range(3)]

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert results == {number: [expected] * 3 for number in range(4)}


def test_pickle(tagger: Tagger, texts: list[str]) -> None:
    other = pickle.loads(pickle.dumps(tagger))
    assert other(texts) == tagger(texts)
    assert repr(other) == repr(tagger)
    assert other.digest == tagger.digest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fork(tagger: Tagger, texts: list[str]) -> None:
    expected = tagger(texts)
    child = os.fork()
    if child == 0:
        os._exit(0 if tagger(texts) == expected else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0


# Long text


def test_windows_do_not_change_short_text(
    make_model: Callable[..., Path], tmp_path: Path, tagger: Tagger, sentences: tuple[str, ...]
) -> None:
    head = tagger.config.head
    wide = Tagger.from_pretrained(make_model(tmp_path / "m", head=head, window=512, stride=128))
    pieces = [tagger.tag_batch([text]).pieces for text in sentences]
    assert min(pieces) <= tagger.config.window < max(pieces)
    for text, count in zip(sentences, pieces, strict=True):
        if count <= tagger.config.window:
            assert tagger(text) == wide(text)


def test_windows_with_all_context_agree_with_one_pass(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Far from the borders a BiLSTM forgets them, so windows must find what one pass finds."""
    text = "Ada Lovelace wrote to Charles Babbage from London. " * 40
    one = Tagger.from_pretrained(make_model(tmp_path / "a", window=10_000, stride=0))
    windows = Tagger.from_pretrained(make_model(tmp_path / "b", window=400, stride=200))
    assert one.tag_batch([text]).pieces > 1000
    whole, cut = one(text), windows(text)
    assert [(e["start"], e["end"], e["entity_group"]) for e in whole] == [
        (e["start"], e["end"], e["entity_group"]) for e in cut
    ]


def test_truncation_error(tagger: Tagger) -> None:
    long = "Ada " * 100
    pieces = tagger.tag_batch([long]).pieces
    message = rf"texts\[1\] has {pieces} pieces; truncation='error' allows at most 24"
    for call in (
        lambda: tagger(["Ada", long], truncation="error"),
        lambda: list(tagger.pipe(["Ada", long], batch_tokens=1, truncation="error")),
        lambda: tagger.tag_words([["Ada"], long.split()], truncation="error"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert tagger("Ada wrote.", truncation="error") == tagger("Ada wrote.")


@pytest.mark.parametrize("text", ["a", "Ada wrote. ", "\u0301", "\x00"])
def test_a_million_characters(make_model: Callable[..., Path], tmp_path: Path, text: str) -> None:
    tagger = Tagger.from_pretrained(make_model(tmp_path / "m", window=512, stride=128))
    text *= 1_000_000 // len(text)
    check(text, tagger(text), tagger.labels)


# Streams


def test_pipe_reads_no_further_than_it_must(tagger: Tagger) -> None:
    taken = 0

    def stream() -> Iterator[str]:
        nonlocal taken
        for taken in itertools.count(1):  # noqa: B007
            yield "Ada wrote to Charles."

    results = tagger.pipe(stream(), batch_tokens=50)
    assert taken == 0
    for _ in range(3):
        next(results)
    assert taken < 60
    before = taken
    list(itertools.islice(results, 200))
    assert before < taken < 300


def test_pipe_gives_what_came_before_an_error(tagger: Tagger) -> None:
    results = tagger.pipe(["Ada", "London", 5], batch_tokens=1)  # type: ignore[list-item]
    assert len(list(itertools.islice(results, 2))) == 2
    with pytest.raises(TypeError, match=r"texts\[2\] is int"):
        next(results)


# Bad input


@pytest.mark.parametrize("value", [None, 3, b"Ada", {"a": "b"}, {"a"}, iter(["a"])])
def test_call_refuses(tagger: Tagger, value: Any) -> None:
    with pytest.raises(TypeError, match="must be a string or a list of strings"):
        tagger(value)


@pytest.mark.parametrize("value", [["a", None], ["a", b"b"], ["a", ["b"]], ("a", 1)])
def test_call_refuses_items(tagger: Tagger, value: Any) -> None:
    with pytest.raises(TypeError, match=r"texts\[1\] is \w+; it must be a string"):
        tagger(value)


@pytest.mark.parametrize("value", [None, "Ada", b"Ada", 5, {"a": "b"}])
def test_pipe_refuses(tagger: Tagger, value: Any) -> None:
    with pytest.raises(TypeError, match="pipe takes an iterable of strings"):
        tagger.pipe(value)


@pytest.mark.parametrize("value", [0, -1])
def test_pipe_refuses_batch_tokens(tagger: Tagger, value: int) -> None:
    with pytest.raises(ValueError, match=f"batch_tokens is {value}; it must be at least 1"):
        tagger.pipe([], batch_tokens=value)
    with pytest.raises(TypeError, match="batch_tokens"):
        tagger.pipe([], batch_tokens=True)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "sentences is NoneType"),
        ("Ada wrote", "sentences is str"),
        (["Ada", "wrote"], r"sentences\[0\] is str; it must be a list of words"),
        ([["Ada"], None], r"sentences\[1\] is NoneType"),
        ([["Ada"], ["b", 3]], r"sentences\[1\]\[1\] is int; it must be a string"),
        ([["Ada"], [["b"]]], r"sentences\[1\]\[0\] is list"),
    ],
)
def test_tag_words_refuses(tagger: Tagger, value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        tagger.tag_words(value)


def test_options_refused(tagger: Tagger, folder: Path) -> None:
    for call in (tagger, tagger.pipe, tagger.tag_words):
        with pytest.raises(ValueError, match="truncation is 'cut'; allowed: 'window', 'error'"):
            call([], truncation="cut")  # type: ignore[operator]
    for wrong in (-1, 10**6):
        with pytest.raises(ValueError, match="threads"):
            Tagger.from_pretrained(folder, threads=wrong)
    for wrong in (1.0, "2", None, True):
        with pytest.raises(TypeError, match="threads"):
            Tagger.from_pretrained(folder, threads=wrong)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="was not found"):
        Tagger.from_pretrained("no-such-model")


def test_attributes(tagger: Tagger, folder: Path) -> None:
    config = tagger.config
    assert tagger.labels == ["O", "B-LOC", "I-LOC", "B-ORG", "I-ORG", "B-PER", "I-PER"]
    for part in (str(folder), "LOC, ORG, PER", "12x10", config.head, "threads=0"):
        assert part in repr(tagger)
    tensors = load_folder(folder).tensors
    assert tagger.parameters == sum(value.size for value in tensors.values())


# A model whose answer is known


@pytest.fixture
def spelled(tmp_path: Path, request: pytest.FixtureRequest) -> Tagger:
    """A student that reads tags off the words: p is B-PER, q I-PER, l B-LOC, m I-LOC, o is O."""
    labels = make_labels(["PER", "LOC"])
    pieces = ["[UNK]", *"oplqm", *(f"##{char}" for char in "oplqm")]
    tokenizer = Tokenizer(
        models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tag_of = {"o": "O", "p": "B-PER", "q": "I-PER", "l": "B-LOC", "m": "I-LOC"}
    size = len(labels)
    config = ModelConfig(
        tuple(labels), len(pieces), size, size, head=getattr(request, "param", "softmax")
    )
    tensors = {name: np.zeros(shape, np.float32) for name, shape in config.tensor_shapes().items()}
    for index, piece in enumerate(pieces[1:], 1):
        tensors["embedding.weight"][index, labels.index(tag_of[piece[-1]])] = 1
    # Gates i and o open, f shut: the forward state says which of the C inputs is on.
    for gate, value in ((0, 20), (1, -20), (3, 20)):
        tensors["bilstm.bias_ih_l0"][gate * size : (gate + 1) * size] = value
    tensors["bilstm.weight_ih_l0"][2 * size : 3 * size] = 3 * np.eye(size)
    tensors["output.weight"][:, :size] = 10 * np.eye(size)
    path = save_folder(tmp_path / "m", config, tensors, tokenizer.to_str(), "")
    return Tagger.from_pretrained(path)


@pytest.mark.parametrize("spelled", ["softmax", "crf"], indirect=True)
def test_known_entities(spelled: Tagger) -> None:
    text = "o p q o l m m p l  p\to"
    found = [(e["entity_group"], e["word"], e["start"], e["end"]) for e in spelled(text)]
    assert found == [
        ("PER", "p q", 2, 5),
        ("LOC", "l m m", 8, 13),
        ("PER", "p", 14, 15),
        ("LOC", "l", 16, 17),
        ("PER", "p", 19, 20),
    ]
    assert all(entity["score"] > 0.99 for entity in spelled(text))
    assert spelled.tag_words([["p", "q", "o"], ["l"]]) == [["B-PER", "I-PER", "O"], ["B-LOC"]]


@pytest.mark.parametrize("spelled", ["softmax", "crf"], indirect=True)
def test_decoding_is_valid_iob2(spelled: Tagger) -> None:
    for length in (1, 2, 3):
        for chars in itertools.product("opqlm", repeat=length):
            row = spelled.tag_words([list(chars)])[0]
            assert repair(row) == row
    # Later pieces of a word decide nothing for it: o|p, then q: the q begins an entity.
    assert spelled.tag_words([["op", "q"]]) == [["O", "B-PER"]]
    assert [(e["entity_group"], e["word"]) for e in spelled("op q")] == [("PER", "q")]


def test_score_is_the_mean_over_words(spelled: Tagger) -> None:
    tagged = spelled.tag_batch(["p q o"])
    entity = spelled("p q o")[0]
    assert entity["score"] == sum(tagged.probabilities[:2].tolist()) / 2
    expected = np.exp(10 * np.tanh(np.tanh(3.0)))
    assert entity["score"] == pytest.approx(expected / (expected + 4), rel=1e-5)
