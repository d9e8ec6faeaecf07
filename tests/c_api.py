"""A SavedModel loaded and run through TensorFlow's C API, in a process that never imports TensorFlow.

It is TensorFlow Serving's road: the session restores the variables, feeds tensors by the signature's names and fetches
others. Python's loader takes another one, on which mistakes stay unseen. The libraries are those of the wheel.
"""

import ctypes
import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import numpy as np

INVALID_ARGUMENT = 3
STRING, BFLOAT16 = 7, 14
DTYPES = {
    1: "float32",
    2: "float64",
    3: "int32",
    4: "uint8",
    5: "int16",
    6: "int8",
    9: "int64",
    10: "bool",
    17: "uint16",
    19: "float16",
    22: "uint32",
    23: "uint64",
}


class CApiError(Exception):
    """A status that is not OK.

    Args:
        code: TensorFlow's, which is gRPC's: 3 is INVALID_ARGUMENT, 9 FAILED_PRECONDITION.
        message: What TensorFlow said.
    """

    def __init__(self, code, message):
        super().__init__(code, message)
        self.code = code
        self.message = message


class ServedModel:
    """A process that holds a SavedModel; a context manager.

    Args:
        saved_model_dir: The directory of one version, with `saved_model.pb` in it.

    Attributes:
        signatures: Names to {"inputs": {name: (dtype, shape)}, "outputs": likewise, "defaults": {name: array}}; a
            shape has -1 for any length and is None for any rank.
        modules: Names of the Python modules of TensorFlow that the process has imported.

    Raises:
        CApiError: The model cannot be loaded.
    """

    def __init__(self, saved_model_dir):
        self._log = tempfile.TemporaryFile()
        environment = {"TF_CPP_MIN_LOG_LEVEL": "2", **os.environ}
        command = [sys.executable, __file__, str(saved_model_dir)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=environment
        )
        try:
            self.signatures, self.modules = self._answer()
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def run(self, signature, inputs):
        """The outputs of a signature.

        Args:
            signature: Its name.
            inputs: Names to arrays, or to lists; text is bytes or str. Those left out take the signature's defaults.

        Returns:
            Names to arrays; strings are arrays of bytes objects.

        Raises:
            CApiError: TensorFlow refused.
        """
        pickle.dump((signature, inputs), self._process.stdin)
        self._process.stdin.flush()
        return self._answer()

    def resident_bytes(self):
        """The memory that the process holds now, as Linux counts it."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return 1024 * int(status.split("VmRSS:")[1].split()[0])

    def close(self):
        """Ends the process."""
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=60)
        self._log.close()

    def _answer(self):
        try:
            is_fine, answer = pickle.load(self._process.stdout)
        except EOFError:
            self._process.wait(timeout=60)
            self._log.seek(0)
            log = self._log.read().decode(errors="replace")[-4000:]
            raise RuntimeError(f"The process ended with {self._process.returncode}: {log}") from None
        if not is_fine:
            raise CApiError(*answer)
        return answer


def run_signature(saved_model_dir, signature, inputs):
    """One call of a model that is loaded for it; see `ServedModel.run`."""
    with ServedModel(saved_model_dir) as model:
        return model.run(signature, inputs)


# in the other process


class Output(ctypes.Structure):
    """TF_Output: one result of one operation."""

    _fields_ = [("operation", ctypes.c_void_p), ("index", ctypes.c_int)]


class Buffer(ctypes.Structure):
    """TF_Buffer: bytes that TensorFlow owns."""

    _fields_ = [("data", ctypes.c_void_p), ("length", ctypes.c_size_t), ("deallocator", ctypes.c_void_p)]


# TF_TString: 24 bytes, in which a short text lies itself
STRING_SIZE = 24
POINTER = ctypes.c_void_p
FUNCTIONS = {
    "TF_NewStatus": (POINTER,),
    "TF_DeleteStatus": (None, POINTER),
    "TF_GetCode": (ctypes.c_int, POINTER),
    "TF_Message": (ctypes.c_char_p, POINTER),
    "TF_NewGraph": (POINTER,),
    "TF_NewBuffer": (ctypes.POINTER(Buffer),),
    "TF_NewSessionOptions": (POINTER,),
    "TF_LoadSessionFromSavedModel": (
        POINTER,
        POINTER,
        POINTER,
        ctypes.c_char_p,
        ctypes.POINTER(ctypes.c_char_p),
        ctypes.c_int,
        POINTER,
        ctypes.POINTER(Buffer),
        POINTER,
    ),
    "TF_GraphOperationByName": (POINTER, POINTER, ctypes.c_char_p),
    "TF_SessionRun": (
        None,
        POINTER,
        POINTER,
        ctypes.POINTER(Output),
        ctypes.POINTER(POINTER),
        ctypes.c_int,
        ctypes.POINTER(Output),
        ctypes.POINTER(POINTER),
        ctypes.c_int,
        POINTER,
        ctypes.c_int,
        POINTER,
        POINTER,
    ),
    "TF_AllocateTensor": (POINTER, ctypes.c_int, ctypes.POINTER(ctypes.c_int64), ctypes.c_int, ctypes.c_size_t),
    "TF_DeleteTensor": (None, POINTER),
    "TF_TensorType": (ctypes.c_int, POINTER),
    "TF_NumDims": (ctypes.c_int, POINTER),
    "TF_Dim": (ctypes.c_int64, POINTER, ctypes.c_int),
    "TF_TensorByteSize": (ctypes.c_size_t, POINTER),
    "TF_TensorData": (POINTER, POINTER),
    "TF_StringInit": (None, POINTER),
    "TF_StringCopy": (None, POINTER, ctypes.c_char_p, ctypes.c_size_t),
    "TF_StringDealloc": (None, POINTER),
    "TF_StringGetDataPointer": (POINTER, POINTER),
    "TF_StringGetSize": (ctypes.c_size_t, POINTER),
}


def numpy_dtype(code):
    if code == STRING:
        return np.dtype(object)
    if code == BFLOAT16:
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(DTYPES[code])


class Library:
    """The functions of the C API, by their names without "TF_"."""

    def __init__(self, directory):
        libraries = [
            ctypes.CDLL(os.path.join(directory, name), mode=ctypes.RTLD_GLOBAL)
            for name in ("libtensorflow_framework.so.2", "libtensorflow_cc.so.2")
        ]
        for name, (result, *arguments) in FUNCTIONS.items():
            function = next(getattr(library, name) for library in libraries if hasattr(library, name))
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("TF_"), function)

    def checked(self, function, *arguments):
        """A call whose last argument is a status."""
        status = self.NewStatus()
        result = function(*arguments, status)
        code, message = self.GetCode(status), self.Message(status).decode(errors="replace")
        self.DeleteStatus(status)
        if code:
            raise CApiError(code, message)
        return result

    def to_tensor(self, value, dtype):
        if dtype == STRING:
            array = np.array(value, object)
        else:
            array = np.ascontiguousarray(np.asarray(value, numpy_dtype(dtype)).reshape(np.shape(value)))
        size = array.size * STRING_SIZE if dtype == STRING else array.nbytes
        tensor = self.AllocateTensor(dtype, (ctypes.c_int64 * array.ndim)(*array.shape), array.ndim, size)
        data = self.TensorData(tensor)
        if dtype != STRING:
            ctypes.memmove(data, array.ctypes.data, size)
            return tensor
        for index, text in enumerate(array.reshape(-1)):
            text = text.encode() if isinstance(text, str) else text
            self.StringInit(data + index * STRING_SIZE)
            self.StringCopy(data + index * STRING_SIZE, text, len(text))
        return tensor

    def to_array(self, tensor):
        dtype = self.TensorType(tensor)
        shape = [self.Dim(tensor, axis) for axis in range(self.NumDims(tensor))]
        data = self.TensorData(tensor)
        if dtype != STRING:
            content = ctypes.string_at(data, self.TensorByteSize(tensor))
            return np.frombuffer(content, numpy_dtype(dtype)).reshape(shape)
        array = np.empty(shape, object)
        for index in range(array.size):
            text = data + index * STRING_SIZE
            array.flat[index] = ctypes.string_at(self.StringGetDataPointer(text), self.StringGetSize(text))
        return array

    def delete_tensor(self, tensor):
        if self.TensorType(tensor) == STRING:
            data = self.TensorData(tensor)
            for index in range(self.TensorByteSize(tensor) // STRING_SIZE):
                self.StringDealloc(data + index * STRING_SIZE)
        self.DeleteTensor(tensor)


class Model:
    """A SavedModel in a session of the C API."""

    def __init__(self, directory, saved_model_dir):
        self.library = library = Library(directory)
        self.graph = library.NewGraph()
        content = library.NewBuffer()
        self.session = library.checked(
            library.LoadSessionFromSavedModel,
            library.NewSessionOptions(),
            None,
            os.fsencode(saved_model_dir),
            (ctypes.c_char_p * 1)(b"serve"),
            1,
            self.graph,
            content,
        )
        # the messages' classes are Python of their own, once the package around them is not what it is
        sys.modules["tensorflow"] = types.ModuleType("tensorflow")
        sys.modules["tensorflow"].__path__ = [directory]
        from tensorflow.core.protobuf import meta_graph_pb2

        meta_graph = meta_graph_pb2.MetaGraphDef.FromString(
            ctypes.string_at(content.contents.data, content.contents.length)
        )
        self.signatures = {name: each for name, each in meta_graph.signature_def.items() if not name.startswith("__")}

    def describe(self):
        def tensors(infos):
            return {
                name: (
                    "string" if info.dtype == STRING else str(numpy_dtype(info.dtype)),
                    None if info.tensor_shape.unknown_rank else [dim.size for dim in info.tensor_shape.dim],
                )
                for name, info in infos.items()
            }

        return {
            name: {
                "inputs": tensors(signature.inputs),
                "outputs": tensors(signature.outputs),
                "defaults": {key: from_proto(value) for key, value in signature.defaults.items()},
            }
            for name, signature in self.signatures.items()
        }

    def run(self, name, inputs):
        library, signature = self.library, self.signatures[name]
        unknown = sorted(set(inputs) - set(signature.inputs))
        values = {key: from_proto(value) for key, value in signature.defaults.items()} | inputs
        missing = sorted(set(signature.inputs) - set(values))
        if unknown or missing:
            raise CApiError(INVALID_ARGUMENT, f"unknown inputs {unknown}, missing inputs {missing}")
        fed = [(self.output(info.name), values[key], info.dtype) for key, info in signature.inputs.items()]
        wanted = [self.output(info.name) for info in signature.outputs.values()]
        tensors = [library.to_tensor(value, dtype) for _, value, dtype in fed]
        results = (POINTER * len(wanted))()
        try:
            library.checked(
                library.SessionRun,
                self.session,
                None,
                (Output * len(fed))(*(output for output, _, _ in fed)),
                (POINTER * len(fed))(*tensors),
                len(fed),
                (Output * len(wanted))(*wanted),
                results,
                len(wanted),
                None,
                0,
                None,
            )
            return {key: library.to_array(result) for key, result in zip(signature.outputs, results, strict=True)}
        finally:
            for tensor in [*tensors, *filter(None, results)]:
                library.delete_tensor(tensor)

    def output(self, name):
        operation, _, index = name.partition(":")
        return Output(self.library.GraphOperationByName(self.graph, operation.encode()), int(index or 0))


def from_proto(proto):
    """The array of a TensorProto, whose values lie in one of two forms."""
    shape = [dim.size for dim in proto.tensor_shape.dim]
    dtype = numpy_dtype(proto.dtype)
    if proto.tensor_content:
        return np.frombuffer(proto.tensor_content, dtype).reshape(shape)
    fields = ("float_val", "double_val", "int_val", "int64_val", "bool_val", "string_val", "uint32_val", "uint64_val")
    values = next((list(getattr(proto, field)) for field in fields if getattr(proto, field)), [0])
    # a last value that repeats is written once
    values += values[-1:] * (int(np.prod(shape)) - len(values))
    array = np.empty(shape, dtype)
    array.flat[:] = values
    return array


def serve(saved_model_dir):
    """Answers calls that come pickled on standard input, until it ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever TensorFlow prints goes elsewhere

    def answer(make):
        try:
            result = (True, make())
        except CApiError as error:
            result = (False, (error.code, error.message))
        pickle.dump(result, answers)
        answers.flush()
        return result[0]

    model = None

    def load():
        nonlocal model
        model = Model(importlib.util.find_spec("tensorflow").submodule_search_locations[0], saved_model_dir)
        return model.describe(), sorted(name for name in sys.modules if name.startswith("tensorflow."))

    if not answer(load):
        return
    while True:
        try:
            name, inputs = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answer(lambda name=name, inputs=inputs: model.run(name, inputs))


if __name__ == "__main__":
    serve(sys.argv[1])
