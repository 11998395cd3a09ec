"""Workers whose process is told to end (SIGTERM), as on a machine that is about to go: they save first."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

from ray.train.backend import Backend
from ray.train.torch import TorchConfig

GRACE_SECONDS = 25.0


class Leaving:
    """One process's way out. The signal is held back until its work is saved, for `GRACE_SECONDS` at most."""

    def __init__(self) -> None:
        self.is_working = False
        self.saved = threading.Event()
        self._is_asked = False
        self._handler: Any = signal.SIG_DFL

    def install(self) -> None:
        """Take SIGTERM over; only in the main thread."""
        self._handler = signal.signal(signal.SIGTERM, self._on_signal)

    def asked(self) -> bool:
        """Whether the process is to end."""
        return self._is_asked

    def _on_signal(self, _number: int, _frame: object) -> None:
        signal.signal(signal.SIGTERM, self._handler)  # a second one ends the process at once
        self._is_asked = True
        threading.Thread(target=self._leave, daemon=True).start()

    def _leave(self) -> None:
        if self.is_working:
            self.saved.wait(GRACE_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    def __enter__(self) -> Leaving:
        self.is_working = True
        return self

    def __exit__(self, *_: object) -> None:
        self.is_working = False
        self.saved.set()


leaving = Leaving()
"""Of this process."""


def install_leaving() -> None:
    """Let this process save before it ends."""
    leaving.install()


class SavingTorchConfig(TorchConfig):
    """Ray Train's configuration for torch, with workers that save before they end.

    Ray calls the loop in a thread, where no signal can be taken over; a backend may call in the main thread before.
    """

    @property
    def backend_cls(self) -> type[Backend]:
        return SavingTorchBackend


class SavingTorchBackend(TorchConfig().backend_cls):  # type: ignore[misc]  # public by this property alone
    """Ray Train's setup of torch, and `install_leaving` on every worker."""

    def on_training_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        super().on_training_start(worker_group, backend_config)
        worker_group.execute(install_leaving)
