"""Wires everything together: socket, services, API, signals, and the order of the end."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import os
import resource
import signal
import sys
import time
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import uvloop

from kpmd import __version__, policy_file
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
from kpmd.runtime import handover
from kpmd.runtime.audit import Audit, Record, destinations
from kpmd.runtime.executor import Lane
from kpmd.runtime.fdstore import FdStore, capacity
from kpmd.runtime.kernel import Kernel
from kpmd.runtime.manager import is_being_stopped
from kpmd.runtime.notify import Notifier
from kpmd.runtime.policies import Policies
from kpmd.runtime.restore import restore
from kpmd.runtime.state import State
from kpmd.runtime.watchdog import keep_alive, watchdog_seconds

if TYPE_CHECKING:
    from kpmd.api.tracing import Traces

log = Log("kpmd")

#: How long spans that wait may take to leave a daemon that stops, at the most.
_FAREWELL_SECONDS = 3.0

#: How long one thread has the interpreter while others wait for it.
_SWITCH_SECONDS = 0.001

#: What to do about a daemon that does not start.
_HINT = "kpmd --check tells what is missing"


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
    #: How long it waits for a sign of life before it takes us for hung.
    patience: float | None = None

    @classmethod
    def from_environment(
        cls, environ: MutableMapping[str, str], passed: Sequence[tuple[str, int]] = ()
    ) -> Manager:
        """What the environment says of it; takes the variables away. ``passed``: its FDs."""
        notifier = Notifier.from_environment(environ)
        stored = [(name, fd) for name, fd in passed if is_stored(name)]
        places = max(0, capacity(environ) - handover.PLACES)
        return cls(
            notifier,
            FdStore(notifier, places),
            stored,
            watchdog_seconds(environ, os.getpid()),
        )


async def serve(
    config: Config,
    listener: Listener,
    kernel: Kernel,
    deny: DenyList | None = None,
    manager: Manager | None = None,
    policies: Policies | None = None,
    traces: Traces | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; then let what runs end and return. SIGHUP: read the policy.

    Before that everything is detached; but where the service manager is about to start us again,
    and has an FD store, what outlives a client is left in it.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    manager = manager or Manager.from_environment({})
    alive = None
    if manager.patience is not None:
        alive = asyncio.create_task(keep_alive(manager.notifier, manager.patience))
    state = State(
        kernel,
        deny=deny,
        max_targets=config.limits.targets_per_link,
        load_seconds=config.limits.load_seconds,
        store=manager.store,
        policies=policies,
        audit=Audit(*destinations(config.audit.file, config.audit.journal, os.environ)),
    )
    state.audit.record(Record(audit="start", what={"version": __version__}))
    reload = asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, reload.set)
    reloading = asyncio.create_task(_reload(state, manager.notifier, reload))
    await state.executor.run(kernel.start)
    if manager.store:
        await restore(state, manager.store, manager.stored)
    else:
        log.warning(
            "nothing survives a restart",
            reason="no service manager with an FD store started this daemon; with kpmd.service, "
            "systemd keeps persistent links and leases attached",
        )
    api = make_api(
        state,
        max_body=config.limits.body_bytes,
        max_object=config.limits.object_bytes,
        traces=traces,
    )
    runner = api.runner(config.limits.shutdown_seconds)
    await runner.setup()
    if runner.server is None:
        raise RuntimeError("aiohttp's runner was set up but made no server")
    server = await loop.create_unix_server(api.protocol(runner.server, loop), sock=listener.sock)
    warming = asyncio.create_task(_warm_up(state))
    log.info("listening", socket=listener.where, version=__version__, kernel=kernel.release)
    _keep()
    manager.notifier.send("READY=1")
    try:
        await stop.wait()
    finally:
        keep = bool(manager.store) and not await state.executor.run(is_being_stopped)
        log.info("stopping", keep=keep)
        manager.notifier.send("STOPPING=1")
        warming.cancel()
        reloading.cancel()
        await asyncio.gather(warming, reloading, return_exceptions=True)
        await wind_down(server, api, runner, state, config.limits.shutdown_seconds, keep=keep)
        state.audit.record(Record(audit="stop", what={"keep": keep}))
        await state.audit.close()
        if traces is not None:
            await traces.close(min(_FAREWELL_SECONDS, config.limits.shutdown_seconds))
        if alive is not None:
            alive.cancel()
        log.info("stopped")


def _keep() -> None:
    """Let the garbage collector never look at what was made until now.

    It stays as long as the daemon: 60,000 objects, for which each full collection would hold up the
    event loop for 17 ms. Only where ``main`` held the collector back so far.
    """
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


async def _reload(state: State, notifier: Notifier, asked: asyncio.Event) -> None:
    """Put a new policy in force whenever that is asked for; several times at once are one.

    The audit file is opened anew as well: logrotate may have moved it.
    """
    while True:
        await asked.wait()
        asked.clear()
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        _tell(notifier, "RELOADING=1", f"MONOTONIC_USEC={now}")
        state.audit.reopen()
        await state.policies.renew(state.executor)
        fault = state.policies.fault
        outcome = "ok" if fault is None else "invalid"
        what = {"source": state.policies.current.source}
        state.audit.record(Record(audit="policy", outcome=outcome, detail=fault, what=what))
        # Each line of a message is one of its own: none of what a file says may be.
        _tell(notifier, "READY=1", f"STATUS={' '.join((fault or 'policy in force').split())}")


def _tell(notifier: Notifier, *lines: str) -> None:
    """Tell the service manager what it can do without; never wait for it."""
    try:
        notifier.send(*lines, wait=False)
    except OSError as error:
        log.warning("the service manager was not told", lines=lines, error=str(error))


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


def make_traces(config: Config) -> Traces | None:
    """What traces requests, where the configuration asks for it. Raises ConfigError.

    Where it does not, nothing of OpenTelemetry is imported.
    """
    if config.tracing is None:
        return None
    try:
        from kpmd.api.tracing import Traces

        return Traces(config.tracing)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"[tracing]: {error}") from error


def run(config: Config) -> int:
    """Run the daemon; returns the exit status."""
    configure_logging(config.log_level)
    # A traceback on standard error where the watchdog ends us (SIGABRT), or a bug in C does.
    faulthandler.enable()
    raise_limits()
    # The event loop shall not wait for its turn behind the pools' threads: 5 ms are the default.
    sys.setswitchinterval(_SWITCH_SECONDS)
    read_policy = partial(policy_file.load, config.policy, config.group)
    try:
        deny = load_deny_list(config.deny_file)
        policies = Policies(read_policy(), read_policy)
        traces = make_traces(config)
    except (ConfigError, policy_file.PolicyError) as error:
        log.error("cannot start", reason=str(error), hint=_HINT)
        return 1
    files, passed = handover.split(passed_by_systemd(os.environ, os.getpid()))
    manager = Manager.from_environment(os.environ, passed)
    try:
        listener = from_systemd(passed) or make(config.socket, config.group, config.mode)
    except ListenError as error:
        log.error("cannot listen", reason=str(error), hint=_HINT)
        return 1
    limits = LoaderLimits(
        seconds=config.limits.load_seconds, memory_bytes=config.limits.load_memory_bytes
    )
    kernel = LinuxKernel(limits, handover.take(files, manager.notifier))
    try:
        uvloop.run(serve(config, listener, kernel, deny, manager, policies, traces))
    finally:
        listener.close()
    return 0
