"""What requests run on: a loaded engine, and what its model needs from the agent."""

from collections.abc import Mapping
from typing import Protocol

import attrs

from paddler.engine.pipe import GrammarRule, Picture, SamplerSettings
from paddler.language.reasoning_formats import Markers
from paddler.language.tool_formats import FALLBACK, ToolFormat
from paddler.messages.inference import ContinueFromRawPrompt, NormalizationMethod, TokenRequest
from paddler.messages.state import InferenceParameters


class Engine(Protocol):
    """What slots need of a loaded engine; none of the calls blocks."""

    def generate(
        self,
        generation: int,
        *,
        prompt: str,
        max_tokens: int,
        sampler: SamplerSettings | None,
        grammar: GrammarRule | None,
        pictures: tuple[Picture, ...],
    ) -> None: ...

    def embed(
        self, generation: int, *, documents: tuple[str, ...], normalization_method: NormalizationMethod
    ) -> None: ...

    def cancel(self, generation: int) -> None: ...


@attrs.frozen(eq=False, kw_only=True)
class Serving:
    """One loaded model."""

    engine: Engine
    parameters: InferenceParameters
    chat_template: str | None
    special_tokens: Mapping[str, str]
    """`bos_token`, `eos_token`, `nl_token`, as templates know them."""
    markers: Markers | None
    tool_format: ToolFormat
    control_tokens: Mapping[int, str]
    supports_images: bool
    most_image_tokens: int
    """The largest image that the engine takes."""

    def tool_format_for(self, body: TokenRequest) -> ToolFormat | None:
        """Return how this request's calls are written; None where the model is told of no tools."""
        if isinstance(body, ContinueFromRawPrompt) or not body.tools or body.tool_choice == "none":
            return None
        if body.tool_choice != "auto" and self.tool_format.written is None:
            return FALLBACK  # no grammar is known that would force the model's own
        return self.tool_format

    @property
    def enable_embeddings(self) -> bool:
        return self.parameters.enable_embeddings
