"""Read a tokeniser from a checkpoint, or train a WordPiece once on the corpus, save it with its hash, and reuse it."""

import hashlib
import json
import os
import re
import shutil
import string
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from indexing.declare import refuse
from training.training_settings import TokenizerConfig

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # their ids are 0 to 4
RECORD = "tandem_tokenizer.json"  # beside tokenizer.json: its source and its fingerprint


def build_tokenizer(
    name: str,
    config: TokenizerConfig,
    *,
    texts: Iterable[str],
    save_dir: str | Path,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerFast:
    """Return the tokeniser of `save_dir` if there is one; otherwise save there that of `name`, or (empty name) one that
    is trained on `texts`.

    WordPiece training is not deterministic: the saved folder is what checkpoint and index are bound to. Raises
    ValueError if the folder was made with other settings, was altered, or `name` has no fast tokeniser.
    """
    folder = Path(save_dir)
    source: dict[str, object] = {"name": name} if name else {"name": "", "settings": asdict(config)}
    if (folder / "tokenizer.json").is_file():
        return _checked(load_tokenizer(folder), folder, source)
    tokenizer = load_tokenizer(name, trust_remote_code) if name else train_wordpiece(config, texts)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as partial:
        tokenizer.save_pretrained(partial)
        record = {"source": source, "fingerprint": fingerprint(load_tokenizer(partial))}
        (Path(partial) / RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")
        files = sorted(Path(partial).iterdir(), key=lambda file: file.name == "tokenizer.json")  # the mark comes last
        for file in files:
            os.replace(file, folder / file.name) if file.is_file() else shutil.copytree(file, folder / file.name)
    return load_tokenizer(folder)


def load_tokenizer(name: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """Return the fast tokeniser of a folder or a Hugging Face name. Raises ValueError if there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name), trust_remote_code=trust_remote_code, use_fast=True)
    except (OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise ValueError(f"no tokeniser could be read from {str(name)!r}: {why}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{str(name)!r} has no fast tokeniser (tokenizer.json); convert it with transformers first")
    return tokenizer


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the sha256 (hex) of the serialised tokeniser and its special tokens, without cutting and padding state."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend.pop("truncation", None)
    backend.pop("padding", None)
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    text = json.dumps([backend, special], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def plain_backend(tokenizer: PreTrainedTokenizerFast, max_tokens: int = 0) -> Tokenizer:
    """Return a copy of the Rust tokeniser without padding; it cuts at a positive `max_tokens`, specials included."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    if max_tokens > 0:
        backend.enable_truncation(max_tokens)
    return backend


def start_id(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """Return the token that starts a sequence: beginning-of-sequence, else the class token, else None."""
    return _first_number(tokenizer.bos_token_id, tokenizer.cls_token_id)


def end_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the token that ends an answer: end-of-sequence, else the separator. Raises ValueError without both."""
    found = _first_number(tokenizer.eos_token_id, tokenizer.sep_token_id)
    if found is None:
        raise ValueError("the generator's tokeniser has neither an end-of-sequence nor a separator token")
    return found


def pad_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the padding token, or 0: padding is always masked."""
    return _first_number(tokenizer.pad_token_id) or 0


def train_wordpiece(config: TokenizerConfig, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a WordPiece of at most `config.vocabulary` tokens. It has every ASCII letter and digit, alone and as
    continuation, and every ASCII punctuation mark, so that an unseen number or name is spelt, not unknown. Accents are
    kept: answers are compared as they are written. Raises ValueError if the vocabulary is too small for these."""
    letters = string.ascii_lowercase if config.lowercase else string.ascii_letters
    spelled = [prefix + character for prefix in ("", "##") for character in string.digits + letters]
    spelled += string.punctuation
    required = len(SPECIAL_TOKENS) + len(spelled)
    if config.vocabulary < required:
        allowed = f"must be at least {required} (special tokens, letters, digits, punctuation)"
        raise refuse("tokenizer.vocabulary", config.vocabulary, allowed)
    learner = _pipeline(models.WordPiece(unk_token="[UNK]"), config)  # type: ignore[call-arg]
    trainer = trainers.WordPieceTrainer(
        vocab_size=config.vocabulary,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=list(string.digits + letters + string.punctuation),
        continuing_subword_prefix="##",
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learned = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    first = [*SPECIAL_TOKENS, *spelled]
    kept = [token for token, _ in learned if token not in set(first)][: config.vocabulary - required]
    vocabulary = {token: number for number, token in enumerate([*first, *kept])}
    backend = _pipeline(models.WordPiece(vocabulary, unk_token="[UNK]"), config)  # type: ignore[call-arg]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        bos_token="[CLS]",
        eos_token="[SEP]",
    )


def to_text(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int]) -> str:
    """Return the text of written tokens, without special tokens. WordPiece forgets the spaces around punctuation, so it
    is joined again where it joins words ("3 . 11 . 7" is "3.11.7", "2024 - 10 - 07" is "2024-10-07")."""
    text = str(tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True)).strip()
    if not isinstance(tokenizer.backend_tokenizer.model, models.WordPiece):
        return text
    text = re.sub(r"(?<=\w) ?\. ?(?=\d)|(?<=\b[^\W\d]) ?\. ?(?=[^\W\d]\b)", ".", text)  # 3.11, pc.7, u.s.
    text = re.sub(r"(?<=\d) ?: ?(?=\d)", ":", text)
    text = re.sub(r"(?<=\d) ?, ?(?=\d{3}\b)", ",", text)
    text = re.sub(r"(?<=\w) ?([-+/_@&]) ?(?=\w)", r"\1", text)
    text = re.sub(r"(?<=[^\W\d]) ?' ?(?=[^\W\d])", "'", text)
    text = re.sub(r"(?<=\w) \+ \+", "++", text)
    return re.sub(r"(?<=\d) (?=%)|(?<=[$€£#]) (?=\d)|(?<=\() | (?=\))", "", text)


def _first_number(*candidates: object) -> int | None:
    return next((number for number in candidates if isinstance(number, int)), None)


def _pipeline(model: models.Model, config: TokenizerConfig) -> Tokenizer:
    """Put BERT's normaliser and word splitting around `model`; `digits_whole` makes a run of digits one word."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=config.lowercase, strip_accents=False)
    splitters: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.BertPreTokenizer()]
    if config.digits_whole:
        splitters.append(pre_tokenizers.Digits(individual_digits=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splitters)
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return tokenizer


def _checked(tokenizer: PreTrainedTokenizerFast, folder: Path, source: dict[str, object]) -> PreTrainedTokenizerFast:
    """Return `tokenizer` of `folder`. Raises ValueError if its record has another source or another fingerprint."""
    record_path = folder / RECORD
    if not record_path.is_file():
        return tokenizer
    record = json.loads(record_path.read_text(encoding="utf-8"))
    if record["source"] != source:
        raise ValueError(
            f"the tokeniser in {folder} was made from {record['source']}, the configuration asks for {source}; "
            "use another run directory or the old settings"
        )
    if record["fingerprint"] != fingerprint(tokenizer):
        raise ValueError(
            f"the tokeniser in {folder} was altered since it was saved: its fingerprint does not match {RECORD}"
        )
    return tokenizer
