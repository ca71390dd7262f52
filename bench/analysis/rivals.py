"""Analyses of other tools on the same network and images, each as its own documentation has it called.

A maker prepares a tool, which is not timed, and returns its sides; it raises ImportError where the tool is not there.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import io
import logging
import os
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bench.rivals import OneBatch, onnx_files

ALONE, EACH = "one layer quantized at a time", "every layer against float"


@dataclass(frozen=True)
class Side:
    """An analysis that is timed. ``run`` returns what it says of every layer, in forward order: noise at the network's
    output over signal where ``question`` is ALONE, else what the tool takes (SQNR, or noise over signal).
    """

    name: str
    question: str
    run: Callable[[], Mapping[str, float]]


Maker = Callable[[nn.Module, Tensor], list[Side]]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without tables, progress bars, log lines and warnings of a tool."""
    known, said = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(known)


def quietly(run: Callable[[], Mapping[str, float]]) -> Callable[[], Mapping[str, float]]:
    def inner() -> Mapping[str, float]:
        with quiet(), torch.no_grad():
            return run()

    return inner


def _temporary() -> Path:
    return Path(tempfile.mkdtemp(prefix="qatlib-bench-"))


# -- esp-ppq -----------------------------------------------------------------------------------------------------------


def esp_ppq(net: nn.Module, x: Tensor) -> list[Side]:
    """``layerwise_error_analyse`` and ``graphwise_error_analyse``: int8, symmetric, weights per channel."""
    with quiet():
        from esp_ppq import TargetPlatform
        from esp_ppq.api import quantize_onnx_model
        from esp_ppq.quantization.analyse import graphwise_error_analyse, layerwise_error_analyse

        graph = quantize_onnx_model(
            onnx_import_file=str(onnx_files(net, x, _temporary()) / "float.onnx"),
            calib_dataloader=[x, x],  # it takes no fewer than two batches
            calib_steps=2,
            input_shape=list(x.shape),
            platform=TargetPlatform.TRT_INT8,
            device="cpu",
        )
    alone = functools.partial(layerwise_error_analyse, graph, [x], running_device="cpu", steps=1, verbose=False)
    each = functools.partial(graphwise_error_analyse, graph, "cpu", [x], steps=1, verbose=False)
    return [
        Side("esp-ppq, layerwise error", ALONE, quietly(alone)),
        Side("esp-ppq, graphwise error (4,096 values an image)", EACH, quietly(each)),
    ]


# -- AIMET -------------------------------------------------------------------------------------------------------------


class _Anything(types.ModuleType):
    """A module in which every name is an empty class."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@contextlib.contextmanager
def placeholder(name: str, *parts: str) -> Iterator[None]:
    """Let ``import name`` succeed where it is not installed.

    AIMET imports torchvision when it is imported itself, for tables of classes and for detection heads; nothing of it
    runs here.
    """
    if importlib.util.find_spec(name):
        yield
        return
    modules = {f"{name}.{part}": _Anything(f"{name}.{part}") for part in parts}
    top = _Anything(name)
    for part in parts:
        setattr(top, part, modules[f"{name}.{part}"])
    modules[name] = top
    sys.modules |= modules
    try:
        yield
    finally:
        for each in modules:
            del sys.modules[each]


def aimet(net: nn.Module, x: Tensor) -> list[Side]:
    """``QuantAnalyzer``, per layer by enabling its quantizers; the score is the noise at the output over the signal."""
    with quiet(), placeholder("torchvision", "datasets", "ops", "transforms"):
        from aimet_torch.common.defs import CallbackFunc, QuantScheme
        from aimet_torch.quant_analyzer import QuantAnalyzer
        from aimet_torch.quantsim import QuantizationSimModel

    net = copy.deepcopy(net)  # it folds batch norms in place
    with torch.no_grad():
        reference = net(x)
    power = reference.square().sum()

    def score(model: nn.Module, *_: object) -> float:
        return float((model(x) - reference).square().sum() / power)

    def calibrate(model: nn.Module, *_: object) -> None:
        with torch.no_grad():
            model(x)

    with quiet():
        analyzer = QuantAnalyzer(net, x[:1], CallbackFunc(calibrate, None), CallbackFunc(score, None))
        analyzer._fold_all_batch_norms(net, tuple(x[:1].shape), dummy_input=x[:1])
        sim = QuantizationSimModel(net, x[:1], quant_scheme=QuantScheme.post_training_tf)
        sim.compute_encodings(calibrate, None)
    alone = functools.partial(
        analyzer.perform_per_layer_analysis_by_enabling_quant_wrappers, sim, os.fspath(_temporary())
    )
    return [Side("AIMET, per-layer sensitivity", ALONE, quietly(alone))]


# -- torch.ao ----------------------------------------------------------------------------------------------------------


def torch_ao(net: nn.Module, x: Tensor) -> list[Side]:
    """The numeric suite of FX: loggers in float and int8, and shadows, whose copies are made and calibrated in it."""
    from torch.ao.ns import _numeric_suite_fx as suite
    from torch.ao.ns.fx.n_shadows_utils import create_results_comparison, group_results_by_subgraph
    from torch.ao.ns.fx.qconfig_multi_mapping import QConfigMultiMapping
    from torch.ao.ns.fx.utils import compute_sqnr
    from torch.ao.quantization import get_default_qconfig, get_default_qconfig_mapping
    from torch.ao.quantization.backend_config import get_native_backend_config
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    torch.backends.quantized.engine = "fbgemm"
    with quiet(), torch.no_grad():
        prepared = prepare_fx(copy.deepcopy(net), get_default_qconfig_mapping("fbgemm"), (x,))
        prepared(x)
        pair = copy.deepcopy(prepared), convert_fx(copy.deepcopy(prepared))
        one, two = suite.add_loggers("float", pair[0], "int8", pair[1], suite.OutputLogger)

    def loggers() -> dict[str, float]:
        for part in (*one.modules(), *two.modules()):
            if isinstance(part, suite.OutputLogger):
                part.stats.clear()
        one(x), two(x)
        found = suite.extract_logger_info(one, two, suite.OutputLogger, "int8")
        suite.extend_logger_results_with_comparison(found, "float", "int8", compute_sqnr, "sqnr")
        return {name: float(kinds["node_output"]["int8"][0]["sqnr"][0]) for name, kinds in found.items()}

    def shadows() -> dict[str, float]:
        mapping = QConfigMultiMapping().set_global([get_default_qconfig("fbgemm")])
        model = suite.prepare_n_shadows_model(copy.deepcopy(net), (x,), mapping, get_native_backend_config())
        model(x)
        model = suite.convert_n_shadows_model(model)
        suite.loggers_set_enabled(model, True)
        model(x)
        found = create_results_comparison(group_results_by_subgraph(suite.extract_results_n_shadows_model(model)))
        return {each["fqn"]: float(each["candidates"]["1"]["cmp_mean"]) for each in found.values()}

    return [
        Side("torch.ao, loggers", EACH, quietly(loggers)),
        Side("torch.ao, n-shadows, made, calibrated and run", EACH, quietly(shadows)),
    ]


# -- ONNX Runtime ------------------------------------------------------------------------------------------------------


def onnx_runtime(net: nn.Module, x: Tensor) -> list[Side]:
    """``qdq_loss_debug``: the float graph and its QDQ form run with every tensor as an output, then are compared."""
    import onnxruntime
    from onnxruntime.quantization import qdq_loss_debug as debug

    folder = onnx_files(net, x, _temporary())
    for name in ("ready", "int8"):
        debug.modify_model_output_intermediate_tensors(folder / f"{name}.onnx", folder / f"{name}-all.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL

    def losses() -> dict[str, float]:
        exact, quantized = (
            debug.collect_activations(str(folder / f"{name}-all.onnx"), OneBatch({"x": x.numpy()}), options)
            for name in ("ready", "int8")
        )
        found = debug.compute_activation_error(debug.create_activation_matching(quantized, exact))
        return {name: float(errors["xmodel_err"]) for name, errors in found.items() if "xmodel_err" in errors}

    return [Side("ONNX Runtime, qdq_loss_debug", EACH, quietly(losses))]


MAKERS: dict[str, Maker] = {"esp-ppq": esp_ppq, "AIMET": aimet, "torch.ao": torch_ao, "ONNX Runtime": onnx_runtime}


def available(net: nn.Module, x: Tensor) -> tuple[list[Side], dict[str, str]]:
    """Sides of the tools that can be run, and of the others why not, by name."""
    sides: list[Side] = []
    missing = {}
    for name, make in MAKERS.items():
        try:
            sides += make(net, x)
        except ImportError as error:
            missing[name] = f"not installed: {error}"
        except Exception as error:  # a tool that does not fit this torch must not cost the other rows
            missing[name] = f"does not run: {type(error).__name__}: {error}".splitlines()[0]
    return sides, missing
