"""The tokenizer of a GGUF file, rebuilt with the ``tokenizers`` library: a byte-level BPE, or one of SentencePiece's kind.

A GGUF file names its pre-tokenizer (``tokenizer.ggml.pre``) instead of describing it. The splits below are
those that llama.cpp uses for these names, written as the tokenizers they were converted from have them.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from frugallm.errors import ModelError
from frugallm.models.gguf_sentencepiece import build_backend

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Splits:
    """How text is cut before the merges.

    Attributes
    ----------
    kind
        ``"gpt2"``: the expression of GPT-2; ``"digits"``: every digit alone, then that; or a ``pattern``.
    ignore_merges
        A piece that is a token as a whole is taken as it is.
    add_bos
        What holds where the file does not say.
    normalizer
        What becomes of the text before it is cut: nothing, or Unicode's ``"NFC"``.
    """

    kind: Literal["gpt2", "digits", "pattern"]
    pattern: str = ""
    ignore_merges: bool = False
    add_bos: bool = False
    normalizer: Literal["", "NFC"] = ""


GPT2 = Splits("gpt2")
DIGITS = Splits("digits")
LLAMA3 = Splits(
    "pattern",
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + TAIL,
    ignore_merges=True,
    add_bos=True,
)
TEKKEN = Splits(
    "pattern",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ignore_merges=True,
    add_bos=True,
)
QWEN2 = Splits("pattern", CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + TAIL, normalizer="NFC")
PRE = {
    "gpt-2": GPT2,
    "mpt": GPT2,
    "olmo": GPT2,
    "smollm": DIGITS,
    "starcoder": DIGITS,
    "refact": DIGITS,
    "llama-bpe": LLAMA3,
    "llama-v3": LLAMA3,
    "llama3": LLAMA3,
    "tekken": TEKKEN,
    "qwen2": QWEN2,
}


def build_tokenizer(metadata: dict[str, Any], path: Path) -> Any:
    """Build a ``PreTrainedTokenizerFast`` from a GGUF file's metadata.

    Raises
    ------
    ModelError
        If the file's tokenizer is of another kind, or damaged.
    """
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    sentencepiece = metadata.get("tokenizer.ggml.model") == "llama"
    tokens, kinds = _tokens(metadata, path)
    backend = (_scored if sentencepiece else _byte_level)(metadata, tokens, kinds, path)
    control = (CONTROL, UNKNOWN) if sentencepiece else (CONTROL,)
    backend.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, kind in zip(tokens, kinds) if kind in control]
    )
    backend.add_tokens(
        [AddedToken(t, normalized=False) for t, kind in zip(tokens, kinds) if kind == USER_DEFINED]
    )
    special = {
        f"{role}_token": tokens[number]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (number := token_id(metadata, key, path)) is not None
    }
    level = None if sentencepiece else processors.ByteLevel(trim_offsets=False)
    adds_bos = sentencepiece or _splits(metadata, path).add_bos
    backend.post_processor = _post_processor(metadata, level, adds_bos, special, backend, path)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=_text(metadata, "tokenizer.chat_template", path),
        model_max_length=metadata.get(f"{metadata['general.architecture']}.context_length"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """Return the files that ``save_pretrained`` writes for a tokenizer: name to content."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}
    if "tokenizer_config.json" in files:
        config = json.loads(files["tokenizer_config.json"])
        if config.get("tokenizer_class") == "TokenizersBackend":
            # The name that both transformers 4 and 5 know for the same class.
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
            files["tokenizer_config.json"] = (
                json.dumps(config, indent=2, ensure_ascii=False) + "\n"
            ).encode()
    return files


def token_id(metadata: dict[str, Any], role: str, path: Path) -> int | None:
    """Return the id that the file gives a role (``bos``, ``eos``, ``unknown``, ``padding``), if it does."""
    number = metadata.get(f"tokenizer.ggml.{role}_token_id")
    if number is None:
        return None
    tokens = metadata.get("tokenizer.ggml.tokens")
    count = len(tokens) if isinstance(tokens, list) else 0
    if type(number) is not int or not 0 <= number < count:
        raise ModelError(f"{path} is damaged: the {role} token is {number}, the vocabulary has {count}")
    return number


def _splits(metadata: dict[str, Any], path: Path) -> Splits:
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if model != "gpt2":
        raise ModelError(
            f"{path}: a tokenizer of kind '{model}' is not read", "Use the model's safetensors folder"
        )
    if not isinstance(pre, str) or pre not in PRE:
        raise ModelError(
            f"{path}: the pre-tokenizer '{pre}' is not known", f"Known: {', '.join(sorted(PRE))}"
        )
    return PRE[pre]


def _byte_level(metadata: dict[str, Any], tokens: list[str], kinds: list[int], path: Path) -> Any:
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    splits, merges = _splits(metadata, path), _merges(metadata, set(tokens), path)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(BPE(vocabulary, merges, ignore_merges=splits.ignore_merges))
    if splits.normalizer:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(splits)
    backend.decoder = decoders.ByteLevel()
    return backend


def _scored(metadata: dict[str, Any], tokens: list[str], kinds: list[int], path: Path) -> Any:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise ModelError(f"{path} is damaged: its vocabulary has more or fewer scores than tokens")
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    unknown = [token for token, kind in zip(tokens, kinds) if kind == UNKNOWN]
    merged = {token: score for token, score, kind in zip(tokens, scores, kinds) if kind == NORMAL}
    return build_backend(tokens, merged, unknown[0] if unknown else None, SPACE, prefix=bool(prefix))


def _tokens(metadata: dict[str, Any], path: Path) -> tuple[list[str], list[int]]:
    tokens: list[str] = metadata.get("tokenizer.ggml.tokens", [])
    if not tokens or not _strings(tokens):
        raise ModelError(f"{path} is damaged: it has no vocabulary", "Fetch it again")
    if len(set(tokens)) != len(tokens) or "" in tokens:
        raise ModelError(
            f"{path} is damaged: its vocabulary holds a token twice, or an empty one", "Fetch it again"
        )
    kinds = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise ModelError(f"{path} is damaged: its vocabulary has more or fewer token types than tokens")
    return tokens, kinds


def _merges(metadata: dict[str, Any], known: set[str], path: Path) -> list[tuple[str, str]]:
    merges: list[str] = metadata.get("tokenizer.ggml.merges", [])
    if not _strings(merges):
        raise ModelError(f"{path} is damaged: it has no merges", "Fetch it again")
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if left not in known or right not in known or left + right not in known:
            raise ModelError(
                f"{path} is damaged: the merge '{merge!r}' is not in the vocabulary", "Fetch it again"
            )
        pairs.append((left, right))
    return pairs


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _text(metadata: dict[str, Any], key: str, path: Path) -> str | None:
    value = metadata.get(key)
    if value is not None and not isinstance(value, str):
        raise ModelError(f"{path} is damaged: {key} is no text", "Fetch it again")
    return value


def _pre_tokenizer(splits: Splits) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if splits.kind == "pattern":
        cut = pre_tokenizers.Split(Regex(splits.pattern), behavior="isolated")
        return pre_tokenizers.Sequence(
            [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if splits.kind == "digits":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    return level


def _post_processor(
    metadata: dict[str, Any], level: Any, adds_bos: bool, special: dict[str, str], backend: Any, path: Path
) -> Any:
    from tokenizers import processors

    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", adds_bos))
    add_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    before = [special.get("bos_token")] if add_bos else []
    after = [special.get("eos_token")] if add_eos else []
    if None in before + after:
        raise ModelError(
            f"{path} asks for a begin or end token at every text and names none", "Fetch it again"
        )
    if not before + after:
        return level
    template = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{t}:1" for t in before), "$B:1", *(f"{t}:1" for t in after)],
        special_tokens=[(token, backend.token_to_id(token)) for token in {*before, *after}],
    )
    return template if level is None else processors.Sequence([level, template])
