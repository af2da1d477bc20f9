"""Kernels for nbval that are forked from one process with the slow imports done.

Each notebook still has a kernel of its own, with its own memory, variables and working folder.
Only PyTorch's, transformers' and matplotlib's code is there already, which would take every
one of them ten seconds to import. Where nothing can be forked, kernels start as ever.
"""

import multiprocessing
import os
import signal
import sys
import threading
from importlib.metadata import EntryPoint
from multiprocessing.context import ForkServerProcess
from typing import Any

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning.factory import KernelProvisionerFactory
from jupyter_client.provisioning.local_provisioner import LocalProvisioner


class Forked:
    """A forked process, with as much of `subprocess.Popen` as jupyter_client asks for."""

    stdin = stdout = stderr = None

    def __init__(self, process: ForkServerProcess) -> None:
        self.process = process
        assert process.pid is not None
        self.pid = process.pid

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        return self.process.exitcode

    def wait(self) -> int | None:
        """Wait for its end; the exit status."""
        self.process.join()
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal to it alone."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End it."""
        self.process.kill()

    def terminate(self) -> None:
        """Ask it to end."""
        self.process.terminate()


class ForkedProvisioner(LocalProvisioner):
    """Starts a Python kernel by forking a process that has the imports."""

    process: Any

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        """As its base class's, which runs `cmd`: ``python -m ipykernel_launcher``, its arguments.

        Raises:
            ValueError: another command.
        """
        if cmd[1:3] != ["-m", "ipykernel_launcher"]:
            raise ValueError(
                f"the kernel's command is {cmd}: expected python -m ipykernel_launcher"
            )
        what = (cmd[3:], kwargs["env"], kwargs.get("cwd") or os.getcwd())
        process = multiprocessing.get_context("forkserver").Process(target=kernel, args=what)
        process.start()
        self.process = Forked(process)
        self.pid = self.pgid = process.pid  # it makes a group of its own
        self.cwd = kwargs.get("cwd")
        return self.connection_info


def kernel(arguments: list[str], environment: dict[str, str], folder: str) -> None:
    """What a forked process does: it becomes the kernel."""
    from ipykernel.kernelapp import launch_new_instance

    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=end_with, args=[parent], daemon=True).start()
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["ipykernel_launcher", *arguments]
    launch_new_instance(argv=arguments)


def end_with(parent: Any) -> None:
    """End, whatever the kernel is at, as soon as the process that asked for it has ended."""
    parent.join()
    os._exit(1)


def fork_kernels() -> None:
    """From now on this process's Jupyter kernels are forked."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return
    multiprocessing.set_forkserver_preload(["tools.kernel_imports"])
    factory = KernelProvisionerFactory.instance()
    group = KernelProvisionerFactory.GROUP_NAME
    name = "forked-provisioner"
    factory.provisioners[name] = EntryPoint(name, f"{__name__}:ForkedProvisioner", group)
    factory.default_provisioner_name = name
