"""Any OpenEnv server (`pip install openenv`), one session an episode, over a WebSocket.

    openenv init echo_game && cd echo_game && python -m uvicorn server.app:app --port 8000
    torchrun --nproc_per_node=3 grpo.py --task=examples/openenv_game.py:OpenEnv --model=... \
        --task_settings.address=http://127.0.0.1:8000 --task_settings.action=message

Each turn of the policy is an action: JSON where it is an object, else the field `action` of one.
What the server observes is the next message, as JSON. The server pays by turns. One that
`openenv init` made lets one session in: raise max_concurrent_envs there, and `sessions` here;
episodes wait for theirs within task_seconds.
"""

import asyncio
import json

from runtime import UserError
from tasks import Episode, Task

try:
    from openenv.core.generic_client import GenericEnvClient
except ImportError:
    raise UserError("OpenEnv is not installed: pip install openenv") from None


class OpenEnv(Task):
    system = "Play the game. Each of your messages is one action."
    address: str = "http://127.0.0.1:8000"
    action: str = "message"  # the field of an action that takes a turn's text
    sessions: int = 1  # at once
    seeds: int = 1024  # different episodes to train on

    def __init__(self, cfg):
        super().__init__(cfg)
        self.rewards, self.free = [self.paid], asyncio.Semaphore(self.sessions)
        self.train = [{"prompt": f"episode {i}", "seed": i} for i in range(self.seeds)]
        self.heldout = [{"prompt": f"episode {i}", "seed": -i} for i in range(1, 129)]

    async def start(self, episode: Episode) -> str:
        """Begin the episode of this seed on the server; its first observation is the prompt."""
        await self.free.acquire()
        client = GenericEnvClient(base_url=self.address)
        episode.state |= {"client": client, "paid": []}
        await client.connect()
        result = await client.reset(seed=abs(episode.problem["seed"]))
        return json.dumps(result.observation)

    async def reply(self, episode: Episode) -> str | None:
        text = episode.turns[-1]
        try:
            action = json.loads(text)
        except ValueError:
            action = None
        action = action if isinstance(action, dict) else {self.action: text}
        result = await episode.state["client"].step(action)
        episode.state["paid"].append(float(result.reward or 0.0))
        return None if result.done else json.dumps(result.observation)

    async def paid(self, episode: Episode) -> list[float]:
        """What the server paid for each turn; a turn that was cut off was no action. Ends the
        session."""
        paid, client = episode.state["paid"], episode.state.pop("client", None)
        if client:
            await client.close()
            self.free.release()
        return paid + [0.0] * (len(episode.turns[::2]) - len(paid))
