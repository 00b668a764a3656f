"""Makes the sampler of each generation, as its request or the state wants it."""

from paddler.engine import llama
from paddler.engine.grammars import Grammars
from paddler.engine.pipe import Generate, ModelDescription
from paddler.engine.sampling import Sampler, settings_of
from paddler.engine.sequences import Ids
from paddler.messages.state import InferenceParameters


class Samplers:
    """The samplers of one model."""

    def __init__(
        self, model: llama.Model, description: ModelDescription, parameters: InferenceParameters
    ) -> None:
        self._model = model
        self._control_tokens = description.control_tokens
        self._n_vocab = description.n_vocab
        self._default = settings_of(parameters)
        self._grammars = Grammars(
            n_vocab=description.n_vocab,
            pieces=model.pieces,
            control_tokens=description.control_tokens,
            end_tokens=model.end_tokens,
        )

    def make(self, command: Generate, prompt: Ids) -> Sampler:
        """Return a sampler for what follows a prompt. Raises GenerationRefused."""
        return Sampler(
            command.sampler or self._default,
            prompt,
            n_vocab=self._n_vocab,
            end_tokens=self._model.end_tokens,
            text_of=self._text_of,
            grammar=None if command.grammar is None else self._grammars.open(command.grammar),
        )

    def _text_of(self, token: int) -> str:
        control = self._control_tokens.get(token)
        return self._model.pieces[token].decode(errors="replace") if control is None else control
