"""Which path is used, and what is said where there is none."""

import warnings

import pytest

from frugallm.errors import ParameterError
from frugallm.kernels import library


@pytest.fixture
def asked(monkeypatch):
    def ask(value):
        monkeypatch.setenv("FRUGAL_KERNELS", value)

    return ask


@pytest.fixture
def not_built(monkeypatch):
    monkeypatch.setattr(library, "_places", list)
    cached = (library.library, library.usable_paths)
    for function in cached:
        function.cache_clear()
    yield
    monkeypatch.undo()
    for function in cached:
        function.cache_clear()


def test_the_reference_can_be_asked_for(asked):
    asked("reference")
    assert library.path_name() == "reference"


def test_a_misspelt_path_is_refused(asked):
    asked("avx")
    with pytest.raises(ParameterError, match="one of native, reference"):
        library.path_name()


@pytest.mark.skipif(not library.usable_paths(), reason="the native kernels are not built")
def test_the_best_path_is_taken_and_any_can_be_asked_for(asked):
    asked("")
    assert library.path_name() == library.usable_paths()[-1]
    asked("generic")
    assert library.path_name() == "generic"


def test_without_a_library_the_reference_is_used_and_one_warning_says_so(asked, not_built):
    asked("")
    with pytest.warns(UserWarning, match="install a C\\+\\+ compiler"):
        assert library.path_name() == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert library.path_name() == "reference"
    asked("native")
    with pytest.raises(ParameterError, match="not built"):
        library.path_name()
