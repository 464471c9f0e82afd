import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frugallm.formats.words import pack_words, unpack_words
from packed_folders import word_rows


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 75), st.integers(0, 999))
def test_words_are_a_little_endian_bit_stream(bits, rows, count, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, count), generator=generator, dtype=torch.uint8)
    words = pack_words(codes, bits)
    assert torch.equal(words, word_rows(codes.tolist(), bits))
    assert torch.equal(unpack_words(words, bits, count), codes)
