"""A reward from a judge: any address that speaks OpenAI's chat completions, a second vLLM too.

    vllm serve Qwen/Qwen3-1.7B --port 8001
    torchrun --nproc_per_node=3 grpo.py --task=examples/judge.py:Judged --model=... \
        --task_data=prompts.jsonl --task_settings.address=http://127.0.0.1:8001/v1

All replies of a batch are asked for at once, at most `at_once` in flight, so that the server
batches them. A call has `patience` seconds and is tried three times (keep three of them below
--task_seconds); a judge that still says no number costs the reply its reward (NaN would end the
run), and is counted in `reward/asked`. A model that thinks is asked not to.
"""

import asyncio
import json
import os
import re
import urllib.request
from http.client import HTTPException

from tasks import Episode, Task, read_examples

QUESTION = """Rate the reply to the request from 0 (useless) to 10 (perfect). Answer with a number.

Request: {prompt}

Reply: {reply}"""


class Judged(Task):
    address: str = "http://127.0.0.1:8001/v1"
    judge: str = ""  # its model's name there; empty: the first that it lists
    question: str = QUESTION
    at_once: int = 64
    patience: float = 15.0
    weights = {"asked": 0.0}  # logged, and not rewarded

    def __init__(self, cfg):
        super().__init__(cfg)
        self.rewards, self.free = [self.rated, self.asked], asyncio.Semaphore(self.at_once)
        problems = [e for _, e in read_examples(cfg.task_data, "train")]
        held = max(len(problems) // 10, 1)
        self.train, self.heldout = problems[held:], problems[:held]

    async def rated(self, episode: Episode) -> float:
        """0 to 1, as the judge says; 0 if it does not say a number."""
        asked = self.question.format(prompt=episode.problem["prompt"], reply=episode.text)
        for wait in (0.5, 2.0, None):
            try:
                async with self.free:
                    said = await asyncio.to_thread(self.complete, asked)
                number = float(re.search(r"\d+(?:\.\d+)?", said)[0])
                episode.state["asked"] = 1.0
                return min(number, 10.0) / 10
            # No answer, or one that says no number.
            except (OSError, HTTPException, ValueError, KeyError, IndexError, TypeError):
                if wait:
                    await asyncio.sleep(wait)
        return 0.0

    def asked(self, episode: Episode) -> float:
        """1 if the judge has answered."""
        return episode.state.get("asked", 0.0)

    def complete(self, text: str) -> str:
        if not self.judge:
            self.judge = self.call("models")["data"][0]["id"]
        chat = [{"role": "user", "content": text}]
        body = {"model": self.judge, "messages": chat, "temperature": 0, "max_tokens": 16}
        body["chat_template_kwargs"] = {"enable_thinking": False}
        return self.call("chat/completions", body)["choices"][0]["message"]["content"]

    def call(self, what: str, body: dict | None = None) -> dict:
        head = {"Content-Type": "application/json"}
        if key := os.environ.get("JUDGE_KEY"):
            head["Authorization"] = f"Bearer {key}"
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(f"{self.address}/{what}", data, head)
        with urllib.request.urlopen(request, timeout=self.patience) as answer:
            return json.load(answer)
