"""The routes of SageMaker, Vertex AI, Azure ML, KServe and Open Inference: shapes, pointers into the caller's own body.

Bodies of the binary tensor extension are written and read by Triton's own client, without a socket.
"""

from __future__ import annotations

import json
from typing import Any

import httpx
import numpy as np
import pytest
from pydantic import BaseModel
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput, InferResult

from app.engine import GenerationParams
from app.schemas import Summary
from app.schemas_platforms import MAX_TEXTS, OUTPUTS, InferReply, InferRequest, PredictReply, PredictRequest
from tests.service import LIMIT, Service, serving

pytestmark = pytest.mark.anyio
LONG = "a b c d e f g h i j k l m"  # 15 tokens
INFER = "/v2/models/fake/infer"
HEADER_LENGTH = "Inference-Header-Content-Length"
JSON = {"content-type": "application/json"}


def tensor(*data: Any, **changes: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "text", "shape": [len(data)], "datatype": "BYTES", "data": list(data)} | changes]}


async def post(service: Service, path: str, body: Any) -> httpx.Response:
    return await service.client.post(path, json=body)


# SageMaker and Azure ML


@pytest.mark.parametrize("path", ["/invocations", "/score"])
async def test_other_names_of_summarize_answer_as_it_does(path: str) -> None:
    async with serving() as service:
        for body in ({"inputs": ["hello world", "the"], "parameters": {"num_beams": 2}}, {"inputs": ["a", LONG]}):
            expected, reply = await post(service, "/summarize", body), await post(service, path, body)
            assert (reply.status_code, reply.headers["content-type"]) == (
                expected.status_code,
                expected.headers["content-type"],
            )
            if reply.status_code == 200:
                assert reply.json() == expected.json()
            else:
                assert reply.json() | {"instance": ""} == expected.json() | {"instance": ""}


async def test_ping_follows_ready() -> None:
    async with serving() as service:
        assert (await service.client.get("/ping")).status_code == 200
        service.app.state.runtime.draining = True
        assert (await service.client.get("/ping")).status_code == 503


# Vertex AI and KServe v1

PREDICT = ["/predict", "/v1/models/fake:predict"]


@pytest.mark.parametrize("path", PREDICT)
async def test_one_prediction_for_each_instance_in_their_order(path: str) -> None:
    async with serving() as service:
        body = {"instances": ["hello", {"inputs": "world"}, "the"], "parameters": {"num_beams": 2, "max_length": 9}}
        reply = await post(service, path, body)
        assert reply.status_code == 200
        predictions = PredictReply.model_validate(reply.json()).predictions
        assert [prediction.summary_text for prediction in predictions] == ["hello", "world", "the"]
        assert reply.json()["predictions"] == (await service.summarize(["hello", "world", "the"])).json()
        assert service.engine.submitted[0][1] == GenerationParams(num_beams=2, max_new_tokens=8, min_new_tokens=5)


@pytest.mark.parametrize("path", PREDICT)
@pytest.mark.parametrize(
    ("body", "status", "pointer"),
    [
        ({}, 422, "/instances"),
        ({"instances": []}, 422, "/instances"),
        ({"instances": "a"}, 422, "/instances"),
        ({"instances": ["a", 3]}, 422, "/instances/1"),
        ({"instances": ["a", ["b"]]}, 422, "/instances/1"),
        ({"instances": ["a", {}]}, 422, "/instances/1/inputs"),
        ({"instances": ["a", {"inputs": 3}]}, 422, "/instances/1/inputs"),
        ({"instances": [{"inputs": "a", "text": "a"}]}, 422, "/instances/0/text"),
        ({"instances": ["a", {"inputs": " "}]}, 422, "/instances/1"),
        ({"instances": ["a", "\ud800"]}, 422, "/instances/1"),
        ({"instances": ["a", LONG]}, 413, "/instances/1"),
        ({"instances": ["a"] * 33}, 413, "/instances"),
        ({"instances": [{"inputs": "a"}] * 33}, 413, "/instances"),
        ({"instances": ["a"], "parameters": {"num_beams": 9}}, 422, "/parameters/num_beams"),
        ({"instances": ["a"], "inputs": "a"}, 422, "/inputs"),
        ({"instances": ["a"] * (MAX_TEXTS + 1)}, 422, "/instances"),
    ],
)
async def test_errors_point_into_the_instances(path: str, body: Any, status: int, pointer: str) -> None:
    async with serving() as service:
        reply = await service.client.post(path, content=json.dumps(body), headers=JSON)
        assert (reply.status_code, reply.json()["errors"][0]["pointer"]) == (status, pointer)
        assert service.engine.submitted == []


@pytest.mark.parametrize("path", PREDICT)
async def test_a_cut_instance_is_reported_by_its_place(path: str) -> None:
    async with serving() as service:
        body = {"instances": ["a", {"inputs": LONG}], "parameters": {"overflow": "truncate_tail"}}
        reply = await post(service, path, body)
        assert reply.headers["x-hf-warning"] == f"truncation; instances[1] cut to {LIMIT} tokens"
        assert [item["truncated"] for item in reply.json()["predictions"]] == [False, True]


async def test_vertex_routes_are_those_the_deployment_names() -> None:
    names = "/v1/endpoints/7/deployedModels/8"
    async with serving(predict_route=f"{names}:predict", health_route=names) as service:
        assert (await post(service, f"{names}:predict", {"instances": ["hello"]})).status_code == 200
        assert (await service.client.get(names)).json() == {"status": "ok"}
        assert (await post(service, "/predict", {"instances": ["hello"]})).status_code == 404
        service.app.state.runtime.draining = True
        assert (await service.client.get(names)).status_code == 503


async def test_a_vertex_route_that_is_also_ours_speaks_vertex() -> None:
    async with serving(predict_route="/", health_route="/health/live") as service:
        assert (await post(service, "/", {"instances": ["hello"]})).status_code == 200
        service.app.state.runtime.draining = True
        assert (await service.client.get("/health/live")).status_code == 503


async def test_kserve_v1_names_its_model() -> None:
    async with serving() as service:
        assert (await service.client.get("/v1/models")).json() == {"models": ["fake"]}
        assert (await service.client.get("/v1/models/fake")).json() == {"name": "fake", "ready": True}
        for method in ("GET", "DELETE"):
            refused = await service.client.request(method, "/v1/models/fake:predict")
            assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
        service.engine.age = 1000.0
        reply = await service.client.get("/v1/models/fake")
        assert (reply.status_code, reply.json()) == (503, {"name": "fake", "ready": False})


# Open Inference


async def test_open_inference_metadata() -> None:
    async with serving() as service:
        server = (await service.client.get("/v2")).json()
        assert server["name"] == "precis"
        assert server["extensions"] == ["binary_tensor_data"]
        for path in ("/v2/models/fake", "/v2/models/fake/versions/1.0"):
            model = (await service.client.get(path)).json()
            assert (model["name"], model["versions"]) == ("fake", ["1.0"])
            assert model["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1]}]
            assert {output["name"]: output["datatype"] for output in model["outputs"]} == OUTPUTS


async def test_open_inference_health() -> None:
    ready = ["/v2/health/ready", "/v2/models/fake/ready", "/v2/models/fake/versions/1.0/ready"]
    async with serving() as service:
        for path in ready:
            reply = await service.client.get(path)
            assert (reply.status_code, reply.json()["ready"]) == (200, True)
        service.app.state.runtime.draining = True
        for path in ready:
            reply = await service.client.get(path)
            assert (reply.status_code, reply.json()["ready"]) == (503, False)
        assert (await service.client.get("/v2/health/live")).json() == {"live": True}


async def test_every_output_is_a_key_of_a_summary() -> None:
    assert set(OUTPUTS) <= set(Summary.model_fields)
    async with serving() as service:
        summaries = (await service.summarize(["hello", "the"])).json()
        body = tensor("hello", "the") | {"id": "42", "outputs": [{"name": name} for name in OUTPUTS]}
        reply = await post(service, "/v2/models/fake/versions/1.0/infer", body)
        assert reply.headers["x-compute-tokens"] == "6"
        assert InferReply.model_validate(reply.json())
        assert reply.json() == {
            "model_name": "fake",
            "model_version": "1.0",
            "id": "42",
            "outputs": [
                {"name": name, "shape": [2], "datatype": datatype, "data": [summary[name] for summary in summaries]}
                for name, datatype in OUTPUTS.items()
            ],
        }


@pytest.mark.parametrize(
    ("data", "shape"), [(["hello", "the"], [2]), (["hello", "the"], [2, 1]), ([["hello"], ["the"]], [2, 1])]
)
async def test_texts_come_back_in_their_shape(data: list[Any], shape: list[int]) -> None:
    async with serving() as service:
        reply = await post(service, INFER, tensor(*data, shape=shape))
        assert "id" not in reply.json()
        assert reply.json()["outputs"] == [
            {"name": "summary_text", "shape": shape, "datatype": "BYTES", "data": ["hello", "the"]}
        ]


@pytest.mark.parametrize(
    ("body", "status", "pointer"),
    [
        ({}, 422, "/inputs"),
        ({"inputs": []}, 422, "/inputs"),
        ({"inputs": tensor("a")["inputs"] * 2}, 422, "/inputs"),
        (tensor("a", name="inputs"), 422, "/inputs/0/name"),
        (tensor("a", datatype="FP32"), 422, "/inputs/0/datatype"),
        (tensor("a", shape=[2]), 422, "/inputs/0/shape"),
        (tensor("a", "b", shape=[1, 2]), 422, "/inputs/0/shape"),
        (tensor("a", shape=[1, 1, 1]), 422, "/inputs/0/shape"),
        (tensor("a", shape=[-1]), 422, "/inputs/0/shape/0"),
        (tensor(), 422, "/inputs/0/shape/0"),
        (tensor("a", shape=[MAX_TEXTS + 1]), 422, "/inputs/0/shape/0"),
        (tensor(*["a"] * (MAX_TEXTS + 1), shape=[1]), 422, "/inputs/0/data"),
        (tensor("a", data=[]), 422, "/inputs/0/data"),
        (tensor("a", data=None), 422, "/inputs/0/data"),
        (tensor("a", 3), 422, "/inputs/0/data/1"),
        (tensor("a", ["b", "c"]), 422, "/inputs/0/data/1"),
        (tensor("a", "\ud800"), 422, "/inputs/0/data/1"),
        (tensor("a", " "), 422, "/inputs/0/data/1"),
        (tensor("a", LONG), 413, "/inputs/0/data/1"),
        (tensor(*["a"] * 33), 413, "/inputs/0/data"),
        (tensor("a", parameters={"binary_data_size": 5}), 422, "/inputs/0/parameters/binary_data_size"),
        (tensor("a", parameters={"shared_memory_region": "x"}), 422, "/inputs/0/parameters/shared_memory_region"),
        (tensor("a") | {"outputs": [{"name": "logits"}]}, 422, "/outputs/0/name"),
        (tensor("a") | {"outputs": [{"name": "score"}] * 8}, 422, "/outputs"),
        (tensor("a") | {"id": 42}, 422, "/id"),
        (tensor("a") | {"id": "\ud800"}, 422, "/id"),
        (tensor("a") | {"parameters": {"num_beams": 9}}, 422, "/parameters/num_beams"),
        (tensor("a") | {"parameters": {"return": ["tokens"]}}, 422, "/parameters/return"),
        (tensor("a") | {"parameters": {"priority": 1}}, 422, "/parameters/priority"),
    ],
)
async def test_errors_point_into_the_tensor(body: Any, status: int, pointer: str) -> None:
    async with serving() as service:
        reply = await service.client.post(INFER, content=json.dumps(body), headers=JSON)
        assert (reply.status_code, reply.json()["errors"][0]["pointer"]) == (status, pointer), reply.text
        assert reply.json()["error"] == reply.json()["detail"]
        assert service.engine.submitted == []


async def test_the_detail_names_the_element_as_people_write_it() -> None:
    async with serving() as service:
        detail = (await post(service, INFER, tensor("a", LONG))).json()["detail"]
        assert detail.startswith("inputs[0].data[1] is 15 tokens; the limit is 12")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models/other"),
        ("POST", "/v1/models/other:predict"),
        ("GET", "/v2/models/other"),
        ("GET", "/v2/models/fake/versions/2"),
        ("GET", "/v2/models/other/ready"),
        ("GET", "/v2/models/fake/versions/2/ready"),
        ("POST", "/v2/models/other/infer"),
        ("POST", "/v2/models/fake/versions/2/infer"),
    ],
)
async def test_another_name_or_version_is_404_and_says_what_is_there(method: str, path: str) -> None:
    async with serving() as service:
        reply = await service.client.request(method, path)
        assert (reply.status_code, reply.json()["type"]) == (404, "/problems/unknown-model")
        assert "'fake'" in reply.json()["error"]


# The binary tensor extension, spoken by Triton's client


def written_by_triton(*texts: str | bytes, **changes: Any) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a request with a binary tensor."""
    values = np.array(texts, dtype=np.object_)
    text = InferInput("text", list(values.shape), "BYTES").set_data_from_numpy(values)
    body, header_length = InferenceServerClient.generate_request_body([text], **changes)
    return body, {HEADER_LENGTH: str(header_length)}


def read_by_triton(reply: httpx.Response) -> InferResult:
    assert reply.status_code == 200, reply.text
    header_length = int(reply.headers[HEADER_LENGTH]) if HEADER_LENGTH in reply.headers else None
    return InferenceServerClient.parse_response_body(reply.content, header_length=header_length)


@pytest.mark.parametrize("media", [{}, {"content-type": "application/octet-stream"}])
async def test_binary_tensors_in_and_out(media: dict[str, str]) -> None:
    async with serving() as service:
        body, headers = written_by_triton("hello", "the", request_id="42")
        reply = await service.client.post(INFER, content=body, headers=headers | media)
        assert reply.headers["content-type"] == "application/octet-stream"
        result = read_by_triton(reply)
        assert result.as_numpy("summary_text").tolist() == [b"hello", b"the"]
        assert result.get_response()["id"] == "42"


async def test_each_output_comes_in_the_form_it_was_asked_in() -> None:
    async with serving() as service:
        summaries = (await service.summarize(["hello", "the"])).json()
        outputs = [InferRequestedOutput(name, binary_data=i % 2 == 0) for i, name in enumerate(OUTPUTS)]
        body, headers = written_by_triton("hello", "the", outputs=outputs)
        result = read_by_triton(await service.client.post(INFER, content=body, headers=headers))
        for output in outputs:
            values = [v.decode() if isinstance(v, bytes) else v for v in result.as_numpy(output.name()).tolist()]
            assert values == [summary[output.name()] for summary in summaries]
            assert ("data" in result.get_output(output.name())) is not output._binary


async def test_a_reply_without_binary_outputs_is_plain_json() -> None:
    async with serving() as service:
        outputs = [InferRequestedOutput("summary_text", binary_data=False)]
        body, headers = written_by_triton("hello", outputs=outputs)
        reply = await service.client.post(INFER, content=body, headers=headers)
        assert reply.json()["outputs"][0]["data"] == ["hello"]
        assert HEADER_LENGTH not in reply.headers


async def test_binary_texts_may_hold_any_character_and_errors_point_at_them() -> None:
    async with serving() as service:
        body, headers = written_by_triton("hello", b"\xff")
        reply = await service.client.post(INFER, content=body, headers=headers)
        assert (reply.status_code, reply.json()["errors"][0]["pointer"]) == (422, "/inputs/0/data/1")
        body, headers = written_by_triton("hello", LONG)
        reply = await service.client.post(INFER, content=body, headers=headers)
        assert (reply.status_code, reply.json()["errors"][0]["pointer"]) == (413, "/inputs/0/data/1")
        body, headers = written_by_triton("h\u00e9llo \u4f60")
        assert (await service.client.post(INFER, content=body, headers=headers)).status_code == 200


@pytest.mark.parametrize(
    ("missing", "pointer"),
    [
        (1, "/inputs/0/data/1"),
        (6, "/inputs/0/data/1"),
        (7, "/inputs/0/data/1"),  # all of the second text
        (9, "/inputs/0/data/0"),
    ],
)
async def test_a_binary_tensor_that_is_cut_short_is_refused(missing: int, pointer: str) -> None:
    async with serving() as service:
        body, headers = written_by_triton("hello", "the")
        size = b'"binary_data_size":16'
        assert size in body
        cut = body[:-missing]
        reply = await service.client.post(INFER, content=cut, headers=headers)
        assert reply.json()["detail"] == f"binary_data_size is 16; {16 - missing} bytes follow the JSON."
        admitted = cut.replace(size, b'"binary_data_size":%2d' % (16 - missing))
        reply = await service.client.post(INFER, content=admitted, headers=headers)
        assert (reply.status_code, reply.json()["errors"][0]["pointer"]) == (422, pointer)


async def test_a_binary_tensor_of_another_shape_is_refused() -> None:
    async with serving() as service:
        body, headers = written_by_triton("hello", "the")
        for shape, pointer in ((b"[1]", "/inputs/0/data/0"), (b"[3]", "/inputs/0/data/2")):
            assert b"[2]" in body
            reply = await service.client.post(INFER, content=body.replace(b"[2]", shape), headers=headers)
            assert (reply.status_code, reply.json()["errors"][0]["pointer"]) == (422, pointer)


@pytest.mark.parametrize("length", ["99999", "-1", "x", "9" * 5000, "", "3"])
async def test_a_wrong_header_length_is_400(length: str) -> None:
    async with serving() as service:
        body, _ = written_by_triton("hello")
        reply = await service.client.post(INFER, content=body, headers={HEADER_LENGTH: length})
        assert (reply.status_code, reply.json()["type"]) == (400, "/problems/malformed-json")


async def test_infer_takes_json_under_octet_stream_and_nothing_else() -> None:
    async with serving() as service:
        for media, status in (("application/octet-stream", 200), ("application/json", 200), ("text/plain", 415)):
            reply = await service.client.post(
                INFER, content=json.dumps(tensor("hello")), headers={"content-type": media}
            )
            assert reply.status_code == status


# OpenAPI


async def test_openapi_examples_are_requests_and_replies() -> None:
    async with serving() as service:
        paths = (await service.client.get("/openapi.json")).json()["paths"]
        models: dict[str, tuple[type[BaseModel], type[BaseModel]]] = {
            "/predict": (PredictRequest, PredictReply),
            "/v1/models/{name}:predict": (PredictRequest, PredictReply),
            "/v2/models/{name}/infer": (InferRequest, InferReply),
            "/v2/models/{name}/versions/{version}/infer": (InferRequest, InferReply),
        }
        for path, (request, reply) in models.items():
            operation = paths[path]["post"]
            asked = operation["requestBody"]["content"]["application/json"]["examples"]
            given = operation["responses"]["200"]["content"]["application/json"]["examples"]
            assert [request.model_validate(example["value"]) for example in asked.values()]
            assert [reply.model_validate(example["value"]) for example in given.values()]
            assert "404" in operation["responses"] or path == "/predict"
        assert {"/ping", "/invocations", "/score", "/v1/models", "/v1/models/{name}", "/v2"} <= set(paths)
