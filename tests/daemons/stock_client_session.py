"""Call everything the stock client offers, once, and print what it saw as one line of JSON."""

import asyncio
import json
import sys
from typing import Any

from paddler_client.agent_controller_pool_snapshot import AgentControllerPoolSnapshot
from paddler_client.client_inference import ClientInference
from paddler_client.client_management import ClientManagement
from paddler_client.continue_from_conversation_history_params import ContinueFromConversationHistoryParams
from paddler_client.continue_from_raw_prompt_params import ContinueFromRawPromptParams
from paddler_client.conversation_message import ConversationMessage

PROMPT = "<|im_start|>user\nCount to 40.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


async def text_of(stream: Any) -> str:
    """Join the tokens of a stream; anything that is neither a token nor `Done` is an error."""
    texts: list[str] = []
    async for message in stream:
        if message.is_done:
            assert message.summary.usage.completion_tokens >= len(texts)
            return "".join(texts)
        assert message.is_token, message
        texts.append(message.token)
    raise AssertionError("the stream ended without `Done`")


def agents_of(snapshot: AgentControllerPoolSnapshot) -> list[dict[str, Any]]:
    return [agent.model_dump(mode="json") for agent in snapshot.agents]


async def main(inference_url: str, management_url: str) -> None:
    conversation = ContinueFromConversationHistoryParams(
        add_generation_prompt=True,
        conversation_history=[ConversationMessage(role="user", content="Hello")],
        enable_thinking=False,
        max_tokens=32,
    )
    raw_prompt = ContinueFromRawPromptParams(max_tokens=16, raw_prompt=PROMPT)
    seen: dict[str, Any] = {}
    async with ClientInference(inference_url) as inference, ClientManagement(management_url) as management:
        seen["health"] = [await inference.get_health(), await management.get_health()]
        seen["conversation"] = await text_of(inference.post_continue_from_conversation_history(conversation))
        seen["socket conversation"] = await text_of(
            await inference.continue_from_conversation_history(conversation)
        )
        seen["raw prompt"] = await text_of(await inference.continue_from_raw_prompt(raw_prompt))

        snapshot = await management.get_agents()
        seen["agents"] = agents_of(snapshot)
        state = await management.get_balancer_desired_state()
        await management.put_balancer_desired_state(state)
        again = await management.get_balancer_desired_state()
        assert again == state
        seen["temperature"] = again.inference_parameters.temperature
        seen["metrics"] = await management.get_metrics()
        [agent] = snapshot.agents
        assert await management.get_chat_template_override(agent.id) is None
        metadata = await management.get_model_metadata(agent.id)
        assert metadata is not None
        seen["metadata"] = metadata.metadata["general.architecture"]
        seen["buffered"] = [(await management.get_buffered_requests()).buffered_requests_current]
        async for buffered in management.buffered_requests_stream():
            seen["buffered"].append(buffered.buffered_requests_current)
            break
        async for agents in management.agents_stream():
            seen["first agents event"] = agents_of(agents)
            break
    print(json.dumps(seen))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
