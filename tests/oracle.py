"""The engine's oracle: a sampler in plain torch and transformers. One row at a time, no cache, no
packing, no vLLM, and nothing of ours.

`environment(turns) -> tokens or None` is what the environment says after these turns.
"""

import torch
from transformers import AutoModelForCausalLM


class Oracle:
    """A model folder that scores given tokens, and decodes greedily, turn after turn."""

    def __init__(self, folder, stops: set[int], eos: set[int], temperature: float = 1.0):
        """`stops` end a turn of the policy, `eos` end the reply as well."""
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.stops, self.eos, self.temperature = stops | eos, eos, temperature

    @torch.no_grad()
    def score(self, tokens: list[int]) -> list[float]:
        """Log-prob of each token after those before it; 0 for the first."""
        logits = self.model(torch.tensor([tokens])).logits[0, :-1] / self.temperature
        chosen = torch.tensor(tokens[1:])[:, None]
        return [0.0, *logits.log_softmax(-1).gather(1, chosen)[:, 0].tolist()]

    def mask(self, reply: list[int], environment) -> list[bool]:
        """Which tokens of a given reply the policy sampled: all but the environment's."""
        turns, mask = [[]], []
        while len(mask) < len(reply):
            token = reply[len(mask)]
            mask.append(True)
            turns[-1].append(token)
            if token in self.stops and len(mask) < len(reply):
                turns += [environment(turns), []]
                mask += [False] * len(turns[-2])
        return mask

    @torch.no_grad()
    def turn(self, tokens: list[int], room: int) -> list[int]:
        """The policy's most likely tokens after these, up to a stop or `room` of them."""
        said = []
        while len(said) < room and (not said or said[-1] not in self.stops):
            said.append(int(self.model(torch.tensor([tokens + said])).logits[0, -1].argmax()))
        return said

    def reply(self, prompt: list[int], environment, max_new_tokens: int, max_turns: int):
        """Greedy. Returns the turns, the policy's and the environment's by turns, and whether the
        reply ended by itself.
        """
        turns = []
        for number in range(1, max_turns + 1):
            tokens = prompt + sum(turns, [])
            turns.append(self.turn(tokens, max_new_tokens + len(prompt) - len(tokens)))
            if turns[-1][-1] in self.eos:
                return turns, True
            if turns[-1][-1] not in self.stops or number == max_turns:
                return turns, False
            answer = environment(turns)
            if answer is None:
                return turns, True
            if sum(map(len, [*turns, answer])) >= max_new_tokens:  # no room for one token more
                return turns, False
            turns.append(answer)
