"""Another checkpoint's function with other weights, computed tensor by tensor as they are read."""

from __future__ import annotations

import re
from typing import Any

from frugallm.models.checkpoint import Checkpoint
from frugallm.models.family import Heads


class Rewritten(Checkpoint):
    """A checkpoint around another one; what is not about weights is that one's own.

    Parameters
    ----------
    base
        Any checkpoint with a described family.
    """

    def __init__(self, base: Checkpoint) -> None:
        self.name = base.name
        self.config = base.config
        self.family = base.family
        self.config_source = base.config_source
        self._base = base
        self._heads = Heads.of(base.config)
        self._in_block = re.compile(re.escape(self.family.blocks) + r"\.(\d+)\.(.+)\.(weight|bias)")

    def names(self) -> list[str]:  # noqa: D102
        return self._base.names()

    def shape(self, name: str) -> tuple[int, ...]:  # noqa: D102
        return self._base.shape(name)

    def where(self, name: str) -> str:  # noqa: D102
        return self._base.where(name)

    def companions(self) -> dict[str, bytes]:  # noqa: D102
        return self._base.companions()

    def generation(self) -> dict[str, Any] | None:  # noqa: D102
        return self._base.generation()

    @property
    def metadata(self) -> dict[str, str]:
        """What the base knows."""
        return self._base.metadata

    def _load_tokenizer(self) -> Any:
        return self._base.tokenizer
