"""Where weights in values lie once they are loaded: in memory of their own if there is room, else in their file."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models import random_ids, save_random
from narrowcast.engines import load_engine
from narrowcast.engines.transformers.files import settling
from narrowcast.plan.split import Split
from narrowcast.weights.arena import CHUNK
from ranks import Ranks

MAPS = Path("/proc/self/maps")
pytestmark = pytest.mark.skipif(not MAPS.exists(), reason="only Linux tells what is mapped where")


def mapped(folder: Path) -> Iterator[range]:
    """The addresses of this process that are files of a folder."""
    for line in MAPS.read_text().splitlines():
        if line.endswith(".safetensors") and str(folder) in line:
            first, stop = (int(address, 16) for address in line.split()[0].split("-"))
            yield range(first, stop)


def are_in_file(model: nn.Module, folder: Path) -> list[bool]:
    places = list(mapped(folder))
    weights = [weight.to_local() if hasattr(weight, "to_local") else weight for weight in model.parameters()]
    return [any(weight.data_ptr() in place for place in places) for weight in weights]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(random_ids(1, 9)).logits
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_weights_have_left_their_file(tmp_path: Path, tied: bool) -> None:
    """So that it may be written anew, which would change those of a file that is mapped, or end the process."""
    save_random("llama-tied" if tied else "llama", tmp_path)
    model: Any = load_engine().load(tmp_path)
    expected = logits(model)
    assert not any(are_in_file(model, tmp_path))
    assert tied == (model.lm_head.weight is model.model.embed_tokens.weight)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(0)
    assert torch.equal(logits(model), expected)


def test_weights_stay_where_there_is_no_room_for_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_random("llama", tmp_path)
    expected = logits(load_engine().load(tmp_path))
    nbytes = sum(weight.nbytes for weight in load_engine().load(tmp_path).parameters())
    for free, stays in ((2 * nbytes, False), (2 * nbytes - 2, True)):
        monkeypatch.setattr(settling, "free_host_nbytes", lambda free=free: free)
        model = load_engine().load(tmp_path)
        assert all(are_in_file(model, tmp_path)) == any(are_in_file(model, tmp_path)) == stays
        assert torch.equal(logits(model), expected)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(settling, "free_host_nbytes", lambda: 2 * nbytes)
    assert all(are_in_file(load_engine().load(tmp_path), tmp_path)), "two ranks would take twice as much"


def side_by_side(folder: Path) -> bool:
    model = load_engine().load(folder, split=Split(tp_size=2))
    with torch.no_grad():
        parts = [weight.to_local() if hasattr(weight, "to_local") else weight for weight in model.parameters()]
    rooms = {part.untyped_storage().data_ptr() for part in parts}
    return len(rooms) == 1 and parts[0].untyped_storage().nbytes() >= CHUNK


def test_parts_of_ranks_lie_so_too(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    assert ranks(2).run(side_by_side, save_random("llama", tmp_path)) == [True, True]
