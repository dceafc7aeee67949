"""Says what requests and answers hold, for pydantic to check and for the page of the routes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Id = Annotated[int, Field(ge=0, le=0xFFFFFFFF)]
Ids = list[Id]
# The first that fits: what most clients send comes first.
Inputs = Annotated[str | list[str] | Ids | list[str | Ids], Field(union_mode="left_to_right")]
Direction = Literal["left", "right", "Left", "Right"]


class Body(BaseModel):
    """What all bodies have in common: fields that are unknown are not read, types are exact."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class Cut(Body):
    """How texts are cut that are too long; by default as the server was started."""

    truncate: bool | None = Field(None, description="cut what is too long, or refuse it")
    truncation_direction: Direction | None = Field(
        None, description="the side that is cut; by default the model's own, mostly right"
    )


class Prompted(Cut):
    """A text behind one of the model's prompts."""

    prompt_name: str | None = Field(None, description="the model's prompt of this name goes first")


class EmbedRequest(Prompted):
    """Texts to be embedded."""

    inputs: Inputs = Field(
        description="a text, a list of ids, or a list of such", examples=["What is Deep Learning?"]
    )
    normalize: bool = Field(True, description="vectors of length 1")
    dimensions: Annotated[int, Field(ge=1)] | None = Field(
        None, description="the first numbers of vectors alone"
    )


class EmbedAllRequest(Prompted):
    """Texts whose tokens are embedded."""

    inputs: Inputs = Field(examples=["What is Deep Learning?"])


class EmbedSparseRequest(Prompted):
    """Texts for vectors of few weights."""

    inputs: Inputs = Field(examples=["What is Deep Learning?"])


class RerankRequest(Cut):
    """Texts to be ranked by how well they answer a query."""

    query: str = Field(examples=["What is Deep Learning?"])
    texts: list[str] = Field(examples=[["Deep Learning is ...", "A recipe for bread."]])
    raw_scores: bool = Field(False, description="the model's logits, not their sigmoid")
    return_text: bool = False


class PredictRequest(Cut):
    """A text, a pair of texts, or a list of lists of one or two texts."""

    inputs: Annotated[
        str
        | Annotated[list[str], Field(min_length=1, max_length=2)]
        | list[Annotated[list[str], Field(min_length=1, max_length=2)]],
        Field(union_mode="left_to_right"),
    ] = Field(examples=["I like you.", ["a text", "its pair"], [["a text"], ["another"]]])
    raw_scores: bool = Field(False, description="logits, not their softmax")


class SimilarityInput(Body):
    """A sentence and those that it is compared with."""

    source_sentence: str = Field(examples=["What is Deep Learning?"])
    sentences: list[str] = Field(examples=[["What is Machine Learning?"]])


class SimilarityRequest(Body):
    """Sentences to be compared by the cosine of their vectors."""

    inputs: SimilarityInput
    parameters: Prompted | None = None


class TokenizeRequest(Body):
    """Texts to be seen as tokens."""

    inputs: Annotated[str | list[str], Field(union_mode="left_to_right")] = Field(
        examples=["What is Deep Learning?"]
    )
    add_special_tokens: bool = True
    prompt_name: str | None = None


class DecodeRequest(Body):
    """Ids to be seen as texts."""

    ids: Annotated[Ids | list[Ids], Field(union_mode="left_to_right")] = Field(
        examples=[[101, 2054, 102]]
    )
    skip_special_tokens: bool = True


class SparseValue(Body):
    """A weight and its place in the vocabulary."""

    index: int
    value: float


class Rank(Body):
    """A text's place in the list of the request, and its score."""

    index: int
    score: float
    text: str | None = None


class Prediction(Body):
    """A label and its score."""

    score: float
    label: str


class SimpleToken(Body):
    """A token, and the bytes of the text that it stands for; of special ones there are none."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


Vectors = Annotated[list[list[float]], Field(examples=[[[0.1, -0.2, 0.3]]])]
VectorsOfTokens = Annotated[list[list[list[float]]], Field(examples=[[[[0.1, -0.2, 0.3]]]])]
SparseVectors = list[list[SparseValue]]
Ranks = list[Rank]
Predictions = list[Prediction] | list[list[Prediction]]
Similarities = Annotated[list[float], Field(examples=[[0.92, 0.1]])]
Tokens = list[list[SimpleToken]]
Texts = Annotated[list[str], Field(examples=[["what is deep learning?"]])]


class Info(Body):
    """What is served, and its limits: TEI's fields, and this server's own behind them."""

    model_config = ConfigDict(protected_namespaces=(), extra="allow")
    model_id: str
    model_sha: str | None
    model_dtype: str
    served_model_name: str
    model_type: dict[str, Any]
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int | None
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str
    sha: str | None
    docker_label: str | None
    precision: str
    target: str
    tuned: bool
    head: str
    models: list[str]


class TeiError(Body):
    """Why there is no answer."""

    error: str = Field(examples=["Model is overloaded"])
    error_type: str = Field(examples=["Overloaded"])


class OpenAIRequest(Body):
    """Texts to be embedded, as OpenAI's clients ask."""

    input: Inputs = Field(examples=["The food was delicious."])
    model: str | None = Field(None, description="a name of /v1/models; by default the first")
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=0)] | None = Field(
        None, description="the first numbers of vectors alone; 0, as Infinity's clients say: all"
    )
    user: str | None = None


class OpenAIEmbedding(Body):
    """A vector: numbers, or their float32 bytes in base64."""

    object: Literal["embedding"]
    embedding: list[float] | str
    index: int


class OpenAIUsage(Body):
    """How many tokens were read."""

    prompt_tokens: int
    total_tokens: int


class OpenAIEmbeddings(Body):
    """The vectors of a request's texts, in their order."""

    object: Literal["list"]
    data: list[OpenAIEmbedding]
    model: str
    usage: OpenAIUsage


class OpenAIModel(Body):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class OpenAIModels(Body):
    """All models that are served."""

    object: Literal["list"]
    data: list[OpenAIModel]


class OpenAIErrorBody(Body):
    """What OpenAI says of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(Body):
    """Why there is no answer, as OpenAI's clients read it."""

    error: OpenAIErrorBody


class CohereDocument(Body):
    """A document with its text."""

    text: str


class CohereRequest(Body):
    """Documents to be ranked, as Cohere's clients ask."""

    query: str = Field(examples=["What is Deep Learning?"])
    documents: Annotated[
        list[str] | list[str | CohereDocument], Field(union_mode="left_to_right")
    ] = Field(examples=[["Deep Learning is ...", "A recipe for bread."]])
    model: str | None = Field(None, description="a name of /v1/models; by default the first")
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool | None = None


class CohereResult(Body):
    """A document's place in the request, and its score."""

    index: int
    relevance_score: float
    document: CohereDocument | None = None


class CohereRanks(Body):
    """The documents, the best first; `model` and `usage` are read by Infinity's clients."""

    id: str
    results: list[CohereResult]
    meta: dict[str, Any]
    model: str
    usage: OpenAIUsage


class CohereError(Body):
    """Why there is no answer, as Cohere's clients read it."""

    message: str


class KServeLive(Body):
    """Whether the server is there."""

    live: bool


class KServeReady(Body):
    """Whether the server, or the model of that name, answers."""

    ready: bool
    name: str | None = None


class KServeServer(Body):
    """What serves."""

    name: str
    version: str
    extensions: list[str]


class KServeTensor(Body):
    """The form of a tensor; -1 is any size."""

    name: str
    datatype: str
    shape: list[int]


class KServeModel(Body):
    """The tensors of a model: it takes texts, or ids with their mask."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[KServeTensor]
    outputs: list[KServeTensor]


class KServeParameters(Prompted):
    """What a request may say of its texts; other parameters are not read."""

    normalize: bool = Field(False, description="vectors of length 1, whatever the model makes")
    dimensions: Annotated[int, Field(ge=1)] | None = None


class KServeData(Body):
    """A tensor with its elements, in rows or one after the other."""

    name: str
    datatype: str
    shape: list[Annotated[int, Field(ge=0)]]
    parameters: dict[str, Any] | None = None
    data: list[Any] | None = Field(None, description="without: binary, behind the JSON")


class KServeOutput(Body):
    """A tensor that is asked for."""

    name: str
    parameters: dict[str, Any] | None = None


class KServeRequest(Body):
    """Tensors by name: text, or input_ids with attention_mask."""

    id: str | None = None
    parameters: KServeParameters | None = None
    inputs: list[KServeData] = Field(
        examples=[
            [
                {
                    "name": "text",
                    "datatype": "BYTES",
                    "shape": [1],
                    "data": ["What is Deep Learning?"],
                }
            ]
        ]
    )
    outputs: list[KServeOutput] | None = Field(None, description="by default all")


class KServeAnswer(Body):
    """The outputs of a model."""

    model_config = ConfigDict(protected_namespaces=())
    model_name: str
    id: str | None = None
    outputs: list[KServeData]


class KServeError(Body):
    """Why there is no answer, as KServe's clients read it."""

    error: str


class ExchangeRequest(Body):
    """A model to be served, in the place of that of the same name, if there is one."""

    name: str = Field(examples=["minilm"])
    directory: str = Field(examples=["/models/minilm-2"])


class Exchanged(Body):
    """What is served now."""

    name: str
    directory: str
    replaced: str | None
    models: list[str]
