"""Token windows: the same text always gives the same ones, and a short text says what fits."""

import itertools
import warnings

import pytest
import torch

from frugallm.errors import DataError, ParameterError
from frugallm.text import Text, calibration_windows, evaluation_windows, leading_bos
from frugallm.text.windows import tokenize

STORY = "the quick brown fox jumps over a lazy dog while seven wizards quietly compress models\n"


def text_of(*documents, chat=False):
    return Text(name="story", digest="0", documents=documents, chat=chat)


def ids_of(tokenizer, string):
    return torch.tensor(tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"])


def test_the_bos_rule_follows_the_tokenizer(tokenizer, bos_tokenizer):
    assert tokenizer.bos_token_id is not None and leading_bos(tokenizer) is None
    assert leading_bos(bos_tokenizer) == bos_tokenizer.bos_token_id


def test_evaluation_windows_are_the_text_from_its_start_without_gaps(tokenizer):
    windows = evaluation_windows(text_of(STORY * 40), tokenizer, windows=3, length=50)
    assert windows.shape == (3, 50) and windows.dtype == torch.int64
    assert torch.equal(windows.flatten(), ids_of(tokenizer, STORY * 40)[:150])


def test_every_window_begins_with_bos_where_the_tokenizer_adds_one(bos_tokenizer):
    text = text_of(STORY * 40)
    for windows in (
        evaluation_windows(text, bos_tokenizer, 3, 50),
        calibration_windows(text, bos_tokenizer, 3, 50, seed=1),
    ):
        assert windows.shape == (3, 50) and (windows[:, 0] == bos_tokenizer.bos_token_id).all()
        assert not (windows[:, 1:] == bos_tokenizer.bos_token_id).any()
    rest = evaluation_windows(text, bos_tokenizer, 3, 50)[:, 1:].flatten()
    assert torch.equal(rest, ids_of(bos_tokenizer, STORY * 40)[: 3 * 49])


def test_documents_are_joined_by_a_blank_line_and_conversations_by_nothing(tokenizer):
    assert tokenizer.decode(tokenize(text_of("a", "b"), tokenizer)) == "a\n\nb"
    assert tokenizer.decode(tokenize(text_of("a", "b", chat=True), tokenizer)) == "ab"


def test_a_beginning_equals_the_beginning_of_the_whole(tokenizer):
    text = text_of(STORY * 2000, STORY)
    assert torch.equal(tokenize(text, tokenizer, at_least=200), tokenize(text, tokenizer)[:200])


def test_all_windows_of_a_text(tokenizer):
    total = len(ids_of(tokenizer, STORY * 10))
    assert evaluation_windows(text_of(STORY * 10), tokenizer, None, 16).shape == (total // 16, 16)


def test_calibration_places_are_seeded_distinct_and_from_the_text(tokenizer):
    text = text_of("".join(f"{n} " for n in range(3000)))
    ids = ids_of(tokenizer, text.documents[0]).tolist()
    windows = calibration_windows(text, tokenizer, 40, 32, seed=3)
    assert torch.equal(windows, calibration_windows(text, tokenizer, 40, 32, seed=3))
    assert not torch.equal(windows, calibration_windows(text, tokenizer, 40, 32, seed=4))
    places = sorted(next(i for i in range(len(ids)) if ids[i : i + 32] == w) for w in windows.tolist())
    assert all(b - a >= 32 for a, b in itertools.pairwise(places))


def test_calibration_can_use_the_whole_text(tokenizer):
    ids = ids_of(tokenizer, STORY * 10)
    windows = calibration_windows(text_of(STORY * 10), tokenizer, len(ids) // 16, 16, seed=0)
    assert len(windows) == len(ids) // 16


def test_a_short_text_says_how_much_there_is_and_what_fits(tokenizer):
    text = text_of(STORY * 10)
    total = len(ids_of(tokenizer, STORY * 10))
    with pytest.raises(DataError, match=f"{total:,} tokens; 8 x 64 need 512. windows={total // 64} fits"):
        evaluation_windows(text, tokenizer, 8, 64)
    with pytest.raises(DataError, match=f"{total:,} tokens; 1 x 2048 need 2,048"):
        evaluation_windows(text, tokenizer, None, 2048)
    with pytest.raises(DataError, match=f"samples={total // 64} or seq_len={total // 8} fits") as error:
        calibration_windows(text, tokenizer, 8, 64)
    assert calibration_windows(text, tokenizer, 8, total // 8).shape == (8, total // 8), error.value
    assert calibration_windows(text, tokenizer, total // 64, 64).shape == (total // 64, 64)


def test_absurd_sizes_are_refused(tokenizer):
    text = text_of(STORY * 10)
    with pytest.raises(ParameterError, match="length of the token windows must be at least 2; got 1"):
        evaluation_windows(text, tokenizer, 1, 1)
    with pytest.raises(ParameterError, match=r"samples .* at least 1; got 0"):
        calibration_windows(text, tokenizer, 0, 16)
    with pytest.raises(ParameterError, match=r"windows .* at least 1; got -1"):
        evaluation_windows(text, tokenizer, -1, 16)


def test_a_text_longer_than_the_context_gives_no_warning(tokenizer, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(tokenize(text_of(STORY * 5000), tokenizer)) > 64
    assert "longer than" not in caplog.text
