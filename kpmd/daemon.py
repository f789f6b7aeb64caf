"""Wires everything together: socket, services, API, signals, and the order of the end."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass

import uvloop

from kpmd import __version__
from kpmd.api.app import make_api, wind_down
from kpmd.bpf.kernel import LinuxKernel
from kpmd.bpf.loader import LoaderLimits
from kpmd.config import Config, ConfigError, load_deny_list
from kpmd.core.deny import DenyList
from kpmd.listener import (
    Listener,
    ListenError,
    from_systemd,
    is_stored,
    make,
    passed_by_systemd,
)
from kpmd.log import Log
from kpmd.log import configure as configure_logging
from kpmd.runtime.executor import Lane
from kpmd.runtime.fdstore import FdStore, capacity
from kpmd.runtime.kernel import Kernel
from kpmd.runtime.manager import is_being_stopped
from kpmd.runtime.notify import Notifier
from kpmd.runtime.restore import restore
from kpmd.runtime.state import State

log = Log("kpmd")


def raise_limits() -> None:
    """As many file descriptors as the hard limit allows: each link, map and client needs one.

    And as much locked memory, which is what kernels before 5.11 count BPF memory as.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        resource.setrlimit(
            resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        )
    except (ValueError, PermissionError):
        log.debug("RLIMIT_MEMLOCK stays as it is")


@dataclass(frozen=True)
class Manager:
    """The service manager that started us, as far as it takes part: systemd, or nobody."""

    notifier: Notifier
    store: FdStore
    #: What was in the FD store when we were started.
    stored: Sequence[tuple[str, int]] = ()

    @classmethod
    def from_environment(
        cls, environ: MutableMapping[str, str], passed: Sequence[tuple[str, int]] = ()
    ) -> Manager:
        """What the environment says of it; takes the variables away. ``passed``: its FDs."""
        notifier = Notifier.from_environment(environ)
        stored = [(name, fd) for name, fd in passed if is_stored(name)]
        return cls(notifier, FdStore(notifier, capacity(environ)), stored)


async def serve(
    config: Config,
    listener: Listener,
    kernel: Kernel,
    deny: DenyList | None = None,
    manager: Manager | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; then let what runs end and return.

    Before that everything is detached; but where the service manager is about to start us again,
    and has an FD store, what outlives a client is left in it.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    manager = manager or Manager.from_environment({})
    state = State(
        kernel, deny=deny, max_targets=config.limits.targets_per_link, store=manager.store
    )
    await state.executor.run(kernel.start)
    if manager.store:
        await restore(state, manager.store, manager.stored)
    else:
        log.warning(
            "nothing survives a restart",
            reason="no service manager with an FD store started this daemon; with kpmd.service, "
            "systemd keeps persistent links and leases attached",
        )
    api = make_api(state, max_body=config.limits.body_bytes, max_object=config.limits.object_bytes)
    runner = api.runner(config.limits.shutdown_seconds)
    await runner.setup()
    if runner.server is None:
        raise RuntimeError("aiohttp's runner was set up but made no server")
    server = await loop.create_unix_server(api.protocol(runner.server, loop), sock=listener.sock)
    warming = asyncio.create_task(_warm_up(state))
    log.info("listening", socket=listener.where, version=__version__, kernel=kernel.release)
    manager.notifier.send("READY=1")
    try:
        await stop.wait()
    finally:
        keep = bool(manager.store) and not await state.executor.run(is_being_stopped)
        log.info("stopping", keep=keep)
        manager.notifier.send("STOPPING=1")
        warming.cancel()
        await asyncio.gather(warming, return_exceptions=True)
        await wind_down(server, api, runner, state, config.limits.shutdown_seconds, keep=keep)
        log.info("stopped")


async def _warm_up(state: State) -> None:
    """Feature tests and the symbol index, so that the first client does not wait for them."""
    try:
        for feature in await state.features.all():
            log.info(
                "feature", name=feature.name, supported=feature.supported, reason=feature.reason
            )
        await state.executor.run(state.symbols.current, lane=Lane.ATTACH)
    except Exception as error:
        # The next request that needs them tries again, and gets the error as its answer.
        log.error("warm-up failed", error)


def run(config: Config) -> int:
    """Run the daemon; returns the exit status."""
    configure_logging(config.log_level)
    raise_limits()
    try:
        deny = load_deny_list(config.deny_file)
    except ConfigError as error:
        log.error("cannot start", reason=str(error))
        return 1
    passed = passed_by_systemd(os.environ, os.getpid())
    manager = Manager.from_environment(os.environ, passed)
    try:
        listener = from_systemd(passed) or make(config.socket, config.group, config.mode)
    except ListenError as error:
        log.error("cannot listen", reason=str(error))
        return 1
    limits = LoaderLimits(
        seconds=config.limits.load_seconds, memory_bytes=config.limits.load_memory_bytes
    )
    try:
        uvloop.run(serve(config, listener, LinuxKernel(limits), deny, manager))
    finally:
        listener.close()
    return 0
