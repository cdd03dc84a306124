"""One network as an ONNX file: written, searched for operators that fail elsewhere, and compared with PyTorch."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from nnunetv2_semi.errors import UserError, one_line

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

INPUT, OUTPUT = "image", "logits"
OPSET = 17


def require_onnx() -> None:
    """Raise UserError where the packages of the extra are missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise UserError(f'--onnx needs onnx and onnxruntime ({error}): pip install "nnunetv2-semi[onnx]"') from None


def write_graph(network: nn.Module, image_shape: Sequence[int], file: str) -> None:
    """Write ``network`` as an ONNX file of fixed patch size, any batch size.

    It is made by PyTorch's TorchScript exporter, which works from PyTorch 2.1 on and writes InstanceNorm as
    InstanceNormalization. The other one (``dynamo=True``) fails in 2.1, and in 2.14 takes -0 for 0 in torch.signbit.

    Args:
        network: (B, C, *patch) -> logits (B, K, *patch), in evaluation mode, on the CPU.
        image_shape: (C, *patch).
        file: to write.

    Raises:
        UserError: the network has an operator that cannot be exported, or the graph one that should not be there.
    """
    # Two patches: an axis of one would be taken for one that broadcasts.
    example = torch.zeros(2, *image_shape)
    normalisations = _instance_norms_called(network, example[:1])
    has_choice = "dynamo" in inspect.signature(torch.onnx.export).parameters
    torchscript: dict[str, Any] = {"dynamo": False} if has_choice else {}
    with _signbit_known(), warnings.catch_warnings(), redirect_stdout(StringIO()):
        # Of Python values in a trace, and of the exporter's age.
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(network, (example,), file, input_names=[INPUT], output_names=[OUTPUT],
                              opset_version=OPSET, dynamic_axes={INPUT: {0: "batch"}, OUTPUT: {0: "batch"}},
                              **torchscript)
        except Exception as error:  # whatever PyTorch raises, of which there is no list
            raise UserError(f"PyTorch {torch.__version__} cannot export {type(network).__name__} as ONNX: "
                            f"{one_line(error)}") from error
    check_operators(file, normalisations)


def check_operators(file: str, instance_norms: int) -> None:
    """Raise UserError where the file is no valid ONNX, or does not normalise with InstanceNormalization.

    instance_norms: calls of InstanceNorm layers in one pass through the network.
    """
    import onnx

    model = onnx.load(file)
    onnx.checker.check_model(model)
    kinds = [node.op_type for node in model.graph.node]
    training = [node.name for node in model.graph.node if node.op_type == "BatchNormalization"
                and any(attribute.name == "training_mode" and attribute.i for attribute in node.attribute)]
    if training or kinds.count("InstanceNormalization") < instance_norms:
        raise UserError(
            f"PyTorch {torch.__version__} wrote {kinds.count('InstanceNormalization')} InstanceNormalization nodes for "
            f"{instance_norms} such layers, and {len(training)} BatchNormalization nodes in training mode, which CUDA "
            "providers cannot run. Nothing is exported: try another version of PyTorch.")


def largest_difference(network: nn.Module, file: str, batches: Sequence[np.ndarray]) -> tuple[float, float]:
    """Largest difference between the logits of ONNX Runtime and of PyTorch, and the largest logit.

    batches: float32 (B, C, *patch) each; B may differ.
    """
    session = session_of(file)
    differences, logits = [], []
    for batch in batches:
        with torch.inference_mode():
            expected = network(torch.from_numpy(batch)).numpy()
        found = session.run([OUTPUT], {INPUT: batch})[0]
        if found.shape != expected.shape:
            raise UserError(f"ONNX Runtime gives logits {found.shape}, PyTorch {expected.shape}.")
        differences.append(float(np.abs(found - expected).max()))
        logits.append(float(np.abs(expected).max()))
    return max(differences), max(logits)


def session_of(file: str) -> InferenceSession:
    """The file in ONNX Runtime, on the CPU, with as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _instance_norms_called(network: nn.Module, image: torch.Tensor) -> int:
    called: list[nn.Module] = []
    hooks = [module.register_forward_hook(lambda module, *_: called.append(module))
             for module in network.modules() if isinstance(module, _InstanceNorm)]
    try:
        with torch.inference_mode():
            network(image)
    finally:
        for hook in hooks:
            hook.remove()
    return len(called)


@contextmanager
def _signbit_known() -> Iterator[None]:
    """Within the block torch.signbit, which ONNX lacks, can be exported: x < 0 or 1 / x < 0, which holds of -0."""
    def signbit(g: Any, image: Any) -> Any:
        zero, one = (g.op("Constant", value_t=torch.tensor(value)) for value in (0.0, 1.0))
        return g.op("Or", g.op("Less", image, zero), g.op("Less", g.op("Div", one, image), zero))
    torch.onnx.register_custom_op_symbolic("aten::signbit", signbit, OPSET)
    try:
        yield
    finally:
        torch.onnx.unregister_custom_op_symbolic("aten::signbit", OPSET)
