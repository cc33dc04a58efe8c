"""Every error of the executor, each from a kernel that has it (misuse.cu): which it is, and on which line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.hostexec

MISUSE = Path(__file__).with_name("misuse.cu")
# what the message has besides the line marked `here: NAME`
ERRORS = {
    "divergent_lines": r"warp divergence|lanes wait in shfl",
    "divergent_ops": r"warp divergence",
    "missing_lanes": r"thread exits while lanes of its warp wait in shfl|shfl needs all 32 lanes",
    "exited_lane": r"ballot needs all 32 lanes, but lane 3 has exited|thread exits while lanes of its warp wait",
    "divergent_barrier": r"divergent barrier: other threads wait in sync_threads",
    "exit_before_barrier": r"deadlock, exit before a barrier: 63 threads in sync_threads .* 1 exited",
    "lost_arrival": r"deadlock: 32 threads in named_sync at .*, 32 exited",
    "named_counts": r"named_sync 3: for (96 threads here, for 64|64 threads here, for 96)",
    "named_zero": r"named_sync: barrier 0 is none of 1 to 15",
    "named_part_of_warp": r"named_arrive: 48 threads are not whole warps of a block of 64",
    "leftover_copy": r"exits with 1 cp.async not waited for",
    "uncommitted_copy": r"exits with 1 cp.async not waited for",
    "misaligned_copy_shared": r"cp.async: misaligned, shared memory offset (\d+) is no multiple of 16",
    "misaligned_copy_global": r"cp.async: misaligned, global address 0x[0-9a-f]+ is no multiple of 16",
    "copy_out_of_range": r"cp.async: shared memory out of range, offset \d+ of 1024 bytes",
    "misaligned_ldmatrix": r"ldmatrix: misaligned, shared memory offset \d+ is no multiple of 16",
    "ldmatrix_out_of_range": r"ldmatrix: shared memory out of range, offset -16 of 1024 bytes",
    "misaligned_lds": r"lds: misaligned, shared memory offset \d+ is no multiple of 16",
    "sts_out_of_range": r"sts: shared memory out of range, offset 1\d\d\d of 1024 bytes",
    "spin_for_nothing": r"livelock, nothing that is spun for changes: 64 threads in ld_acquire",
    "block_waits_for_later": r"livelock, .*1 blocks not started \(coresident 1\)",
}


def marked_line(name: str) -> int:
    (line,) = [
        i for i, text in enumerate(MISUSE.read_text().splitlines(), 1) if f"here: {name}" in text.split("//")[-1]
    ]
    return line


@pytest.fixture(scope="module")
def misuse(hostexec: Any) -> Any:
    return hostexec.build([MISUSE])


def run(hostexec: Any, misuse: Any, name: str, options: Any) -> None:
    misuse.call(f"run_{name}", hostexec.guarded(np.zeros(256, np.uint32)), options=options)


@pytest.mark.parametrize("schedule", ["forward", "reverse", "greedy_high", "random"])
@pytest.mark.parametrize("name", ERRORS)
def test_error_and_line(hostexec: Any, misuse: Any, name: str, schedule: str) -> None:
    if name == "block_waits_for_later" and schedule != "forward":
        pytest.skip("block 0 first")
    with pytest.raises(hostexec.LaunchError, match=ERRORS[name]) as error:
        run(hostexec, misuse, name, hostexec.Options(schedule, seed=4))
    assert f"misuse.cu:{marked_line(name)}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_launch_behind_an_error_is_unharmed(hostexec: Any, misuse: Any) -> None:
    for name in ("divergent_ops", "exit_before_barrier"):
        with pytest.raises(hostexec.LaunchError):
            run(hostexec, misuse, name, hostexec.Options())
        run(hostexec, misuse, "missing_sync_warp", hostexec.Options())


def test_block_that_waits_for_a_later_one_needs_both_alive(hostexec: Any, misuse: Any) -> None:
    for options in hostexec.all_options(coresident=2):
        run(hostexec, misuse, "block_waits_for_later", options)


def test_plain_store_outside_shared_memory(hostexec: Any, misuse: Any) -> None:
    """No wrapper sees it; the bytes around the block's memory do."""
    with pytest.raises(hostexec.LaunchError, match="block 0 wrote outside its 1024 bytes of shared memory"):
        run(hostexec, misuse, "store_out_of_range", hostexec.Options())


@pytest.mark.parametrize(("grid", "block", "bytes_"), [(0, 32, 0), (1, 0, 0), (1, 1025, 0), (1, 32, 227 * 1024 + 1)])
def test_configuration(hostexec: Any, misuse: Any, grid: int, block: int, bytes_: int) -> None:
    with pytest.raises(hostexec.LaunchError, match=f"invalid configuration: {grid} blocks of {block} threads"):
        misuse.call("run_configuration", grid, block, bytes_)


def test_store_beside_a_buffer(hostexec: Any) -> None:
    for index, side in ((8, "behind"), (-1, "before")):
        buffer = hostexec.guarded(np.zeros(8, np.float32))
        buffer.check()
        buffer._memory[buffer._first + 4 * index] = 0
        with pytest.raises(hostexec.OutOfBoundsError, match=f"1 bytes written {side} a buffer of 32 bytes"):
            buffer.check()


def test_torch_buffers(hostexec: Any) -> None:
    import torch

    given = torch.randn(5, 3).bfloat16()
    buffer = hostexec.guarded(given)
    assert buffer.pointer % 256 == 0
    torch.testing.assert_close(buffer.tensor, given, rtol=0, atol=0)
    buffer.tensor[1, 2] = 7
    assert buffer.array.view(np.uint16)[5] == 0x40E0


# --- what only a sanitizer sees


def run_isolated(executor: Any, name: str, defines: list[str], coresident: int) -> None:
    options = executor.Options(coresident=coresident)
    run(executor, executor.build([MISUSE], defines=defines), name, options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "name", "text"),
    [
        ("asan", "store_out_of_range", "heap-buffer-overflow"),
        ("asan", "misaligned_load", "misaligned address"),
        ("tsan", "shared_race", "data race"),
        ("tsan", "missing_sync_warp", "data race"),
        ("tsan", "global_race", "data race"),
    ],
)
def test_sanitizer_names_the_line(hostexec: Any, mode: str, name: str, text: str) -> None:
    with pytest.raises(hostexec.IsolatedError, match=text) as error:
        hostexec.isolated(mode, run_isolated, name, [], 1)
    assert f"misuse.cu:{marked_line(name)}" in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["asan", "tsan"])
def test_sanitizer_has_nothing_against_a_right_kernel(hostexec: Any, mode: str) -> None:
    hostexec.isolated(mode, run_isolated, "missing_sync_warp", ["WITH_SYNC_WARP"], 1)
