"""How a model plays blackjack: its odds of taking a card beside the best play, and what both win.

    python benchmarks/blackjack.py runs/blackjack_sft/model runs/blackjack/model

One line a total, one number a dealer's open card (2 to 10, ace); `!` where the best play is
another. Then all held-out deals, greedy and sampled: reward an episode of four hands, share of
hands won, how often a choice is the best one, and the difference to the best play, deal by deal.
"""

import functools
import pathlib
import random
import statistics
import sys
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from examples.blackjack import Blackjack, hits, stands
from tasks import Episode

UP = "234567890x"


def best(seen: str) -> str:
    total, soft, up = int(seen[-2:]), seen[-3] == "*", UP.index(seen[-4]) + 2
    return ".+"[hits(total, soft, up) > stands(total, (up, up == 11))]


def chances(model, tokenizer, texts: list[str]) -> list[list[float]]:
    """The chance of a card and of none at the end of each text."""
    moves = [tokenizer.encode(move, add_special_tokens=False)[0] for move in "+."]
    rows, found = [tokenizer.encode(text) for text in texts], [None] * len(texts)
    for size in {len(row) for row in rows}:
        same = [i for i, row in enumerate(rows) if len(row) == size]
        logits = model(torch.tensor([rows[i] for i in same])).logits[:, -1].float()
        for i, odds in zip(same, logits.softmax(-1)[:, moves].tolist(), strict=True):
            found[i] = odds
    return found


def played(game, choose) -> tuple[list[float], list[float], float]:
    """Rewards and shares won of the held-out episodes, and how many choices are the best ones."""
    episodes, right = [Episode(problem) for problem in game.heldout], []
    seen = {i: episode.problem["prompt"] for i, episode in enumerate(episodes)}
    while seen:
        for i, move in zip([*seen], choose([*seen.values()]), strict=True):
            right.append(move == best(seen[i]))
            episodes[i].turns.append(move)
            said = game.reply(episodes[i])
            seen[i] += move + (said or "")
            if said is None:
                del seen[i]
            else:
                episodes[i].turns.append(said)
    rewards = [sum(game.won(episode)) for episode in episodes]
    return rewards, [game.wins(episode) for episode in episodes], statistics.mean(right)


def mean(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} +- {statistics.stdev(values) / len(values) ** 0.5:.3f}"


@torch.no_grad()
def judge(folder: str, game, limit: list[float]):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    odds = functools.partial(chances, model, AutoTokenizer.from_pretrained(folder))
    print(f"\n{folder}")
    for shown in [f"/{n:02d}" for n in range(4, 22)] + [f"*{n}" for n in range(12, 22)]:
        seen = [up + shown for up in UP]
        cells = zip(seen, odds(seen), strict=True)
        print(shown, *(f"{a:.2f}{' !'[best(s) != '.+'[a > b]]}" for s, (a, b) in cells))
    rng, players = random.Random(0), {}
    players["greedy"] = lambda seen: (".+"[a > b] for a, b in odds(seen))
    players["sampled"] = lambda seen: (".+"[rng.random() * (a + b) < a] for a, b in odds(seen))
    for name, choose in players.items():
        reward, wins, right = played(game, choose)
        below = mean([a - b for a, b in zip(limit, reward, strict=True)])
        print(f"{name}: reward {mean(reward)} ({below} below the best), won {mean(wins)};")
        print(f"  {right:.1%} of the choices are the best play's")


if __name__ == "__main__":
    torch.set_num_threads(1)
    game = Blackjack(SimpleNamespace(seed=0))
    limit, wins, _ = played(game, lambda seen: map(best, seen))
    print(f"the best play on {len(limit)} held-out deals: reward {mean(limit)}, won {mean(wins)}")
    for folder in sys.argv[1:]:
        judge(folder, game, limit)
