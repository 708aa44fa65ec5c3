"""PyTorch: programs of torch.export (.pt2), TorchScript, weights of recipes (safetensors) and AOTInductor.

The model is called with the inputs in the signature's order. It gives one tensor, a list or tuple in the
order of the signature's outputs, or a dictionary by their names.
"""

from __future__ import annotations

import logging
import platform
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from penstock_kit.artifacts.torchscript import unsafe_torchscript
from penstock_kit.errors import FailedPrecondition, Reason
from penstock_kit.oip import BFLOAT16, Array
from penstock_worker.adapters.node_probe import processor_name
from penstock_worker.adapters.runtimes.cpu_int8 import compute_in_int8, register_operators_for
from penstock_worker.adapters.runtimes.cpu_packing import PackMode, mode_of, pack_linear_layers
from penstock_worker.adapters.runtimes.pt2_safety import refuse_unsafe_pt2
from penstock_worker.domain.runtime import Batch, Bundle, Servable

if TYPE_CHECKING:
    from penstock_worker.adapters.runtimes.cuda_path import CudaPath

log = logging.getLogger(__name__)

COMPILED_FOR = "compiled_for"
"""Parameter of the manifest: which machine the package of AOTInductor is for."""
# Forms of inputs that are remembered at most; more are looked at in each call.
_MOST_FORMS = 4096
_ZIP_MAGIC = b"PK\x03\x04"


class TorchRuntime:
    """Loads .pt2, TorchScript and .safetensors files, and packages of AOTInductor (format aoti)."""

    formats = frozenset({"pt2", "torchscript", "safetensors", "aoti"})
    runs_bundle_code = False

    def load(self, bundle: Bundle, devices: Sequence[str]) -> Servable:
        """Open a bundle on the first of the devices, or on the CPU.

        Raises:
            FailedPrecondition: UNSAFE_FORMAT if loading would run code; LOAD_FAILED if the signature has a
                datatype that torch lacks, or the file is no such program.
        """
        for spec in (*bundle.signature.inputs, *bundle.signature.outputs):
            if spec.datatype == "BYTES":
                raise FailedPrecondition(
                    f"The signature's tensor {spec.name} is of datatype BYTES, which torch does not have.",
                    reason=Reason.LOAD_FAILED,
                )
        torch.set_num_threads(bundle.threads)
        device = torch.device(f"cuda:{devices[0].removeprefix('gpu')}" if devices else "cpu")
        if bundle.format == "pt2":
            refuse_unsafe_pt2(bundle.entrypoint)
            module: Callable[..., Any] = _load_pt2(bundle, device)
        elif bundle.format == "safetensors":
            module = _load_recipe(bundle, device)
        elif bundle.format == "aoti":
            module = _load_compiled(bundle, device)
        else:
            _refuse_unsafe_torchscript(bundle.entrypoint)
            with warnings.catch_warnings():
                # TorchScript is deprecated, which those who push it know.
                warnings.simplefilter("ignore", DeprecationWarning)
                script = torch.jit.load(str(bundle.entrypoint), map_location=device)
            module = script.eval()
        servable = TorchServable(module, bundle, device)
        if device.type == "cuda" and bundle.parameters.get("cuda_streams") != "off":
            servable.use_streams(bundle)
        return servable


def _refuse_unsafe_torchscript(path: Path) -> None:
    """Check a TorchScript file before it is opened: opening may run functions of it."""
    try:
        with path.open("rb") as file:
            # What does not begin as a zip file, torch may take for another of its formats.
            zipped = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
        with zipfile.ZipFile(path) as archive:
            found = unsafe_torchscript(archive) if zipped else "bytes before its archive"
    except (zipfile.BadZipFile, ValueError) as error:
        raise FailedPrecondition(
            f"{path.name} is no TorchScript file: {error}.", reason=Reason.LOAD_FAILED
        ) from error
    if found:
        raise FailedPrecondition(
            f"{path.name} does more than compute: it has {found}.", reason=Reason.UNSAFE_FORMAT
        )


def _words_of_torchscript(error: RuntimeError) -> str:
    """What went wrong, which TorchScript says after pages of its own traceback; empty for other errors."""
    words = str(error).strip()
    if not words.startswith("The following operation failed in the TorchScript interpreter"):
        return ""
    return words.splitlines()[-1].removeprefix("RuntimeError: ")


def _load_pt2(bundle: Bundle, device: torch.device) -> Callable[..., Any]:
    packing = mode_of(bundle.parameters)
    register_operators_for(bundle.entrypoint)
    program = torch.export.load(str(bundle.entrypoint))
    if device.type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    module: Callable[..., Any] = program.module()
    if device.type == "cpu" and isinstance(module, torch.fx.GraphModule):
        compute_in_int8(module, bundle.max_rows)
        if packing is PackMode.AUTO:
            pack_linear_layers(module, bundle.max_rows)
    return module


def compiled_for(device: torch.device) -> str:
    """Return which machine code that is compiled here is for."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{processor_name() or 'unknown'} ({platform.machine()})"


def _load_recipe(bundle: Bundle, device: torch.device) -> Callable[..., Any]:
    # Imported here: replicas of other formats need nothing of training.
    from penstock_worker.adapters.training.architectures import Blueprint
    from penstock_worker.adapters.training.export import Served
    from penstock_worker.adapters.training.rebuild import rebuild

    directory = bundle.entrypoint.parent
    served: Callable[..., Any] = Served(rebuild(directory), Blueprint.load(directory)).eval().to(device)
    return served


def _load_compiled(bundle: Bundle, device: torch.device) -> Callable[..., Any]:
    """Load a package of AOTInductor; that compiled code is allowed was asked before.

    Its instructions are those of one kind of processor: another would end the process in mid-call.
    """
    made_for, here = bundle.parameters.get(COMPILED_FOR, ""), compiled_for(device)
    if made_for != here:
        raise FailedPrecondition(
            f"{bundle.entrypoint.name} was compiled for {made_for or 'an unnamed machine'}, and this is "
            f"{here}. Convert its source again on such a machine, or keep it off this node by labels.",
            reason=Reason.LOAD_FAILED,
        )
    model: Callable[..., Any] = torch._inductor.aoti_load_package(
        str(bundle.entrypoint), device_index=device.index if device.index is not None else -1
    )
    return model


class TorchServable:
    """A loaded program.

    Args:
        module: Takes and gives tensors.
        bundle: Where it comes from.
        device: Where it computes.
    """

    def __init__(self, module: Callable[..., Any], bundle: Bundle, device: torch.device) -> None:
        self._module: Callable[..., Any] | None = module
        self._inputs = tuple(spec.name for spec in bundle.signature.inputs)
        self._outputs = tuple(spec.name for spec in bundle.signature.outputs)
        self._device = device
        self._path: CudaPath | None = None
        # Of an exported program, shapes and dtypes of inputs that it has taken: torch looks at them in every
        # call, for up to 0.3 ms, and what it finds depends on nothing else.
        self._exported = isinstance(module, torch.fx.GraphModule)
        self._taken: set[tuple[Any, ...]] = set()
        buffers = module.buffers() if isinstance(module, torch.nn.Module) else ()
        self._state = frozenset(buffer.untyped_storage().data_ptr() for buffer in buffers)
        # Inputs may be views of the request's bytes. Models that write to their input are rare, and write to
        # memory that nobody reads again.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

    def use_streams(self, bundle: Bundle) -> None:
        """Copy through page-locked memory from now on, and compute by graphs what the bundle lets them.

        Raises:
            FailedPrecondition: LOAD_FAILED if a parameter is none that there is.
            DeviceLost: The GPU has not survived the attempt.
        """
        # Imported here: nobody without a GPU needs it.
        from penstock_worker.adapters.runtimes.cuda_path import CudaPath, GraphMode, mode_of
        from penstock_worker.adapters.runtimes.cuda_streams import CudaStreams

        mode = mode_of(bundle)
        self._path = CudaPath(self._compute, bundle.signature, CudaStreams(self._device), self._array)
        if bundle.parameters.get("warmup") != "off":
            self._path.capture(mode, bundle.max_rows)
        elif mode is not GraphMode.OFF:
            log.info("no CUDA graphs without a warm-up")

    def predict(self, batch: Batch) -> Batch:
        """Compute one batch without gradients.

        Raises:
            Exception: Whatever the model raises.
            DeviceLost: The GPU cannot be used any more.
        """
        if self._path is not None:
            return self._path.predict(batch)
        with torch.inference_mode():
            tensors = [self._tensor(batch[name]) for name in self._inputs if name in batch]
            return {name: self._array(tensor) for name, tensor in self._compute(tensors).items()}

    def close(self) -> None:
        """Let go of the model's memory."""
        self._module = None
        if self._path is not None:
            self._path.close()
            self._path = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _compute(self, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        if self._module is None:
            raise RuntimeError("The model is closed.")
        try:
            given = self._call(self._module, tensors)
        except RuntimeError as error:
            if words := _words_of_torchscript(error):
                raise RuntimeError(words) from error
            raise
        return self._name(given)

    def _call(self, module: Callable[..., Any], tensors: Sequence[torch.Tensor]) -> Any:
        if not self._exported:
            return module(*tensors)
        form = tuple([(tensor.shape, tensor.dtype) for tensor in tensors])
        if form in self._taken:
            # Without the hooks around it, which are torch's look at the inputs.
            return module.forward(*tensors)  # type: ignore[attr-defined]
        given = module(*tensors)
        if len(self._taken) < _MOST_FORMS:
            self._taken.add(form)
        return given

    def _tensor(self, array: Array) -> torch.Tensor:
        if array.dtype == BFLOAT16:
            tensor = torch.from_numpy(np.asarray(array).view(np.int16)).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(np.ascontiguousarray(array) if array.ndim else array)
        return tensor if self._device.type == "cpu" else tensor.to(self._device)

    def _name(self, given: Any) -> dict[str, torch.Tensor]:
        if isinstance(given, torch.Tensor):
            given = (given,)
        if isinstance(given, dict):
            return {str(name): tensor for name, tensor in given.items()}
        if not isinstance(given, (list, tuple)):
            raise TypeError(f"The model gave a {type(given).__name__} instead of tensors.")
        if len(given) != len(self._outputs):
            raise ValueError(
                f"The model gave {len(given)} tensors, the signature has {len(self._outputs)} outputs."
            )
        return dict(zip(self._outputs, given, strict=True))

    def _array(self, tensor: torch.Tensor) -> Array:
        tensor = tensor.detach().cpu()
        if self._state and tensor.untyped_storage().data_ptr() in self._state:
            # A buffer of the model: the next call may write to it while this answer is still read.
            tensor = tensor.clone()
        if tensor.dtype == torch.bfloat16:
            bits: Array = tensor.contiguous().view(torch.int16).numpy()
            return bits.view(BFLOAT16)
        array: Array = tensor.numpy()
        return array
