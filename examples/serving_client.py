"""Asks a TensorFlow Serving server for a picture, by gRPC.

usage: python examples/serving_client.py "a red heart, noto style" [--server localhost:8500] [--model emoji] [--seed 0]
Needs `pip install tensorflow-serving-api`. What is left out takes the defaults of the export.
"""

import argparse
import pathlib

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompt")
parser.add_argument("--server", default="localhost:8500")
parser.add_argument("--model", default="emoji")
parser.add_argument("--output", type=pathlib.Path, default="out.png")
parser.add_argument("--seed", type=int, help="default: a fresh one")
parser.add_argument("--num-steps", type=int)
parser.add_argument("--guidance-scale", type=float)
options = parser.parse_args()

import grpc  # noqa: E402  # after --help, which needs none of them
import tensorflow as tf  # noqa: E402
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc  # noqa: E402

request = predict_pb2.PredictRequest()
request.model_spec.name, request.model_spec.signature_name = options.model, "generate"
request.inputs["prompt"].CopyFrom(tf.make_tensor_proto([options.prompt]))
for name, dtype in (("seed", tf.int64), ("num_steps", tf.int32), ("guidance_scale", tf.float32)):
    if getattr(options, name) is not None:
        request.inputs[name].CopyFrom(tf.make_tensor_proto([getattr(options, name)], dtype))
with grpc.insecure_channel(options.server) as channel:
    answer = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request, timeout=300)
found = {name: tf.make_ndarray(value)[0] for name, value in answer.outputs.items()}
options.output.write_bytes(found["image_bytes"])
print(f"{options.output}  seed {found['seed']}")
