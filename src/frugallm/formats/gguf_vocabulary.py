"""The tokenizer of a model as metadata of a GGUF file: the reverse of :mod:`frugallm.models.gguf_tokenizer`.

GGUF names a pre-tokenizer instead of describing it, so of byte-level BPEs only those can be written whose splits have a name.
Tokenizers of SentencePiece's kind are in :mod:`~frugallm.formats.gguf_sentencepiece`.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from frugallm.errors import ExportError
from frugallm.formats import gguf_sentencepiece
from frugallm.models.gguf_file import GGUFFile
from frugallm.models.gguf_tokenizer import CONTROL, NORMAL, PRE, USER_DEFINED, Splits

if TYPE_CHECKING:
    from frugallm.models.checkpoint import Checkpoint

UNUSED = 5
#: The name to write where several have the same splits.
PREFERRED = ("gpt-2", "smollm", "llama-bpe", "tekken", "qwen2")
ROLES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
#: What llama.cpp looks for in a model's name; it then drops white space behind all special tokens, and needs these.
PHI3 = re.compile("phi-?3", re.IGNORECASE)
PHI3_TOKENS = {"</s>", "<s>", "<unk>", "<|endoftext|>"}
NFC = "its tokenizer brings text to the normal form NFC first, llama.cpp takes it as it is"
ELSEWHERE = "Hand it on in another format"


def vocabulary(checkpoint: Checkpoint) -> tuple[dict[str, Any], list[str]]:
    """Return the metadata of a model's tokenizer and chat template, copied from a GGUF file or made, and notes on it.

    Raises
    ------
    ExportError
        If GGUF has no way to say what the tokenizer does.
    """
    if isinstance(checkpoint, GGUFFile):
        return {key: value for key, value in checkpoint.facts.items() if key.startswith("tokenizer.")}, []
    rows = checkpoint.shape(f"{checkpoint.family.embedding}.weight")[0]
    return from_tokenizer(checkpoint.tokenizer, rows, checkpoint.name)


def name_to_llama_cpp(checkpoint: Checkpoint, metadata: dict[str, Any]) -> str:
    """Return the name of a model such that llama.cpp treats its special tokens as its tokenizer does.

    GGUF has no place for "white space behind this token is dropped". llama.cpp does so for models with Phi-3 in their name,
    and cannot load one with that name and other tokens.
    """
    name: str = metadata["general.name"]
    if isinstance(checkpoint, GGUFFile):
        return name
    if not set(metadata["tokenizer.ggml.tokens"]) >= PHI3_TOKENS:
        return PHI3.sub("Phi 3", name)
    added = checkpoint.tokenizer.added_tokens_decoder.values()
    strips = any(token.special and token.rstrip for token in added)
    return f"Phi-3 {name}" if strips and not PHI3.search(name) else name


def from_tokenizer(tokenizer: Any, rows: int, name: str) -> tuple[dict[str, Any], list[str]]:
    """Describe a ``transformers`` tokenizer; also return what llama.cpp does otherwise.

    Parameters
    ----------
    tokenizer
        One of the ``tokenizers`` library: a BPE, byte-level or falling back to bytes.
    rows
        Rows of the embedding; ids that no token has are filled up, since llama.cpp counts tokens to know the rows.
    name
        What to call the model in messages.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(f"{name}: its tokenizer has no tokenizer.json", ELSEWHERE)
    described = json.loads(backend.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise ExportError(
            f"{name}: a tokenizer of kind {model['type']} is not written as GGUF",
            "Written: BPE, byte-level or falling back to bytes",
        )
    tokens, kinds = _tokens(described, rows, name)
    if model.get("byte_fallback"):
        found, notes = gguf_sentencepiece.describe(described, tokens, kinds, name)
    else:
        found, notes = _byte_level(described, name)
        found |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    for role, attribute in ROLES.items():
        number = getattr(tokenizer, f"{attribute}_token_id", None)
        if number is not None:
            found[f"tokenizer.ggml.{role}_token_id"] = int(number)
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    found["tokenizer.ggml.add_bos_token"] = tokenizer.bos_token_id is not None and (
        ids[0] == tokenizer.bos_token_id
    )
    found["tokenizer.ggml.add_eos_token"] = tokenizer.eos_token_id is not None and (
        ids[-1] == tokenizer.eos_token_id
    )
    return found | _templates(tokenizer.chat_template), notes


def _byte_level(described: dict[str, Any], name: str) -> tuple[dict[str, Any], list[str]]:
    if not described["model"]["merges"]:
        raise ExportError(f"{name}: its tokenizer has no merges, which llama.cpp asks for", ELSEWHERE)
    found = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre_tokenizer_name(described, name),
        "tokenizer.ggml.merges": [
            m if isinstance(m, str) else " ".join(m) for m in described["model"]["merges"]
        ],
    }
    return found, [NFC] if _normalizer(described) == "NFC" else []


def _tokens(described: dict[str, Any], rows: int, name: str) -> tuple[list[str], list[int]]:
    by_id = {number: (token, NORMAL) for token, number in described["model"]["vocab"].items()}
    for added in described["added_tokens"]:
        by_id[added["id"]] = (added["content"], CONTROL if added["special"] else USER_DEFINED)
    if max(by_id) >= rows:
        raise ExportError(
            f"{name}: token {max(by_id)} of the tokenizer has no row in the embedding of {rows}",
            "The tokenizer must be that of the model",
        )
    pairs = [by_id.get(number, (f"[PAD{number}]", UNUSED)) for number in range(rows)]
    return [token for token, _ in pairs], [kind for _, kind in pairs]


def _templates(template: str | dict[str, str] | None) -> dict[str, Any]:
    if template is None:
        return {}
    if isinstance(template, str):
        return {"tokenizer.chat_template": template}
    named = {key: text for key, text in template.items() if key != "default"}
    found: dict[str, Any] = {f"tokenizer.chat_template.{key}": text for key, text in named.items()}
    if named:
        found["tokenizer.chat_templates"] = sorted(named)
    return found | ({"tokenizer.chat_template": template["default"]} if "default" in template else {})


def pre_tokenizer_name(described: dict[str, Any], name: str) -> str:
    """Return what GGUF calls the splits of a ``tokenizer.json``.

    Raises
    ------
    ExportError
        If they have no name, or the text is changed before it is split; to bring it to NFC is passed over, as
        llama.cpp's own converter does.
    """
    normalizer = _normalizer(described)
    kind, pattern = _splits(described.get("pre_tokenizer") or {})
    ignores = bool(described["model"].get("ignore_merges"))
    alike = [c for c in PREFERRED if _key(PRE[c]) == (kind, pattern, ignores)]
    for candidate in alike:
        if PRE[candidate].normalizer == normalizer:
            return candidate
    if alike and normalizer == "NFC":
        return alike[0]
    if normalizer:
        raise ExportError(
            f"{name}: its tokenizer changes the text ({normalizer}) before it splits it, which GGUF cannot say",
            ELSEWHERE,
        )
    raise ExportError(
        f"{name}: the splits of its tokenizer have no name in GGUF that is known here", ELSEWHERE
    )


def _normalizer(described: dict[str, Any]) -> str:
    return (described.get("normalizer") or {"type": ""})["type"]


def _key(splits: Splits) -> tuple[str, str, bool]:
    return splits.kind, splits.pattern, splits.ignore_merges


def _splits(described: dict[str, Any]) -> tuple[str, str]:
    """Return kind and pattern of a pre-tokenizer as :class:`Splits` has them; an unknown one is of kind ''."""
    steps = described.get("pretokenizers", [described])
    *before, level = steps
    if level.get("type") != "ByteLevel" or level.get("add_prefix_space"):
        return "", ""
    splits_words = level.get("use_regex", True)
    if not before and splits_words:
        return "gpt2", ""
    if len(before) != 1:
        return "", ""
    first = before[0]
    if first["type"] == "Digits" and first["individual_digits"] and splits_words:
        return "digits", ""
    isolated = first["type"] == "Split" and first["behavior"] == "Isolated" and not first["invert"]
    if isolated and not splits_words:
        return "pattern", first["pattern"].get("Regex", "")
    return "", ""
