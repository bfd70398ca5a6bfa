"""The C library's memory is kept and given back where that can be, and left alone elsewhere."""

import ctypes
import sys

import pytest

from moevlm import memory_moevlm as memory


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_kept_and_given_back():
    assert memory.keep_freed_memory()
    memory.release_freed_memory()


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert not memory.keep_freed_memory()
    memory.release_freed_memory()
