"""The Open Inference Protocol (KServe v2): metadata, readiness, and inference over a tensor of texts.

Knows the protocol's JSON. How tensors look behind it is `binary_tensors.py`'s business.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from app.errors import InvalidRequest
from app.model_registry import ModelEntry
from app.routes.answer import Answer, answer
from app.routes.binary_tensors import HEADER_LENGTH, pack, split, unpack_texts
from app.routes.openapi import CONVERSATION, UNREADY_MODEL, WORK_ERRORS, body, problems, success
from app.routes.request import check_media, decode_json, parse, read_body, runtime_of
from app.routes.served_model import model_ready, name_of, require_served
from app.schemas_platforms import (
    OUTPUTS,
    InferReply,
    InferRequest,
    InputTensor,
    ModelMetadata,
    ModelReady,
    RequestedOutput,
    ServerLive,
    ServerMetadata,
    ServerReady,
    TensorMetadata,
)

router = APIRouter(prefix="/v2", tags=["open inference"])

OCTETS = "application/octet-stream"
_REQUEST_EXAMPLES = {
    "two texts": {
        "value": {
            "id": "42",
            "parameters": {"num_beams": 4},
            "inputs": [
                {"name": "text", "shape": [2], "datatype": "BYTES", "data": [CONVERSATION, "A second text."]},
            ],
        }
    },
    "other outputs": {
        "value": {
            "inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [CONVERSATION]}],
            "outputs": [{"name": "summary_text"}, {"name": "score"}, {"name": "truncated"}],
        }
    },
}
_REPLY_EXAMPLES = {
    "other outputs": {
        "value": {
            "model_name": "minilm2minilm-dialogsum",
            "model_version": "0.4.0",
            "outputs": [
                {"name": "summary_text", "shape": [1], "datatype": "BYTES", "data": ["anna is out."]},
                {"name": "score", "shape": [1], "datatype": "FP32", "data": [-0.42]},
                {"name": "truncated", "shape": [1], "datatype": "BOOL", "data": [False]},
            ],
        }
    }
}
_REPLY = success(_REPLY_EXAMPLES)
_REPLY["content"][OCTETS] = {"schema": {"type": "string", "format": "binary"}}
_REPLY["headers"][HEADER_LENGTH] = {"schema": {"type": "integer"}, "description": "Bytes of JSON, if more follow."}
_INFER: dict[str, Any] = {
    "response_model": InferReply,
    "responses": {200: _REPLY, **problems(404, *WORK_ERRORS)},
    "openapi_extra": body(InferRequest, _REQUEST_EXAMPLES),
}
_UNREADY_SERVER: dict[int | str, dict[str, Any]] = {
    503: {"model": ServerReady, "description": "Starting, draining, or the engine gives no sign of life"}
}


@router.get("")
async def server(request: Request) -> ServerMetadata:
    """Who answers, and the protocol's extensions it speaks."""
    version = runtime_of(request).versions["precis"]
    return ServerMetadata(name="precis", version=version, extensions=["binary_tensor_data"])


@router.get("/health/live")
async def live() -> ServerLive:
    """The process loop answers, whatever the queue."""
    return ServerLive(live=True)


@router.get("/health/ready", responses=_UNREADY_SERVER)
async def ready(request: Request, response: Response) -> ServerReady:
    """Model loaded, warm, not draining, and the engine's heartbeat fresh."""
    is_ready = runtime_of(request).status() == "ok"
    response.status_code = 200 if is_ready else 503
    return ServerReady(ready=is_ready)


@router.get("/models/{name}", responses=problems(404, 503))
async def model(request: Request, name: str) -> ModelMetadata:
    """The model's version, and the tensors it reads and writes."""
    return _metadata(require_served(request, name))


@router.get("/models/{name}/versions/{version}", responses=problems(404, 503))
async def model_version(request: Request, name: str, version: str) -> ModelMetadata:
    """The model's version, and the tensors it reads and writes."""
    return _metadata(require_served(request, name, version))


@router.get("/models/{name}/ready", responses=UNREADY_MODEL)
async def ready_model(request: Request, response: Response, name: str) -> ModelReady:
    """Whether the model takes requests."""
    return model_ready(request, response, name)


@router.get("/models/{name}/versions/{version}/ready", responses=UNREADY_MODEL)
async def ready_model_version(request: Request, response: Response, name: str, version: str) -> ModelReady:
    """Whether the model takes requests."""
    return model_ready(request, response, name, version)


@router.post("/models/{name}/infer", **_INFER)
async def infer(request: Request, name: str) -> Response:
    """A summary for each text of the tensor `text`, in the tensor's shape.

    With `Inference-Header-Content-Length`, so many bytes are JSON and the tensor follows in binary (Triton's binary
    tensor extension), declared as `application/octet-stream` or not at all; outputs come so if asked.
    """
    return await _infer(request, require_served(request, name))


@router.post("/models/{name}/versions/{version}/infer", **_INFER)
async def infer_version(request: Request, name: str, version: str) -> Response:
    """The same, for callers that name the version."""
    return await _infer(request, require_served(request, name, version))


def _metadata(entry: ModelEntry) -> ModelMetadata:
    return ModelMetadata(
        name=name_of(entry),
        versions=[entry.version],
        platform="pytorch_safetensors",
        inputs=[TensorMetadata(name="text", datatype="BYTES", shape=[-1])],
        outputs=[TensorMetadata(name=name, datatype=datatype, shape=[-1]) for name, datatype in OUTPUTS.items()],
    )


async def _infer(request: Request, entry: ModelEntry) -> Response:
    check_media(request, OCTETS)
    header, raw = split(await read_body(request), request.headers.get(HEADER_LENGTH))
    asked = parse(InferRequest, decode_json(header))
    texts = _texts(asked.inputs[0], raw)
    answered = await answer(request, texts, _pointer, asked.parameters)
    return _reply(entry, asked, answered)


def _pointer(index: int) -> str:
    return f"/inputs/0/data/{index}"


def _texts(tensor: InputTensor, raw: bytes) -> list[str]:
    """The elements, from the JSON or from behind it.

    Raises:
        InvalidRequest: neither or both, or the shape is another.
    """
    size = tensor.parameters.binary_data_size if tensor.parameters else None
    if (size or 0) != len(raw):
        raise _invalid("/parameters/binary_data_size", f"binary_data_size is {size}; {len(raw)} bytes follow the JSON.")
    if (tensor.data is None) == (size is None):
        raise _invalid("/data", "A tensor has either data or binary_data_size.")
    count = tensor.shape[0]
    if tensor.shape[1:] not in ([], [1]) or (tensor.data is not None and len(tensor.data) != count):
        raise _invalid("/shape", f"The shape is {tensor.shape}; n texts have shape [n] or [n, 1].")
    elements = unpack_texts(raw, count, _pointer) if tensor.data is None else tensor.data
    return [element if isinstance(element, str) else element[0] for element in elements]


def _reply(entry: ModelEntry, asked: InferRequest, answered: Answer) -> Response:
    """The asked outputs; those in binary stand behind the JSON, in their order."""
    all_binary = asked.parameters is not None and asked.parameters.binary_data_output is True
    tensors: list[dict[str, Any]] = []
    behind = b""
    for output in asked.outputs or [RequestedOutput(name="summary_text")]:
        values = [getattr(summary, output.name) for summary in answered.summaries]
        tensor = {"name": output.name, "shape": asked.inputs[0].shape, "datatype": OUTPUTS[output.name]}
        binary = output.parameters.binary_data if output.parameters else None
        if all_binary if binary is None else binary:
            packed = pack(OUTPUTS[output.name], values)
            behind += packed
            tensors.append(tensor | {"parameters": {"binary_data_size": len(packed)}})
        else:
            tensors.append(tensor | {"data": values})
    facts = {"model_name": name_of(entry), "model_version": entry.version}
    id_ = {} if asked.id is None else {"id": asked.id}
    plain = JSONResponse(facts | id_ | {"outputs": tensors}, headers=answered.headers)
    if not behind:
        return plain
    headers = answered.headers | {HEADER_LENGTH: str(len(plain.body))}
    return Response(bytes(plain.body) + behind, headers=headers, media_type=OCTETS)


def _invalid(place: str, message: str) -> InvalidRequest:
    return InvalidRequest(message, [{"pointer": f"/inputs/0{place}", "message": message}])
