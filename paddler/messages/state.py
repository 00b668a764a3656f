"""Desired state, applicable state, model references, inference parameters, agent issues."""

import enum
from typing import Annotated, Literal

import attrs

from paddler.messages.numbers import Float32, FloatRange, Int32, Uint32, Unsigned

MAX_LORA_ADAPTERS = 16


class KvCacheDtype(enum.StrEnum):
    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"
    Q8_0 = "Q8_0"
    Q4_0 = "Q4_0"
    Q4_1 = "Q4_1"
    IQ4_NL = "IQ4_NL"
    Q5_0 = "Q5_0"
    Q5_1 = "Q5_1"


class PoolingType(enum.StrEnum):
    UNSPECIFIED = "Unspecified"
    NONE = "None"
    MEAN = "Mean"
    CLS = "Cls"
    LAST = "Last"
    RANK = "Rank"


@attrs.frozen
class InferenceParameters:
    """The cluster-wide parameters; attribute defaults are those of a fresh balancer."""

    n_batch: Unsigned
    context_size: Uint32
    embedding_batch_size: Unsigned
    enable_embeddings: bool
    image_resize_to_fit: Uint32
    k_cache_dtype: KvCacheDtype
    v_cache_dtype: KvCacheDtype
    min_p: Float32
    n_gpu_layers: Int32
    penalty_frequency: Float32
    penalty_last_n: Int32
    penalty_presence: Float32
    penalty_repeat: Float32
    pooling_type: PoolingType
    temperature: Float32
    top_k: Int32
    top_p: Float32


DEFAULT_PARAMETERS = InferenceParameters(
    n_batch=2048,
    context_size=8192,
    embedding_batch_size=256,
    enable_embeddings=False,
    image_resize_to_fit=1024,
    k_cache_dtype=KvCacheDtype.Q8_0,
    v_cache_dtype=KvCacheDtype.Q8_0,
    min_p=0.05,
    n_gpu_layers=0,
    penalty_frequency=0.0,
    penalty_last_n=-1,
    penalty_presence=0.8,
    penalty_repeat=1.1,
    pooling_type=PoolingType.LAST,
    temperature=0.8,
    top_k=80,
    top_p=0.8,
)

DETERMINISTIC_PARAMETERS = attrs.evolve(
    DEFAULT_PARAMETERS,
    min_p=0.0,
    penalty_frequency=0.0,
    penalty_presence=0.0,
    penalty_repeat=1.0,
    temperature=0.0,
    top_k=1,
    top_p=1.0,
)


@attrs.frozen
class HuggingFaceModel:
    filename: str
    repo_id: str
    revision: str

    def __str__(self) -> str:
        return f"{self.repo_id}/{self.revision}/{self.filename}"


@attrs.frozen
class LocalModel:
    """`{"LocalToAgent": path}`: a file on the agent's machine."""

    path: str

    def __str__(self) -> str:
        return self.path


@attrs.frozen
class UrlModel:
    url: str

    def __str__(self) -> str:
        return self.url


ModelSource = Literal["None"] | HuggingFaceModel | LocalModel | UrlModel

LoraSource = HuggingFaceModel | LocalModel | UrlModel
LoraScale = Annotated[float, FloatRange(100.0)]


@attrs.frozen
class LoraAdapter:
    """A file of low-rank changes to the model's weights, and how strongly they count."""

    source: LoraSource
    scale: LoraScale = 1.0


@attrs.frozen
class ChatTemplate:
    content: str


@attrs.frozen
class DesiredState:
    """What the operator asked for; the one document of the state database."""

    inference_parameters: InferenceParameters
    model: ModelSource
    multimodal_projection: ModelSource
    use_chat_template_override: bool
    chat_template_override: ChatTemplate | None = None
    lora_adapters: tuple[LoraAdapter, ...] = ()
    """Not written while empty: strict clients of Paddler 4.1 do not know the key."""

    def applicable(self) -> "ApplicableState":
        """Return what agents are told: the override only when its flag is on."""
        return ApplicableState(
            chat_template_override=self.chat_template_override if self.use_chat_template_override else None,
            inference_parameters=self.inference_parameters,
            model=self.model,
            multimodal_projection=self.multimodal_projection,
            lora_adapters=self.lora_adapters,
        )


DEFAULT_DESIRED_STATE = DesiredState(
    inference_parameters=DEFAULT_PARAMETERS,
    model="None",
    multimodal_projection="None",
    use_chat_template_override=False,
)


@attrs.frozen
class ApplicableState:
    """What every agent is to serve."""

    chat_template_override: ChatTemplate | None
    inference_parameters: InferenceParameters
    model: ModelSource
    multimodal_projection: ModelSource
    lora_adapters: tuple[LoraAdapter, ...] = ()


def invalid_parameter(state: DesiredState) -> str | None:
    """Return why this state cannot be stored, or None."""
    if state.inference_parameters.image_resize_to_fit == 0:
        return "image_resize_to_fit must be greater than zero"
    if state.inference_parameters.embedding_batch_size == 0:
        return "embedding_batch_size must be greater than zero"
    if len(state.lora_adapters) > MAX_LORA_ADAPTERS:
        return f"lora_adapters must be at most {MAX_LORA_ADAPTERS}"
    return None


class StateApplicationStatus(enum.StrEnum):
    FRESH = "Fresh"
    APPLIED = "Applied"
    ATTEMPTED_AND_RETRYING = "AttemptedAndRetrying"
    STUCK = "Stuck"
    ATTEMPTED_AND_NOT_APPLIABLE = "AttemptedAndNotAppliable"


@attrs.frozen
class ModelPath:
    model_path: str


# Issues are shown to people in logs, too: str() of each is its sentence.


@attrs.frozen
class ModelFileDoesNotExist(ModelPath):
    def __str__(self) -> str:
        return f"{self.model_path} does not exist"


@attrs.frozen
class ModelCannotBeLoaded(ModelPath):
    def __str__(self) -> str:
        return f"{self.model_path} cannot be loaded"


@attrs.frozen
class MultimodalProjectionCannotBeLoaded(ModelPath):
    def __str__(self) -> str:
        return f"the multimodal projection {self.model_path} cannot be loaded"


@attrs.frozen
class UnableToFindChatTemplate(ModelPath):
    def __str__(self) -> str:
        return f"{self.model_path} has no chat template, and no override is in force"


@attrs.frozen
class ChatTemplateDoesNotCompile:
    error: str
    model_path: ModelPath
    template_content: str

    def __str__(self) -> str:
        return f"the chat template for {self.model_path.model_path} does not compile: {self.error}"


@attrs.frozen
class SlotCannotStart:
    error: str
    slot_index: Uint32

    def __str__(self) -> str:
        return f"slot {self.slot_index} cannot start: {self.error}"


AgentIssue = (
    ChatTemplateDoesNotCompile
    | ModelCannotBeLoaded
    | ModelFileDoesNotExist
    | MultimodalProjectionCannotBeLoaded
    | SlotCannotStart
    | UnableToFindChatTemplate
)


def sorted_issues(issues: "set[AgentIssue] | frozenset[AgentIssue]") -> tuple[AgentIssue, ...]:
    """Sort by variant name, then by params, field by field."""
    return tuple(sorted(issues, key=lambda issue: (type(issue).__name__, attrs.astuple(issue))))
