"""Messages are written and read exactly as the API documents them (docs/api.md)."""

from typing import Any

import attrs
import pytest

from paddler.messages.agent_socket import (
    AgentFrame,
    BalancerFrame,
    Generate,
    Goodbye,
    Heartbeat,
    Part,
    Stop,
    Welcome,
)
from paddler.messages.inference import (
    ContinueFromConversationHistory,
    ContinueFromRawPrompt,
    ConversationMessage,
    EmbeddingDocument,
    GbnfGrammar,
    GenerateEmbeddingBatch,
    ImagePart,
    ImageUrl,
    JsonSchemaGrammar,
    NormalizationMethod,
    RmsNorm,
    TextPart,
    Tool,
    ToolFunction,
    ToolParameters,
    undeclared_required_field,
)
from paddler.messages.inference_socket import (
    ClientFrame,
    Error,
    Notification,
    Request,
    ServerNotification,
    StopRespondingTo,
)
from paddler.messages.snapshots import (
    AgentSnapshot,
    AgentsSnapshot,
    BufferedRequestsSnapshot,
    ModelMetadata,
)
from paddler.messages.state import (
    DEFAULT_DESIRED_STATE,
    DEFAULT_PARAMETERS,
    DETERMINISTIC_PARAMETERS,
    AgentIssue,
    ApplicableState,
    ChatTemplate,
    ChatTemplateDoesNotCompile,
    DesiredState,
    HuggingFaceModel,
    InferenceParameters,
    LocalModel,
    LoraAdapter,
    ModelCannotBeLoaded,
    ModelFileDoesNotExist,
    ModelPath,
    ModelSource,
    SlotCannotStart,
    StateApplicationStatus,
    UrlModel,
    invalid_parameter,
    sorted_issues,
)
from paddler.messages.tokens import (
    Done,
    ImageExceedsBatchSize,
    SamplerError,
    StreamError,
    Terminal,
    Usage,
    error_envelope,
    response_envelope,
)
from paddler.messages.wire import structure, unstructure

DEFAULT_PARAMETERS_JSON = {
    "n_batch": 2048,
    "context_size": 8192,
    "embedding_batch_size": 256,
    "enable_embeddings": False,
    "image_resize_to_fit": 1024,
    "k_cache_dtype": "Q8_0",
    "v_cache_dtype": "Q8_0",
    "min_p": 0.05,
    "n_gpu_layers": 0,
    "penalty_frequency": 0.0,
    "penalty_last_n": -1,
    "penalty_presence": 0.8,
    "penalty_repeat": 1.1,
    "pooling_type": "Last",
    "temperature": 0.8,
    "top_k": 80,
    "top_p": 0.8,
}
DEFAULT_STATE_JSON = {
    "chat_template_override": None,
    "inference_parameters": DEFAULT_PARAMETERS_JSON,
    "model": "None",
    "multimodal_projection": "None",
    "use_chat_template_override": False,
}
CONVERSATION_JSON = {
    "add_generation_prompt": True,
    "conversation_history": [
        {"role": "system", "content": "Answer briefly."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Weather here?"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
            ],
        },
    ],
    "enable_thinking": False,
    "grammar": {"type": "json_schema", "schema": '{"type":"object"}'},
    "max_tokens": 200,
    "parse_tool_calls": True,
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "get_weather",
                "description": "Current weather",
                "parameters": {
                    "type": "object",
                    "properties": {"city": {"type": "string"}},
                    "required": ["city"],
                    "additionalProperties": False,
                },
            },
        }
    ],
}
WEATHER_TOOL = Tool(
    type="function",
    function=ToolFunction(
        name="get_weather",
        description="Current weather",
        parameters=ToolParameters(
            type="object",
            properties={"city": {"type": "string"}},
            required=("city",),
            additionalProperties=False,
        ),
    ),
)
CONVERSATION = ContinueFromConversationHistory(
    add_generation_prompt=True,
    conversation_history=(
        ConversationMessage("system", "Answer briefly."),
        ConversationMessage(
            "user",
            (TextPart("Weather here?"), ImagePart(ImageUrl("data:image/png;base64,iVBORw0KGgo="))),
        ),
    ),
    enable_thinking=False,
    max_tokens=200,
    grammar=JsonSchemaGrammar('{"type":"object"}'),
    parse_tool_calls=True,
    tools=(WEATHER_TOOL,),
)
AGENT_JSON = {
    "desired_slots_total": 4,
    "download_current": 0,
    "download_filename": None,
    "download_indeterminate": True,
    "download_total": 0,
    "id": "mTq3uX9pQdYc0aV4sKe1Z",
    "issues": [{"SlotCannotStart": {"error": "context creation failed", "slot_index": 0}}],
    "model_path": "/models/tiny.gguf",
    "name": "agent-a",
    "slots_processing": 1,
    "slots_total": 4,
    "state_application_status": "Applied",
    "uses_chat_template_override": False,
}
AGENT = AgentSnapshot(
    desired_slots_total=4,
    download_current=0,
    download_filename=None,
    download_indeterminate=True,
    download_total=0,
    id="mTq3uX9pQdYc0aV4sKe1Z",
    issues=(SlotCannotStart("context creation failed", 0),),
    model_path="/models/tiny.gguf",
    name="agent-a",
    slots_processing=1,
    slots_total=4,
    state_application_status=StateApplicationStatus.APPLIED,
    uses_chat_template_override=False,
)
USAGE_JSON = {
    "prompt_tokens": 12,
    "cached_prompt_tokens": 8,
    "input_image_tokens": 0,
    "input_audio_tokens": 0,
    "content_tokens": 5,
    "reasoning_tokens": 0,
    "tool_call_tokens": 0,
    "undeterminable_tokens": 0,
}

BOTH_WAYS: list[tuple[Any, Any, Any]] = [
    (ContinueFromConversationHistory, CONVERSATION, CONVERSATION_JSON),
    (
        ContinueFromRawPrompt,
        ContinueFromRawPrompt(16, "Once", GbnfGrammar('root ::= "yes" | "no"', "root")),
        {
            "max_tokens": 16,
            "raw_prompt": "Once",
            "grammar": {"type": "gbnf", "grammar": 'root ::= "yes" | "no"', "root": "root"},
        },
    ),
    (NormalizationMethod, "None", "None"),
    (NormalizationMethod, "L2", "L2"),
    (NormalizationMethod, RmsNorm(1e-06), {"RmsNorm": {"epsilon": 1e-06}}),
    (
        GenerateEmbeddingBatch,
        GenerateEmbeddingBatch((EmbeddingDocument("doc-1", "text"),), "L2"),
        {"input_batch": [{"id": "doc-1", "content": "text"}], "normalization_method": "L2"},
    ),
    (
        ClientFrame,
        Request("my-1", ContinueFromRawPrompt(16, "Once")),
        {
            "Request": {
                "id": "my-1",
                "request": {"ContinueFromRawPrompt": {"max_tokens": 16, "raw_prompt": "Once"}},
            }
        },
    ),
    (
        ClientFrame,
        Notification(StopRespondingTo("my-1")),
        {"Notification": {"StopRespondingTo": "my-1"}},
    ),
    (
        ClientFrame,
        Error("my-1", StreamError(1, "text")),
        {"Error": {"request_id": "my-1", "error": {"code": 1, "description": "text"}}},
    ),
    (DesiredState, DEFAULT_DESIRED_STATE, DEFAULT_STATE_JSON),
    (InferenceParameters, DEFAULT_PARAMETERS, DEFAULT_PARAMETERS_JSON),
    (
        ApplicableState,
        DEFAULT_DESIRED_STATE.applicable(),
        {name: value for name, value in DEFAULT_STATE_JSON.items() if name != "use_chat_template_override"},
    ),
    (ModelSource, "None", "None"),
    (
        ModelSource,
        HuggingFaceModel(filename="a.gguf", repo_id="owner/repo", revision="main"),
        {"HuggingFace": {"filename": "a.gguf", "repo_id": "owner/repo", "revision": "main"}},
    ),
    (ModelSource, LocalModel("/path/file.gguf"), {"LocalToAgent": "/path/file.gguf"}),
    (ModelSource, UrlModel("https://host/a.gguf"), {"Url": {"url": "https://host/a.gguf"}}),
    (
        AgentIssue,
        ModelFileDoesNotExist("/models/none.gguf"),
        {"ModelFileDoesNotExist": {"model_path": "/models/none.gguf"}},
    ),
    (
        AgentIssue,
        ChatTemplateDoesNotCompile("syntax error", ModelPath("/models/a.gguf"), "{{ oops"),
        {
            "ChatTemplateDoesNotCompile": {
                "error": "syntax error",
                "model_path": {"model_path": "/models/a.gguf"},
                "template_content": "{{ oops",
            }
        },
    ),
    (AgentsSnapshot, AgentsSnapshot((AGENT,)), {"agents": [AGENT_JSON]}),
    (BufferedRequestsSnapshot, BufferedRequestsSnapshot(0), {"buffered_requests_current": 0}),
    (
        ModelMetadata,
        ModelMetadata({"general.architecture": "llama"}),
        {"metadata": {"general.architecture": "llama"}},
    ),
    (
        Terminal,
        Done(Usage(prompt_tokens=12, cached_prompt_tokens=8, content_tokens=5)),
        {"Done": {"usage": USAGE_JSON}},
    ),
    (Terminal, SamplerError("no candidate left"), {"SamplerError": "no candidate left"}),
    (
        Terminal,
        ImageExceedsBatchSize(400, 64),
        {"ImageExceedsBatchSize": {"image_tokens": 400, "n_batch": 64}},
    ),
    (BalancerFrame, Welcome(1, "0.1.0"), {"Welcome": {"protocol": 1, "version": "0.1.0"}}),
    (
        BalancerFrame,
        Generate(5, ContinueFromRawPrompt(1, "x")),
        {
            "Generate": {
                "request": 5,
                "body": {"ContinueFromRawPrompt": {"max_tokens": 1, "raw_prompt": "x"}},
            }
        },
    ),
    (BalancerFrame, Part(5, "{", last=False), {"Part": {"request": 5, "text": "{", "last": False}}),
    (BalancerFrame, Stop(5), {"Stop": {"request": 5}}),
    (BalancerFrame, Heartbeat(), "Heartbeat"),
    (AgentFrame, Heartbeat(), "Heartbeat"),
    (AgentFrame, Goodbye(), "Goodbye"),
]


@pytest.mark.parametrize(("form", "message", "value"), BOTH_WAYS)
def test_a_message_has_its_documented_shape(form: Any, message: Any, value: Any) -> None:
    assert unstructure(message, form) == value
    assert structure(value, form) == message


@pytest.mark.scenario("GE-8")
@pytest.mark.parametrize(
    ("form", "value", "message"),
    [
        (
            ContinueFromConversationHistory,
            {
                "add_generation_prompt": True,
                "conversation_history": [],
                "enable_thinking": False,
                "max_tokens": 20,
            },
            ContinueFromConversationHistory(True, (), False, 20, None, False, ()),
        ),
        (
            ContinueFromRawPrompt,
            {"max_tokens": 5, "raw_prompt": "x"},
            ContinueFromRawPrompt(5, "x", None),
        ),
        (
            ContinueFromRawPrompt,
            {"max_tokens": -1, "raw_prompt": "x"},
            ContinueFromRawPrompt(-1, "x", None),
        ),
        (
            Tool,
            {"type": "function", "function": {"name": "a", "description": "", "parameters": None}},
            Tool(type="function", function=ToolFunction("a", "", None)),
        ),
        (
            DesiredState,
            {name: value for name, value in DEFAULT_STATE_JSON.items() if name != "chat_template_override"},
            DEFAULT_DESIRED_STATE,
        ),
        (
            InferenceParameters,
            {**DEFAULT_PARAMETERS_JSON, "temperature": 1},
            attrs.evolve(DEFAULT_PARAMETERS, temperature=1.0),
        ),
        (Usage, {"prompt_tokens": 3}, Usage(prompt_tokens=3)),
    ],
    ids=["conversation", "raw prompt", "null grammar", "tool", "state", "whole float", "usage"],
)
def test_what_may_be_left_out_reads_as_its_default(form: Any, value: Any, message: Any) -> None:
    assert structure(value, form) == message


def test_the_envelopes_of_a_stream_are_as_documented() -> None:
    token = response_envelope(
        generated_by=None, request_id="r", response={"GeneratedToken": {"ContentToken": "Hi"}}
    )
    assert token == {
        "Response": {
            "generated_by": None,
            "request_id": "r",
            "response": {"GeneratedToken": {"ContentToken": "Hi"}},
        }
    }
    error = error_envelope(request_id="r", error=StreamError(504, "too late"))
    assert error == {"Error": {"error": {"code": 504, "description": "too late"}, "request_id": "r"}}


def test_server_notifications_are_bare_words() -> None:
    assert [str(word) for word in ServerNotification] == [
        "TokenGenerationDisabled",
        "TokenGenerationEnabled",
    ]


def test_the_deterministic_preset_is_greedy_and_otherwise_default() -> None:
    assert unstructure(DETERMINISTIC_PARAMETERS) == DEFAULT_PARAMETERS_JSON | {
        "min_p": 0.0,
        "penalty_frequency": 0.0,
        "penalty_presence": 0.0,
        "penalty_repeat": 1.0,
        "temperature": 0.0,
        "top_k": 1,
        "top_p": 1.0,
    }


def test_an_override_is_applicable_only_when_its_flag_is_on() -> None:
    stored = attrs.evolve(DEFAULT_DESIRED_STATE, chat_template_override=ChatTemplate("{{ x }}"))
    assert stored.applicable().chat_template_override is None
    used = attrs.evolve(stored, use_chat_template_override=True)
    assert used.applicable().chat_template_override == ChatTemplate("{{ x }}")


@pytest.mark.scenario("SD-9")
@pytest.mark.parametrize("field", ["image_resize_to_fit", "embedding_batch_size"])
def test_a_parameter_that_must_be_positive_is_named_when_it_is_zero(field: str) -> None:
    parameters = structure({**DEFAULT_PARAMETERS_JSON, field: 0}, InferenceParameters)
    state = attrs.evolve(DEFAULT_DESIRED_STATE, inference_parameters=parameters)
    assert invalid_parameter(state) == f"{field} must be greater than zero"
    assert invalid_parameter(DEFAULT_DESIRED_STATE) is None


LORA_JSON = [
    {"source": {"LocalToAgent": "/a.gguf"}, "scale": 0.5},
    {"source": {"HuggingFace": {"filename": "f", "repo_id": "r", "revision": "main"}}, "scale": 1.0},
    {"source": {"Url": {"url": "https://example.com/a.gguf"}}, "scale": -100.0},
]


def test_lora_adapters_are_written_only_where_there_are_some() -> None:
    for plain in (DEFAULT_DESIRED_STATE, DEFAULT_DESIRED_STATE.applicable()):
        assert "lora_adapters" not in unstructure(plain)
    state = structure(DEFAULT_STATE_JSON | {"lora_adapters": LORA_JSON}, DesiredState)
    assert state.lora_adapters == (
        LoraAdapter(LocalModel("/a.gguf"), 0.5),
        LoraAdapter(HuggingFaceModel("f", "r", "main"), 1.0),
        LoraAdapter(UrlModel("https://example.com/a.gguf"), -100.0),
    )
    assert unstructure(state) == DEFAULT_STATE_JSON | {"lora_adapters": LORA_JSON}
    assert unstructure(state.applicable())["lora_adapters"] == LORA_JSON
    without = structure(DEFAULT_STATE_JSON | {"lora_adapters": []}, DesiredState)
    assert without == DEFAULT_DESIRED_STATE
    assert unstructure(without) == DEFAULT_STATE_JSON


def test_a_scale_that_is_left_out_is_one() -> None:
    assert structure({"source": {"LocalToAgent": "/a"}}, LoraAdapter).scale == 1.0


def test_more_than_sixteen_lora_adapters_are_refused() -> None:
    adapters = (LoraAdapter(LocalModel("/a.gguf")),) * 17
    state = attrs.evolve(DEFAULT_DESIRED_STATE, lora_adapters=adapters)
    assert invalid_parameter(state) == "lora_adapters must be at most 16"
    assert invalid_parameter(attrs.evolve(state, lora_adapters=adapters[:16])) is None


def test_issues_are_sorted_by_name_and_then_by_what_they_say() -> None:
    issues: set[AgentIssue] = {
        SlotCannotStart("b", 1),
        SlotCannotStart("b", 0),
        SlotCannotStart("a", 2),
        ModelCannotBeLoaded("/z"),
        ModelFileDoesNotExist("/a"),
    }
    assert sorted_issues(issues) == (
        ModelCannotBeLoaded("/z"),
        ModelFileDoesNotExist("/a"),
        SlotCannotStart("a", 2),
        SlotCannotStart("b", 0),
        SlotCannotStart("b", 1),
    )


def test_a_required_tool_argument_must_be_declared_when_arguments_are_listed() -> None:
    def request(properties: dict[str, Any] | None, required: tuple[str, ...] | None) -> Any:
        parameters = ToolParameters(type="object", properties=properties, required=required)
        tool = Tool(type="function", function=ToolFunction("t", "", parameters))
        return attrs.evolve(CONVERSATION, tools=(WEATHER_TOOL, tool))

    assert undeclared_required_field(CONVERSATION) is None
    assert undeclared_required_field(request(None, ("city",))) is None
    assert undeclared_required_field(request({}, None)) is None
    assert undeclared_required_field(request({"city": {}}, ("city",))) is None
    assert undeclared_required_field(request({"city": {}}, ("city", "unit"))) == "unit"
    assert undeclared_required_field(ContinueFromRawPrompt(1, "x")) is None
