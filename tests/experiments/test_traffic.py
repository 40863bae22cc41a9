"""What ``bench traffic`` counts is what the kernels do: by hand, and as the interpreter sees every load and product."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from chela.ops.linear_attention.tiles import Launch
from chela.ops.linear_attention.triton import backward, forward
from experiments.bench import traffic
from experiments.bench.__main__ import main
from experiments.bench.traffic import Options, ours, problem, theirs

pytest.importorskip("triton")

TILES = Launch(16, 32, 16, 32, 16, 16, 2, 4, 1)
PARTS = Launch(32, 16, 32, 16, 16, 16, 2, 4, 1)


def test_the_sum_of_one_small_problem_by_hand() -> None:
    """Two chunks of 2 tiles of 16 tokens, one head, width 16, bfloat16, causal, no decay: a tile of tokens is 512 B."""
    counted = ours(Options(batch=1, length=64, heads=1, width=16, decay="none"), TILES)
    assert counted["forward states"] == (4 * 2 * 512 + 2 * 1024,) * 2 + (4 * 2 * 16**3,)
    # In place, with those of z, and the last ones: read, written, and 1 + 1 / 16 of a state more.
    assert counted["forward scan"].moved == (2 * 2 + 1) * (1024 + 64)
    # q once; k, v of one tile for the first of a chunk and of two for the second; each tile's state; the output.
    assert counted["forward attend out"].moved == 4 * 512 + 2 * (1 + 2) * 2 * 512 + 4 * 1024 + 4 * 512
    assert counted["forward attend out"].flops == 2 * 16**3 * (4 + 2 * (1 + 2) * 2)


@pytest.mark.parametrize(("causal", "tiles"), [(True, TILES), (False, PARTS)], ids=["causal", "both"])
@pytest.mark.parametrize(
    "options",
    [{"decay": "none", "normalize": True}, {"decay": "head"}]
    + [{"decay": "token", "learned": True, "normalize": normalize} for normalize in (False, True)],
    ids=str,
)
def test_it_counts_what_the_interpreter_sees(
    options: dict, causal: bool, tiles: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled here, not interpreted")
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    seen = {"moved": 0, "flops": 0}
    load, store, dot = Builder.create_masked_load, Builder.create_masked_store, Builder.create_dot

    def moves(ptrs, mask) -> None:
        seen["moved"] += int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8

    def multiplies(a, b) -> None:
        seen["flops"] += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]

    monkeypatch.setattr(Builder, "create_masked_load", lambda s, p, m, *r: (moves(p, m), load(s, p, m, *r))[1])
    monkeypatch.setattr(Builder, "create_masked_store", lambda s, p, v, m, *r: (moves(p, m), store(s, p, v, m, *r))[1])
    monkeypatch.setattr(Builder, "create_dot", lambda s, a, b, *r: (multiplies(a, b), dot(s, a, b, *r))[1])

    asked = Options(batch=1, length=39, heads=1, width=24, values=12, causal=causal, **options)
    # The interpreter is wrong about bfloat16; float16 is as wide.
    call = problem(asked)
    call = call._replace(
        **{name: torch.rand(getattr(call, name).shape, dtype=torch.float16) for name in ("q", "k", "v")},
        **{
            name: None if getattr(call, name) is None else -torch.rand(getattr(call, name).shape)
            for name in ("log_decay", "log_decay_back")
        },
    )
    out, total, end, _ = forward(call, tiles)
    backward(call, out, None, out, total, end, asked.learned, tiles)
    kernels = [count for name, count in ours(asked, tiles).items() if "torch" not in name]
    assert seen["flops"] == sum(count.flops for count in kernels)
    assert seen["moved"] == sum(count.moved for count in kernels)
    assert sum(count.least for count in kernels) < seen["moved"]


def test_the_chunked_form_of_others_at_one_chunk_by_hand() -> None:
    counted = theirs(Options(batch=1, length=64, heads=1, width=64, decay="none"))
    tile = 64 * 64 * 2  # bytes of 64 tokens in bfloat16, and of a state
    assert counted["fla forward chunk_o"].least == (3 + 1 + 1) * tile
    assert counted["fla backward chunk_dqkwg"].least == (4 + 2 * 2 + 2) * tile
    assert sum(count.flops for count in counted.values()) == 2 * 64**3 * (1 + 3 + 1 + 1 + 6 + 3)


def test_the_table_says_what_it_is_and_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["traffic", "length=1000", "width=64", "decay=token", "learned=true", f"out={tmp_path / 'a.json'}"]) == 0
    )
    text = capsys.readouterr().out.partition("written: ")[0]  # a path may be of any length
    assert "arithmetic, not measured" in text and max(map(len, text.splitlines())) <= 80
    rows = {row["key"]["count"]: row["values"] for row in json.loads((tmp_path / "a.json").read_text())["rows"]}
    bounds = rows["bound ms"]
    assert bounds["fla total"] == pytest.approx(sum(v for name, v in bounds.items() if name.startswith("fla")) / 2)
    assert traffic.BYTES == 3.35e12 and traffic.FLOPS == 990e12
