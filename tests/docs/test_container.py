"""The page about our own keys and tensors names all of them."""

from pathlib import Path

from frugallm.formats import extras, rounded_inputs

PAGE = (Path(__file__).parents[2] / "docs" / "container.md").read_text(encoding="utf-8")


def test_every_tensor_and_kind_stands_on_the_page():
    missing = [
        name for name in (*extras.LEAVES, *rounded_inputs.LEAVES, *extras.KINDS) if f"`{name}" not in PAGE
    ]
    assert missing == []
