"""Bodies of the platforms' protocols: instances and predictions of Vertex AI and KServe v1, tensors of Open Inference.

Knows names, shapes and ranges. Does not know routes, or how a tensor looks in binary.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from app.schemas import OBJECT, TEXT, TEXTS, Body, Parameters, Summary, Text, kind_of

# More than any batch: bounds the work of reading a body of nothing but commas.
MAX_TEXTS = 10_000


class TextInstance(Body):
    """An instance that names its text."""

    inputs: Text


Instance = Annotated[
    Annotated[Text, Tag(TEXT)] | Annotated[TextInstance, Tag(OBJECT)],
    Discriminator(
        kind_of,
        custom_error_type="instance_type",
        custom_error_message="Instance should be a text or an object with inputs",
    ),
]


class PredictRequest(Body):
    """The request of Vertex AI and of KServe's protocol v1; parameters count for every instance."""

    instances: Annotated[
        list[Instance],
        Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True, description='Texts, or objects {"inputs": text}.'),
    ]
    parameters: Parameters | None = None


class PredictReply(BaseModel):
    """One prediction for each instance, in their order."""

    predictions: list[Summary]


class ModelList(BaseModel):
    """What is served."""

    models: Annotated[list[str], Field(description="One name.")]


class ModelReady(BaseModel):
    """Whether requests for this model should come here."""

    name: str
    ready: bool


class ServerLive(BaseModel):
    """The process answers."""

    live: bool


class ServerReady(BaseModel):
    """Whether requests should come here."""

    ready: bool


class ServerMetadata(BaseModel):
    """Who answers."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(BaseModel):
    """A tensor that the model reads or writes; -1 is any size."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """The model and its tensors."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


# Every output tensor is a key of a summary, one element for each text.
OutputName = Literal[
    "summary_text", "score", "finish_reason", "output_tokens", "input_tokens", "source_tokens", "truncated"
]
OUTPUTS: dict[OutputName, Literal["BYTES", "FP32", "INT64", "BOOL"]] = {
    "summary_text": "BYTES",
    "score": "FP32",
    "finish_reason": "BYTES",
    "output_tokens": "INT64",
    "input_tokens": "INT64",
    "source_tokens": "INT64",
    "truncated": "BOOL",
}

Row = Annotated[list[Text], Field(min_length=1, max_length=1)]
Element = Annotated[
    Annotated[Text, Tag(TEXT)] | Annotated[Row, Tag(TEXTS)],
    Discriminator(kind_of, custom_error_type="element_type", custom_error_message="Element should be a text"),
]


class InputParameters(Body):
    """Of an input tensor."""

    binary_data_size: Annotated[
        int | None, Field(ge=0, description="Bytes of the tensor behind the JSON; then it has no `data`.")
    ] = None


class InputTensor(Body):
    """The texts: of shape [n], or [n, 1]."""

    name: Literal["text"]
    shape: Annotated[list[Annotated[int, Field(ge=1, le=MAX_TEXTS)]], Field(min_length=1, max_length=2)]
    datatype: Literal["BYTES"]
    parameters: InputParameters | None = None
    data: Annotated[
        list[Element] | None,
        Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True, description="n texts, or n lists of one text."),
    ] = None


class OutputParameters(Body):
    """Of a requested output."""

    binary_data: Annotated[
        bool | None, Field(description="Whether it comes as bytes behind the JSON. Default: binary_data_output.")
    ] = None


class RequestedOutput(Body):
    """An output tensor to answer with."""

    name: OutputName
    parameters: OutputParameters | None = None


class InferParameters(Parameters):
    """Decode options and the like, as in /summarize; what a tensor cannot hold is not returned."""

    return_: Annotated[
        None, Field(alias="return", description="Tokens and alternatives do not fit a tensor: POST /summarize.")
    ] = None
    binary_data_output: Annotated[bool | None, Field(description="Whether outputs come as bytes behind the JSON.")] = (
        None
    )


class InferRequest(Body):
    """The request of the Open Inference Protocol (KServe v2): one tensor of texts."""

    id: Annotated[str | None, Field(max_length=256, description="Given back in the reply.")] = None
    parameters: InferParameters | None = None
    inputs: Annotated[list[InputTensor], Field(min_length=1, max_length=1)]
    outputs: Annotated[
        list[RequestedOutput] | None, Field(max_length=len(OUTPUTS), description="Default: summary_text.")
    ] = None


class BinarySize(BaseModel):
    """Of an output tensor behind the JSON."""

    binary_data_size: int


class OutputTensor(BaseModel):
    """A key of all summaries, in the shape of the input; `data`, or the size of its bytes."""

    name: OutputName
    shape: list[int]
    datatype: Literal["BYTES", "FP32", "INT64", "BOOL"]
    data: list[str] | list[bool] | list[int] | list[float] | None = None
    parameters: BinarySize | None = None


class InferReply(BaseModel):
    """The reply of the Open Inference Protocol."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputTensor]
