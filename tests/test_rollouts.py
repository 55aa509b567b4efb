"""The packing plan by hand and by its promises; the table's way through rows, cells and files."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from report import load_rollouts, save_rollouts
from rollouts import Rollouts, Row, from_cells, from_rows, pack, to_cells
from tasks import Episode


def test_pack_by_hand():
    # 5, 4, 3, 2, 1 into two trainers: 15 tokens, 8 at a time: longest first into the emptier bin
    assert pack([5, 4, 3, 2, 1], num_trainers=2, budget=8) == [[[0, 3, 4]], [[1, 2]]]


def test_pack_gives_a_row_over_the_budget_a_bin_of_its_own():
    plan = pack([20, 1, 1], num_trainers=1, budget=8)
    assert sorted(plan[0]) == [[0], [1, 2]]


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 5), st.integers(1, 120))
@settings(max_examples=200, deadline=None)
def test_pack_promises(lengths, trainers, budget):
    plan = pack(lengths, trainers, budget)
    assert sorted(i for t in plan for micro in t for i in micro) == list(range(len(lengths)))
    assert len({len(t) for t in plan}) == 1 and len(plan) == trainers  # equally many micro-batches
    assert all(sum(lengths[i] for i in m) <= budget or len(m) == 1 for t in plan for m in t)


def make_row(slot, reply, prompt, sampled, given=()):
    row = Row(3, slot, 0, reply, Episode({"prompt": ""}), rewards={"correct": float(reply)})
    row.paid = [float(reply)]
    row.append_given(prompt)
    row.append_sampled(sampled, [-0.5] * len(sampled), now=3)
    row.append_given(list(given))
    return row


def test_from_rows_sorts_and_masks():
    rows = [
        make_row(1, 0, [5], [6, 7]),
        make_row(0, 1, [5, 5], [6], given=[8]),
        make_row(0, 0, [5], [6]),
    ]
    table = from_rows(rows, ["correct"])
    assert (table.index & 0xFFFFFFFF).tolist() == [0, 0, 1] and (table.index >> 32).tolist() == [
        3,
        3,
        3,
    ]
    assert table.reply.tolist() == [0, 1, 0] and table.length.tolist() == [2, 4, 3]
    assert table.mask.tolist() == [[0, 1, 0, 0], [0, 0, 1, 0], [0, 1, 1, 0]]
    assert table.version.tolist() == [[-1, 3, -1, -1], [-1, -1, 3, -1], [-1, 3, 3, -1]]
    assert table.sampled.tolist() == [1, 1, 2] and table.reward.tolist() == [0, 1, 0]


def test_versions_change_at_the_borders():
    row = make_row(0, 0, [5], [])
    row.borders = [(2, 7), (3, 8)]  # when version 8 came 2 tokens were there, when 9 came 3
    row.append_sampled([1, 2, 3, 4, 5], [-1.0] * 5, now=9)
    assert row.version == [-1, 7, 7, 8, 9, 9]
    row.borders = [(3, 9)]  # the engine had queued a token more than the row was to have
    row.append_sampled([6, 7], [-1.0] * 2, now=10)
    assert row.version == [-1, 7, 7, 8, 9, 9, 9, 9]


def test_a_token_without_a_finite_logprob_is_not_trained():
    row = make_row(0, 0, [5], [])
    row.append_sampled([1, 2], [float("nan"), -1.0], now=0)
    assert (
        row.mask == [False, False, True]
        and row.logprobs == [0.0, 0.0, -1.0]
        and row.version == [-1, -1, 0]
    )


def test_cells_and_files_keep_every_bit(tmp_path):
    table = from_rows([make_row(0, 0, [5, 9], [6, 7]), make_row(0, 1, [5], [6])], ["correct"])
    table.advantage = torch.randn(2, 4) * table.mask
    back = Rollouts(length=table.length)
    from_cells(to_cells(table, torch.arange(2)), back)
    save_rollouts(table, tmp_path / "rank0.safetensors")
    loaded = load_rollouts(tmp_path)
    for name in ("tokens", "mask", "logprobs", "version", "advantage"):
        assert torch.equal(getattr(back, name), getattr(table, name)), name
        assert torch.equal(getattr(loaded, name), getattr(table, name)), name
    assert torch.equal(loaded.rewards["correct"], table.rewards["correct"])


def test_seeds_differ_between_rows_and_turns_and_are_repeatable():
    rows = [make_row(s, r, [1], [2]) for s in range(4) for r in range(4)]
    seeds = {row.seed(0) for row in rows}
    rows[0].turn = 1
    assert len(seeds) == 16 and rows[0].seed(0) not in seeds and all(0 <= s < 2**63 for s in seeds)
    assert (
        make_row(1, 2, [1], [2]).seed(0)
        == make_row(1, 2, [9], [8]).seed(0)
        != make_row(1, 2, [1], [2]).seed(1)
    )
