"""What stands between a token request and its generation: checked, converted, decoded, rendered.

The order of the checks decides which of several refusals a client sees (behaviour §8.1).
"""

from typing import Any

import attrs

from paddler.agent.preparation import Preparer
from paddler.agent.refusals import (
    conversation_characters,
    image_urls,
    refuse_early,
    refuse_long,
)
from paddler.agent.serving import Serving
from paddler.engine.pipe import GrammarRule, Picture, SamplerSettings
from paddler.language.chat_template import Prompt, template_variables
from paddler.language.reasoning_formats import section_after
from paddler.language.required_calls import required_call_grammar, schemas_needed
from paddler.language.tag_values import CallNotForced
from paddler.messages.inference import (
    ContinueFromConversationHistory,
    ContinueFromRawPrompt,
    GbnfGrammar,
    Grammar,
    TokenRequest,
    Tool,
)
from paddler.messages.sampling import Sampling
from paddler.messages.state import InferenceParameters
from paddler.messages.tokens import (
    TOKEN_GENERATION_DISABLED_TEXT,
    GrammarSyntaxError,
    MultimodalNotSupported,
    Section,
    Terminal,
    TokenGenerationDisabled,
)


@attrs.frozen
class PreparedTokens:
    """All that the engine needs to know of a request."""

    prompt: Prompt
    sampler: SamplerSettings | None = None
    grammar: GrammarRule | None = None
    pictures: tuple[Picture, ...] = ()


async def prepare_tokens(
    body: TokenRequest, serving: Serving, preparer: Preparer
) -> PreparedTokens | Terminal:
    """Return what to generate from, or the terminal that refuses the request."""
    refusal = refuse_early(body)
    if refusal is not None:
        return refusal
    if serving.enable_embeddings:
        return TokenGenerationDisabled(TOKEN_GENERATION_DISABLED_TEXT)
    grammar = await _grammar_of(body.grammar, preparer)
    if not isinstance(grammar, GrammarRule | None):
        return grammar
    prepared = PreparedTokens(
        prompt=Prompt("", ""), sampler=sampler_settings(serving.parameters, body.sampling), grammar=grammar
    )
    if isinstance(body, ContinueFromRawPrompt):
        # Markers anywhere in a raw prompt decide the section.
        prompt = Prompt(body.raw_prompt, body.raw_prompt)
        return refuse_long(len(prompt.text)) or attrs.evolve(prepared, prompt=prompt)
    return await _prepare_conversation(body, prepared, serving, preparer)


async def _prepare_conversation(
    body: ContinueFromConversationHistory, prepared: PreparedTokens, serving: Serving, preparer: Preparer
) -> PreparedTokens | Terminal:
    urls = [*image_urls(body)]
    pictures = await preparer.pictures(urls, resize_to_fit=serving.parameters.image_resize_to_fit)
    if not isinstance(pictures, list):
        return pictures
    if serving.chat_template is None:
        return TokenGenerationDisabled(TOKEN_GENERATION_DISABLED_TEXT)
    # Packing a text that no template makes shorter would only hold everybody up.
    refusal = refuse_long(conversation_characters(body))
    if refusal is not None:
        return refusal
    variables = template_variables(body) | dict(serving.special_tokens)
    if body.tool_choice == "none":
        variables["tools"] = []
    prompt = await preparer.render(serving.chat_template, variables)
    if not isinstance(prompt, Prompt):
        return prompt
    refusal = refuse_long(len(prompt.text))
    if refusal is not None:
        return refusal
    if pictures and not serving.supports_images:
        return MultimodalNotSupported("the request has an image, but no multimodal projection is loaded")
    prepared = attrs.evolve(prepared, prompt=prompt, pictures=tuple(pictures))
    return await _with_tools(body, prepared, variables["tools"], serving, preparer)


async def _with_tools(
    body: ContinueFromConversationHistory,
    prepared: PreparedTokens,
    tools: list[Any],
    serving: Serving,
    preparer: Preparer,
) -> PreparedTokens | Terminal:
    """Check the tools' schemas, and bind the answer to a call where one is required."""
    is_call_required = body.tool_choice not in ("auto", "none")
    if tools and (body.parse_tool_calls or is_call_required):
        invalid = await preparer.tool_schema_error(tools)
        if invalid is not None:
            return invalid
    if not is_call_required:
        return prepared
    rule = await _required_call(body, prepared.prompt, serving, preparer)
    return attrs.evolve(prepared, grammar=rule) if isinstance(rule, GrammarRule) else rule


async def _required_call(
    body: ContinueFromConversationHistory, prompt: Prompt, serving: Serving, preparer: Preparer
) -> GrammarRule | Terminal:
    """Return the grammar of an answer that is a call; thinking that the prompt has begun may end first."""
    converted: dict[str, str] = {}
    tool_format = serving.tool_format_for(body)
    for tool in body.tools:
        try:
            schemas = schemas_needed(tool_format, [tool], body.tool_choice)
        except CallNotForced as reason:
            return _no_grammar_of(tool, GrammarSyntaxError(str(reason)))
        for schema in schemas:
            gbnf = converted.get(schema) or await preparer.gbnf_of_schema(schema)
            if not isinstance(gbnf, str):
                return _no_grammar_of(tool, gbnf)
            converted[schema] = gbnf
    grammar = required_call_grammar(tool_format, body.tools, body.tool_choice, converted.__getitem__)
    assert grammar is not None, "admission lets no choice pass that cannot be honoured"
    thinks = section_after(prompt.suffix, serving.markers) is Section.REASONING
    begins_after = serving.markers.closing if thinks and serving.markers is not None else ()
    return GrammarRule(*grammar, begins_after=begins_after)


def _no_grammar_of(tool: Tool, error: GrammarSyntaxError) -> GrammarSyntaxError:
    """Say whose schema it was: the client did not send a grammar."""
    return GrammarSyntaxError(
        "`tool_choice` requires a call, and no grammar can be made of the parameters of "
        f"tool '{tool.function.name[:100]}': {error.payload}"
    )


async def _grammar_of(grammar: Grammar | None, preparer: Preparer) -> GrammarRule | Terminal | None:
    if grammar is None:
        return None
    if isinstance(grammar, GbnfGrammar):
        return GrammarRule(grammar.grammar, grammar.root)
    gbnf = await preparer.gbnf_of_schema(grammar.schema)
    return GrammarRule(gbnf, "root") if isinstance(gbnf, str) else gbnf


def sampler_settings(parameters: InferenceParameters, sampling: Sampling | None) -> SamplerSettings | None:
    """Return the cluster's parameters with what a request has of its own, or None when it has nothing."""
    if sampling is None:
        return None
    names = (
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "penalty_repeat",
        "penalty_frequency",
        "penalty_presence",
        "penalty_last_n",
    )
    own = {name: getattr(sampling, name) for name in names}
    return SamplerSettings(
        **{name: getattr(parameters, name) if value is None else value for name, value in own.items()},
        seed=sampling.seed,
        stop=sampling.stop,
        logit_bias={int(token): bias for token, bias in (sampling.logit_bias or {}).items()},
        top_logprobs=sampling.top_logprobs if sampling.logprobs else None,
        ignore_eos=sampling.ignore_eos,
    )
