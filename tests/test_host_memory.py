"""What the allocator does is the process's, so each case has one of its own."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator, on Linux")

TAKE = """
import ctypes, json, random, resource, sys
from mosaicjax.host_memory import Lent

SIZE = 100_000_000
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def step():
    "What XLA does: a block aligned to 64 bytes, every page written, freed."
    block = ctypes.c_void_p()
    assert libc.posix_memalign(ctypes.byref(block), 64, SIZE) == 0
    libc.memset(block, 1, SIZE)
    libc.free(block)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))

def told(**found):
    print(json.dumps(found))
"""


def run(body):
    done = subprocess.run([sys.executable, "-c", TAKE + body], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_pages_stay_from_step_to_step_and_go_when_cleared():
    found = run("""
for size in (0, SIZE):
    block = Lent(size)
    with block.lent():
        step()
    before = faults()
    for _ in range(10):
        with block.lent():
            step()
    (usual, kept) = (faults() - before, None) if not size else (usual, faults() - before)
full = resident()
block.clear()
cleared = resident()
with block.lent():
    step()
told(usual=usual, kept=kept, gone=full - cleared, back=resident() - cleared)
""")
    pages = 100_000_000 / 4_096
    assert found["usual"] > 9 * pages
    assert found["kept"] < 0.01 * pages
    assert found["gone"] == pytest.approx(100_000_000, rel=0.01)
    assert found["back"] == pytest.approx(100_000_000, rel=0.01)


def test_pages_are_given_back_when_no_spare_is_left():
    found = run("""
libc.realloc.restype, libc.realloc.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t]
block = Lent(SIZE)
began = resident()
with block.lent():
    step()
full = resident() - began
for _ in range(2_000):
    with block.lent():
        # A thousand bytes stay at the lent block's front, time and again.
        libc.realloc(libc.malloc(SIZE), 1_000)
told(full=full, left=resident() - began)
""")
    assert found["full"] == pytest.approx(100_000_000, rel=0.01)
    # The settled bytes, and the pages that the spares' own headers lie in: 2 MB each.
    assert found["left"] < 0.1 * 100_000_000


@pytest.mark.parametrize("seed", range(3))
def test_nothing_that_settles_meanwhile_makes_it_grow(seed):
    found = run(f"""
draw = random.Random({seed})
block = Lent(SIZE)
began, kept = resident(), []
for _ in range(60):
    for _ in range(draw.randrange(40)):
        kept.append(libc.malloc(int(2 ** draw.uniform(4, 16))))
    with block.lent():
        if draw.random() < 0.3:
            kept.append(libc.malloc(int(2 ** draw.uniform(4, 16))))
        step()
        if draw.random() < 0.3:
            kept.append(libc.malloc(int(2 ** draw.uniform(4, 16))))
    draw.shuffle(kept)
    for one in kept[len(kept) // 2 :]:
        libc.free(one)
    del kept[len(kept) // 2 :]
told(grown=resident() - began)
""")
    assert found["grown"] < 1.2 * 100_000_000
