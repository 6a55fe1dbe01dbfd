"""The measurements that come with nsagen: of kernels as they are built now."""

from __future__ import annotations

from nsagen import api
from nsagen.files import PACKAGE
from nsagen.render.module import kernel_keys
from nsagen.runtime import tuned

FILE = PACKAGE / "runtime" / "shipped" / "nvidia_h200.json"
AGAIN = "measure again (nsagen tune generated/NAME.py --export FILE) or take the kernel out of the file"


def test_every_shipped_kernel_is_one_of_a_ready_spec() -> None:
    built = {pair for name in api.ready_specs() for pair in kernel_keys(api.compiled_of(api.read(name)).plan).items()}
    stale = [kernel for kernel in tuned.parse(FILE.read_text(encoding="utf-8")) if kernel not in built]
    assert not stale, AGAIN


def test_what_ships_was_measured_at_both_ends_and_ran() -> None:
    for kernel, places in tuned.parse(FILE.read_text(encoding="utf-8")).items():
        assert {p.length for p in places} == {8192, 65536}, kernel
        for place, times in places.items():
            assert (place.gpu, place.kind) == ("NVIDIA H200", "16")
            assert len(times) >= 12
            assert all(ms is not None and ms > 0 for ms in times.values()), kernel
