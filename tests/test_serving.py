"""Clients ask by gRPC on loopback, with TensorFlow Serving's own messages, and the exported model answers.

The server is one that hands requests to TensorFlow's C API, as TensorFlow Serving does. Where `tensorflow_model_server`
is on the PATH, the same tests ask it too, by REST as well.
"""

import base64
import json
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
from concurrent import futures
from pathlib import Path

import keras
import numpy as np
import pytest

if keras.backend.backend() != "tensorflow":
    pytest.skip("a SavedModel is TensorFlow's", allow_module_level=True)

import grpc
import tensorflow as tf
from c_api import INVALID_ARGUMENT, CApiError, ServedModel
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

CLIENT = Path(__file__).parents[1] / "examples" / "serving_client.py"
BINARY = "tensorflow_model_server"
WAIT = 300  # seconds, on a busy machine


class Service(prediction_service_pb2_grpc.PredictionServiceServicer):
    """Predict, with a model of the C API: inputs that are left out take the signature's defaults."""

    def __init__(self, model):
        self.model, self.lock = model, threading.Lock()

    def Predict(self, request, context):  # noqa: N802
        inputs = {name: tf.make_ndarray(value) for name, value in request.inputs.items()}
        try:
            with self.lock:
                outputs = self.model.run(request.model_spec.signature_name or "serving_default", inputs)
        except CApiError as error:
            is_theirs = error.code == INVALID_ARGUMENT
            context.abort(grpc.StatusCode.INVALID_ARGUMENT if is_theirs else grpc.StatusCode.INTERNAL, error.message)
        answer = predict_pb2.PredictResponse(model_spec=request.model_spec)
        for name, value in outputs.items():
            answer.outputs[name].CopyFrom(tf.make_tensor_proto(value))
        return answer


@pytest.fixture(scope="module", params=["c_api", BINARY])
def ports(request, tiny_saved_model):
    """Where a server of the model listens on loopback: gRPC's port, and REST's or None."""
    if request.param == "c_api":
        with ServedModel(tiny_saved_model) as model:
            server = grpc.server(futures.ThreadPoolExecutor(4))
            prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(Service(model), server)
            port = server.add_insecure_port("localhost:0")
            server.start()
            yield port, None
            server.stop(None).wait()
        return
    if shutil.which(BINARY) is None:
        pytest.skip(f"{BINARY} is not on the PATH")
    port, rest = free_port(), free_port()
    command = [BINARY, f"--port={port}", f"--rest_api_port={rest}", "--model_name=tiny"]
    with subprocess.Popen([*command, f"--model_base_path={tiny_saved_model.parent}"]) as process:
        try:
            with grpc.insecure_channel(f"localhost:{port}") as channel:
                grpc.channel_ready_future(channel).result(timeout=WAIT)
            yield port, rest
        finally:
            process.terminate()


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def asked(signature="generate", **inputs):
    """A request as it comes over the wire: built, serialised and read again."""
    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = "tiny", signature
    for name, value in inputs.items():
        request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
    return predict_pb2.PredictRequest.FromString(request.SerializeToString())


@pytest.fixture(scope="module")
def predict(ports):
    """Asks the server; outputs by name."""
    with grpc.insecure_channel(f"localhost:{ports[0]}") as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)

        def ask(request):
            answer = stub.Predict(request, timeout=WAIT)
            return {name: tf.make_ndarray(value) for name, value in answer.outputs.items()}

        yield ask


def is_pythons(file, seed, pipe):
    expected = pipe.generate("a cat", num_steps=3, guidance_scale=2, seed=int(seed), progress=False)[0]
    return np.abs(tf.io.decode_png(file).numpy().astype(int) - expected).max() <= 1


def test_clients_at_the_same_time_each_get_their_own_picture(predict, tiny_pipe):
    requests = [asked(prompt=["a cat"], seed=np.array([seed])) for seed in range(6)]
    with futures.ThreadPoolExecutor(6) as clients:
        answers = list(clients.map(predict, requests))
    for seed, answer in enumerate(answers):
        assert answer["seed"].tolist() == [seed]
        assert is_pythons(answer["image_bytes"][0], seed, tiny_pipe)


def test_prompt_alone_is_enough_and_the_seed_comes_back(predict, tiny_pipe):
    answer = predict(asked("serving_default", prompt=["a cat", "a cat"]))
    for file, seed in zip(answer["image_bytes"], answer["seed"], strict=True):
        assert is_pythons(file, seed, tiny_pipe)


@pytest.mark.parametrize(
    ("inputs", "rule"), [({"num_steps": [61]}, "1 .. 60 (max_steps)"), ({"prompt": ["x" * 101]}, "100 bytes")]
)
def test_request_beyond_a_limit_is_told_so(predict, inputs, rule):
    with pytest.raises(grpc.RpcError) as raised:
        predict(asked(**{"prompt": ["a cat"], **inputs}))
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert rule in raised.value.details()


def test_client_of_the_examples_writes_a_picture(ports, tiny_pipe, tmp_path):
    output = tmp_path / "out.png"
    command = [sys.executable, CLIENT, "a cat", "--server", f"localhost:{ports[0]}", "--model", "tiny"]
    done = subprocess.run(
        [*map(str, command), "--seed", "5", "--num-steps", "3", "--guidance-scale", "2", "--output", str(output)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == f"{output}  seed 5\n"
    assert is_pythons(output.read_bytes(), 5, tiny_pipe)


def test_rest_answers_with_the_same_picture(ports, tiny_pipe):
    if ports[1] is None:
        pytest.skip(f"REST is {BINARY}'s")
    url = f"http://localhost:{ports[1]}/v1/models/tiny:predict"
    body = json.dumps({"inputs": {"prompt": ["a cat"]}}).encode()
    with urllib.request.urlopen(url, body, timeout=WAIT) as response:
        outputs = json.load(response)["outputs"]
    file = base64.b64decode(outputs["image_bytes"][0]["b64"])
    assert is_pythons(file, outputs["seed"][0], tiny_pipe)
