"""The user's model, data and metric, as ``params.yaml`` names them, ready for every stage."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from qatlib.errors import CheckpointError, ConfigError, GraphError, QConfigError
from qatlib.fake import distributed
from qatlib.fake.choose import attributes_of
from qatlib.fake.fake_quant import FakeQuantize
from qatlib.fake.learned import LearnedScale, is_optional
from qatlib.fake.model import FakeQuantModel
from qatlib.fake.prepare import fuse_fx, prepare_graph
from qatlib.fake.ptq.equalize import Pair, equalize
from qatlib.graph.ir import INPUT, Graph, Node
from qatlib.graph.relu6 import BOUND, bounded_by, relus
from qatlib.graph.unshare import shared_modules, unshare
from qatlib.pipeline.checkpoint import load_into, load_weights, read_metadata, save_tensors
from qatlib.pipeline.config import Config
from qatlib.pipeline.data import Loader, Split, loader, open_split
from qatlib.pipeline.entry import call_entry, load_entry
from qatlib.pipeline.formats import Formats, owners_of, within
from qatlib.pipeline.match import Pattern, resolve
from qatlib.pipeline.metrics import Evaluation, Metric, evaluate, make_metric
from qatlib.pipeline.runtime import setup
from qatlib.qtype import scale_of


class Project:
    """Opens what a stage needs, on first use. Constructing it sets threads, seeds and device."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.device = setup(config.runtime)
        self._splits: dict[str, Dataset[Any]] = {}

    # -- data and metric -----------------------------------------------------------------------------------------

    def split(self, name: Split, items: int | None = None) -> Dataset[Any]:
        """A split of the user's data; ``items`` keeps that many from its start."""
        if name not in self._splits:
            self._splits[name] = open_split(self.config, name)
        dataset = self._splits[name]
        count = len(dataset)  # type: ignore[arg-type]
        return dataset if items is None or items >= count else Subset(dataset, range(items))

    def batches(self, split: Split, items: int | None = None, batch_size: int | None = None) -> Loader:
        """Batches of a split in file order."""
        return loader(self.split(split, items), batch_size or self.config.data.batch_size, split=split)

    @cached_property
    def training_data(self) -> Dataset[Any]:
        """The train split as QAT sees it: ``qat.data_kwargs`` over ``data.kwargs``."""
        return open_split(self.config, "train", self.config.qat.data_kwargs)

    def calibration_batches(self) -> Loader:
        """Batches for the observers: of several processes each has some of them."""
        section, stride = self.config.calibrate, distributed.size()
        shown = self.split("calib", section.batches * section.batch_size)
        return loader(shown, section.batch_size, start_batch=distributed.rank(), stride=stride, split="calib")

    def training_batches(self, epoch: int, start_batch: int = 0) -> Loader:
        """Batches of one epoch, from ``start_batch`` on; the order follows ``runtime.seed`` and the epoch.

        Of several processes each has some rows of every batch.
        """
        seed, size = self.config.runtime.seed, self.config.qat.batch_size
        part = (distributed.rank(), distributed.size())
        return loader(self.training_data, size, seed, epoch, start_batch=start_batch, split="train", part=part)

    def metric(self) -> Metric:
        return make_metric(self.config.metric.factory, self.config.metric.kwargs)

    def evaluate(self, forward: Callable[..., Any], split: Split, items: int | None = None) -> Evaluation:
        """The user's metric of ``forward`` over a split, on the device of the configuration."""
        return evaluate(forward, self.batches(split, items), self.metric(), self.device)

    @cached_property
    def example_inputs(self) -> tuple[Tensor, ...]:
        """One real sample of the calibration split, batch first."""
        inputs, _ = next(iter(self.batches("calib", 1)))
        return tuple(x.to(self.device) for x in inputs)

    # -- float model ---------------------------------------------------------------------------------------------

    @cached_property
    def float_model(self) -> nn.Module:
        """The user's model with its trained weights, in eval mode; a module for every call of those in
        ``model.unshare``, after the weights were loaded by their own names.
        """
        model = self._from_factory()
        load_into(model, self.config.model.checkpoint)
        return self._unshared(model)

    def untrained_model(self) -> nn.Module:
        """:attr:`float_model` with the weights that the factory gives it."""
        return self._unshared(self._from_factory())

    def _unshared(self, model: nn.Module) -> nn.Module:
        """Raises GraphError QAT206 for a match string of ``model.unshare`` that covers no shared module."""
        section = self.config.model
        if not section.unshare:
            return model
        found = shared_modules(model, self.example_inputs)
        patterns = [Pattern(text, f"model.unshare[{k}] {text!r}") for k, text in enumerate(section.unshare)]
        for pattern in patterns:
            if not any(pattern.covers(name) for name in found):
                known = ", ".join(f"{name} ({calls} calls)" for name, calls in found.items()) or "none"
                fix = f"Called several times: {known}. Name one of those, or leave the list empty"
                raise GraphError("QAT206", pattern.key, "covers no module that is called more than once", fix)
        names = [name for name in found if any(pattern.covers(name) for pattern in patterns)]
        return unshare(model, self.example_inputs, names, section.unshare_tied)

    def _from_factory(self) -> nn.Module:
        """The user's model as its factory makes it, in eval mode."""
        model = call_entry(self.config.model.factory, self.config.model.kwargs, key="model")
        if not isinstance(model, nn.Module):
            raise ConfigError(
                "QAT106",
                "model.factory",
                f"returned a {type(model).__name__}, not a torch.nn.Module",
                "Return the model",
            )
        return model.to(self.device).eval()

    @cached_property
    def graph(self) -> Graph:
        """The float model traced and fused."""
        section = self.config.model
        wrap = [load_entry(name, f"model.wrap[{i}]") for i, name in enumerate(section.wrap)]
        return fuse_fx(self.float_model, self.example_inputs, section.leaf, wrap)

    @cached_property
    def equalized(self) -> tuple[Graph, tuple[Pair, ...]]:
        """:attr:`graph` with its channels equalized, and the pairs; values of a fixed scale stay in their unit."""
        chosen = Formats(self.config, self.graph, attributes_of(self.float_model))
        qconfigs = {node.name: chosen(node) for node in self.graph.nodes if node.op != INPUT}
        fixed = {name for name, qconfig in qconfigs.items() if qconfig.activation and qconfig.activation.scale}
        return equalize(self.graph, fixed)

    # -- fake-quant model ----------------------------------------------------------------------------------------

    def fake_quant_model(self, relu6: Sequence[str] = (), equalized: bool = False) -> FakeQuantModel:
        """A freshly prepared model with the formats of ``qconfig`` and the float operators of ``qat.hybrid``.

        Modules that have an attribute ``qconfig`` go by that. The operators in ``relu6`` end in relu6 instead of relu.
        Raises QConfigError (QAT197) if nothing is left to quantize.
        """
        graph = bounded_by(self.equalized[0] if equalized else self.graph, relu6)
        hybrid = self.resolve_ops(self.config.qat.hybrid, "qat.hybrid")
        formats = Formats(self.config, graph, attributes_of(self.float_model))
        floats = {*hybrid, *formats.floats}

        def origin(node: Node) -> tuple[str, str]:
            return ("qat.hybrid", "") if node.name in hybrid else formats.origin(node)

        model = prepare_graph(graph, formats, floats, origin).to(self.device)
        if floats and all(op.hybrid or op.node.op in ("quantize", "dequantize") for _, op in model.ops()):
            by = f"{list(self.config.qat.hybrid)}" if hybrid else "qconfig = None in the model"
            raise QConfigError(
                "QAT197",
                "qat.hybrid" if hybrid else "model",
                f"{by} leaves no operator to quantize: all {len(floats)} stay float",
                "Name fewer modules",
            )
        return model

    def resolve_relu6(self) -> tuple[str, ...]:
        """Names of the operators that ``qat.relu6`` covers; raises ConfigError (QAT102) for what names no relu."""
        bounded = set(relus(self.graph).values())
        owners = within(owners_of(self.graph), bounded)
        return tuple(dict.fromkeys(op for n in resolve(self.config.qat.relu6, owners, "qat.relu6") for op in owners[n]))

    def resolve_ops(self, patterns: tuple[str, ...], key: str) -> tuple[str, ...]:
        """Names of the operators that match strings cover; a fused module stands for the operator it is part of."""
        owners = owners_of(self.graph)
        return tuple(dict.fromkeys(op for name in resolve(patterns, owners, key) for op in owners[name]))

    def save_fake_quant(self, model: FakeQuantModel, path: str | Path, after_training: Sequence[str] = ()) -> None:
        """Write a checkpoint that :meth:`load_fake_quant` reads.

        ``after_training`` are the keys of section ``calibrate`` whose help moved the weights.
        """
        relu6 = sorted(set(relus(self.graph).values()) - set(relus(model.graph).values()))
        metadata = {
            "kind": "fake-quant",
            "state": model.state.value,
            "formats": _formats(model),
            "relu6": json.dumps(relu6),
        }
        if learned := {name: part.spec.kind for name, part in _learning(model) if part.started}:
            metadata["learned"] = json.dumps(learned, sort_keys=True)
        if after_training:
            metadata["after_training"] = json.dumps(list(after_training))
        save_tensors(path, model.state_dict(), metadata)

    def load_fake_quant(self, path: str | Path, relu6: Sequence[str] = ()) -> FakeQuantModel:
        """The model of a checkpoint, its state included, with relu6 where the saved model had it.

        From now on the operators in ``relu6`` end in relu6 too; their scales are limited to what that needs. Raises
        CheckpointError QAT127 if the file is no fake-quant checkpoint or was made with other formats or operators, or
        if its scales were learned in another way.
        """
        metadata = read_metadata(path)
        if metadata.get("kind") != "fake-quant":
            raise CheckpointError(
                "QAT127", str(path), "is not a fake-quant checkpoint", "Run the calibrate or qat stage"
            )
        model = self.fake_quant_model((*json.loads(metadata.get("relu6", "[]")), *relu6))
        weights = load_weights(path)
        odd = _alone(weights, model.state_dict()) or _shapes(weights, model.state_dict())
        odd = odd or _unlike("format of {}", json.loads(metadata.get("formats", "{}")), json.loads(_formats(model)))
        learned = json.loads(metadata.get("learned", "{}"))
        kinds = {name: part.spec.kind for name, part in _learning(model) if name in learned}
        odd = odd or _unlike("learned scale of {}", learned, kinds)
        if odd:
            more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
            raise CheckpointError(
                "QAT127",
                str(path),
                f"was made with other operators or formats: {'; '.join(odd[:3])}{more}",
                "Run the stages again with dvc repro",
            )
        model.load_state_dict(weights)
        for name in relu6:
            _limit(model.op(name).activation_post_process, BOUND)
        return model.eval()


def _learning(model: FakeQuantModel) -> list[tuple[str, LearnedScale]]:
    """Every fake-quant module that learns its scale, by name."""
    modules = ((name, part) for name, part in model.named_modules() if isinstance(part, LearnedScale))
    return [(name, part) for name, part in modules if part.rule is not None]


def _limit(fake: FakeQuantize | None, largest: float) -> None:
    """Narrow a calibrated range to values up to ``largest``; a scale fixed by the user stays."""
    if fake is not None and fake.spec.scale is None:
        with torch.no_grad():
            fake.scale.clamp_(max=scale_of(largest, fake.spec.dtype, fake.where))
            fake.high.clamp_(max=largest)


def _formats(model: FakeQuantModel) -> str:
    """Output dtype of every operator that quantizes its output, as JSON."""
    fakes = ((name, op.activation_post_process) for name, op in model.ops())
    return json.dumps({name: fake.spec.dtype for name, fake in fakes if fake is not None}, sort_keys=True)


def _alone(file: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> list[str]:
    places = {name: "the file" if name in file else "the model" for name in sorted(file.keys() ^ model.keys())}
    return [f"{name} is in {place} alone" for name, place in places.items() if not is_optional(name)]


def _shapes(file: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> list[str]:
    shapes = [{name: list(weights[name].shape) for name in file.keys() & model.keys()} for weights in (file, model)]
    return _unlike("shape of {}", *shapes)


def _unlike(what: str, file: Mapping[str, Any], model: Mapping[str, Any]) -> list[str]:
    """What differs, with both values; ``what`` has a place for the name."""
    return [
        f"{what.format(name)} is {file.get(name)} in the file and {model.get(name)} in the model"
        for name in sorted(file.keys() | model.keys())
        if file.get(name) != model.get(name)
    ]
