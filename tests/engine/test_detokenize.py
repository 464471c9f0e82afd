"""Text as it comes: whole characters, and stop strings wherever their borders fall."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from frugallm.engine.detokenize import StopStrings, TextStream
from frugallm.errors import ModelError

FINE = 257
TEXT = "naïve 東京 – 🙂🙃 'end'"


@pytest.fixture(scope="module", params=["bytes", "fallback"])
def tokenizer(request):
    """A tokenizer with a token for every byte, of either of the two kinds there are."""
    if request.param == "bytes":
        words = {word: i for i, word in enumerate(sorted(ByteLevel.alphabet()))} | {"fine": FINE}
        backend = Tokenizer(models.BPE(words, []))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    else:
        words = {f"<0x{i:02X}>": i for i in range(256)} | {"<unk>": 256, "fine": FINE}
        backend = Tokenizer(models.BPE(words, [], byte_fallback=True, unk_token="<unk>"))
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def pieces(tokenizer, ids):
    stream = TextStream(tokenizer)
    return [stream.push(i) for i in ids], stream.flush()


def test_only_whole_characters_come_and_together_they_are_the_text(tokenizer):
    ids = tokenizer(TEXT)["input_ids"]
    assert len(ids) == len(TEXT.encode())
    parts, rest = pieces(tokenizer, ids)
    assert "".join(parts) == TEXT and rest == ""
    assert not any("\ufffd" in part for part in parts)


def test_an_answer_cut_inside_a_character_ends_in_front_of_it(tokenizer):
    ids = tokenizer("東京")["input_ids"]
    parts, rest = pieces(tokenizer, ids[:5])
    assert "".join(parts) + rest == "東"


def test_bytes_that_are_no_text_do_no_harm(tokenizer):
    draw = random.Random(1)
    for _ in range(20):
        ids = [draw.randrange(256) for _ in range(60)]
        parts, rest = pieces(tokenizer, [*ids, FINE])
        assert ("".join(parts) + rest).endswith("fine")


def test_a_tokenizer_without_a_fast_form_is_refused():
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        TextStream(object())


@pytest.mark.parametrize("seed", range(20))
def test_a_stop_string_is_found_wherever_the_pieces_break(seed):
    draw = random.Random(seed)
    text, words = "one two\nthree\n\nfour STOP five", ["STOP", "\n\n\n", "ST"]
    stops, shown, place = StopStrings(words), "", 0
    while place < len(text):
        size = draw.randrange(1, 5)
        new, found = stops.push(text[place : place + size])
        shown, place = shown + new, place + size
        assert text.startswith(shown)
        if found:
            break
    assert found in ("STOP", "ST") and shown == "one two\nthree\n\nfour "


def test_only_a_possible_beginning_is_held_back():
    stops = StopStrings(["###"])
    assert stops.push("a#") == ("a", None)
    assert stops.push("b##") == ("#b", None)
    assert stops.flush() == "##"
    assert StopStrings([]).push("abc") == ("abc", None)
