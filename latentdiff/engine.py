"""What computes the networks of a pipeline: Keras, or OpenVINO on the processor; imports neither before it is used.

OpenVINO's text encoder, UNet and decoder stand where Keras' compiled ones stand, the UNet not within the sampler's step
but before it, handing it the prediction. All else is the pipeline's own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from latentdiff.extras import require

if TYPE_CHECKING:
    import keras

    from latentdiff.backend import Compiled

ENGINES = ("keras", "openvino")
NETWORKS = ("text_encoder", "unet", "autoencoder")  # in the order of their use
PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}  # of what a policy computes in
KEPT = 2  # sets of shapes for which a network stays compiled: guided and unguided


def check_engine(engine: str, backend: str | None = None) -> None:
    """Tells what an engine needs that is not there.

    Args:
        engine: one of `ENGINES`.
        backend: Keras' backend; None where it is not known yet.

    Raises:
        ValueError: another engine, or OpenVINO where Keras' backend is not TensorFlow, from which it takes networks.
        ImportError: OpenVINO is not installed.
    """
    if engine not in ENGINES:
        raise ValueError(f"`engine` must be one of {', '.join(ENGINES)}. Received: engine={engine!r}.")
    if engine == "keras":
        return
    require('engine="openvino"', ["openvino"], "openvino")
    if backend not in (None, "tensorflow"):
        raise ValueError(f'engine="openvino" needs KERAS_BACKEND=tensorflow. Received: {backend}.')


def check_cache_interval(engine: str, cache_interval: int) -> None:
    """Raises ValueError where deep features are to be shared by an engine that has the UNet whole alone."""
    if engine != "keras" and cache_interval > 1:
        raise ValueError(f'`cache_interval` must be 1 with engine="{engine}". Received: {cache_interval}.')


def check_tiled(engine: str, tiled: bool | None) -> None:
    """Raises ValueError where an engine that has the decoder whole alone is to decode in strips."""
    if engine != "keras" and tiled:
        raise ValueError(f'`tiled` must not be true with engine="{engine}". Received: {tiled}.')


def freeable(engine: str) -> tuple[str, ...]:
    """The networks whose weights may be held only while they are used: none of an engine that makes its own copies."""
    return NETWORKS if engine == "keras" else ()


def check_free(engine: str, free: Collection[str]) -> None:
    """Checks which networks' weights are to be held only while they are used.

    Raises:
        ValueError: one is none of `NETWORKS`, or the engine is one that makes its own copies of them.
    """
    if isinstance(free, str) or not set(free) <= set(NETWORKS):
        raise ValueError(f"`free` must hold names of {', '.join(NETWORKS)}. Received: free={free!r}.")
    if free and not freeable(engine):
        raise ValueError(f'`free` must be empty with engine="{engine}". Received: {", ".join(free)}.')


def to_openvino(network: keras.Model, variables: Sequence[keras.Variable]) -> Any:
    """A network as an `openvino.Model` with its inputs' names and order, one output, and a copy of its weights.

    They are inputs while it is converted, and put in their places after that: OpenVINO would look for each among all of
    them, lay them out anew, and hold them twice.

    Args:
        network: a functional model with a list of inputs, in float32; sizes that are None stay open.
        variables: that hold its weights, in the order of its own variables, in any dtype.
    """
    import keras
    import openvino  # pyright: ignore[reportMissingImports]

    from latentdiff.backend import to_numpy

    def computed(given, weights):
        with keras.StatelessScope(state_mapping=list(zip(network.variables, weights, strict=True))):
            return network(given)

    (given,) = signature_of(network)
    weights = [
        keras.InputSpec(dtype=variable.dtype, shape=variable.shape, name=f"weight_{k}")
        for k, variable in enumerate(network.variables)
    ]
    function = keras.export.ExportArchive().add_endpoint("serve", computed, [given, weights]).get_concrete_function()
    model = openvino.convert_model(function)
    parameters = {each.get_friendly_name().partition(":")[0]: each for each in model.get_parameters()}
    for k, variable in enumerate(variables):
        parameter = parameters[f"weight_{k}"]
        constant = _constant(to_numpy(variable))
        for place in parameter.output(0).get_target_inputs():
            place.replace_source_output(constant.output(0))
        model.remove_parameter(parameter)
    model.validate_nodes_and_infer_types()
    for result in model.get_results()[1:]:  # of each end that TensorFlow's graph leaves loose
        model.remove_result(result)
    for given in network.inputs:
        parameters[given.name].set_friendly_name(given.name)
        parameters[given.name].output(0).get_tensor().set_names({given.name})
    return model


def _constant(array: np.ndarray) -> Any:
    """An operation of OpenVINO's that gives a copy of an array in float32."""
    import openvino  # pyright: ignore[reportMissingImports]

    if array.dtype.name == "bfloat16":  # which OpenVINO has, and does not know of NumPy
        tensor = openvino.Tensor(array.view(np.uint16), array.shape, openvino.Type.bf16)
    else:
        tensor = openvino.Tensor(array)
    constant = openvino.op.Constant(tensor, shared_memory=False)
    return constant if array.dtype == np.float32 else openvino.opset13.convert(constant, "f32")


def signature_of(network: keras.Model) -> list:
    """The inputs of a functional model, which has a list of them, as Keras' export is told them."""
    import keras

    specs = [keras.InputSpec(dtype=i.dtype, shape=i.shape, name=i.name) for i in network.inputs]
    return [specs] if len(specs) > 1 else specs


class OpenvinoNetwork:
    """A network that OpenVINO computes: converted at its first call, compiled for each set of shapes.

    The weights are those of that first call. They are held as a copy, which other sizes are compiled from, and again as
    each of the two latest sets of shapes wants them; Keras' stay, for calls of the parts and for saving.

    Args:
        network: gives what `to_openvino` takes, of one output; called once.
        dtype: that it computes in, as far as the processor can: "float32", "bfloat16", "float16", or a mixed policy.

    Attributes:
        traces: how often the network was converted.
        compiled: how often it was compiled.
    """

    def __init__(self, network: Callable[[], tuple[keras.Model, Sequence[keras.Variable]]], dtype: str):
        self.traces, self.compiled = 0, 0
        import keras

        self._network, self._precision = network, PRECISIONS[keras.DTypePolicy(dtype).compute_dtype]
        self._model = None
        self._kept: dict[tuple, Any] = {}

    def __call__(self, *arrays: Any) -> np.ndarray:
        """The network's output for its inputs, in their order."""
        inputs = [np.asarray(array) for array in arrays]
        shapes = tuple(array.shape for array in inputs)
        compiled = self._kept.pop(shapes, None) or self._compile(shapes)
        self._kept[shapes] = compiled  # the latest last
        (output,) = compiled(inputs).values()
        return output

    def _compile(self, shapes: tuple[tuple[int, ...], ...]) -> Any:
        import openvino  # pyright: ignore[reportMissingImports]

        if self._model is None:
            self._model = to_openvino(*self._network())
            self.traces += 1
        if len(self._kept) == KEPT:
            del self._kept[next(iter(self._kept))]
        self._model.reshape({given: list(shape) for given, shape in zip(self._model.inputs, shapes, strict=True)})
        self.compiled += 1
        return openvino.Core().compile_model(self._model, "CPU", {"INFERENCE_PRECISION_HINT": self._precision})


class StepAfter:
    """A sampler's step that asks a network first and goes on from its prediction.

    Args:
        network: (latent, the timestep's embedding, context) -> prediction, for B or 2 B examples.
        embed: timestep (1,) -> embedding (1, E), outside as well: in float32, since bfloat16 turns 951 into 952.
        step: the compiled step, which takes the prediction in place of the context.
    """

    def __init__(self, network: OpenvinoNetwork, embed: Callable[[Any], Any], step: Compiled):
        self._network, self._embed, self._step = network, embed, step

    @property
    def traces(self) -> int:
        """How often the step was traced."""
        return self._step.traces

    def __call__(self, state: Any, context: Any, timestep: Any, *others: Any) -> Any:
        """The next state; takes what `TextToImage.step_function` says."""
        latent = np.asarray(state[0])  # (B, h, w, c)
        asked = np.concatenate([latent] * (len(context) // len(latent)))  # (B or 2 B, h, w, c)
        embedding = np.repeat(self._embed(np.array([timestep], "float32")), len(asked), axis=0)
        prediction = self._network(asked, embedding, context)
        return self._step(state, prediction, timestep, *others)
