"""SentencePiece in GGUF: scores make the tokens that merges made, and what scores cannot say is refused."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_llama import GGUFWriter
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerFast

from frugallm.errors import ExportError, ModelError
from frugallm.formats.export import export
from frugallm.formats.gguf_vocabulary import from_tokenizer, name_to_llama_cpp
from frugallm.models import InMemory, open_checkpoint
from frugallm.models.gguf_sentencepiece import merges_of
from frugallm.models.gguf_tokenizer import build_tokenizer
from gguf_models import Heard, facts_of, other_family

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = list("▁abcdehilnot.")
#: In the order of their scores; several can be made in more than one way.
PIECES = [
    "th",
    "▁t",
    "he",
    "▁a",
    "the",
    "▁th",
    "in",
    "an",
    "▁the",
    "▁▁",
    "on",
    "at",
    "ion",
    "tion",
    "▁▁▁▁",
    "ation",
    "▁an",
    "lll",
]
VOCABULARY = SPECIAL + BYTES + PIECES + LETTERS + ["ll"]
SCORES = {token: -float(place) for place, token in enumerate([*PIECES, "ll", *LETTERS])}
ROWS = len(VOCABULARY) + 3
SPACE = "▁"
REPLACE = normalizers.Replace(" ", SPACE)
PREPEND = normalizers.Sequence([normalizers.Prepend(SPACE), REPLACE])
GEMMA = pre_tokenizers.Split(" ", "merged_with_previous")


def tokenizer_of(merges=None, normalizer=PREPEND, splitter=None, vocabulary=VOCABULARY, added=()):
    """Return a tokenizer as tokenizer.json files of this kind have it."""
    numbers = {token: number for number, token in enumerate(vocabulary)}
    merges = merges_of(SCORES) if merges is None else merges
    backend = Tokenizer(BPE(numbers, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if normalizer is not None:
        backend.normalizer = normalizer
    if splitter is not None:
        backend.pre_tokenizer = splitter
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens(list(added))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


def joined(text, facts):
    """Tokenize as llama.cpp does: again and again join the leftmost two whose token has the highest score."""
    tokens = facts["tokenizer.ggml.tokens"]
    scores = dict(zip(tokens, facts["tokenizer.ggml.scores"]))
    numbers = {token: number for number, token in enumerate(tokens)}
    symbols = list(((" " if facts["tokenizer.ggml.add_space_prefix"] else "") + text).replace(" ", SPACE))
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in scores]
        if not pairs:
            break
        at = -max(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    found = [[numbers[s]] if s in numbers else [numbers[f"<0x{b:02X}>"] for b in s.encode()] for s in symbols]
    return [number for part in found for number in part]


FORMS = {
    "a space first": (PREPEND, None, True),
    "Gemma": (REPLACE, GEMMA, False),
    "Metaspace": (None, pre_tokenizers.Metaspace(SPACE, "always", split=False), True),
    "Metaspace, no space first": (None, pre_tokenizers.Metaspace(SPACE, "never", split=False), False),
}
WORDS = st.lists(
    st.sampled_from(["the", "nation", "lllll", "in", " ", "    ", "a", "é", "🙂", "\n", "."]), min_size=1
)


@pytest.mark.parametrize("form", FORMS)
def test_scores_make_the_tokens_that_merges_made(form):
    normalizer, splitter, prefix = FORMS[form]
    tokenizer = tokenizer_of(normalizer=normalizer, splitter=splitter)
    facts, _ = from_tokenizer(tokenizer, ROWS, "tiny")
    back = build_tokenizer(facts | {"general.architecture": "llama"}, "tiny.gguf")
    assert facts["tokenizer.ggml.add_space_prefix"] is prefix

    @given(WORDS.map("".join).filter(lambda text: form != "Metaspace" or not text.startswith(" ")))
    def alike(text):
        ids = tokenizer(text)["input_ids"]
        assert ids == [1, *joined(text, facts)]
        assert back(text)["input_ids"] == ids
        if prefix:
            assert back.decode(ids, skip_special_tokens=True) == text

    alike()


def test_kinds_and_fillers():
    facts, notes = from_tokenizer(tokenizer_of(), ROWS, "tiny")
    tokens, kinds = (
        facts["tokenizer.ggml.tokens"],
        dict(zip(facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"])),
    )
    assert len(tokens) == len(facts["tokenizer.ggml.scores"]) == ROWS and not notes
    assert (kinds["<unk>"], kinds["<s>"], kinds["the"], kinds["<0x0A>"]) == (2, 3, 1, 6)
    assert kinds[tokens[-1]] == 5
    assert facts["tokenizer.ggml.model"] == "llama" and facts["tokenizer.ggml.add_bos_token"] is True
    scores = dict(zip(tokens, facts["tokenizer.ggml.scores"]))
    assert scores["th"] > scores["the"] > scores["▁the"] > scores["ll"] > scores["a"] == scores["<s>"]


def test_a_byte_may_be_a_letter():
    """Gemma has a tabulator in the place of its byte."""
    vocabulary = ["\t" if token == "<0x09>" else token for token in VOCABULARY]
    tokenizer = tokenizer_of(vocabulary=vocabulary)
    facts, _ = from_tokenizer(tokenizer, ROWS, "tiny")
    assert tokenizer("a\tb")["input_ids"] == [1, *joined("a\tb", facts)]


def test_tokens_found_behind_the_normalizer_are_written_as_text_has_them():
    added = [AddedToken("▁▁▁", normalized=True), AddedToken("<▁>", normalized=False)]
    facts, _ = from_tokenizer(tokenizer_of(normalizer=REPLACE, added=added), ROWS, "tiny")
    kinds = dict(zip(facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]))
    assert kinds["   "] == kinds["<▁>"] == 4


def test_a_model_with_such_a_tokenizer_goes_there_and_back(tmp_path):
    folder, _ = other_family(tmp_path, "mistral", vocab_size=ROWS)
    tokenizer_of().save_pretrained(folder)
    path = export(folder, "gguf:Q8_0")
    assert facts_of(path)["tokenizer.ggml.model"] == "llama"
    text = "the nation at  the end.\n"
    again = open_checkpoint(path).tokenizer
    assert again(text)["input_ids"] == open_checkpoint(folder).tokenizer(text)["input_ids"]
    second = export(path, "gguf:F16", tmp_path / "again.gguf")
    kept = {k: v for k, v in facts_of(second).items() if k.startswith("tokenizer.")}
    assert kept == {k: v for k, v in facts_of(path).items() if k.startswith("tokenizer.")}


@pytest.mark.parametrize(("scheme", "notes"), [("first", 2), ("always", 1), ("never", 0)])
def test_where_llama_cpp_puts_other_spaces_is_told(scheme, notes, tmp_path):
    folder, _ = other_family(tmp_path, "mistral", vocab_size=ROWS, sliding_window=None)
    splitter = pre_tokenizers.Metaspace(SPACE, scheme, split=False)
    tokenizer_of(normalizer=None, splitter=splitter).save_pretrained(folder)
    heard = Heard()
    export(folder, "gguf:F32", progress=heard)
    said = [text for text in heard.said if "space" in text]
    assert len(said) == notes
    assert not notes or said[0].startswith("no space comes before a text that begins with one")


@pytest.mark.parametrize(
    ("name", "strips", "expected"),
    [
        ("demo", True, "Phi-3 demo"),
        ("demo", False, "demo"),
        ("my-Phi3", True, "my-Phi3"),
        ("Phi-3-mini", False, "Phi-3-mini"),
    ],
)
def test_llama_cpp_learns_from_the_name_that_space_behind_special_tokens_is_dropped(
    name, strips, expected, tmp_path
):
    _, model = other_family(tmp_path, "phi3")
    added = [AddedToken("<|endoftext|>", special=True), AddedToken("<|end|>", rstrip=strips, special=True)]
    tokenizer = tokenizer_of(added=added)
    facts, _ = from_tokenizer(tokenizer, ROWS, "tiny")
    assert name_to_llama_cpp(InMemory(model, tokenizer), facts | {"general.name": name}) == expected


# -- what goes wrong ---------------------------------------------------------------------------------------------------

MERGES = merges_of(SCORES)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"merges": [m for m in MERGES if m != ("▁t", "he")]}, r"merges \('▁t' and 'he'\) that scores"),
        ({"merges": [*(m for m in MERGES if m != ("▁t", "he")), ("▁t", "he")]}, "that scores of tokens"),
        ({"normalizer": normalizers.Sequence([normalizers.NFKC(), REPLACE])}, r"changes the text \(NFKC\)"),
        ({"normalizer": None}, "splits of its tokenizer have no name"),
        (
            {"normalizer": None, "splitter": pre_tokenizers.Metaspace(SPACE, "always", split=True)},
            "no name in GGUF",
        ),
        ({"splitter": pre_tokenizers.Whitespace()}, "no name in GGUF"),
        ({"vocabulary": [t for t in VOCABULARY if t != "<0x41>"]}, "no token for 1 of the 256 bytes"),
        (
            {"added": [AddedToken("▁▁▁", normalized=True), AddedToken("   ", normalized=False)]},
            "two tokens of its tokenizer have the same text",
        ),
    ],
)
def test_what_scores_cannot_say_is_refused(changes, said):
    with pytest.raises(ExportError, match=said) as caught:
        from_tokenizer(tokenizer_of(**changes), ROWS, "tiny")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0), "a tokenizer of kind Unigram is not written"),
        (BPE({"a": 0, "b": 1}, []), "has no merges, which llama.cpp asks for"),
    ],
)
def test_kinds_that_llama_cpp_does_not_load_are_refused(kind, said):
    backend = Tokenizer(kind)
    with pytest.raises(ExportError, match=said):
        from_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), ROWS, "tiny")


def test_normal_form_c_is_told(tmp_path):
    folder, _ = other_family(tmp_path, "mistral", sliding_window=None)
    described = json.loads((folder / "tokenizer.json").read_text())
    described["normalizer"] = {"type": "NFC"}
    (folder / "tokenizer.json").write_text(json.dumps(described))
    heard = Heard()
    export(folder, "gguf:F32", progress=heard)
    assert "its tokenizer brings text to the normal form NFC first" in heard.said[0]


@pytest.mark.parametrize("scores", [None, [0.0] * 9])
def test_a_file_with_too_few_scores_is_damaged(scores, tmp_path):
    values = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": scores}
    with pytest.raises(ModelError, match="more or fewer scores than tokens"):
        _ = open_checkpoint(GGUFWriter(tmp_path)(values=values)).tokenizer
