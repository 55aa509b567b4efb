"""Blackjack, some hands an episode: hidden cards, a reward for each hand; the best play is known.

    torchrun --nproc_per_node=1 sft.py --task=examples/blackjack.py:Blackjack --steps=200 \
        --max_tokens=160 --run_dir=runs/blackjack_sft
    torchrun --nproc_per_node=1 grpo.py --config=configs/grpo/blackjack.yaml

`9/16` is the dealer's 9 against a total of 16 (`9*16`: with an ace as 11; 0 is a ten, x an ace);
`+` takes a card, `.` none: `9/16+ 9/19.#1 4/12` is a hand that won, and the next. A hand pays 1, 0
or -1; what is no move loses all that are left. A group's replies get the same hidden cards.
"""

import functools
import random

from tasks import Episode, Task

CARDS = [2, 3, 4, 5, 6, 7, 8, 9, 10, 10, 10, 10, 11]


def add(total: int, soft: bool, card: int) -> tuple[int, bool]:
    """A hand with one more card; `soft` if an ace in it counts 11."""
    total, aces = total + card, soft + (card == 11)
    while total > 21 and aces:
        total, aces = total - 10, aces - 1
    return total, aces > 0


def card(deal: str, who: str, number: int) -> int:
    return random.Random(f"{deal}/{who}/{number}").choice(CARDS)


def begin(deal: str) -> tuple[int, bool]:
    return add(*add(0, False, card(deal, "player", 0)), card(deal, "player", 1))


def outcome(total: int, deal: str) -> int:
    """1, 0 or -1 for a player who stands: the dealer draws up to 17."""
    hand, number = (0, False), 0
    while hand[0] < 17:
        hand, number = add(*hand, card(deal, "dealer", number)), number + 1
    return 1 if hand[0] > 21 or total > hand[0] else -(total < hand[0])


@functools.cache
def stands(total: int, hand: tuple[int, bool]) -> float:
    """What standing on a total is worth when the dealer holds a hand."""
    if hand[0] >= 17:
        return 1.0 if hand[0] > 21 or total > hand[0] else -float(total < hand[0])
    return sum(stands(total, add(*hand, card)) for card in CARDS) / len(CARDS)


@functools.cache
def hits(total: int, soft: bool, up: int) -> float:
    """What taking a card is worth, with the best play after it."""
    later = [hand for hand in (add(total, soft, card) for card in CARDS) if hand[0] <= 21]
    worth = sum(max(stands(t, add(0, False, up)), hits(t, s, up)) for t, s in later)
    return (worth - (len(CARDS) - len(later))) / len(CARDS)  # the others lose


class Blackjack(Task):
    stop = "+."
    hands: int = 4  # of an episode
    weights = {"wins": 0.0}  # in the log alone

    def __init__(self, cfg):
        super().__init__(cfg)
        self.rewards = [self.won, self.wins]
        problems = [{"prompt": self.show(f"{i}/0"), "name": i} for i in range(8192 + 2048)]
        self.heldout, self.train = problems[:2048], problems[2048:]

    @staticmethod
    def show(deal: str, hand=None) -> str:
        """What the player sees: the dealer's open card and a hand; without one, the first."""
        total, soft = hand or begin(deal)
        return f"{'234567890x'[card(deal, 'dealer', 0) - 2]}{'/*'[soft]}{total:02d}"

    def reply(self, episode: Episode) -> str | None:
        """The next card, or how the hand ended and the next one; None after the last."""
        name, state, move = episode.problem["name"], episode.state, episode.turns[-1]
        number, paid = state.get("number", 0), state.setdefault("paid", [])
        deal = f"{name}/{number}"
        hand = state.get("hand") or begin(deal)
        if move not in ("+", "."):
            paid.append(float(number - self.hands))
            return None
        if move == "+":
            state["cards"] = state.get("cards", 1) + 1
            state["hand"] = hand = add(*hand, card(deal, "player", state["cards"]))
            if hand[0] <= 21:
                paid.append(0.0)
                return f" {self.show(deal, hand)}"
        result = -1 if hand[0] > 21 else outcome(hand[0], deal)
        paid.append(float(result))
        state |= {"number": number + 1, "hand": None, "cards": 1}
        return f"#{result} {self.show(f'{name}/{number + 1}')}" if number + 1 < self.hands else None

    def won(self, episode: Episode) -> list[float]:
        """What each turn has won; one that was cut off has won nothing."""
        paid = episode.state.get("paid", [])
        return paid + [0.0] * (len(episode.turns[::2]) - len(paid))

    def wins(self, episode: Episode) -> float:
        """The share of the hands that were won."""
        return episode.state.get("paid", []).count(1.0) / self.hands

    def play(self, problem: dict, move) -> tuple[list[tuple[str, bool]], float]:
        """An episode of the player `move(seen)`: pieces (text, whether its own), and its reward."""
        episode, said, pieces = Episode(problem), problem["prompt"], []
        while said is not None:
            pieces += [(said, False), (move(said), True)]
            episode.turns += [pieces[-1][0], ""]
            said = self.reply(Episode(problem, episode.turns[:-1], episode.state))
        return pieces, sum(episode.state["paid"])

    def demonstration(self, name: str, progress: float) -> list[tuple[str, bool]]:
        """For SFT: players who take too many cards, most where it is least wrong; RL stops them."""
        rng = random.Random(f"demonstration {name}")
        bold = lambda seen: (seen[-4] not in "23456") + (seen[-3] == "*")  # noqa: E731
        move = lambda seen: "+."[int(seen[-2:]) > rng.randint(6, 26) + 3 * bold(seen)]  # noqa: E731
        return self.play(rng.choice(self.train), move)[0]
