"""Right uses of barriers, flags and fences pass in every order; conflicts of banks are counted."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.hostexec

MINI = Path(__file__).with_name("mini.cu")
RELEASE, FENCED, UNFENCED = 0, 1, 2


@pytest.fixture(scope="module")
def mini(hostexec: Any) -> Any:
    return hostexec.build([MINI])


def check_producer(executor: Any, rounds: int = 7) -> None:
    library = executor.build([MINI])
    for options in executor.all_options():
        out = executor.guarded(np.zeros(32, np.uint32))
        library.call("run_producer", out, rounds, options=options)
        np.testing.assert_array_equal(out.array, rounds * (rounds + 1) // 2 * np.arange(32, 0, -1))


def check_chain(executor: Any, kind: int, blocks: int = 5) -> None:
    library = executor.build([MINI])
    for options in executor.all_options(coresident=blocks):
        sums, done = executor.guarded(np.zeros(32, np.uint32)), executor.guarded(np.zeros(1, np.uint32))
        library.call("run_chain", kind, blocks, sums, done, options=options)
        np.testing.assert_array_equal(sums.array, blocks * np.arange(32) + sum(range(blocks)))
        assert done.array[0] == blocks


def check_last_block(executor: Any, kind: int, coresident: int, blocks: int = 5) -> None:
    library = executor.build([MINI])
    for options in executor.all_options(coresident=coresident):
        parts, done = executor.guarded(np.zeros(32 * blocks, np.uint32)), executor.guarded(np.zeros(1, np.uint32))
        total = executor.guarded(np.zeros(32, np.uint32))
        library.call("run_last_block", kind, blocks, parts, done, total, options=options)
        np.testing.assert_array_equal(total.array, blocks * np.arange(32) + 100 * sum(range(blocks)))


def test_named_barriers(hostexec: Any) -> None:
    check_producer(hostexec)


@pytest.mark.parametrize("kind", [RELEASE, FENCED])
def test_blocks_in_turn(hostexec: Any, kind: int) -> None:
    check_chain(hostexec, kind)


@pytest.mark.parametrize("coresident", [1, 3])
def test_last_block(hostexec: Any, coresident: int) -> None:
    check_last_block(hostexec, FENCED, coresident)


def test_chain_needs_its_blocks_alive(hostexec: Any, mini: Any) -> None:
    """Blocks that come in the opposite order, one at a time: the first waits for one that cannot start."""
    done = hostexec.guarded(np.zeros(33, np.uint32))
    with pytest.raises(hostexec.LaunchError, match=r"livelock.* 2 blocks not started \(coresident 1\)"):
        mini.call("run_chain", RELEASE, 3, done, done, options=hostexec.Options("reverse"))


def test_random_schedule_is_its_seed(hostexec: Any, mini: Any) -> None:
    """Same seed, same run, down to the message of a failure; another seed, another run."""

    def message(seed: int) -> str:
        buffer = hostexec.guarded(np.zeros(33, np.uint32))
        with pytest.raises(hostexec.LaunchError) as error:
            mini.call("run_chain", RELEASE, 9, buffer, buffer, options=hostexec.Options("random", seed=seed))
        return str(error.value).split("[")[0]

    assert message(1) == message(1)
    assert len({message(seed) for seed in range(6)}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["asan", "tsan"])
@pytest.mark.parametrize(
    ("check", "args"),
    [
        (check_producer, ()),
        (check_chain, (RELEASE,)),
        (check_chain, (FENCED,)),
        (check_last_block, (FENCED, 1)),
        (check_last_block, (FENCED, 5)),
    ],
)
def test_sanitizers_accept_what_is_ordered(hostexec: Any, mode: str, check: Any, args: tuple[int, ...]) -> None:
    hostexec.isolated(mode, check, *args)


@pytest.mark.slow
@pytest.mark.parametrize(("check", "args"), [(check_chain, (UNFENCED,)), (check_last_block, (UNFENCED, 1))])
def test_missing_fence_is_a_race(hostexec: Any, check: Any, args: tuple[int, ...]) -> None:
    """Right in every order on one core; only ThreadSanitizer sees that nothing orders the blocks."""
    check(hostexec, *args)
    with pytest.raises(hostexec.IsolatedError, match="data race"):
        hostexec.isolated("tsan", check, *args)


@pytest.mark.slow
def test_switch_by_ucontext(hostexec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What machines other than x86-64 run on."""
    driver = sys.modules[type(hostexec).__module__]
    monkeypatch.setattr(driver, "_FLAGS", [*driver._FLAGS, "-DHOSTEXEC_UCONTEXT"])
    check_producer(hostexec)
    check_chain(hostexec, RELEASE)


# --- banks: 32 of 4 bytes


def extra(hostexec: Any, mini: Any, size: int, offsets: np.ndarray, store: bool) -> int:
    given = hostexec.guarded(offsets.astype(np.int32))
    mini.call("run_banks", size, given, int(store), 32768, options=hostexec.Options(conflicts=True))
    (found,) = mini.conflicts().items()
    assert found[0][0] == "mini.cu" and found[0][2] == ("sts" if store else "lds") and found[1][0] == 1
    return found[1][1]


LANES = np.arange(32)


@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize(
    ("size", "offsets", "passes"),
    [
        (4, 4 * LANES, 0),
        (4, 0 * LANES, 0),  # one word for all
        (4, 4 * (LANES ^ 5), 0),
        (4, 8 * LANES, 1),
        (4, 128 * LANES, 31),
        (4, 132 * LANES, 0),  # a padded row
        (8, 8 * LANES, 0),
        (8, 16 * LANES, 2),  # one more in each half of the warp
        (16, 16 * LANES, 0),
        (16, 128 * LANES, 28),  # 8 in each quarter
        (16, 128 * LANES + 16 * (LANES % 8), 0),
    ],
)
def test_passes_of_an_access(
    hostexec: Any, mini: Any, size: int, offsets: np.ndarray, passes: int, store: bool
) -> None:
    assert extra(hostexec, mini, size, offsets, store) == passes


@pytest.mark.parametrize(("swizzle", "passes"), [(True, 0), (False, 28)])
def test_passes_of_ldmatrix(hostexec: Any, mini: Any, swizzle: bool, passes: int) -> None:
    """Rows of 128 bytes: 8 of them start in the same bank unless their chunks are exchanged."""
    offsets = 128 * LANES + 16 * (LANES % 8 if swizzle else 0)
    data, out = np.zeros(4096, np.uint8), hostexec.guarded(np.zeros((32, 4), np.uint32))
    mini.call("run_ldmatrix", hostexec.guarded(data), 4096, hostexec.guarded(offsets.astype(np.int32)), out)
    ((key, value),) = mini.conflicts().items()
    assert key[2] == "ldmatrix" and value == (1, passes)
