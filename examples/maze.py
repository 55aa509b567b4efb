"""A text maze: the map is hidden, the goal is not. The best possible play is the shortest way.

    torchrun --nproc_per_node=2 sft.py --task=examples/maze.py:Maze --steps=200 --max_tokens=160 \
        --run_dir=runs/maze_sft
    torchrun --nproc_per_node=3 grpo.py --config=configs/grpo/maze.yaml

`+2-1 268=` says that the goal is 2 to the right and 1 down, and that one can go 2 (down), 6 (right)
and 8 (up), as on a numeric keypad; the policy answers with one of these, for instance `6`. Into a
wall it stays where it is; a move is a move. The reward is the length of the shortest way over that
of its own, 0 if it never got there: 1 for the best play that knows the map.
"""

import collections
import random

from tasks import Episode, Task

MOVES = {"8": (0, 1), "2": (0, -1), "4": (-1, 0), "6": (1, 0)}
Cell = tuple[int, int]


def build(size: int, seed: str) -> dict[Cell, str]:
    """Cell -> the moves that are open there: a spanning tree, and some doors more."""
    rng, doors = random.Random(seed), collections.defaultdict(set)
    inside, edge = {(0, 0)}, [((0, 0), move) for move in MOVES]
    while edge:
        (x, y), move = edge.pop(rng.randrange(len(edge)))
        there = x + MOVES[move][0], y + MOVES[move][1]
        if min(there) < 0 or max(there) >= size or (there in inside and rng.random() < 0.6):
            continue
        doors[x, y].add(move)
        doors[there].add({"8": "2", "2": "8", "4": "6", "6": "4"}[move])
        if there not in inside:
            inside.add(there)
            edge += [(there, move) for move in MOVES]
    return {cell: "".join(sorted(moves)) for cell, moves in doors.items()}


def distances(doors: dict[Cell, str], goal: Cell) -> dict[Cell, int]:
    """Cell -> moves of the shortest way to the goal."""
    found, border = {goal: 0}, collections.deque([goal])
    while border:
        cell = border.popleft()
        for move in doors[cell]:
            there = cell[0] + MOVES[move][0], cell[1] + MOVES[move][1]
            if there not in found:
                found[there] = found[cell] + 1
                border.append(there)
    return found


class Maze(Task):
    stop = "2468"
    size: int = 4  # cells of a side; at most 10

    def __init__(self, cfg):
        super().__init__(cfg)
        self.rewards = [self.short]
        problems, rng = [], random.Random("maze")
        for i in range(4096 + 512):
            goal = start = (rng.randrange(self.size), rng.randrange(self.size))
            while abs(goal[0] - start[0]) + abs(goal[1] - start[1]) < 2:
                goal = rng.randrange(self.size), rng.randrange(self.size)
            problem = {"map": i, "start": start, "goal": goal}
            problems.append({**problem, "prompt": self.see(problem, start)})
        self.heldout, self.train = problems[:512], problems[512:]

    def see(self, problem: dict, at: Cell) -> str:
        way = [b - a for a, b in zip(at, problem["goal"])]
        return f"{way[0]:+d}{way[1]:+d} {self.doors(problem)[at]}="

    def doors(self, problem: dict) -> dict[Cell, str]:
        return build(self.size, f"maze {self.size} {problem['map']}")

    def reply(self, episode: Episode) -> str | None:
        """What is seen after a move; None at the goal, and after what is no move."""
        move, state, problem = episode.turns[-1], episode.state, episode.problem
        if move not in MOVES:
            return None
        x, y = state.get("at", problem["start"])
        if move in self.doors(problem)[x, y]:
            x, y = x + MOVES[move][0], y + MOVES[move][1]
        state |= {"at": (x, y), "moves": state.get("moves", 0) + 1}
        return None if (x, y) == problem["goal"] else self.see(problem, (x, y))

    def short(self, episode: Episode) -> float:
        """The shortest way's length over that of this one; 0 before the goal."""
        problem, state = episode.problem, episode.state
        if state.get("at") != problem["goal"]:
            return 0.0
        return distances(self.doors(problem), problem["goal"])[problem["start"]] / state["moves"]

    def demonstration(self, name: str, progress: float) -> list[tuple[str, bool]]:
        """For SFT: walkers who meet no wall. Seven in ten walk without an aim, three towards the
        goal where that is open. RL has to find out which of them is better."""
        rng = random.Random(f"demonstration {name}")
        episode, aims = Episode(rng.choice(self.train)), rng.random() < 0.3
        said, pieces = episode.problem["prompt"], []
        while said is not None and len(pieces) < 24:
            x, y = episode.state.get("at", episode.problem["start"])
            gx, gy = episode.problem["goal"]
            moves = self.doors(episode.problem)[x, y]
            nearer = [m for m in moves if (gx - x) * MOVES[m][0] + (gy - y) * MOVES[m][1] > 0]
            pieces += [(said, False), (rng.choice(nearer if aims and nearer else moves), True)]
            episode.turns.append(pieces[-1][0])
            said = self.reply(episode)
        return pieces
