"""Any environment of verifiers (`pip install verifiers`), single-turn, multi-turn or with tools.

    torchrun --nproc_per_node=3 grpo.py --task=examples/verifiers_env.py:Verifiers --model=... \
        --task_settings.environment=my_module:load_environment

verifiers drives its own rollout and asks a client for the model's messages. Here the client hands
what it is asked to the engine, and the policy's turn back: so everything that an environment does
between two messages runs as it is, and its rubric gives the reward. Messages that were said before
must stay as they were, or the episode could not be exact to the token.
"""

import asyncio
import importlib
import time

from runtime import UserError
from tasks import Episode, Task

try:
    from verifiers.clients.client import Client
    from verifiers.types import Response, ResponseMessage
except ImportError:
    raise UserError("verifiers is not installed: pip install verifiers") from None


class Policy(Client):
    """What verifiers takes for a model: two queues."""

    def __init__(self):
        self.asked, self.said = asyncio.Queue(), asyncio.Queue()

    async def get_response(self, prompt, model, sampling_args, tools=None, **more) -> Response:
        await self.asked.put([m if isinstance(m, dict) else m.model_dump() for m in prompt])
        how = {"finish_reason": "stop", "is_truncated": False}
        message = ResponseMessage(content=await self.said.get(), **how)
        return Response(id="0", created=int(time.time()), model=model, message=message)

    setup_client = to_native_tool = to_native_prompt = get_native_response = None
    raise_from_native_response = from_native_response = close = None


class Verifiers(Task):
    environment: str = ""  # module:function that makes it

    def __init__(self, cfg):
        super().__init__(cfg)
        self.rewards = [self.rubric]
        module, _, name = self.environment.partition(":")
        try:
            made = getattr(importlib.import_module(module), name or "load_environment")
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"task_settings.environment={self.environment}: {error}") from None
        self.env = made()
        examples = [{**e, "prompt": simple(e["prompt"])} for e in self.env.get_dataset()]
        held = max(len(examples) // 10, 1)
        self.train, self.heldout = examples[held:], examples[:held]

    async def start(self, episode: Episode) -> list[dict]:
        client, given = Policy(), {k: v for k, v in episode.problem.items() if k != "tokens"}
        rollout = asyncio.ensure_future(self.env.rollout(given, client, "policy"))
        episode.state |= {"client": client, "rollout": rollout, "seen": 0}
        return await self.asked(episode)

    async def reply(self, episode: Episode) -> list[dict] | None:
        await episode.state["client"].said.put(episode.turns[-1])
        return await self.asked(episode)

    async def asked(self, episode: Episode) -> list[dict] | None:
        """The messages since the policy's last one, or None when the rollout has ended."""
        state = episode.state
        question = asyncio.ensure_future(state["client"].asked.get())
        ends = (question, state["rollout"])
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if not question.done():
            question.cancel()
            return None
        messages, seen = simple(question.result()), state["seen"]
        state["seen"] = len(messages) + 1  # the policy's own comes next
        return messages[seen:]

    async def rubric(self, episode: Episode) -> float:
        """The environment's own reward. An episode that was cut off is worth nothing."""
        rollout = episode.state.pop("rollout")
        if not rollout.done():
            rollout.cancel()
            return 0.0
        state = await rollout
        await self.env.rubric.score_rollout(state)
        return float(state["reward"])


def simple(messages: list) -> list[dict]:
    return [{"role": m["role"], "content": str(m["content"])} for m in messages]
