from __future__ import annotations

from pathlib import Path

from toolkit.host import available_memory, memory_limit


def test_the_tightest_of_the_control_groups_limits_memory(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    unit = root / "system.slice" / "qvl.service"
    unit.mkdir(parents=True)
    whole = memory_limit(root, own)
    (root / "memory.max").write_text("max\n")
    assert memory_limit(root, own) == whole
    (root / "memory.max").write_text(f"{1 << 30}\n")  # a container's
    assert memory_limit(root, own) == 1 << 30
    own.write_text("1:name=systemd:/x\n0::/system.slice/qvl.service\n")
    (unit.parent / "memory.max").write_text(f"{1 << 29}\n")
    assert memory_limit(root, own) == 1 << 29
    (unit / "memory.max").write_text(f"{1 << 28}\n")  # systemd's MemoryMax
    assert memory_limit(root, own) == 1 << 28
    (root / "memory").mkdir()
    (root / "memory" / "memory.limit_in_bytes").write_text(f"{1 << 27}\n")  # version 1
    assert memory_limit(root, own) == 1 << 27


def test_available_is_what_the_machine_has() -> None:
    assert 0 < available_memory() <= memory_limit() < 1 << 50


def test_what_a_group_has_used_is_not_available_but_for_its_page_cache(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    unit = root / "unit"
    unit.mkdir(parents=True)
    own.write_text("0::/unit\n")
    assert available_memory(root, own) > 1 << 20  # no group
    (root / "memory.max").write_text("max\n")
    assert available_memory(root, own) > 1 << 20
    (root / "memory.max").write_text("80\n")
    (root / "memory.current").write_text("60\n")
    (root / "memory.stat").write_text("anon 20\ninactive_file 15\nactive_file 5\n")
    assert available_memory(root, own) == 40
    (unit / "memory.max").write_text("30\n")  # and nothing is said of what it has used
    assert available_memory(root, own) == 30
    (unit / "memory.current").write_text("31\n")
    (unit / "memory.stat").write_text("")
    assert available_memory(root, own) == 0  # a limit that was lowered
    (unit / "memory.max").write_text("max\n")
    (root / "memory").mkdir()
    (root / "memory" / "memory.limit_in_bytes").write_text("50\n")  # version 1
    (root / "memory" / "memory.usage_in_bytes").write_text("45\n")
    (root / "memory" / "memory.stat").write_text("active_file 1\ntotal_active_file 3\ntotal_inactive_file 7\n")
    assert available_memory(root, own) == 15
