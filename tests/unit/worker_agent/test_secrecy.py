"""What others may read of a process of the worker's."""

import os
import subprocess
import sys
import textwrap

import pytest

HIDING = """
    import os, sys
    from penstock_worker.adapters.secrecy import hide_environment

    before = dict(os.environ)
    hide_environment()
    assert dict(os.environ) == before
    assert os.path.exists("/proc/self/environ")
    seen = open("/proc/self/environ", "rb").read()
    if os.fork() == 0:
        os._exit(b"hunter2" in open("/proc/self/environ", "rb").read())
    assert os.wait()[1] == 0
    # What is executed gets what it is given.
    assert os.popen("echo $PASSWORD").read() == "hunter2\\n"
    sys.exit(b"hunter2" in seen)
    """


def test_the_environment_is_for_the_process_itself_and_what_it_executes() -> None:
    environment = {**os.environ, "PASSWORD": "hunter2"}
    code = textwrap.dedent(HIDING)
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, check=False)
    assert done.returncode == 0


READING = """
    import os, sys
    from penstock_worker.adapters.secrecy import _libc, refuse_inspection

    def readable(pid):
        if (child := os.fork()) == 0:
            try:
                open(f"/proc/{pid}/environ", "rb").read()
                open(f"/proc/{pid}/mem", "rb").close()
            except PermissionError:
                os._exit(1)
            os._exit(0)
        return os.waitpid(child, 0)[1] == 0

    me = os.getpid()
    os.setgid(65534)
    os.setuid(65534)
    _libc.prctl(4, 1, 0, 0, 0)  # as it was before it changed its user
    before = readable(me)
    refuse_inspection()
    # A child is a copy, and as closed; what is executed is open again.
    closed = os.system(f"cat /proc/{me}/environ > /dev/null 2>&1") != 0
    sys.exit(0 if before and closed else 1)
    """


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")
def test_the_agent_is_closed_to_processes_of_the_same_user() -> None:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(READING)], timeout=60, check=False)
    assert done.returncode == 0
