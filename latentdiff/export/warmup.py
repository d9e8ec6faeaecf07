"""Requests that a TensorFlow Serving server makes of a model before it answers the first client.

The file is a TFRecord of `tensorflow.serving.PredictionLog`, the server's own format. Its four messages are declared
here with the numbers of their fields (tensorflow_serving/apis: prediction_log.proto, predict.proto, model.proto), since
the package that has them is made for clients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from tensorflow.core.framework import tensor_pb2

WARMUP_FILE = Path("assets.extra", "tf_serving_warmup_requests")
_PACKAGE = "latentdiff.serving"
_MESSAGE, _STRING = descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE, descriptor_pb2.FieldDescriptorProto.TYPE_STRING
_ONE, _MANY = descriptor_pb2.FieldDescriptorProto.LABEL_OPTIONAL, descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED
_FIELDS = {
    "ModelSpec": [("name", 1, _STRING, ""), ("signature_name", 3, _STRING, "")],
    # A map is a repeated message of key and value.
    "Input": [("key", 1, _STRING, ""), ("value", 2, _MESSAGE, ".tensorflow.TensorProto")],
    "PredictRequest": [("model_spec", 1, _MESSAGE, "ModelSpec"), ("inputs", 2, _MESSAGE, "Input")],
    "PredictLog": [("request", 1, _MESSAGE, "PredictRequest")],
    "PredictionLog": [("predict_log", 6, _MESSAGE, "PredictLog")],
}


def write_warmup(directory: Path, model_name: str, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Writes the requests into a SavedModel's directory.

    Args:
        directory: of one version.
        model_name: as the server calls it.
        requests: (signature, inputs by name) each; at most 1,000, the server's own limit.
    """
    path = directory / WARMUP_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    PredictionLog = _messages()
    with tf.io.TFRecordWriter(str(path)) as file:
        for signature, inputs in requests:
            log = PredictionLog()
            request = log.predict_log.request
            request.model_spec.name, request.model_spec.signature_name = model_name, signature
            for name, value in inputs.items():
                request.inputs.add(key=name, value=tf.make_tensor_proto(value))
            file.write(log.SerializeToString())


def _messages() -> Any:
    file = descriptor_pb2.FileDescriptorProto(
        name="latentdiff/serving.proto", package=_PACKAGE, syntax="proto3", dependency=[tensor_pb2.DESCRIPTOR.name]
    )
    for name, fields in _FIELDS.items():
        message = file.message_type.add(name=name)
        for field, number, kind, type_name in fields:
            label = _MANY if field == "inputs" else _ONE
            full = type_name if type_name.startswith(".") or not type_name else f".{_PACKAGE}.{type_name}"
            message.field.add(name=field, number=number, type=kind, label=label, type_name=full or None)
    # TensorFlow's own pool, where TensorProto is; adding the same file again changes nothing.
    pool = descriptor_pool.Default()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.PredictionLog"))
