import os
import time
from pathlib import Path

import pytest
from prunescope.probes import sandbox
from prunescope.probes.items import WRITTEN, Item, Task
from prunescope.probes.sandbox import SandboxError, passes
from prunescope.probes.score import judge


@pytest.fixture
def isolated():
    try:
        sandbox.require()
    except SandboxError as error:  # then the product refuses, which another test shows
        pytest.skip(str(error))


@pytest.fixture
def forgetful():
    """What was found out about this platform is forgotten, before and after."""
    sandbox.require.cache_clear()
    yield
    sandbox.require.cache_clear()


def test_without_the_means_nothing_is_run(monkeypatch, forgetful):
    monkeypatch.setattr(sandbox.shutil, "which", lambda _: None)
    monkeypatch.setattr(sandbox, "_status", lambda *_: pytest.fail("it was run"))
    with pytest.raises(SandboxError, match="needs `unshare` and `mount`"):
        passes("pass")


@pytest.mark.parametrize(
    ("ends_well", "message"),
    [
        (lambda _: False, "`unshare` fails"),  # as where namespaces are refused
        (lambda p: p == "pass" or "socket" in p, "the network is within reach"),
        (lambda p: p == "pass" or "mkstemp" in p, "files can be written"),
    ],
)
def test_a_platform_that_does_not_isolate_is_refused(monkeypatch, forgetful, ends_well, message):
    tried = []
    monkeypatch.setattr(
        sandbox, "_status", lambda p, _: tried.append(p) or (0 if ends_well(p) else 1)
    )
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: f"/bin/{name}")
    with pytest.raises(SandboxError, match=message):
        passes("print('the model wrote this')")
    assert "print('the model wrote this')" not in tried


@pytest.mark.usefixtures("isolated")
@pytest.mark.parametrize(
    ("program", "right"),
    [
        ("assert 1 + 1 == 2", True),
        ("assert 1 + 1 == 3", False),
        ("x = (", False),
        ("open('mine', 'w').write('x')", True),
        ("x = 'a' * (4 << 30)", False),
        ("open('big', 'w').write('x' * (2 << 20))", False),
        ("import socket; socket.create_connection(('127.0.0.1', 22), 1)", False),
        ("import os\nassert os.getuid() != 0 or not os.environ.get('HOME')", True),
    ],
)
def test_programs_run_within_their_limits(program, right):
    assert passes(program) == right


@pytest.mark.usefixtures("isolated")
def test_nothing_outside_can_be_written(tmp_path):
    tmp_path.chmod(0o777)
    assert not passes(f"open({str(tmp_path / 'x')!r}, 'w')")
    assert not passes(f"open({str(Path.home() / '.prunescope-escaped')!r}, 'w')")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("isolated")
def test_time_runs_out_and_the_whole_group_is_killed(tmp_path):
    mark = f"prunescope-{os.getpid()}"
    program = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60) # {mark}'])\n"
        "time.sleep(60)"
    )
    start = time.monotonic()
    assert not passes(program, seconds=1)
    assert time.monotonic() - start < 10
    time.sleep(0.2)
    running = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()]
    assert not any(mark.encode() in line and b"sleep(60)" in line for line in running)


@pytest.mark.usefixtures("isolated")
def test_a_flood_of_processes_ends():
    assert not passes("import os\nwhile True: os.fork()", seconds=2)


@pytest.mark.usefixtures("isolated")
def test_code_is_judged_by_its_tests():
    item = Item("c", "def f(x):\n", tests=f"def f(x):\n{WRITTEN}\nassert f(2) == 4\n")
    task = Task("t", "generation", (item,), grade="code")
    assert judge(task, item, "    return 2 * x", [1], True).score == 1
    assert judge(task, item, "    return x", [1], True).score == 0


@pytest.mark.usefixtures("isolated")
@pytest.mark.smollm2
def test_the_reference_solutions_of_the_benchmarks_pass(shared_data):
    from prunescope.probes import load_tasks

    for name in ("humaneval", "mbpp"):
        task = load_tasks([name], shared_data)[0].limited(12)
        for item in task.items:
            assert judge(task, item, item.accepted[0], [1], True).score == 1, item.id
